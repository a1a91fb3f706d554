"""What finding the groups of a model takes, and slicing it: BERT-large with random weights, and 6 to 48 layers.

    python benchmarks/discovery.py [--quick] [--again]

A model is captured once. Then, in CPU time on one thread, the least of some rounds:

    shapes     the graph is run on shapes alone, to know every value's size
    walk       the rest of the walk: the rule of every call
    groups     groups, and the graph that says why parameters are coupled
    slice      30 % of every group is cut, stored tensors and numbers in calls, in a copy of the graph
    record     the sliced graph is run on shapes alone

Discovery is the first three, slicing the last two. The larger model is BERT-large (hidden 1024, 16 heads, vocabulary
30,522); the others are narrow (hidden 64, 4 heads), so that their time is that of the graph and not of copying
weights. A line through the times says whether they are linear in layers: `linear to` is the largest distance from it.
--quick: narrow models of 2 to 6 layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import timing  # before torch
import torch
from compress_cost import make_bert
from results import Results, command_line
from rich.console import Console
from rich.table import Table

from dwindle.frontends.capture import capture
from dwindle.passes.canonicalize import canonicalize
from dwindle.passes.prune import walk as walking
from dwindle.passes.prune.choose import local
from dwindle.passes.prune.groups import coupling, find_groups
from dwindle.passes.prune.score import score
from dwindle.passes.prune.sliced import record, sliced
from dwindle.passes.prune.transfer import rule_of
from dwindle.passes.prune.walk import Walk
from dwindle.runtime.program import Program
from dwindle.runtime.store import Store

LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
NARROW = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 1000}
POINTS = ((24, LARGE), (6, NARROW), (12, NARROW), (24, NARROW), (48, NARROW))
QUICK = tuple((layers, NARROW) for layers in (2, 4, 6))
BATCH, TOKENS, RATIO, ROUNDS = 3, 17, 0.3, 7
TARGETS = {"discovery": 5.0, "slicing": 2.0}


def measure(layers: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Nodes, groups and seconds of one model."""
    model = make_bert(layers, **sizes)
    words = torch.randint(0, 1000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    started = time.thread_time()
    program = canonicalize(capture(model, batch, Store.borrowing(model)))
    captured = time.thread_time() - started
    rounds = [one_round(program) for _ in range(ROUNDS)]
    walk = Walk.over(program, rule_of)
    groups = find_groups(walk)
    return {
        "nodes": len(program.graph.nodes),
        "groups": len(groups),
        "prunable": sum(not group.reason and group.outermost for group in groups),
        "capture s": captured,
        **{f"{name} s": min(r[name] for r in rounds) for name in rounds[0]},
    }


def one_round(program: Program) -> dict[str, float]:
    """CPU seconds of each part."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.thread_time()
        made = call()
        seconds[name] = time.thread_time() - started
        return made

    values = walking.concrete_values
    with patch.object(walking, "concrete_values", lambda program: timed("shapes", lambda: values(program))):
        whole = timed("walk", lambda: Walk.over(program, rule_of))
    seconds["walk"] -= seconds["shapes"]
    groups = timed("groups", lambda: (coupling(whole), find_groups(whole))[1])
    own = [group for group in groups if not group.reason and group.outermost]
    kept = local(own, {group.leaf: score(whole, group, "random") for group in own}, RATIO)
    copy = program.copy(program.store.fork())
    there = whole.on(copy)
    timed("slice", lambda: sliced(copy, there, kept))
    timed("record", lambda: record(copy))
    return seconds


def totals(r: dict[str, Any]) -> dict[str, float]:
    """Discovery and slicing."""
    return {
        "discovery": r["shapes s"] + r["walk s"] + r["groups s"],
        "slicing": r["slice s"] + r["record s"],
    }


def show(points: list[tuple[int, dict[str, int], dict[str, Any]]]) -> None:
    """One line a model, and how far the narrow ones are from a line."""
    table = Table(title=f"CPU seconds on one thread, the least of {ROUNDS}", title_justify="left")
    names = ("shapes", "walk", "groups", "discovery", "slice", "record", "slicing")
    for name in ("layers", "hidden", "nodes", "groups", "prunable", "capture", *names):
        table.add_column(name, justify="right")
    for layers, sizes, r in points:
        parts = {name: r.get(f"{name} s", 0.0) for name in ("capture", *names)} | totals(r)
        counts = (layers, sizes["hidden_size"], r["nodes"], r["groups"], r["prunable"])
        table.add_row(*map(str, counts), *(f"{parts[name]:.3f}" for name in ("capture", *names)))
    console = Console(width=130)
    console.print(table)
    for layers, sizes, r in points:
        if sizes == LARGE:
            for name, seconds in totals(r).items():
                met = "met" if seconds <= TARGETS[name] else "missed"
                console.print(f"BERT-large, {layers} layers: {name} {seconds:.2f} s (<= {TARGETS[name]:.0f} s, {met})")
    narrow = [(layers, totals(r)) for layers, sizes, r in points if sizes == NARROW]
    for name in TARGETS:
        x, y = np.array([n for n, _ in narrow]), np.array([t[name] for _, t in narrow])
        slope, start = np.polyfit(x, y, 1)
        off = float(np.abs(slope * x + start - y).max() / y.max())
        console.print(
            f"{name}: {slope * 1e3:.2f} ms a layer + {start * 1e3:.1f} ms, linear to {off:.1%} of the largest"
        )


def main() -> None:
    """Measure the models that are not there yet, and print all."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    results, points = Results("discovery", again=arguments.again), []
    for layers, sizes in QUICK if arguments.quick else POINTS:
        configuration = {"layers": layers, **sizes, "batch": [BATCH, TOKENS], "ratio": RATIO, "rounds": ROUNDS}
        found = results.point(configuration, lambda layers=layers, sizes=sizes: measure(layers, sizes))
        points.append((layers, sizes, found))
    show(points)


if __name__ == "__main__":
    main()
