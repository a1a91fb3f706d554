"""Runs calibration data through a program and stores the ranges that static activations need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from ...runtime.errors import CalibrationError
from ...runtime.plan import Quantize, input_scale_name, input_zero_name
from ...runtime.program import Program
from ..watch import watch
from .observers import MakeObserver, Observer
from .sites import find_sites


def calibrate(
    program: Program, edits: Sequence[Quantize], batches: Iterable[Sequence[Tensor]], make: MakeObserver
) -> None:
    """Observe the activation of every static edit and put its scale and zero point into the store.

    batches: flat inputs of the program, as many as wanted; consumed once.
    Raises CalibrationError when there are none.
    """
    static = {edit.fqn: edit for edit in edits if edit.static}
    if not static:
        return
    watched: dict[str, tuple[fx.Node, ...]] = {}  # a shared weight has one range over all that it meets
    for site in find_sites(program):
        if site.fqn in static and site.activation is not None:
            watched[site.fqn] = tuple(dict.fromkeys((*watched.get(site.fqn, ()), site.activation)))
    observers = {nodes: make() for nodes in watched.values()}

    def look(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        for nodes, observer in observers.items():
            if node in nodes:
                observer.observe(value)
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
    for fqn, nodes in watched.items():
        _put(program, static[fqn], observers[nodes])


def _put(program: Program, edit: Quantize, observer: Observer) -> None:
    assert edit.activation is not None
    params = observer.params(edit.activation)
    program.store.put(input_scale_name(edit.fqn), params.scale)
    if params.zero_point is not None:
        program.store.put(input_zero_name(edit.fqn), params.zero_point)
