"""The caller's random numbers go on as if dwindle had drawn none, and the caller's autocast is not ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Inside, torch's global generators may be drawn from and seeded, and autocast is off; afterwards all is as it was.

    Models may draw in eval mode too (the noise of a VAE), and are run to verify, calibrate and measure. Under autocast
    what is run to record shapes would leave casts in torch's cache that the caller's own call would then find there.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    devices = list(range(torch.cuda.device_count())) if in_use else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
