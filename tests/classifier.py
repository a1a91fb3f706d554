"""A tiny classifier, and its training in several processes: imported by name in each of them."""

from __future__ import annotations

from typing import Any

import torch
from models import bert_classifier
from torch.nn.parallel import DistributedDataParallel

import dwindle

MOQ = {
    "quantize": [{"operators": ["linear", "embedding"], "weight": {"bits": 4}, "activation": {}}],
    "schedule": {"type": "moq", "start_bits": 8, "period": 1},
}
ADAPTIVE = {
    "quantize": [{"weight": {"bits": 2}, "activation": {}}],
    "schedule": {"type": "adaptive", "start_bits": 8, "average_bits": 6, "interval": 2, "share": 0.5, "tolerance": 9},
}


def classifier() -> Any:
    return bert_classifier(max_position_embeddings=32)


def items(count: int, seed: int = 0) -> list[dict[str, Any]]:
    ids = torch.randint(3, 99, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]


def batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([torch.as_tensor(item[key]) for item in rows]) for key in rows[0]}


def train_rank(rank: int, world: int, folder: str, recipe: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"  # a file of this test's own; a port might be taken
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    student = dwindle.prepare(classifier().train(), recipe, inputs=batch(items(2)))
    parallel = DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    student.follow(optimizer)
    drops = []
    for step in range(10):
        torch.manual_seed(1000 * rank + step)
        parallel(**batch(items(4, seed=10 * step + rank))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        drops.append({fqn: now.bits for fqn, now in student.course.weights.items()})
    weights = {name: value for name, value in student.state_dict().items() if name != "_extra_state"}
    torch.save({"weights": weights, "drops": drops}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
