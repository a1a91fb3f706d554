"""The transfer rules of calls that move elements."""

from __future__ import annotations

from typing import Any

import torch
from rules import SEQUENCE, THROUGH, Case, image, rows, w
from torch import Tensor, nn
from torch.nn import functional as F

A = torch.ops.aten

HEADS = ("rows 3: a.weight[0]/4 a.bias[0]/4 b.weight[1]/4", "rows 4: a.weight[0]/3 a.bias[0]/3 b.weight[1]/3")
TWICE = "rows 12: a.weight[0] a.bias[0] b.weight[1]/2"
HALF = "rows 6: a.weight[0] a.bias[0]"
HALVES = "rows 6: a.weight[0]/2 a.bias[0]/2 b.weight[1]"
READ, UNREAD = "rows {0}: a.weight[0] a.bias[0] b.weight[1]", "rows {0}: a.weight[0] a.bias[0]"
COPIES = "rows 2: b.weight[1]/12"


def stays(ops: str, op: Any, reason: str, width: int = 12, shape: tuple[int, ...] = (4, 6), **parts: Any) -> Case:
    """A call whose dimension cannot be pruned."""
    return rows(ops, op, width, shape, [], {"a.weight[0]": reason, "b.weight[1]": reason}, **parts)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values)


CASES = {
    "view": rows("view", lambda m, y: y.view(4, 3, 4).transpose(1, 2).sigmoid().reshape(4, 12), groups=HEADS),
    "view, off the atoms": rows(
        "view",
        lambda m, y: y.view(4, 3, 4)[:, 1:].reshape(4, 2, 4).flatten(1),
        8,
        groups=HEADS[:0]
        + ("rows 2: a.weight[0]/4 a.bias[0]/4 b.weight[1]/4", "rows 4: a.weight[0]/3 a.bias[0]/3 b.weight[1]/2"),
    ),
    "reshape": rows("reshape", lambda m, y: y.reshape(4, 3, 4).relu().reshape(4, 12), groups=HEADS),
    "_unsafe_view": rows(
        "_unsafe_view", lambda m, y: A._unsafe_view(A._unsafe_view(y, [4, 3, 4]), [4, 12]), groups=HEADS
    ),
    "reshape, of no common factor": stays(
        "reshape", lambda m, y: torch.cat([y[:, 5:], y[:, :5]], 1).reshape(4, 3, 4).flatten(1), "not whole rows of 4"
    ),
    "flatten": rows("flatten.using_ints unflatten.int", lambda m, y: y.unflatten(-1, (3, 4)).flatten(1), groups=HEADS),
    "ravel": rows("ravel", lambda m, y: y.ravel().view(4, 12)),
    "view_as": rows(
        "view_as reshape_as",
        lambda m, y: y.view_as(m.w).sigmoid().reshape_as(y),
        groups=[HEADS[0] + " w[1]", HEADS[1] + " w[2]"],
        w=w(4, 3, 4),
    ),
    "permute": rows("permute", lambda m, y: y.permute(2, 0, 1).relu().permute(1, 2, 0), shape=SEQUENCE),
    "transpose": rows("transpose.int", lambda m, y: y.transpose(-1, 1).transpose(1, 2), shape=SEQUENCE),
    "swapaxes": rows("swapaxes swapdims", lambda m, y: y.swapaxes(1, 2).swapdims(-1, 1), shape=SEQUENCE),
    "movedim": rows(
        "movedim.int movedim.intlist", lambda m, y: y.movedim(2, 0).movedim((0, 1), (2, 0)), shape=SEQUENCE
    ),
    "moveaxis": rows(
        "moveaxis.int moveaxis.intlist",
        lambda m, y: torch.moveaxis(torch.moveaxis(y, -1, 0), (0, 1, 2), (2, 0, 1)),
        shape=SEQUENCE,
    ),
    "t": rows("t numpy_T", lambda m, y: y.t().T),
    "mT": rows("mT adjoint", lambda m, y: y.mT.relu().adjoint(), shape=SEQUENCE),
    "squeeze, one index left": image(
        "squeeze", lambda m, y: y.mean((2, 3), keepdim=True).squeeze()[:, :, None, None], ratio=0.99
    ),
    "squeeze.dim, one index left": rows(
        "squeeze.dim unsqueeze", lambda m, y: y.unsqueeze(1).squeeze(2).squeeze(1), ratio=0.99
    ),
    "squeeze.dims, one index left": rows("squeeze.dims", lambda m, y: y[:, None].squeeze((1, 2)), ratio=0.99),
    "expand": rows("expand", lambda m, y: m.w.expand(4, 12) * y, w=w(1, 1)),
    "expand, in front": rows(
        "expand", lambda m, y: y[:, None].expand(-1, 2, -1).flatten(1), 24, groups=[TWICE, COPIES]
    ),
    "broadcast_to": rows("broadcast_to", lambda m, y: torch.broadcast_to(m.w, (4, 12)) * y, w=w(1, 1)),
    "expand_as": rows(
        "expand_as",
        lambda m, y: m.w.expand_as(m.v) * y,
        groups=[THROUGH + " v[1] w[1]"],
        v=w(4, 12),
        w=w(1, 12),
    ),
    "broadcast_tensors": rows(
        "broadcast_tensors", lambda m, y: torch.broadcast_tensors(m.w, y)[0] + y, groups=[THROUGH + " w[1]"], w=w(1, 12)
    ),
    "repeat": rows("repeat", lambda m, y: y.repeat(1, 2), 24, groups=[TWICE, COPIES]),
    "tile": rows("tile", lambda m, y: y.tile(2), 24, groups=[TWICE, COPIES]),
    "repeat_interleave": rows(
        "repeat_interleave.self_int",
        lambda m, y: y.repeat_interleave(2, -1, output_size=24),
        24,
        groups=[TWICE, COPIES],
    ),
    "repeat_interleave, flat": stays(
        "repeat_interleave.self_int",
        lambda m, y: y.repeat_interleave(2).view(4, 24),
        "no rule for aten.repeat_interleave",
        24,
    ),
    "cat": rows("cat", lambda m, y: torch.cat([y, y.relu()], -1), 24, groups=[TWICE]),
    "concat": rows(
        "concat concatenate",
        lambda m, y: A.concat([y, A.concatenate([m.w, y], -1)], -1),
        29,
        groups=["rows 12: a.weight[0] a.bias[0] b.weight[1]/2", "rows 5: w[1] b.weight[1]"],
        w=w(4, 5),
    ),
    "stack": rows("stack", lambda m, y: torch.stack([y, y.relu()], -1).flatten(1), 24, groups=[TWICE], stays={}),
    "select": rows("select.int", lambda m, y: y * y.select(-1, 3)[:, None], groups=[READ.format(3), READ.format(8)]),
    "select, the last one": rows(
        "select.int", lambda m, y: y * y[:, -1][:, None], groups=[READ.format(11)], harmless="sizeless"
    ),
    "unbind": rows(
        "unbind.int getitem",
        lambda m, y: y.view(4, 3, 4).unbind(1)[2],
        4,
        groups=["rows 4: a.weight[0]/3 a.bias[0]/3 b.weight[1]"],
    ),
    "slice": rows("slice.Tensor", lambda m, y: y[:, 6:] + y[:, :-6], 6, groups=[HALVES]),
    "slice, steps": rows("slice.Tensor", lambda m, y: y[:, ::2] * y[:, 1::2], 6, groups=[HALVES], stays={}),
    "slice, odd steps": stays("slice.Tensor", lambda m, y: y[:, 1:-2:3], "a stretch with steps of 3", 3),
    "slice, inside a factor": rows(
        "slice.Tensor",
        lambda m, y: y.view(4, 3, 4).flatten(1)[:, 2:],
        10,
        groups=[],
        stays={"a.weight[0]": "cut at 2 inside a factor"},
    ),
    "narrow": rows(
        "narrow", lambda m, y: y.narrow(-1, -7, 5), 5, groups=[UNREAD.format(5), READ.format(5), UNREAD.format(2)]
    ),
    "narrow, from the start": rows(
        "narrow", lambda m, y: y.narrow(1, 0, 5), 5, groups=[READ.format(5), UNREAD.format(7)]
    ),
    "split": rows(
        "split.Tensor",
        lambda m, y: torch.cat([p.relu() for p in y.split(5, -1)], -1),
        groups=[READ.format(5), READ.format(5), READ.format(2)],
    ),
    "split, sizes": rows(
        "split_with_sizes",
        lambda m, y: torch.cat(y.split([2, 4, 6], -1)[::-1], -1),
        groups=[READ.format(2), READ.format(4), READ.format(6)],
    ),
    "split.sizes": rows(
        "split.sizes", lambda m, y: A.split.sizes(y, [8, 4], 1)[0], 8, groups=[READ.format(8), UNREAD.format(4)]
    ),
    "chunk": rows("chunk", lambda m, y: y.chunk(2, -1)[0] * y.chunk(2, -1)[1], 6, groups=[HALVES], harmless="sizeless"),
    "tensor_split": rows(
        "tensor_split.sections",
        lambda m, y: torch.cat(y.tensor_split(5, -1)[1:], -1),
        9,
        groups=[UNREAD.format(3), READ.format(3), *[READ.format(2)] * 3],
    ),
    "tensor_split, places": rows(
        "tensor_split.indices", lambda m, y: y.tensor_split((5,), -1)[1], 7, groups=[UNREAD.format(5), READ.format(7)]
    ),
    "pad": rows("pad", lambda m, y: F.pad(y, (1, 2), value=3.0), 15, stays={}),
    "constant_pad_nd": rows("constant_pad_nd", lambda m, y: A.constant_pad_nd(y, [2, 0], 1.0), 14, stays={}),
    "pad, cropped": stays("pad", lambda m, y: F.pad(y, (-1, 2)), "it is cropped", 13),
    "pad, reflected": stays(
        "pad", lambda m, y: F.pad(y, (1, 2), mode="reflect"), "it is padded with its own", 15, SEQUENCE
    ),
    "pad, reflected space": image("pad", lambda m, y: F.pad(y, (1, 2, 1, 1), mode="reflect")),
    "index": rows("index.Tensor", lambda m, y: y[torch.arange(4), torch.tensor([0, 4, 2, 1])], shape=SEQUENCE),
    "index, what is pruned": stays("index.Tensor", lambda m, y: y[:, [0, 3, 5]] * y[:, [0, 3, 5]], "", 3),
    "index_select": rows("index_select", lambda m, y: y.index_select(-2, numbers(0, 2, 1)).sum(1), shape=SEQUENCE),
    "index_select, what is pruned": stays("index_select", lambda m, y: y.index_select(1, numbers(0, 2, 1)), "", 3),
    "gather": rows(
        "gather",
        lambda m, y: y.gather(1, y[:, :1, :1].argmax(-1, keepdim=True).expand(-1, -1, 12)),
        shape=SEQUENCE,
        groups=[READ.format(11)],
    ),
    "gather, what is pruned": rows(
        "gather",
        lambda m, y: y.gather(1, m.i),
        groups=[],
        stays={"a.weight[0]": "it is indexed by number"},
        i=lambda: nn.Buffer(torch.arange(12).flip(0).repeat(4, 1)),
    ),
    "gather, in part": stays(
        "gather", lambda m, y: y.gather(1, torch.zeros(4, 2, 7, dtype=torch.long)), "it is read in part", 7, SEQUENCE
    ),
    "take_along_dim": rows(
        "take_along_dim",
        lambda m, y: torch.take_along_dim(y, torch.zeros(1, 2, 1, dtype=torch.long), 1).sum(1),
        shape=SEQUENCE,
    ),
    "take_along_dim, what is pruned": rows(
        "take_along_dim",
        lambda m, y: torch.take_along_dim(y, m.i, -1),
        groups=[],
        stays={"a.weight[0]": "it is indexed by number"},
        i=lambda: nn.Buffer(torch.arange(12).flip(0)[None]),
    ),
    **{
        f"{name}, {'what is pruned' if frozen else 'another dimension'}": (
            stays(
                name,
                lambda m, y, op=op: op(A, y.new_zeros(4, 12), 1, torch.arange(12).flip(0), y),
                "it is indexed by number",
            )
            if frozen
            else rows(
                name,
                lambda m, y, op=op: op(A, y.new_zeros(4, 3, 12), 1, numbers(0, 2, 1, 1, 0), y).sum(1),
                shape=SEQUENCE,
            )
        )
        for name in ("index_add", "index_copy", "index_add_", "index_copy_")
        for frozen in (False, True)
        for op in (lambda A, *args, name=name: getattr(A, name)(*args),)
    },
    "zeros and ones": rows(
        "zeros ones full empty.memory_format",
        lambda m, y: y * (torch.ones(12) + torch.full((4, 12), 2.0) + torch.zeros(12) * torch.empty(12).fill_(1.0)),
    ),
    "new ones": rows(
        "new_zeros new_ones new_full new_empty",
        lambda m, y: y * (y.new_ones(12) + y.new_full((12,), 2.0) + y.new_zeros(12) * y.new_empty(12).fill_(1.0)),
    ),
    **{
        name: stays(name, lambda m, y, op=op: y * op(), "its indices are numbers")
        for name, op in (
            ("arange", lambda: torch.arange(12)),
            ("arange.start", lambda: torch.arange(1, 13)),
            ("arange.start_step", lambda: torch.arange(0, 24, 2)),
            ("linspace", lambda: torch.linspace(0, 1, 12)),
        )
    },
    "eye": stays("eye", lambda m, y: y @ torch.eye(12), "its indices are numbers"),
    "eye.m": stays("eye.m", lambda m, y: y @ torch.eye(12, 7), "its indices are numbers", 7),
}
