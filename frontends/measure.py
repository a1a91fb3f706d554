"""Latency of a compressed model beside the original, on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.compressed import Compressed

BATCHES = (1, 8)
SECONDS_EACH = 1.0
LEAST_RUNS, MOST_RUNS = 5, 200


def measure(model: nn.Module, compressed: Compressed, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """p50 and p95 of both models in seconds at each batch size, calls interleaved; and what machine it was."""
    rows = []
    was_training = model.training
    model.eval()
    try:
        for batch in BATCHES:
            call = {name: _batched(value, batch) for name, value in arguments.items()}
            eager, ours = _interleaved(lambda c=call: model(**c), lambda c=call: compressed(**c))
            rows.append(
                {
                    "batch": batch,
                    "eager_p50": _quantile(eager, 0.5),
                    "eager_p95": _quantile(eager, 0.95),
                    "p50": _quantile(ours, 0.5),
                    "p95": _quantile(ours, 0.95),
                }
            )
    finally:
        model.train(was_training)
    return {"latency": rows, "machine": machine()}


def machine() -> str:
    """Processor, threads and versions, as one line."""
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _batched(value: Any, batch: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    copies = -(-batch // value.shape[0])
    return value.repeat(copies, *(1 for _ in value.shape[1:]))[:batch]


def _interleaved(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for call in (first, second):
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
