"""Timing calls side by side: they take turns, so that what the machine does hits all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_RUNS = 5


def machine() -> str:
    """Processor, threads, load average and version, as one line: a busy machine gives wide times."""
    chip = platform.processor() or platform.machine()
    return f"{chip}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"


def in_turns(calls: Mapping[str, Callable[[], Any]], seconds: float, most: int) -> dict[str, list[float]]:
    """Seconds of each call, without gradients: LEAST_RUNS to `most` turns, for about `seconds` a contender."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds * len(calls)
    with torch.no_grad():
        for turn in range(most):
            if turn >= LEAST_RUNS and time.perf_counter() >= until:
                break
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return times


def quantile(times: Sequence[float], q: float) -> float:
    """The q-quantile of two or more times, by linear interpolation."""
    return statistics.quantiles(times, n=100, method="inclusive")[round(q * 100) - 1]


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """`tensor` repeated along `dim`, then cut to `size` there."""
    copies = [1] * tensor.dim()
    copies[dim] = -(-size // tensor.shape[dim])
    return tensor.repeat(*copies).narrow(dim, 0, size).contiguous()
