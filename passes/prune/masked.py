"""A graph in which cut indices count for nothing, at full size: what the sliced graph has to equal.

At every ending of an axis one operand is multiplied by the axis' mask, and what takes a statistic over the axis takes
it from the indices that are kept:

    mean         mean(x m) n / sum(m)                      softmax      m softmax(x where m, else -inf)
    largest      of x where m, else -inf
    layer norm   (x - mu) / sqrt(v + e) w + b              mu = sum(x m) / K,  v = sum((x - mu)^2 m) / K,  K = sum(m)

Masks of axes are made in the graph from those of leaves, so that what trains a leaf's mask trains them all.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...runtime.program import Program, value_of
from ..match import full_args
from .axes import Atom, Axis, norm, size
from .keep import Kept, is_cut
from .walk import Ending, Walk

aten = torch.ops.aten

LeafMask = Callable[[Atom, fx.Node], fx.Node]
"""A node before the given one that has the mask of a leaf: floating (n,), 1 where an index is kept."""


class Masks:
    """Masks of axes as nodes of one program, each made once for a place in it."""

    def __init__(self, program: Program, of: Kept, leaf: LeafMask) -> None:
        self.program, self.of, self.leaf = program, of, leaf
        self.anchor = next(n for n in program.graph.nodes if n.op != "placeholder")
        self._made: dict[Axis, fx.Node] = {}
        self._shaped: dict[tuple[fx.Node, int, torch.dtype], fx.Node] = {}

    def axis(self, axis: Axis) -> fx.Node:
        """(n,): the mask of an axis."""
        axis = norm(axis)
        if axis not in self._made:
            self._made[axis] = self._product(axis)
        return self._made[axis]

    def _product(self, axis: Axis) -> fx.Node:
        program, before, mask = self.program, self.anchor, None
        for atom in axis:
            own = self._atom(atom)
            if mask is None:
                mask = own
                continue
            outer = program.emit(aten.unsqueeze.default, mask, 1, like=before)
            mask = program.emit(aten.mul.Tensor, outer, own, like=before)
            mask = program.emit(aten.reshape.default, mask, [-1], like=before)
        assert mask is not None
        return mask

    def _atom(self, atom: Atom) -> fx.Node:
        before = self.anchor
        if atom.parts is not None and is_cut((atom,), self.of):
            parts = [self.axis(p) if norm(p) else self._ones(1) for p in atom.parts]
            return self.program.emit(aten.cat.default, parts, like=before)
        return self.leaf(atom, before) if atom in self.of else self._ones(atom.size)

    def _ones(self, n: int) -> fx.Node:
        """On the device that the others are on."""
        beside = self.leaf(next(iter(self.of)), self.anchor)
        return self.program.emit(aten.new_ones.default, beside, [n], like=self.anchor)

    def beside(self, axis: Axis, x: fx.Node, dim: int) -> fx.Node:
        """The mask of an axis as it multiplies dimension `dim` (negative) of x, in x's dtype."""
        dtype = value_of(x).dtype
        if not isinstance(value_of(x).shape[dim], int):
            return self._as_long_as(x, dim, axis, dtype)
        mask = self.axis(axis)
        key = (mask, dim, dtype)
        if key not in self._shaped:
            before = self.anchor
            shaped = self.program.emit(aten.reshape.default, mask, [-1] + [1] * (-dim - 1), like=before)
            if value_of(shaped).dtype != dtype:
                shaped = self.program.emit(aten.to.dtype, shaped, dtype, like=before)
            self._shaped[key] = shaped
        return self._shaped[key]

    def _as_long_as(self, x: fx.Node, dim: int, axis: Axis, dtype: torch.dtype) -> fx.Node:
        """For a dimension [batch, c], say: the mask of what is cut, as often as it takes at this size."""
        axis = norm(axis)
        while not is_cut(axis[:1], self.of):
            axis = axis[1:]
        emit, after = self.program.emit, x.next
        times = emit(operator.floordiv, emit(aten.sym_size.int, x, dim, like=after), size(axis), like=after)
        mask = emit(aten.repeat.default, self.axis(axis), [times], like=after)
        mask = emit(aten.reshape.default, mask, [-1] + [1] * (-dim - 1), like=after)
        return emit(aten.to.dtype, mask, dtype, like=after)


