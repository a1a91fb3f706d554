"""One spelling for each idea, so that later passes match once.

Exact rules leave every output bit as it was and always run. Approximate rules may change rounding (another
kernel, another order of sums) and run only where a later pass asks for them by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..runtime.program import Program, escapes, same_shape, source_of, value_of
from .composite import write_out
from .match import Call, Literal, Match, Maybe, Stored, Var, full_args
from .prune.transfer import rule_of
from .rewrite import Rule, apply_rules

aten = torch.ops.aten

# Nodes that check or annotate and compute nothing.
_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)


def canonicalize(program: Program) -> Program:
    """Drop checks and no-ops; every output stays bit-identical."""
    for node in program.calls(*_CHECKS):
        program.graph.erase_node(node)
    _drop_counters(program)
    _write_afterwards(program)
    apply_rules(program, EXACT, "canonicalize")
    write_out(program, rule_of)
    program.tidy()
    return program


def _drop_counters(program: Program) -> None:
    """A graph for inference does not count batches, whatever mode its model was captured from."""
    if program.contract.training:
        return
    for node in program.calls(aten.add_.Tensor):
        name = program.tensor_of(node.args[0])
        if name is not None and name.endswith("num_batches_tracked") and not node.users:
            program.graph.erase_node(node)


def _write_afterwards(program: Program) -> None:
    """f(x, out=y) -> y.copy_(f(x)): what writes is always the call's first argument, and autograd takes it.

    A y of another shape, such as empty(0), would be made anew, so f(x) stands for it.
    """
    for node in [n for n in program.graph.nodes if n.op == "call_function" and "out" in n.kwargs]:
        plain, out = _without_out(node.target), node.kwargs["out"]
        if plain is not None:
            given = {name: value for name, value in node.kwargs.items() if name != "out"}
            made = program.emit(plain, *node.args, like=node, **given)
            if same_shape(out, made):
                result = program.emit(aten.copy_.default, out, made, like=node)
            else:
                result = program.emit(aten.to.dtype, made, value_of(out).dtype, like=node)
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)


def _without_out(target: Any) -> Any:
    """The overload that takes all else and gives a new tensor; None where there is none."""
    packet, schema = target.overloadpacket, target._schema
    wanted = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
    others = (getattr(packet, name) for name in packet.overloads())
    return next((o for o in others if [(a.name, str(a.type)) for a in o._schema.arguments] == wanted), None)


def _input(program: Program, found: Match) -> Any:
    return found["x"]


def _same_value(program: Program, found: Match) -> str | None:
    x, y = value_of(found["x"]), value_of(found.root)
    same = x.dtype == y.dtype and x.device == y.device and x.shape == y.shape and x.stride() == y.stride()
    if not same:
        return "changes dtype, device or layout"
    copies = found.root.target in _COPIES or _argument(found.root, "copy") is True
    shared = copies and (escapes(found.root) or escapes(source_of(found["x"])))
    return "is a copy, and one of the two may be written" if shared else None


DROPOUT_OFF = Rule(
    name="canonicalize.dropout_off",
    pattern=Call((aten.dropout.default, aten.feature_dropout.default), Var("x"), Literal("p"), False),
    replace=_input,
)

DROPOUT_ZERO = Rule(
    name="canonicalize.dropout_zero",
    pattern=Call((aten.dropout.default, aten.feature_dropout.default), Var("x"), 0.0, True),
    replace=_input,
)


def _argument(node: fx.Node, name: str) -> Any:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # ATen has one
    return dict(zip(names, full_args(node), strict=True)).get(name)


_COPIES = (aten.lift_fresh_copy.default, aten._to_copy.default)

# detach is left alone: it changes the gradient; contiguous because a caller's strides may be others.
NO_OP = Rule(
    name="canonicalize.no_op",
    pattern=Call(
        (
            aten.to.dtype,
            aten.to.device,
            aten.to.dtype_layout,
            aten.type_as.default,
            aten.lift_fresh_copy.default,
            aten._to_copy.default,
        ),
        Var("x"),
    ),
    check=_same_value,
    replace=_input,
)


def _padding(found: Match) -> list[int] | None:
    """ "same" and "valid" in numbers, per dimension; None where "same" pads one side more than the other."""
    if found["padding"] == "valid":
        return [0, 0]
    kernel, dilation = value_of(found["w"]).shape[2:], found["dilation"]
    totals = [d * (k - 1) for d, k in zip(dilation if len(dilation) == 2 else dilation * 2, kernel, strict=True)]
    return [total // 2 for total in totals] if not any(total % 2 for total in totals) else None


CONV_PADDING = Rule(
    name="canonicalize.conv_padding",
    pattern=Call(
        aten.conv2d.padding,
        Var("x"),
        Var("w"),
        Maybe("b"),
        Literal("stride"),
        Literal("padding"),
        Literal("dilation"),
        Literal("groups"),
    ),
    check=lambda program, found: None if _padding(found) else "an even filter pads one side more than the other",
    replace=lambda program, found: program.emit(
        aten.conv2d.default,
        *(found[n] for n in ("x", "w", "b", "stride")),
        _padding(found),
        *(found[n] for n in ("dilation", "groups")),
        like=found.root,
    ),
)


def _alone(program: Program, found: Match) -> str | None:
    softmax = found["x"]
    fresh = isinstance(softmax, fx.Node) and softmax.target is aten.softmax.int
    return None if fresh and len(softmax.users) == 1 else "not a softmax that is read nowhere else"


# A softmax's gradient needs its result as it was: one that is masked in place has none. DeBERTa's own softmax does so,
# and brings a gradient of its own, which a graph does not keep.
SOFTMAX_MASKED = Rule(
    name="canonicalize.softmax_masked",
    pattern=Call(aten.masked_fill_.Scalar, Var("x"), Var("mask"), Literal("value")),
    check=_alone,
    replace=lambda program, found: program.emit(
        aten.masked_fill.Scalar, *(found[n] for n in ("x", "mask", "value")), like=found.root
    ),
)

EXACT = (DROPOUT_OFF, DROPOUT_ZERO, NO_OP, CONV_PADDING, SOFTMAX_MASKED)


def _addmm_is_plain(program: Program, found: Match) -> str | None:
    _, _, _, beta, alpha = full_args(found["addmm"])
    return None if beta == 1 and alpha == 1 else "scaled addmm"


def _addmm_to_linear(program: Program, found: Match) -> fx.Node:
    root = found.root
    weight = program.emit(aten.t.default, found["w"], like=root)
    return program.emit(aten.linear.default, found["x"], weight, found["b"], like=root)


def _viewed_addmm_fits(program: Program, found: Match) -> str | None:
    x, y = value_of(found["x"]), value_of(found.root)
    if x.dim() != y.dim() or x.shape[:-1] != y.shape[:-1]:
        return "the views change more than the leading dimensions"
    return _addmm_is_plain(program, found)


# GPT-2's Conv1D: a weight (K, N), inputs flattened to two dimensions and back.
CONV1D_TO_LINEAR = Rule(
    name="canonicalize.conv1d_to_linear",
    pattern=Call(
        (aten.view.default, aten.reshape.default),
        Call(
            aten.addmm.default,
            Maybe("b"),
            Call((aten.view.default, aten.reshape.default), Var("x")),
            Stored("w"),
            name="addmm",
        ),
    ),
    check=_viewed_addmm_fits,
    replace=_addmm_to_linear,
    approximate=True,
)

ADDMM_TO_LINEAR = Rule(
    name="canonicalize.addmm_to_linear",
    pattern=Call(aten.addmm.default, Maybe("b"), Var("x"), Stored("w"), name="addmm"),
    check=_addmm_is_plain,
    replace=_addmm_to_linear,
    approximate=True,
)


def _matmul_to_linear(program: Program, found: Match) -> fx.Node:
    weight = program.emit(aten.t.default, found["w"], like=found.root)
    return program.emit(aten.linear.default, found["x"], weight, None, like=found.root)


def _weight_is_matrix(program: Program, found: Match) -> str | None:
    if value_of(found["w"]).dim() != 2:
        return "the stored operand is not a matrix"
    return None if value_of(found["x"]).dim() >= 2 else "the other operand is a vector"


MATMUL_TO_LINEAR = Rule(
    name="canonicalize.matmul_to_linear",
    pattern=Call((aten.matmul.default, aten.mm.default), Var("x"), Stored("w")),
    check=_weight_is_matrix,
    replace=_matmul_to_linear,
    approximate=True,
)

TO_LINEAR = (CONV1D_TO_LINEAR, ADDMM_TO_LINEAR, MATMUL_TO_LINEAR)
