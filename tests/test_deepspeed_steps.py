"""Optimizer steps move the schedule of a model in place: each once, none that was not taken, and no model is kept."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import classifier, items
from deepspeed_configs import JSON, engine, falling, static
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import dwindle
from dwindle.deepspeed import init_compression, redundancy_clean
from dwindle.frontends.deepspeed.inplace import require_steering


def _tiny() -> tuple[nn.Module, JSON]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return model, engine(weight_quantization=falling(8, 4, 1, ("0", "2")))


def test_an_optimizer_counts_if_it_holds_the_model_and_once_a_round() -> None:
    model, config = _tiny()
    init_compression(model, config)
    course = require_steering(model).course
    one, two = (torch.optim.SGD(model[i].parameters(), 0.1) for i in (0, 2))
    foreign = torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1)
    for _ in range(3):
        model(torch.ones(2, 16)).sum().backward()
        one.step()
        two.step()
        foreign.step()
    assert course.step == 3
    torch.optim.SGD(model[0].parameters(), 0.1).step()  # in place of the first
    assert course.step == 4
    for _ in range(5):  # alone: the first of these steps belongs to the round of the one before
        two.step()
    assert course.step == 8
    redundancy_clean(model, config)
    two.step()
    assert course.step == 8


def test_an_optimizer_that_wraps_another_does_not_count_twice() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    model, config = _tiny()
    init_compression(model, config)
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(3):
        optimizer.step()
    assert require_steering(model).course.step == 3


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_are_not_taken_do_not_count(fused: bool) -> None:
    model, config = _tiny()
    init_compression(model, config)
    student = dwindle.prepare(_tiny()[0], config, inputs=torch.ones(2, 16))
    for m, course in ((model, require_steering(model).course), (student, student.course)):
        optimizer = torch.optim.SGD(m.parameters(), 1e-2, fused=fused)
        if m is student:
            student.follow(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for step in range(3):
            scaler.scale(m(torch.ones(2, 16)).sum()).backward()
            if step == 1:
                next(m.parameters()).grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert course.step == 2


def test_a_model_that_is_dropped_is_freed_and_its_hook_gone() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    model, config = _tiny()
    gc.collect()
    before = len(hooks)
    init_compression(model, config)
    assert len(hooks) == before + 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert len(hooks) == before


class _Checkpointed(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        for block in self:
            input = checkpoint(block, input, use_reentrant=False)
        return input


def test_a_checkpointed_block_observes_each_batch_once() -> None:
    config = engine(
        weight_quantization=falling(8, 8, 0, ("0", "2")), activation_quantization=static(modules=("0", "2"))
    )
    states = []
    for kind in (nn.Sequential, _Checkpointed):
        model = kind(*_tiny()[0])
        init_compression(model, config)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for step in range(3):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_transformers_trainer_needs_nothing_more_and_resumes(tmp_path: Path) -> None:
    found = []
    for folder, resumes in ((tmp_path / "whole", False), (tmp_path / "cut", True)):
        config = engine(weight_quantization=falling(8, 4, 1, ("query", "dense")))
        model = init_compression(classifier().train(), config)
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=8,
            save_steps=5,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
        )
        trainer = Trainer(model, arguments, train_dataset=items(32))
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5") if resumes else None)
        found.append(model)
    assert [require_steering(model).course.step for model in found] == [8, 8]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in found), strict=True))
    redundancy_clean(found[0], config)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once() -> None:
    torch._dynamo.reset()
    model, config = _tiny()
    init_compression(model.train(), config)
    before = counters["stats"]["unique_graphs"]
    compiled, optimizer = torch.compile(model, fullgraph=True), torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(9):
        compiled(torch.ones(2, 16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert require_steering(model).course.average_bits() == 4
    assert counters["stats"]["unique_graphs"] - before == 1
    torch._dynamo.reset()
