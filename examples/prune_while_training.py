"""Prune a classifier while it trains: half of its hidden widths go, and the file and the clock follow.

python examples/prune_while_training.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle

STEPS = 300


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Points in 16 dimensions, and which of eight directions each lies nearest to."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    points = torch.randn(count, 64, 16, generator=generator)
    return [(x, (x @ directions.t()).argmax(1)) for x in points]


def accuracy(model: nn.Module) -> float:
    """On points that no training has seen."""
    with torch.no_grad():
        found = [(model(x).argmax(1) == y).float().mean() for x, y in batches(50, seed=2)]
    return float(torch.stack(found).mean())


def main() -> None:
    """Masks rise over the first half of the run; finish() cuts what is masked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 8))
    recipe = {"prune": {"ratio": 0.5, "score": "taylor", "schedule": {"offset": 30, "length": 120, "every": 10}}}
    student = dwindle.prepare(model, recipe, inputs=batches(1, seed=1)[0][0], total_steps=STEPS)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

    student.train()
    for x, y in batches(STEPS, seed=1):
        loss = F.cross_entropy(student(x), y)
        loss.backward()
        optimizer.step()
        for change in student.step(loss):
            print(change)
        optimizer.zero_grad()

    small = student.eval().finish()
    print(small.report())
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    print(f"{counts[0]:,} parameters, {counts[1]:,} left")
    print(f"accuracy {accuracy(student):.3f} with its masks, {accuracy(small):.3f} when they are cut")


if __name__ == "__main__":
    main()
