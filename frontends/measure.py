"""Latency of a compressed model beside the original, on this machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.compressed import Compressed
from .capture import in_mode

BATCHES = (1, 8)
SECONDS_EACH = 1.0
WARM_UP = 3  # calls of each side that are not counted: first ones load, allocate and choose kernels
LEAST_RUNS, MOST_RUNS = 5, 200


def measure(model: nn.Module, compressed: Compressed, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """p50 and p95 of both models in seconds at each batch size, calls interleaved; and what machine it was."""
    where = machine()  # before the timing, which is load too
    with in_mode(model, False):
        rows = [
            _row(model, compressed, batch, {name: _batched(value, batch) for name, value in arguments.items()})
            for batch in _batches(compressed)
        ]
    return {"latency": rows, "machine": where}


def machine() -> str:
    """Processor, threads, load average and version, as one line: a busy machine gives wide times."""
    chip = platform.processor() or platform.machine()
    return f"{chip}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"


def _batches(compressed: Compressed) -> tuple[int, ...]:
    """BATCHES, or the one batch size that a static capture serves."""
    fixed = {s.shape[0] for c in compressed.contracts[:1] for s in c.inputs if s.shape and isinstance(s.shape[0], int)}
    return tuple(size for size in fixed if isinstance(size, int))[:1] or BATCHES


def _row(model: nn.Module, compressed: Compressed, batch: int, call: Mapping[str, Any]) -> dict[str, float]:
    eager, ours = _interleaved(lambda: model(**call), lambda: compressed(**call))
    return {
        "batch": batch,
        "eager_p50": _quantile(eager, 0.5),
        "eager_p95": _quantile(eager, 0.95),
        "p50": _quantile(ours, 0.5),
        "p95": _quantile(ours, 0.95),
    }


def _batched(value: Any, batch: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    copies = -(-batch // value.shape[0])
    return value.repeat(copies, *(1 for _ in value.shape[1:]))[:batch]


def _interleaved(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for call in (first, second) * WARM_UP:
            call()
        until = time.perf_counter() + 2 * SECONDS_EACH
        while len(times[0]) < LEAST_RUNS or (time.perf_counter() < until and len(times[0]) < MOST_RUNS):
            for call, taken in zip((first, second), times, strict=True):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
    return times


def _quantile(times: list[float], q: float) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[round(q * 100) - 1]
