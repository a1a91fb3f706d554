"""Modes of a model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """No gradients inside; a module is in eval mode there, and afterwards in the mode it had."""
    training = isinstance(model, nn.Module) and model.training
    with torch.no_grad():
        if isinstance(model, nn.Module):
            model.eval()
        try:
            yield
        finally:
            if isinstance(model, nn.Module):
                model.train(training)
