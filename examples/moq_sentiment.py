"""MoQ on a real task: MiniLM learns whether a film review is kind, while its weights fall from 12 bits to 8.

python examples/moq_sentiment.py [--steps 250] [--schedule adaptive]

250 steps are an epoch, and six minutes on one core: 84 % of the test sentences right, as in floating point. The
default shows how it goes, in one minute. The model and the reviews are fetched once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import dwindle
from dwindle.frontends.sentiment import evaluate_sentiment, load_classifier, sentiment_task

BATCH = 32
SCHEDULES = {
    # One bit less at step 4, 8, 16 and 32; layers would keep their bits longer with `sensitivity` in the recipe.
    "moq": ({"type": "moq", "start_bits": 12, "period": 4}, {"bits": 8, "groups": 8}),
    # Falls where the loss is predicted to grow least, to 4 bits on average and 3 at least.
    "adaptive": (
        {"type": "adaptive", "start_bits": 8, "average_bits": 4, "interval": 2, "share": 0.5},
        {"bits": 3, "group_size": 128},
    ),
}


def main() -> None:
    """Train, finish, test, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--schedule", choices=SCHEDULES, default="moq")
    arguments = parser.parse_args()
    schedule, weight = SCHEDULES[arguments.schedule]
    recipe = {"quantize": [{"weight": weight, "activation": {"range": "dynamic"}}], "schedule": schedule}

    task, model = sentiment_task(), load_classifier()
    order = torch.randperm(len(task.train["labels"]), generator=torch.Generator().manual_seed(0))
    batches = [{name: values[rows] for name, values in task.train.items()} for rows in order.split(BATCH)]
    student = dwindle.prepare(model.train(), recipe, inputs=batches[0])
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=2e-4)
    student.follow(optimizer)

    with student.watch(arguments.steps):  # a line for each drop, and a table on a terminal
        for batch in batches[: arguments.steps]:
            optimizer.zero_grad()
            student.loss(batch).backward()
            optimizer.step()

    small = student.finish()
    print(f"student   {evaluate_sentiment(student)}")
    print(f"finished  {evaluate_sentiment(small)}")
    print(small.report())
    with tempfile.TemporaryDirectory() as folder:
        size = sum(file.stat().st_size for file in small.save(Path(folder) / "small").iterdir())
    print(f"{size:,} bytes on disk, of {sum(p.numel() * 4 for p in model.parameters()):,} in float32")


if __name__ == "__main__":
    main()
