"""What is cut, as a recipe writes it down."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ..passes.prune.decide import PruneRule, Target
from ..passes.prune.groups import KINDS
from ..passes.prune.groups import Kind as Groups
from ..passes.prune.named import Side
from ..passes.prune.score import Method as Importance
from .ramps import RampSettings
from .strict import Strict, globs, regular

Share = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[
    Annotated[Share, Tag("each")] | Annotated[tuple[Share, Share], Tag("first, last")],
    Discriminator(lambda value: "first, last" if isinstance(value, list | tuple) else "each"),
]


class PruneEntry(Strict):
    """One pruning rule. Later rules override earlier ones; a group that no rule selects stays.

    ratio: of each group's indices, what goes; a pair is that of the first layer and of the last, and those between
        lie on a line; or target: what may be left of the model, {"params": 0.5}
    budget: each group gives the ratio, or all together: of the numbers they hold, least scores over their groups' means
        first
    scopes: kinds of groups
    modules: globs over the paths of modules that a group cuts, all of them unless there are patterns: regular
        expressions searched for in them
    side: which side of the modules that are named is meant; then an error where one has no such group there. The
        rows of a linear are its outputs, the heads of an attention the inputs of its output projection
    num_heads, related: expectations, compared with the graph: how many heads each attention has, and modules (regular
        expressions) that are cut together with those that are named
    section: its patterns may not choose one module twice, nor its entries one group
    inner: also what lies inside another prunable dimension: the size of a head
    multiple: of it widths are kept; least: a group with fewer indices stays
    schedule: in training, when; compress() prunes at once
    """

    ratio: Ratio | None = None
    target: dict[Target, Annotated[float, Field(gt=0, le=1)]] | None = Field(default=None, min_length=1, max_length=1)
    budget: Literal["layer", "network"] = "layer"
    scopes: tuple[Groups, ...] = Field(default=KINDS, min_length=1)
    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    patterns: tuple[str, ...] = ()
    side: Side = "any"
    num_heads: int | None = Field(default=None, ge=1)
    related: tuple[str, ...] = ()
    section: str = ""
    score: Importance = "l2"
    inner: bool = False
    multiple: int = Field(default=1, ge=1)
    least: int = Field(default=2, ge=2)
    schedule: RampSettings = RampSettings()

    @field_validator("modules", "patterns", "related", "scopes", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("patterns", "related")
    @classmethod
    def _regular(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return regular(value)

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.ratio is None) == (self.target is None):
            raise ValueError("a pruning rule has a ratio or a target, and not both")
        if self.budget == "network" and not isinstance(self.ratio, float):
            raise ValueError("a budget of the network is one ratio")
        if self.score == "routed" and self.scopes != ("experts",):
            raise ValueError("routed mass is a score of experts alone: give it with scopes: experts")
        return self

    def rule(self, seed: int) -> PruneRule:
        """As the pass takes it."""
        return PruneRule(
            ratio=self.ratio or 0.0,
            target=None if self.target is None else next(iter(self.target.items())),
            budget=self.budget,
            kinds=self.scopes,
            modules=globs(self.modules, self.patterns),
            patterns=self.patterns,
            side=self.side,
            num_heads=self.num_heads,
            related=self.related,
            section=self.section,
            score=self.score,
            inner=self.inner,
            multiple=self.multiple,
            least=self.least,
            seed=seed,
            ramp=self.schedule.ramp(),
        )
