"""Puts fake-quantise nodes where the Plan says: on each weight, and once on each activation it meets.

An activation that several sites share (the input of Q, K and V) is quantised once. What a fake-quantise node is
depends on who asks: `Fixed` for what is finished at once, `live.Live` for what is trained first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from ...runtime.ops.catalog import LIBRARY
from ...runtime.ops.quantize import FAKE_QUANTIZE
from ...runtime.plan import Plan, Quantize, input_scale_name, input_zero_name, weight_scale_name, weight_zero_name
from ...runtime.program import Entry, Program
from .sites import Site, find_sites

assert LIBRARY is not None  # importing the catalogue registers the operators

# On a site's call and on what it is lowered to: (name of the weight, name of the call), alike in every graph.
SITE = "dwindle_site"
# Beside it: the weight's name in the module that calls, and which of the calls by that name it is.
CALL = "dwindle_call"


@dataclass(frozen=True)
class Met:
    """An activation as one site's edit has it; `name` and `call` are the site's."""

    edit: Quantize
    name: str
    call: int


class Fakes(Protocol):
    """How weights and activations are simulated."""

    def weight(self, program: Program, site: Site, edit: Quantize) -> None:
        """Make the site's call read a simulated weight."""

    def activation(self, program: Program, x: fx.Node, met: Met, before: fx.Node) -> fx.Node:
        """A simulated `x`, placed before `before`."""

    def join(self, program: Program, first: Met, second: Met) -> bool:
        """Let a second site that reads an activation read the node made for the first; False where they differ."""


def insert(program: Program, plan: Plan, fakes: Fakes | None = None) -> Program:
    """Fake-quantise every site that the plan names."""
    fakes = fakes or Fixed()
    made: list[tuple[fx.Node, Met, fx.Node]] = []
    for site in find_sites(program):
        edit = plan.quantize(site.fqn, site.operator)
        if edit is None:
            continue
        site.node.meta.setdefault(SITE, (site.fqn, site.node.name))  # after training it has one
        site.node.meta[CALL] = (site.name, site.call)
        fakes.weight(program, site, edit)
        if edit.activation is not None:
            site.node.update_arg(0, _activation(program, site.node, Met(edit, site.name, site.call), fakes, made))
        program.log.append(Entry(stage="insert", rule="quantize.insert", where=site.fqn, reason=_spelled(edit)))
    program.tidy()
    return program


def _activation(
    program: Program, call: fx.Node, met: Met, fakes: Fakes, made: list[tuple[fx.Node, Met, fx.Node]]
) -> fx.Node:
    x = call.args[0]
    assert isinstance(x, fx.Node)
    for known, first, node in made:
        if known is x and fakes.join(program, first, met):
            return node
    # Read before the first use of x that will take the shared node, so right after x itself.
    anchor = x.next
    while anchor.op == "placeholder":
        anchor = anchor.next
    node = fakes.activation(program, x, met, anchor)
    made.append((x, met, node))
    return node


class Fixed:
    """Parameters from the tensor itself, or calibrated ones from the store."""

    def __init__(self) -> None:
        self._weights: dict[tuple[fx.Node, str], fx.Node] = {}

    def weight(self, program: Program, site: Site, edit: Quantize) -> None:
        """fake(W), once for all calls that take W alike."""
        key = (site.weight, edit.weight.nearest.spell())
        if key not in self._weights:
            names = (weight_scale_name(edit.fqn), weight_zero_name(edit.fqn)) if edit.has_scale else ()
            reads = [program.get_attr(n, site.node) for n in names if program.store.get(n) is not None]
            args = (*(*reads, None, None)[:2], key[1])
            self._weights[key] = program.emit_alike(FAKE_QUANTIZE.overload, site.weight, *args, like=site.node)
        site.node.replace_input_with(site.weight, self._weights[key])

    def activation(self, program: Program, x: fx.Node, met: Met, before: fx.Node) -> fx.Node:
        """fake(x) with no parameters, or with the stored ones."""
        assert met.edit.activation is not None
        reads = [program.get_attr(name, before) for name, _ in _calibrated(program, met)]
        scale, zero = (*reads, None, None)[:2]
        return program.emit_alike(FAKE_QUANTIZE.overload, x, scale, zero, met.edit.activation.spell(), like=before)

    def join(self, program: Program, first: Met, second: Met) -> bool:
        """Alike, and with equal parameters."""
        one, two = ([t for _, t in _calibrated(program, met)] for met in (first, second))
        equal = len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        return first.edit.activation == second.edit.activation and equal


def _calibrated(program: Program, met: Met) -> list[tuple[str, Tensor]]:
    names = [input_scale_name(met.name, met.call), input_zero_name(met.name, met.call)] if met.edit.static else []
    return [(name, t) for name in names if isinstance(t := program.store.get(name), Tensor)]


def _spelled(edit: Quantize) -> str:
    activation = "" if edit.activation is None else f", activation {edit.activation.spell()}"
    return f"weight {edit.weight.spell()}{activation}{' static' if edit.static else ''}"
