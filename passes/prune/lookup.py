"""Transfer rules of calls that read or write by number: the dimension that is numbered stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .axes import size
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
