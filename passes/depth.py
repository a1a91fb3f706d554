"""Depth: the blocks of a model that can go, and the graph without some of them.

A block is a module of a numbered row: encoder.layer.3. Without it, what others took from it is what went into it:

    y = block(x, mask);  z = f(y)        ->        z = f(x)

x is what goes in with y's shape and dtype; of several the one that reaches y without a product, the residual stream.
What does not depend on x stays, though it is computed in there: sizes, T5's position bias of its first block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..runtime import compat
from ..runtime.errors import PassError, RecipeError
from ..runtime.plan import DropBlock
from ..runtime.program import Program, value_of

aten = torch.ops.aten

Spread = Literal["even", "ends", "first", "last"]

# What a residual stream does not pass.
PRODUCTS = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.bmm.default,
        aten.matmul.default,
        aten.embedding.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.scaled_dot_product_attention.default,
    }
)


@dataclass(frozen=True, eq=False)
class Block:
    """One module of a row, as a graph has it. kind: its class

    instead: by value that others use, what stands for it without the block; reason: why it cannot go, or empty
    calls: how often it is called
    """

    path: str
    kind: str
    nodes: tuple[fx.Node, ...]
    instead: dict[fx.Node, fx.Node] = field(default_factory=dict)
    reason: str = ""
    calls: int = 1

    @property
    def number(self) -> int:
        """Its place in the row, as the module has it."""
        return int(self.path.rpartition(".")[2])


@dataclass(frozen=True)
class Row:
    """Blocks below one path, in the order in which they are called."""

    path: str
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        return f"{self.path or repr('')} of {len(self.blocks)}"


@dataclass(frozen=True, kw_only=True)
class DepthRule:
    """Which blocks of a row stay. row: its path, None for the only one; layers: their numbers, or how many of them

    spread: of a number k of n: `even` the last of each of k equal parts, so 1, 3, 5 of 6; `ends` from the first to the
        last at equal distances; the `first` or `last` k
    """

    layers: tuple[int, ...] | int
    row: str | None = None
    spread: Spread = "even"


def spread_over(n: int, k: int, spread: Spread) -> list[int]:
    """Which k of n, by position, 0 < k <= n."""
    if spread in ("first", "last"):
        return list(range(k) if spread == "first" else range(n - k, n))
    if spread == "ends" and k > 1:
        return [round(i * (n - 1) / (k - 1)) for i in range(k)]
    return [(i + 1) * n // k - 1 for i in range(k)]


def find_rows(program: Program, least: int = 2) -> list[Row]:
    """All rows of at least so many blocks, in the order in which they are called; some lie in blocks of others."""
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
    found = {row: paths for row, paths in rows.items() if len(paths) >= least}
    return [
        Row(row, tuple(_block(path, kinds[path], list(calls[path].values())) for path in paths))
        for row, paths in found.items()
    ]


def _block(path: str, kind: str, calls: Sequence[Sequence[fx.Node]]) -> Block:
    nodes = tuple(node for call in calls for node in call)
    if len(calls) > 1:
        return Block(path, kind, nodes, reason=f"it is called {len(calls)} times", calls=len(calls))
    inside = set(nodes)
    taken = [n for n in nodes if any(user not in inside for user in n.users)]
    needs = {out: _sources(out, inside) for out in taken}
    instead: dict[fx.Node, fx.Node] = {}
    for out in filter(_is_tensor, taken):
        alike = [x for x in needs[out] if _is_tensor(x) and _alike(x, out)]
        if len(alike) > 1:
            stream = _sources(out, inside, past=PRODUCTS)
            alike = [x for x in alike if x in stream]
            if len(alike) != 1:
                return Block(path, kind, nodes, reason=f"{len(alike)} values that go in may stand for {out.name}")
        if alike:
            instead[out] = alike[0]
    if not instead:
        return Block(path, kind, nodes, reason="nothing that goes in has the shape of what comes out")
    for out in taken:
        if out not in instead and needs[out] & set(instead.values()):
            return Block(
                path, kind, nodes, reason=f"its {out.name} is used outside, and nothing that goes in stands for it"
            )
    return Block(path, kind, nodes, instead)


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


def _is_tensor(node: fx.Node) -> bool:
    return node.op in ("call_function", "placeholder") and isinstance(node.meta.get("val"), Tensor)


def _alike(x: fx.Node, y: fx.Node) -> bool:
    a, b = value_of(x), value_of(y)
    return a.dtype == b.dtype and [str(n) for n in a.shape] == [str(n) for n in b.shape]


def drops_of(program: Program, rules: Sequence[DepthRule]) -> list[DropBlock]:
    """The blocks that go. Raises RecipeError for a row that is not there, for layers that it does not have, none at
    all, or one twice, and for a block that cannot go.
    """
    rows = find_rows(program) if rules else []
    gone: list[DropBlock] = []
    for rule in rules:
        row = _row(rows, rule)
        stay = _staying(row, rule)
        for block in (block for block in row.blocks if block.number not in stay):
            if block.reason:
                raise RecipeError(
                    f"block {block.path} cannot be dropped",
                    required="a block that gives on what it is given, in the same shape",
                    found=block.reason,
                    cure="keep it, with keep_layers: [...]",
                )
            gone.append(DropBlock(path=block.path))
    paths = [edit.path for edit in gone]
    if len(set(paths)) < len(paths):
        raise RecipeError("two rules of depth concern one row", required="one rule for each row", found=paths[0])
    return gone


def outermost(rows: Sequence[Row]) -> list[Row]:
    """Rows that lie in no block of another."""
    inner = {b.path for row in rows for b in row.blocks}
    return [row for row in rows if not any(row.path.startswith(f"{path}.") for path in inner)]


def _row(rows: Sequence[Row], rule: DepthRule) -> Row:
    named = outermost(rows) if rule.row is None else [row for row in rows if row.path == rule.row]
    if len(named) == 1:
        return named[0]
    raise RecipeError(
        "a rule of depth means no row of blocks" if not named else "a rule of depth may mean several rows of blocks",
        required="row: the path of one",
        found=rule.row if not named else ", ".join(map(str, named)),
        cure=f"rows are {', '.join(map(str, rows[:6]))}" if rows else "this model has no blocks that repeat",
    )


def _staying(row: Row, rule: DepthRule) -> set[int]:
    numbers = [block.number for block in row.blocks]
    if isinstance(rule.layers, int):
        kinds = sorted({block.kind.rpartition(".")[2] for block in row.blocks})
        if not 0 < rule.layers <= len(numbers):
            raise RecipeError(f"a depth of {row}", required=f"1 to {len(numbers)} layers", found=rule.layers)
        if len(kinds) > 1:
            raise RecipeError(
                f"the blocks of {row.path} are not alike", required="keep_layers: [...]", found=", ".join(kinds)
            )
        return {numbers[i] for i in spread_over(len(numbers), rule.layers, rule.spread)}
    strange = sorted(set(rule.layers) - set(numbers))
    twice = sorted({n for n in rule.layers if rule.layers.count(n) > 1})
    if strange or twice or not rule.layers:
        raise RecipeError(
            f"layers of {row}",
            required=f"numbers from {min(numbers)} to {max(numbers)}, each once, and at least one",
            found=f"{strange[0]}" if strange else f"{twice[0]} twice" if twice else "none",
        )
    return set(rule.layers)


def dropped(program: Program, drops: Collection[DropBlock]) -> Program:
    """The graph without these blocks, in place. Raises PassError for one that cannot go here."""
    paths = {edit.path for edit in drops}
    known = {block.path: block for row in find_rows(program) for block in row.blocks}
    for path in paths:
        reason = known[path].reason if path in known else "this graph does not have it"
        if reason:
            raise PassError(f"block {path} cannot be dropped", required="what was decided for the model", found=reason)
    stands: dict[fx.Node, fx.Node] = {}
    gone = [block for path, block in known.items() if path in paths]
    for block in gone:
        inside = set(block.nodes)
        for out, x in block.instead.items():
            stands[out] = stands.get(x, x)
            for user in [user for user in out.users if user not in inside]:
                user.replace_input_with(out, stands[out])
    for node in reversed([node for block in gone for node in block.nodes]):
        if not node.users:  # with what it draws and writes; what others need of it stays
            program.graph.erase_node(node)
    program.tidy()
    return program
