"""The same training from a DeepSpeed configuration as it is, with DeepSpeed's own entry points.

python examples/deepspeed_moq.py [--steps 250]

What was `from deepspeed.compression.compress import init_compression, redundancy_clean` is now an import from
`dwindle.deepspeed`; the engine is gone, and any loop with a torch optimizer moves the schedule.
`dwindle migrate examples/ds_config_moq.json` says what becomes of each key.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dwindle.deepspeed import init_compression, redundancy_clean
from dwindle.frontends.sentiment import evaluate_sentiment, load_classifier, sentiment_task

CONFIG = Path(__file__).with_name("ds_config_moq.json")
BATCH = 32


def main() -> None:
    """Train in place, clean in place, test before and after."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    task, model = sentiment_task(), load_classifier().train()
    order = torch.randperm(len(task.train["labels"]), generator=torch.Generator().manual_seed(0))

    model = init_compression(model, CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for rows in order.split(BATCH)[: arguments.steps]:
        loss = model(**{name: values[rows] for name, values in task.train.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    before, size = evaluate_sentiment(model), _size(model)
    model = redundancy_clean(model, CONFIG).eval()
    print(f"trained  {before}, {size:,} bytes")
    print(f"cleaned  {evaluate_sentiment(model)}, {_size(model):,} bytes")


def _size(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


if __name__ == "__main__":
    main()
