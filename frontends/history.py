"""What happened in training: loss and bits by step, and every change of bits, in bounded memory.

A point is a window of `every` steps: its last step, the mean of its finite losses, the bits after it. When there are
MOST points, neighbours become one and `every` doubles. Losses stay on their device until they are asked for, so that
no step waits for them. All of it is plain data and travels with the schedule: a resumed run has the whole curve.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..passes.prune.masks import Thinning
from ..passes.quantize.course import Drop

MOST = 512
WAITING = 64  # losses that are not read yet
SMOOTHING = 0.9

Point = tuple[int, float | None, float]
"""(last step, mean loss, average bits)."""
Change = tuple[int, int, int, int, str]
"""(step, before, after, how many, of what): of bits, weights or activations that changed alike; or of what stays of
the "heads", "rows" ... of so many."""


class History:
    """Of one run; start: average bits before the first step."""

    def __init__(self, start: float) -> None:
        self.start, self.every = start, 1
        self.changes: list[Change] = []  # the newest MOST
        self.smooth: float | None = None  # since the run was last taken up: what a display shows
        self._curve: list[Point] = []
        self._total, self._count = 0.0, 0  # of the window that is open
        self._waiting: list[tuple[int, Tensor | float | None, float]] = []

    def record(self, step: int, loss: Tensor | float | None, bits: float, changed: Sequence[Drop | Thinning]) -> None:
        """A step is done. loss: of the last batch before it, on this process."""
        self._waiting.append((step, loss, bits))
        if len(self._waiting) >= WAITING:
            self._read()
        self.changes += changes(changed)
        del self.changes[:-MOST]

    @property
    def curve(self) -> list[Point]:
        """All closed windows."""
        self._read()
        return self._curve

    def loss(self) -> float | None:
        """Exponential mean of the losses since the run was last taken up."""
        self._read()
        return self.smooth

    def _read(self) -> None:
        for step, loss, bits in self._waiting:
            value = math.nan if loss is None else float(loss)
            if math.isfinite(value):
                self._total, self._count = self._total + value, self._count + 1
                self.smooth = value if self.smooth is None else SMOOTHING * self.smooth + (1 - SMOOTHING) * value
            if step % self.every == 0:
                self._close(step, bits)
        self._waiting.clear()

    def _close(self, step: int, bits: float) -> None:
        self._curve.append((step, _short(self._total / self._count) if self._count else None, _short(bits)))
        self._total, self._count = 0.0, 0
        if len(self._curve) == MOST:
            self._curve = [_joined(*pair) for pair in zip(self._curve[::2], self._curve[1::2], strict=True)]
            self.every *= 2

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "start": self.start,
            "every": self.every,
            "curve": [list(point) for point in self.curve],
            "open": [self._total, self._count],
            "changes": [list(change) for change in self.changes],
        }

    def load_json(self, data: Mapping[str, Any]) -> None:
        """Inverse of `to_json`."""
        self._waiting.clear()
        self.start, self.every = data["start"], data["every"]
        self._curve = [(step, loss, bits) for step, loss, bits in data["curve"]]
        self._total, self._count = data["open"]
        self.changes = [(*change,) for change in data["changes"]]
        self.smooth = None


def changes(changed: Sequence[Drop | Thinning]) -> list[Change]:
    """Drops that are alike, counted, and what was pruned."""
    drops = [d for d in changed if isinstance(d, Drop)]
    alike = Counter((d.step, d.before, d.after, "activation" if d.of_input else "weight") for d in drops)
    cuts = [(t.step, t.before, t.after, t.total, t.kind) for t in changed if isinstance(t, Thinning)]
    return [(step, before, after, count, kind) for (step, before, after, kind), count in alike.items()] + cuts


def _joined(one: Point, two: Point) -> Point:
    losses = [loss for loss in (one[1], two[1]) if loss is not None]
    return two[0], _short(sum(losses) / len(losses)) if losses else None, two[2]


def _short(value: float) -> float:
    """Six digits, which a picture does not need and a state can bear."""
    return float(f"{value:.6g}")
