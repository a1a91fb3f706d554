"""What every test runs under: few threads, and property tests that repeat themselves in CI."""

from __future__ import annotations

import atexit
import os
import tempfile

import setuptools  # noqa: F401  # before torch's inductor imports distutils, which setuptools replaces
import torch
from hypothesis import HealthCheck, settings

# Tiny tensors gain nothing from threads, and test workers share the cores.
torch.set_num_threads(1)

# Each worker compiles for itself: kernels that another process is writing are not read half-written.
_CACHE = tempfile.TemporaryDirectory(prefix="dwindle-inductor-", ignore_cleanup_errors=True)
atexit.register(_CACHE.cleanup)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name

# The first example of a test may load torch's compiler, so no deadline.
settings.register_profile(
    "dwindle",
    deadline=None,
    max_examples=60,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("dwindle")
