"""What layer-by-layer distillation takes in memory beside inference: BERT-base with random weights.

    python benchmarks/lkd_memory.py [--quick] [--again]

Each side is a fresh process that has teacher, student and batches in memory, and is measured from there on: the most
resident memory, from the kernel's own high-water mark (Linux). Inference calls the teacher and the student on every
batch; distillation trains each block for two steps on all of them. One block's training state is its gradients and
AdamW's two moments, 12 bytes a parameter in fp32. --quick: 2 layers, hidden 192.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import timing  # before torch
import torch
from compress_cost import make_bert, peak_bytes, reset_peak, settled_bytes
from results import Point, Results, command_line
from rich.console import Console
from rich.table import Table

import dwindle
from dwindle.frontends.recipe import FEED_FORWARD

LAYERS, QUICK = 12, 2
SMALL = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
BATCHES, BATCH, TOKENS = 8, 8, 128
STATE = 12  # bytes a parameter
TARGET = 1.3
RECIPE = {
    "quantize": [
        {"weight": {"bits": 8}, "activation": {"bits": 8}},
        {"patterns": [FEED_FORWARD], "weight": {"bits": 4, "groups": 48}, "activation": {"bits": 8}},
    ]
}


def measure(side: str, quick: bool) -> Point:
    """Peak and resting bytes of one side, "inference" or "distillation"."""
    timing.quiet_on_one_thread()
    model = make_bert(QUICK if quick else LAYERS, **(SMALL if quick else {}))
    shape, generator = (BATCH, TOKENS), torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 30522, shape, generator=generator) for _ in range(BATCHES)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    small = {name: value[:2] for name, value in batches[0].items()}
    student = dwindle.prepare(model, RECIPE, inputs=small, teacher=model)
    before = settled_bytes()
    reset_peak()
    block = 0
    if side == "inference":
        with torch.no_grad():
            for batch in batches:
                model(**batch)
                student(**batch)
    else:
        found = student.distill_layers(batches, steps=2, quiet=True)
        block = max(layer.parameters for layer in found.layers)
    return {"resting": before, "peak": peak_bytes(), "block parameters": block}


def alone(side: str, quick: bool) -> Point:
    """`measure` in a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, side, quick).result()


def main() -> None:
    """Measure both sides where they are not there yet, and print them."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    results, console = Results("lkd_memory", again=arguments.again), Console(width=110)
    size = "quick" if arguments.quick else "whole"
    found: dict[str, Point] = {}
    for side in ("inference", "distillation"):
        configuration = {"side": side, "size": size, "recipe": RECIPE, "batches": [BATCHES, BATCH, TOKENS]}
        found[side] = results.point(configuration, lambda side=side: alone(side, arguments.quick))
    state = STATE * found["distillation"]["block parameters"]
    table = Table(title="BERT-base, 8 batches of 8x128" if size == "whole" else size, title_justify="left")
    for heading in ("side", "resting, MB", "peak, MB"):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    for side, point in found.items():
        table.add_row(side, *(f"{point[key] / 1e6:.0f}" for key in ("resting", "peak")))
    table.add_row("training state of one block", "", f"{state / 1e6:.0f}")
    ratio = found["distillation"]["peak"] / (found["inference"]["peak"] + state)
    table.caption = f"Distillation / (inference + one block's state): {ratio:.2f}; target: below {TARGET}"
    console.print(table)


if __name__ == "__main__":
    main()
