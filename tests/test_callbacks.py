"""A student in the loops of other libraries, and in several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import ADAPTIVE, MOQ, batch, classifier, items, train_rank
from models import ZOO
from torch import multiprocessing
from transformers import Trainer, TrainingArguments

import dwindle
from dwindle.frontends.callbacks import TrainerCallback
from dwindle.frontends.watch import ScheduleWarning
from dwindle.runtime.qtensor import QTensor


def _trainer(student: Any, folder: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        seed=3,
        **more,
    )
    return Trainer(student, arguments, train_dataset=items(32), callbacks=[TrainerCallback(student)])


def test_trainer_trains_accumulates_and_predicts_without_labels(tmp_path: Path) -> None:
    student = dwindle.prepare(classifier().train(), MOQ, inputs=batch(items(2)))
    trainer = _trainer(student, tmp_path, num_train_epochs=2, gradient_accumulation_steps=2, save_strategy="no")
    trainer.train()
    assert student.course.step == 8  # two epochs of eight micro-batches, two a step
    assert {now.bits for now in student.course.weights.values()} == {4}
    assert trainer.state.log_history[-2]["average_bits"] == 4
    rows = [{key: value for key, value in item.items() if key != "labels"} for item in items(6, seed=1)]
    assert trainer.predict(rows).predictions.shape == (6, 2)
    small = student.finish()
    assert sum(isinstance(value, QTensor) for _, value in small.store.entries()) == len(student.course.weights)
    student.step()  # no longer followed


PRUNE = {
    "prune": {
        "ratio": 0.5,
        "scopes": ["heads", "rows"],
        "modules": "*.encoder.*",
        "score": "taylor",
        "schedule": {"offset": 1, "length": 6, "every": 2},
    },
    "sparsify": {"ratio": 0.5, "score": "movement", "modules": "classifier", "schedule": {"length": 6}},
}


@pytest.mark.parametrize("recipe", [MOQ, PRUNE], ids=["moq", "prune"])
def test_trainer_resumes_from_its_own_checkpoint(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "cut", 5)):
        student = dwindle.prepare(classifier().train(), recipe, inputs=batch(items(2)))
        saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 8}
        trainer = _trainer(student, folder, **saving)
        trainer.train()
        if stop is not None:
            student = dwindle.prepare(classifier().train(), recipe, inputs=batch(items(2)))
            _trainer(student, folder, **saving).train(resume_from_checkpoint=str(folder / "checkpoint-5"))
        found.append(student)
    whole, resumed = found
    assert resumed.course.to_json() == whole.course.to_json()
    assert resumed.pacer.pruning.to_json() == whole.pacer.pruning.to_json()
    assert trainer.state.log_history[-2].get("kept") == (0.5 if "prune" in recipe else None)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trainer_saves_and_resumes_a_model_with_tied_weights(tmp_path: Path) -> None:
    rows = [{"input_ids": item["input_ids"], "labels": item["input_ids"]} for item in items(32)]
    found = []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        model, _ = ZOO["gpt2"]()
        inputs = {name: torch.stack([row[name] for row in rows[:2]]) for name in rows[0]}
        student = dwindle.prepare(model.train(), MOQ, inputs=inputs)
        trainer = _trainer(student, tmp_path, save_strategy="steps", save_steps=5, max_steps=8)
        trainer.train_dataset = rows
        trainer.train(resume_from_checkpoint=resume)
        found.append(student)
    assert found[0].course.to_json() == found[1].course.to_json()
    for (name, a), b in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    trainer.save_model(str(tmp_path / "last"))


def test_a_schedule_longer_than_the_run_is_warned_of(tmp_path: Path) -> None:
    recipe = MOQ | {"schedule": {"type": "moq", "start_bits": 16, "period": 400}}
    student = dwindle.prepare(classifier().train(), recipe, inputs=batch(items(2)))
    with pytest.warns(ScheduleWarning, match="reaches 4 bits after 819200 steps and the run ends after 2"):
        _trainer(student, tmp_path, max_steps=2, save_strategy="no").train()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [MOQ, ADAPTIVE], ids=["moq", "adaptive"])
def test_ranks_agree_on_weights_and_bits(recipe: dict[str, Any], tmp_path: Path) -> None:
    multiprocessing.spawn(train_rank, (2, str(tmp_path), recipe), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["drops"] == two["drops"]
    assert len({tuple(drop.values()) for drop in one["drops"]}) > 1
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name]), name
