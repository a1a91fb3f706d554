"""A model that is asked for a while, and is afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All of `model` in one mode; every module's own flag is put back, and what forward writes into its config."""
    flags = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    held = vars(config) if hasattr(config, "__dict__") else {}
    before = dict(held)
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        held.clear()  # transformers writes a problem_type where there are labels
        held.update(before)


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """No gradients inside; a module is in eval mode there, and afterwards as it was."""
    with torch.no_grad():
        if not isinstance(model, nn.Module):
            yield
            return
        with in_mode(model, False):
            yield
