"""What a teacher is worth: MiniLM with half its layers, and with weights of two bits and of one; GlassLM with one less.

    python benchmarks/distillation.py depth [--seeds 0 1 2] [--runs ...] [--again]
    python benchmarks/distillation.py depth-sweep --seeds 0
    python benchmarks/distillation.py xtc
    python benchmarks/distillation.py xtc-sweep --seeds 0
    python benchmarks/distillation.py language

depth     6 -> 3 layers of the trained sentiment classifier, then trained on: by its labels alone, or by its
          teacher's answers and what the teacher holds within (one stage). Sweep: other mixtures, half the budget
xtc       all linear layers and embeddings but the classifier in 2 bits (ternary) or 1, activations in 8 a token,
          positions in 8: the float classifier is teacher and start. Sweep: stages, twice the budget, no teacher
language  GlassLM trained on Austen, one layer fewer

The float model of a seed is `training.py`'s, and the teacher of its seed. Every run of a table and seed sees the
same batches in the same order, as long as it lasts. What is measured is the finished model. Differences to float are
paired: an item's score is its mean over the seeds, and the 95 % bootstrap interval is over items. Runs are kept one by
one, so a table that was stopped goes on where it was; CPU seconds are those of training, with the teacher's forward.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import timing  # before torch
from quantised_training import TASKS, Task, against
from results import Point, Results
from rich.console import Console
from rich.table import Table
from torch import nn
from training import BATCH, LANGUAGE, SENTIMENT, train

import dwindle

WITHIN = {"task": 0.0, "hidden": 1.0, "scores": 1.0}


def extreme(bits: int) -> list[Mapping[str, Any]]:
    """XTC's weights: what is trained in `bits`, what is small in 8, the classifier in floating point."""
    weight = {"bits": bits, "kind": "ternary" if bits == 2 else "binary"}
    return [
        {"weight": weight, "activation": {"bits": 8}},
        {"operators": ["embedding"], "weight": {"bits": 8}},
        {"operators": ["embedding"], "modules": "*.word_embeddings", "weight": weight},
        {"modules": "classifier", "weight": None},
    ]


@dataclass(frozen=True)
class Run:
    """One training from the float classifier. steps, lr: as `training.train` takes them."""

    name: str
    recipe: Mapping[str, Any]
    steps: int
    lr: float
    taught: bool = True


HALF = {"depth": {"keep": 3}}
GREEDY = {"depth": {"keep_layers": [2, 3, 5]}}  # `rank_layers(..., by="greedy")` on the float model of seed 0
FEWER = {"depth": {"keep": 3}}  # of 4

TABLES: dict[str, tuple[Run, ...]] = {
    "depth": (
        Run("3 layers, labels alone", HALF, 500, 4e-4, taught=False),
        Run("3 layers, one stage", {**HALF, "distill": WITHIN}, 500, 4e-4),
    ),
    "depth-sweep": (
        Run("3 layers, labels alone, float's learning rate", HALF, 500, 2e-4, taught=False),
        Run("3 layers, answers and labels", {**HALF, "distill": {}}, 500, 4e-4),
        Run("3 layers, one stage and labels", {**HALF, "distill": {**WITHIN, "task": 1.0}}, 500, 4e-4),
        Run("3 layers, one stage, half the budget", {**HALF, "distill": WITHIN}, 250, 4e-4),
        Run("3 layers, one stage, those that greedy keeps", {**GREEDY, "distill": WITHIN}, 500, 4e-4),
    ),
    "language": (
        Run("one layer fewer, as it is", FEWER, 0, 1e-3, taught=False),
        Run("all layers, text alone", {}, 200, 1e-3, taught=False),
        Run("one layer fewer, text alone", FEWER, 200, 1e-3, taught=False),
        Run("one layer fewer, logits and text", {**FEWER, "distill": {"temperature": 2.0}}, 200, 1e-3),
        Run("one layer fewer, one stage and text", {**FEWER, "distill": {**WITHIN, "task": 1.0}}, 200, 1e-3),
    ),
    "xtc": (
        Run("2 bits, one stage", {"quantize": extreme(2), "distill": WITHIN}, 500, 3e-4),
        Run("1 bit, one stage", {"quantize": extreme(1), "distill": WITHIN}, 500, 3e-4),
    ),
    "xtc-sweep": (
        Run("1 bit, two stages", {"quantize": extreme(1), "distill": {**WITHIN, "stages": 2}}, 500, 3e-4),
        Run("1 bit, three stages", {"quantize": extreme(1), "distill": {**WITHIN, "stages": 3}}, 500, 3e-4),
        Run("1 bit, one stage, twice the budget", {"quantize": extreme(1), "distill": WITHIN}, 1000, 3e-4),
        Run("1 bit, labels alone", {"quantize": extreme(1)}, 500, 3e-4, taught=False),
    ),
}


