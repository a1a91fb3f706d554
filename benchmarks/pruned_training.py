"""What pruning costs in quality when a model trains on with its masks, finished and sliced.

    python benchmarks/pruned_training.py sentiment [--seeds 0 1 2] [--runs l2 movement] [--again]
    python benchmarks/pruned_training.py fashion

sentiment   MiniLM with a new head, 250 steps (`training.py`); 40 % of all heads and FFN rows go on the way
fashion     ResNet-20 trained on Fashion-MNIST (`fashion.py`), then trained once more for as many steps: as it is, or
            with half of all channels going on the way

Every run of a table has the data, the order and the learning rates of the float one of its seed. What is measured is
the finished model. Differences to float are paired: an item's score is its mean over the seeds, and the 95 % bootstrap
interval is over items. `apart` is the largest difference between the outputs of the student in eval mode and those of
the sliced model, relative to their size.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import timing  # before torch
import torch
from fashion import EPOCHS, TRAIN, load_fashion, make_resnet, right, train_fashion
from results import Point, Results, command_line
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import BATCH, SENTIMENT, shuffled, train

import dwindle
from dwindle.frontends.retrieval import paired_difference
from dwindle.frontends.sentiment import evaluate_sentiment, load_classifier, sentiment_task

Rule = Mapping[str, Any]

HALF = {"ratio": 0.5, "scopes": ["channels", "hidden"], "schedule": {"length": 468, "every": 12}}
HEADS_AND_ROWS = {"ratio": 0.4, "scopes": ["heads", "rows"], "modules": "*.encoder.*"}
EARLY = {"offset": 20, "length": 80, "every": 5}

# By task: its runs besides the float one.
RUNS: dict[str, dict[str, Rule]] = {
    "sentiment": {
        "l2": {**HEADS_AND_ROWS, "schedule": EARLY},
        "taylor": {**HEADS_AND_ROWS, "score": "taylor", "schedule": EARLY},
        "movement": {**HEADS_AND_ROWS, "score": "movement", "schedule": EARLY},
    },
    "fashion": {"l2": HALF, "taylor": {**HALF, "score": "taylor"}},
}


def sentiment(rule: Rule | None, seed: int) -> Point:
    """One training, from the packaged MiniLM."""
    task, model = sentiment_task(), load_classifier(seed=seed, quiet=True)
    batches = shuffled(task.train, seed=seed)
    if rule is None:
        started = time.process_time()
        train(model, batches, **SENTIMENT, seed=seed)
        return _sentiment_point(model, time.process_time() - started)
    example = {name: value for name, value in next(shuffled(task.train, seed=seed)).items() if name != "labels"}
    student = dwindle.prepare(model, {"prune": rule}, inputs=example, total_steps=SENTIMENT["steps"])
    started = time.process_time()
    train(student, batches, **SENTIMENT, seed=seed, after_step=lambda step, loss: student.step(loss))
    seconds = time.process_time() - started
    small = student.eval().finish()
    with torch.no_grad():
        apart = _apart(student(**example).logits, small(**example).logits)
    return {**_sentiment_point(small, seconds), "apart": apart, **_left(model, small)}


def _sentiment_point(model: Callable[..., Any], seconds: float) -> Point:
    found = evaluate_sentiment(model)
    scores = "".join(str(int(value)) for value in found.correct)
    return {"accuracy": found.accuracy, "scores": scores, "training CPU s": seconds}


def fashion(rule: Rule | None, seed: int) -> Point:
    """One training after another; the first is the same for all runs of a seed."""
    train_set, test_set = load_fashion(quiet=True)
    model = make_resnet(seed)
    train_fashion(model, train_set, seed=seed)
    first = float(right(model, test_set).float().mean())
    trained: nn.Module = model
    if rule is None:
        started = time.process_time()
        train_fashion(model, train_set, seed=seed + 100)
        more: Point = {"training CPU s": time.process_time() - started}
    else:
        student = dwindle.prepare(model, {"prune": rule}, inputs=train_set.images[:5])
        started = time.process_time()
        train_fashion(student, train_set, seed=seed + 100, after_step=lambda step, loss: student.step(loss))
        seconds = time.process_time() - started
        trained = student.finish()
        with torch.no_grad():
            apart = _apart(student(test_set.images[:500]), trained(test_set.images[:500]))
        more = {"training CPU s": seconds, "apart": apart, **_left(model, trained)}
    found = right(trained, test_set)
    scores = "".join(str(int(value)) for value in found)
    return {"accuracy": float(found.float().mean()), "accuracy before": first, "scores": scores, **more}


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _left(model: nn.Module, small: nn.Module) -> Point:
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    return {"parameters": counts[0], "parameters left": counts[0] / counts[1]}


TASKS: dict[str, tuple[Callable[[Rule | None, int], Point], Mapping[str, Any]]] = {
    "sentiment": (sentiment, {"batch": BATCH, **SENTIMENT}),
    "fashion": (fashion, {"epochs": EPOCHS, "images": TRAIN}),
}


def mean_scores(points: Sequence[Point]) -> list[float]:
    """(items,): the mean over seeds."""
    scores: list[float] = np.mean([[int(c) for c in point["scores"]] for point in points], axis=0).tolist()
    return scores


def main() -> None:
    """Train what is not there yet, and print the task's table."""
    parser = command_line(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", help="these besides float, all where absent")
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    results, console = Results("pruned_training", again=arguments.again), Console(width=120)
    measure, settings = TASKS[arguments.task]
    wanted = arguments.runs or list(RUNS[arguments.task])
    runs: dict[str, Rule | None] = {"float": None, **{name: RUNS[arguments.task][name] for name in wanted}}
    points: dict[str, list[Point]] = {name: [] for name in runs}
    for seed in arguments.seeds:
        for name, rule in runs.items():
            configuration = {"task": arguments.task, "run": name, "seed": seed, "rule": rule, **settings}
            with Console(stderr=True).status(f"Training {arguments.task}, {name}, seed {seed}"):
                points[name].append(results.point(configuration, functools.partial(measure, rule, seed)))
    table = Table(title=f"{arguments.task}, seeds {arguments.seeds}: {settings}", title_justify="left")
    for heading in ("run", "accuracy", "less float's, points", "parameters left", "apart"):
        table.add_column(heading, justify="right")
    plain = mean_scores(points["float"])
    for name, own in points.items():
        mean, (low, high) = paired_difference(mean_scores(own), plain)
        less = "" if name == "float" else f"{100 * mean:+.2f} ({100 * low:+.2f}..{100 * high:+.2f})"
        left = f"{own[0]['parameters left']:.2f}" if "parameters left" in own[0] else ""
        apart = f"{max(p['apart'] for p in own):.1e}" if "apart" in own[0] else ""
        table.add_row(name, f"{np.mean([p['accuracy'] for p in own]):.4f}", less, left, apart)
    console.print(table)


if __name__ == "__main__":
    main()
