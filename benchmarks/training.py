"""Training in floating point: the loop that the training benchmarks share, and the two baselines they start from.

    python benchmarks/training.py [--tasks sentiment language] [--seeds 0 1 2] [--again]

Sentiment: MiniLM with a new head, embeddings frozen, one epoch of 250 steps of 32 sentences of 48 tokens, tested on
2,072 others. Language: GlassLM, trained on Carroll, 200 steps of 32 windows of 128 tokens from five novels of Austen,
tested on the sixth. A seed decides the new head, the order of the batches and dropout; the tests are always the same.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import timing  # before torch
import torch
from language import WINDOW, evaluate_language, load_austen, load_glass
from results import Results, command_line
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dwindle.frontends.sentiment import evaluate_sentiment, load_classifier, sentiment_task
from dwindle.runtime.errors import CalibrationError

BATCH = 32
WEIGHT_DECAY = 0.01


# Arguments of `train`
SENTIMENT: dict[str, Any] = {"steps": 250, "lr": 2e-4, "warmup": 0.1, "clip": 1.0}  # one epoch of 8,000
LANGUAGE: dict[str, Any] = {"steps": 200, "lr": 1.5e-3, "warmup": 0.3, "clip": 1.0}


def train(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    lr: float,
    warmup: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
    loss_of: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Minimise `model(**batch).loss`, or `loss_of(batch)`, over the first `steps` batches with AdamW; return losses.

    The learning rate rises linearly to `lr` over the share `warmup` of the steps, then falls linearly to zero;
    gradients are scaled to a norm of at most `clip`. Parameters that require no gradient stay. seed: torch's own,
    which decides dropout; the order is that of `batches`. after_step(step, loss) is called with 1, 2, .., after the
    update. The model is in train mode during the steps and in its former mode after them. Raises CalibrationError
    when the batches run out or a loss is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    rise = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    torch.manual_seed(seed)
    training, losses = model.training, []
    model.train()
    try:
        for _, batch in zip(range(steps), batches, strict=False):
            loss = model(**batch).loss if loss_of is None else loss_of(batch)
            losses.append(float(loss.detach()))
            if not torch.isfinite(loss):
                raise CalibrationError("the loss is not finite", found=f"{losses[-1]} at step {len(losses)}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            schedule.step()
            if after_step is not None:
                after_step(len(losses), losses[-1])
    finally:
        model.train(training)
    if len(losses) != steps:
        raise CalibrationError("the batches ran out", required=f"{steps} batches", found=len(losses))
    return losses


def shuffled(data: Mapping[str, Tensor], *, seed: int, size: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` rows without end, each epoch in another order; what fills no batch is left out of it.

    data: tensors (N, ...), N >= size.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(next(iter(data.values())))
    if rows < size:
        raise CalibrationError("too few rows for a batch", required=size, found=rows)
    while True:
        order = torch.randperm(rows, generator=generator)
        for chosen in torch.split(order[: rows // size * size], size):
            yield {name: values[chosen] for name, values in data.items()}


def random_windows(
    tokens: Tensor, *, seed: int, size: int = BATCH, length: int = WINDOW
) -> Iterator[dict[str, Tensor]]:
    """Batches (size, length) without end, of windows that start anywhere in `tokens` (N,); labels are the inputs."""
    generator = torch.Generator().manual_seed(seed)
    every = tokens.unfold(0, length, 1)  # (N - length + 1, length), a view
    while True:
        ids = every[torch.randint(len(every), (size,), generator=generator)]
        yield {"input_ids": ids, "labels": ids}


def sentiment_baseline(seed: int) -> dict[str, Any]:
    """Accuracy and correlation of a float classifier, and what it cost."""
    task, model = sentiment_task(), load_classifier(seed=seed, quiet=True)
    started = time.process_time()
    train(model, shuffled(task.train, seed=seed), **SENTIMENT, seed=seed)
    trained = time.process_time()
    result = evaluate_sentiment(model)
    return {"accuracy": result.accuracy, "correlation": result.correlation, **_seconds(started, trained)}


def language_baseline(seed: int) -> dict[str, Any]:
    """Perplexity of a float language model before and after training, and what it cost."""
    model, tokenizer = load_glass(quiet=True)
    novels, test = load_austen(tokenizer, quiet=True)
    before = evaluate_language(model, test).perplexity
    started = time.process_time()
    train(model, random_windows(novels, seed=seed), **LANGUAGE, seed=seed)
    trained = time.process_time()
    after = evaluate_language(model, test).perplexity
    return {"perplexity before": before, "perplexity": after, **_seconds(started, trained)}


def _seconds(started: float, trained: float) -> dict[str, float]:
    return {"training CPU s": trained - started, "evaluation CPU s": time.process_time() - trained}


TASKS: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, Any]]] = {
    "sentiment": (sentiment_baseline, SENTIMENT),
    "language": (language_baseline, LANGUAGE),
}


def main() -> None:
    """Measure the baselines that are not there yet, and print all."""
    parser = command_line(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    results, console = Results("training", again=arguments.again), Console(width=110)
    for name in arguments.tasks:
        baseline, schedule = TASKS[name]
        table = Table(title=f"{name}, float: {schedule}", title_justify="left")
        for seed in arguments.seeds:
            configuration = {"task": name, "seed": seed, "batch": BATCH, **schedule}
            with Console(stderr=True).status(f"Training {name}, seed {seed}"):
                point = results.point(configuration, functools.partial(baseline, seed))
            if not table.columns:
                for heading in ("seed", *point):
                    table.add_column(heading, justify="right")
            table.add_row(str(seed), *(f"{v:.1f}" if v > 10 else f"{v:.4f}" for v in point.values()))
        console.print(table)


if __name__ == "__main__":
    main()
