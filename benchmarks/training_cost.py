"""What a training step with simulated quantisation costs beside a float one, and what curvature costs.

    python benchmarks/training_cost.py [--rounds 5] [--again]

MiniLM on sentences, batch 32 of 48 tokens, embeddings frozen, AdamW; a step is forward, backward and update. Sides
take turns, on one thread, as CPU time; the least of the rounds counts. Compiled sides are warmed up first. Curvature:
one product of the Hessian with a vector, and one measurement of all six blocks, in float steps.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import timing  # before torch
import torch
from results import Point, Results, command_line
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from training import BATCH

import dwindle
from dwindle.frontends.sentiment import load_classifier, sentiment_task
from dwindle.passes.quantize.sensitivity import eigenvalues

TOKENWISE = {"range": "dynamic"}
RECIPES: dict[str, Mapping[str, Any]] = {
    "w8a8, 8 groups": {"quantize": [{"weight": {"bits": 8, "groups": 8}, "activation": TOKENWISE}]},
    "w4a8, groups of 128": {"quantize": [{"weight": {"bits": 4, "group_size": 128}, "activation": TOKENWISE}]},
    "w8a8, learned scales": {"quantize": [{"weight": {"bits": 8, "learned": True}, "activation": TOKENWISE}]},
    "w8a8, static": {"quantize": [{"weight": {"bits": 8}, "activation": {"range": "static"}}]},
    "ternary": {"quantize": [{"weight": {"bits": 2, "kind": "ternary"}, "activation": TOKENWISE}]},
}
ITERATIONS = 10


def stepper(model: nn.Module, call: Callable[..., Any], batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """One optimizer step on `batch`, with the forward through `call`."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        call(**batch).loss.backward()
        optimizer.step()

    return step


def ratios(sides: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """CPU seconds of each side, the least of `rounds` in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in sides.items():
            started = time.process_time()
            step()
            times[name].append(time.process_time() - started)
    return {name: min(values) for name, values in times.items()}


def measure(recipe: Mapping[str, Any], batch: Mapping[str, Tensor], rounds: int, compiled: bool) -> Point:
    """Seconds of a float and of a simulated step."""
    model = load_classifier(quiet=True)
    student = dwindle.prepare(model.train(), recipe, inputs=batch)
    plain = copy.deepcopy(model)
    torch.compiler.reset()
    calls = [torch.compile(m) if compiled else m for m in (plain, student)]
    sides = {
        name: stepper(m, c, batch) for name, m, c in zip(("float", "simulated"), (plain, student), calls, strict=True)
    }
    found = ratios(sides, rounds)
    return {**found, "ratio": found["simulated"] / found["float"]}


def curvature(batch: Mapping[str, Tensor], rounds: int) -> Point:
    """Seconds of a float step, of one product, and of a measurement of six blocks."""
    model = load_classifier(quiet=True)
    student = dwindle.prepare(model.train(), RECIPES["w8a8, 8 groups"], inputs=batch)
    step = ratios({"float": stepper(model, model, batch)}, rounds)["float"]
    blocks = {name: [student.get_parameter(fqn) for fqn in fqns] for name, fqns in student.pacer.blocks.items()}
    started = time.process_time()
    found = eigenvalues(lambda: student(**batch).loss, blocks, iterations=ITERATIONS)
    spent = time.process_time() - started
    return {
        "float": step,
        "products": found.products,
        "measurement in steps": spent / step,
        "product in steps": spent / step / found.products,
    }


def main() -> None:
    """Measure what is not there yet, and print it."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    task = sentiment_task()
    batch = {name: values[:BATCH] for name, values in task.train.items()}
    results, console = Results("training_cost", again=arguments.again), Console(width=110)
    table = Table(title="A training step, simulated / float", title_justify="left")
    for heading in ("recipe", "op by op", "compiled"):
        table.add_column(heading)
    for name, recipe in RECIPES.items():
        row = [name]
        for compiled in (False, True):
            configuration = {"recipe": recipe, "compiled": compiled, "rounds": arguments.rounds, "batch": BATCH}
            with Console(stderr=True).status(f"{name}{', compiled' if compiled else ''}"):
                point = results.point(
                    configuration, lambda r=recipe, c=compiled: measure(r, batch, arguments.rounds, c)
                )
            row.append(f"{point['ratio']:.2f} ({point['float']:.2f} s)")
        table.add_row(*row)
    console.print(table)
    configuration = {"curvature": ITERATIONS, "rounds": arguments.rounds, "batch": BATCH}
    with Console(stderr=True).status("curvature"):
        point = results.point(configuration, lambda: curvature(batch, arguments.rounds))
    console.print({name: round(value, 3) for name, value in point.items()})


if __name__ == "__main__":
    main()
