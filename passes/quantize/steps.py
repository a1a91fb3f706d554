"""Linear layers in training on the integers themselves, where both sides have some.

    linear(live(x), live(W), b)    ->  linear_of_steps(u_x, s_x, u_W, s_W, b)     one scale an output channel of W
    linear(live(x), live(W), b)    ->  linear_of_steps(u_x, s_x, live(W), -, b)   one a group of inputs

`as_values` is the way back. Asymmetric activations stay as they are: finished, their zero point is in the bias.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ...runtime.numerics import scale_shape
from ...runtime.ops.operator import Operator
from ...runtime.ops.qlinear import is_integer
from ...runtime.ops.steps import LINEAR_OF_STEPS, STEPS_LEARNED, STEPS_LIVE, STEPS_RANGED
from ...runtime.ops.training import FAKE_QUANTIZE_LEARNED, FAKE_QUANTIZE_LIVE, FAKE_QUANTIZE_RANGED
from ...runtime.program import Program
from ...runtime.scheme import Scheme
from ..match import full_args

aten = torch.ops.aten

# Which operator gives the steps of a simulated value; both take the same arguments.
STEPS: tuple[tuple[Operator, Operator], ...] = (
    (FAKE_QUANTIZE_LIVE, STEPS_LIVE),
    (FAKE_QUANTIZE_RANGED, STEPS_RANGED),
    (FAKE_QUANTIZE_LEARNED, STEPS_LEARNED),
)


def on_steps(program: Program) -> Program:
    """Rewrite every linear layer whose activation is simulated with symmetric codes."""
    made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in program.calls(aten.linear.default):
        x, weight, bias = full_args(node)
        scheme, own = _scheme(x), _scheme(weight)
        if scheme is None or own is None or scheme.kind != "symmetric":
            continue
        w = _steps(program, weight, made) if is_integer(own.stored) else (weight, None)
        args = (*_steps(program, x, made), *w, bias)
        new = program.emit_alike(LINEAR_OF_STEPS.overload, args[0], *args[1:], like=node)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    program.tidy()
    return program


def _scheme(node: fx.Node) -> Scheme | None:
    """Of a simulated value."""
    known = node.op == "call_function" and any(node.target is values.overload for values, _ in STEPS)
    return Scheme.parse(str(node.args[-1])) if known else None


def _steps(program: Program, node: fx.Node, made: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, fx.Node]:
    if node not in made:
        steps = next(steps for values, steps in STEPS if node.target is values.overload)
        x, scheme = node.args[0], Scheme.parse(str(node.args[-1]))
        assert isinstance(x, fx.Node)
        pair = program.emit_alike(steps.overload, x, *node.args[1:], like=node)
        u = program.emit_alike(operator.getitem, pair, 0, like=node)
        s = program.emit_alike(operator.getitem, pair, 1, like=node)
        value = u.meta["val"]
        s.meta["val"] = value.new_empty(scale_shape(value.shape, scheme), dtype=torch.float32)
        pair.meta["val"] = (value, s.meta["val"])
        made[node] = (u, s)
    return made[node]


def as_values(program: Program) -> None:
    """Linear layers on simulated values again, in place."""
    for node in program.calls(LINEAR_OF_STEPS.overload):
        x, _, weight, scale, bias = full_args(node)
        w = weight if scale is None else _value(program, weight, node)
        new = program.emit_alike(aten.linear.default, _value(program, x, node), w, bias, like=node)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)
    program.tidy()


def _value(program: Program, steps: fx.Node, before: fx.Node) -> fx.Node:
    pair = steps.args[0]
    assert isinstance(pair, fx.Node)
    values = next(values for values, steps in STEPS if pair.target is steps.overload)
    x, *rest = pair.args
    assert isinstance(x, fx.Node)
    return program.emit_alike(values.overload, x, *rest, like=before)
