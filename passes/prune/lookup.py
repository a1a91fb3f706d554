"""Transfer rules of calls that read or write by number: the dimension that is numbered stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .axes import Axis, size
from .walk import Axes, Walk

Args = Sequence[Any]


def index(walk: Walk, node: fx.Node, args: Args) -> Any:
    """x[i, :, j]: dimensions that are indexed are frozen, and those of the indices take their place."""
    x, indices = walk[args[0]], [*args[1], *[None] * (len(walk[args[0]]) - len(args[1]))]
    used = [i for i, tensor in enumerate(indices) if tensor is not None]
    for i in used:
        walk.space.freeze(x[i], f"{node.name}: it is indexed by number")
    chosen = walk.broadcast(*(walk[indices[i]] for i in used))
    if any(
        walk.values[indices[i]].dtype.is_floating_point or str(walk.values[indices[i]].dtype) == "torch.bool"
        for i in used
    ):
        return walk.unknown(node)
    rest = [axis for i, axis in enumerate(x) if i not in used]
    first = used[0] if used[-1] - used[0] == len(used) - 1 else 0
    return [*rest[:first], *chosen, *rest[first:]]


def index_select(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Rows of one dimension by number."""
    x, dim = list(walk[args[0]]), args[1]
    walk.space.freeze(x[dim], f"{node.name}: it is indexed by number")
    x[dim] = walk[args[2]][0] if walk[args[2]] else ()
    return x


def gather(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """out[i][j] = x[i][index[i][j]]: the dimension is frozen, the others go together where their sizes do."""
    x, dim, by = walk[args[0]], args[1] % len(walk[args[0]]), walk[args[2]]
    walk.space.freeze(x[dim], f"{node.name}: it is indexed by number")
    for i, (axis, other) in enumerate(zip(x, by, strict=True)):
        if i != dim and size(axis) == size(other):
            walk.space.tie(axis, other)
        elif i != dim:
            for partly in (axis, other):
                walk.space.freeze(partly, f"{node.name}: it is read in part")
    return by


def take_along_dim(walk: Walk, node: fx.Node, args: Args) -> Any:
    """As gather, with other dimensions of size 1 repeated."""
    x, by, dim = walk[args[0]], walk[args[1]], args[2]
    if dim is None:
        return walk.unknown(node)
    dim %= len(x)
    walk.space.freeze(x[dim], f"{node.name}: it is indexed by number")
    made = walk.broadcast([() if i == dim else axis for i, axis in enumerate(x)], by)
    made[dim] = by[dim]
    return made


def scatter(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """out[index[i][j]][j] gets values[i][j], or a number: as gather, with the values beside the index."""
    x, dim, by, values = walk[args[0]], args[1] % max(1, len(walk[args[0]])), walk[args[2]], args[3]
    beside = [x, by, walk[values]] if isinstance(values, fx.Node) else [x, by]
    for i, axes in enumerate(zip(*beside, strict=True)):
        if i == dim:
            _freeze(walk, axes, f"{node.name}: it is indexed by number")
        elif len({size(axis) for axis in axes}) == 1:
            for other in axes[1:]:
                walk.space.tie(axes[0], other)
        else:
            _freeze(walk, axes, f"{node.name}: it is used in part")
    return x


def index_put(walk: Walk, node: fx.Node, args: Args) -> Any:
    """x[i, :, j] = values: the dimensions that are indexed are frozen; one number may be put where a mask says so."""
    x, values = walk[args[0]], walk[args[2]]
    given = [by for by in args[1] if by is not None]
    if len(args[1]) == 1 and walk.values[given[0]].dtype == torch.bool and all(size(axis) == 1 for axis in values):
        walk.broadcast(x[: len(walk[given[0]])], walk[given[0]])
        return x
    if any(walk.values[by].dtype == torch.bool for by in given):
        return walk.unknown(node)
    walk.broadcast(index(walk, node, args), values)
    return x


def _freeze(walk: Walk, axes: Sequence[Axis], reason: str) -> None:
    for axis in axes:
        walk.space.freeze(axis, reason)


def index_add(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Rows of one dimension are added or written by number; the other dimensions are those of the rows."""
    x, dim, rows = walk[args[0]], args[1] % max(1, len(walk[args[0]])), walk[args[3]]
    for i, (axis, other) in enumerate(zip(x, rows, strict=True)):
        if i == dim:
            for numbered in (axis, other):
                walk.space.freeze(numbered, f"{node.name}: it is indexed by number")
        else:
            walk.space.tie(axis, other)
    return x
