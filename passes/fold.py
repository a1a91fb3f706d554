"""Computes now what does not depend on the input.

constants   calls on buffers alone, for inference: exact, kept where the result is at most FOLD_BYTES
batch norm  y = g (conv(x, W) + b - m) / sqrt(v + e) + h
              = conv(x, W g / sqrt(v + e)) + (b - m) g / sqrt(v + e) + h      changes rounding
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..runtime.program import Entry, Program, escapes, is_random, writes
from .match import Call, Literal, Match, Maybe, Stored, Var, full_args
from .rewrite import Rule, apply_rules

aten = torch.ops.aten

FOLD_BYTES = 1 << 20

# In `Store.forms`: a variant that cannot fold reads the model's own tensor beside this one.
FOLDED = "folded"


def fold_constants(program: Program) -> Program:
    """Evaluate calls whose every tensor argument is a stored buffer. Exact; leaves training variants alone.

    A value stays where it is computed if something may write to it: each call needs a fresh one.
    """
    if program.contract.training:
        return program
    values: dict[fx.Node, Tensor] = {}
    written = program.written()
    for node in list(program.graph.nodes):
        value = None if program.tensor_of(node) in written else _constant(program, node, values)
        if value is not None:
            values[node] = value
    for node, value in values.items():
        outside = [u for u in node.users if u not in values]
        if node.op == "get_attr" or not outside or escapes(node) or value.numel() * value.element_size() > FOLD_BYTES:
            continue
        new = program.get_attr(program.store.constant(value), node)
        for user in outside:
            user.replace_input_with(node, new)
        program.log.append(Entry(stage="fold", rule="fold.constant", where=node.name))
    program.tidy()
    return program


def _constant(program: Program, node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor | None:
    name = program.tensor_of(node)
    if name is not None:
        stored = program.store.get(name)
        return stored if isinstance(stored, Tensor) and not isinstance(stored, nn.Parameter) else None
    if node.op != "call_function" or writes(node) or not node.all_input_nodes or is_random(node):
        return None
    if not all(n in values for n in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target is callable
    return result.contiguous() if isinstance(result, Tensor) else None


def _one_reader(program: Program, found: Match) -> str | None:
    for name in ("w", "b", "gamma", "beta", "mean", "var"):
        node = found[name]
        if isinstance(node, fx.Node):
            stored = program.tensor_of(node)
            if stored is None:
                return f"{node.name} is computed"
            reads = [n for n in program.graph.nodes if program.tensor_of(n) == stored for _ in n.users]
            if name in ("w", "b") and len(reads) > 1:
                return f"{stored} is read elsewhere"
    return None


def folded_bias_name(fqn: str) -> str:
    """Where the bias is stored that a convolution without one gets from the batch norm after it."""
    return f"{fqn}_folded_bias"


def _fold_batch_norm(program: Program, found: Match) -> Any:
    store, conv = program.store, found["conv"]
    w, b, gamma, beta, mean, var = (_stored(program, found[n]) for n in ("w", "b", "gamma", "beta", "mean", "var"))
    assert w is not None and mean is not None and var is not None
    with torch.no_grad():
        factor = torch.rsqrt(var.double() + found["eps"])
        factor = factor if gamma is None else factor * gamma.double()
        bias = -mean.double() if b is None else b.double() - mean.double()
        bias = bias * factor if beta is None else bias * factor + beta.double()
        weight = w.double() * factor.reshape(-1, *(1 for _ in w.shape[1:]))
    fqn = str(found["w"].target)
    bias_name = str(found["b"].target) if b is not None else folded_bias_name(fqn)
    store.put(fqn, nn.Parameter(weight.to(w.dtype)))
    store.put(bias_name, nn.Parameter(bias.to(w.dtype)))
    store.forms[fqn] = store.forms[bias_name] = FOLDED
    read = program.get_attr(bias_name, conv)
    return program.emit(aten.conv2d.default, found["x"], found["w"], read, *full_args(conv)[3:], like=found.root)


def _stored(program: Program, node: fx.Node | None) -> Tensor | None:
    value = program.store.get(str(node.target)) if node is not None else None
    return value if isinstance(value, Tensor) else None


BATCH_NORM_INTO_CONV = Rule(
    name="fold.batch_norm_into_conv",
    pattern=Call(
        aten.batch_norm.default,
        Call(aten.conv2d.default, Var("x"), Stored("w"), Maybe("b"), name="conv"),
        Maybe("gamma"),
        Maybe("beta"),
        Stored("mean"),
        Stored("var"),
        False,
        Literal("momentum"),
        Literal("eps"),
    ),
    check=_one_reader,
    replace=_fold_batch_norm,
    approximate=True,
)


def fold_batch_norm(program: Program) -> Program:
    """Fold inference batch norms into the convolution before them.

    Writes the folded weights into the program's store, which must not be the one that training uses.
    """
    apply_rules(program, (BATCH_NORM_INTO_CONV,), "fold")
    return program
