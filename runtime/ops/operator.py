"""What an operator is: one schema, one reference that defines it, and the kernels that may serve it faster.

Every operator is registered as a composite: tracing (torch.compile, export) sees through it to plain ATen, so
inductor fuses quantisation with its neighbours; a real call on real tensors goes to the first kernel that
serves. The reference is the definition: each kernel equals it bit for bit on codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import compat

NAMESPACE = "dwindle"


def wants_gradient(*values: object) -> bool:
    """Whether autograd records what is done to any of `values`: then a kernel that it cannot see into must decline."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation.

    serves(*args) gives None where the kernel applies, else the reason why not ("needs a CUDA tensor").
    """

    name: str
    serves: Callable[..., str | None]
    run: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """All of an operator's life.

    name, schema: as torch.library wants them; the overload is `torch.ops.dwindle.<name>.default`
    reference: composite of ATen calls; what tracing sees, and the fallback
    kernels: tried in order on real tensors
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    kernels: tuple[Kernel, ...] = ()

    def __call__(self, *args: Any) -> Any:
        """Dispatch one call."""
        if not compat.is_tracing(args[0]):
            for kernel in self.kernels:
                if kernel.serves(*args) is None:
                    return kernel.run(*args)
        return self.reference(*args)

    def explain(self, *args: Any) -> tuple[str, list[str]]:
        """Name of the kernel that serves `args`, and why those before it do not."""
        declined: list[str] = []
        for kernel in self.kernels:
            reason = kernel.serves(*args)
            if reason is None:
                return kernel.name, declined
            declined.append(f"{kernel.name}: {reason}")
        return "reference", declined

    @property
    def overload(self) -> Any:
        """The registered torch operator (import `catalog` first)."""
        return getattr(torch.ops.dwindle, self.name).default
