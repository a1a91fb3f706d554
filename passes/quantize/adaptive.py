"""Which weight loses its next bit: a closed loop of prediction, observation and retreat, as pure values.

    growth     predicted growth of the loss when a weight falls from b to b - 1 bits, given by the caller
               (1/2 sum g^2 (Q_{b-1}(w) - w)^2 - ..., or 1/2 lambda |...|^2)
    choice     least growth per byte saved; of all weights, a `share` at once
    judgement  after `interval` steps: the loss has grown if  m - m_0 > tolerance |m_0| + 2 sqrt(v / n)
               with m, v mean and variance of the last n losses and m_0 the mean before
    retreat    what fell last gets its bit back, and is left alone for 2, 4, 8 ... judgements
    end        the budget is met: average bits of the weights, or bytes of the stored model

The per-layer pace of MoQ is a guess made from curvature once; here the loss itself has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a controller aims at, one of the first two, and how it goes there.

    interval: steps from one decision to the next; share: part of the weights that may fall at once
    tolerance: relative growth of the loss that is borne
    """

    average_bits: float | None = None
    target_bytes: int | None = None
    interval: int = 10
    share: float = 0.1
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if (self.average_bits is None) == (self.target_bytes is None):
            raise RecipeError(
                "an adaptive schedule has one budget",
                required="average_bits or target_bytes",
                found="both" if self.average_bits is not None else "neither",
            )
        for name, holds, required in (
            ("average_bits", self.average_bits is None or 1 <= self.average_bits <= 8, "1 to 8"),
            ("target_bytes", self.target_bytes is None or self.target_bytes > 0, "> 0"),
            ("interval", self.interval >= 2, ">= 2 steps"),
            ("share", 0 < self.share <= 1, "above 0, at most 1"),
            ("tolerance", self.tolerance >= 0, ">= 0"),
        ):
            if not holds:
                raise RecipeError(f"{name} of an adaptive schedule", required=required, found=getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A weight that can lose a bit: what that saves, and what it is predicted to cost."""

    fqn: str
    bits: int
    elements: int
    growth: float

    @property
    def price(self) -> float:
        """Growth of the loss for an element's bit; what cannot be predicted comes last."""
        return self.growth / self.elements if math.isfinite(self.growth) else math.inf


@dataclass
class Controller:
    """The loop's memory; `observe` each loss, and when `due()`, `judge` and then `choose`.

    losses: since the last decision; reference: (mean, variance, count) before it; fallen: what fell then
    held: weight -> (decisions left in which it stays, how long the next hold is)
    """

    budget: Budget
    losses: list[float] = field(default_factory=list)
    reference: tuple[float, float, int] | None = None
    fallen: tuple[str, ...] = ()
    held: dict[str, tuple[int, int]] = field(default_factory=dict)

    def observe(self, loss: float) -> None:
        """One step's loss; what is not finite counts as growth without bound."""
        self.losses.append(loss if math.isfinite(loss) else math.inf)

    def due(self) -> bool:
        """Whether enough was seen to decide."""
        return len(self.losses) >= self.budget.interval

    def judge(self) -> tuple[str, ...]:
        """The weights whose last bit is to be given back; empty where the loss has not grown."""
        now = _moments(self.losses)
        grown = self.reference is not None and self._grown(self.reference, now)
        self.losses.clear()
        back, self.fallen = self.fallen if grown else (), ()
        self.held = {fqn: (left - 1, span) for fqn, (left, span) in self.held.items()}
        for fqn in back:
            span = self.held.get(fqn, (0, 1))[1] * 2
            self.held[fqn] = (span, span)
        if not back:  # after a retreat the loss before it stays the measure
            self.reference = now
        return back

    def choose(self, candidates: Sequence[Candidate], excess: float) -> tuple[str, ...]:
        """Weights to lower by a bit. excess: element-bits above the budget; none or less ends the schedule."""
        free = sorted((c for c in candidates if self.held.get(c.fqn, (0, 1))[0] <= 0), key=lambda c: c.price)
        most = max(1, round(self.budget.share * len(candidates)))
        chosen: list[str] = []
        for candidate in free[:most]:
            if excess <= 0:
                break
            chosen.append(candidate.fqn)
            excess -= candidate.elements
        self.fallen = tuple(chosen)
        return self.fallen

    def _grown(self, before: tuple[float, float, int], now: tuple[float, float, int]) -> bool:
        noise = math.sqrt(before[1] / max(before[2], 1) + now[1] / max(now[2], 1))
        return not now[0] - before[0] <= self.budget.tolerance * abs(before[0]) + 2 * noise

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "losses": self.losses,
            "reference": self.reference,
            "fallen": list(self.fallen),
            "held": {fqn: list(span) for fqn, span in self.held.items()},
        }

    def load_json(self, data: Mapping[str, Any]) -> None:
        """Inverse of `to_json`."""
        self.losses = list(data["losses"])
        self.reference = None if data["reference"] is None else tuple(data["reference"])
        self.fallen = tuple(data["fallen"])
        self.held = {fqn: (left, span) for fqn, (left, span) in data["held"].items()}


def _moments(values: Sequence[float]) -> tuple[float, float, int]:
    n = len(values)
    mean = sum(values) / n
    if not math.isfinite(mean):
        return math.inf, 0.0, n
    return mean, sum((v - mean) ** 2 for v in values) / max(n - 1, 1), n
