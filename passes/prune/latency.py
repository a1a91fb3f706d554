"""What a call of a model takes once it is cut, as a part of what it takes now: measured, both in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...runtime.ops.require import unchecked
from ...runtime.program import Program
from .keep import Kept
from .sliced import sliced
from .walk import Walk

ROUNDS = 7
WARM_UP = 2


def latency(walk: Walk, inputs: Sequence[Tensor]) -> Callable[[Kept], float]:
    """The measure of a cut: the least time of a call over that of the whole model, on flat `inputs`.

    Calls of both are interleaved, and the least of ROUNDS is taken, since other work on a machine only adds to it.
    """
    whole = walk.program.copy(walk.program.store.fork())

    def measure(of: Kept) -> float:
        cut = walk.program.copy(walk.program.store.fork())
        sliced(cut, walk.on(cut), of)
        cut.module.recompile()
        times: dict[int, list[float]] = {0: [], 1: []}
        with torch.no_grad(), whole.unwritten(), cut.unwritten(), unchecked():
            for i in range(WARM_UP + ROUNDS):
                for side, program in enumerate((cut, whole)):
                    took = _timed(program, inputs)
                    if i >= WARM_UP:
                        times[side].append(took)
        return min(times[0]) / min(times[1])

    return measure


def _timed(program: Program, inputs: Sequence[Tensor]) -> float:
    """Seconds of one call."""
    given = [t.clone() for t in inputs]
    gpu = any(t.is_cuda for t in given)
    if gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    program.run(given)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started
