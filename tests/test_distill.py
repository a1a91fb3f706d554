"""The student's loss: its task's, its teacher's, and both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.passes.distill import divergence
from dwindle.runtime.errors import DistillationError, RecipeError

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
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, num_labels=3
    )
    ids = torch.randint(0, 50, (4, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}
    return transformers.BertForSequenceClassification(config), batch


def test_task_and_teacher_add_up() -> None:
    model, batch = classifier()
    recipe = {**W3, "distill": {"kd_weight": 3.0, "temperature": 2.0}}
    student = dwindle.prepare(model.eval(), recipe, inputs=batch, teacher=model)  # in eval mode: no dropout
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


def test_curvature_is_that_of_the_whole_loss() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(16, 8)
    recipe = {**W3, "schedule": {"type": "moq", "start_bits": 5, "period": 2}, "sensitivity": {"iterations": 5}}
    student = dwindle.prepare(model, recipe, inputs=x, teacher=model)
    for _ in range(2):
        student.loss(x).backward()
        student.step()
    assert student.pacer.sensitivity is not None


def test_a_wrapper_may_be_called_in_its_place() -> None:
    model, batch = classifier()
    student = dwindle.prepare(model.eval(), W3, inputs=batch, teacher=model)
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
