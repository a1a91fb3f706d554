"""One walk over a graph that gives every tensor its axes: which index of a parameter is which index of another.

The walk takes each call's rule from `TRANSFER`. A call without one freezes what goes in and what comes out. Beside
the axes it keeps what pruning has to do to the graph:

    Ending    where an axis is summed over, so that a cut index must read zero there (or be left out of a statistic)
    Size      a number in a call that counts indices of an axis, or is a place on it
    Pointer   a tensor whose values are indices of an axis: which experts a router has chosen

Inputs, outputs, integers and constants are frozen; float parameters and buffers are free. A pointer's values are
numbered anew when its axis is cut, so a call that reads them and has no rule for that freezes the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ...runtime import compat
from ...runtime.ops.require import unchecked
from ...runtime.program import Program
from ..match import full_args
from ..watch import watch
from .axes import Atom, Axis, Space, leaves, size

Axes = list[Axis]
How = Literal["zero", "mean", "softmax", "largest", "smallest", "layer_norm", "rms_norm", "group_norm", "batch_norm"]


@dataclass(frozen=True)
class Ending:
    """A call that sums over an axis. dim: of the operand at position `argument`, or of item `index` of a list there."""

    node: fx.Node
    how: How
    argument: int
    dim: int
    index: int | None = None


@dataclass(frozen=True)
class Size:
    """A number that goes by an axis: `argument` of a call (its element `index`, if it is a list).

    upto: the number is a place on the axis, not how many indices it has; more: it is that much larger
    """

    node: fx.Node
    argument: int
    index: int | None
    axis: Axis
    upto: int | None = None
    more: int = 0


@dataclass(frozen=True, eq=False)
class Choice:
    """A call that takes the largest of an axis, and their numbers.

    weighed: what the chosen ones weigh, if that is not what was compared: a pointer and a tensor of its shape; or
        None and a tensor that has the axis as a dimension
    """

    node: fx.Node
    axis: Axis
    weighed: list[tuple[fx.Node | None, fx.Node]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Pointer:
    """The values of a tensor are indices of `axis`, which `choices` have made."""

    axis: Axis
    choices: tuple[Choice, ...]


@dataclass
class Walk:
    """The analysis of one program.

    values: of every node at one set of sizes; axes: of every tensor, a list for a call that gives several
    stored: axes of parameters and float buffers, by name; roles: what axes are in the calls that they come to
    points: of every tensor that is a pointer, a list for a call that gives several; read: (reader, pointer) by rules
    floors: how many indices of an axis have to stay
    """

    program: Program
    space: Space = field(default_factory=Space)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    axes: dict[fx.Node, Any] = field(default_factory=dict)
    stored: dict[str, Axes] = field(default_factory=dict)
    roles: list[tuple[str, Axis]] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    points: dict[fx.Node, Any] = field(default_factory=dict)
    read: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)
    choices: list[Choice] = field(default_factory=list)
    floors: list[tuple[Axis, int]] = field(default_factory=list)

    @staticmethod
    def over(program: Program, rules: Callable[[fx.Node], Rule | None]) -> Walk:
        """Walk a canonical program without dead code."""
        walk = Walk(program)
        walk.values = concrete_values(program)
        for node in program.graph.nodes:
            walk.space.op = node.name
            walk._visit(node, rules)
            walk._require_read(node)
        walk._freeze_unused()
        return walk

    def on(self, program: Program) -> Walk:
        """The same analysis of a copy of the program."""
        to = dict(zip(self.program.graph.nodes, program.graph.nodes, strict=True))
        return replace(
            self,
            program=program,
            values={to[node]: value for node, value in self.values.items()},
            axes={to[node]: axes for node, axes in self.axes.items()},
            endings=[replace(ending, node=to[ending.node]) for ending in self.endings],
            sizes=[replace(number, node=to[number.node]) for number in self.sizes],
        )

    def _visit(self, node: fx.Node, rules: Callable[[fx.Node], Rule | None]) -> None:
        value = self.values.get(node)
        if node.op == "placeholder":
            self.axes[node] = self.fresh(value, f"input {node.name}")
        elif node.op == "get_attr":
            self.axes[node] = self._of_stored(str(node.target), value)
        elif node.op == "output":
            for source in node.all_input_nodes:
                self.freeze(source, "it is an output")
        elif node.op == "call_function":
            rule = rules(node)
            if rule is not None and (isinstance(value, Tensor) or _several(value)):
                self.axes[node] = rule(self, node, full_args(node))
            else:
                self.unknown(node)
        else:
            self.unknown(node)

    def _require_read(self, node: fx.Node) -> None:
        """A call that reads indices by a rule of its own says so; any other one freezes what they are indices of."""
        for source in node.all_input_nodes:
            if source in self.points and (node, source) not in self.read and _name(node) not in _SHAPES_ONLY:
                for pointer in _pointers(self.points[source]):
                    self.space.freeze(pointer.axis, f"{node.name}: it reads which of them were chosen")

    def _freeze_unused(self) -> None:
        """The largest of an axis by which nothing is chosen depend on all of it."""
        used = self.leaves_with("experts")
        for choice in self.choices:
            for leaf in leaves(choice.axis):
                if leaf not in used:
                    leaf.reason = leaf.reason or f"{choice.node.name}: it looks at all of it"

    def _of_stored(self, name: str, value: Any) -> Axes:
        name = self.program.store.canonical(name)
        if name not in self.stored:
            kept = not isinstance(value, Tensor) or name.startswith("constants.")
            free = not kept and (value.is_floating_point() or value.is_complex())
            self.stored[name] = self.fresh(value, None if free else f"{name} is a constant")
        return self.stored[name]

    def fresh(self, value: Any, reason: str | None) -> Any:
        """New axes for a value, frozen where there is a reason; a list of them for several values."""
        if isinstance(value, Tensor):
            return [self.space.axis(int(n), reason) for n in value.shape]
        if isinstance(value, list | tuple):
            return [self.fresh(part, reason) for part in value]
        return []

    def freeze(self, node: fx.Node, reason: str) -> None:
        """Nothing of a value may be pruned."""
        for axis in _flat(self.axes.get(node, [])):
            self.space.freeze(axis, reason)

    def unknown(self, node: fx.Node) -> Any:
        """The axes of a call that says nothing about them: what goes in and what comes out is frozen."""
        if isinstance(self.values.get(node), int | float | bool):
            return []  # a size of its operands, which changes nothing about them
        reason = f"no rule for {_name(node)}"
        for source in node.all_input_nodes:
            self.freeze(source, reason)
        self.axes[node] = self.fresh(self.values.get(node), reason)
        return self.axes[node]

    def __getitem__(self, node: Any) -> Axes:
        """The axes of one tensor."""
        found: Axes = self.axes[node]
        return found

    def shape(self, node: Any) -> list[int]:
        """Of a tensor."""
        return [int(n) for n in self.values[node].shape]

    def number(self, value: Any) -> Any:
        """An argument as the walk has it: nodes of numbers as their numbers."""
        return fx.node.map_arg(value, lambda node: self.values[node])

    def end(self, node: fx.Node, argument: int, dim: int, how: How = "zero", index: int | None = None) -> None:
        """The call sums over a dimension of an operand."""
        self.endings.append(Ending(node, how, argument, dim, index))

    def size(
        self,
        node: fx.Node,
        argument: int,
        axis: Axis,
        index: int | None = None,
        upto: int | None = None,
        *,
        more: int = 0,
    ) -> None:
        """The call has a number that goes by an axis."""
        self.sizes.append(Size(node, argument, index, axis, upto, more))

    def pointer(self, node: Any) -> Pointer | None:
        """What a tensor's values are indices of, if they are."""
        found = self.points.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Pointer) else None

    def follow(self, node: fx.Node, source: fx.Node, pointer: Any = None) -> None:
        """`node` reads the indices in `source` as its rule knows; with a pointer its values are indices too."""
        self.read.add((node, source))
        if pointer is not None:
            self.points[node] = pointer

    def role(self, role: str, *axes: Axis) -> None:
        """Say what axes are here: heads, channels or experts."""
        self.roles += [(role, axis) for axis in axes]

    def leaves_with(self, role: str) -> set[Atom]:
        """All leaves of axes that have a role."""
        return {leaf for own, axis in self.roles if own == role for leaf in leaves(axis)}

    def tie_broadcast(self, *operands: Any) -> Axes:
        """Operands met element by element; the axes of the result."""
        known = [self[node] for node in operands if isinstance(node, fx.Node) and node in self.axes]
        return self.broadcast(*known)

    def broadcast(self, *operands: Axes) -> Axes:
        """Axes aligned at the last one; those of size 1 follow."""
        depth = max((len(axes) for axes in operands), default=0)
        result: Axes = []
        for i in range(depth, 0, -1):
            wide = [axes[-i] for axes in operands if len(axes) >= i and size(axes[-i]) != 1]
            for other in wide[1:]:
                self.space.tie(wide[0], other)
            result.append(wide[0] if wide else ())
        return result


