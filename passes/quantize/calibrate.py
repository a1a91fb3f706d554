"""Runs calibration data through a program and stores the ranges that static activations need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...runtime.errors import CalibrationError
from ...runtime.plan import Quantize, input_scale_name, input_zero_name
from ...runtime.program import Program
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
    watched: dict[fx.Node, list[str]] = {}
    for site in find_sites(program):
        if site.fqn in static and site.activation is not None:
            watched.setdefault(site.activation, []).append(site.fqn)
    observers = {node: make() for node in watched}
    count = 0
    with torch.no_grad():
        for batch in batches:
            count += 1
            for node, value in watch(program, batch, observers):
                observers[node].observe(value)
    if count == 0:
        raise CalibrationError(
            "calibration data is empty",
            required="at least one batch",
            found="none",
            cure="pass data=[batch, ...] or use a recipe with dynamic activations",
        )
    for node, fqns in watched.items():
        for fqn in fqns:
            _put(program, static[fqn], observers[node])


def watch(program: Program, tensors: Sequence[Tensor], nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, Any]]:
    """Run a program and yield the values of `nodes` as they are computed."""
    wanted = set(nodes)
    recorder = _Recorder(program.module)
    recorder.wanted = wanted
    recorder.run(*tensors)
    yield from recorder.seen


class _Recorder(fx.Interpreter):
    wanted: set[fx.Node]

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: list[tuple[fx.Node, Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.seen.append((n, value))
        return value


def _put(program: Program, edit: Quantize, observer: Observer) -> None:
    assert edit.activation is not None
    params = observer.params(edit.activation)
    program.store.put(input_scale_name(edit.fqn), params.scale)
    if params.zero_point is not None:
        program.store.put(input_zero_name(edit.fqn), params.zero_point)
