"""Zeros in weights, as a recipe writes them down."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..passes.prune.sparse import Pattern, SparseScore
from ..passes.prune.sparsify import SparseRule
from .ramps import RampSettings
from .strict import Strict, globs, regular


class SparsifyEntry(Strict):
    """One rule of zeros in weights, which keep their shapes. Later rules override earlier ones.

    ratio: of zeros; of N:M it is 1 - N / M, and may be left out
    pattern: "unstructured", blocks of rows x columns "4x1", or N of every M inputs "2:4"
    score: what stays, of the largest: |w|, or in training "movement" (learned) or "snip_momentum" (|w g| over steps)
    budget: each weight gives its share, or the least of the whole network go
    modules: globs over module paths, all where there are neither they nor patterns: regular expressions searched for in
        them; exclude: of those, what stays as it is
    """

    ratio: float | None = Field(default=None, gt=0, lt=1)
    pattern: str = "unstructured"
    score: SparseScore = "l1"
    budget: Literal["layer", "network"] = "layer"
    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    operators: tuple[Literal["linear", "conv1d", "conv2d"], ...] = Field(
        default=("linear", "conv1d", "conv2d"), min_length=1
    )
    schedule: RampSettings = RampSettings()

    @field_validator("modules", "patterns", "exclude", "operators", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("patterns", "exclude")
    @classmethod
    def _regular(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return regular(value)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.rule()
        return self

    def rule(self) -> SparseRule:
        """As the pass takes it."""
        pattern, ratio = Pattern.parse(self.pattern), self.ratio
        if pattern.kind == "n:m":
            ratio = 1 - pattern.n / pattern.m if ratio is None else ratio
            if not math.isclose(ratio, 1 - pattern.n / pattern.m):
                raise ValueError(f"pattern {pattern} has a ratio of {1 - pattern.n / pattern.m:g} and no other")
        if ratio is None:
            raise ValueError("zeros need a ratio, or a pattern such as 2:4 that has one")
        return SparseRule(
            ratio=ratio,
            pattern=pattern,
            score=self.score,
            budget=self.budget,
            modules=globs(self.modules, self.patterns),
            patterns=self.patterns,
            exclude=self.exclude,
            operators=self.operators,
            ramp=self.schedule.ramp(),
        )
