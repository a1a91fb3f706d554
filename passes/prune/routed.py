"""Routed mass: how much each expert was used over calibration data, read off the captured graph.

A choice (`topk` in the graph) gives numbers and, in the end, weights: what the outputs of the chosen experts are
multiplied by, after all that the model does to them. They are what was compared, or what was gathered at the numbers,
or what was scattered to them, taken through the element-wise calls and the softmax that keep the shape.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..watch import watch
from .axes import norm, size
from .products import softmax
from .score import Mass, routed_mass
from .transfer import elementwise, first, rule_of
from .walk import Choice, Walk

Weighed = tuple[fx.Node | None, fx.Node]
"""The node of the numbers and that of their weights; or None and weights of all experts, 0 for those not chosen."""


def masses(walk: Walk, batches: Iterable[Sequence[Tensor]]) -> list[Mass]:
    """By choice: what each index of its axis received over `batches`, flat inputs; padded positions count too."""
    found = {pair: choice for choice in walk.choices if (pair := weighed(walk, choice)) is not None}
    sums = [torch.zeros(size(choice.axis), dtype=torch.float64) for choice in found.values()]
    wanted = {node for pair in found for node in pair}
    for batch in batches if found else ():
        seen: dict[fx.Node, Tensor] = {}

        def look(node: fx.Node, args: tuple[Any, ...], value: Any, seen: dict[fx.Node, Tensor] = seen) -> Any:
            if node in wanted:
                seen[node] = value.clone()
            return value

        watch(walk.program, batch, look)
        for total, ((numbers, weights), choice) in zip(sums, found.items(), strict=True):
            if numbers is not None:
                total += routed_mass(seen[numbers], seen[weights], len(total))
            else:
                total += _spread(walk, choice, weights, seen[weights])
    return [(choice.axis, total) for total, choice in zip(sums, found.values(), strict=True)]


def _spread(walk: Walk, choice: Choice, node: fx.Node, weights: Tensor) -> Tensor:
    """(E,): weights (..., E, ...) summed over all other dimensions."""
    dim = next(i for i, axis in enumerate(walk[node]) if norm(axis) == norm(choice.axis))
    others = [i for i in range(weights.dim()) if i != dim]
    return weights.double().cpu().sum(others) if others else weights.double().cpu()


def weighed(walk: Walk, choice: Choice) -> Weighed | None:
    """What gives the weights of a choice; None where its numbers choose no experts."""
    if choice.weighed:
        numbers, weights = choice.weighed[-1]
        return numbers, _last(walk, weights)
    parts = {user.args[1]: user for user in choice.node.users if user.target is operator.getitem}
    if set(parts) != {0, 1} or not _counts(walk, parts[1]):
        return None
    return parts[1], _last(walk, parts[0])


def _counts(walk: Walk, numbers: fx.Node) -> bool:
    """Whether something is picked or counted by these numbers: their readers are not all moves."""
    readers = [node for node, source in walk.read if source is numbers]
    return any(walk.pointer(node) is None or _counts(walk, node) for node in readers)


def _last(walk: Walk, weights: fx.Node) -> fx.Node:
    """The last tensor on the way from `weights` on which every element still is the weight of the same choice."""
    reached = [weights]
    for node in reached:
        for user in node.users:
            if user not in reached and _keeps(walk, node, user):
                reached.append(user)
    order = {node: i for i, node in enumerate(walk.program.graph.nodes)}
    return max(reached, key=order.__getitem__)


def _keeps(walk: Walk, node: fx.Node, user: fx.Node) -> bool:
    value = walk.values.get(user)
    if not isinstance(value, Tensor) or not value.is_floating_point() or walk.shape(user) != walk.shape(node):
        return False
    return rule_of(user) in (elementwise, first, softmax)
