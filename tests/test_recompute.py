"""Activation checkpointing of a student: the same numbers, less kept, whoever asked for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import MOQ, batch, classifier, items
from models import ZOO, first
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import dwindle
from dwindle.frontends.callbacks import TrainerCallback
from dwindle.runtime.errors import CaptureError

STATIC = {"quantize": [{"operators": ["linear", "conv2d"], "activation": {"range": "static"}}]}


class Plain(nn.Module):
    """Calls checkpoint in its forward; batch norm and dropout are what a second run could get wrong."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
            self.norm = nn.ModuleList([nn.BatchNorm1d(16) for _ in range(3)])
            self.head = nn.Linear(16, 3)

    def block(self, i: int, x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.dropout(self.norm[i](self.layer[i](x)), 0.2, self.training))
        return h * torch.sigmoid(h)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            if self.reentrant is None:
                x = self.block(i, x)
            else:
                x = checkpoint(self.block, i, x, use_reentrant=self.reentrant)
        return self.head(x)


def plain_batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(1))}


def step(student: Any, call: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], int]:
    """(output, gradients, bytes kept for the backward pass outside recomputed parts)."""
    student.zero_grad()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    if len(student.variants) == 1:  # captured for training first, outside the hooks
        with torch.no_grad(), next(iter(student.variants.values())).unwritten():
            torch.manual_seed(5)
            student(**call)
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = student(**call)
    output = first(output)
    output.float().square().mean().backward()
    return (
        output.detach(),
        {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None},
        sum(kept.values()),
    )


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(a, two[name]) for name, a in one.items())


def buffers(student: Any) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in student.named_buffers()}


@pytest.mark.parametrize("recipe", [{}, MOQ, STATIC], ids=["empty", "moq", "static"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_models_own_checkpoints_are_kept(reentrant: bool, recipe: dict[str, Any]) -> None:
    call = plain_batch()
    whole, checked = (dwindle.prepare(Plain(r).train(), recipe, inputs=call) for r in (None, reentrant))
    for _ in range(2):
        expected, found = step(whole, call), step(checked, call)
        assert torch.equal(found[0], expected[0])
        assert same(found[1], expected[1])
        assert len(found[1]) == 14  # every parameter: a reentrant checkpoint's too
        assert found[2] < expected[2] / 2
        assert same(buffers(checked), buffers(whole))  # statistics and ranges moved once


@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers_checkpoints_are_kept(reentrant: bool) -> None:
    students = []
    for enabled in (False, True):
        model = classifier().train()
        if enabled:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        students.append(dwindle.prepare(model, MOQ, inputs=batch(items(2))))
    expected, found = (step(student, batch(items(4))) for student in students)
    assert torch.equal(found[0], expected[0])
    assert same(found[1], expected[1])
    assert found[2] < expected[2] / 2


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["bert", "t5", "resnet", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "llama", "vit"))]
)
def test_a_student_checkpoints_its_blocks(name: str) -> None:
    model, inputs = ZOO[name]()
    student = dwindle.prepare(model.train(), MOQ, inputs=inputs)
    expected = step(student, inputs)
    before = buffers(student)
    student.activation_checkpointing_enable()
    found = step(student, inputs)
    assert found[2] < 0.7 * expected[2]
    if name != "resnet":  # whose statistics have moved
        assert torch.equal(found[0], expected[0])
        assert same(found[1], expected[1])
        assert same(buffers(student), before)
    student.activation_checkpointing_enable(every_n_layers=2)
    assert found[2] < step(student, inputs)[2] < expected[2]
    student.activation_checkpointing_disable()
    assert step(student, inputs)[2] == expected[2]


def test_the_trainers_argument_checkpoints_and_trains_the_same(tmp_path: Path) -> None:
    losses = []
    for enabled in (False, True):
        student = dwindle.prepare(classifier().train(), MOQ, inputs=batch(items(2)))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            max_steps=8,
            activation_checkpointing=enabled,
        )
        trainer = Trainer(student, arguments, train_dataset=items(32), callbacks=[TrainerCallback(student)])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert student.is_activation_checkpointing is enabled
        assert len(student.finish().plan) > 0
    assert losses[0] == losses[1]


def test_curvature_is_measured_through_checkpoints() -> None:
    found = []
    for enabled in (False, True):
        student = dwindle.prepare(classifier().train(), MOQ, inputs=batch(items(2)))
        if enabled:
            student.activation_checkpointing_enable()
        loss = lambda student=student: student(**batch(items(4))).loss  # noqa: E731
        found.append(student.pacer.measure(loss))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_checkpointed_student_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    call = batch(items(4))
    student = dwindle.prepare(classifier().train(), MOQ, inputs=batch(items(2)))
    student.activation_checkpointing_enable()
    expected = step(student, call)
    before = counters["stats"]["unique_graphs"]
    torch.manual_seed(5)
    output = torch.compile(student, fullgraph=True, backend="aot_eager")(**call)
    student.zero_grad()
    output[0].square().mean().backward()
    assert counters["stats"]["unique_graphs"] - before == 1
    assert torch.allclose(output[0], expected[0])
    torch._dynamo.reset()


def test_what_cannot_be_checkpointed_is_told() -> None:
    model = nn.Linear(4, 4).train()
    with pytest.raises(CaptureError, match="nothing to checkpoint"):
        dwindle.prepare(model, {}, inputs=torch.randn(2, 4)).gradient_checkpointing_enable()
    student = dwindle.prepare(classifier().train(), MOQ, inputs=batch(items(2)))
    with pytest.raises(CaptureError, match="found: offload"):
        student.activation_checkpointing_enable(offload=True)
    assert not student.is_activation_checkpointing

    class Selective(Plain):
        def forward(self, x: Tensor) -> Tensor:
            contexts = lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts([])  # noqa: E731
            return checkpoint(self.block, 0, x, use_reentrant=False, context_fn=contexts)

    with pytest.raises(CaptureError, match="selective"):
        dwindle.prepare(Selective(None).train(), {}, inputs=plain_batch())

    model = classifier().train()
    model.activation_checkpointing_enable(offload=True)
    student = dwindle.prepare(model, MOQ, inputs=batch(items(2)))
    with pytest.raises(CaptureError, match="saves in its own way"):
        student(**batch(items(2)))
