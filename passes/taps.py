"""Taps: values inside a graph given out beside its outputs, for losses that compare two models within.

    start    what goes into the first block of a row: the output of the embeddings
    end      the residual stream at a block's end
    scores   of an attention, before the softmax: q k^T * scale + mask, (B, H, queries, keys)
    output   of a module

Where attention is one fused call, its scores are computed once more beside it. The program itself is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ..runtime import compat
from ..runtime.errors import DistillationError, nearest
from ..runtime.program import Program, is_float, value_of
from .depth import Block, Row, find_rows, outermost
from .match import full_args
from .outputs import given, output_of

aten = torch.ops.aten

Kind = Literal["start", "end", "scores", "output"]

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


@dataclass(frozen=True)
class Tap:
    """One value. path: of the row (start), the block (end, scores) or the module (output).

    index: which of a block's attentions, in the order in which they are called
    """

    kind: Kind
    path: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of {self.path or 'the model'}" + (f", attention {self.index}" if self.index else "")


def rows_of(program: Program, gone: Collection[str] = ()) -> list[Row]:
    """Outermost rows of blocks, without those whose blocks are `gone`; a row of one is one as well."""
    found = []
    for row in find_rows(program, least=1):
        blocks = tuple(
            b for b in row.blocks if b.path not in gone and not b.path.startswith(tuple(f"{g}." for g in gone))
        )
        if blocks:
            found.append(Row(row.path, blocks))
    return outermost(found)


def attentions(block: Block) -> list[fx.Node]:
    """Calls of attention in a block: fused ones, or the softmax of written-out ones."""
    fused = [n for n in block.nodes if n.target is aten.scaled_dot_product_attention.default]
    written = [n for n in block.nodes if n.target in SOFTMAX and value_of(n).dim() == 4]
    return sorted([*fused, *written], key=block.nodes.index)


def tapped(program: Program, taps: Sequence[Tap], gone: Collection[str] = ()) -> Program:
    """A copy of the graph that gives out these values after its outputs. Raises DistillationError for one not there."""
    copy = program.copy()
    rows = rows_of(copy, gone)
    values = [_node(copy, rows, tap) for tap in taps]
    output_of(copy).args = ((*given(copy), *values),)
    copy.tidy()
    return copy


def _node(program: Program, rows: Sequence[Row], tap: Tap) -> fx.Node:
    if tap.kind == "output":
        return _module_output(program, tap.path)
    if tap.kind == "start":
        row = next((row for row in rows if row.path == tap.path), None)
        if row is None:
            raise _not_there(tap, [row.path for row in rows])
        return state(row.blocks[0], "start")
    blocks = {block.path: block for row in rows for block in row.blocks}
    if tap.path not in blocks:
        raise _not_there(tap, list(blocks))
    return state(blocks[tap.path], "end") if tap.kind == "end" else _scores(program, blocks[tap.path], tap)


def _not_there(tap: Tap, known: Sequence[str]) -> DistillationError:
    near = nearest(tap.path, known)
    return DistillationError(
        f"nothing to tap: {tap}",
        required="a place in the graph",
        found="none of that name",
        cure=f"near names are {', '.join(map(repr, near))}" if near else "the graph has no such places",
    )


def state(block: Block, side: Literal["start", "end"]) -> fx.Node:
    """The residual stream before or after a block. Raises DistillationError for a block that does not have one."""
    if not block.instead:
        raise DistillationError(
            f"block {block.path} has no residual stream to tap",
            required="a block that gives on what it is given, in the same shape",
            found=block.reason or "none",
        )
    end = list(block.instead)[-1]
    return end if side == "end" else block.instead[end]


def _module_output(program: Program, path: str) -> fx.Node:
    """The last floating-point value of a module that others read."""
    inside = [n for n in program.graph.nodes if n.op == "call_function" and path and path in _paths(n)]
    within = set(inside)
    read = [n for n in inside if is_float(n) and value_of(n).dim() and any(user not in within for user in n.users)]
    if not read:
        known = {p: None for n in program.graph.nodes if n.op == "call_function" for p in _paths(n) if p}
        raise _not_there(Tap("output", path), list(known))
    last: fx.Node = read[-1]
    return last


def _paths(node: fx.Node) -> Iterator[str]:
    return (path for _, path, _ in compat.module_calls(node))


def _scores(program: Program, block: Block, tap: Tap) -> fx.Node:
    found = attentions(block)
    if tap.index >= len(found):
        names = {str(n.target) for n in block.nodes}
        kinds = sorted(name for name in names if "attention" in name or "encoder_layer" in name) or ["none"]
        raise DistillationError(
            f"the attention scores of {block.path} cannot be seen",
            required="scaled_dot_product_attention, or a softmax over scores (B, H, queries, keys)",
            found=f"{len(found)} such attentions; fused: {', '.join(kinds)}",
            cure='un-fuse it: load the model with attn_implementation="eager" (transformers), or call '
            "torch.backends.mha.set_fastpath_enabled(False) before (torch.nn.TransformerEncoder)",
        )
    call = found[tap.index]
    if call.target in SOFTMAX:
        scores = call.args[0]
        assert isinstance(scores, fx.Node)
        return scores
    return _unfused(program, call)


def _unfused(program: Program, call: fx.Node) -> fx.Node:
    """What scaled_dot_product_attention takes the softmax of, as torch documents it."""
    q, k, _, mask, _, causal, scale, grouped = full_args(call)
    scores: fx.Node

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return program.emit(target, *args, like=call, **kwargs)

    if grouped:
        times = value_of(q).shape[-3] // value_of(k).shape[-3]
        k = emit(aten.repeat_interleave.self_int, k, int(times), -3)
    scale = 1 / math.sqrt(int(value_of(q).shape[-1])) if scale is None else scale
    scores = emit(aten.mul.Tensor, emit(aten.matmul.default, q, emit(aten.transpose.int, k, -2, -1)), scale)
    if causal:
        seen = emit(aten.tril.default, emit(aten.ones_like.default, scores, dtype=torch.bool))
        scores = emit(aten.masked_fill.Scalar, scores, emit(aten.logical_not.default, seen), -math.inf)
    if mask is None:
        return scores
    if value_of(mask).dtype == torch.bool:
        return emit(aten.masked_fill.Scalar, scores, emit(aten.logical_not.default, mask), -math.inf)
    return emit(aten.add.Tensor, scores, mask)
