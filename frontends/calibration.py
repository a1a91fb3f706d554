"""Calibration data: which recipes go by them, and the batches as a graph takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..passes.choose_layers import data_is_wanted
from ..passes.prune.score import WITH_DATA
from ..passes.stream import Batch, Batches
from ..runtime.contract import Signature
from ..runtime.errors import CalibrationError
from ..runtime.program import Program
from .inputs import flat_batches
from .recipe import Recipe


def require_data(recipe: Recipe, data: object | None, given: str) -> None:
    """Raise CalibrationError for a recipe that goes by data where `data` is None. given: how to give it"""
    error = _missing(recipe, given) if data is None else None
    if error is not None:
        raise error


def _missing(recipe: Recipe, given: str) -> CalibrationError | None:
    """The error for a recipe that goes by data; None for one that needs none."""
    by = next((rule.by for rule in recipe.depths() if rule.by is not None), None)
    score = next((rule.score for rule in recipe.prunes() if rule.score in WITH_DATA), None)
    if recipe.layerwise is not None:
        made = "labels are not needed, and dwindle.frontends.layerwise.random_tokens(model) makes some up"
        return _without(recipe, "trains layers", f"give {given}; {made}")
    if by is not None:
        return data_is_wanted(by, given)
    if score is not None:
        other = "or a score that goes by the weights alone, such as l2"
        return _without(recipe, f"prunes by score {score}", f"give {given}, {other}")
    if recipe.rounds_by_data():
        other = "or method 'nearest' and no smooth, which need none"
        return _without(recipe, f"has {' and '.join(recipe.rounds_by_data())}", f"give {given}, {other}")
    if any(rule.static for rule in recipe.rules()):
        other = "or a recipe with dynamic activations such as zeroquant-w8a8"
        return _without(recipe, "has static activations", f"give {given}, {other}")
    return None


def _without(recipe: Recipe, what: str, cure: str) -> CalibrationError:
    name = recipe.name or "given"
    return CalibrationError(f"the recipe {name} {what}", required="calibration data", found="none", cure=cure)


def calibration_batches(program: Program, signature: Signature, recipe: Recipe, data: Iterable[Any] | None) -> Batches:
    """Flat batches of `data`, asked for only where something needs them; then no data is an error."""
    rules = (*(r.score in WITH_DATA for r in recipe.prunes()), *(bool(r.by) for r in recipe.depths()))
    if isinstance(data, Iterator) and (recipe.rounds_by_data() or any(rules)):
        data = list(data)  # depth, pruning and rounding read it, and so may ranges

    def batches() -> Iterable[Batch]:
        require_data(recipe, data, "data=[batch, ...]")
        assert data is not None, "nothing asks for data that the recipe does not go by"
        return flat_batches(program, signature, data)

    return batches
