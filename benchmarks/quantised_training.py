"""What training with quantisation costs in quality: flat, on MoQ's schedule, adaptive, and rounding afterwards.

    python benchmarks/quantised_training.py sentiment-w8 [--seeds 0 1 2] [--runs flat moq] [--quick] [--again]

Every run of a table has the data, the order, the steps and the learning rates of the float one of the same seed
(`training.py`); what is measured is the finished model, integers and all. Differences to float are paired: an item's
score is its mean over the seeds, and the 95 % bootstrap interval is over items. Runs are kept one by one, so a table
that was stopped goes on where it was. --quick: 30 steps, which shows that it runs.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timing  # before torch
from language import evaluate_language, load_austen, load_glass
from results import Point, Results, command_line
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import BATCH, LANGUAGE, SENTIMENT, random_windows, shuffled, train

import dwindle
from dwindle.frontends.retrieval import paired_difference
from dwindle.frontends.sentiment import evaluate_sentiment, load_classifier, sentiment_task

Recipe = Mapping[str, Any]
QUICK = 30  # steps


def linears(weight: Recipe, schedule: Recipe | None = None, **more: Any) -> Recipe:
    """Every linear layer, with activations of 8 bits a token."""
    activation = {"bits": 8, "range": "dynamic"}
    entry = {"operators": ["linear"], "weight": weight, "activation": activation}
    return {"quantize": [entry], **({"schedule": schedule} if schedule else {}), **more}


def grouped(bits: int) -> Recipe:
    """Weights of `bits` bits, one scale a group of 128 inputs; two bits are ternary, where uniform ones lose most."""
    return {"bits": bits, "kind": "ternary" if bits == 2 else "symmetric", "group_size": 128}


def adaptive(bits: float) -> Recipe:
    """From 8 bits to `bits` on average, a quarter of the layers at once, when the learning rate has risen."""
    return {"type": "adaptive", "start_bits": 8, "average_bits": bits, "offset": 25, "interval": 4, "share": 0.25}


def language_w4(schedule: Recipe | None = None) -> Recipe:
    """Weights of 4 bits in groups of 32, the shared embedding among them; activations stay in floating point."""
    entry = {"operators": ["linear", "embedding"], "weight": {"bits": 4, "group_size": 32}}
    odd = {"modules": "*.down_proj", "weight": {"bits": 4, "group_size": 31}}  # of 341 inputs
    return {"quantize": [entry, odd], **({"schedule": schedule} if schedule else {})}


W8 = {"bits": 8, "groups": 8}
MOQ = {"type": "moq", "start_bits": 12, "period": 8}  # drops at 8, 16, 32 and 64 steps
# A factor of 5 leaves room for two drops in 250 steps: at 12 and 12 * 2 * 5.
MOQ_CURVED = {"type": "moq", "start_bits": 10, "period": 12}
ONCE = {"method": "eigenvalue", "every": 1000, "iterations": 20}


@dataclass(frozen=True)
class Run:
    """One training. recipe: what is simulated in it, None for nothing; afterwards: recipes for its result, by name."""

    name: str
    recipe: Recipe | None = None
    afterwards: Mapping[str, Recipe] = field(default_factory=dict)


FLOAT = {
    "sentiment": Run("float", None, {"w8 rounded": linears(W8), "w4 rounded": linears(grouped(4))}),
    "language": Run("float", None, {"w4 rounded": language_w4()}),
}

# By table: the task, and its runs besides the float one.
TABLES: dict[str, tuple[str, tuple[Run, ...]]] = {
    "sentiment-w8": (
        "sentiment",
        (
            Run("w8 flat", linears(W8)),
            Run("w8 moq", linears(W8, MOQ)),
            Run("w8 moq, eigenvalues", linears(W8, MOQ_CURVED, sensitivity=ONCE)),
        ),
    ),
    "sentiment-low": (
        "sentiment",
        (
            Run("w4 flat", linears(grouped(4))),
            Run("w4 adaptive", linears(grouped(3), adaptive(4.0))),
            Run("w3 flat", linears(grouped(3))),
            Run("w3 adaptive", linears(grouped(2), adaptive(3.0))),
        ),
    ),
    "language": (
        "language",
        (
            Run("w4 flat", language_w4()),
            Run("w4 moq", language_w4({"type": "moq", "start_bits": 8, "period": 8})),
        ),
    ),
}


@dataclass(frozen=True)
class Task:
    """A model, its batches in the order of a seed, and what is measured of it: per-item `scores` among it."""

    load: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[dict[str, Tensor]]]
    evaluate: Callable[[Callable[..., Any]], Point]
    settings: Mapping[str, Any]


def sentiment() -> Task:
    """MiniLM's sentences; an item's score is 1 where its sign is right."""
    task = sentiment_task()

    def evaluate(model: Callable[..., Any]) -> Point:
        found = evaluate_sentiment(model)
        scores, signs = ("".join(str(int(v)) for v in values) for values in (found.correct, found.predictions))
        return {"accuracy": found.accuracy, "correlation": found.correlation, "scores": scores, "signs": signs}

    def load(seed: int) -> nn.Module:
        return load_classifier(seed=seed, quiet=True)

    return Task(load, lambda seed: shuffled(task.train, seed=seed), evaluate, SENTIMENT)


def language() -> Task:
    """GlassLM's windows; an item's score is its loss."""
    _, tokenizer = load_glass(quiet=True)
    novels, test = load_austen(tokenizer, quiet=True)

    def evaluate(model: Callable[..., Any]) -> Point:
        found = evaluate_language(model, test)
        return {"perplexity": found.perplexity, "scores": [round(loss, 6) for loss in found.losses]}

    def load(seed: int) -> nn.Module:
        model: nn.Module = load_glass(quiet=True)[0]
        return model

    return Task(load, lambda seed: random_windows(novels, seed=seed), evaluate, LANGUAGE)


TASKS: dict[str, Callable[[], Task]] = {"sentiment": sentiment, "language": language}


def measure(task: Task, run: Run, seed: int) -> Point:
    """Train, finish, evaluate."""
    model, example = task.load(seed), next(task.batches(seed))
    unlabelled = {name: value for name, value in example.items() if name != "labels"}
    started = time.process_time()
    if run.recipe is None:
        train(model, task.batches(seed), **task.settings, seed=seed)
        point = {"training CPU s": time.process_time() - started, **task.evaluate(model)}
        for name, recipe in run.afterwards.items():
            point[name] = finished(task, dwindle.compress(model, recipe, inputs=unlabelled))
        return point
    student = dwindle.prepare(model, run.recipe, inputs=example)
    losses = train(student, task.batches(seed), **task.settings, seed=seed, after_step=lambda *_: student.step())
    point = {"training CPU s": time.process_time() - started, "last losses": float(np.mean(losses[-25:]))}
    small = student.finish()
    point |= finished(task, small)
    if "signs" in point:
        trained = task.evaluate(student)["signs"]
        same = sum(a == b for a, b in zip(trained, point["signs"], strict=True))
        point["agrees with the student"] = same / len(trained)
    point["bits"] = {name: now.bits for name, now in student.course.weights.items()}
    point["average bits"] = student.course.average_bits()
    if student.pacer.sensitivity is not None:
        point["curvature"] = student.pacer.summary()["curvature"]
    return point


def finished(task: Task, small: dwindle.Compressed) -> Point:
    """What a compressed model scores, and its bytes over the float model's."""
    certificate = small.certificate
    return {**task.evaluate(small), "bytes": certificate.bytes_after / certificate.bytes_before}


