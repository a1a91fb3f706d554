"""What a model costs with some indices cut: stored numbers, and multiplications of its products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..depth import CONVOLUTIONS
from ..match import full_args
from .axes import Axis
from .keep import Kept, count
from .walk import Walk

aten = torch.ops.aten

GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass(frozen=True)
class Product:
    """A sum of products: result axes times the axes that it sums over."""

    axes: tuple[Axis, ...]

    def flops(self, of: Kept) -> int:
        """Multiplications and additions, at the sizes of the analysis."""
        return 2 * math.prod(count(axis, of) for axis in self.axes)


def products(walk: Walk) -> list[Product]:
    """All products of a program."""
    found = []
    for node in walk.program.graph.nodes:
        axes = _axes(walk, node)
        if axes is not None:
            found.append(Product(tuple(axes)))
    return found


def _axes(walk: Walk, node: fx.Node) -> Sequence[Axis] | None:
    if node.op != "call_function" or node not in walk.axes:
        return None
    args = full_args(node)
    if node.target is aten.linear.default:
        return [*walk[node], walk[args[1]][1]]
    if node.target in CONVOLUTIONS:
        return [*walk[node], *walk[args[1]][1:]]
    if node.target in _TRANSPOSED:
        return [*walk[args[0]], *walk[args[1]][1:]]
    if node.target in (aten.matmul.default, aten.mm.default, aten.bmm.default):
        return [*walk[node], walk[args[0]][-1]]
    if node.target is aten.addmm.default:
        return [*walk[node], walk[args[1]][-1]]
    if str(node.target) in GROUPED:  # as many rows as are chosen, however many experts there are
        return [*walk[node], walk[args[0]][-1]]
    if node.target is aten.scaled_dot_product_attention.default:  # q k^T and, of the same size or so, a v
        q, k, v = (walk[arg] for arg in args[:3])
        return [*q, k[-2]] if q[-1] == v[-1] else [*q[:-1], k[-2], q[-1]]
    return None


def flops(program_products: Sequence[Product], of: Kept) -> int:
    """Of all products together."""
    return sum(product.flops(of) for product in program_products)


def numbers(walk: Walk, of: Kept) -> int:
    """Stored numbers in parameters."""
    total = 0
    for name, axes in walk.stored.items():
        if isinstance(walk.program.store.get(name), torch.nn.Parameter):
            total += math.prod(count(axis, of) for axis in axes)
    return total


def nbytes(walk: Walk, of: Kept) -> int:
    """Bytes of all stored tensors that the program reads."""
    total = 0
    for name, axes in walk.stored.items():
        tensor = walk.program.store.get(name)
        if isinstance(tensor, Tensor):
            total += tensor.element_size() * math.prod(count(axis, of) for axis in axes)
    return total
