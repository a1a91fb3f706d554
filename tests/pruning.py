"""What tests of pruning share: a captured program, a cut of random indices of its groups, and what `compress` cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from models import first
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.frontends.capture import capture
from dwindle.frontends.inputs import as_arguments, flat_batches
from dwindle.passes.canonicalize import canonicalize
from dwindle.passes.prune.axes import Atom
from dwindle.passes.prune.groups import Group, find_groups, kept_count
from dwindle.passes.prune.transfer import rule_of
from dwindle.passes.prune.walk import Walk
from dwindle.passes.verify import difference
from dwindle.runtime.compressed import Compressed
from dwindle.runtime.contract import Signature
from dwindle.runtime.model import flat_outputs
from dwindle.runtime.store import Store
from dwindle.runtime.structure import flatten

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def walked(model: nn.Module, inputs: Any) -> tuple[Walk, list[Tensor]]:
    """The analysis of a model, and its example as flat inputs."""
    arguments = as_arguments(model, inputs)
    program = canonicalize(capture(model, arguments, Store.borrowing(model)))
    (batch,) = flat_batches(program, Signature.of(model), [arguments])
    return Walk.over(program, rule_of), list(batch)


def groups_of(walk: Walk, chosen: Callable[[Group], bool] = lambda group: True) -> list[Group]:
    """Those that may be pruned."""
    return [group for group in find_groups(walk) if not group.reason and chosen(group)]


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """All tensors that a call gives."""
    with torch.no_grad():
        return flat_outputs(flatten(model(**inputs))[1])


def apart(a: nn.Module, b: nn.Module, inputs: dict[str, Any]) -> float:
    """|a - b| / |a| over all outputs."""
    return difference(outputs(a, inputs), outputs(b, inputs)).relative


def random_cut(groups: Sequence[Group], ratio: float, seed: int = 0) -> dict[Atom, Tensor]:
    """Random indices of each group are cut, at least one."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        stay = min(group.size - 1, kept_count(group.size, ratio))
        mask = torch.zeros(group.size, dtype=torch.bool)
        mask[torch.randperm(group.size, generator=generator)[: max(group.floor, stay)]] = True
        found[group.leaf] = mask
    return found


def pruned(model: nn.Module, inputs: Any, dynamic_shapes: Any = None, **rule: Any) -> Compressed:
    """By one rule, after training."""
    return dwindle.compress(model, {"prune": rule}, inputs=inputs, dynamic_shapes=dynamic_shapes)


def called(model: Any, inputs: Any) -> Tensor:
    """The first tensor that a call with these inputs gives."""
    with torch.no_grad():
        return first(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def widths(small: Compressed) -> dict[tuple[str, int], int]:
    """What stays of each axis that was cut."""
    return {(edit.fqn, edit.dim): edit.size - len(edit.removed) for edit in small.plan.slices}


class Block(nn.Module):
    """Attention of 4 heads and a feed-forward of 4 times the width, each before a residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (linear(y).unflatten(-1, (4, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Two blocks of width 32, (N, L, 10) to (N, L, 3); always the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.norm, self.last = nn.Linear(10, 32), nn.LayerNorm(32), nn.Linear(32, 3)
            self.blocks = nn.ModuleList([Block(32) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x))