def against(points: Sequence[Point], others: Sequence[Point], task: str) -> str:
    """The paired difference to other runs, with its interval: of accuracy in points, of perplexity in per cent."""
    sides = (points, others[: len(points)])
    a, b = (np.mean([[float(s) for s in point["scores"]] for point in side], axis=0) for side in sides)
    mean, ends = paired_difference(a.tolist(), b.tolist())
    shown = [100 * (math.exp(v) - 1 if task == "language" else v) for v in (mean, *ends)]
    return f"{shown[0]:+.2f} ({shown[1]:+.2f} to {shown[2]:+.2f})"


def show(name: str, rows: Mapping[str, Sequence[Point]], console: Console) -> None:
    """Each run's figures for every seed, and its difference to float and to flat training with as many bits."""
    task = TABLES[name][0]
    measured, unit = ("perplexity", "%") if task == "language" else ("accuracy", "points")
    table = Table(title=name, title_justify="left")
    for heading in ("run", measured, f"less float's, {unit}", "less flat's"):
        table.add_column(heading)
    for heading in ("correlation", "bytes", "bits", "agrees", "CPU s"):
        table.add_column(heading)

    def each(points: Sequence[Point], key: str, form: str) -> str:
        return " ".join(format(point[key], form) for point in points if key in point)

    for run, points in rows.items():
        flat = f"{run.split()[0]} flat"
        apart = ["" if run == "float" else against(points, rows["float"], task)]
        apart.append(against(points, rows[flat], task) if flat in rows and run != flat else "")
        forms = {"correlation": ".4f", "bytes": ".3f", "average bits": ".2f", "agrees with the student": ".4f"}
        cells = [each(points[: None if key == "correlation" else 1], key, form) for key, form in forms.items()]
        spent = each(points, "training CPU s", ".0f")
        table.add_row(run, each(points, measured, ".4f"), *apart, *cells, spent)
    console.print(table)


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = command_line(__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--runs", nargs="+", help="names of runs, besides float; all of the table's where absent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} steps")
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    name, runs = TABLES[arguments.table]
    settings = SENTIMENT if name == "sentiment" else LANGUAGE
    if arguments.quick:
        settings["steps"] = QUICK
    task = functools.cache(TASKS[name])  # loaded only if something is measured
    results, console = Results("quantised_training", again=arguments.again), Console(width=150)
    rows: dict[str, list[Point]] = {}
    for run in (FLOAT[name], *(r for r in runs if not arguments.runs or r.name in arguments.runs)):
        for seed in arguments.seeds:
            configuration = {"task": name, "run": run.name, "seed": seed, "batch": BATCH, **settings}
            configuration |= {"recipe": run.recipe, "afterwards": run.afterwards}
            with Console(stderr=True).status(f"{run.name}, seed {seed}"):
                point = results.point(configuration, lambda run=run, seed=seed: measure(task(), run, seed))
            rows.setdefault(run.name, []).append(point)
            for after in run.afterwards:
                rows.setdefault(after, []).append(point[after])
    show(arguments.table, rows, console)


if __name__ == "__main__":
    main()
