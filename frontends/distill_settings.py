"""What a student learns from its teacher and when, as a recipe writes it down."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..runtime.errors import RecipeError
from .strict import Strict

Loss = Literal["mse", "cosine"]

# Parts of the loss, by the names of their weights.
PARTS = ("task", "logits", "hidden", "scores", "taps")


class HiddenSettings(Strict):
    """The residual stream where blocks end, and where the first begins: `mse`, or 1 - `cosine`, summed over blocks.

    layers: of the teacher, one for each of the student's; as said in `DistillSettings` where absent
    row: path of the student's blocks; all outermost rows where absent. embeddings: also what goes into the first block
    """

    weight: float = Field(default=1.0, ge=0)
    loss: Loss = "mse"
    layers: tuple[int, ...] | None = None
    row: str | None = None
    embeddings: bool = True


class ScoreSettings(Strict):
    """Attention before the softmax, (B, H, queries, keys): mean squared error where a query may look, summed."""

    weight: float = Field(default=1.0, ge=0)
    layers: tuple[int, ...] | None = None
    row: str | None = None


class TapSettings(Strict):
    """One more value: the output of the module `student` against that of the teacher's module of that path."""

    student: str
    teacher: str | None = None
    loss: Loss = "mse"
    weight: float = Field(default=1.0, ge=0)


class StageSettings(Strict):
    """Factors on the parts of the loss before optimizer step `until`; of the last stage there is no end."""

    until: int | None = Field(default=None, ge=1)
    task: float = Field(default=1.0, ge=0)
    logits: float = Field(default=1.0, ge=0)
    hidden: float = Field(default=1.0, ge=0)
    scores: float = Field(default=1.0, ge=0)
    taps: float = Field(default=1.0, ge=0)


class DistillSettings(Strict):
    """How a student learns from a teacher: the sum of what has a weight.

        task L_task + kd_weight (logits L_logits + hidden L_hidden + scores L_scores + taps L_taps)

    task: of the loss that the model computes itself, from labels; logits: of the divergence at `temperature`
    hidden, scores: a weight, or settings. Teacher's layers belong to student's by themselves: each layer that stayed
        to the one it was; of a teacher of another depth each to the last of as many equal parts
    kd_until: the optimizer step from which the task's loss is alone (early-stopped distillation)
    stages: of other factors; or a number: 1 all at once; 2 within (hidden, scores, taps), then logits; 3 within,
        then everything, then logits. They divide the `total_steps` given to `prepare` evenly
    """

    task: float = Field(default=1.0, ge=0)
    kd_weight: float = Field(default=1.0, ge=0)
    kd_until: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    logits: float = Field(default=1.0, ge=0)
    hidden: HiddenSettings | None = None
    scores: ScoreSettings | None = None
    taps: tuple[TapSettings, ...] = ()
    stages: tuple[StageSettings, ...] | Literal[1, 2, 3] = 1

    @field_validator("hidden", "scores", mode="before")
    @classmethod
    def _weight_alone(cls, value: Any) -> Any:
        return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fits(self) -> DistillSettings:
        if self.kd_until is not None and self.task == 0:
            raise ValueError("a task of more than 0, which is all there is from kd_until on")
        if not isinstance(self.stages, int):
            ends = [stage.until for stage in self.stages]
            if not ends or None in ends[:-1] or ends[-1] is not None:
                raise ValueError("stages that say until when, all but the last")
            if any(a >= b for a, b in pairwise(end for end in ends if end is not None)):
                raise ValueError("stages that end one after the other")
        return self

    @property
    def within(self) -> bool:
        """Whether anything inside of the models is compared."""
        return bool(self.hidden or self.scores or self.taps)

    def staged(self, total_steps: int | None) -> tuple[StageSettings, ...]:
        """The stages with their ends.

        Raises RecipeError for a number of them without `total_steps`, for an end after those, and for a stage in which
        nothing counts.
        """
        stages = self._divided(total_steps)
        ends = [stage.until for stage in stages if stage.until is not None]
        late = [end for end in (*ends, self.kd_until or 0) if total_steps is not None and end >= total_steps]
        if late:
            raise RecipeError(
                "distillation has a part that would never begin",
                required=f"stages that end, and a kd_until, before total_steps={total_steps}",
                found=late[0],
                cure="leave it out, or train for longer",
            )
        if not all(any(self._counts(stage, self.kd_weight).values()) for stage in stages):
            raise RecipeError(
                "distillation has a stage in which nothing counts",
                required=f"a weight above 0 for one of {', '.join(PARTS)}",
                found="; ".join(str(self._counts(stage, self.kd_weight)) for stage in stages),
                cure="give hidden, scores or taps for what is learned within, or logits, or task",
            )
        return stages

    def _divided(self, total_steps: int | None) -> tuple[StageSettings, ...]:
        if not isinstance(self.stages, int):
            return self.stages
        if self.stages == 1:
            return (StageSettings(),)
        if total_steps is None or total_steps < self.stages:
            raise RecipeError(
                f"distillation in {self.stages} stages",
                required="how many optimizer steps there are, to divide them",
                found=total_steps,
                cure="prepare(..., total_steps=1000), or stages: [{until: 500, logits: 0, task: 0}, {hidden: 0}]",
            )
        inside = {"task": 0.0, "logits": 0.0}
        outside = {"hidden": 0.0, "scores": 0.0, "taps": 0.0}
        parts = (inside, outside) if self.stages == 2 else (inside, {}, outside)
        ends = [total_steps * (i + 1) // self.stages for i in range(self.stages - 1)]
        return tuple(StageSettings(until=end, **factors) for end, factors in zip((*ends, None), parts, strict=True))

    def weights(self, step: int, stages: tuple[StageSettings, ...]) -> dict[str, float]:
        """What each part counts for at optimizer step `step`, from 0."""
        stage = next(s for s in stages if s.until is None or step < s.until)
        return self._counts(stage, 0.0 if self.kd_until is not None and step >= self.kd_until else self.kd_weight)

    def _counts(self, stage: StageSettings, kd: float) -> dict[str, float]:
        return {
            "task": self.task * stage.task if kd else self.task,
            "logits": kd * self.logits * stage.logits,
            "hidden": kd * stage.hidden * (self.hidden.weight if self.hidden else 0.0),
            "scores": kd * stage.scores * (self.scores.weight if self.scores else 0.0),
            "taps": kd * stage.taps * bool(self.taps),
        }
