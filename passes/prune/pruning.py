"""All pruning of one model in training: of groups, and of numbers within weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import RecipeError
from ...runtime.model import flat_outputs
from ...runtime.program import Program
from .course import PruneCourse
from .masks import Thinning
from .sparsify import SparseCourse


@dataclass(frozen=True, eq=False)
class Pruning:
    """Structured and sparse pruning, as far as there is any."""

    structured: PruneCourse | None = None
    sparse: SparseCourse | None = None

    @property
    def courses(self) -> tuple[PruneCourse | SparseCourse, ...]:
        """Those there are."""
        return tuple(course for course in (self.structured, self.sparse) if course is not None)

    def require_apart(self) -> None:
        """Raise RecipeError where a weight is to be cut and to get zeros: what is left would have others."""
        if self.structured is None or self.sparse is None:
            return
        cut = self.structured.cuts()
        both = [weight.fqn for own in self.sparse.weights.values() for weight in own if weight.fqn in cut]
        if both:
            raise RecipeError(
                f"{len(both)} weights are to be pruned and to get zeros in one training",
                required="rules of prune and sparsify that concern different weights",
                found=", ".join(both[:3]) + (" ..." if len(both) > 3 else ""),
                cure="give modules= to either",
            )

    def require_reached(self, program: Program, tensors: Sequence[Tensor]) -> None:
        """Raise RecipeError where no output of the masked graph has a gradient by scores that are to be learned."""
        learned = {name: held for course in self.courses for name, held in course.learned().items()}
        scores = {name.replace("_stay", "_score"): score for name, (_, score) in learned.items()}
        if not scores:
            return
        with program.unwritten():
            floating = [t for t in flat_outputs(program.run(tensors)) if t.requires_grad]
            found = torch.autograd.grad([t.sum() for t in floating], list(scores.values()), allow_unused=True)
        lost = [name for name, gradient in zip(scores, found, strict=True) if gradient is None]
        if lost:
            raise RecipeError(
                "pruning by movement is learned, and these masks have no gradient",
                required="outputs that change smoothly with what is masked",
                found=", ".join(lost[:3]) + (" ..." if len(lost) > 3 else ""),
                cure="another score for this rule (experts: routed, in compress()), or leave the modules out",
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

    def require_learned(self) -> None:
        """Raise ScheduleError where what stays goes by scores that have learned nothing."""
        for course in self.courses:
            course.require_learned()

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