Rule = Callable[[Walk, fx.Node, Sequence[Any]], Any]


def concrete_values(program: Program) -> dict[fx.Node, Any]:
    """Every node's value at one set of sizes, named dimensions at sizes of their own; nothing is computed.

    Only a graph that asks for the value of a tensor on its way is run to know them.
    """
    twin, inputs = program.copy(), program.contract.example()
    try:
        compat.record_values(twin.module, inputs)
    except compat.DATA_DEPENDENT:
        return _run_values(program, inputs)
    return {node: other.meta.get("val") for node, other in zip(program.graph.nodes, twin.graph.nodes, strict=True)}


def _run_values(program: Program, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}

    def look(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        values[node] = _shape_of(value)
        return value

    with unchecked():
        watch(program, inputs, look)
    return values


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return [_shape_of(part) for part in value] if isinstance(value, list | tuple) else value


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value)


def _flat(axes: Any) -> list[Axis]:
    """All axes of a value, however nested: a tuple is an axis, a list holds some."""
    return [axes] if isinstance(axes, tuple) else [axis for part in axes for axis in _flat(part)]


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


# What these read of a tensor of indices is not its values.
_SHAPES_ONLY = ("aten.sym_size.int", "aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.full_like")


def _pointers(found: Any) -> list[Pointer]:
    return [p for p in found if p is not None] if isinstance(found, list) else [found]
