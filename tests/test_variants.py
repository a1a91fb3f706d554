"""Further variants of one model: the same plan on another graph, verified, and stored beside the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import error
from torch import Tensor, nn

import dwindle

# Eight bits of weights alone moved the outputs of these models by at most .009.
CLOSE = 0.02


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class _Features(nn.Module):
    """A convolution whose batch norm can be folded unless its own output is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.1, 4)
            self.norm.weight.uniform_(0.5, 2)

    def forward(self, x: Tensor, features: bool = False) -> Any:
        h = self.first(x)
        y = self.second(torch.relu(self.norm(h)))
        return (y, h) if features else y


@pytest.mark.parametrize("activation", [None, {"range": "static"}])
def test_a_batch_norm_folded_in_one_variant_alone(activation: Any) -> None:
    torch.manual_seed(0)
    model, x = _Features().eval(), _x(2, 16, 8, 8)
    recipe = {"quantize": [{"operators": ["conv2d"], "activation": activation}]}
    small = dwindle.compress(model, recipe, inputs=x, data=[x])
    with torch.no_grad():
        plain, (y, h) = small(x), small(x, features=True)
        expected, features = model(x, features=True)
    assert error(plain, expected) < CLOSE
    assert error(y, expected) < CLOSE
    assert error(h, features) < CLOSE


class _EitherWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_x(32, 32))

    def forward(self, x: Tensor, back: bool = False) -> Tensor:
        return x @ self.weight if back else nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("first", [False, True])
def test_a_weight_that_one_variant_reads_transposed(first: bool) -> None:
    model, x = _EitherWay().eval(), _x(3, 32)
    small = dwindle.compress(model, "w8a16", inputs={"x": x, "back": first})
    with torch.no_grad():
        for back in (False, True):
            assert error(small(x, back=back), model(x, back=back)) < CLOSE


class _Penalty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor, penalty: bool = False) -> Any:
        y = self.layer(x)
        return (y, self.layer.weight.abs().sum()) if penalty else y


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, logits: bool = False) -> Tensor:
        h = self.layer(self.table(ids))
        return self.head(h) if logits else h


def test_a_packed_weight_that_a_later_variant_reads_otherwise() -> None:
    model, x = _Penalty().eval(), _x(3, 32)
    small = dwindle.compress(model, "w8a16", inputs=x)
    with torch.no_grad():
        assert error(small(x, penalty=True)[1], model(x, penalty=True)[1]) < CLOSE
    tied, ids = _Tied().eval(), torch.arange(21).reshape(3, 7)
    small = dwindle.compress(tied, "w8a16", inputs=ids)
    before = small.store.nbytes()
    with torch.no_grad():
        assert error(small(ids, logits=True), tied(ids, logits=True)) < CLOSE
    assert small.store.nbytes() == before  # the head reads the packed table


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, head: bool = False) -> Tensor:
        y = self.layer(x)
        return self.head(y) if head else y


def test_a_late_variant_shares_no_memory_with_the_student() -> None:
    student = dwindle.prepare(_Head(), inputs=_x(3, 16))
    small = student.finish()
    with torch.no_grad():
        before = small(_x(3, 16), head=True)
        for parameter in student.parameters():
            parameter.add_(1)
        assert torch.equal(small(_x(3, 16), head=True), before)
    assert not any(p.requires_grad for p in small.parameters())


def test_finishing_twice_gives_the_same_log() -> None:
    student = dwindle.prepare(_Head(), inputs=_x(3, 16))
    assert len({len(student.finish().log) for _ in range(3)}) == 1