TASK = {name: "language" if name == "language" else "sentiment" for name in TABLES}


@functools.cache
def task_of(name: str) -> Task:
    """Loaded once, when first asked for."""
    return TASKS[name]()


@functools.lru_cache(maxsize=1)
def float_model(name: str, seed: int) -> tuple[nn.Module, Point]:
    """The float model of a task and seed, and what it is worth."""
    task = task_of(name)
    model = task.load(seed)
    started = time.process_time()
    train(model, task.batches(seed), **task.settings, seed=seed)
    seconds = time.process_time() - started
    return model, {**task.evaluate(model), "training CPU s": seconds}


def float_point(name: str, seed: int) -> Point:
    """What its students are compared with."""
    return float_model(name, seed)[1]


def trained(run: Run, name: str, seed: int) -> Point:
    """One training from it."""
    task, (teacher, _) = task_of(name), float_model(name, seed)
    teacher.requires_grad_(True)  # embeddings too: where they are quantised they have to move
    student = dwindle.prepare(
        teacher,
        {**run.recipe, "seed": seed},
        inputs=next(task.batches(seed)),
        teacher=teacher if run.taught else None,
        total_steps=max(run.steps, 1),
    )
    started = time.process_time()
    train(
        student,
        task.batches(seed + 100),
        steps=run.steps,
        lr=run.lr,
        seed=seed,
        loss_of=student.loss,
        after_step=lambda step, loss: student.step(loss),
    )
    seconds = time.process_time() - started
    small = student.eval().finish()
    size = sum(b.numel() * b.element_size() for b in small.state_dict().values())
    return {**task.evaluate(small), "training CPU s": seconds, "bytes": size}


def main() -> None:
    """Train what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", help="these besides float, all where absent")
    parser.add_argument("--again", action="store_true", help="measure what is already there as well")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    timing.one_thread()
    results, console = Results("distillation", again=arguments.again), Console(width=120)
    runs = [run for run in TABLES[arguments.table] if not arguments.runs or run.name in arguments.runs]
    points: dict[str, list[Point]] = {"float": [], **{run.name: [] for run in runs}}
    name = TASK[arguments.table]
    settings, measured = (LANGUAGE, "perplexity") if name == "language" else (SENTIMENT, "accuracy")
    for seed in arguments.seeds:
        common = {"task": name, "seed": seed, "batch": BATCH, **settings}
        with Console(stderr=True).status(f"Training float, seed {seed}"):
            measure = functools.partial(float_point, name, seed)
            points["float"].append(results.point({**common, "run": "float"}, measure))
        for run in runs:
            configuration = {**common, "run": run.name, "recipe": run.recipe, "steps": run.steps, "lr": run.lr}
            with Console(stderr=True).status(f"Training {run.name}, seed {seed}"):
                points[run.name].append(results.point(configuration, functools.partial(trained, run, name, seed)))
    table = Table(title=f"{arguments.table}, seeds {arguments.seeds}", title_justify="left")
    unit = "%" if name == "language" else "points"
    for heading in ("run", measured, f"less float's, {unit}", "training CPU s", "MB"):
        table.add_column(heading, justify="right")
    for run_name, own in points.items():
        less = "" if run_name == "float" else against(own, points["float"], name)
        value, seconds = (np.mean([p[key] for p in own]) for key in (measured, "training CPU s"))
        size = f"{own[0]['bytes'] / 1e6:.2f}" if "bytes" in own[0] else ""
        table.add_row(run_name, f"{value:.4f}", less, f"{seconds:.0f}", size)
    console.print(table)


if __name__ == "__main__":
    main()
