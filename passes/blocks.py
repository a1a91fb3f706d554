"""Blocks of a graph as graphs of their own, and what a teacher's graph has in the place of each.

    y = block(x, mask, ...; theta)      a Subgraph takes x, mask, ... and gives y; theta is what it alone reads

What quantises an activation on its way into a block belongs to the block: a Subgraph takes x as it was before.

A student without some of its blocks keeps their numbers. Its block n takes what the teacher has at the end of the
last block before n that the student has, and is to give what the teacher has at the end of block n; so it learns what
the blocks that are missing before it did as well.

Not handled, with a reason: blocks that are called several times, that write what they are given, or all of whose
parameters others read too. Of what a block gives, values that have no input's shape are no target where others do
(T5's position bias), and parameters that such values depend on are left as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..runtime.errors import DistillationError, nearest
from ..runtime.plan import DropBlock
from ..runtime.program import Program, escapes, is_float, source_of, value_of, writes
from ..runtime.store import Store
from .depth import BESIDE, Block, Row, find_rows, outermost
from .quantize.insert import SITE
from .tokens import mask_of


@dataclass(frozen=True, eq=False)
class Subgraph:
    """A block cut out of a program; all in graph order.

    nodes: what it computes and the tensors that it reads; inputs, outputs: nodes of the whole graph
    own: names of the parameters to train; reason: why there is nothing to train, or empty
    """

    program: Program
    path: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    own: tuple[str, ...]
    reason: str = ""

    def graph(self) -> fx.Graph:
        """Inputs by position to a tuple of outputs."""
        graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.inputs:
            values[node] = graph.placeholder(node.name)
        for node in self.nodes:
            values[node] = graph.node_copy(node, values.__getitem__)
        graph.output(tuple(values[node] for node in self.outputs))
        return graph

    def reads(self) -> dict[str, Tensor]:
        """The stored tensors that it reads, by name."""
        held = {str(node.target): self.program.store.get(str(node.target)) for node in self.nodes if _is_read(node)}
        return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}

    def module(self, trained: Collection[str]) -> fx.GraphModule:
        """The block by itself, on the program's own tensors; those that are not `trained` ask for no gradient."""
        store = Store()
        for name, tensor in self.reads().items():
            store.put(name, tensor if name in trained else tensor.detach())
        return Program.of(self.graph(), store, self.program.contract).module


@dataclass(frozen=True, eq=False)
class BlockPair:
    """What a block of the student learns: nodes of the teacher's graph in the order of the part's.

    given: the teacher's values that stand for the part's inputs; wanted: those that it is to give
    mask: which input of the teacher's graph says what is padding in them, if any does
    """

    part: Subgraph
    given: tuple[fx.Node, ...]
    wanted: tuple[fx.Node, ...]
    mask: int | None


