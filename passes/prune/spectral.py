"""Transfer rules of complex numbers: a pair of real ones, seen as one or as a last dimension of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .walk import Axes, Walk


def as_complex(walk: Walk, node: fx.Node, args: Sequence[Any]) -> Axes:
    """(..., 2) -> (...)."""
    *rest, pair = walk[args[0]]
    walk.space.freeze(pair, f"{node.name}: a real and an imaginary part")
    return rest


def as_real(walk: Walk, node: fx.Node, args: Sequence[Any]) -> Axes:
    """(...) -> (..., 2)."""
    return [*walk[args[0]], walk.space.axis(2, f"{node.name}: a real and an imaginary part")]
