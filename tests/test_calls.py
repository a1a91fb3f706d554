"""A weight that is used several times: each of its inputs has a static range of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import ZOO
from numerics import error
from torch import Tensor, nn

import dwindle
from dwindle.runtime.errors import CalibrationError
from dwindle.runtime.plan import input_scale_name

WEIGHT = "layer.weight"


class Shared(nn.Module):
    """One layer on inputs of very different size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, again: bool | None = None) -> Tensor:
        small = self.layer(x)
        y = self.layer(100 * small.tanh()) + self.layer(small)
        return y if again is None else y + self.layer(y)


def static(kind: str = "symmetric") -> dict[str, object]:
    activation = {"bits": 8, "kind": kind, "range": "static"}
    return {"quantize": [{"weight": {"bits": 8}, "activation": activation}]}


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_each_input_has_its_range(kind: str, tmp_path: Path) -> None:
    model, x = Shared(), torch.randn(32, 16)
    small = dwindle.compress(model, static(kind), inputs=x, data=[x])
    first, second, third = (float(small.store.get(input_scale_name(WEIGHT, call))) for call in range(3))
    assert second > 20 * max(first, third)
    assert small.store.get(input_scale_name(WEIGHT, 3)) is None
    with torch.no_grad():
        assert error(small(x), model(x)) < 0.02
    small.save(tmp_path / "saved")
    assert torch.equal(dwindle.load(tmp_path / "saved")(x), small(x))


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("given", [True, False])
def test_each_input_has_its_range_in_training(kind: str, given: bool) -> None:
    model, x = Shared().train(), torch.randn(32, 16)
    student = dwindle.prepare(model, static(kind), inputs=x, data=[x] if given else None)
    for _ in range(3):
        student(x).square().mean().backward()
        student.step()
    resumed = dwindle.prepare(model, static(kind), inputs=x)
    resumed.load_state_dict(student.state_dict())
    small = student.finish()
    scales = [float(small.store.get(input_scale_name(WEIGHT, call))) for call in range(3)]
    assert scales[1] > 20 * max(scales[0], scales[2])
    with torch.no_grad():
        assert torch.equal(resumed.eval()(x), student.eval()(x))
        assert error(small(x), student.eval()(x)) < 1e-6


def test_another_number_of_calls_than_was_calibrated_is_an_error() -> None:
    model, x = Shared(), torch.randn(32, 16)
    small = dwindle.compress(model, static(), inputs=x, data=[x])
    with pytest.raises(CalibrationError, match="not called as often"):
        small(x, again=True)


def test_a_module_with_one_range_cannot_take_three() -> None:
    model, x = Shared(), torch.randn(32, 16)
    small = dwindle.compress(model, static(), inputs=x, data=[x])
    with pytest.raises(dwindle.DwindleError, match="several inputs"):
        dwindle.transplant(small, model, inputs=x)


class Dropping(nn.Module):
    """Reads one input twice in eval mode, and two in training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) + self.layer(nn.functional.dropout(x, 0.1, self.training))
        return self.layer(100 * y.tanh())


class Pair(nn.Module):
    """Two layers that share an input, or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor | None = None) -> Tensor:
        return self.a(q) + self.b(q if k is None else k)


def trained(student: dwindle.Student, steps: int = 3, rate: float = 0.01, **inputs: Tensor) -> dwindle.Student:
    optimizer = torch.optim.SGD(student.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        student(**inputs).square().mean().backward()
        optimizer.step()
        student.step()
    return student


def test_modes_that_share_inputs_otherwise_have_the_same_ranges() -> None:
    model, x = Dropping().train(), torch.randn(32, 16)
    student = trained(dwindle.prepare(model, static(), inputs=x, data=[x]), rate=0.0, x=x)
    with torch.no_grad():
        exact = model.eval()(x)
        assert error(student.eval()(x), exact) < 0.1
        assert torch.equal(student.finish()(x), student(x))


@pytest.mark.parametrize("kind", ["static", "learned"])
def test_an_input_that_is_shared_in_one_mode_alone_keeps_its_own_range(kind: str) -> None:
    x = torch.randn(32, 16)
    both = {"q": x, "k": 20 * x}
    recipe = {"quantize": [{"activation": {"range": kind}}]}
    student = trained(dwindle.prepare(Pair().train(), recipe, inputs=both, data=[both]), q=x)
    again = dwindle.prepare(Pair().train(), recipe, inputs=both, data=[both])
    again.load_state_dict(student.state_dict())
    with torch.no_grad():
        expected = student.eval()(**both)
        assert torch.equal(student.finish()(**both), expected)
        assert torch.equal(again.eval()(**both), expected)


def test_an_input_that_was_shared_and_parts_later_has_seen_nothing() -> None:
    x = torch.randn(32, 16)
    student = trained(dwindle.prepare(Pair().train(), static(), inputs={"q": x}), q=x)
    with pytest.raises(CalibrationError, match="seen nothing yet"):
        student.eval()(q=x, k=20 * x)
    with torch.no_grad():
        assert torch.equal(student.finish()(q=x), student(q=x))  # what was refused left nothing behind


def test_another_number_of_calls_is_an_error_and_leaves_no_trace() -> None:
    x = torch.randn(32, 16)
    student = trained(dwindle.prepare(Shared().train(), static(), inputs=x, data=[x]), x=x)
    student.eval()
    small = student.finish()
    for model in (student, small):
        with pytest.raises(CalibrationError, match="not called as often"):
            model(x, again=True)
    with torch.no_grad():
        assert torch.equal(student.finish()(x), small(x))


def test_static_ranges_from_data_resume_where_layers_share_an_input() -> None:
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model.train(), static(), inputs=inputs, data=[inputs])
    student(**inputs)[0].square().mean().backward()
    student.step()
    again = dwindle.prepare(model, static(), inputs=inputs, data=[inputs])
    again.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs)[0], student.eval()(**inputs)[0])


class Auxiliary(nn.Module):
    """A second layer that training alone calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.other(y) if self.training else y + 0 * self.other.bias


def test_a_state_with_ranges_of_another_mode_loads() -> None:
    x = torch.randn(32, 16)
    student = trained(dwindle.prepare(Auxiliary().train(), static(), inputs=x), x=x)
    fresh = dwindle.prepare(Auxiliary().eval(), static(), inputs=x)
    fresh.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), student.eval()(x))


def test_a_weight_that_another_module_reads_is_no_raw_error() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + nn.functional.linear(x, self.b.weight, self.b.bias)

    model, x = Reads(), torch.randn(4, 16)
    with pytest.raises(dwindle.DwindleError, match="does not run with packed weights"):
        dwindle.transplant(dwindle.compress(model, inputs=x), model, inputs=x)