def masked(walk: Walk, masks: Masks) -> Program:
    """Mask every ending, in place. `walk` and `masks` are those of this very program."""
    program, of = masks.program, masks.of
    ended: dict[fx.Node, list[tuple[Ending, Axis]]] = defaultdict(list)
    for ending in walk.endings:
        axis = walk[operand(ending)][ending.dim]
        if is_cut(axis, of):
            ended[ending.node].append((ending, axis))
    products: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for node, endings in ended.items():
        FORMS[endings[0][0].how](masks, node, endings, products)
    program.tidy()
    return program


def operand(ending: Ending) -> fx.Node:
    """What the call sums over."""
    given = full_args(ending.node)[ending.argument]
    found = given if ending.index is None else given[ending.index]
    assert isinstance(found, fx.Node)
    return found


Endings = list[tuple[Ending, Axis]]
Products = dict[tuple[fx.Node, fx.Node], fx.Node]


def _times_masks(masks: Masks, node: fx.Node, x: fx.Node, endings: Endings, products: Products) -> fx.Node:
    for ending, axis in endings:
        dim = ending.dim if ending.dim < 0 else ending.dim - value_of(x).dim()
        mask = masks.beside(axis, x, dim)
        if _counts(value_of(node)):  # counts have no gradient to give
            mask = masks.program.emit(aten.detach.default, mask, like=node)
        if (x, mask) not in products:
            products[x, mask] = masks.program.emit(aten.mul.Tensor, x, mask, like=node)
        x = products[x, mask]
    return x


def _counts(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())


def _zero(masks: Masks, node: fx.Node, endings: Endings, products: Products) -> None:
    for ending, axis in endings:
        x = operand(ending)
        new = _times_masks(masks, node, x, [(ending, axis)], products)
        if ending.index is None:
            node.update_arg(ending.argument, new)
        else:
            listed = list(node.args[ending.argument])  # type: ignore[arg-type]  # einsum's operands
            listed[ending.index] = new
            node.update_arg(ending.argument, listed)


def _mean(masks: Masks, node: fx.Node, endings: Endings, products: Products) -> None:
    x = operand(endings[0][0])
    factor = math.prod(size(axis) for _, axis in endings)
    node.update_arg(0, _times_masks(masks, node, x, endings, products))
    program, after = masks.program, node.next
    y: Any = node
    whole = program.emit(aten.mul.Tensor, y, factor, like=after)
    y = whole
    for _, axis in endings:
        y = program.emit(aten.div.Tensor, y, _counted(masks, axis, value_of(x).dtype), like=after)
    node.replace_all_uses_with(y, delete_user_cb=lambda user: user is not whole)


def _counted(masks: Masks, axis: Axis, dtype: torch.dtype) -> fx.Node:
    total = masks.program.emit(aten.sum.default, masks.axis(axis), like=masks.anchor)
    return masks.program.emit(aten.to.dtype, total, dtype, like=masks.anchor)


def _never(far: float) -> Callable[[Masks, fx.Node, Endings, Products], None]:
    """What is cut is as far off as can be, so that it is never the largest, or the smallest."""

    def form(masks: Masks, node: fx.Node, endings: Endings, products: Products) -> None:
        x = operand(endings[0][0])
        for ending, axis in endings:
            mask = masks.program.emit(aten.ne.Scalar, masks.beside(axis, x, ending.dim), 0, like=node)
            x = masks.program.emit(aten.where.ScalarOther, mask, x, far, like=node)
        node.update_arg(0, x)

    return form


def _softmax(masks: Masks, node: fx.Node, endings: Endings, products: Products) -> None:
    _never(-math.inf)(masks, node, endings, products)
    # 0 is 0 already: this is for the gradient, which no choice of -inf gives to a mask that is learned.
    (ending, axis), readers = endings[0], list(node.users)
    product = masks.program.emit(aten.mul.Tensor, node, masks.beside(axis, node, ending.dim), like=node.next)
    for user in readers:
        user.replace_input_with(node, product)


