"""CPU time of calls on one thread, several sides in turn. Import it before torch.

Time of this thread, not of the clock: other work on the machine then disturbs less. The first call of every side
is not counted. `least` is the figure to compare; `median` says how far the rest were from it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch


def one_thread() -> None:
    """Keep torch to the calling thread, whose time is what is measured."""
    torch.set_num_threads(1)


def quiet_on_one_thread() -> None:
    """`one_thread`, and no warnings from here on: tables are printed, and a warning is no result."""
    warnings.simplefilter("ignore")
    one_thread()


def interleaved(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """{side: {"least", "median"}} in milliseconds of CPU time; every round calls each side once."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for call in sides.values():
            call()
        for _ in range(rounds):
            for name, call in sides.items():
                started = time.thread_time()
                call()
                times[name].append(time.thread_time() - started)
    return {name: {"least": min(t) * 1e3, "median": statistics.median(t) * 1e3} for name, t in times.items()}
