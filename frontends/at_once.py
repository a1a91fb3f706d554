"""compress as the door has it: after training in one call, with layers distilled on the way where a recipe says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..runtime.compressed import Compressed
from ..runtime.errors import CalibrationError
from . import compress as plain
from .capture import DynamicShapes
from .compress import RecipeSource
from .prepare import prepare
from .recipe import Recipe


def compress(
    model: nn.Module,
    recipe: RecipeSource = "zeroquant-w8a8",
    *,
    inputs: Any = None,
    data: Iterable[Any] | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    processes: int = 1,
    quiet: bool = False,
) -> Compressed:
    """Compress a trained model, without training or, by a recipe with `layerwise`, with its blocks trained one by one.

    recipe: a preset's name, a file, a dict or a Recipe
    inputs: one example batch (dict of keyword arguments, tuple, or tensor); made up for transformers models
    data: batches like `inputs`, for recipes with static activations, for pruning by taylor or fisher (with labels)
        or by routed mass, and for `layerwise`
    dynamic_shapes: names of dimensions that vary, {"input_ids": {0: "batch"}}; None finds batch and sequence
    processes: blocks that are trained at once, quiet: without a bar; both by `layerwise` alone

    The model is borrowed: its tensors are read, never written, and nothing about it changes. Without `layerwise` what
    is not packed is shared with it. Returns a Compressed, called like the model. Raises RecipeError, CaptureError,
    CalibrationError, SchemeError, PassError, DistillationError or CertificateError, each with what was required, what
    was found and the cure.
    """
    recipe = Recipe.of(recipe)
    if recipe.layerwise is None:
        return plain.compress(model, recipe, inputs=inputs, data=data, dynamic_shapes=dynamic_shapes)
    if data is None:
        raise layers_want_data(recipe, "data=[batch, ...], or data=dwindle.frontends.layerwise.random_tokens(model)")
    batches = list(data)
    ranges = batches if any(rule.static for rule in recipe.rules()) else None
    student = prepare(model, recipe, inputs=inputs, teacher=model, data=ranges, dynamic_shapes=dynamic_shapes)
    student.distill_layers(batches, processes=processes, quiet=quiet)
    return student.finish()


def layers_want_data(recipe: Recipe, given: str) -> CalibrationError:
    """For a recipe with `layerwise` and no data; `given`: how to give it."""
    return CalibrationError(
        f"the recipe {recipe.name or 'given'} trains layers",
        required="batches to train them on; labels are not needed",
        found="none",
        cure=f"give {given}",
    )
