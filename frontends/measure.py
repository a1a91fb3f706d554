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
from ..runtime.contract import Contract
from .capture import in_mode

BATCHES = (1, 8)
SECONDS_EACH = 1.0
WARM_UP = 3  # calls of each side that are not counted: first ones load, allocate and choose kernels
LEAST_RUNS, MOST_RUNS = 5, 200


def measure(model: nn.Module, compressed: Compressed, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """p50 and p95 of both models in seconds at each batch size, calls interleaved; and what machine it was."""
    where = machine()  # before the timing, which is load too
    contract = compressed.contracts[0]
    with in_mode(model, False):
        rows = [_row(model, compressed, batch, _shaped(contract, arguments, batch)) for batch in _batches(contract)]
    return {"latency": rows, "machine": where}


def machine() -> str:
    """Processor, threads, load average and version, as one line: a busy machine gives wide times."""
    chip = platform.processor() or platform.machine()
    return f"{chip}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"


def _batches(contract: Contract) -> tuple[int, ...]:
    """BATCHES as far as the contract allows, or the one size that it fixes."""
    low, high = contract.limits.get("batch", (0, None))
    if any("batch" in spec.shape for spec in contract.inputs):
        return tuple(size for size in BATCHES if low <= size and (high is None or size <= high))
    first = next((spec.shape[0] for spec in contract.inputs if spec.shape), 1)
    return (first,) if isinstance(first, int) else BATCHES[:1]


def _row(model: nn.Module, compressed: Compressed, batch: int, call: Mapping[str, Any]) -> dict[str, float]:
    eager, ours = _interleaved(lambda: model(**call), lambda: compressed(**call))
    return {
        "batch": batch,
        "eager_p50": _quantile(eager, 0.5),
        "eager_p95": _quantile(eager, 0.95),
        "p50": _quantile(ours, 0.5),
        "p95": _quantile(ours, 0.95),
    }


def _shaped(contract: Contract, arguments: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The arguments at a batch size: inputs with a free batch are repeated and cut, others stay."""
    free = {spec.name for spec in contract.inputs if spec.shape and spec.shape[0] == "batch"}
    return {name: _repeated(value, batch) if name in free else value for name, value in arguments.items()}


def _repeated(value: Tensor, batch: int) -> Tensor:
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
