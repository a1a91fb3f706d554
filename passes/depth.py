"""Depth: the blocks of a model that can go, and the graph without some of them.

A block is a module of a numbered row: encoder.layer.3. Without it, what others took from it is what went into it:

    y = block(x, mask);  z = f(y)        ->        z = f(x)

x is what goes in with y's shape and dtype; of several the one that reaches y without a product, the residual stream.
What does not depend on x stays, though it is computed in there: sizes, T5's position bias of its first block.
Of a list in the output that has an entry for each block (hidden states, attention weights) the block's own goes too, as
in a model that never had it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..runtime import compat
from ..runtime.errors import PassError
from ..runtime.ops.catalog import SIMULATED
from ..runtime.ops.steps import LINEAR_OF_STEPS
from ..runtime.plan import DropBlock
from ..runtime.program import Program, same_shape, value_of
from .outputs import given, leave_out, lists

aten = torch.ops.aten

Spread = Literal["even", "ends", "first", "last"]
By = Literal["influence", "change", "greedy"]
Measure = Literal["output", "logits", "loss"]

CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)

# What a residual stream does not pass.
PRODUCTS = frozenset(
    {
        *CONVOLUTIONS,
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.bmm.default,
        aten.matmul.default,
        aten.embedding.default,
        aten.scaled_dot_product_attention.default,
        LINEAR_OF_STEPS.overload,
    }
)

# Values simulated in fewer bits stand beside the stream, wherever they were placed, and are no part of it.
BESIDE = frozenset(simulated.overload for simulated in SIMULATED) - {LINEAR_OF_STEPS.overload}


@dataclass(frozen=True, eq=False)
class Block:
    """One module of a row, as a graph has it. kind: its class

    instead: by value that others use, what stands for it without the block; reason: why it cannot go, or empty
    listed: values for which nothing stands, and which only lists of the output have
    calls: how often it is called
    """

    path: str
    kind: str
    nodes: tuple[fx.Node, ...]
    instead: dict[fx.Node, fx.Node] = field(default_factory=dict)
    reason: str = ""
    listed: tuple[fx.Node, ...] = ()
    calls: int = 1

    @property
    def number(self) -> int:
        """Its place in the row, as the module has it."""
        return int(self.path.rpartition(".")[2])


@dataclass(frozen=True)
class Row:
    """Blocks below one path, in the order in which they are called.

    lists: flat places of each list inside the output that has an entry for each block
    """

    path: str
    blocks: tuple[Block, ...]
    lists: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        return f"{self.path or repr('')} of {len(self.blocks)}"


@dataclass(frozen=True, kw_only=True)
class DepthRule:
    """Which blocks of a row stay. row: its path, None for the only one; layers: their numbers, or how many of them

    spread: of a number k of n: `even` the last of each of k equal parts, so 1, 3, 5 of 6; `ends` from the first to the
        last at equal distances; the `first` or `last` k
    by: in place of a spread, what data says (see `influence`); measure: how a change is measured
    max_change: with greedy, the most that may change; then `layers` is the least number that stays
    """

    layers: tuple[int, ...] | int
    row: str | None = None
    spread: Spread = "even"
    by: By | None = None
    measure: Measure = "output"
    max_change: float | None = None


def spread_over(n: int, k: int, spread: Spread) -> list[int]:
    """Which k of n, by position, 0 < k <= n."""
    if spread in ("first", "last"):
        return list(range(k) if spread == "first" else range(n - k, n))
    if spread == "ends" and k > 1:
        return [round(i * (n - 1) / (k - 1)) for i in range(k)]
    return [(i + 1) * n // k - 1 for i in range(k)]


def find_rows(program: Program, least: int = 2, *, shared: bool = False) -> list[Row]:
    """All rows of at least so many blocks, in the order in which they are called; some lie in blocks of others.

    shared: also those of one block that is called several times, which cannot go
    """
    calls: dict[str, dict[str, list[fx.Node]]] = {}  # by path: the nodes of each call
    kinds: dict[str, str] = {}
    outer = set[str]()  # modules that have others inside
    for node in program.graph.nodes:
        above = ""
        for call, path, kind in compat.module_calls(node) if node.op == "call_function" else ():
            calls.setdefault(path, {}).setdefault(call, []).append(node)
            kinds[path] = kind
            outer.add(above)
            above = path
    rows: dict[str, list[str]] = {}
    for path in calls:
        above, _, number = path.rpartition(".")
        if number.isdigit() and path in outer:
            rows.setdefault(above, []).append(path)
    found = {r: paths for r, paths in rows.items() if len(paths) >= least or (shared and len(calls[paths[0]]) > 1)}
    values, entries = given(program), lists(program.contract.output)
    elsewhere = {value for place, value in enumerate(values) if not any(place in places for places in entries)}
    only = set(values) - elsewhere
    settled: list[Row] = []
    for path, paths in found.items():
        row = Row(path, tuple(_block(p, kinds[p], list(calls[p].values()), only) for p in paths))
        own = [places for places in entries if _has_each(places, values, row)]  # of rows in rows the outer comes first
        entries = [places for places in entries if places not in own]
        alone = {values[place] for places in own for place in places}
        settled.append(Row(path, tuple(_listed(block, alone) for block in row.blocks), tuple(map(tuple, own))))
    return settled


def _has_each(places: Sequence[int], values: Sequence[fx.Node], row: Row) -> bool:
    """Whether a list has a value of each block or one that goes into it, and at most one more."""
    near = [{*block.nodes, *block.instead.values()} for block in row.blocks]
    fits = len(places) in (len(near), len(near) + 1)
    return fits and all(any(values[place] in of for place in places) for of in near)


def _listed(block: Block, entries: Collection[fx.Node]) -> Block:
    alone = next((out for out in block.listed if out not in entries), None)
    return block if alone is None else replace(block, instead={}, listed=(), reason=_nothing_for(alone))


def _nothing_for(out: fx.Node) -> str:
    return f"its {out.name} is used outside, and nothing that goes in stands for it"


def _block(path: str, kind: str, calls: Sequence[Sequence[fx.Node]], only_listed: Collection[fx.Node]) -> Block:
    nodes = tuple(node for call in calls for node in call)
    if len(calls) > 1:
        return Block(path, kind, nodes, reason=f"it is called {len(calls)} times", calls=len(calls))
    inside = set(nodes)
    taken = [n for n in nodes if any(user not in inside for user in n.users) and not _is_beside(n)]
    needs = {out: _sources(out, inside) for out in taken}
    instead: dict[fx.Node, fx.Node] = {}
    for out in filter(_is_tensor, taken):
        alike = [x for x in needs[out] if _is_tensor(x) and _alike(x, out) and not _is_beside(x)]
        if len(alike) > 1:
            stream = _sources(out, inside, past=PRODUCTS)
            alike = [x for x in alike if x in stream]
            if len(alike) != 1:
                return Block(path, kind, nodes, reason=f"{len(alike)} values that go in may stand for {out.name}")
        if alike:
            instead[out] = alike[0]
    if not instead:
        return Block(path, kind, nodes, reason="nothing that goes in has the shape of what comes out")
    alone = [out for out in taken if out not in instead and needs[out] & set(instead.values())]
    for out in alone:
        if out not in only_listed or not all(user in inside or user.op == "output" for user in out.users):
            return Block(path, kind, nodes, reason=_nothing_for(out))
    return Block(path, kind, nodes, instead, listed=tuple(alone))


def _sources(out: fx.Node, inside: set[fx.Node], past: frozenset[Any] = frozenset()) -> set[fx.Node]:
    """What of the outside `out` depends on, by calls that are none of `past`."""
    seen, ahead = {out}, [out]
    while ahead:
        node = ahead.pop()
        if node in inside and node.target not in past:
            fresh = [x for x in node.all_input_nodes if x not in seen]
            seen.update(fresh)
            ahead += fresh
    return seen - inside


def _is_beside(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, fx.Node) and source.target in BESIDE


def _is_tensor(node: fx.Node) -> bool:
    return node.op in ("call_function", "placeholder") and isinstance(node.meta.get("val"), Tensor)


def _alike(x: fx.Node, y: fx.Node) -> bool:
    return value_of(x).dtype == value_of(y).dtype and same_shape(x, y)


def outermost(rows: Sequence[Row]) -> list[Row]:
    """Rows that lie in no block of another."""
    inner = {b.path for row in rows for b in row.blocks}
    return [row for row in rows if not any(row.path.startswith(f"{path}.") for path in inner)]


def drop_blocks(program: Program, drops: Collection[DropBlock]) -> Program:
    """The graph without these blocks, in place. Raises PassError for one that cannot go here."""
    paths = {edit.path for edit in drops}
    rows = find_rows(program)
    known = {block.path: block for row in rows for block in row.blocks}
    for path in paths:
        reason = known[path].reason if path in known else "this graph does not have it"
        if reason:
            raise PassError(f"block {path} cannot be dropped", required="what was decided for the model", found=reason)
    stands: dict[fx.Node, fx.Node] = {}
    gone = [block for path, block in known.items() if path in paths]
    for block in gone:
        for out, x in block.instead.items():
            stands[out] = stands.get(x, x)
    entries = {place for row in rows for place in _entries_that_go(program, row, paths, stands)}
    if entries:
        leave_out(program, entries)
    for block in gone:
        inside = set(block.nodes)
        for out in block.instead:
            for user in [user for user in out.users if user not in inside]:
                user.replace_input_with(out, stands[out])
    for node in reversed([node for block in gone for node in block.nodes]):
        if not node.users:  # with what it draws and writes; what others need of it stays
            program.graph.erase_node(node)
    program.tidy()
    return program


def _entries_that_go(program: Program, row: Row, paths: Collection[str], stands: Mapping[fx.Node, fx.Node]) -> set[int]:
    """Of each list with an entry for each block: those of the blocks that go.

    Where the list has what goes into blocks (as a model does that normalises what comes out of the last), that.
    """
    values, going = given(program), set[int]()
    for places in row.lists:
        left = set(places)
        for block in (block for block in row.blocks if block.path in paths):
            inside = set(block.nodes)
            own = {place for place in left if values[place] in inside}
            before: fx.Node | None = next(iter(block.instead.values()))
            while not own and before is not None:
                own = {place for place in left if values[place] is before}
                before = stands.get(before)
            left -= own
        going |= set(places) - left
    return going
