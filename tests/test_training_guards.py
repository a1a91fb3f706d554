"""What training refuses, and what it bears: other recipes' states, budgets out of reach, batches of NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwindle
from dwindle.deepspeed import init_compression, redundancy_clean
from dwindle.runtime.errors import RecipeError, ScheduleError

JSON = dict[str, Any]
MOQ: JSON = {"type": "moq", "start_bits": 8, "period": 1}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))


def recipe(
    weight: JSON | None = None, activation: JSON | None = None, schedule: JSON | None = None, **more: Any
) -> JSON:
    entry = {"weight": weight or {"bits": 4}} | ({"activation": activation} if activation else {})
    return {"quantize": [entry], **({"schedule": schedule} if schedule else {}), **more}


def prepared(*args: Any, **more: Any) -> Any:
    return dwindle.prepare(model(), recipe(*args, **more), inputs=X).train()


def train(student: Any, steps: int) -> None:
    optimizer = torch.optim.SGD(student.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = student(X).square().mean()
        loss.backward()
        optimizer.step()
        student.step(loss)


@pytest.mark.parametrize(
    "other",
    [
        recipe({"bits": 6}, None, MOQ),
        recipe({"bits": 4, "kind": "asymmetric"}, None, MOQ),
        recipe({"bits": 4, "group_size": 16}, None, MOQ),
        recipe({"bits": 4}, None, {**MOQ, "period": 2}),
        recipe({"bits": 4}, None, {**MOQ, "start_bits": 9}),
        recipe({"bits": 4}, None, {"type": "linear", "start_bits": 8, "length": 4}),
        recipe({"bits": 4}, None, MOQ, seed=1),
        recipe({"bits": 4}, {"range": "dynamic"}, MOQ),
    ],
)
def test_a_state_of_another_recipe_is_refused(other: JSON) -> None:
    student = prepared({"bits": 4}, None, MOQ)
    train(student, 3)
    state = student.state_dict()
    again = dwindle.prepare(model(), other, inputs=X)
    with pytest.raises(ScheduleError, match="another"):
        again.load_state_dict(state)
    same = prepared({"bits": 4}, None, MOQ)
    same.load_state_dict(state)
    assert same.course.step == 3


def test_a_torn_state_is_refused_by_name() -> None:
    student = prepared({"bits": 4}, None, MOQ)
    state = student.state_dict()
    text = bytes(state["_extra_state"].tolist()).decode().replace('"measured_at"', '"measured"')
    state["_extra_state"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with pytest.raises(ScheduleError, match="cannot be read"):
        student.load_state_dict(state)


def test_the_model_alone_may_be_loaded() -> None:
    """Its schedule begins anew; ranges that were seen stay."""
    for args in (({"bits": 4}, None, MOQ), ({"bits": 4}, {"range": "static"}), ({"bits": 4, "learned": True},)):
        student = prepared(*args)
        student(X)
        trained = model()
        nn.init.ones_(trained[2].weight)  # type: ignore[index, arg-type]
        student.load_state_dict(trained.state_dict())
        assert torch.equal(student.get_parameter("2.weight"), torch.ones(16, 64))
        assert bool(student.eval()(X).isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_no_trace_in_a_range(bad: float) -> None:
    student = prepared({"bits": 8}, {"range": "static"})
    student(torch.full((2, 32), bad))  # the first of all
    student(X)
    seen = student.eval()(X)
    student.train()(torch.full((2, 32), bad))
    assert torch.equal(student.eval()(X), seen)
    assert bool(seen.isfinite().all())
    eager = model()
    aq = {"enabled": True, "range_calibration": "static", "schedule_offset": 0}
    groups = {"a": {"params": {"bits": 8}, "modules": ["0", "2"]}}
    section = {"shared_parameters": aq, "different_groups": groups}
    init_compression(eager.train(), {"compression_training": {"activation_quantization": section}})
    for x in (torch.full((2, 32), bad), X, torch.full((2, 32), bad)):
        eager(x)
    assert bool(eager(X).isfinite().all())


def test_an_activation_that_comes_too_late_is_told_before() -> None:
    with pytest.raises(ScheduleError, match=r"(?s)8 bits after at most 5 steps.*input of 0.weight"):
        dwindle.prepare(model(), recipe({"bits": 4}, {"offset": 1000}), inputs=X, total_steps=5)
    late = {"type": "adaptive", "average_bits": 5, "offset": 50}
    with pytest.raises(ScheduleError, match="does not end within the run"):
        dwindle.prepare(model(), recipe({"bits": 4}, None, late), inputs=X, total_steps=5)


def test_a_student_at_its_target_is_not_late() -> None:
    student = prepared({"bits": 4}, None, MOQ)
    train(student, 12)
    assert not student.course.unsettled()
    assert not student.forecast(5).late


@pytest.mark.parametrize("budget", [{"average_bits": 2}, {"target_bytes": 10}])
def test_a_budget_out_of_reach_is_refused(budget: JSON) -> None:
    with pytest.raises(RecipeError, match="cannot meet its budget"):
        prepared({"bits": 4}, None, {"type": "adaptive", **budget})


def test_a_budget_that_is_not_met_is_no_end() -> None:
    student = prepared({"bits": 3}, None, {"type": "adaptive", "average_bits": 3, "interval": 2, "tolerance": 100})
    train(student, 4)
    with pytest.raises(ScheduleError, match="not met its budget"):
        student.finish()
    assert student.finish(early=True).certificate.simulated == 0
    train(student, 40)
    student.finish()


def test_a_frozen_weight_falls_last() -> None:
    frozen = model()
    frozen[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    schedule = {"type": "adaptive", "average_bits": 5, "interval": 2, "share": 0.1, "tolerance": 100}
    student = dwindle.prepare(frozen, recipe({"bits": 2}, None, schedule), inputs=X).train()
    train(student, 6)
    assert student.course.weights["2.weight"].bits < 8
    assert student.course.weights["0.weight"].bits == 8


def test_a_step_is_counted_once() -> None:
    student = prepared({"bits": 4}, None, MOQ)
    optimizer = torch.optim.SGD(student.parameters(), 1e-2)
    stop = student.follow(optimizer)
    with pytest.raises(ScheduleError, match="follows an optimizer already"):
        student.follow(optimizer)
    stop()
    student.follow(optimizer)
    student(X).sum().backward()
    optimizer.step()
    assert student.course.step == 1


def test_without_repeated_blocks_every_module_is_one() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x).tanh())
            return y

    student = dwindle.prepare(Named(), recipe({"bits": 4}, None, MOQ, sensitivity={}), inputs=X)
    assert student.pacer.blocks == {"first": ["first.weight"], "second": ["second.weight"]}


def test_learned_scales_train_as_they_will_run() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(257, 512), nn.ReLU(), nn.Linear(512, 300))
    x = torch.randn(8, 257)
    student = dwindle.prepare(wide, recipe({"bits": 4, "learned": True}, {"range": "dynamic"}), inputs=x).train()
    optimizer = torch.optim.SGD(student.parameters(), 1e-2)
    for _ in range(3):
        student(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(student.eval().finish()(x), student(x))


def test_an_image_without_a_batch_in_place() -> None:
    torch.manual_seed(0)
    conv, x = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)), torch.randn(16, 9, 9)
    groups = {"a": {"params": {"bits": 8}, "modules": ["0"]}}
    aq = {"shared_parameters": {"enabled": True, "schedule_offset": 0}, "different_groups": groups}
    config = {"compression_training": {"activation_quantization": aq}}
    init_compression(conv.train(), config)
    with torch.no_grad():
        expected = conv(x)
        redundancy_clean(conv, config)
        assert torch.allclose(conv(x), expected, atol=1e-5)
        assert torch.equal(conv(x[None])[0], conv(x))


def test_a_certificate_counts_the_model_alone() -> None:
    student = prepared({"bits": 4}, {"range": "static"})
    student(X)
    certificate = student.finish().certificate
    assert not any("_qmax" in layer.name or "_mix" in layer.name for layer in certificate.layers)
    assert certificate.bytes_before == sum(p.numel() * 4 for p in model().parameters())
