"""Random networks: whatever they are made of, masked equals sliced, and pruning what is pruned already does nothing."""

from __future__ import annotations

import random as python_random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pruning import groups_of, random_cut, walked
from torch import Tensor, nn

from dwindle.passes.prune.choose import local
from dwindle.passes.prune.groups import Group
from dwindle.passes.prune.keep import Kept
from dwindle.passes.prune.proof import proven
from dwindle.passes.prune.score import score
from dwindle.passes.prune.sliced import sliced
from dwindle.passes.prune.slices import leaves_of, slices_of
from dwindle.passes.prune.transfer import rule_of
from dwindle.passes.prune.walk import Walk
from dwindle.runtime.program import Program

VECTOR_STEPS = (
    *("linear", "residual", "concat", "heads", "split", "gate", "norm", "softmax", "pairs", "mean", "repeat"),
    *("branches", "reshape", "pieces", "glu"),
)
IMAGE_STEPS = (
    *("conv", "residual", "concat", "grouped", "depthwise", "norm", "group norm", "shuffle", "excite", "chunk"),
    *("transposed", "branches"),
)


class Vectors(nn.Module):
    """(B, S, width) through steps that a seed has chosen; the last layer is linear."""

    def __init__(self, steps: tuple[str, ...], seed: int) -> None:
        super().__init__()
        self.steps, draw = steps, python_random.Random(seed)
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleDict()
        width = 8
        for i, step in enumerate(steps):
            width = self._add(f"s{i}", step, width, draw)
        self.last = nn.Linear(width, 3)

    def _add(self, name: str, step: str, width: int, draw: python_random.Random) -> int:
        own = nn.ModuleDict()
        out = width
        if step in ("linear", "repeat"):
            out = draw.choice((4, 6, 8, 12))
            own["a"] = nn.Linear(width, out, bias=draw.random() < 0.5)
            out *= 2 if step == "repeat" else 1
        elif step in ("residual", "gate", "pairs"):
            own["a"], own["b"] = nn.Linear(width, 8), nn.Linear(8, width)
            own["c"] = nn.Linear(width, 8)
        elif step == "concat":
            own["a"], own["b"] = nn.Linear(width, 4), nn.Linear(width, 6)
            out = 10 + width
        elif step == "heads":
            own["a"], own["b"], own["c"] = (nn.Linear(width, 12) for _ in range(3))
            out = 12
        elif step in ("split", "glu"):
            own["a"] = nn.Linear(width, 12)
            out = 6
        elif step == "branches":
            own["a"], own["b"], own["c"] = nn.Linear(width, 6), nn.Linear(width, 6), nn.Linear(6, 6)
            out = 6
        elif step == "norm":
            own["a"] = nn.LayerNorm(width)
        self.layers[name] = own
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, step in enumerate(self.steps):
            x = self._step(step, self.layers[f"s{i}"], x)
        return self.last(x)

    def _step(self, step: str, own: Any, x: Tensor) -> Tensor:
        match step:
            case "linear":
                return own["a"](x).relu()
            case "residual":
                return x + own["b"](own["a"](x).tanh())
            case "gate":
                return own["b"](own["a"](x) * own["c"](x).sigmoid())
            case "pairs":
                mixed = torch.einsum("bsd,btd->bst", own["a"](x), own["c"](x))
                return own["b"](mixed @ own["c"](x))
            case "concat":
                return torch.cat([own["a"](x), x, own["b"](x)], -1)
            case "heads":
                q, k, v = (own[n](x).unflatten(-1, (3, 4)).transpose(1, 2) for n in "abc")
                return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            case "split":
                left, right = own["a"](x).chunk(2, -1)
                return left * right.sigmoid()
            case "branches":
                y = own["a"](x)
                return own["c"](y.relu()) * y + own["b"](x)
            case "reshape":
                return x.reshape(*x.shape[:2], 2, -1).transpose(2, 3).reshape(x.shape)
            case "pieces":
                first, second, third = x.split([2, 1, x.shape[-1] - 3], -1)
                return torch.cat([third.tanh(), first, second], -1)
            case "glu":
                return nn.functional.glu(own["a"](x), -1)
            case "norm":
                return own["a"](x)
            case "softmax":
                return x.softmax(-1)
            case "mean":
                return x - x.mean(-1, keepdim=True)
            case _:
                return own["a"](x).repeat_interleave(2, -1)


