"""The parts of a recipe, as they are written down; each turns itself into the value that a pass takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..passes import schedule as schedules
from ..passes.block_training import Training
from ..passes.quantize.adaptive import Budget
from ..passes.quantize.decide import QuantizeRule
from ..passes.quantize.observers import Method, Observer
from ..passes.schedule import SHAPES, Schedule, Shape
from ..runtime.errors import SchemeError
from ..runtime.plan import WeightMethod
from ..runtime.scheme import SIZED, Granularity, Kind, Rounding, Scheme
from .strict import Strict, fields, globs

Operators = Literal["linear", "embedding", "conv1d", "conv2d"]


class ConstantSettings(Strict):
    """The recipe's own bits from step `offset` on."""

    type: Literal["constant"]
    offset: int = 0
    change: float = 0.0

    def schedule(self) -> Schedule:
        """As the pass takes it."""
        return schedules.Constant(**fields(self))


class MoQSettings(Strict):
    """One bit less at `period`, 2 `period`, 4 `period` ... steps; `change` of the float is mixed out at each step."""

    type: Literal["moq"]
    start_bits: int = 16
    period: int | float = 100
    offset: int = 0
    change: float = 0.0

    def schedule(self) -> Schedule:
        """As the pass takes it."""
        return schedules.MoQ(**fields(self))


class GlidingSettings(Strict):
    """From `start_bits` to the recipe's own in `length` steps: evenly, slow at both ends, or quick at first."""

    type: Shape
    start_bits: int = 16
    length: int
    offset: int = 0
    change: float = 0.0

    def schedule(self) -> Schedule:
        """As the pass takes it."""
        return schedules.Gliding(shape=self.type, **fields(self))


class AdaptiveSettings(Strict):
    """The next bit falls where the loss is predicted to grow least, until a budget is met.

    The recipe's own bits are the least that a weight may have.
    """

    type: Literal["adaptive"]
    start_bits: int = 8
    average_bits: float | None = None
    target_bytes: int | None = None
    offset: int = 0
    interval: int = 10
    share: float = 0.1
    tolerance: float = 0.05

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        self.budget()
        return self

    def schedule(self) -> Schedule:
        """A weight's own part: start bits from `offset` on; the controller lowers them."""
        return schedules.Held(offset=self.offset, start_bits=self.start_bits)

    def budget(self) -> Budget:
        """The controller's part. Raises RecipeError without one budget."""
        names = ("average_bits", "target_bytes", "interval", "share", "tolerance")
        return Budget(**{name: getattr(self, name) for name in names})


ScheduleSettings = Annotated[
    ConstantSettings | MoQSettings | GlidingSettings | AdaptiveSettings, Field(discriminator="type")
]


# By the `type` that names them.
SCHEDULES: dict[str, type[Strict]] = {
    "constant": ConstantSettings,
    "moq": MoQSettings,
    **dict.fromkeys(SHAPES, GlidingSettings),
    "adaptive": AdaptiveSettings,
}


class SensitivitySettings(Strict):
    """How curvature is measured, and how often.

    method: "eigenvalue" by power iteration (MoQ), or "trace" by Hutchinson's estimator, which is cheaper
    blocks: prefix of the blocks' names ("bert.encoder.layer"), found by itself where absent
    every: steps between measurements
    """

    method: Literal["eigenvalue", "trace"] = "eigenvalue"
    blocks: str | None = None
    every: int = Field(default=1, ge=1)
    iterations: int = Field(default=100, ge=1)
    tolerance: float = Field(default=1e-2, gt=0)
    stability: float = Field(default=1e-6, ge=0)
    samples: int = Field(default=8, ge=1)
    seed: int = 0


