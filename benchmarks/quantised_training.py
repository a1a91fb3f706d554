"""What training with quantisation costs in quality: flat, on MoQ's schedules, adaptive, and rounding afterwards.

    python benchmarks/quantised_training.py sentiment-w8 [--seeds 0 1 2] [--runs float flat] [--again]

Every run of a table has the data, the order, the steps and the learning rates of the float one of the same seed
(`training.py`); what is measured is the finished model, integers and all. Differences to float are paired: mean over
the seeds and items, and the 95 % bootstrap interval over items, each with its mean over seeds. Runs are kept one by
one, so a table that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import timing  # before torch
from language import evaluate_language, load_austen, load_glass
from results import Point, Results
from torch import Tensor, nn
from training import BATCH, LANGUAGE, SENTIMENT, random_windows, shuffled, train

import dwindle
from dwindle.frontends.sentiment import evaluate_sentiment, load_classifier, sentiment_task

TOKENWISE = {"bits": 8, "range": "dynamic"}


def w8(schedule: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Every linear layer with 8 bits in 8 groups, and activations of 8 bits a token."""
    return _linears({"bits": 8, "groups": 8}, schedule, **more)


def grouped(bits: int, schedule: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Every linear layer with `bits` bits and one scale a group of 128 inputs, and activations of 8 bits a token.

    Two bits are ternary: uniform ones would be as well, with a scale that leaves most weights zero.
    """
    kind = "ternary" if bits == 2 else "symmetric"
    return _linears({"bits": bits, "kind": kind, "group_size": 128}, schedule, **more)


def _linears(weight: Mapping[str, Any], schedule: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    entry = {"operators": ["linear"], "weight": weight, "activation": TOKENWISE}
    return {"quantize": [entry], **({"schedule": schedule} if schedule else {}), **more}


def w4_language(schedule: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Weights of 4 bits in groups of 32, the shared embedding among them; activations stay in floating point."""
    entry = {"operators": ["linear", "embedding"], "weight": {"bits": 4, "group_size": 32}}
    odd = {"modules": "*.down_proj", "weight": {"bits": 4, "group_size": 31}}  # of 341 inputs
    return {"quantize": [entry, odd], **({"schedule": schedule} if schedule else {})}


@dataclass(frozen=True)
class Run:
    """A row: what is simulated while training (None: nothing), and what is done to the model after it."""

    name: str
    recipe: Mapping[str, Any] | None = None
    afterwards: Mapping[str, Any] | None = None


MOQ = {"type": "moq", "start_bits": 12, "period": 8}  # drops at 8, 16, 32 and 64 steps
# Factors of 4 and 5 leave two drops in a run of 250 steps: at 12 and 12 * 2 * factor.
MOQ_CURVED = {"type": "moq", "start_bits": 10, "period": 12}
ONCE = {"method": "eigenvalue", "every": 1000, "iterations": 20}


def adaptive(bits: float) -> dict[str, Any]:
    """From 8 bits to `bits` on average, a quarter of the layers at once, after the learning rate has risen."""
    return {"type": "adaptive", "start_bits": 8, "average_bits": bits, "offset": 25, "interval": 4, "share": 0.25}


@dataclass(frozen=True)
class Table_:
    """Runs that are compared, the float one first."""

    task: str
    runs: tuple[Run, ...]


TABLES: dict[str, Table_] = {
    "sentiment-w8": Table_(
        "sentiment",
        (
            Run("float"),
            Run("flat", w8()),
            Run("moq", w8(MOQ)),
            Run("moq, eigenvalues", w8(MOQ_CURVED, sensitivity=ONCE)),
        ),
    ),
    "sentiment-low": Table_(
        "sentiment",
        (
            Run("float"),
            Run("w4 rounded afterwards", None, grouped(4)),
            Run("w4 flat", grouped(4)),
            Run("w4 adaptive", grouped(3, adaptive(4.0))),
            Run("w3 flat", grouped(3)),
            Run("w3 adaptive", grouped(2, adaptive(3.0))),
        ),
    ),
    "language": Table_(
        "language",
        (
            Run("float"),
            Run("w4 rounded afterwards", None, w4_language()),
            Run("w4 flat", w4_language()),
            Run("w4 moq", w4_language({"type": "moq", "start_bits": 8, "period": 8})),
        ),
    ),
}


@dataclass(frozen=True)
class Task:
    """A model, its batches in the order of a seed, and what is measured of it."""

    load: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[dict[str, Tensor]]]
    evaluate: Callable[[Callable[..., Any]], Point]
    settings: Mapping[str, Any]


