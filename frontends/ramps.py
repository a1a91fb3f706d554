"""When training prunes, as a recipe writes it down."""

from __future__ import annotations

from pydantic import Field

from ..passes.schedule import Ramp, RampShape
from .strict import Strict, fields


class RampSettings(Strict):
    """When training prunes: nothing before step `offset`, all of it `length` steps later.

    type: how in between, cubic being quickest at first (Zhu & Gupta 2017), exponential as snip_momentum has it
    every: steps from one choice of what is cut to the next
    """

    type: RampShape = "cubic"
    offset: int = Field(default=0, ge=0)
    length: int = Field(default=0, ge=0)
    every: int = Field(default=1, ge=1)

    def ramp(self) -> Ramp:
        """As the pass takes it."""
        return Ramp(shape=self.type, **fields(self))
