"""Which 3 of MiniLM's 6 layers stay, by each way to choose them, and what is left of its answers without training.

    python benchmarks/layers.py [--quick] [--again]

Layers are chosen on articles that are not asked about; then N headlines look for their bodies, as in `retrieval.py`.
All 20 choices of 3 are asked too, so that each way has its place among them; --quick leaves that out.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import timing  # before torch
from results import Results, command_line
from retrieval import Subject, scored
from rich.console import Console
from rich.progress import track
from rich.table import Table

import dwindle

SIZE, KEPT, LAYERS = 500, 3, 6
WAYS: dict[str, dict[str, Any]] = {
    **{spread: {"keep": KEPT, "spread": spread} for spread in ("even", "ends", "first", "last")},
    **{by: {"keep": KEPT, "by": by} for by in ("influence", "change", "greedy")},
}


def choose(subject: Subject, way: dict[str, Any]) -> dict[str, Any]:
    """The layers that stay, and the CPU seconds that it takes to compress with this choice."""
    data = subject.calibration()
    started = time.process_time()
    small = dwindle.compress(subject.model, {"depth": way}, inputs=data[0], data=data)
    spent = time.process_time() - started
    gone = {int(edit.path.rpartition(".")[2]) for edit in small.plan.drops}
    said = [entry.reason for entry in small.log if entry.rule.startswith("drop.")]
    return {"kept": [i for i in range(LAYERS) if i not in gone], "said": said, "CPU s": spent}


def ask(subject: Subject, kept: list[int]) -> dict[str, Any]:
    """Scores with these layers alone, and the difference to all of them on the same queries."""
    recipe: dict[str, Any] = {} if len(kept) == LAYERS else {"depth": {"keep_layers": kept}}
    q, d = subject.vectors(dwindle.compress(subject.model, recipe, inputs=subject.calibration()[0]))
    return scored(q, d, subject.reference)[1]


def show(chosen: dict[str, dict[str, Any]], asked: dict[tuple[int, ...], dict[str, Any]]) -> None:
    """One row a way, then the best and the worst of all choices."""
    title = f"MiniLM with {KEPT} of {LAYERS} layers, untrained: BBC headline to body, N = {SIZE}"
    table = Table(title=title, title_justify="left")
    for name in ("chosen by", "layers", "acc@1", "MRR", "- all layers", "95 % interval", "place of 20", "CPU s"):
        table.add_column(name, justify="left" if name in ("chosen by", "layers") else "right")
    every = sorted((r["mrr"] for kept, r in asked.items() if len(kept) == KEPT), reverse=True)
    complete = len(every) == len(list(itertools.combinations(range(LAYERS), KEPT)))
    rows = [("all", tuple(range(LAYERS)), "")]
    rows += [(name, tuple(point["kept"]), f"{point['CPU s']:.1f}") for name, point in chosen.items()]
    if complete:
        by_mrr = sorted((kept for kept in asked if len(kept) == KEPT), key=lambda kept: -asked[kept]["mrr"])
        rows += [("best", by_mrr[0], ""), ("worst", by_mrr[-1], "")]
    for name, kept, spent in rows:
        r = asked[kept]
        low, high = r["interval"]
        place = str(every.index(r["mrr"]) + 1) if complete and len(kept) == KEPT else ""
        compared = [f"{r['difference']:+.4f}", f"{low:+.4f} {high:+.4f}"] if len(kept) == KEPT else ["", ""]
        layers = ", ".join(map(str, kept))
        table.add_row(name, layers, f"{r['acc@1']:.3f}", f"{r['mrr']:.4f}", *compared, place, spent)
    Console(width=110).print(table)


def main() -> None:
    """Choose, ask, and print."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="only what some way has chosen")
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    subject, results = Subject((SIZE,)), Results("layers", again=arguments.again)
    console = Console(stderr=True)
    chosen = {}
    for name in track(WAYS, "Choosing", console=console, transient=True):
        chosen[name] = results.point({"way": WAYS[name]}, lambda name=name: choose(subject, WAYS[name]))
    wanted = {tuple(range(LAYERS)), *(tuple(point["kept"]) for point in chosen.values())}
    if not arguments.quick:
        wanted.update(itertools.combinations(range(LAYERS), KEPT))
    asked = {}
    for kept in track(sorted(wanted), "Asking", console=console, transient=True):
        asked[kept] = results.point({"kept": kept, "N": SIZE}, lambda kept=kept: ask(subject, list(kept)))
    show(chosen, asked)


if __name__ == "__main__":
    main()
