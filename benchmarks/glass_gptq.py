"""What rounding to 4 and 3 bits costs a language model: to nearest, by AWQ, by GPTQ, and trained for it.

    python benchmarks/glass_gptq.py [--seeds 0 1 2] [--runs "w4 gptq"] [--again]

GlassLM is fine-tuned on five novels of Austen as `training.py` does it (seed: the order of its batches) and then
compressed; perplexity is on *Persuasion*. Weights of all linear layers have groups of 32 (the down projection, of 341
inputs, of 31); the shared embedding is rounded to nearest in every run, to as many bits or, where it says so, to 8 by
row: else its error, which no method of these touches, hides what they differ by. GPTQ and AWQ see windows from the five
novels.
Training with 4 bits has the steps, batches and learning rates of the float run, so its cost is beside that of the
calibration. Differences to float are paired, window by window. Runs are kept one by one.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import timing  # before torch
from distillation import float_model, float_point, task_of
from quantised_training import against, finished
from results import Point, Results
from rich.console import Console
from rich.table import Table
from training import BATCH, LANGUAGE, train

import dwindle

LANGUAGE_TASK = "language"
CALIBRATION = 16  # batches of 32 windows of 128 tokens
CALIBRATION_SEED = 1000  # other windows than those of training

Recipe = Mapping[str, Any]


def groups(bits: int, method: str, *, embedding: int | None = None) -> Recipe:
    """Weights of all linear layers; the embedding, which the head shares, in as many bits, or by row in `embedding`."""
    linear = {"weight": {"bits": bits, "group_size": 32, "method": method}}
    odd = {"modules": "*.down_proj", "weight": {"bits": bits, "group_size": 31, "method": method}}
    rows = {"bits": bits, "group_size": 32} if embedding is None else {"bits": embedding}
    # A weight that two rules choose has the scheme with more bits.
    return {"quantize": [linear, odd, {"operators": "embedding", "weight": rows}]}


def w8a8(activation: Recipe) -> Recipe:
    """ZeroQuant's weights, and activations as said; the embedding by row."""
    rows = {"operators": "embedding", "weight": {"bits": 8}}
    return {"quantize": [{"weight": {"bits": 8}, "activation": activation}, rows]}


METHODS = ("nearest", "awq", "gptq")
RUNS: dict[str, Recipe] = {
    "w8a8 zeroquant": w8a8({"range": "dynamic"}),
    "w8a8 static": w8a8({"range": "static"}),
    "w8a8 static, smooth": w8a8({"range": "static", "smooth": 0.5}),
    **{f"w{bits} {method}": groups(bits, method) for bits in (4, 3) for method in METHODS},
    **{f"w{bits} {method}, embedding w8": groups(bits, method, embedding=8) for bits in (4, 3) for method in METHODS},
}
TRAINED = {"w4 trained": groups(4, "nearest"), "w3 trained": groups(3, "nearest")}


def rounded(seed: int, recipe: Recipe) -> Point:
    """Compressed after training; CPU seconds are those of `compress` alone."""
    model, _ = float_model(LANGUAGE_TASK, seed)
    windows = task_of(LANGUAGE_TASK).batches(CALIBRATION_SEED + seed)
    data = [{"input_ids": batch["input_ids"]} for batch in itertools.islice(windows, CALIBRATION)]
    started = time.process_time()
    small = dwindle.compress(model, recipe, inputs=data[0], data=data)
    spent = time.process_time() - started
    errors = {entry.where: entry.reason for entry in small.log if entry.stage in ("round", "equalize")}
    return {**finished(task_of(LANGUAGE_TASK), small), "CPU s": spent, "layers": errors}


def trained(seed: int, recipe: Recipe) -> Point:
    """Trained with the codes simulated, for as long as the float model was trained."""
    task, started = task_of(LANGUAGE_TASK), time.process_time()
    student = dwindle.prepare(task.load(seed), recipe, inputs=next(task.batches(seed)))
    train(student, task.batches(seed), **task.settings, seed=seed, after_step=lambda *_: student.step())
    small = student.finish()
    spent = time.process_time() - started
    return {**finished(task, small), "CPU s": spent}


def measured(seed: int, run: str, recipe: Recipe | None) -> Point:
    """One run."""
    if recipe is None:
        point = float_point(LANGUAGE_TASK, seed)
        return {**point, "CPU s": point["training CPU s"]}
    return (trained if run in TRAINED else rounded)(seed, recipe)


def show(rows: Mapping[str, Sequence[Point]], console: Console) -> None:
    """Each run's figures for every seed, and its paired difference to float."""
    table = Table(title="GlassLM on Persuasion", title_justify="left")
    for heading in ("run", "perplexity", "less float's, %", "bytes", "CPU s"):
        table.add_column(heading)
    for run, points in rows.items():
        apart = "" if run == "float" else against(points, rows["float"], LANGUAGE_TASK)
        size = f"{points[0]['bytes']:.3f}" if "bytes" in points[0] else "1"
        perplexity, spent = (
            " ".join(format(p[key], form) for p in points) for key, form in (("perplexity", ".3f"), ("CPU s", ".0f"))
        )
        table.add_row(run, perplexity, apart, size, spent)
    console.print(table)


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *TRAINED], help="besides float; all where absent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="measure what is already there as well")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    timing.one_thread()
    results, console = Results("glass_gptq", again=arguments.again), Console(width=120)
    common = {"batch": BATCH, "calibration": CALIBRATION, **LANGUAGE}
    rows: dict[str, list[Point]] = {}
    for seed in arguments.seeds:  # the float model of a seed serves all its runs
        for run in ["float", *(r for r in (*RUNS, *TRAINED) if not arguments.runs or r in arguments.runs)]:
            recipe = {**RUNS, **TRAINED}.get(run)
            measure = functools.partial(measured, seed, run, recipe)
            with Console(stderr=True).status(f"{run}, seed {seed}"):
                point = results.point({"run": run, "seed": seed, "recipe": recipe, **common}, measure)
            rows.setdefault(run, []).append(point)
    show(rows, console)


if __name__ == "__main__":
    main()
