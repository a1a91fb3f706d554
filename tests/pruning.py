"""What tests of pruning share: a captured program, and a cut of random indices of its groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwindle.frontends.capture import capture
from dwindle.frontends.inputs import as_arguments, flat_batches
from dwindle.passes.canonicalize import canonicalize
from dwindle.passes.prune.axes import Atom
from dwindle.passes.prune.groups import Group, find_groups, kept_count
from dwindle.passes.prune.transfer import rule_of
from dwindle.passes.prune.walk import Walk
from dwindle.runtime.contract import Signature
from dwindle.runtime.store import Store


def walked(model: nn.Module, inputs: Any) -> tuple[Walk, list[Tensor]]:
    """The analysis of a model, and its example as flat inputs."""
    arguments = as_arguments(model, inputs)
    program = canonicalize(capture(model, arguments, Store.borrowing(model)))
    (batch,) = flat_batches(program, Signature.of(model), [arguments])
    return Walk.over(program, rule_of), list(batch)


def groups_of(walk: Walk, chosen: Callable[[Group], bool] = lambda group: True) -> list[Group]:
    """Those that may be pruned."""
    return [group for group in find_groups(walk) if not group.reason and chosen(group)]


def random_cut(groups: Sequence[Group], ratio: float, seed: int = 0) -> dict[Atom, Tensor]:
    """Random indices of each group are cut, at least one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        stay = min(group.size - 1, kept_count(group.size, ratio))
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[torch.randperm(group.size, generator=generator)[: max(1, stay)]] = True
        found[group.leaf] = mask
    return found
