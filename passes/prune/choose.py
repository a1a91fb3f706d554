"""Which indices go: each group gives its share, or all groups together give what costs least of their scores.

    local     the least of each group, `ratio` of its indices
    global    the least of all groups by score over the group's mean, until a cost has fallen to a target

Either keeps at least one index of every group, of experts as many as are chosen at once, and widths that are
multiples of what hardware likes. A ratio may also grow or fall with the depth of the network: a pair is that of its
first and of its last layer, and those between lie on a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...runtime.errors import RecipeError
from ...runtime.ops.keep_top import largest
from ...runtime.report import block_of
from .axes import Atom
from .groups import Group, kept_count
from .keep import Kept
from .score import relative

Scores = Mapping[Atom, Tensor]
Cost = Callable[[Kept], float]

MOST = 0.9  # of one group that a global choice takes: a layer of a few channels ends a network


Ratio = float | tuple[float, float]
"""Of all layers, or of the first one and of the last one."""


def at_part(ratio: Ratio, part: float) -> Ratio:
    """A part of it."""
    return (ratio[0] * part, ratio[1] * part) if isinstance(ratio, tuple) else ratio * part


def local(groups: Sequence[Group], scores: Scores, ratio: Ratio, multiple: int = 1) -> dict[Atom, Tensor]:
    """By leaf: bool (n,), True for what is kept; groups that lose nothing are left out."""
    kept = {}
    for group, share in zip(groups, ratios(groups, ratio), strict=True):
        stay = max(group.floor, kept_count(group.size, share, _grid(group, multiple)))
        kept[group.leaf] = largest(scores[group.leaf], stay)
    return {leaf: mask for leaf, mask in kept.items() if not bool(mask.all())}


def ratios(groups: Sequence[Group], ratio: Ratio) -> list[float]:
    """The share of its indices that each group loses.

    Layers are the blocks that the groups lie in, in the order of the network; a group in several loses their mean.
    """
    if not isinstance(ratio, tuple):
        return [ratio] * len(groups)
    blocks = [_layers(group) for group in groups]
    place = {block: i for i, block in enumerate(dict.fromkeys(block for own in blocks for block in own))}
    first, last = ratio
    step = (last - first) / max(1, len(place) - 1)
    return [first + step * sum(place[block] for block in own) / len(own) for own in blocks]


def _layers(group: Group) -> list[str]:
    """The numbered blocks that a group cuts, or the others where it cuts none: an embedding is no layer."""
    blocks = list(dict.fromkeys(block_of(cut.name) for cut in group.cuts))
    return [block for block in blocks if block.rpartition(".")[2].isdigit()] or blocks


def by_threshold(groups: Sequence[Group], scores: Scores, threshold: float, multiple: int = 1) -> dict[Atom, Tensor]:
    """What has at least that score, relative to its group's mean, is kept."""
    kept = {}
    for group, own in zip(groups, relative([scores[g.leaf] for g in groups]), strict=True):
        least = max(group.floor, kept_count(group.size, MOST))
        above = max(least, int((own >= threshold).sum()))
        step = _grid(group, multiple)
        mask = largest(own, min(group.size, -(-above // step) * step))
        if not bool(mask.all()):
            kept[group.leaf] = mask
    return kept


def to_target(
    groups: Sequence[Group], scores: Scores, cost: Cost, target: float, multiple: int = 1
) -> dict[Atom, Tensor]:
    """The highest-scoring indices whose cost is at most `target`, a fraction of the whole.

    Raises RecipeError where no choice costs so little.
    """
    whole = cost({})
    every = torch.cat(relative([scores[g.leaf] for g in groups])).sort().values if groups else torch.zeros(0)
    low, high = 0, len(every)  # how many of all indices lie below the threshold

    def at(n: int) -> dict[Atom, Tensor]:
        threshold = float(every[n]) if n < len(every) else float("inf")
        return by_threshold(groups, scores, threshold, multiple)

    least = cost(at(high)) / whole if groups else 1.0
    if least > target:
        raise RecipeError(
            "the model cannot be pruned to its target",
            required=f"at least {least:.3f} of it, with what may be pruned here",
            found=f"{target:.3g}",
            cure="prune more: scopes ['heads', 'rows', 'channels', 'hidden'] and all modules",
        )
    while low < high:
        middle = (low + high) // 2
        if cost(at(middle)) / whole <= target:
            high = middle
        else:
            low = middle + 1
    return at(low)


def _grid(group: Group, multiple: int) -> int:
    """The grid of an atom: heads and experts are wide enough each, so only plain widths are rounded."""
    return multiple if group.kind in ("rows", "channels", "hidden") else 1
