"""Latency of a compressed model beside the original, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..runtime.compressed import Compressed
from ..runtime.contract import Contract
from ..runtime.own_state import own_state
from ..runtime.structure import flatten, rebuild
from .modes import in_mode
from .timing import in_turns, machine, quantile, resized

BATCHES = (1, 8)
SECONDS_EACH = 1.0
WARM_UP = 3  # calls of each side that are not counted: first ones load, allocate and choose kernels
MOST_RUNS = 200


@own_state()
def measure(model: nn.Module, compressed: Compressed, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """p50 and p95 of both models in seconds at each batch size, calls interleaved; and what machine it was."""
    where = machine()  # before the timing, which is load too
    contract = compressed.contracts[0]
    with in_mode(model, False):
        rows = [_row(model, compressed, batch, _shaped(contract, arguments, batch)) for batch in _batches(contract)]
    return {"latency": rows, "machine": where}


def _batches(contract: Contract) -> tuple[int, ...]:
    """BATCHES as far as the contract allows, or the one size that it fixes."""
    low, high = contract.limits.get("batch", (0, None))
    if any("batch" in spec.shape for spec in contract.inputs):
        return tuple(size for size in BATCHES if low <= size and (high is None or size <= high))
    first = next((spec.shape[0] for spec in contract.inputs if spec.shape), 1)
    return (first,) if isinstance(first, int) else BATCHES[:1]


def _row(model: nn.Module, compressed: Compressed, batch: int, call: Mapping[str, Any]) -> dict[str, float]:
    sides: dict[str, Callable[[], Any]] = {"eager": lambda: model(**call), "ours": lambda: compressed(**call)}
    with torch.no_grad():
        for side in [*sides.values()] * WARM_UP:
            side()
    times = in_turns(sides, SECONDS_EACH, MOST_RUNS)
    return {
        "batch": batch,
        "eager_p50": quantile(times["eager"], 0.5),
        "eager_p95": quantile(times["eager"], 0.95),
        "p50": quantile(times["ours"], 0.5),
        "p95": quantile(times["ours"], 0.95),
    }


def _shaped(contract: Contract, arguments: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The arguments at a batch size: every dimension that is a free batch is repeated and cut, others stay."""
    _, tensors = flatten(dict(arguments))
    for i, spec in enumerate(contract.inputs):
        for dim, name in enumerate(spec.shape):
            if name == "batch":
                tensors[i] = resized(tensors[i], dim, batch)
    return dict(rebuild(contract.arguments, tensors))
