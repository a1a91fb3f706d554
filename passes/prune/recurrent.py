"""Transfer rules of recurrent layers, which torch calls whole: all steps, layers and directions at once.

    gates = w_ih x + b_ih + w_hh h + b_hh        w_ih ([G, H], I)    w_hh ([G, H], R)    biases ([G, H])
    r = w_hr h'                                  w_hr (R, H), where a state is projected; else R = H

One state (layers x directions, B, R) holds those of all layers, so all have one width, and a layer reads the states of
both directions below it, one after the other. Where an axis is cut the columns of the matrices that read it are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .axes import Axis, size
from .walk import Axes, Rule, Walk

Args = Sequence[Any]


def lstm(walk: Walk, node: fx.Node, args: Args) -> list[Axes]:
    """x, (h, c), weights: outputs, h, c."""
    h, c = (walk[state] for state in args[1])
    outputs = _layers(walk, node, args, h, c[-1], 4)
    _beside(walk, h[:-1], c[:-1])
    return [outputs, h, c]


def plain(gates: int) -> Rule:
    """x, h, weights: outputs, h."""

    def rule(walk: Walk, node: fx.Node, args: Args) -> list[Axes]:
        h = walk[args[1]]
        return [_layers(walk, node, args, h, h[-1], gates), h]

    return rule


def _layers(walk: Walk, node: fx.Node, args: Args, state: Axes, hidden: Axis, gates: int) -> Axes:
    """The axes of the outputs; R and H are the last ones of `state` and of `hidden`."""
    *outer, read = walk[args[0]]
    weights, biased, layers, both, batch_first = args[2], args[3], args[4], args[7], args[8]
    walk.space.freeze(state[0], f"{node.name}: layers and directions")
    steps, batches = (outer[::-1] if batch_first else outer) if len(outer) == 2 else (outer[0], ())
    walk.space.freeze(steps, f"{node.name}: steps")
    if len(outer) == 2:
        walk.space.tie(batches, state[1])
    directions = 2 if both else 1
    of_one = len(weights) // (layers * directions)
    made = state[-1]
    for layer in range(layers):
        for direction in range(directions):
            first = (layer * directions + direction) * of_one
            _cell(walk, node, list(range(first, first + of_one)), weights, (read, state[-1], hidden), gates, biased)
        read = made = walk.space.sum([state[-1]] * directions)
    return [*outer, made]


def _cell(
    walk: Walk,
    node: fx.Node,
    at: list[int],
    weights: Sequence[fx.Node],
    widths: tuple[Axis, Axis, Axis],
    gates: int,
    biased: bool,
) -> None:
    """One direction of one layer: w_ih, w_hh, both biases, w_hr."""
    read, state, hidden = widths
    gate = walk.space.axis(gates, f"{node.name}: gates")
    for place, columns in ((at[0], read), (at[1], state)):
        walk.space.tie(walk[weights[place]][1], columns)
        walk.end(node, 2, -1, index=place)
    for place in at[: 4 if biased else 2]:
        walk.space.tie(walk[weights[place]][0], (*gate, *hidden))
    if len(at) in (3, 5):
        walk.broadcast(walk[weights[at[-1]]], [state, hidden])
        walk.end(node, 2, -1, index=at[-1])
    elif size(state) == size(hidden):
        walk.space.tie(state, hidden)


def _beside(walk: Walk, a: Axes, b: Axes) -> None:
    for one, other in zip(a, b, strict=True):
        walk.space.tie(one, other)
