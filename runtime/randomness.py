"""The caller's random numbers go on as if dwindle had drawn none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Inside, torch's global generators may be drawn from and seeded; afterwards they are as they were.

    Models may draw in eval mode too (the noise of a VAE), and are run to verify, calibrate and measure.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    devices = list(range(torch.cuda.device_count())) if in_use else []
    with torch.random.fork_rng(devices=devices):
        yield
