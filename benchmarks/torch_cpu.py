"""PyTorch on one CPU thread: CPU time of a batch of MiniLM, as it is and compressed, op by op and compiled.

    python benchmarks/torch_cpu.py [--quick] [--rounds 20] [--profile] [--again]

    eager                 the float model
    compressed            dwindle.compress(model, "zeroquant-w8a8"), op by op
    inductor              torch.compile(model), float
    compressed inductor   torch.compile(compressed)
    backend dwindle       torch.compile(model, backend="dwindle"), the same recipe

A point is one shape (batch x tokens), all sides in turn in each round, compiled for that shape alone. `error` is
relative L2 of last_hidden_state against eager. --quick leaves out what compiles. --profile prints where the CPU
time of the op-by-op and the compiled form goes, at the largest shape; it keeps no result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import timing  # before torch
import torch
from results import Results, command_line
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import dwindle
from dwindle.frontends.assets import load_minilm

RECIPE = "zeroquant-w8a8"
SHAPES = ((1, 16), (1, 128), (8, 128))  # batch, tokens
SIDES = ("eager", "compressed", "inductor", "compressed inductor", "backend dwindle")
COMPILED = SIDES[2:]
TARGETS = {"compressed": 1.3, "compressed inductor": 1.5, "backend dwindle": 1.5}  # times less than eager

Call = Callable[..., Any]


def make_batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """Made-up words, nothing padded: (B, T) int64 twice."""
    words = torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def make_sides(model: nn.Module, compressed: nn.Module, names: tuple[str, ...]) -> dict[str, Call]:
    """The callables by name; what compiles does so on its first call, for the shape of that call."""
    torch.compiler.reset()
    makers: dict[str, Callable[[], Call]] = {
        "eager": lambda: model,
        "compressed": lambda: compressed,
        "inductor": lambda: torch.compile(model, dynamic=False),
        "compressed inductor": lambda: torch.compile(compressed, dynamic=False),
        "backend dwindle": lambda: torch.compile(
            model, backend="dwindle", dynamic=False, options={"recipe": RECIPE, "inner": "inductor"}
        ),
    }
    return {name: makers[name]() for name in names}


def measure(sides: Mapping[str, Call], batch: Mapping[str, Tensor], rounds: int) -> dict[str, Any]:
    """{side: {"least", "median", "error", "first call s"}}."""
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        expected = sides["eager"](**batch).last_hidden_state.double()
        for name, call in sides.items():
            started = time.perf_counter()
            hidden = call(**batch).last_hidden_state.double()
            seconds = time.perf_counter() - started
            found[name] = {"error": float((hidden - expected).norm() / expected.norm()), "first call s": seconds}
    times = timing.interleaved({name: lambda call=call: call(**batch) for name, call in sides.items()}, rounds)
    return {name: {**times[name], **found[name]} for name in sides}


def show(points: Mapping[tuple[int, int], Mapping[str, Any]], machine: str) -> None:
    """One row a shape and side."""
    table = Table(title=f"MiniLM-L6, one thread of {machine}: CPU ms a batch", title_justify="left")
    for name in ("batch", "side", "least", "median", "eager /", "inductor /", "target", "error"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for (rows, tokens), sides in points.items():
        eager, inductor = sides["eager"]["least"], sides.get("inductor", {}).get("least")
        for name, r in sides.items():
            target, gain = TARGETS.get(name), eager / r["least"]
            met = "" if target is None else f">= {target} {'met' if gain >= target else 'missed'}"
            table.add_row(
                *(f"{rows}x{tokens}", name, f"{r['least']:.2f}", f"{r['median']:.2f}", f"{gain:.2f}"),
                *("" if inductor is None else f"{inductor / r['least']:.2f}", met, f"{r['error']:.2g}"),
            )
        table.add_section()
    Console(width=110).print(table)


def show_profile(sides: Mapping[str, Call], batch: Mapping[str, Tensor], rounds: int) -> None:
    """Where the CPU time of each side goes, by operator or generated kernel."""
    for name, call in sides.items():
        with torch.no_grad():
            call(**batch)
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                for _ in range(rounds):
                    call(**batch)
        table = Table(title=f"{name}: CPU ms a batch under the profiler", title_justify="left")
        for column in ("operator", "ms", "share", "calls"):
            table.add_column(column, justify="left" if column == "operator" else "right")
        rows = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(e.self_cpu_time_total for e in rows)
        for e in rows[:12]:
            ms, share = e.self_cpu_time_total / rounds / 1e3, e.self_cpu_time_total / total
            table.add_row(e.key, f"{ms:.2f}", f"{share:.0%}", str(e.count // rounds))
        Console(width=110).print(table)


def main() -> None:
    """Measure the shapes that are not there yet, and print all."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="op by op only, 5 rounds")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    names = tuple(n for n in SIDES if n not in COMPILED) if arguments.quick else SIDES
    rounds = 5 if arguments.quick else arguments.rounds
    model, _ = load_minilm(quiet=True)
    compressed = dwindle.compress(model, RECIPE, inputs=make_batch(2, 32))
    if arguments.profile:
        show_profile(make_sides(model, compressed, names), make_batch(*SHAPES[-1]), 5)
        return
    results = Results("torch_cpu", again=arguments.again)
    points = {}
    for shape in SHAPES:
        configuration = {"recipe": RECIPE, "shape": shape, "rounds": rounds, "sides": names}
        points[shape] = results.point(
            configuration,
            lambda shape=shape: measure(make_sides(model, compressed, names), make_batch(*shape), rounds),
        )
    show(points, results.common["machine"])


if __name__ == "__main__":
    main()
