"""Runs calibration data through a program and stores the ranges that static activations need."""

from __future__ import annotations

from collections import Counter
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


def require_calls(sites: Sequence[Static], known: dict[str, int]) -> None:
    """Raise CalibrationError where a weight is called more or less often than in the graph that was first to call it.

    known: how often each is, by its name; new ones are added. Which call is which is told by their order alone, so
    with another number of them no range could be trusted.
    """
    for name, found in Counter(site.name for site, _ in sites).items():
        taken = known.setdefault(name, found)
        if taken != found:
            raise CalibrationError(
                f"{name} is not called as often as when its static ranges were taken",
                required=f"{taken} calls",
                found=f"{found}, in a call of the model with other arguments or in another mode",
                cure="call the model as then, or choose range 'dynamic'",
            )


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

    batch = None
    for batch in batches:
        watch(program, batch, look)
    if batch is None:
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
