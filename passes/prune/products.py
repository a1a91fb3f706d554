"""Transfer rules of calls that sum over an axis: products, norms, reductions, attention.

A sum over an axis is an ending: there a cut index must count for nothing, so one operand reads zero at it. A mean, a
norm or a softmax over an axis is one too: it takes its statistic from the indices that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .axes import Axis, size
from .walk import Axes, Rule, Walk

Args = Sequence[Any]


def linear(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """x (..., K) @ w (N, K) + b (N,)."""
    x, w, b = args
    rows = walk[w][:-1]  # none where w is a vector
    walk.space.tie(walk[x][-1], walk[w][-1])
    if b is not None:
        walk.broadcast(rows, walk[b])
    walk.end(node, 0, -1)
    return [*walk[x][:-1], *rows]


def matmul(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """(..., M, K) @ (..., K, N), either operand a vector too."""
    return _product(walk, node, walk[args[0]], walk[args[1]], 0)


def addmm(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """b + x @ w."""
    return walk.broadcast(walk[args[0]], _product(walk, node, walk[args[1]], walk[args[2]], 1))


def addbmm(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """b + the sum of x[i] @ w[i]."""
    batch, *made = _product(walk, node, walk[args[1]], walk[args[2]], 1)
    if size(batch) != 1:
        walk.end(node, 1, 0)
    return walk.broadcast(walk[args[0]], made)


def outer(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Each number of one vector times each of another."""
    return [*walk[args[0]], *walk[args[1]]]


def inner(walk: Walk, node: fx.Node, args: Args) -> Any:
    """x (..., K) and w (..., K): every row by every other one."""
    x, w = walk[args[0]], walk[args[1]]
    if not x or not w:
        return walk.unknown(node)
    walk.space.tie(x[-1], w[-1])
    walk.end(node, 0, -1)
    return [*x[:-1], *w[:-1]]


def cosine_similarity(walk: Walk, node: fx.Node, args: Args) -> Any:
    """Over one dimension: both norms are taken over it too, so either operand reads zero."""
    x, y = walk[args[0]], walk[args[1]]
    made = walk.broadcast(x, y)
    dim = args[2] % len(made) - len(made) if made else 0
    if min(len(x), len(y)) < -dim or not made or size(x[dim]) != size(y[dim]):  # one of them is repeated along it
        return walk.unknown(node)
    for argument in (0, 1):
        walk.end(node, argument, dim)
    return _reduced(made, [dim % len(made)], keep=False)


