"""Linears whose weights have 1, 2 or 4 bits, on one CPU thread: with weights kept as int8, or unpacked on each call.

    python benchmarks/few_bits.py [--rounds 200] [--again]

Milliseconds of CPU time, the least of all rounds, of `qlinear` on int8 codes with one scale a token; sides in turn.
`runtime/unpacked.py` has the rule that was made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timing  # before torch
import torch
from results import Results, command_line
from rich.console import Console
from rich.table import Table

from dwindle.runtime import unpacked
from dwindle.runtime.layout import unpack
from dwindle.runtime.ops.catalog import LIBRARY
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme

SHAPES = ((384, 384), (768, 768), (3072, 768), (768, 3072))  # N, K
ROWS = (1, 8, 128, 1024)
WEIGHTS = {
    "1 bit": Scheme(bits=1, kind="binary"),
    "2 bits": Scheme(bits=2, kind="ternary"),
    "4 bits": Scheme(bits=4),
}


def measure(shape: tuple[int, int], scheme: Scheme, rounds: int) -> dict[str, Any]:
    """{"unpack": ms, "1": {"kept": ms, "per call": ms}, ...} by rows of activations."""
    generator = torch.Generator().manual_seed(0)
    weight = QTensor.quantize(torch.randn(shape, generator=generator), scheme)
    found: dict[str, Any] = {}
    alone = timing.interleaved({"unpack": lambda: unpack(weight.codes, shape[1], scheme)}, rounds)
    found["unpack"] = alone["unpack"]["least"]
    for rows in ROWS:
        codes = torch.randint(-127, 128, (rows, shape[1]), generator=generator, dtype=torch.int8)
        args = (codes, torch.rand(rows, 1, generator=generator), weight.codes, weight.scale, None, None)

        def call(room: int, args: tuple[Any, ...] = args) -> Callable[[], object]:
            def run() -> object:
                unpacked.ROOM = room
                if not room:
                    unpacked.forget()
                return torch.ops.dwindle.qlinear.default(*args, scheme.spell(), torch.float32)

            return run

        kept = timing.interleaved({"kept": call(1 << 28)}, rounds)["kept"]["least"]
        each = timing.interleaved({"per call": call(0)}, rounds)["per call"]["least"]
        found[str(rows)] = {"kept": kept, "per call": each}
    return found


def show(points: dict[tuple[str, tuple[int, int]], dict[str, Any]]) -> None:
    """One row a shape and width."""
    table = Table(title="qlinear, ms of CPU time: kept / unpacked on each call", title_justify="left")
    for name in ("weights", "N x K", *(f"{rows} rows" for rows in ROWS), "unpacking alone"):
        table.add_column(name, justify="right")
    for (bits, shape), r in points.items():
        cells = (f"{r[str(rows)]['kept']:.3f} / {r[str(rows)]['per call']:.3f}" for rows in ROWS)
        table.add_row(bits, f"{shape[0]} x {shape[1]}", *cells, f"{r['unpack']:.3f}")
    Console(width=130).print(table)


def main() -> None:
    """Measure what is not there yet, and print all."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    assert LIBRARY is not None  # the operators are registered
    timing.one_thread()
    results, points = Results("few_bits", again=arguments.again), {}
    for bits, scheme in WEIGHTS.items():
        for shape in SHAPES:
            configuration = {"weights": scheme.spell(), "shape": shape, "rounds": arguments.rounds}
            points[bits, shape] = results.point(
                configuration, lambda shape=shape, scheme=scheme: measure(shape, scheme, arguments.rounds)
            )
    show(points)


if __name__ == "__main__":
    main()
