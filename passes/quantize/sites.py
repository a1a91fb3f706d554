"""Where a graph multiplies by, convolves with or looks up a stored weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...runtime import compat
from ...runtime.program import Program

aten = torch.ops.aten

OPERATORS = ("linear", "embedding", "conv1d", "conv2d")


@dataclass(frozen=True)
class Site:
    """One call that reads one stored weight.

    fqn: the weight's stored name; transposed: the call reads it as `w.t()` (GPT-2's Conv1D keeps (K, N))
    weight: the node that gives the weight as the call takes it; path: module the call came from
    """

    node: fx.Node
    operator: str
    fqn: str
    weight: fx.Node
    transposed: bool
    path: str

    @property
    def activation(self) -> fx.Node | None:
        """The floating-point operand that meets the weight; an embedding has none."""
        first = self.node.args[0]
        return first if self.operator != "embedding" and isinstance(first, fx.Node) else None


# Operator, the ATen call, and which argument is the weight.
_CALLS = (
    ("linear", aten.linear.default, 1),
    ("embedding", aten.embedding.default, 0),
    ("conv1d", aten.conv1d.default, 1),
    ("conv2d", aten.conv2d.default, 1),
)


def find_sites(program: Program) -> list[Site]:
    """All sites, in graph order."""
    return [site for node in program.graph.nodes if (site := _site(program, node)) is not None]


def readers(program: Program, fqn: str) -> Iterator[fx.Node]:
    """Every call that reads the stored tensor `fqn`, past a transposition."""
    for node in program.graph.nodes:
        if program.tensor_of(node) == fqn:
            for user in node.users:
                yield from user.users if _is_transpose(user) else (user,)


def _site(program: Program, node: fx.Node) -> Site | None:
    for operator, target, position in _CALLS:
        if node.op == "call_function" and node.target is target:
            weight = node.args[position]
            if not isinstance(weight, fx.Node):
                return None
            source = weight.args[0] if _is_transpose(weight) else weight
            fqn = program.tensor_of(source)
            if fqn is None or not isinstance(program.store.get(fqn), torch.nn.Parameter):
                return None
            return Site(node, operator, fqn, weight, source is not weight, compat.module_path(node))
    return None


def _is_transpose(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (aten.t.default, aten.numpy_T.default)
