"""The student's loss: its task's, its teacher's, and both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import bert_classifier
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.passes.distill import divergence
from dwindle.runtime.errors import DistillationError, RecipeError
from dwindle.runtime.qtensor import QTensor

W3 = {"quantize": [{"weight": {"bits": 3}}]}


@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 8.0))
def test_divergence_is_soft_cross_entropy_less_the_teachers_entropy(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(5, 4, generator=generator, dtype=torch.float64).float() for _ in range(2))
    p, log_q = F.softmax(t / temperature, -1), F.log_softmax(s / temperature, -1)
    expected = ((p * p.log()).sum(-1) - (p * log_q).sum(-1)).mean() * temperature**2
    assert torch.allclose(divergence(s, t, temperature), expected, rtol=1e-4, atol=1e-5)
    assert float(divergence(t, t, temperature)) == pytest.approx(0, abs=1e-5)
    assert float(divergence(s, t, temperature)) >= -1e-5


def test_positions_left_out_count_for_nothing() -> None:
    s, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kept = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.allclose(divergence(s, t, kept=kept), divergence(s[kept], t[kept]))
    assert float(divergence(s, t, kept=torch.zeros(2, 3, dtype=torch.bool))) == 0


def classifier() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("transformers")
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}
    return bert_classifier(heads=2, vocab=50, num_labels=3), batch


def test_task_and_teacher_add_up() -> None:
    model, batch = classifier()
    recipe = {**W3, "distill": {"kd_weight": 3.0, "temperature": 2.0}}
    student = dwindle.prepare(model, recipe, inputs=batch, teacher=model)  # in eval mode: no dropout
    output = student(**batch)
    apart = divergence(output.logits, model(**batch).logits, 2.0)
    assert torch.allclose(student.loss(batch), output.loss + 3.0 * apart)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.allclose(student.loss(unlabelled), 3.0 * apart)
    assert float(apart.detach()) > 0


def test_the_teacher_stays_as_it_is() -> None:
    model, batch = classifier()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = dwindle.prepare(model, W3, inputs=batch, teacher=model)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(2):
        student.loss(batch).backward()
        optimizer.step()
        student.step()
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(student.state_dict()) == set(before)  # the teacher is not saved with it
    assert sum(1 for _ in student.parameters()) == sum(1 for _ in model.parameters())


def test_a_plain_model_learns_what_its_teacher_says() -> None:
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2))
    x = torch.randn(64, 16)
    student = dwindle.prepare(model, W3, inputs=x, teacher=teacher)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    first = float(student.loss(x).detach())
    for _ in range(60):
        optimizer.zero_grad()
        student.loss(x).backward()
        optimizer.step()
        student.step()
    assert float(student.loss((x,)).detach()) < first / 5


def test_an_adaptive_schedule_watches_the_whole_loss() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(64, 16)
    schedule = {"type": "adaptive", "average_bits": 4, "interval": 2, "share": 1.0}
    student = dwindle.prepare(
        model, {"quantize": [{"weight": {"bits": 2}}], "schedule": schedule}, inputs=x, teacher=model
    )
    optimizer, seen = torch.optim.SGD(student.parameters(), 1e-3), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = student.loss(x)
        seen.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        student.step()
    assert student.pacer.controller is not None
    assert student.pacer.controller.losses == seen[2:]  # the first two made a decision
    assert student.pacer.controller.reference is not None
    assert student.pacer.controller.reference[0] == pytest.approx(sum(seen[:2]) / 2)


class Scored(nn.Module):
    """Two layers that give a loss beside their logits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """(B, 4), (B,) int64 -> a scalar and (B, 3)."""
        logits = self.last(torch.tanh(self.inner(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_curvature_is_that_of_the_whole_loss() -> None:
    model, teacher, generator = Scored(0), Scored(1), torch.Generator().manual_seed(2)
    batch = {"x": torch.randn(16, 4, generator=generator), "labels": torch.arange(16) % 3}
    recipe = {
        **W3,
        "schedule": {"type": "moq", "start_bits": 5, "period": 1},
        "sensitivity": {"iterations": 500, "tolerance": 1e-6},
        "distill": {"kd_weight": 3.0, "temperature": 2.0},
    }
    student = dwindle.prepare(model, recipe, inputs=batch, teacher=teacher)
    rounded = {}  # what the student computes with while its curvature is measured
    for fqn in ("inner.weight", "last.weight"):
        scheme = student.course.scheme(fqn)
        assert scheme is not None
        assert scheme.bits == 5
        rounded[fqn] = QTensor.quantize(model.get_parameter(fqn).detach(), scheme).dequantize()
    student.loss(batch).backward()
    student.step()
    assert student.pacer.sensitivity is not None

    taught = F.softmax(teacher(**batch)["logits"].detach() / 2.0, -1)

    def largest(fqn: str, kd_weight: float) -> float:
        """|eigenvalue| of the Hessian in one weight, which autograd writes out in full."""

        def loss(weight: Tensor) -> Tensor:
            held = rounded | {fqn: weight.view_as(rounded[fqn])}
            output = torch.func.functional_call(model, held, kwargs=batch)
            apart = F.kl_div(F.log_softmax(output["logits"] / 2.0, -1), taught, reduction="batchmean")
            return output["loss"] + kd_weight * 2.0**2 * apart

        hessian = torch.autograd.functional.hessian(loss, rounded[fqn].flatten())
        return float(torch.linalg.eigvalsh(hessian).abs().max())

    for fqn in rounded:
        found = student.pacer.sensitivity.blocks[fqn.removesuffix(".weight")].value
        assert found == pytest.approx(largest(fqn, 3.0), rel=1e-3)
        assert largest(fqn, 0.0) < 0.8 * found  # of the task alone it is another one


def test_a_wrapper_may_be_called_in_its_place() -> None:
    model, batch = classifier()
    student = dwindle.prepare(model, W3, inputs=batch, teacher=model)
    calls = []

    def wrapped(**given: Any) -> Any:
        calls.append(sorted(given))
        return student(**given)

    assert torch.equal(student.loss(batch, model=wrapped), student.loss(batch))
    assert calls == [sorted(batch)]


def test_errors_say_what_is_missing() -> None:
    model, batch = classifier()
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    student = dwindle.prepare(model, W3, inputs=batch)
    with pytest.raises(DistillationError, match="labels in the batch"):
        student.loss(unlabelled)
    wider, _ = classifier()
    wider.classifier = nn.Linear(32, 5)
    with pytest.raises(DistillationError, match="the same labels"):
        dwindle.prepare(model, W3, inputs=batch, teacher=wider)
    with pytest.raises(DistillationError, match="logits of shape"):
        dwindle.prepare(model, W3, inputs=unlabelled, teacher=wider)
    with pytest.raises(RecipeError, match="temperature"):
        dwindle.Recipe.of({**W3, "distill": {"temperature": 0}})
    with pytest.raises(RecipeError, match="did you mean 'kd_weight'"):
        dwindle.Recipe.of({**W3, "distill": {"kd_wieght": 1}})
