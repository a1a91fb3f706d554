"""transplant of what was pruned, in modules that people write: which of their numbers follow, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import _random
from pruning import apart
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.frontends.resize import _Search
from dwindle.frontends.transplant import EXACT, TransplantError


def ints(model: nn.Module) -> list[dict[str, Any]]:
    """All numbers that its modules hold."""
    kinds = int | tuple | list
    return [{k: v for k, v in vars(m).items() if isinstance(v, kinds)} for m in model.modules()]


class Attention(nn.Module):
    """Attention as people write it. Of its numbers `window` and `index` are not looked at."""

    def __init__(self, width: int, heads: int, head: int, index: int, window: int, upto: int) -> None:
        super().__init__()
        self.heads, self.head, self.inner, self.window, self.index, self.upto = (
            *(heads, head, heads * head),
            *(window, index, upto),
        )
        self.qkv, self.out = nn.Linear(width, 3 * self.inner), nn.Linear(self.inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.inner, -1)
        q, k, v = (t.unflatten(-1, (self.heads, self.head)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return x + self.out(y.transpose(1, 2).flatten(2)) * (1 + 1 / self.upto)


class Stack(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, head: int) -> None:
        super().__init__()
        self.layers = layers
        self.first = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Attention(width, heads, head, i, heads, heads * head) for i in range(layers))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in range(self.layers):
            x = self.blocks[i](x)
        return self.last(x)


@settings(max_examples=8, deadline=None)
@given(
    layers=st.integers(1, 3),
    width=st.sampled_from([6, 8]),
    heads=st.sampled_from([2, 3, 4]),
    head=st.sampled_from([2, 3, 4]),
    ratio=st.sampled_from([0.34, 0.5]),
    inner=st.booleans(),
)
def test_numbers_that_are_equal_are_told_apart(
    layers: int, width: int, heads: int, head: int, ratio: float, inner: bool
) -> None:
    """Heads may be as many as layers, as they are wide, as the window is long: what counts them follows, no other."""
    assume(ratio * max(heads, head if inner else 0) >= 1)
    torch.manual_seed(0)
    model, x = Stack(layers, width, heads, head).eval(), {"x": _random(2, 5, 5)}
    rule = {"ratio": ratio, "scopes": ["heads", "rows", "channels"], "inner": inner}
    small = dwindle.compress(model, {"prune": rule}, inputs=x, dynamic_shapes={"x": {0: "batch"}})
    eager = dwindle.transplant(small, model, inputs=x)
    assert apart(small, eager, x) <= EXACT
    assert eager.layers == layers
    for i, block in enumerate(eager.blocks):
        assert block.heads * block.head == block.inner == block.out.in_features
        assert (block.window, block.index, block.upto) == (heads, i, heads * head)
        assert block.qkv.out_features == 3 * block.inner == block.qkv.weight.shape[0]


class Reading(nn.Module):
    """A block that asks its config, which all blocks share, how many heads there are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.config.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Frozen:
    heads: int = 4
    layers: int = 4


def reading(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), Reading(config), Reading(config), nn.Linear(12, 3)).eval()


def test_a_config_that_the_forward_reads_is_written_where_all_layers_agree() -> None:
    model, x = reading(SimpleNamespace(heads=4, layers=4)), {"input": _random(2, 5, 5)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.5, "scopes": "heads"}}, inputs=x)
    eager = dwindle.transplant(small, model, inputs=x)
    assert apart(small, eager, x) <= EXACT
    assert vars(eager[1].config) == {"heads": 2, "layers": 4}
    assert eager[1].config is eager[2].config
    assert vars(model[1].config) == {"heads": 4, "layers": 4}


def test_a_config_that_cannot_be_written_is_named() -> None:
    model, x = reading(Frozen()), {"input": _random(2, 5, 5)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.5, "scopes": "heads"}}, inputs=x)
    with pytest.raises(TransplantError, match=r"Frozen\.heads 4 -> 2 cannot be set \(FrozenInstanceError"):
        dwindle.transplant(small, model, inputs=x)


