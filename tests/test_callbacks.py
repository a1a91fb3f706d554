"""A student in the loops of other libraries, and in several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import dwindle
from dwindle.frontends.callbacks import ScheduleWarning, TrainerCallback
from dwindle.runtime.qtensor import QTensor

MOQ = {
    "quantize": [{"operators": ["linear", "embedding"], "weight": {"bits": 4}, "activation": {}}],
    "schedule": {"type": "moq", "start_bits": 8, "period": 1},
}
ADAPTIVE = {
    "quantize": [{"weight": {"bits": 2}, "activation": {}}],
    "schedule": {"type": "adaptive", "start_bits": 8, "average_bits": 6, "interval": 2, "share": 0.5, "tolerance": 9},
}


def _model() -> BertForSequenceClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=99,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=32,
            )
        )


def _items(count: int, seed: int = 0) -> list[dict[str, Any]]:
    ids = torch.randint(3, 99, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]


def _batch(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


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
    return Trainer(student, arguments, train_dataset=_items(32), callbacks=[TrainerCallback(student)])


def test_trainer_trains_accumulates_and_predicts_without_labels(tmp_path: Path) -> None:
    student = dwindle.prepare(_model().train(), MOQ, inputs=_batch(_items(2)))
    trainer = _trainer(student, tmp_path, num_train_epochs=2, gradient_accumulation_steps=2, save_strategy="no")
    trainer.train()
    assert student.course.step == 8  # two epochs of eight micro-batches, two a step
    assert {now.bits for now in student.course.weights.values()} == {4}
    assert trainer.state.log_history[-2]["average_bits"] == 4
    rows = [{key: value for key, value in item.items() if key != "labels"} for item in _items(6, seed=1)]
    assert trainer.predict(rows).predictions.shape == (6, 2)
    small = student.finish()
    assert sum(isinstance(value, QTensor) for _, value in small.store.entries()) == len(student.course.weights)
    student.step()  # no longer followed


def test_trainer_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    found = []
    for folder, stop in ((tmp_path / "whole", None), (tmp_path / "cut", 5)):
        student = dwindle.prepare(_model().train(), MOQ, inputs=_batch(_items(2)))
        saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 8}
        trainer = _trainer(student, folder, **saving)
        trainer.train()
        if stop is not None:
            student = dwindle.prepare(_model().train(), MOQ, inputs=_batch(_items(2)))
            _trainer(student, folder, **saving).train(resume_from_checkpoint=str(folder / "checkpoint-5"))
        found.append(student)
    whole, resumed = found
    assert resumed.course.to_json() == whole.course.to_json()
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_schedule_longer_than_the_run_is_warned_of(tmp_path: Path) -> None:
    recipe = MOQ | {"schedule": {"type": "moq", "start_bits": 16, "period": 400}}
    student = dwindle.prepare(_model().train(), recipe, inputs=_batch(_items(2)))
    with pytest.warns(ScheduleWarning, match="ends after 819200 steps and the run after 2"):
        _trainer(student, tmp_path, max_steps=2, save_strategy="no").train()


def _rank(rank: int, world: int, folder: str, recipe: dict[str, Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29591")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    student = dwindle.prepare(_model().train(), recipe, inputs=_batch(_items(2)))
    parallel = DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    student.follow(optimizer)
    drops = []
    for step in range(10):
        torch.manual_seed(1000 * rank + step)
        parallel(**_batch(_items(4, seed=10 * step + rank))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        drops.append({fqn: now.bits for fqn, now in student.course.weights.items()})
    weights = {name: value for name, value in student.state_dict().items() if name != "_extra_state"}
    torch.save({"weights": weights, "drops": drops}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [MOQ, ADAPTIVE], ids=["moq", "adaptive"])
def test_ranks_agree_on_weights_and_bits(recipe: dict[str, Any], tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (2, str(tmp_path), recipe), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["drops"] == two["drops"]
    assert len({tuple(drop.values()) for drop in one["drops"]}) > 1
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name]), name
