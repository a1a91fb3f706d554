"""Transfer rules of calls that know channels and space: convolutions, shuffles, windows, sampling, triangles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .axes import Axis, size
from .walk import Axes, Rule, Walk

Args = Sequence[Any]


def _moves(walk: Walk, node: fx.Node, axes: Axes) -> None:
    for axis in axes:
        walk.space.freeze(axis, f"{node.name}: it moves along it")


def _space(walk: Walk, node: fx.Node, dims: int) -> Axes:
    return [walk.space.axis(n, f"{node.name}: space") for n in walk.shape(node)[-dims:]]


def _channels_of(walk: Walk, node: fx.Node, axis: Axis, each: int) -> Axis:
    """c, where the axis is [c, each] and what is in a channel is not pruned."""
    c, inside = walk.space.axis(size(axis) // each), walk.space.axis(each)
    walk.space.tie(axis, (*c, *inside))
    walk.space.freeze(inside, f"{node.name}: it becomes space")
    return c


def convolution(spatial: int) -> Rule:
    """x (B, C, *space) with w (O, C / groups, *space); grouped: C = [g, i], O = [g, o]."""

    def rule(walk: Walk, node: fx.Node, args: Args) -> Axes:
        x, w, b, groups = args[0], args[1], args[2], walk.number(args[6])
        channels, out = walk[x][-spatial - 1], walk[w][0]
        for axis in (*walk[x][-spatial:], *walk[w][2:]):
            walk.space.freeze(axis, f"{node.name}: a convolution moves along it")
        if groups == 1:
            walk.space.tie(channels, walk[w][1])
        else:
            g = _grouped(walk, groups, channels, walk[w][1], out)
            _groups(walk, node, args[6], g)
        if b is not None:
            walk.space.tie(walk[w][0], walk[b][0])
        walk.end(node, 0, -spatial - 1)
        walk.role("channels", channels, walk[w][0])
        return [*walk[x][: -spatial - 1], walk[w][0], *_space(walk, node, spatial)]

    return rule


def _groups(walk: Walk, node: fx.Node, groups: Any, axis: Axis) -> None:
    """Their number goes by the axis; one that goes by the input (a filter for each image) freezes it."""
    if isinstance(groups, fx.Node):
        walk.space.freeze(axis, f"{node.name}: as many groups as the input says")
    else:
        walk.size(node, 6, axis)


def _grouped(walk: Walk, groups: int, channels: Axis, inner: Axis, out: Axis) -> Axis:
    """Tie C = [g, i] and O = [g, o]; gives [g]."""
    g = walk.space.axis(groups)
    walk.space.tie(channels, (*g, *inner))
    walk.space.tie(out, (*g, *walk.space.axis(size(out) // groups)))
    return g


def convolution_transposed(spatial: int) -> Rule:
    """x (B, C, *space) with w (C, O / groups, *space)."""

    def rule(walk: Walk, node: fx.Node, args: Args) -> Axes:
        x, w, b, groups = args[0], args[1], args[2], walk.number(args[6])
        channels, inner = walk[x][-spatial - 1], walk[w][1]
        for axis in (*walk[x][-spatial:], *walk[w][2:]):
            walk.space.freeze(axis, f"{node.name}: a convolution moves along it")
        walk.space.tie(channels, walk[w][0])
        out = inner
        if groups > 1:
            g = walk.space.axis(groups)
            walk.space.tie(channels, (*g, *walk.space.axis(size(channels) // groups)))
            out = (*g, *inner)
            _groups(walk, node, args[6], g)
        if b is not None:
            walk.space.tie(out, walk[b][0])
        walk.end(node, 0, -spatial - 1)
        walk.role("channels", channels, out)
        return [*walk[x][: -spatial - 1], out, *_space(walk, node, spatial)]

    return rule


def pixel_shuffle(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """(B, [c, r, r], H, W) -> (B, c, [H, r], [W, r])."""
    *rest, channels, h, w = walk[args[0]]
    _moves(walk, node, [h, w])
    return [*rest, _channels_of(walk, node, channels, args[1] ** 2), *_space(walk, node, 2)]


def pixel_unshuffle(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """(B, c, [H, r], [W, r]) -> (B, [c, r, r], H, W)."""
    *rest, c, h, w = walk[args[0]]
    _moves(walk, node, [h, w])
    inside = walk.space.axis(args[1] ** 2, f"{node.name}: it was space")
    return [*rest, (*c, *inside), *_space(walk, node, 2)]


def channel_shuffle(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """(B, [g, n], ...) -> (B, [n, g], ...)."""
    batch, channels, *rest = walk[args[0]]
    g, n = walk.space.regroup([channels], [args[1], size(channels) // args[1]])
    walk.size(node, 1, g)
    return [batch, (*n, *g), *rest]


def glu(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """The first half of a dimension, gated by the second."""
    x = list(walk[args[0]])
    dim = args[1] % len(x)
    value, gate = walk.space.cut(x[dim], size(x[dim]) // 2)
    walk.space.tie(value, gate)
    x[dim] = value
    return x


def im2col(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """(B, C, H, W) -> (B, [C, window], places)."""
    *rest, c, h, w = walk[args[0]]
    _moves(walk, node, [h, w])
    _, places = walk.shape(node)[-2:]
    window = walk.space.axis(args[1][0] * args[1][1], f"{node.name}: it was space")
    return [*rest, (*c, *window), walk.space.axis(places, f"{node.name}: space")]


def col2im(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """(B, [C, window], places) -> (B, C, H, W)."""
    *rest, channels, places = walk[args[0]]
    _moves(walk, node, [places])
    return [*rest, _channels_of(walk, node, channels, args[2][0] * args[2][1]), *_space(walk, node, 2)]


def unfold(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Windows of one dimension; what is in a window is a new last dimension."""
    x = list(walk[args[0]])
    dim = args[1] % max(1, len(x))
    _moves(walk, node, x[dim : dim + 1])
    shape = walk.shape(node)
    x[dim : dim + 1] = [walk.space.axis(shape[dim], f"{node.name}: space")]
    return [*x, walk.space.axis(args[2], f"{node.name}: space")]


def grid_sampler(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """x (B, C, *space) read at the places of a grid (B, *places, coordinates)."""
    (batch, c, *space), (own, *places, coordinates) = walk[args[0]], walk[args[1]]
    walk.space.tie(batch, own)
    _moves(walk, node, [*space, coordinates])
    return [batch, c, *places]


def unpool(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """max_unpool2d: x back at the places (of its shape) that a pooling took it from."""
    made = walk.broadcast(walk[args[0]], walk[args[1]])
    _moves(walk, node, made[-2:])
    return [*made[:-2], *_space(walk, node, 2)]


def triangle(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """tril, triu: what stays of the last two dimensions goes by their numbers."""
    x = walk[args[0]]
    for axis in x[-2:]:
        walk.space.freeze(axis, f"{node.name}: what stays goes by its number")
    return x
