"""Gradients of a model's loss over data, for scores that go by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import CalibrationError
from ...runtime.program import Program
from ...runtime.structure import rebuild
from .score import Method

Loss = Callable[[Any], Tensor | None]
"""The loss in a model's output; None where there is none."""


def gathered(program: Program, batches: Iterable[Sequence[Tensor]], loss: Loss) -> dict[Method, dict[str, Tensor]]:
    """By score and stored name, over all batches: the mean g for taylor, sqrt(mean g^2) for fisher's sums of (w g)^2.

    loss: of a model's output. The program and its tensors are as they were afterwards. Raises CalibrationError where
    the output has no loss, or there is no batch.
    """
    own = program.store.fork()
    for name, value in list(own.entries()):
        if isinstance(value, nn.Parameter) and value.is_floating_point():
            own.put(name, nn.Parameter(value.detach()))
    twin = program.copy(own)
    parameters = {
        name: value for name, value in own.entries() if isinstance(value, nn.Parameter) and value.requires_grad
    }
    mean, square = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    count = 0
    with torch.enable_grad(), twin.unwritten():
        for batch in batches:
            found = loss(rebuild(twin.contract.output, twin.run(batch)))
            if found is None:
                raise CalibrationError(
                    "pruning by gradients goes by a loss",
                    required="a model whose output has a loss, and labels in inputs= and data=",
                    found="an output without one",
                    cure="give labels, or choose a score that goes by the weights alone, such as l2",
                )
            gradients = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    mean[name] += gradient
                    square[name] += gradient.square()
            count += 1
    if not count:
        raise CalibrationError("pruning by gradients goes by a loss", required="at least one batch", found="none")
    return {
        "taylor": {name: total / count for name, total in mean.items()},
        "fisher": {name: (total / count).sqrt() for name, total in square.items()},
    }
