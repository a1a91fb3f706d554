"""How many bits a weight has, and what part of a pruning is done, at each step of training: pure values, no tensors.

    q           completed optimizer steps since `offset`; before that nothing is quantised or cut
    left(t)     of the way at q = t length      linear 1 - t      cosine (1 + cos(pi t)) / 2      cubic (1 - t)^3

    constant    target bits
    moq         start bits, one less when q >= T; then T <- 2 T f         so drops are at q = P, 2 P f, 4 P f^2, ...
    gliding     target + ceil((start - target) left)
    mixing      r = max(0, 1 - c (q - q_drop)): the part of the weight that is still float after a drop
    ramp        1 - left, in moves `every` steps apart: what is cut of what will be (cubic: Zhu & Gupta 2017,
                arXiv 1710.01878, equation 1); exponential: (1 - (1 - s)^t) / s, s the share that is cut in the end

P is the period, f = 1 + floor(4 lambda / lambda_max) a layer's factor by curvature. MoQ as in DeepSpeed 0.19.6
(runtime/quantize.py): a period of 0 drops a bit at every step. There c counts down one number for all layers, here
one a layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..runtime.errors import RecipeError

FULL = 32  # bits of a weight that is not quantised yet

Shape = Literal["linear", "cosine", "cubic"]

# What is left of the way at a part t of the time.
_LEFT: dict[Shape, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "cubic": lambda t: (1 - t) ** 3,
}
SHAPES: tuple[Shape, ...] = get_args(Shape)
RampShape = Literal[Shape, "exponential"]


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
    """From start to target within `length` steps: evenly, slow at both ends, or quick at first."""

    length: int = 1000
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.length >= 1, "length", ">= 1 step", self.length)

    def last(self, target: int, factor: int = 1) -> int:
        return self.offset + self.length + self._mixed_out()

    def _after(self, now: Precision, target: int, q: int, factor: int) -> Precision:
        left = _LEFT[self.shape](min(q, self.length) / self.length)
        # Rounding of a part of the way must not keep the last bit.
        return replace(now, bits=target + math.ceil((self.start_bits - target) * left - 1e-9))


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """How a pruning comes about: nothing before `offset`, all of it `length` steps later, moves `every` steps apart."""

    offset: int = 0
    length: int = 0
    every: int = 1
    shape: RampShape = "cubic"

    def __post_init__(self) -> None:
        _require(self.offset >= 0, "offset", ">= 0", self.offset)
        _require(self.length >= 0, "length", ">= 0 steps", self.length)
        _require(self.every >= 1, "every", ">= 1 step", self.every)

    @property
    def last(self) -> int:
        """The step of the last move."""
        return self.offset + self.length

    def part(self, step: int, whole: float) -> float:
        """After `step` steps: 0 to 1 of a pruning that cuts a share `whole` in the end."""
        q = step - self.offset
        if q < 0 or q >= self.length:
            return float(q >= 0)
        t = (q - q % self.every) / self.length
        if self.shape == "exponential":
            return (1 - (1 - whole) ** t) / whole if whole else 1.0
        return 1 - _LEFT[self.shape](t)

    def moves(self, step: int) -> bool:
        """Whether what is cut is chosen anew after `step` steps."""
        q = step - self.offset
        return q == self.length or (0 <= q < self.length and q % self.every == 0)

    def until_move(self, step: int) -> int | None:
        """Steps from `step` to the next move; None after the last."""
        if step > self.last:
            return None
        if step <= self.offset:
            return self.offset - step
        return min(self.last - step, -(step - self.offset) % self.every)


AT_A_STROKE = Ramp()