class Images(nn.Module):
    """(B, C, H, W) through steps that a seed has chosen; then a mean over space and a linear layer."""

    def __init__(self, steps: tuple[str, ...], seed: int) -> None:
        super().__init__()
        self.steps = steps
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.layers = nn.ModuleDict()
        width = 12
        for i, step in enumerate(steps):
            width = self._add(f"s{i}", step, width)
        self.last = nn.Linear(width, 3)

    def _add(self, name: str, step: str, width: int) -> int:
        own = nn.ModuleDict()
        out = width
        if step == "conv":
            out = 12
            own["a"] = nn.Conv2d(width, out, 3, padding=1)
        elif step == "residual":
            own["a"], own["b"] = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 3, padding=1)
        elif step == "concat":
            own["a"] = nn.Conv2d(width, 4, 3, padding=1)
            out = width + 4
        elif step == "grouped":
            own["a"] = nn.Conv2d(width, 2 * width, 3, padding=1, groups=4)
            own["b"] = nn.Conv2d(2 * width, width, 1)
        elif step == "transposed":
            own["a"] = nn.ConvTranspose2d(width, width, 3, padding=1, groups=4)
        elif step == "branches":
            own["a"], own["b"] = nn.Conv2d(width, 8, 1), nn.Conv2d(width, 8, 3, padding=1)
            out = 8
        elif step == "depthwise":
            own["a"] = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
            out = 2 * width
        elif step == "norm":
            own["a"] = nn.BatchNorm2d(width)
        elif step == "group norm":
            own["a"] = nn.GroupNorm(4, width)
        elif step == "excite":
            own["a"], own["b"] = nn.Linear(width, 4), nn.Linear(4, width)
        elif step == "chunk":
            own["a"] = nn.Conv2d(width // 2, width // 2, 1)
        self.layers[name] = own
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, step in enumerate(self.steps):
            x = self._step(step, self.layers[f"s{i}"], x)
        return self.last(x.mean((2, 3)))

    def _step(self, step: str, own: Any, x: Tensor) -> Tensor:
        match step:
            case "residual":
                return (x + own["b"](own["a"](x).relu())).relu()
            case "concat":
                return torch.cat([x, own["a"](x)], 1)
            case "branches":
                return own["a"](x) * own["b"](x).sigmoid()
            case "grouped":
                return own["b"](own["a"](x).relu())
            case "shuffle":
                b, c, h, w = x.shape
                return x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
            case "excite":
                return x * own["b"](own["a"](x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
            case "chunk":
                left, right = x.chunk(2, 1)
                return torch.cat([right, own["a"](left)], 1)
            case _:
                return own["a"](x)


def check(model: nn.Module, x: Tensor, seed: int) -> bool:
    """masked == sliced, and every way of cutting a second time; False where nothing can be pruned."""
    walk, batch = walked(model.eval(), x)
    groups = groups_of(walk)
    if not groups:
        return False  # a shuffle before a group norm leaves none
    cut = random_cut(groups, 0.4, seed)
    assert proven(walk, cut, [batch], seed) < 1e-9
    once = made(walk, cut)
    fresh, _ = walked(model, x)
    replayed = made(fresh, leaves_of(fresh, slices_of(walk, cut)))
    assert str(replayed.graph) == str(once.graph)
    assert same_tensors(replayed, once)
    again = Walk.over(once, rule_of)
    assert sized(groups_of(again)) == sized(groups, cut)
    nothing = local(groups_of(again), {g.leaf: score(again, g, "l2") for g in groups_of(again)}, 0.0)
    assert nothing == {}
    twice = made(again, nothing)
    assert str(twice.graph) == str(once.graph)
    assert same_tensors(twice, once)
    return True


def made(walk: Walk, cut: Kept) -> Program:
    """A sliced copy, in a store of its own."""
    copy = walk.program.copy(walk.program.store.fork())
    return sliced(copy, walk.on(copy), cut)


def same_tensors(one: Program, other: Program) -> bool:
    a, b = ({name: t for name, t in p.store.entries() if isinstance(t, Tensor)} for p in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sized(groups: Sequence[Group], cut: Kept | None = None) -> list[tuple[list[str], int]]:
    """What each group cuts, and how many indices it has or is left with; one index is no group."""
    stay = {g.leaf: int(cut[g.leaf].sum()) if cut and g.leaf in cut else g.size for g in groups}
    return sorted((sorted(f"{c.name}[{c.dim}]" for c in g.cuts), stay[g.leaf]) for g in groups if stay[g.leaf] > 1)


@pytest.mark.parametrize("step", VECTOR_STEPS)
def test_each_step_on_vectors(step: str) -> None:
    assert check(Vectors((step,), 0), torch.randn(2, 5, 6), 0)


@pytest.mark.parametrize("step", IMAGE_STEPS)
def test_each_step_on_images(step: str) -> None:
    assert check(Images((step,), 0), torch.randn(2, 3, 5, 5), 0)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(VECTOR_STEPS), min_size=1, max_size=5), st.integers(0, 99))
def test_networks_on_vectors(steps: list[str], seed: int) -> None:
    assume(check(Vectors(tuple(steps), seed), torch.randn(2, 5, 6), seed))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(IMAGE_STEPS), min_size=1, max_size=5), st.integers(0, 99))
def test_networks_on_images(steps: list[str], seed: int) -> None:
    assume(check(Images(tuple(steps), seed), torch.randn(2, 3, 5, 5), seed))
