"""Transfer rules of calls that move elements and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .axes import Axis, size
from .walk import Axes, Rule, Walk

Args = Sequence[Any]


def view(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """The same elements in other dimensions; sizes are given, -1 is what is left."""
    made = walk.space.regroup(walk[args[0]], walk.shape(node))
    if len(args) > 1 and isinstance(args[1], list | tuple):
        for i, axis in enumerate(made):
            walk.size(node, 1, axis, i)
    return made


def flatten(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """As a view, without sizes."""
    return walk.space.regroup(walk[args[0]], walk.shape(node))


def view_as(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """As a view, in the dimensions of another tensor, which have to stay those of the result."""
    made = walk.space.regroup(walk[args[0]], walk.shape(node))
    for axis, other in zip(made, walk[args[1]], strict=True):
        walk.space.tie(axis, other)
    return made


def unflatten(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """One dimension into several of given sizes."""
    made = walk.space.regroup(walk[args[0]], walk.shape(node))
    first = args[1] % len(walk[args[0]])
    for i in range(len(args[2])):
        walk.size(node, 2, made[first + i], i)
    return made


def permute(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Dimensions in another order."""
    x = walk[args[0]]
    return [x[d % len(x)] for d in args[1]]


def transpose(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Two dimensions change places."""
    x = list(walk[args[0]])
    a, b = (d % len(x) for d in args[1:3])
    x[a], x[b] = x[b], x[a]
    return x


def reverse(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """All dimensions in reverse order: t, numpy_T, mT of a matrix."""
    return walk[args[0]][::-1]


def transpose_last(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """mT."""
    *rest, a, b = walk[args[0]]
    return [*rest, b, a]


def movedim(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Some dimensions go to other places; the rest keep their order."""
    x = walk[args[0]]
    source, target = ([d % len(x) for d in ([a] if isinstance(a, int) else a)] for a in args[1:3])
    moved = dict(zip(target, source, strict=True))
    rest = iter(d for d in range(len(x)) if d not in source)
    return [x[moved[i] if i in moved else next(rest)] for i in range(len(x))]


def squeeze(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Dimensions of size 1 go. One that pruning leaves a single index stays: the call is written anew without it."""
    x, wanted = walk[args[0]], args[1] if len(args) > 1 else list(range(len(walk[args[0]])))
    dims = {d % len(x) for d in ([wanted] if isinstance(wanted, int) else wanted)} if x else set()
    shape = walk.shape(args[0])
    for i in dims:
        if shape[i] != 1:
            walk.size(node, 1, x[i])
    return [axis for i, axis in enumerate(x) if i not in dims or shape[i] != 1]


def unsqueeze(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """A dimension of size 1 comes."""
    x = list(walk[args[0]])
    x.insert(args[1] % (len(x) + 1), ())
    return x


def expand(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Dimensions of size 1 are repeated: an atom without parameters."""
    x, shape = walk[args[0]], walk.shape(node)
    new = len(shape) - len(x)
    made = [x[i - new] if i >= new and size(x[i - new]) == n else walk.space.axis(n) for i, n in enumerate(shape)]
    if isinstance(args[1], list | tuple):
        for i, axis in enumerate(made):
            walk.size(node, 1, axis, i)
    return made


def expand_as(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """As another tensor is."""
    return walk.broadcast(walk[args[0]], walk[args[1]])


def repeat(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Dimension i becomes [r_i, i]."""
    x, times = walk[args[0]], list(walk.number(args[1]))
    x, unsaid = [()] * (len(times) - len(x)) + list(x), max(0, len(x) - len(times))
    made = x[:unsaid]  # tile() may leave out the first dimensions
    for i, (axis, n) in enumerate(zip(x[unsaid:], times, strict=True)):
        outer = walk.space.axis(n)
        walk.size(node, 1, outer, i)
        made.append((*outer, *axis))
    return made


def repeat_interleave(walk: Walk, node: fx.Node, args: Args) -> Any:
    """A dimension becomes [i, r]."""
    x, times, dim = list(walk[args[0]]), walk.number(args[1]), args[2]
    if dim is None or not isinstance(times, int):
        return walk.unknown(node)
    inner = walk.space.axis(times)
    walk.size(node, 1, inner)
    x[dim] = (*x[dim], *inner)
    if args[3] is not None:
        walk.size(node, 3, x[dim])
    return x


def cat(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """One dimension is the sum of the operands'."""
    operands = [walk[x] for x in args[0] if walk.shape(x) != [0]]
    dim = args[1] % len(operands[0])
    made = []
    for i, first in enumerate(operands[0]):
        if i == dim:
            made.append(walk.space.sum(x[i] for x in operands))
            continue
        for other in operands[1:]:
            walk.space.tie(first, other[i])
        made.append(first)
    return made


def stack(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """A new dimension, whose indices are the operands."""
    operands = [walk[x] for x in args[0]]
    made = list(walk.broadcast(*operands))
    made.insert(args[1] % (len(made) + 1), walk.space.axis(len(operands), f"{node.name}: its indices are operands"))
    return made


def select(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """One index of a dimension."""
    x, dim = walk[args[0]], args[1] % len(walk[args[0]])
    if isinstance(args[2], fx.Node):
        _moving(walk, node, x[dim])
        return [axis for i, axis in enumerate(x) if i != dim]
    at = walk.number(args[2]) % size(x[dim])
    cut(walk, x[dim], [at, at + 1])
    walk.size(node, 2, x[dim], upto=at)
    return [axis for i, axis in enumerate(x) if i != dim]


def unbind(walk: Walk, node: fx.Node, args: Args) -> list[Axes]:
    """Every index of a dimension by itself."""
    x, dim = walk[args[0]], args[1] % len(walk[args[0]])
    n = size(x[dim])
    cut(walk, x[dim], list(range(1, n)))
    return [[axis for i, axis in enumerate(x) if i != dim] for _ in range(n)]


def narrow(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """A stretch of a dimension, by its first index and its length."""
    x, dim = list(walk[args[0]]), args[1] % len(walk[args[0]])
    if any(isinstance(number, fx.Node) for number in args[2:4]):
        x[dim] = _moving(walk, node, x[dim], walk.shape(node)[dim])
        return x
    start = _place(args[2], size(x[dim]), 0)
    if start:
        walk.size(node, 2, x[dim], upto=start)
    x[dim] = cut(walk, x[dim], [start, start + args[3]])[1] if args[3] else walk.space.axis(0, "empty")
    walk.size(node, 3, x[dim])
    return x


def slice_(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """A stretch of a dimension; of a step s, every first of [n / s, s]."""
    x, dim = list(walk[args[0]]), args[1] % len(walk[args[0]])
    n, step = size(x[dim]), args[4]
    if any(isinstance(place, fx.Node) for place in args[2:4]):
        x[dim] = _moving(walk, node, x[dim], walk.shape(node)[dim])
        return x
    start, end = (_place(walk.number(p), n, d) for p, d in ((args[2], 0), (args[3], n)))
    if step != 1:
        x[dim] = _strided(walk, node, x[dim], start, end, step)
        return x
    for position, at in ((2, start), (3, end)):
        if 0 < at < n:
            walk.size(node, position, x[dim], upto=at)
    x[dim] = cut(walk, x[dim], [start, end])[1] if start < end else walk.space.axis(0, "empty")
    return x


def _moving(walk: Walk, node: fx.Node, axis: Axis, length: int = 1) -> Axis:
    """A place that depends on the input: no two calls need use the same indices."""
    reason = f"{node.name}: a place that goes by the input"
    walk.space.freeze(axis, reason)
    return walk.space.axis(length, reason)


def _place(at: Any, n: int, default: int) -> int:
    at = default if at is None else int(at)
    place: int = at + n if at < 0 else at
    return max(0, min(n, place))


def _strided(walk: Walk, node: fx.Node, axis: Axis, start: int, end: int, step: int) -> Axis:
    n, length = size(axis), len(range(start, end, step))
    if n % step or start >= step or end <= n - step + start:
        walk.space.freeze(axis, f"{node.name}: a stretch with steps of {step}")
        return walk.space.axis(length, f"{node.name}: a stretch with steps of {step}")
    inner = walk.space.axis(step)
    outer = walk.space.axis(n // step)
    walk.space.tie(axis, (*outer, *inner))
    walk.space.freeze(inner, f"{node.name}: steps of {step}")
    return outer


def split(walk: Walk, node: fx.Node, args: Args) -> list[Axes]:
    """Stretches of a dimension, as many as the call gives; their sizes are a number or a list."""
    x, dim = walk[args[0]], args[2] % len(walk[args[0]])
    lengths = [int(part.shape[dim]) for part in walk.values[node]]
    if any(isinstance(n, fx.Node) for n in (args[1] if isinstance(args[1], list | tuple) else args[1:2])):
        parts = [_moving(walk, node, x[dim], n) for n in lengths]
        return [[part if i == dim else axis for i, axis in enumerate(x)] for part in parts]
    places = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    parts = cut(walk, x[dim], places)[1:-1]
    for i, part in enumerate(parts):
        walk.size(node, 1, part, i)
    return [[part if i == dim else axis for i, axis in enumerate(x)] for part in parts]


def cut(walk: Walk, axis: Axis, places: Sequence[int]) -> list[Axis]:
    """The stretches before, between and after `places`, which ascend; empty ones are ()."""
    n, rest, before = size(axis), axis, 0
    made: list[Axis] = []
    for at in places:
        if at <= before:
            made.append(())
        elif at >= n:
            made.append(rest)
            rest, before = (), n
        else:
            first, rest = walk.space.cut(rest, at - before)
            made.append(first)
            before = at
    return [*made, rest]


def item(walk: Walk, node: fx.Node, args: Args) -> Any:
    """One of several values, of a call or written out."""
    several, at = args
    return walk.axes[several][at] if isinstance(several, fx.Node) else walk.axes[several[at]]


def pad(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Dimensions, the last first, grow or shrink at both ends."""
    x, amounts = list(walk[args[0]]), walk.number(args[1])
    copies = len(args) > 2 and args[2] in ("reflect", "replicate", "circular")
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i : 2 * i + 2]
        dim = len(x) - 1 - i
        if before < 0 or after < 0 or (copies and (before or after)):
            reason = f"{node.name}: it is padded with its own" if copies else f"{node.name}: it is cropped"
            walk.space.freeze(x[dim], reason)
            x[dim] = walk.space.axis(walk.shape(node)[dim], reason)
        elif before or after:
            ends = [walk.space.axis(n, f"{node.name}: padding") if n else None for n in (before, after)]
            x[dim] = walk.space.sum(p for p in (ends[0], x[dim], ends[1]) if p is not None)
    return x


def spatial(dims: int) -> Rule:
    """Pooling and resampling: the last dimensions are new ones."""

    def rule(walk: Walk, node: fx.Node, args: Args) -> Any:
        x, value = walk[args[0]], walk.values[node]
        for axis in x[-dims:]:
            walk.space.freeze(axis, f"{node.name}: it moves along it")

        def made(shape: Sequence[int]) -> Axes:
            return [*x[:-dims], *(walk.space.axis(int(n), f"{node.name}: space") for n in shape[-dims:])]

        return [made(v.shape) for v in value] if isinstance(value, list | tuple) else made(value.shape)

    return rule


def along(dim_at: int) -> Rule:
    """Calls that keep the shape and move elements along one dimension or several: these are frozen."""

    def rule(walk: Walk, node: fx.Node, args: Args) -> Any:
        x, value, dims = walk[args[0]], walk.values[node], args[dim_at]
        for dim in [dims] if isinstance(dims, int) else dims or range(len(x)):
            if x:
                walk.space.freeze(x[dim], f"{node.name}: it moves along it")

        def made(shape: Sequence[int]) -> Axes:
            reason = f"{node.name}: it moves along it"
            return [a if size(a) == int(n) else walk.space.axis(int(n), reason) for a, n in zip(x, shape, strict=True)]

        return [made(v.shape) for v in value] if isinstance(value, list | tuple) else made(value.shape)

    return rule


def created(sizes_at: int) -> Rule:
    """A tensor of one value, of given sizes."""

    def rule(walk: Walk, node: fx.Node, args: Args) -> Axes:
        made = [walk.space.axis(n) for n in walk.shape(node)]
        for i, axis in enumerate(made):
            walk.size(node, sizes_at, axis, i)
        return made

    return rule


def counted(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Numbers in a row."""
    return [walk.space.axis(n, f"{node.name}: its indices are numbers") for n in walk.shape(node)]
