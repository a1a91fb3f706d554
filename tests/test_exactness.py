"""An empty recipe is the model, also where memory is written, modes are nested and gradients are off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwindle
from dwindle.runtime.errors import CaptureError


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class _Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("quarter", torch.arange(4.0))


class _WritesConstant(_Layered):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        t += x.sum()
        return self.layer(x + t)


class _WritesCopy(_Layered):
    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32, copy=True)
        y.mul_(2)
        return self.layer(y)


class _WritesFolded(_Layered):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.quarter, self.quarter])
        h += x.sum(0)
        return self.layer(x + h)


class _GivesFolded(_Layered):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x), torch.cat([self.quarter, self.quarter])


@pytest.mark.parametrize("kind", [_WritesConstant, _WritesCopy, _WritesFolded])
def test_calls_leave_nothing_behind(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), _x(3, 8)
    small, given = dwindle.compress(model, {}, inputs=x), x.clone()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(small(x), model(x))
    assert torch.equal(x, given)


def test_an_output_is_the_callers_to_write() -> None:
    model, x = _GivesFolded().eval(), _x(3, 8)
    small = dwindle.compress(model, {}, inputs=x)
    with torch.no_grad():
        small(x)[1].zero_()
        assert torch.equal(small(x)[1], model(x)[1])


class _Strided(_Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.contiguous().view(x.shape[0], -1))


def test_strides_may_be_others_than_the_examples() -> None:
    model, x = _Strided().eval(), _x(2, 2, 2, 2)
    small = dwindle.compress(model, {}, inputs=x)
    other = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(small(other), model(other))


class _Statistics(nn.Module):
    """Normalises by a variance that training updates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.variance.mul_(0.5).add_(x.var(0), alpha=2)
        return self.layer(x * torch.rsqrt(self.variance + 1e-5))


def test_statistics_that_training_updates_are_not_folded() -> None:
    model, x = _Statistics(), 3 * _x(16, 8)
    student = dwindle.prepare(model, {}, inputs=x)
    student.eval()(x)
    for each in (model.train(), student.train()):
        for _ in range(3):
            each(x)
    with torch.no_grad():
        assert torch.equal(student.eval()(x), model.eval()(x))
        assert torch.equal(student.finish()(x), model(x))


class _Autocast(_Layered):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.layer(x)


def test_autocast_inside_forward_is_refused_where_it_casts() -> None:
    x = _x(3, 8)
    with pytest.raises(CaptureError, match=r"(?s)autocast.*cure: move autocast out"):
        dwindle.compress(_Autocast(True).eval(), {}, inputs=x)
    model = _Autocast(False).eval()
    assert torch.equal(dwindle.compress(model, {}, inputs=x)(x), model(x))


class _PartlyWithoutGradient(_Layered):
    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.fixed(x)
        return (self.layer(x) - target).square().sum()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_changes_nothing(mode: Any) -> None:
    model, x = _PartlyWithoutGradient(), _x(3, 8)
    with mode():
        student = dwindle.prepare(model.train(), {}, inputs=x)
        student(x)
    student(x).backward()
    model(x).backward()
    grads = {name: p.grad for name, p in student.named_parameters()}
    assert (grads["fixed.weight"], model.fixed.weight.grad) == (None, None)
    assert torch.equal(grads["layer.weight"], model.layer.weight.grad)  # type: ignore[arg-type]  # both have one


class _Whole(_Layered):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer((a.long() + b.long()).float())


def test_dtypes_are_told_apart() -> None:
    model = _Whole().eval()
    a, b = torch.ones(3, 8, dtype=torch.int64), torch.ones(3, 8, dtype=torch.int64)
    small = dwindle.compress(model, {}, inputs=(a, b))
    with torch.no_grad():
        assert torch.equal(small(a.int(), b), model(a, b))
    for other in (torch.bool, torch.uint8, torch.float64):
        with pytest.raises(CaptureError, match="does not fit"):
            small(a.to(other), b)


class _Renormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 16, max_norm=1.0), nn.Linear(16, 16)
        with torch.no_grad():
            self.table.weight.mul_(10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.table(ids))


@pytest.mark.parametrize("recipe", [{}, "w8a16"])
def test_a_weight_that_the_forward_writes_is_written_in_the_copy(recipe: Any) -> None:
    model, ids = _Renormalised().eval(), torch.arange(15).reshape(3, 5)
    before = model.table.weight.clone()
    small = dwindle.compress(model, recipe, inputs=ids)
    with torch.no_grad():
        found = small(ids)
        assert torch.equal(model.table.weight, before)
        torch.testing.assert_close(found, model(ids), atol=0.02, rtol=0.02)


class _DeadDropout(_Layered):
    def forward(self, x: Tensor) -> Tensor:
        nn.functional.dropout(x, 0.5, self.training)
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


def test_random_numbers_that_nobody_reads_are_drawn_all_the_same() -> None:
    model, x = _DeadDropout().train(), _x(3, 8)
    student = dwindle.prepare(model, {}, inputs=x)
    found = []
    for each in (student, model):
        torch.manual_seed(0)
        found.append(each(x))
    assert torch.equal(*found)


def test_layers_too_small_to_gain_are_left_in_float() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(1, 16)).eval()
    small = dwindle.compress(model, inputs=_x(3, 16))
    assert [e.where for e in small.log if "it would take" in e.reason] == ["2.weight"]