def _normalised(
    masks: Masks, node: fx.Node, x: fx.Node, mask: fx.Node, dims: list[int], eps: float, *, centred: bool
) -> fx.Node:
    """(x - mu) / sqrt(v + eps) over `dims`, with statistics of what the mask keeps; its cut indices are 0."""
    program = masks.program

    def emit(target: Any, *args: Any) -> fx.Node:
        return program.emit(target, *args, like=node)

    ones = emit(aten.ones_like.default, x)
    count = emit(aten.clamp_min.default, emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, ones, mask), dims, True), 1)
    if centred:
        mean = emit(aten.div.Tensor, emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, x, mask), dims, True), count)
        x = emit(aten.sub.Tensor, x, mean)
    x = emit(aten.mul.Tensor, x, mask)
    square = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, x, x), dims, True)
    scale = emit(aten.rsqrt.default, emit(aten.add.Tensor, emit(aten.div.Tensor, square, count), eps))
    return emit(aten.mul.Tensor, x, scale)


def _joint(masks: Masks, node: fx.Node, x: fx.Node, endings: Endings) -> fx.Node:
    """The product of the masks of several dimensions of x."""
    depth = value_of(x).dim()
    shaped = [masks.beside(axis, x, e.dim if e.dim < 0 else e.dim - depth) for e, axis in endings]
    mask = shaped[0]
    for other in shaped[1:]:
        mask = masks.program.emit(aten.mul.Tensor, mask, other, like=node)
    return mask


def _affine(masks: Masks, node: fx.Node, y: fx.Node, weight: Any, bias: Any) -> None:
    program = masks.program
    if weight is not None:
        y = program.emit(aten.mul.Tensor, y, weight, like=node)
    if bias is not None:
        y = program.emit(aten.add.Tensor, y, bias, like=node)
    node.replace_all_uses_with(y)
    program.graph.erase_node(node)


def _layer_norm(masks: Masks, node: fx.Node, endings: Endings, products: Products) -> None:
    x, shape, weight, bias, eps = full_args(node)[:5]
    dims = list(range(-len(shape), 0))
    y = _normalised(masks, node, x, _joint(masks, node, x, endings), dims, eps, centred=True)
    _affine(masks, node, y, weight, bias)


def _rms_norm(masks: Masks, node: fx.Node, endings: Endings, products: Products) -> None:
    x, shape, weight, eps = full_args(node)[:4]
    eps = torch.finfo(value_of(x).dtype).eps if eps is None else eps
    dims = list(range(-len(shape), 0))
    y = _normalised(masks, node, x, _joint(masks, node, x, endings), dims, eps, centred=False)
    _affine(masks, node, y, weight, None)


def _group_norm(masks: Masks, node: fx.Node, endings: Endings, products: Products) -> None:
    program, (x, groups, weight, bias, eps) = masks.program, full_args(node)[:5]
    depth, channels = value_of(x).dim(), int(value_of(x).shape[1])

    def grouped(tensor: fx.Node, dim: int) -> fx.Node:
        return program.emit(aten.unflatten.int, tensor, dim, [groups, channels // groups], like=node)

    mask = grouped(masks.beside(endings[0][1], x, 1 - depth), 0)
    y = _normalised(masks, node, grouped(x, 1), mask, list(range(1 - depth, 0)), eps, centred=True)
    y = program.emit(aten.flatten.using_ints, y, 1, 2, like=node)
    _affine(masks, node, y, *(_by_channel(program, t, depth, node) for t in (weight, bias)))


def _batch_norm(masks: Masks, node: fx.Node, endings: Endings, products: Products) -> None:
    x, weight, bias, _, _, _, _, eps = full_args(node)[:8]
    depth = value_of(x).dim()
    dims = [d for d in range(depth) if d != 1]
    y = _normalised(masks, node, x, _joint(masks, node, x, endings), dims, eps, centred=True)
    _affine(masks, node, y, *(_by_channel(masks.program, t, depth, node) for t in (weight, bias)))


def _by_channel(program: Program, tensor: Any, depth: int, before: fx.Node) -> Any:
    if tensor is None:
        return None
    return program.emit(aten.reshape.default, tensor, [-1] + [1] * (depth - 2), like=before)


FORMS: dict[str, Callable[[Masks, fx.Node, Endings, Products], None]] = {
    "zero": _zero,
    "mean": _mean,
    "softmax": _softmax,
    "largest": _never(-math.inf),
    "smallest": _never(math.inf),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
}
