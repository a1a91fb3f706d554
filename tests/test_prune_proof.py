"""masked == sliced, and that the proof finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import ZOO
from pruning import groups_of, random_cut, walked
from torch import Tensor, nn

from dwindle.passes.prune import decide
from dwindle.passes.prune.groups import find_groups
from dwindle.passes.prune.keep import is_cut
from dwindle.passes.prune.masked import operand
from dwindle.passes.prune.proof import LIMIT, proven


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ZOO)
def test_every_group_at_once_is_exact(name: str, seed: int) -> None:
    walk, batch = walked(*ZOO[name]())
    cut = random_cut(groups_of(walk), 0.3, seed)
    assert cut
    assert proven(walk, cut, [batch], seed) < 1e-12


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "convnext"])
def test_a_forgotten_ending_is_found(name: str) -> None:
    """The mutation of every rule: without its ending the masked graph counts what is cut."""
    walk, batch = walked(*ZOO[name]())
    cut = random_cut(groups_of(walk), 0.3)
    hows = {e.how for e in walk.endings if is_cut(walk[operand(e)][e.dim], cut)}
    assert "zero" in hows
    for how in hows:
        mutated = replace(walk, endings=[ending for ending in walk.endings if ending.how != how])
        assert proven(mutated, cut, [batch]) > 100 * LIMIT, how


class Shuffle(nn.Module):
    """Channels in two halves that change places, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 6, 1)
        self.other = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x), self.other(x)], 1)
        y = y.view(y.shape[0], 2, 8, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.two(y).mean((2, 3))


class Standardised(nn.Module):
    """A weight that is normalised over its inputs before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.batch_norm(self.weight.reshape(1, 6, -1), None, None, training=True)
        return nn.functional.conv2d(self.first(x), weight.reshape_as(self.weight)).mean((2, 3))


class GroupNorms(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 12, 1), nn.GroupNorm(groups, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x))).mean((2, 3))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 3, groups=4)
        self.up = nn.ConvTranspose2d(24, 8, 2, groups=2)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.grouped(self.first(x)).relu()).amax((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 1)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        gate = self.up(self.down(y.mean((2, 3))).relu()).sigmoid()
        return self.last(y * gate[:, :, None, None]).flatten(1)


class Statistics(nn.Module):
    """A softmax, a norm and a mean over what is pruned, and a sum of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.RMSNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y.softmax(-1) + self.norm(y) + y / torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        return self.last(y) + y.mean(-1, keepdim=True)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bhd,hdo->bo", self.first(x).view(-1, 3, 4), self.weight)


class Tiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tile(2))


class Attention(nn.Module):
    """Attention whose result is seen through a view, as its memory lies where queries are as wide as values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.last = (nn.Linear(n, 8) for n in (6, 6, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.last(y.transpose(1, 2).view(*x.shape[:2], 8))


IMAGE, ROWS = (2, 3, 8, 8), (4, 6)

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "shuffle": (Shuffle, IMAGE),
    "weights normalised": (Standardised, IMAGE),
    "one group": (lambda: GroupNorms(1), IMAGE),
    "three groups": (lambda: GroupNorms(3), IMAGE),
    "grouped and transposed": (Grouped, IMAGE),
    "squeeze and excite": (SqueezeExcite, IMAGE),
    "statistics": (Statistics, ROWS),
    "einsum": (Einsum, ROWS),
    "tiled": (Tiled, ROWS),
}


@pytest.mark.parametrize("name", CASES)
def test_architectures_that_are_hard(name: str) -> None:
    make, shape = CASES[name]
    torch.manual_seed(0)
    walk, batch = walked(make().eval(), torch.randn(shape))
    cut = random_cut(groups_of(walk), 0.3)
    assert cut
    assert proven(walk, cut, [batch]) < 1e-12


def test_a_view_holds_where_memory_lies_otherwise() -> None:
    torch.manual_seed(0)
    walk, batch = walked(Attention().eval(), torch.randn(3, 5, 6))
    cut = random_cut(groups_of(walk, lambda group: not group.outermost and group.name.startswith("q.")), 0.3)
    assert cut
    assert proven(walk, cut, [batch]) < 1e-12


def refused(model: nn.Module, *shape: int) -> dict[str, str]:
    walk, _ = walked(model.eval(), torch.randn(*shape))
    return {group.name: group.reason for group in find_groups(walk)}


def test_inputs_and_outputs_stay() -> None:
    reasons = refused(nn.Linear(6, 4), 3, 6)
    assert reasons == {"weight[0]": "it is an output", "weight[1]": "input input_1"}


def test_what_has_no_rule_is_frozen_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return self.last(torch.linalg.qr(self.first(x)).R.mean(0))

    assert any("no rule for" in reason for reason in refused(Odd(), 4, 6).values())


def test_a_group_that_fails_its_proof_stays_and_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    walk, batch = walked(*ZOO["bert"]())
    groups = groups_of(walk)
    bad = groups[2].leaf
    monkeypatch.setattr(decide, "proven", lambda walk, kept, batches: 1.0 if bad in kept else 0.0)
    cut = random_cut(groups, 0.3)
    assert set(decide.accepted(walk, cut, [batch])) == set(cut) - {bad}
    (entry,) = [e for e in walk.program.log if e.rule == "prune.proof"]
    assert entry.where == groups[2].name
    assert not entry.applied


def test_groups_that_fail_together_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    walk, batch = walked(*ZOO["bert"]())
    groups = groups_of(walk)
    first, last = groups[0].leaf, groups[-1].leaf
    monkeypatch.setattr(decide, "proven", lambda walk, kept, batches: float(first in kept and last in kept))
    found = decide.accepted(walk, random_cut(groups, 0.3), [batch])
    assert (first in found) != (last in found)
    assert any("together" in e.reason for e in walk.program.log)
