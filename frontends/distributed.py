"""What processes of one run tell each other, so that all decide alike."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..passes.quantize.sensitivity import Sensitivity


def mean_over_ranks(value: float) -> float:
    """The mean over all processes, or the value itself where there is one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()


def averaged(found: Sensitivity) -> Sensitivity:
    """Each block's curvature averaged over ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    means = {name: replace(c, value=mean_over_ranks(c.value)) for name, c in found.blocks.items()}
    return replace(found, blocks=means)
