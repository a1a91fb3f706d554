"""The sections of a DeepSpeed compression configuration, as frozen values under DeepSpeed's own key names.

Defaults are those of DeepSpeed's code where its documentation says otherwise (schedule_offset 1000, not 0; dynamic,
not static). The keys of `shared_parameters` are fields of the section, each entry of `different_groups` is one of
its `groups`, with `related_modules` as `related` and `quantization_period` as `period`.

Bits fall one at a time. With period P, and per drop a factor f in 1..5 that stands for the block's sensitivity:

    DeepSpeed at 0.19.6   drop k at step  T_k = P 2^(k-1) f^(k-1)            at most one drop a step
    DeepSpeed of 2021     drop k at step  ceil(P 2^(k-1) f^(k-1) / n)        n tensors are quantised per step:
                                                                             6, with eigenvalue 6 layer_num
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

EVERYTHING = (".*",)  # what absent `modules` and DeepSpeed's own "*" stand for
TENSORS_PER_LAYER = 6  # two-dimensional weights of a transformer layer, as the code of 2021 counted
MAX_FACTOR = 5  # 1 + floor(4 * eigenvalue), eigenvalue in [0, 1]


def contradiction(key: str, required: str, found: object, cure: str = "") -> PydanticCustomError:
    """An error of a validator that knows what is required of `key` and how to get it."""
    about = {"key": key, "required": required, "found": str(found), "cure": cure}
    return PydanticCustomError("contradiction", "{required}", about)


def drops(start_bits: int, target_bits: int, period: float, *, factor: int = 1) -> tuple[int, ...]:
    """Steps after schedule_offset at which one bit goes, start_bits - target_bits of them and at most one a step.

    factor: of every drop, 1 (no eigenvalues, or the least sensitive) to 5.
    """
    steps: list[int] = []
    for k in range(start_bits - target_bits):
        step = max(1, math.ceil(period * (2 * factor) ** k))
        steps.append(max(step, steps[-1] + 1) if steps else step)
    return tuple(steps)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _regexes(value: Any) -> Any:
    return EVERYTHING if value in ("*", ("*",)) else _one_or_many(value)


def _compiled(value: tuple[str, ...], key: str = "") -> tuple[str, ...]:
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise contradiction(key, "regular expressions of Python", f"{pattern!r}: {error}") from error
    return value


def _regular(value: tuple[str, ...]) -> tuple[str, ...]:
    return _compiled(value)


def _paired(value: Any) -> Any:
    return tuple(_one_or_many(item) for item in _one_or_many(value)) if isinstance(value, str | tuple) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Bits = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=16)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Excluded = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), AfterValidator(_regular)]
Modules = Annotated[tuple[str, ...], BeforeValidator(_regexes), Field(min_length=1), AfterValidator(_regular)]
Kind = Literal["symmetric", "asymmetric"]
Rounding = Literal["nearest", "stochastic"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Group(_Strict):
    """One entry of `different_groups`: regular expressions searched for in module names, and what they get."""

    name: str
    modules: Modules = EVERYTHING
    related: Annotated[tuple[tuple[str, ...], ...] | None, BeforeValidator(_paired)] = Field(
        default=None, alias="related_modules"
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.related is not None:
            if len(self.related) != len(self.modules):
                raise contradiction(
                    "related_modules",
                    f"one list for each of the {len(self.modules)} modules",
                    f"{len(self.related)} lists",
                    "DeepSpeed pairs them by position and drops the rest without a word",
                )
            for patterns in self.related:
                _compiled(patterns, "related_modules")
        return self


class WeightGroup(Group):
    """Weights: bits at the start and in the end, and the period of the first drop."""

    start_bits: Bits
    target_bits: Bits
    period: Count = Field(default=1, alias="quantization_period")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        _check_falls("start_bits", self.start_bits, self.target_bits)
        return self

    def drops(self, factor: int = 1) -> tuple[int, ...]:
        """Steps after schedule_offset at which one bit goes; see `drops`."""
        return drops(self.start_bits, self.target_bits, self.period, factor=factor)


class ActivationGroup(Group):
    """Inputs of linears and convolutions."""

    bits: Annotated[Literal[4, 8], BeforeValidator(_whole)]


class PruningGroup(Group):
    """The fraction that is kept of each matched weight's elements, rows, heads or channels."""

    dense_ratio: Ratio


class Fp16Mixed(_Strict):
    """w <- r w + (1 - r) Q(w), where r starts at 1, falls by the ratio each step and returns to 1 at every drop."""

    enabled: bool = False
    quantize_change_ratio: Ratio = 0.001


class WeightQuantization(_Strict):
    """Weights fake-quantised in the forward, or (MoQ) overwritten after each step while their bits fall."""

    quantizer_kernel: bool = False
    schedule_offset: Count = 0
    quantize_groups: Positive = 1
    quantize_verbose: bool = False
    quantization_type: Kind = "symmetric"
    quantize_weight_in_forward: bool = False
    rounding: Rounding = "nearest"
    fp16_mixed_quantize: Fp16Mixed = Fp16Mixed()
    groups: tuple[WeightGroup, ...] = ()

    @model_validator(mode="after")
    def _uniform(self) -> Self:
        for group in self.groups:
            _check_uniform("quantization_type", self.quantization_type, group.target_bits)
        return self


class ActivationQuantization(_Strict):
    """Inputs of matched modules, with ranges of each call ("dynamic") or of a moving average ("static")."""

    quantization_type: Kind = "symmetric"
    range_calibration: Literal["dynamic", "static"] = "dynamic"
    schedule_offset: Count = 1000
    groups: tuple[ActivationGroup, ...] = ()


