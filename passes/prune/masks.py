"""What structured and sparse pruning share in training: rules whose masks move when their ramps say so.

    after each optimizer step     course.advance()        what is cut is chosen anew where a ramp says so

What stays is chosen by the weights as they are then, cut ones too, so it may come back while a ramp rises. Scores that
go by gradients are gathered over the last WINDOW steps before each choice: of structures by the sum, over steps, of
what each is worth.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ...runtime.errors import ScheduleError
from ...runtime.store import Store
from ..schedule import Ramp


class Ramped(Protocol):
    """A rule with a ramp."""

    @property
    def ramp(self) -> Ramp:
        """When it cuts."""

    @property
    def whole(self) -> float:
        """The share that goes in the end."""


R = TypeVar("R", bound=Ramped)

# What training may keep beside what is pruned: a mask; or learned scores and how many stay; worth, gathered over steps.
PARTS = ("mask", "score", "stay", "worth")


@dataclass(frozen=True)
class Thinning:
    """What a rule keeps changed after `step` steps: `after` of `total` stay in `parts`, such as "6 groups"."""

    step: int
    kind: str
    before: int
    after: int
    total: int
    parts: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind} in {self.parts}: {self.before} -> {self.after} of {self.total} stay"


class MaskCourse(ABC, Generic[R]):
    """Invariant: the masks in the store are what was chosen at the last move that a ramp has made."""

    PART: ClassVar[str]  # what a rule's masks are of
    WINDOW: ClassVar[int | None] = None  # of how many steps before a choice gradients count, None for all

    def __init__(self, store: Store, rules: Iterable[R]) -> None:
        self.store, self.rules, self.step = store, tuple(rules), 0

    @abstractmethod
    def kind(self, rule: R) -> str:
        """What a rule prunes: "heads, rows"."""

    @abstractmethod
    def parts(self, rule: R) -> int:
        """How many masks it has."""

    @abstractmethod
    def counts(self, rule: R) -> tuple[int, int]:
        """(how many stay now, of how many)."""

    @abstractmethod
    def gather(self, rule: R) -> None:
        """Add to its scores what this step's gradients say, where they go by gradients."""

    @abstractmethod
    def choose(self, rule: R, part: float) -> None:
        """Choose and write its masks at a part of its pruning."""

    @abstractmethod
    def names(self) -> set[str]:
        """All names under which training may keep tensors for this."""

    @abstractmethod
    def learned(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What learned masks go by, in the store, by the name of the count: (how many stay, scores (..., n))."""

    def begin(self) -> list[Thinning]:
        """Before the first step: ramps without an offset move."""
        return self._move()

    @torch.no_grad()
    def restart(self) -> None:
        """From the first step, by the weights as they are now, and with nothing learned yet."""
        self.step = 0
        for name in self.names():
            value = self.store.get(name)
            if isinstance(value, Tensor) and value.is_floating_point():
                value.zero_()
        for rule in self.rules:
            self.choose(rule, 0.0)
        self.begin()

    def advance(self) -> list[Thinning]:
        """One optimizer step is done. Raises ScheduleError where a score wants gradients and there are none.

        A step that fails is not counted: the next one makes its moves.
        """
        self.step += 1
        for rule in self.rules:
            ahead = rule.ramp.until_move(self.step)
            if ahead is not None and (self.WINDOW is None or ahead < self.WINDOW):
                self.gather(rule)
        try:
            return self._move()
        except ScheduleError:
            self.step -= 1
            raise

    def _move(self) -> list[Thinning]:
        found = []
        for rule in self.rules:
            if rule.ramp.moves(self.step):
                before, total = self.counts(rule)
                self.choose(rule, rule.ramp.part(self.step, rule.whole))
                after, _ = self.counts(rule)
                if after != before:
                    found.append(Thinning(self.step, self.kind(rule), before, after, total, self._parts(rule)))
        return found

    def _parts(self, rule: R) -> str:
        n = self.parts(rule)
        return f"{n} {self.PART}{'' if n == 1 else 's'}"

    def describe(self, rule: R) -> str:
        """What a rule prunes, in words: "rows in 6 groups"."""
        return f"{self.kind(rule)} in {self._parts(rule)}"

    def staying(self) -> list[tuple[str, int, int]]:
        """By rule: what it prunes, how many stay now, and of how many."""
        return [(self.describe(rule), *self.counts(rule)) for rule in self.rules]

    def require_settled(self) -> None:
        """Raise ScheduleError where a ramp is not at its end."""
        left = [rule for rule in self.rules if self.step < rule.ramp.last]
        if left:
            last, done = max(rule.ramp.last for rule in left), left[0].ramp.part(self.step, left[0].whole)
            raise ScheduleError(
                "pruning is not at the end of its schedule",
                required=f"{last} steps",
                found=f"{self.step}, at which {self.describe(left[0])} are at {done:.0%}",
                cure="train on, shorten the schedule, or finish(early=True) with what is cut now",
            )

    def require_learned(self) -> None:
        """Raise ScheduleError where scores are all alike, so that the first indices would stay whatever they are."""
        for name, (stay, scores) in self.learned().items():
            if int(stay) < scores.shape[-1] and bool(scores.min() == scores.max()):
                raise ScheduleError(
                    "what stays goes by scores that have learned nothing",
                    required="training steps in which the loss has a gradient by every mask",
                    found=f"{name.replace('_stay', '_score')}: {scores.numel()} equal numbers",
                    cure="train before finish(), with the student's parameters in the optimizer; or choose score l2",
                )

    def on(self, store: Store) -> Self:
        """The same course, to go on by itself on a copy of this one's store."""
        other = copy.copy(self)
        other.store = store
        return other

    def to_json(self) -> dict[str, Any]:
        """Plain data; masks and scores are in the state_dict."""
        return {
            "step": self.step,
            "names": sorted(self.names()),
            "stay": {name: int(count) for name, (count, _) in self.learned().items()},
        }

    def load_json(self, data: Mapping[str, Any]) -> None:
        """Inverse of `to_json`. Raises ScheduleError where it is another model's or recipe's."""
        if data["names"] != sorted(self.names()):
            raise ScheduleError(
                "the saved pruning is of another model or recipe",
                required="the same masks",
                found="others",
                cure="prepare the model with the recipe of the run that is resumed",
            )
        self.step = data["step"]
        for name, (count, _) in self.learned().items():
            count.fill_(data["stay"][name])


def no_gradients(score: str, step: int) -> ScheduleError:
    """For a score that goes by gradients where there were none."""
    return ScheduleError(
        f"pruning by {score} goes by gradients, and there were none before step {step}",
        required="step() before optimizer.zero_grad(), and an offset of at least 1",
        found="none",
    )
