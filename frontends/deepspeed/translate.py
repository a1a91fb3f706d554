"""A DeepSpeed configuration as a recipe: what it asked for, in dwindle's own terms.

weight_quantization       an entry a group; bits 1 and 2 are binary and ternary
  in the forward          constant at the target's bits from schedule_offset on
  MoQ                     falling bits, period and mixing as they were
activation_quantization   an entry a group that adds activations; weights that nothing else quantises get 8 bits,
                          since only integers times integers are faster
quantize_training (2021)  MoQ on every weight, its periods turned into steps

*_pruning                 entries that take structures out of the graph, or single weights: `pruning`

layer_reduction           the layers of the model that stay: those that its student would have taken over, so the
                          model to compress is the teacher
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...runtime.errors import RecipeError
from ..depth import DepthEntry
from ..settings import (
    ActivationSettings,
    CalibrationSettings,
    ConstantSettings,
    MoQSettings,
    Operators,
    QuantizeEntry,
    SensitivitySettings,
    WeightSettings,
)
from .config import DeepSpeedConfig, parse
from .pruning import pruned, sparsified
from .sections import ActivationQuantization, QuantizeTraining, WeightGroup, WeightQuantization

WEIGHTS: tuple[Operators, ...] = ("linear", "embedding", "conv2d")
ACTIVATIONS: tuple[Operators, ...] = ("linear", "conv2d")
MOMENTUM = 0.95  # of DeepSpeed's static ranges


def translate(source: DeepSpeedConfig | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The fields of the recipe that a DeepSpeed configuration stands for.

    Raises RecipeError for what cannot be done here.
    """
    config = source if isinstance(source, DeepSpeedConfig) else parse(source)
    entries: list[QuantizeEntry] = []
    if config.activation_quantization is not None:
        entries += _stored_for_activations(config.activation_quantization)
    if config.legacy is not None:
        entries.append(_legacy(config.legacy))
    if config.weight_quantization is not None:
        entries += _weights(config.weight_quantization)
    if config.activation_quantization is not None:
        entries += _activations(config.activation_quantization)
    sparse = config.sparse_pruning
    return {
        "name": "deepspeed",
        "depth": tuple(_layers(config)),
        "prune": tuple(pruned(config)),
        **({} if sparse is None else {"sparsify": sparsified(sparse)}),
        "quantize": tuple(entries),
        "calibration": CalibrationSettings(momentum=MOMENTUM),
        "sensitivity": _sensitivity(config),
    }


def _layers(config: DeepSpeedConfig) -> Iterator[DepthEntry]:
    section = config.layer_reduction
    if section is None:
        return
    if list(section.teacher_layer) != sorted(set(section.teacher_layer)):
        raise RecipeError(
            "layer_reduction.teacher_layer",
            required="each layer once and in order: layers are left out, and no other is put in their place",
            found=list(section.teacher_layer),
            cure="init_compression(student, config, teacher_model=teacher) copies layers in any order",
        )
    yield DepthEntry(row=section.module_name_prefix, keep_layers=section.teacher_layer)


def _weights(section: WeightQuantization) -> Iterator[QuantizeEntry]:
    for group in section.groups:
        schedule = _in_forward(section) if section.quantize_weight_in_forward else _moq(section, group)
        rounding = "nearest" if section.quantize_weight_in_forward else section.rounding
        weight = _weight(group.target_bits, section.quantization_type, section.quantize_groups, rounding)
        yield QuantizeEntry(
            patterns=group.modules, operators=WEIGHTS, weight=weight, schedule=schedule, section="weight_quantization"
        )


def _weight(bits: int, kind: str, groups: int, rounding: str) -> WeightSettings:
    kinds = {1: "binary", 2: "ternary"}
    settings = {"bits": bits, "kind": kinds.get(bits, kind), "groups": groups, "rounding": rounding}
    return WeightSettings.model_validate(settings)


def _in_forward(section: WeightQuantization) -> ConstantSettings:
    return ConstantSettings(type="constant", offset=section.schedule_offset)


def _moq(section: WeightQuantization, group: WeightGroup) -> MoQSettings | ConstantSettings:
    mixed = section.fp16_mixed_quantize
    change = mixed.quantize_change_ratio if mixed.enabled else 0.0
    if group.start_bits == 1:
        return ConstantSettings(type="constant", offset=section.schedule_offset, change=change)
    return MoQSettings(
        type="moq",
        start_bits=group.start_bits,
        period=group.period,
        offset=section.schedule_offset,
        change=change,
    )


def _legacy(section: QuantizeTraining) -> QuantizeEntry:
    bits, mixed = section.quantize_bits, section.fp16_mixed_quantize
    schedule = MoQSettings(
        type="moq",
        start_bits=bits.start_bits,
        period=section.period,
        offset=math.ceil(section.schedule_offset),
        change=mixed.quantize_change_ratio if mixed.enabled else 0.0,
    )
    algorithm = section.quantize_algo
    weight = _weight(bits.target_bits, algorithm.q_type, section.quantize_groups, algorithm.rounding)
    return QuantizeEntry(operators=WEIGHTS, weight=weight, schedule=schedule)


def _stored_for_activations(section: ActivationQuantization) -> Iterator[QuantizeEntry]:
    offset = ConstantSettings(type="constant", offset=section.schedule_offset)
    for group in section.groups:
        yield QuantizeEntry(patterns=group.modules, operators=ACTIVATIONS, schedule=offset)


def _activations(section: ActivationQuantization) -> Iterator[QuantizeEntry]:
    for group in section.groups:
        settings = {
            "bits": group.bits,
            "kind": section.quantization_type,
            "range": section.range_calibration,
            "offset": section.schedule_offset,
        }
        activation = ActivationSettings.model_validate(settings)
        yield QuantizeEntry(
            patterns=group.modules,
            operators=ACTIVATIONS,
            weight="keep",
            activation=activation,
            section="activation_quantization",
        )


def _sensitivity(config: DeepSpeedConfig) -> SensitivitySettings | None:
    eigenvalue = config.eigenvalue
    if eigenvalue is None:
        return None
    return SensitivitySettings(
        blocks=eigenvalue.layer_name,
        every=eigenvalue.gas_boundary_resolution,
        iterations=eigenvalue.max_iter,
        tolerance=eigenvalue.tol,
        stability=eigenvalue.stability,
    )
