"""A model as graphs whose inner values can be looked at for the length of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.taps import Tap, tapped
from ..runtime.contract import Key
from ..runtime.program import Program
from .recomputing import Recomputing


class Tapping(Recomputing):
    """`with model.tapping(taps) as seen: output = model(**batch)` fills `seen` with the values, in the taps' order.

    They come out of the same forward, with their gradients, through whatever wraps the model.
    """

    _taps: tuple[Tap, ...] = ()
    _seen_values: list[Tensor]
    _within: dict[tuple[Key, tuple[Tap, ...]], fx.GraphModule]  # graphs that give out more

    NOT_COPIED = (*Recomputing.NOT_COPIED, "_taps", "_seen_values", "_within")

    @contextmanager
    def tapping(self, taps: Sequence[Tap]) -> Iterator[list[Tensor]]:
        """Values inside of the calls that are made here: of the last one. Raises DistillationError in that call."""
        seen: list[Tensor] = []
        self._taps, self._seen_values = tuple(taps), seen
        try:
            yield seen
        finally:
            self._taps = ()

    def add(self, program: Program) -> None:
        """As for any model."""
        super().add(program)
        self._within = {}

    def _run(self, program: Program, tensors: Sequence[Tensor]) -> Any:
        if not self._taps:
            return super()._run(program, tensors)
        values = self._tapped(program)(*tensors)
        own = len(values) - len(self._taps)
        self._seen_values[:] = values[own:]
        return values[:own]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def _tapped(self, program: Program) -> fx.GraphModule:
        key = program.contract.key, self._taps
        if key not in self._within:
            made = tapped(program, self._taps, [edit.path for edit in self.plan.drops])
            self._within[key] = (self._checkpointed(made) if program.contract.training else None) or made.module
        return self._within[key]
