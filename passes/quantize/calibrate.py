"""Runs calibration data through a program and stores the ranges that static activations need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from ...runtime.errors import CalibrationError
from ...runtime.plan import Quantize, input_scale_name, input_zero_name
from ...runtime.program import Program
from ..watch import watch
from .observers import MakeObserver
from .sites import Site, find_sites

Static = tuple[Site, Quantize]


def static_sites(program: Program, edits: Iterable[Quantize]) -> list[Static]:
    """Every site whose activation is to have a range of its own, with its edit."""
    static = {edit.fqn: edit for edit in edits if edit.static}
    return [(s, static[s.fqn]) for s in find_sites(program) if s.fqn in static and s.activation is not None]


def calibrate(
    program: Program, sites: Sequence[Static], batches: Iterable[Sequence[Tensor]], make: MakeObserver
) -> None:
    """Observe the activation of every site and put its scale and zero point into the store.

    batches: flat inputs of the program, as many as wanted; consumed once.
    Raises CalibrationError when there are none.
    """
    if not sites:
        return
    observers = {site.activation: make() for site, _ in sites}

    def look(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        if node in observers:
            observers[node].observe(value)
        return value

    count = 0
    for batch in batches:
        count += 1
        watch(program, batch, look)
    if count == 0:
        raise CalibrationError(
            "calibration data is empty",
            required="at least one batch",
            found="none",
            cure="pass data=[batch, ...] or use a recipe with dynamic activations",
        )
    for site, edit in sites:
        assert edit.activation is not None
        params = observers[site.activation].params(edit.activation)
        program.store.put(input_scale_name(site.name, site.call), params.scale)
        if params.zero_point is not None:
            program.store.put(input_zero_name(site.name, site.call), params.zero_point)