class SparsePruning(_Strict):
    """Single weights; the keys from schedule_offset_end on are those of snip_momentum alone."""

    method: Literal["l1", "topk", "snip_momentum"] = "l1"
    schedule_offset: Count = 1000
    schedule_offset_end: Count | None = None
    schedule_offset_stride: Positive = 1
    block_pattern: str = Field(default="4x1", pattern=r"^(\d+x\d+|\d+:\d+|channelx\d+|\d+xchannel)$")
    dense_ratio: Ratio = 0.1
    excluded_modules: Excluded = ()
    groups: tuple[PruningGroup, ...] = ()

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end < self.schedule_offset:
            required = f"at least schedule_offset, {self.schedule_offset}"
            raise contradiction("schedule_offset_end", required, self.schedule_offset_end)
        if self.method == "snip_momentum" and self.groups:
            raise contradiction(
                "method",
                "no different_groups with snip_momentum, for which DeepSpeed raises NotImplementedError",
                ", ".join(group.name for group in self.groups),
                'write "different_groups": {}, and dense_ratio and excluded_modules under shared_parameters',
            )
        return self

    @property
    def end(self) -> int:
        """Last step of the ramp: schedule_offset_end, which is schedule_offset where it is absent."""
        return self.schedule_offset if self.schedule_offset_end is None else self.schedule_offset_end


class RowPruning(_Strict):
    """Rows of linears, with the inputs of the related ones."""

    method: Literal["l1", "topk"] = "l1"
    schedule_offset: Count = 1000
    groups: tuple[PruningGroup, ...] = ()


class ChannelPruning(RowPruning):
    """Output channels of convolutions, with the related norms and the inputs of the related convolutions."""


class HeadPruning(_Strict):
    """Heads, named by the attention's output projection; the related ones are query, key and value."""

    method: Literal["l1", "topk"] = "topk"
    schedule_offset: Count = 1000
    num_heads: Positive
    groups: tuple[PruningGroup, ...] = ()


class LayerReduction(_Strict):
    """The student's layer i starts as the teacher's layer teacher_layer[i], counted from 0."""

    keep_number_layer: Positive | None = None
    module_name_prefix: str = Field(min_length=1)
    teacher_layer: Annotated[tuple[Count, ...], Field(min_length=1)]
    other_module_name: Names = ()

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if self.keep_number_layer not in (None, len(self.teacher_layer)):
            required = f"the length of teacher_layer, {len(self.teacher_layer)}"
            raise contradiction("keep_number_layer", required, self.keep_number_layer)
        return self


class Eigenvalue(_Strict):
    """Power iteration on each block's Hessian: sensitive blocks keep their bits up to five times longer."""

    enabled: bool = True
    verbose: bool = False
    max_iter: Positive = 100
    tol: float = Field(default=1e-2, ge=0)
    stability: float = Field(default=1e-6, ge=0)
    gas_boundary_resolution: Positive = 1
    layer_name: str = Field(default="bert.encoder.layer", min_length=1)
    layer_num: Positive


class QuantizeAlgo(_Strict):
    """Of `quantize_training`."""

    q_type: Kind = "symmetric"
    rounding: Rounding = "nearest"


class QuantizeBits(_Strict):
    """Of `quantize_training`."""

    start_bits: Bits = 16
    target_bits: Bits

    @model_validator(mode="after")
    def _falls(self) -> Self:
        _check_falls("start_bits", self.start_bits, self.target_bits)
        return self


class QuantizeSchedule(_Strict):
    """Of `quantize_training`. Both count quantised tensors, not steps."""

    quantize_period: Count = 1000
    schedule_offset: Count = 1000


class QuantizeTraining(_Strict):
    """MoQ as configured in 2021: all weights with two or more dimensions, in one group."""

    quantize_verbose: bool = False
    quantizer_kernel: bool = False
    quantize_groups: Positive = 1
    quantize_algo: QuantizeAlgo = QuantizeAlgo()
    quantize_bits: QuantizeBits
    quantize_schedule: QuantizeSchedule = QuantizeSchedule()
    fp16_mixed_quantize: Fp16Mixed = Fp16Mixed()
    eigenvalue: Eigenvalue | None = None

    @model_validator(mode="after")
    def _uniform(self) -> Self:
        _check_uniform("quantize_algo.q_type", self.quantize_algo.q_type, self.quantize_bits.target_bits)
        return self

    @property
    def tensors(self) -> int:
        """By how much the counter of 2021 went up per step."""
        return TENSORS_PER_LAYER * (self.eigenvalue.layer_num if self.eigenvalue else 1)

    @property
    def period(self) -> float:
        """quantize_period in steps: the first drop is at the first step that is not below it."""
        return self.quantize_schedule.quantize_period / self.tensors

    @property
    def schedule_offset(self) -> int:
        """schedule_offset in steps."""
        return -(-self.quantize_schedule.schedule_offset // self.tensors)

    def drops(self, factor: int = 1) -> tuple[int, ...]:
        """Steps after `schedule_offset` at which one bit goes; the code of 2021 let several share a step."""
        bits = self.quantize_bits
        return drops(bits.start_bits, bits.target_bits, self.period, factor=factor)


def _check_falls(key: str, start: int, target: int) -> None:
    if start < target:
        raise contradiction(
            key, f"at least target_bits, {target}", start, "raise it or lower target_bits: bits only fall"
        )


def _check_uniform(key: str, kind: str, target: int) -> None:
    if kind == "asymmetric" and target <= 2:
        raise contradiction(key, f"'symmetric' where target_bits is {target}", f"'{kind}'", "1 and 2 bits have no zero")