def cdist(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """x (..., P, M) and y (..., R, M): the distances (..., P, R); a coordinate that is zero in both adds nothing."""
    x, y = walk[args[0]], walk[args[1]]
    walk.space.tie(x[-1], y[-1])
    for argument in (0, 1):
        walk.end(node, argument, -1)
    return [*walk.broadcast(x[:-2], y[:-2]), x[-2], y[-2]]


def weight_norm(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """v g / |v|, the norm over all dimensions but one, or over all where that is -1."""
    v, dim = walk[args[0]], args[2]
    walk.broadcast(v, walk[args[1]])
    for d in range(len(v)):
        if d != dim:
            walk.end(node, 0, d - len(v))
    return v


def _product(walk: Walk, node: fx.Node, x: Axes, w: Axes, argument: int) -> Axes:
    rows, columns = x[-2:-1], w[-1:] if len(w) > 1 else []
    walk.space.tie(x[-1], w[-2] if len(w) > 1 else w[0])
    walk.end(node, argument, -1)
    outer = walk.broadcast(x[:-2], w[:-2])
    walk.role("heads", *outer)
    return [*outer, *rows, *columns]


def einsum(walk: Walk, node: fx.Node, args: Args) -> Any:
    """One axis a letter; letters that the result lacks are summed over."""
    operands = args[1]
    terms, right = _spelled(str(args[0]), [len(walk[operand]) for operand in operands])
    letters: dict[str, Axis] = {}
    ended: set[str] = set()
    for position, (term, operand) in enumerate(zip(terms, operands, strict=True)):
        new = set(term) - set(right) - ended
        for dim, letter in enumerate(term):
            axis = walk[operand][dim]
            if size(letters.get(letter, ())) == 1:
                letters[letter] = axis
            elif size(axis) != 1:
                walk.space.tie(letters[letter], axis)
            if letter in new and size(axis) != 1:  # an operand of size 1 is repeated along it
                walk.end(node, 1, dim, index=position)
                ended.add(letter)
    return [letters[letter] for letter in right]


def _spelled(equation: str, depths: Sequence[int]) -> tuple[list[str], str]:
    """The terms and the result of an equation, with a letter for each dimension that dots stand for.

    A result that is left out has the dots, and what occurs once in the order of the alphabet.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    given = [term.replace("...", ".") for term in left.split(",")]
    dots = [depth - len(term) + 1 if "." in term else 0 for term, depth in zip(given, depths, strict=True)]
    places = "".join(map(chr, range(ord("0"), ord("0") + max(dots))))  # aligned at the last one
    if not arrow:
        right = "..." * ("." in left) + "".join(sorted(c for c in set(left) - set(".,") if left.count(c) == 1))
    terms = [term.replace(".", places[len(places) - n :]) for term, n in zip(given, dots, strict=True)]
    return terms, right.replace("...", places)


def embedding(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Rows of w (V, D) by index."""
    w, indices = args[0], args[1]
    walk.space.freeze(walk[w][0], f"{node.name}: rows are looked up by number")
    return [*walk[indices], walk[w][1]]


def embedding_bag(walk: Walk, node: fx.Node, args: Args) -> list[Axes]:
    """Sums, means or maxima of rows of w (V, D), by index."""
    w = walk[args[0]]
    walk.space.freeze(w[0], f"{node.name}: rows are looked up by number")
    (bags, _), *others = walk.fresh(walk.values[node], f"{node.name}: its bags are numbers")
    return [[bags, w[1]], *others]


def prelu(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """x (B, C, ...), with a slope for each channel or one for all."""
    x, w = walk[args[0]], walk[args[1]]
    if w and size(w[0]) != 1:
        walk.space.tie(x[1 if len(x) > 1 else 0], w[0])
    return x


def batch_norm(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """One statistic a channel; in training it is taken over the other dimensions."""
    x, *each, training = args[:6]
    for other in each:
        if other is not None:
            walk.space.tie(walk[x][1], walk[other][0])
    if training:
        for dim in range(len(walk[x])):
            if dim != 1:
                walk.end(node, 0, dim, "batch_norm")
    return walk[x]


def layer_norm(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Over the last dimensions, with weights of their shape."""
    return _norm_of_last(walk, node, args, "layer_norm", (2, 3))


def rms_norm(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Over the last dimensions, with a weight of their shape."""
    return _norm_of_last(walk, node, args, "rms_norm", (2,))


def _norm_of_last(walk: Walk, node: fx.Node, args: Args, how: Any, weights: tuple[int, ...]) -> Axes:
    x, depth = walk[args[0]], len(args[1])
    for position in weights:
        if args[position] is not None:
            walk.broadcast(x[-depth:], walk[args[position]])
    for i in range(depth):
        walk.size(node, 1, x[i - depth], i)
        walk.end(node, 0, i - depth, how)
    return x


def group_norm(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """x (B, C, *space), C = [g, i]: over i and space."""
    x, groups = walk[args[0]], int(args[1])
    for other in args[2:4]:
        if other is not None:
            walk.space.tie(x[1], walk[other][0])
    g = walk.space.axis(groups)
    walk.space.tie(x[1], (*g, *walk.space.axis(size(x[1]) // groups)))
    walk.size(node, 1, g)
    walk.end(node, 0, 1, "group_norm")
    for axis in x[2:]:
        walk.space.freeze(axis, f"{node.name}: a statistic over it")
    return x


def instance_norm(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """x (B, C, *space): over space."""
    x = walk[args[0]]
    for other in args[1:5]:
        if other is not None:
            walk.space.tie(x[1], walk[other][0])
    for axis in x[2:]:
        walk.space.freeze(axis, f"{node.name}: a statistic over it")
    return x


def reduction(how: Any, dims_at: int | None, keep_at: int | None) -> Rule:
    """A sum or mean over `dims`, all of them where there are none."""

    def rule(walk: Walk, node: fx.Node, args: Args) -> Axes:
        x = walk[args[0]]
        dims = _dims(args[dims_at] if dims_at is not None else None, len(x))
        for dim in dims:
            walk.end(node, 0, dim - len(x), how)
        return _reduced(x, dims, keep=keep_at is not None and bool(args[keep_at]))

    return rule


def vector_norm(walk: Walk, node: fx.Node, args: Args) -> Any:
    """Of order p over `dims`: a zero adds nothing to it, unless the order is negative."""
    negative = isinstance(args[1], int | float) and args[1] < 0
    rule = extreme(2, 3) if negative else reduction("zero", 2, 3)
    return rule(walk, node, args)


def bilinear(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """x (..., I), y (..., J), w (O, I, J): x w[o] y + b[o]."""
    x, y, w, b = args
    walk.space.tie(walk[x][-1], walk[w][1])
    walk.space.tie(walk[y][-1], walk[w][2])
    if b is not None:
        walk.space.tie(walk[w][0], walk[b][0])
    for argument in (0, 1):
        walk.end(node, argument, -1)
    return [*walk.broadcast(walk[x][:-1], walk[y][:-1]), walk[w][0]]


def extremum(how: Any, dims_at: int | None, keep_at: int | None) -> Rule:
    """The largest or smallest along `dims`, all of them where there are none: what is cut is infinitely far off."""
    plain = extreme(dims_at, keep_at)

    def rule(walk: Walk, node: fx.Node, args: Args) -> Any:
        x, value = walk[args[0]], walk.values[node]
        where = isinstance(value, list | tuple) and gives_where(node, value)
        if where or not walk.values[args[0]].dtype.is_floating_point:
            return plain(walk, node, args)
        dims = _dims(args[dims_at] if dims_at is not None else None, len(x))
        for dim in dims:
            walk.end(node, 0, dim - len(x), how)
        made = _reduced(x, dims, keep=keep_at is not None and bool(args[keep_at]))
        return [made for _ in value] if isinstance(value, list | tuple) else made

    return rule


def gives_where(node: fx.Node, value: Any) -> bool:
    """Whether a call says where the largest or smallest is, and not only how much, and anything reads that."""
    return not isinstance(value, list | tuple) or any(user.args[1:] != (0,) for user in node.users)


def extreme(dims_at: int | None, keep_at: int | None) -> Rule:
    """What depends on an order or on all values along `dims`: they are frozen."""

    def rule(walk: Walk, node: fx.Node, args: Args) -> Any:
        x = walk[args[0]]
        dims = _dims(args[dims_at] if dims_at is not None else None, len(x))
        for dim in dims:
            walk.space.freeze(x[dim], f"{node.name}: it looks at all of it")
        made = _reduced(x, dims, keep=keep_at is not None and bool(args[keep_at]))
        value = walk.values[node]
        return [made for _ in value] if isinstance(value, list | tuple) else made

    return rule


def _dims(dims: Any, depth: int) -> list[int]:
    if dims is None or dims == []:
        return list(range(depth))
    return sorted(d % depth for d in ([dims] if isinstance(dims, int) else dims)) if depth else []


def _reduced(x: Axes, dims: list[int], *, keep: bool) -> Axes:
    if keep:
        return [() if i in dims else axis for i, axis in enumerate(x)]
    return [axis for i, axis in enumerate(x) if i not in dims]


def softmax(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """Over one dimension."""
    x = walk[args[0]]
    walk.end(node, 0, args[1] % len(x) - len(x) if x else 0, "softmax")
    return x


def attention(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """q (..., L, E), k (..., S, E), v (..., S, F): softmax(q k^T / sqrt(E)) v."""
    q, k, v = (walk[arg] for arg in args[:3])
    mask, grouped = args[3], bool(args[7])
    walk.space.tie(q[-1], k[-1])
    walk.space.tie(k[-2], v[-2])
    walk.space.freeze(k[-2], f"{node.name}: keys")
    heads = q[:-2]
    if grouped:
        each = walk.space.axis(size(q[-3]) // size(k[-3]))
        walk.space.tie(q[-3], (*k[-3], *each))
        walk.space.tie(k[-3], v[-3])
        walk.broadcast(q[:-3], k[:-3], v[:-3])
    else:
        heads = walk.broadcast(q[:-2], k[:-2], v[:-2])
    if mask is not None:
        walk.broadcast([*heads, q[-2], k[-2]], walk[mask])
    walk.role("heads", *heads)
    walk.end(node, 0, -1)
    if args[6] is None:
        walk.size(node, 6, q[-1])
    return [*heads, q[-2], v[-1]]


def running(walk: Walk, node: fx.Node, args: Args) -> Axes:
    """cumsum: what is cut adds nothing to the sums that stay."""
    x = walk[args[0]]
    if x:
        walk.end(node, 0, args[1] % len(x) - len(x))
    return x


def grouped_mm(walk: Walk, node: fx.Node, args: Args) -> Any:
    """Rows of x (T, K), sorted by expert, times w (E, K, N) of each; an expert's end at offs (E,)."""
    x, w, offs = args[:3]
    if offs is None or any(extra is not None for extra in args[3:4]) or (len(walk[x]), len(walk[w])) != (2, 3):
        return walk.unknown(node)
    walk.space.tie(walk[x][-1], walk[w][1])
    walk.space.tie(walk[offs][0], walk[w][0])
    walk.role("experts", walk[w][0])
    walk.end(node, 0, -1)
    return [walk[x][0], walk[w][2]]
