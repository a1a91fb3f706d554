"""Which layers stay, as a recipe writes it down."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ..passes.depth import DepthRule, Spread
from .strict import Strict


class DepthEntry(Strict):
    """The layers of one row of blocks that stay.

    keep_layers: their numbers; or keep: how many of them, chosen by spread: `even` the last of each of so many equal
        parts (1, 3, 5 of 6), `ends` from the first to the last, the `first` or the `last`
    row: the path of the blocks, such as "encoder.layer"; needed where a model has several
    """

    row: str | None = None
    keep_layers: tuple[int, ...] | None = None
    keep: int | None = Field(default=None, ge=1)
    spread: Spread = "even"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.keep is None) == (self.keep_layers is None):
            raise ValueError("either keep or keep_layers")
        return self

    def rule(self) -> DepthRule:
        """As the pass takes it."""
        layers = self.keep_layers if self.keep_layers is not None else self.keep
        assert layers is not None
        return DepthRule(layers=layers, row=self.row, spread=self.spread)
