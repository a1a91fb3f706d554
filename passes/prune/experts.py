"""Transfer rules for what is chosen by number: the experts of a mixture, by their router.

A router gives every expert a score, the `k` largest are chosen, and what comes after reads their *numbers*: it counts
them, sorts by them, picks weights by them. None of these tensors has the axis of experts as a dimension, so nothing
would tie the router's rows to the experts' weights. What ties them is that the values point to the axis:

    i = topk(s, k)           s (..., E)      i (..., k) points to E; at the cut indices s reads -inf
    histc(i, E, 0, E - 1)    (E,)            how often each is chosen; 0 for what never is
    cumsum of that           (E,)            where the rows of each end
    grouped_mm(x, w, ends)   w (E, K, N)
    w[i], gather(s, i)       w (E, ...)      scatter(z, i, v), one_hot(i, E)   (..., E)

So a cut expert can never be chosen, a softmax over the scores is one over the others, and whatever the model does to
the weights of those that are chosen (dividing by their sum, scaling) it does to fewer candidates. The others are
numbered anew in the same order, which sorting and counting respect; any other call that reads the numbers freezes the
experts. `k` stays as it is, hence at least `k` experts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import lookup, products, shapes
from .axes import Atom, Axis, leaves, norm, size
from .walk import Axes, Choice, Pointer, Rule, Walk

Args = Sequence[Any]

ROLE = "experts"


def topk(walk: Walk, node: fx.Node, args: Args) -> Any:
    """The k largest along a dimension, and their numbers."""
    x, k, dim, largest = args[:4]
    if isinstance(k, fx.Node) or not largest or not walk[x]:
        return shapes.along(2)(walk, node, args)
    dim %= len(walk[x])
    axis = walk[x][dim]
    _chosen(walk, node, x, dim)
    walk.floors.append((axis, int(k)))
    ranked = walk.space.axis(int(k), f"{node.name}: they are ranked")
    made = [ranked if i == dim else other for i, other in enumerate(walk[x])]
    return [made, made]


def largest(walk: Walk, node: fx.Node, args: Args) -> Any:
    """max or argmax over one dimension: the value and its number, or its number."""
    x, dim, keep = args[:3]
    if not walk[x] or dim is None:
        return products.extreme(1, 2)(walk, node, args)
    dim %= len(walk[x])
    if not products.gives_where(node, walk.values[node]):
        return products.extremum("largest", 1, 2)(walk, node, args)
    _chosen(walk, node, x, dim)
    rest = [() if i == dim else other for i, other in enumerate(walk[x]) if keep or i != dim]
    return [rest, rest] if isinstance(walk.values[node], list | tuple) else rest


def _chosen(walk: Walk, node: fx.Node, x: fx.Node, dim: int) -> None:
    choice = Choice(node, walk[x][dim])
    walk.choices.append(choice)
    walk.end(node, 0, dim - len(walk[x]), "largest")
    pointer = Pointer(choice.axis, (choice,))
    walk.points[node] = [None, pointer] if isinstance(walk.values[node], list | tuple) else pointer


def carried(rule: Rule) -> Rule:
    """A call that moves the elements of its first operand: indices stay indices, sorted ones too."""

    def moved(walk: Walk, node: fx.Node, args: Args) -> Any:
        made, pointer = rule(walk, node, args), walk.pointer(args[0])
        if pointer is not None and isinstance(walk.values[node], list | tuple):
            walk.follow(node, args[0], [pointer, *[None] * (len(walk.values[node]) - 1)])
        elif pointer is not None and walk.values[node].dtype != torch.bool:
            walk.follow(node, args[0], pointer)
        return made

    return moved


def item(walk: Walk, node: fx.Node, args: Args) -> Any:
    """One of several values; one of them may be indices."""
    several, at = args
    if isinstance(several, fx.Node):
        walk.read.add((node, several))
        found = walk.points.get(several)
        if isinstance(found, list) and found[at] is not None:
            walk.points[node] = found[at]
    else:
        walk.read |= {(node, source) for source in several if isinstance(source, fx.Node)}
        if several[at] in walk.points:
            walk.points[node] = walk.points[several[at]]
    return shapes.item(walk, node, args)


def cat(walk: Walk, node: fx.Node, args: Args) -> Any:
    """Indices of one axis, one after another, are indices of it."""
    pointers = [walk.pointer(source) for source in args[0]]
    known = [pointer for pointer in pointers if pointer is not None]
    if known and len(known) == len(pointers):
        for other in known[1:]:
            walk.space.tie(known[0].axis, other.axis)
        choices = tuple(dict.fromkeys(choice for pointer in known for choice in pointer.choices))
        for source in args[0]:
            walk.follow(node, source, Pointer(known[0].axis, choices))
    return shapes.cat(walk, node, args)


def histc(walk: Walk, node: fx.Node, args: Args) -> Any:
    """How often each number occurs, where every number has a bin."""
    x, bins, low, high = args
    pointer = walk.pointer(x)
    if pointer is None or bins != size(pointer.axis) or low != 0 or high not in (bins - 1, bins):
        return walk.unknown(node)
    walk.follow(node, x)
    walk.role(ROLE, pointer.axis)
    walk.size(node, 1, pointer.axis)
    walk.size(node, 3, pointer.axis, more=int(high - bins))
    return [pointer.axis]


def one_hot(walk: Walk, node: fx.Node, args: Args) -> Any:
    """A dimension more, in which the number is a place; it may have places for numbers that do not occur."""
    x, classes = args
    pointer = walk.pointer(x)
    if pointer is None or not isinstance(classes, int) or classes < size(pointer.axis):
        return walk.unknown(node)
    walk.follow(node, x)
    walk.role(ROLE, pointer.axis)
    spare = classes - size(pointer.axis)
    places = walk.space.sum([pointer.axis, walk.space.axis(spare, f"{node.name}: no index")]) if spare else pointer.axis
    walk.size(node, 1, places)
    return [*walk[x], places]


def index(walk: Walk, node: fx.Node, args: Args) -> Any:
    """w[i]: rows by their numbers. Indices that are put in another order are indices still."""
    used = [i for i, by in enumerate(args[1]) if by is not None]
    by = args[1][used[0]]
    pointer = walk.pointer(by) if len(used) == 1 else None
    if pointer is None:
        return carried(lookup.index)(walk, node, args)
    x = walk[args[0]]
    walk.follow(node, by)
    walk.role(ROLE, pointer.axis)
    walk.space.tie(x[used[0]], pointer.axis)
    return [*x[: used[0]], *walk[by], *x[used[0] + 1 :]]


def gathered(rule: Rule) -> Rule:
    """out[t, j] = x[t, i[t, j]]: scores of those that were chosen; `rule` serves where the numbers are no choice."""

    def gather(walk: Walk, node: fx.Node, args: Args) -> Any:
        x, dim, by = walk[args[0]], args[1], args[2]
        if node.target is torch.ops.aten.take_along_dim.default:
            dim, by = by, dim
        pointer = walk.pointer(by)
        if pointer is None or dim is None:
            return rule(walk, node, args)
        _beside(walk, node, x, dim % len(x), by, pointer)
        for choice in pointer.choices:
            choice.weighed.append((by, node))
        return walk[by]

    return gather


def scatter(walk: Walk, node: fx.Node, args: Args) -> Any:
    """out[t, i[t, j]] = v[t, j], or one number: what was chosen, among all."""
    x, dim, by, value = walk[args[0]], args[1], args[2], args[3]
    pointer = walk.pointer(by)
    if pointer is None:
        return lookup.scatter(walk, node, args)
    _beside(walk, node, x, dim % len(x), by, pointer)
    walk.role(ROLE, pointer.axis)
    if isinstance(value, fx.Node):
        walk.broadcast(walk[value], walk[by])
        for choice in pointer.choices:
            choice.weighed.append((None, node))
    return x


def _beside(walk: Walk, node: fx.Node, x: Axes, dim: int, by: fx.Node, pointer: Pointer) -> None:
    """Places along `dim` are indices; the other dimensions of both go together where their sizes do."""
    walk.follow(node, by)
    walk.space.tie(x[dim], pointer.axis)
    for i, (axis, other) in enumerate(zip(x, walk[by], strict=True)):
        if i != dim and size(axis) == size(other):
            walk.space.tie(axis, other)
        elif i != dim:
            walk.space.freeze(axis, f"{node.name}: it is used in part")


def floors(walk: Walk) -> dict[Atom, int]:
    """By leaf: how many indices of it have to stay, so that each axis keeps as many as are chosen of it at once.

    Of [a, b] with k chosen, a keeps k / b and b keeps min(k, b), rounded up: then both can be cut. Where the largest
    is taken several times in turn, each time counts.
    """
    turns: dict[Atom, list[Axis]] = {}
    for choice in walk.choices:
        if choice.node.target is not torch.ops.aten.topk.default:
            for leaf in leaves(choice.axis):
                turns.setdefault(leaf, []).append(choice.axis)
    found: dict[Atom, int] = {}
    for axis, k in [*walk.floors, *((axes[0], len(axes)) for axes in turns.values())]:
        _floor(axis, k, found)
    return found


def _floor(axis: Axis, k: int, found: dict[Atom, int]) -> None:
    axis = norm(axis)
    for i, atom in enumerate(axis):
        inner = size(axis[i + 1 :])
        least = min(atom.size, -(-k // inner))
        if atom.parts is None:
            found[atom] = max(found.get(atom, 0), least)
        for part in atom.parts or ():
            _floor(part, min(size(part), least), found)
        k = min(k, inner)
