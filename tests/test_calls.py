"""A weight that is used several times: each of its inputs has a static range of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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


def test_a_call_with_more_inputs_than_were_calibrated_is_an_error() -> None:
    model, x = Shared(), torch.randn(32, 16)
    small = dwindle.compress(model, static(), inputs=x, data=[x])
    with pytest.raises(CalibrationError, match="more inputs"):
        small(x, again=True)


def test_a_module_with_one_range_cannot_take_three() -> None:
    model, x = Shared(), torch.randn(32, 16)
    small = dwindle.compress(model, static(), inputs=x, data=[x])
    with pytest.raises(dwindle.DwindleError, match="several inputs"):
        dwindle.transplant(small, model, inputs=x)