def test_layers_that_differ_need_more_than_a_config() -> None:
    model, x = reading(SimpleNamespace(heads=4, layers=2)), {"input": _random(2, 5, 5)}
    rules = [{"ratio": 0.25, "scopes": "heads"}, {"ratio": 0.5, "scopes": "heads", "modules": "2.*"}]
    small = dwindle.compress(model, {"prune": rules}, inputs=x)
    before, numbers = copy.deepcopy(model.state_dict()), ints(model)
    with pytest.raises(TransplantError, match=r"(?s)1 \(Reading\).*cure: call the compressed model itself"):
        dwindle.transplant(small, model, inputs=x)
    assert vars(model[1].config) == {"heads": 4, "layers": 2}
    assert ints(model) == numbers
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Written(Reading):
    """The number of heads is in the code."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_number_that_is_no_attribute_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(5, 12), Written(None), nn.Linear(12, 3)).eval(), {"input": _random(2, 5, 5)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.5, "scopes": "heads"}}, inputs=x)
    with pytest.raises(TransplantError, match=r"1 \(Written\) counts 4, of which 2 are left, in no attribute") as told:
        dwindle.transplant(small, model, inputs=x)
    assert told.value.cure


def test_torchs_own_attention_refuses_to_lose_heads() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.attention(x, x, x, need_weights=False)[0])

    model, x = Block().eval(), {"x": _random(2, 5, 5)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.5, "scopes": "heads"}}, inputs=x)
    with pytest.raises(TransplantError, match=r"attention \(MultiheadAttention\)"):
        dwindle.transplant(small, model, inputs=x)


class Shapes(nn.Module):
    """Numbers in tuples and in modules that hold no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.norm, self.spread = nn.LayerNorm(12, elementwise_affine=False), nn.Unflatten(-1, (12, 1))
        self.shape = (-1, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spread(self.norm(self.first(x).relu())).flatten(-2)
        return self.last(x.reshape(self.shape))


def test_tuples_and_modules_without_tensors_follow() -> None:
    torch.manual_seed(0)
    model, x = Shapes().eval(), {"x": _random(4, 6)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.3}}, inputs=x)
    eager = dwindle.transplant(small, model, inputs=x)
    assert apart(small, eager, x) <= EXACT
    assert tuple(eager.norm.normalized_shape) == tuple(eager.spread.unflattened_size)[:1] == eager.shape[1:] == (9,)
    assert model.shape == (-1, 12)


def test_groups_of_convolutions_and_norms_follow() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 1)]
    model, x = nn.Sequential(*layers).eval(), {"input": _random(2, 3, 8, 8)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.5}}, inputs=x)
    eager = dwindle.transplant(small, model, inputs=x)
    assert apart(small, eager, x) <= EXACT
    assert (eager[1].groups, eager[1].in_channels, eager[1].out_channels) == (2, 8, 8)
    assert (eager[2].num_groups, eager[2].num_channels) == (2, 8)


def test_transposed_convolutions_follow() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, 16, 1), nn.ConvTranspose1d(16, 8, 2, stride=2, groups=4), nn.Conv1d(8, 3, 1)]
    model, x = nn.Sequential(*layers).eval(), {"input": _random(2, 3, 8)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.5}}, inputs=x)
    eager = dwindle.transplant(small, model, inputs=x)
    assert apart(small, eager, x) <= EXACT
    assert (eager[1].groups, eager[1].in_channels, eager[1].out_channels) == (2, 8, 4)


def test_slopes_and_statistics_follow() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12, affine=False), nn.PReLU(12), nn.RMSNorm(12), nn.Linear(12, 3)]
    model, x = nn.Sequential(*layers).eval(), {"input": _random(4, 6)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.3}}, inputs=x)
    eager = dwindle.transplant(small, model, inputs=x)
    assert apart(small, eager, x) <= EXACT
    assert (eager[1].num_features, eager[2].num_parameters, eager[3].normalized_shape) == (9, 9, (9,))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.heads, self.last = nn.Linear(6, 12), 12, nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.first(x).relu().reshape(-1, self.heads)) * self.calls


def test_looking_for_numbers_leaves_no_trace() -> None:
    model, x = Counting().eval(), {"x": _random(4, 6)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.3}}, inputs=x)
    before = small.store.get("calls").item()
    eager = dwindle.transplant(small, model, inputs=x)
    assert model.calls.item() == 0
    assert eager.calls.item() == small.store.get("calls").item() == before
    assert eager.heads == 9
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in eager.modules())


def test_the_search_ends_and_takes_as_little_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.frontends.resize.TRIES", 5)
    model, x = nn.Sequential(nn.Linear(5, 12), Written(None), nn.Linear(12, 3)).eval(), {"input": _random(2, 5, 5)}
    small = dwindle.compress(model, {"prune": {"ratio": 0.5, "scopes": "heads"}}, inputs=x)
    tries: list[Any] = []
    attempt = _Search.attempt
    monkeypatch.setattr(_Search, "attempt", lambda self, choice: (tries.append(choice), attempt(self, choice))[1])
    with pytest.raises(TransplantError):
        dwindle.transplant(small, model, inputs=x)
    assert 1 <= len(tries) <= 5