class Cutter:
    """Cuts blocks out of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.stored = set[fx.Node]()  # what depends on no input of the graph
        for node in self.nodes:
            read = node.all_input_nodes
            if _is_read(node) or (node.op == "call_function" and read and all(x in self.stored for x in read)):
                self.stored.add(node)

    def cut(self, block: Block) -> Subgraph:
        """The block as a graph of its own."""
        inside = self._hull(block)
        given = [n for n in self.nodes if n in inside and not self._fakes(n) and self._leaves(n, inside)]
        floats = [n for n in given if is_float(n)]
        shapes = {_shape(n) for n in self._reach(floats, inside)[1] if is_float(n)}
        outputs = [n for n in floats if _shape(n) in shapes] or floats
        taken, inputs = self._computing(outputs, inside)
        others = self._reach([n for n in given if n not in outputs], inside, but=set(outputs))[0]
        own = self._own(taken, {str(n.target) for n in others if _is_read(n)}, inside)
        return Subgraph(
            self.program,
            block.path,
            self.ordered(taken),
            self.ordered(inputs),
            tuple(outputs),
            tuple(own),
            self._reason(block, inside, inputs, outputs, own),
        )

    def _hull(self, block: Block) -> set[fx.Node]:
        """The block's nodes, and what passes have put between them."""
        own = set(block.nodes)
        after, before = set[fx.Node](), set[fx.Node]()
        for node in self.nodes:
            if node in own or any(x in after for x in node.all_input_nodes):
                after.add(node)
        for node in reversed(self.nodes):
            if node in own or any(user in before for user in node.users):
                before.add(node)
        return after & before

    def _fakes(self, node: fx.Node) -> bool:
        """Whether a node only simulates how linear layers and convolutions take their input."""
        if node.target is operator.getitem:
            source = node.args[0]
            return isinstance(source, fx.Node) and self._fakes(source)
        return node.target in BESIDE and all(SITE in user.meta for user in _past_items(node))

    def _leaves(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether anything outside takes a value."""
        return any(self._leaves(u, inside) if self._fakes(u) else u not in inside for u in node.users)

    def _reach(
        self, ends: Sequence[fx.Node], inside: set[fx.Node], but: Collection[fx.Node] = ()
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        """(what `ends` are computed from within a block, what that takes from outside); not through `but`."""
        taken, inputs, ahead = set[fx.Node](), set[fx.Node](), [n for n in ends if n not in but]
        while ahead:
            node = ahead.pop()
            if node in taken or node in but:
                continue
            if node in inside or node in self.stored or self._fakes(node):
                taken.add(node)
                ahead += node.all_input_nodes
            else:
                inputs.add(node)
        return taken, inputs

    def _computing(self, outputs: Sequence[fx.Node], inside: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
        """`_reach`, with the calls that write what is computed on the way."""
        ends = list(outputs)
        while True:
            taken, inputs = self._reach(ends, inside)
            more = [n for n in inside - taken if writes(n) and self._base(n) in taken]
            if not more:
                return taken, inputs
            ends += more

    @staticmethod
    def _base(node: fx.Node) -> fx.Node | None:
        """What a call that writes its first argument writes."""
        return source_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None

    def _own(self, taken: set[fx.Node], shared: Collection[str], inside: set[fx.Node]) -> list[str]:
        """Parameters that nothing reads but what was taken."""

        def within(node: fx.Node) -> bool:
            return all(user in taken and (user in inside or within(user)) for user in node.users)

        reads: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if _is_read(node):
                reads.setdefault(self.program.store.canonical(str(node.target)), []).append(node)
        found = []
        for name, nodes in reads.items():
            held = self.program.store.get(name)
            learns = isinstance(held, nn.Parameter) and held.requires_grad and held.is_floating_point()
            if learns and name not in shared and all(node in taken and within(node) for node in nodes):
                found.append(name)
        return found

    def _reason(
        self,
        block: Block,
        inside: set[fx.Node],
        inputs: Collection[fx.Node],
        outputs: Collection[fx.Node],
        own: Collection[str],
    ) -> str:
        if block.calls > 1:
            return f"it is called {block.calls} times"
        if not outputs:
            return "nothing that it gives is a floating-point tensor"
        bases = {source_of(x) for x in inputs}
        for base in map(self._base, filter(writes, inside)):
            if base is not None and (base in bases or base in self.stored):
                return f"it writes {base.name} in place"
        return "" if own else "others read all of its parameters, or it has none that are trained"

    def ordered(self, nodes: Collection[fx.Node]) -> tuple[fx.Node, ...]:
        """In graph order."""
        return tuple(sorted(nodes, key=self.place.__getitem__))


def pair_blocks(
    student: Program, teacher: Program, drops: Collection[DropBlock]
) -> tuple[list[BlockPair], dict[str, str]]:
    """(what each block of the student learns, in the order of the teacher's graph; by path, why others learn nothing).

    drops: blocks of the model that the student is without. Raises DistillationError where the teacher has no blocks
    that repeat, where the two do not have the same, and where what they pass on has other shapes.
    """
    rows = outermost(find_rows(teacher))
    if not rows:
        raise DistillationError(
            "the teacher has no blocks to learn from one by one",
            required='repeated blocks, with names such as "encoder.layer.3"',
            found="none",
            cure="train with student.loss(batch), which needs none",
        )
    known = {block.path: block for row in find_rows(student, 1) for block in row.blocks}
    gone = {edit.path for edit in drops}
    for row in rows:
        _require_same(row, known, gone)
    ours, theirs = Cutter(student), Cutter(teacher)
    stands = _stands(rows, gone)
    found, left = list[BlockPair](), dict[str, str]()
    for block in (block for row in rows for block in row.blocks if block.path not in gone):
        part, model = ours.cut(known[block.path]), theirs.cut(block)
        if part.reason:
            left[block.path] = part.reason
            continue
        given = theirs.ordered({stands.get(node, node) for node in model.inputs})
        for what, mine, other in (("takes", part.inputs, given), ("gives", part.outputs, model.outputs)):
            _require_alike(f"{block.path} {what}", mine, other)
        found.append(BlockPair(part, given, model.outputs, _mask(teacher, block.path, model.outputs)))
    if not found:
        path, reason = next(iter(left.items()))
        raise DistillationError(
            "no block of the student can be trained by itself",
            required="blocks that are called once and have parameters of their own",
            found=f"{path}: {reason}",
            cure="train with student.loss(batch), which needs none",
        )
    return sorted(found, key=lambda lesson: max(map(theirs.place.__getitem__, lesson.wanted))), left


def may_be_overwritten(node: fx.Node) -> bool:
    """Whether a later call may write the memory of a value."""
    return escapes(source_of(node))


def _past_items(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if user.target is operator.getitem:
            yield from _past_items(user)
        else:
            yield user


def _is_read(node: fx.Node) -> bool:
    return node.op == "get_attr"


def _shape(node: fx.Node) -> tuple[torch.dtype, tuple[str, ...]]:
    value = value_of(node)
    return value.dtype, tuple(str(size) for size in value.shape)


def _require_same(row: Row, known: Collection[str], gone: Collection[str]) -> None:
    own = [path for path in known if path.rpartition(".")[0] == row.path and path not in gone]
    wanted = [block.path for block in row.blocks if block.path not in gone]
    if not own:
        near = nearest(row.path, dict.fromkeys(path.rpartition(".")[0] for path in known))
        raise DistillationError(
            "the student has no blocks where the teacher has some",
            required=f"blocks of {row}",
            found=f"nearest names: {', '.join(near) or 'none'}",
            cure="give a teacher of the student's architecture, such as the model that it was made of",
        )
    odd = sorted(set(own) ^ set(wanted))
    if odd:
        raise DistillationError(
            f"student and teacher do not have the same blocks in {row.path}",
            required=f"the {len(wanted)} of the teacher that the recipe keeps",
            found=f"{len(own)} in the student; one alone has {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}",
            cure="leave layers out with the recipe's depth: {keep_layers: [...]}: then each keeps its number",
        )


def _require_alike(what: str, mine: Sequence[fx.Node], other: Sequence[fx.Node]) -> None:
    pairs = [(a.meta.get("val"), b.meta.get("val")) for a, b in zip(mine, other, strict=False)]
    if len(mine) != len(other) or not all(_fits(a, b) for a, b in pairs):
        raise DistillationError(
            f"the student's block {what} something else than the teacher's",
            required=_spoken(other),
            found=_spoken(mine),
            cure="give a teacher of the same architecture and width, such as the model that the student was made of",
        )


def _fits(a: object, b: object) -> bool:
    """Sizes that vary fit any."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, Tensor) == isinstance(b, Tensor)
    fixed = [(m, n) for m, n in zip(a.shape, b.shape, strict=False) if isinstance(m, int) and isinstance(n, int)]
    return a.dtype == b.dtype and a.dim() == b.dim() and all(m == n for m, n in fixed)


def _spoken(nodes: Sequence[fx.Node]) -> str:
    """The tensors among them."""
    shapes = {node.name: node.meta["val"].shape for node in nodes if isinstance(node.meta.get("val"), Tensor)}
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes.items())


def _stands(rows: Sequence[Row], gone: Collection[str]) -> dict[fx.Node, fx.Node]:
    """By value that a dropped block gives: what the teacher has where the last block before it ends that stays."""
    stands: dict[fx.Node, fx.Node] = {}
    for block in (block for row in rows for block in row.blocks if block.path in gone):
        stands.update({out: stands.get(x, x) for out, x in block.instead.items()})
    return stands


def _mask(teacher: Program, path: str, wanted: Sequence[fx.Node]) -> int | None:
    """The place of the input that marks padding in values (B, T, ...)."""
    places = {mask_of(teacher, node, decodes="decoder" in path) for node in wanted}
    return places.pop() if len(places) == 1 else None
