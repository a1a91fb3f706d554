"""Which layers stay, as a recipe writes it down."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ..passes.depth import By, DepthRule, Measure, Spread
from .strict import Strict


class DepthEntry(Strict):
    """The layers of one row of blocks that stay.

    keep_layers: their numbers; or keep: how many of them, chosen by spread: `even` the last of each of so many equal
        parts (1, 3, 5 of 6), `ends` from the first to the last, the `first` or the `last`
    by: chosen by what calibration data says: `influence` of each layer on what goes through it, `change` of what the
        model gives without each, or `greedy`, one by one; measure: of a change: of the whole `output`, the divergence
        of `logits`, or the `loss`
    max_change: with greedy, the most that may change; then keep is the least that stay, and may be left out
    row: the path of the blocks, such as "encoder.layer"; needed where a model has several
    """

    row: str | None = None
    keep_layers: tuple[int, ...] | None = None
    keep: int | None = Field(default=None, ge=1)
    spread: Spread = "even"
    by: By | None = None
    measure: Measure = "output"
    max_change: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = self.model_fields_set
        if self.max_change is not None and self.by != "greedy":
            raise ValueError("max_change beside by: greedy alone")
        if "measure" in given and self.by not in ("change", "greedy"):
            raise ValueError("measure beside by: change or by: greedy alone")
        if self.by is not None and ("spread" in given or self.keep_layers is not None):
            raise ValueError("by in place of spread and of keep_layers")
        if self.max_change is None and (self.keep is None) == (self.keep_layers is None):
            raise ValueError("either keep or keep_layers")
        return self

    def rule(self) -> DepthRule:
        """As the pass takes it."""
        return DepthRule(
            layers=self.keep_layers if self.keep_layers is not None else self.keep or 1,
            row=self.row,
            spread=self.spread,
            by=self.by,
            measure=self.measure,
            max_change=self.max_change,
        )
