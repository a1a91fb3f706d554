"""Puts fake-quantise nodes where the Plan says: on each weight, and once on each activation it meets.

The same graph serves training (it has gradients) and, once lowered, inference. An activation that several
sites share (the input of Q, K and V) is quantised once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ...runtime.ops.catalog import LIBRARY
from ...runtime.ops.quantize import FAKE_QUANTIZE
from ...runtime.plan import Plan, Quantize, input_scale_name, input_zero_name
from ...runtime.program import Entry, Program
from .sites import Site, find_sites

assert LIBRARY is not None  # importing the catalogue registers the operators

# On a site's call and on what it is lowered to: (name of the weight, name of the call), alike in every graph.
SITE = "dwindle_site"


def insert(program: Program, plan: Plan) -> Program:
    """Fake-quantise every site that the plan names."""
    weights: dict[tuple[fx.Node, str], fx.Node] = {}
    activations: list[tuple[fx.Node, str, list[Tensor], fx.Node]] = []
    for site in find_sites(program):
        edit = plan.quantize(site.fqn, site.operator)
        if edit is None:
            continue
        key = (site.weight, edit.weight.spell())
        if key not in weights:
            weights[key] = _fake(program, site.weight, None, None, key[1], site.node)
        site.node.replace_input_with(site.weight, weights[key])
        site.node.meta[SITE] = (site.fqn, site.node.name)
        if edit.activation is not None:
            _insert_activation(program, site, edit, activations)
        program.log.append(Entry(stage="insert", rule="quantize.insert", where=site.fqn, reason=_spelled(edit)))
    program.tidy()
    return program


def _insert_activation(
    program: Program, site: Site, edit: Quantize, done: list[tuple[fx.Node, str, list[Tensor], fx.Node]]
) -> None:
    x, scheme = site.node.args[0], edit.activation
    assert isinstance(x, fx.Node) and scheme is not None
    names = [input_scale_name(edit.fqn), input_zero_name(edit.fqn)] if edit.static else []
    stored = [(n, t) for n in names if isinstance(t := program.store.get(n), Tensor)]
    values = [t for _, t in stored]
    for known, spelled, with_values, node in done:
        if known is x and spelled == scheme.spell() and _equal(with_values, values):
            site.node.update_arg(0, node)
            return
    # Read before the first use of x that will take the shared node, so right after x itself.
    anchor = x.next
    while anchor.op == "placeholder":
        anchor = anchor.next
    reads = [program.get_attr(n, anchor) for n, _ in stored]
    scale, zero = (reads[i] if i < len(reads) else None for i in range(2))
    node = _fake(program, x, scale, zero, scheme.spell(), anchor)
    done.append((x, scheme.spell(), values, node))
    site.node.update_arg(0, node)


def _fake(program: Program, x: fx.Node, scale: Any, zero: Any, scheme: str, before: fx.Node) -> fx.Node:
    return program.emit_alike(FAKE_QUANTIZE.overload, x, scale, zero, scheme, like=before)


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _spelled(edit: Quantize) -> str:
    activation = "" if edit.activation is None else f", activation {edit.activation.spell()}"
    return f"weight {edit.weight.spell()}{activation}{' static' if edit.static else ''}"
