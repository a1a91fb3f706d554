"""Bytes on disk: MiniLM saved after each preset, and with zeros in its weights, beside its fp32 safetensors file.

    python benchmarks/artifact_size.py [--again]

Sizes are what `stat` says of every file of the saved folder; `weights` is its safetensors file alone. The float
side is the file as the model ships, and the model saved after an empty recipe, which must cost no more but for its
graph. `memory` is what the tensors take once they are loaded, zeros too. CPU seconds of save and load are the least
of three.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import timing  # before torch
import torch
from results import Results, command_line
from rich.console import Console
from rich.table import Table
from torch import nn

import dwindle
from dwindle.frontends.assets import MINILM, fetch, load_minilm
from dwindle.frontends.recipe import Recipe

W8 = Recipe.of("zeroquant-w8a8").plain()
ZEROS = {"50 %": {"ratio": 0.5}, "75 %": {"ratio": 0.75}, "2:4": {"pattern": "2:4"}}
RECIPES: dict[str, Any] = (
    {"empty recipe": {}}
    | {name: name for name in ("zeroquant-w8a8", "static-w8a8", "w8a16", "w4a8-g32", "w4a16-g128")}
    | {f"zeros {name}": {"sparsify": rule} for name, rule in ZEROS.items()}
    | {f"zeroquant-w8a8, zeros {name}": {**W8, "sparsify": rule} for name, rule in ZEROS.items()}
)
TARGETS = {"zeroquant-w8a8": 0.27, "static-w8a8": 0.27, "w8a16": 0.27, "w4a16-g128": 0.15}
ROUNDS = 3

T = TypeVar("T")


def original_bytes() -> int:
    """Size of the fp32 file that the model came in."""
    return (fetch(MINILM, quiet=True) / MINILM.key).stat().st_size


def timed(call: Callable[[int], T]) -> tuple[T, float]:
    """The last result, and the least CPU seconds of ROUNDS calls, which are told their number."""
    least = float("inf")
    for i in range(ROUNDS):
        started = time.process_time()
        result = call(i)
        least = min(least, time.process_time() - started)
    return result, least


def measure(model: nn.Module, recipe: Any) -> dict[str, Any]:
    """{"files": {name: bytes}, "memory": bytes, "save s", "load s", "identical"}."""
    words = torch.arange(1000, 1064).reshape(2, 32)
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    compressed = dwindle.compress(model, recipe, inputs=batch, data=[batch])
    with tempfile.TemporaryDirectory() as folder:
        saved, save_seconds = timed(lambda i: compressed.save(Path(folder) / str(i)))
        loaded, load_seconds = timed(lambda i: dwindle.load(saved))
        files = {file.name: file.stat().st_size for file in sorted(saved.iterdir())}
    with torch.no_grad():
        identical = torch.equal(loaded(**batch).last_hidden_state, compressed(**batch).last_hidden_state)
    memory = loaded.store.nbytes()
    return {"files": files, "memory": memory, "save s": save_seconds, "load s": load_seconds, "identical": identical}


def show(points: dict[str, dict[str, Any]], original: int) -> None:
    """One row a recipe."""
    table = Table(title=f"MiniLM-L6 on disk; fp32 safetensors file {original / 1e6:.2f} MB", title_justify="left")
    sizes = ("weights MB", "folder MB", "memory MB", "ratio")
    for name in ("recipe", *sizes, "target", "save s", "load s", "loads the same"):
        table.add_column(name, justify="left" if name in ("recipe", "target") else "right")
    for name, r in points.items():
        total, target = sum(r["files"].values()), TARGETS.get(name)
        ratio = total / original
        table.add_row(
            *(name, f"{r['files']['weights.safetensors'] / 1e6:.2f}", f"{total / 1e6:.2f}"),
            *(f"{r['memory'] / 1e6:.2f}", f"{ratio:.4f}"),
            "" if target is None else f"<= {target} {'met' if ratio <= target else 'missed'}",
            *(f"{r['save s']:.2f}", f"{r['load s']:.2f}", "yes" if r["identical"] else "NO"),
        )
    table.caption = "ratio: the whole folder against the fp32 file"
    Console(width=130).print(table)


def main() -> None:
    """Measure the recipes that are not there yet, and print all."""
    parser = command_line(__doc__)
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    model, _ = load_minilm(quiet=True)
    results = Results("artifact_size", again=arguments.again)
    points = {
        name: results.point({"recipe": recipe}, lambda recipe=recipe: measure(model, recipe))
        for name, recipe in RECIPES.items()
    }
    show(points, original_bytes())


if __name__ == "__main__":
    main()
