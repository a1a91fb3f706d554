"""DeepSpeed's entry points with their signatures of 0.19.6: an old script changes one import.

    from dwindle.deepspeed import init_compression, redundancy_clean

A model is edited in place, as there; nothing is captured. Only modules that the configuration chooses are touched,
and each stays the same object. Pruning is not done in place: which tensors go together is a matter of the graph, so it
is refused here, and the same file is a recipe of `dwindle.prepare` and `dwindle.compress`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ...runtime.errors import DwindleError, RecipeError
from ..recipe import Recipe
from .config import DeepSpeedConfig, parse
from .inplace import attach, require_steering, steering_of
from .integers import make_integer
from .layers import initialise, linearise
from .pruning import STRUCTURES


def init_compression(
    model: nn.Module, deepspeed_config: Any, teacher_model: nn.Module | None = None, mpu: Any = None
) -> nn.Module:
    """Simulate the configured quantisation in `model` while it trains; gives back the same model.

    deepspeed_config: a dict, the path of a JSON file, or parsed arguments with `deepspeed_config`
    teacher_model: whose layers an enabled layer_reduction copies first; a student that has as many is not cut
    Optimizer steps are counted by themselves: of all optimizers that hold one of the model's parameters, once in a
    round where several step in turns. Raises RecipeError or SchemeError, and then no module was changed.
    """
    _refuse(mpu)
    config, own = _read(deepspeed_config), _unwrapped(model)
    reduction, recipe = config.layer_reduction, _in_place(config)
    if reduction is not None:
        if teacher_model is None:
            raise RecipeError(
                "layer_reduction is enabled and there is no teacher",
                required="teacher_model=, whose layers the student takes over",
                found="None",
                cure="pass the teacher, or set layer_reduction.enabled to false where a checkpoint is loaded",
            )
        initialise(own, _unwrapped(teacher_model), reduction)
    attach(own, recipe)
    return model


def redundancy_clean(model: nn.Module, deepspeed_config: Any, mpu: Any = None) -> nn.Module:
    """Turn what `init_compression` simulates into integers, in place; gives back the same model.

    The weights are packed and their parameters gone, so an optimizer of before is of no more use. Raises
    ScheduleError where a schedule is not over, RecipeError where the configuration is not the one of before.
    """
    _refuse(mpu)
    own = _unwrapped(model)
    recipe = _in_place(_read(deepspeed_config))
    if steering_of(own) is None and not recipe.quantize:
        return model
    steering = require_steering(own)
    if steering.recipe != recipe:
        raise RecipeError(
            "the configuration is not the one of init_compression",
            required="the same compression_training",
            found="a difference in " + ", ".join(_differences(steering.recipe, recipe)),
        )
    make_integer(steering)
    return model


def student_initialization(student_model: nn.Module, teacher_model: nn.Module, deepspeed_config: Any) -> None:
    """Copy the teacher's chosen layers and modules to the student, as layer_reduction says; buffers too.

    Raises RecipeError, before anything is written, where the student is not built for it.
    """
    section = _read(deepspeed_config).layer_reduction
    if section is None:
        raise RecipeError(
            "there is nothing to initialise a student by",
            required="compression_training.layer_reduction with enabled: true",
            found="none that is enabled",
        )
    initialise(_unwrapped(student_model), _unwrapped(teacher_model), section)


def convert_conv1d_to_linear(model: nn.Module, convert_type: type[nn.Module]) -> nn.Module:
    """Make every `convert_type` (transformers' Conv1D) an nn.Linear with the weight transposed; the same model.

    In place: parameters and modules stay the same objects. To be called before the optimizer is made. Not needed for
    quantisation here, which knows Conv1D. Raises DwindleError where a weight is shared with another kind of module.
    """
    linearise(_unwrapped(model), convert_type)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without a wrapper such as DistributedDataParallel, as in DeepSpeed."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def _read(source: Any) -> DeepSpeedConfig:
    named = getattr(source, "deepspeed_config", source)
    if isinstance(named, DeepSpeedConfig):
        return named
    if not isinstance(named, Mapping | str | Path):
        raise RecipeError(
            "a DeepSpeed configuration of the wrong kind",
            required="a dict, the path of a JSON file, or arguments with `deepspeed_config`",
            found=type(named).__name__,
        )
    return parse(named)


def _in_place(config: DeepSpeedConfig) -> Recipe:
    """What is done to modules as they stand. Raises RecipeError for pruning, which is done to graphs."""
    pruning = [name for name in (*STRUCTURES, "sparse_pruning") if config.section(name) is not None]
    if pruning:
        raise RecipeError(
            "a model is not pruned in place",
            required="weight_quantization, activation_quantization, quantize_training or layer_reduction",
            found=", ".join(pruning),
            cure="the same file is a recipe: dwindle.prepare(model, 'ds_config.json', inputs=batch), train it, and "
            "finish(); or without training dwindle.compress(model, 'ds_config.json', inputs=batch)",
        )
    return Recipe.of_deepspeed(replace(config, layer_reduction=None))


def _refuse(mpu: Any) -> None:
    if mpu is not None:
        raise DwindleError(
            "tensor parallelism is not supported",
            required="mpu=None",
            found=type(mpu).__name__,
            cure="compress the model before it is split",
        )


def _differences(before: Recipe, now: Recipe) -> list[str]:
    return [name for name in Recipe.model_fields if getattr(before, name) != getattr(now, name)]
