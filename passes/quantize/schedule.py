"""How many bits a weight has at each step of training: pure values, no tensors.

    q        completed optimizer steps since `offset`; before that the weight is in full precision
    constant    target bits
    moq         start bits, one less when q >= T; then T <- 2 T f         so drops are at q = P, 2 P f, 4 P f^2, ...
    linear      start - floor((start - target) q / length)
    cosine      target + ceil((start - target) (1 + cos(pi q / length)) / 2)
    mixing      r = max(0, 1 - c (q - q_drop)): the part of the weight that is still float after a drop

P is the period, f = 1 + floor(4 lambda / lambda_max) a layer's factor by curvature. MoQ as in DeepSpeed 0.19.6
(runtime/quantize.py): a period of 0 drops a bit at every step. There c counts down one number for all layers, here
one a layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...runtime.errors import RecipeError

FULL = 32  # bits of a weight that is not quantised yet


def _require(holds: bool, what: str, required: str, found: object) -> None:
    if not holds:
        raise RecipeError(f"{what} of a schedule", required=required, found=found)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Where one weight is on its schedule.

    bits: FULL before the offset; mix: the part of the weight that is still float
    due: q of the next drop (MoQ); dropped: q of the last one
    """

    bits: int = FULL
    mix: float = 0.0
    due: float = 0
    dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """offset: steps in full precision first; change: c of the mixing, 0 for none."""

    offset: int = 0
    change: float = 0.0

    def __post_init__(self) -> None:
        _require(self.offset >= 0, "offset", ">= 0", self.offset)
        _require(0 <= self.change <= 1, "mixing's change per step", "0 to 1", self.change)

    def check(self, target: int) -> None:
        """Raise RecipeError where `target` bits cannot be reached from the start."""
        return

    def begin(self, target: int) -> Precision:
        """Before the first step."""
        return self._active(target) if self.offset == 0 else Precision()

    def advance(self, now: Precision, target: int, step: int, factor: int = 1) -> Precision:
        """After `step` completed steps, each counted from 1; steps are passed one by one."""
        if step < self.offset:
            return now
        if now.bits == FULL:
            return self._active(target)
        after = self._after(now, target, step - self.offset, factor)
        if after.bits != now.bits:
            after = replace(after, dropped=step - self.offset)
        if self.change == 0:
            return after
        return replace(after, mix=max(0.0, 1.0 - self.change * (step - self.offset - after.dropped)))

    def drops(self, target: int, steps: int, factor: int = 1) -> Iterator[tuple[int, int]]:
        """(step, bits) of every change within `steps` steps; the first is that at which quantisation begins."""
        now = self.begin(target)
        if now.bits != FULL:
            yield 0, now.bits
        for step in range(1, steps + 1):
            after = self.advance(now, target, step, factor)
            if after.bits != now.bits:
                yield step, after.bits
            now = after

    def settled(self, now: Precision, target: int) -> bool:
        """Whether nothing changes any more."""
        return now.bits == target and now.mix == 0

    @abstractmethod
    def last(self, target: int, factor: int = 1) -> int:
        """The step at which the target is reached and no float is left."""

    @abstractmethod
    def _active(self, target: int) -> Precision:
        """At q = 0."""

    @abstractmethod
    def _after(self, now: Precision, target: int, q: int, factor: int) -> Precision:
        """At q >= 1, given the state one step before."""

    def _mixed_out(self) -> int:
        return math.ceil(1 / self.change) if self.change else 0


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The target's bits from the offset on."""

    def last(self, target: int, factor: int = 1) -> int:
        return self.offset + self._mixed_out()

    def _active(self, target: int) -> Precision:
        return Precision(bits=target, mix=1.0 if self.change else 0.0)

    def _after(self, now: Precision, target: int, q: int, factor: int) -> Precision:
        return now


AT_ONCE = Constant()


@dataclass(frozen=True, kw_only=True)
class Falling(Schedule):
    """From `start_bits` down."""

    start_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(2 <= self.start_bits <= 16, "start_bits", "2 to 16", self.start_bits)

    def check(self, target: int) -> None:
        if self.start_bits < target:
            raise RecipeError(
                "a schedule that rises",
                required=f"start_bits of at least the target's {target}",
                found=self.start_bits,
                cure="give more start_bits, or a target with fewer bits",
            )

    def _active(self, target: int) -> Precision:
        return Precision(bits=self.start_bits, mix=1.0 if self.change else 0.0)


@dataclass(frozen=True, kw_only=True)
class MoQ(Falling):
    """Mixture-of-quantization: the period doubles with each drop, and is stretched by the layer's factor."""

    period: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.period >= 0, "period", ">= 0 steps", self.period)

    def last(self, target: int, factor: int = 1) -> int:
        count = self.start_bits - target
        if count == 0:
            return self.offset + self._mixed_out()
        due = count if self.period == 0 else max(math.ceil(self.period * (2 * factor) ** (count - 1)), count)
        return self.offset + due + self._mixed_out()

    def _active(self, target: int) -> Precision:
        return replace(super()._active(target), due=self.period)

    def _after(self, now: Precision, target: int, q: int, factor: int) -> Precision:
        if now.bits == target or q < now.due:
            return now
        return replace(now, bits=now.bits - 1, due=2 * now.due * factor)


@dataclass(frozen=True, kw_only=True)
class Held(Falling):
    """Start bits until a controller lowers them (`adaptive`)."""

    def last(self, target: int, factor: int = 1) -> int:
        return self.offset

    def settled(self, now: Precision, target: int) -> bool:
        return now.bits != FULL

    def _after(self, now: Precision, target: int, q: int, factor: int) -> Precision:
        return now


@dataclass(frozen=True, kw_only=True)
class Gliding(Falling):
    """From start to target within `length` steps."""

    length: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.length >= 1, "length", ">= 1 step", self.length)

    def last(self, target: int, factor: int = 1) -> int:
        return self.offset + self.length + self._mixed_out()


@dataclass(frozen=True, kw_only=True)
class Linear(Gliding):
    """Equal steps of time between drops."""

    def _after(self, now: Precision, target: int, q: int, factor: int) -> Precision:
        fallen = (self.start_bits - target) * min(q, self.length) // self.length
        return replace(now, bits=self.start_bits - fallen)


@dataclass(frozen=True, kw_only=True)
class Cosine(Gliding):
    """Slow at both ends."""

    def _after(self, now: Precision, target: int, q: int, factor: int) -> Precision:
        left = (1 + math.cos(math.pi * min(q, self.length) / self.length)) / 2
        # Rounding of cos must not keep the last bit.
        return replace(now, bits=target + math.ceil((self.start_bits - target) * left - 1e-9))
