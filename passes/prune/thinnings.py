"""All pruning of one model in training: of groups, and of numbers within weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .course import PruneCourse
from .masks import Thinning
from .sparsify import SparseCourse


@dataclass(frozen=True, eq=False)
class Thinnings:
    """Structured and sparse pruning, as far as there is any."""

    pruning: PruneCourse | None = None
    sparsity: SparseCourse | None = None

    @property
    def courses(self) -> tuple[PruneCourse | SparseCourse, ...]:
        """Those there are."""
        return tuple(course for course in (self.pruning, self.sparsity) if course is not None)

    def begin(self) -> list[Thinning]:
        """Before the first step."""
        found: list[Thinning] = []
        for course in self.courses:
            found += course.begin()
        return found

    def advance(self) -> list[Thinning]:
        """One optimizer step is done."""
        found: list[Thinning] = []
        for course in self.courses:
            found += course.advance()
        return found

    def require_settled(self) -> None:
        """Raise ScheduleError where a ramp is not at its end."""
        for course in self.courses:
            course.require_settled()

    def staying(self) -> list[tuple[str, int, int]]:
        """By rule: what it prunes, how many stay now, and of how many."""
        return [row for course in self.courses for row in course.staying()]

    def names(self) -> set[str]:
        """All names under which training may keep tensors for this."""
        return {name for course in self.courses for name in course.names()}

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [course.to_json() for course in self.courses]

    def load_json(self, data: list[Mapping[str, Any]]) -> None:
        """Inverse of `to_json`. Raises ScheduleError where it is another model's or recipe's."""
        for course, state in zip(self.courses, data, strict=True):
            course.load_json(state)