class LayerwiseSettings(Strict):
    """How each block is trained by itself to give what the teacher's gives: AdamW at a constant learning rate.

    steps: for each block; weight_decay: not of biases and norms; seed: of the order of batches
    """

    steps: int = Field(default=100, ge=1)
    lr: float = Field(default=5e-6, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    seed: int = 0

    def training(self) -> Training:
        """As the pass takes it."""
        return Training(steps=self.steps, lr=self.lr, weight_decay=self.weight_decay, seed=self.seed)


class WeightSettings(Strict):
    """How weights are stored: per output channel, or per `group_size` neighbours in a row.

    groups: number of scales a weight has, as DeepSpeed's quantize_groups counts
    rounding: while training; a finished weight is rounded to nearest. learned: the scale is trained (LSQ)
    method: of linear layers after training: to the nearest code, or by calibration data: "gptq", "awq"
    """

    bits: int = 8
    kind: Kind = "symmetric"
    granularity: Granularity | None = None
    group_size: int | None = None
    groups: int | None = Field(default=None, ge=1)
    rounding: Rounding = "nearest"
    learned: bool = False
    method: WeightMethod = "nearest"

    def scheme(self) -> Scheme:
        """As the runtime's value; of `groups` scales once the weight's shape is known. Raises SchemeError."""
        granularity = self.granularity or ("group" if self.group_size else "channel")
        if self.bits > 8 or granularity in ("token", "image"):
            raise SchemeError(
                "weights",
                required="at most 8 bits, one scale per tensor, channel or group",
                found=f"{self.bits} bits per {granularity}",
                cure="a schedule may start_bits at 16 on its way; leave out what is to stay wider than 8 bits",
            )
        if self.groups is not None and (self.granularity is not None or self.group_size is not None):
            raise SchemeError(
                "groups counts a weight's scales", required="no granularity or group_size beside it", found=self.groups
            )
        if self.learned and self.kind != "symmetric":
            raise SchemeError("a learned scale", required="kind 'symmetric'", found=repr(self.kind))
        if self.learned and self.rounding != "nearest":
            raise SchemeError("a learned scale", required="rounding 'nearest'", found=repr(self.rounding))
        if self.method != "nearest" and (self.kind not in ("symmetric", "asymmetric") or self.rounding != "nearest"):
            raise SchemeError(
                f"method {self.method!r}",
                required="kind 'symmetric' or 'asymmetric', and rounding 'nearest'",
                found=f"kind {self.kind!r}, rounding {self.rounding!r}",
                cure="method 'nearest'; ternary and binary weights want training",
            )
        if self.method != "nearest" and self.learned:
            raise SchemeError("a learned scale", required="method 'nearest'", found=repr(self.method))
        return Scheme(
            bits=self.bits,
            kind=self.kind,
            granularity=granularity,
            group_size=self.group_size,
            rounding=self.rounding,
        )


class ActivationSettings(Strict):
    """How activations are quantised: "dynamic" on each call (per token, or per image), or "static" per tensor.

    "learned" is static with a scale that is trained (LSQ); without training it is static. offset: training steps
    before they are
    smooth: SmoothQuant's alpha, of linear layers after training: how much of the activation's size moves to the weight
    """

    bits: int = 8
    kind: Kind = "symmetric"
    range: Literal["dynamic", "static", "learned"] = "dynamic"
    granularity: Granularity | None = None
    offset: int = Field(default=0, ge=0)
    smooth: float | None = Field(default=None, ge=0, le=1)

    def scheme(self) -> Scheme:
        """As the runtime's value. Raises SchemeError on a contradiction."""
        granularity = self.granularity or ("token" if self.range == "dynamic" else "tensor")
        if self.range != "dynamic" and granularity != "tensor":
            raise SchemeError(
                f"a {self.range} activation has one scale", required="granularity 'tensor'", found=repr(granularity)
            )
        if self.range == "learned" and self.kind != "symmetric":
            raise SchemeError("a learned activation", required="kind 'symmetric'", found=repr(self.kind))
        if not 2 <= self.bits <= 8 or self.kind not in ("symmetric", "asymmetric"):
            raise SchemeError(
                "activations", required="2 to 8 bits, symmetric or asymmetric", found=f"{self.bits} {self.kind}"
            )
        if granularity in SIZED or granularity == "channel":
            raise SchemeError(
                "activations", required="granularity 'token', 'image' or 'tensor'", found=repr(granularity)
            )
        return Scheme(bits=self.bits, kind=self.kind, granularity=granularity)


class QuantizeEntry(Strict):
    """One rule. Later rules override earlier ones; a weight of null leaves the modules in floating point.

    modules: globs over module paths, all of them unless there are patterns: regular expressions searched for in them
    weight: "keep" leaves weights as earlier rules have them, and says only what the activation gets
    section: entries and patterns of one section may not choose the same module
    answers: only layers whose result is an output of the model: classifiers, a language model's head
    optional: modules and patterns may match nothing, which is an error otherwise
    """

    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    patterns: tuple[str, ...] = ()
    operators: tuple[Operators, ...] = Field(default=("linear",), min_length=1)
    weight: WeightSettings | Literal["keep"] | None = WeightSettings()
    activation: ActivationSettings | None = None
    schedule: ScheduleSettings | None = None
    section: str = ""
    answers: bool = False
    optional: bool = False

    @field_validator("modules", "patterns", "operators", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.rule(None)
        return self

    def rule(self, default: ScheduleSettings | None) -> QuantizeRule:
        """As the pass takes it; `default` is the recipe's schedule."""
        settings = self.schedule or default
        given = self.weight if isinstance(self.weight, WeightSettings) else None
        weight = None if given is None else given.scheme()
        schedule = schedules.Constant() if settings is None else settings.schedule()
        method = "nearest" if given is None else given.method
        smooth = None if self.activation is None else self.activation.smooth
        if method != "nearest" and set(self.operators) != {"linear"}:
            raise SchemeError(
                f"method {method!r}",
                required="operators 'linear', whose inputs meet the weight in a product of matrices",
                found=", ".join(self.operators),
                cure="give the others a rule of their own",
            )
        if smooth is not None and "linear" not in self.operators:
            raise SchemeError("smooth", required="operators 'linear'", found=", ".join(self.operators))
        if weight is not None:
            schedule.check(weight.bits)
        return QuantizeRule(
            modules=globs(self.modules, self.patterns),
            patterns=self.patterns,
            operators=self.operators,
            weight=weight,
            adds=self.weight == "keep",
            groups=None if given is None else given.groups,
            learned=given is not None and given.learned,
            method=method,
            schedule=schedule,
            activation=None if self.activation is None else self.activation.scheme(),
            static=self.activation is not None and self.activation.range != "dynamic",
            learned_input=self.activation is not None and self.activation.range == "learned",
            smooth=smooth,
            activation_schedule=schedules.Constant(offset=self.activation.offset if self.activation else 0),
            section=self.section,
            answers=self.answers,
            optional=self.optional,
        )


class CalibrationSettings(Strict):
    """How the ranges of static activations are taken from data; in training by moving average, with `momentum`."""

    method: Method = "mse"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    percentile: float = Field(default=99.99, gt=50, le=100)

    def observer(self) -> Observer:
        """A fresh accumulator."""
        return Observer(method=self.method, momentum=self.momentum, percentile=self.percentile)
