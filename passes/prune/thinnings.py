"""All pruning of one model in training: of groups, and of numbers within weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...runtime.errors import RecipeError
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

    def require_apart(self) -> None:
        """Raise RecipeError where a weight is to be cut and to get zeros: what is left would have others."""
        if self.pruning is None or self.sparsity is None:
            return
        cut = self.pruning.cuts()
        both = [weight.fqn for own in self.sparsity.weights.values() for weight in own if weight.fqn in cut]
        if both:
            raise RecipeError(
                f"{len(both)} weights are to be pruned and to get zeros in one training",
                required="rules of prune and sparsify that concern different weights",
                found=", ".join(both[:3]) + (" ..." if len(both) > 3 else ""),
                cure="give modules= to either",
            )

    def restart(self) -> None:
        """From the first step, by the weights as they are now."""
        for course in self.courses:
            course.restart()

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