@functools.cache
def sentiment() -> Task:
    """MiniLM's sentences; an item's score is 1 where its sign is right."""
    task = sentiment_task()

    def evaluate(model: Callable[..., Any]) -> Point:
        found = evaluate_sentiment(model)
        scores = "".join(str(int(right)) for right in found.correct)
        signs = "".join(map(str, found.predictions))
        return {"accuracy": found.accuracy, "correlation": found.correlation, "scores": scores, "signs": signs}

    return Task(
        lambda s: load_classifier(seed=s, quiet=True), lambda s: shuffled(task.train, seed=s), evaluate, SENTIMENT
    )


@functools.cache
def language() -> Task:
    """GlassLM's windows; an item's score is its loss."""
    _, tokenizer = load_glass(quiet=True)
    novels, test = load_austen(tokenizer, quiet=True)

    def evaluate(model: Callable[..., Any]) -> Point:
        found = evaluate_language(model, test)
        return {"perplexity": found.perplexity, "scores": [round(loss, 6) for loss in found.losses]}

    return Task(lambda s: load_glass(quiet=True)[0], lambda s: random_windows(novels, seed=s), evaluate, LANGUAGE)


TASKS: dict[str, Callable[[], Task]] = {"sentiment": sentiment, "language": language}


def measured(task: Task, run: Run, seed: int) -> Point:
    """Train, finish, evaluate."""
    model, batches = task.load(seed), task.batches(seed)
    first = next(task.batches(seed))
    started = time.process_time()
    if run.recipe is None:
        train(model, batches, **task.settings, seed=seed)
        trained = time.process_time()
        point = (
            task.evaluate(model)
            if run.afterwards is None
            else _finished(
                task,
                dwindle.compress(
                    model,
                    run.afterwards,
                    inputs={"input_ids": first["input_ids"]}
                    if "attention_mask" not in first
                    else {k: first[k] for k in ("input_ids", "attention_mask")},
                ),
            )
        )
        return {**point, "training CPU s": trained - started}
    student = dwindle.prepare(model, run.recipe, inputs=first)
    drops: list[Any] = []
    losses = train(
        student,
        batches,
        **task.settings,
        seed=seed,
        after_step=lambda step, loss: drops.extend((d.step, d.fqn, d.after) for d in student.step()),
    )
    trained = time.process_time()
    small = student.finish(early=student.pacer.controller is not None)
    found = task.evaluate(student)
    point = _finished(task, small)
    if "signs" in point:
        same = sum(a == b for a, b in zip(found["signs"], point["signs"], strict=True))
        point["agrees with the student"] = same / len(point["signs"])
    point["average bits"] = student.course.average_bits()
    point["steps of drops"] = sorted({step for step, *_ in drops})
    point["bits"] = {name: now.bits for name, now in student.course.weights.items()}
    if student.pacer.sensitivity is not None:
        found_curvature = student.pacer.sensitivity
        point["factors"] = found_curvature.factors()
        point["curvature"] = {"products": found_curvature.products, "seconds": found_curvature.seconds}
    point["last losses"] = float(np.mean(losses[-25:]))
    return {**point, "training CPU s": trained - started}


def _finished(task: Task, small: dwindle.Compressed) -> Point:
    certificate = small.certificate
    ratio = certificate.bytes_after / certificate.bytes_before
    return {**task.evaluate(small), "bytes": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--runs", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="measure what is already there as well")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    timing.one_thread()
    table = TABLES[arguments.table]
    task = TASKS[table.task]()
    results = Results("quantised_training", again=arguments.again)
    for seed in arguments.seeds:
        for run in table.runs:
            if arguments.runs and run.name not in arguments.runs:
                continue
            configuration = {
                "task": table.task,
                "run": run.name,
                "seed": seed,
                "batch": BATCH,
                **task.settings,
                "recipe": run.recipe,
                "afterwards": run.afterwards,
            }
            point = results.point(configuration, functools.partial(measured, task, run, seed))
            print(run.name, seed, {k: v for k, v in point.items() if k not in ("scores", "signs", "bits")}, flush=True)


if __name__ == "__main__":
    main()
