"""Modes of a model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """No gradients inside; a module is in eval mode there, and afterwards each of its parts in the mode it had."""
    parts = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    with torch.no_grad():
        if isinstance(model, nn.Module):
            model.eval()
        try:
            yield
        finally:
            for part, training in parts:
                part.training = training
