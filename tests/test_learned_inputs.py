"""Activations whose scale is trained (LSQ): begun from data, one an input, finished as static ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import ZOO
from torch import Tensor, nn

import dwindle
from dwindle.runtime.errors import CalibrationError, RecipeError
from dwindle.runtime.ops.catalog import OPS
from dwindle.runtime.ops.training import FAKE_QUANTIZE_LEARNED
from dwindle.runtime.plan import input_scale_name
from dwindle.runtime.scheme import Scheme

assert OPS  # importing the catalogue registers the operators

A4 = Scheme(bits=4, granularity="tensor")
QMAX, FLOAT_SHARE = torch.tensor(7, dtype=torch.int32), torch.tensor(0.0)


def recipe(bits: int = 4) -> dict[str, Any]:
    return {"quantize": [{"weight": {"bits": bits, "learned": True}, "activation": {"bits": bits, "range": "learned"}}]}


def test_the_gradient_of_a_scale_is_that_of_the_paper() -> None:
    """Esser et al. 2020, eq. 3: round(x/s) - x/s inside, +-Q outside, times 1 / sqrt(N Q), N of one example."""
    torch.manual_seed(0)
    x, scale = torch.randn(6, 5, 8, requires_grad=True), torch.tensor(0.13, requires_grad=True)
    g = torch.randn(6, 5, 8)
    (FAKE_QUANTIZE_LEARNED.overload(x, scale, QMAX, FLOAT_SHARE, True, A4.spell()) * g).sum().backward()
    ratio = (x / scale).detach()
    inside = ratio.abs() < 7
    by_element = torch.where(inside, ratio.round() - ratio, 7 * ratio.sign())
    expected = (by_element * g).sum() / math.sqrt(5 * 8 * 7)
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float(expected), rel=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(inside, g, 0.0))


def trained(student: dwindle.Student, inputs: Any, steps: int = 4) -> None:
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        student(**inputs)[0].square().mean().backward()
        optimizer.step()
        student.step()


def test_scales_are_trained_and_finished_as_they_are() -> None:
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model.train(), recipe(), inputs=inputs, data=[inputs])
    steps = {name: p.detach().clone() for name, p in student.named_parameters() if name.endswith("_input_step")}
    assert len(steps) == 2 * 4 + 1  # Q, K and V share one
    trained(student, inputs)
    after = dict(student.named_parameters())
    moved = {name for name, before in steps.items() if not torch.equal(after[name], before)}
    assert moved == {name for name in steps if not name.startswith("pooler")}  # which the loss does not depend on
    small = student.finish()
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(small.store.get(input_scale_name(name)), after[f"{name}_input_step"].detach())
    student.eval()
    with torch.no_grad():
        assert torch.equal(small(**inputs)[0], student(**inputs)[0])


def test_a_resumed_run_has_the_scales() -> None:
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model.train(), recipe(), inputs=inputs, data=[inputs])
    trained(student, inputs)
    again = dwindle.prepare(model, recipe(), inputs=inputs, data=[inputs])
    again.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs)[0], student.eval()(**inputs)[0])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(50 * self.layer(x)),)


def test_each_input_of_a_shared_weight_has_a_scale() -> None:
    x = torch.randn(16, 8)
    student = dwindle.prepare(Twice().train(), recipe(8), inputs={"x": x}, data=[{"x": x}])
    trained(student, {"x": x})
    small = student.finish()
    one, two = (small.store.get(input_scale_name("layer.weight", call)) for call in range(2))
    assert float(two) > 5 * float(one)
    with torch.no_grad():
        assert torch.equal(small(x)[0], student.eval()(x)[0])


def test_without_training_it_is_static() -> None:
    model, inputs = ZOO["bert"]()
    plans = []
    for kind in ("learned", "static"):
        given = {"quantize": [{"activation": {"range": kind}}]}
        plans.append(dwindle.compress(model, given, inputs=inputs, data=[inputs]).plan)
    assert plans[0] == plans[1]


def test_it_begins_from_data_and_is_symmetric() -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(CalibrationError, match="nothing to begin from"):
        dwindle.prepare(model, recipe(), inputs=inputs)
    odd = {"quantize": [{"activation": {"range": "learned", "kind": "asymmetric"}}]}
    with pytest.raises(RecipeError, match="symmetric"):
        dwindle.compress(model, odd, inputs=inputs)
