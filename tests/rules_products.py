"""The transfer rules of products: what they tie, where they end, and that each of it is needed."""

from __future__ import annotations

import pytest
import torch
from rules import IMAGE, ROWS, SEQUENCE, THROUGH, Case, image, rows, w
from torch import nn
from torch.nn import functional as F

A = torch.ops.aten


def conv(ops: str, make: object, dims: int, *groups: str) -> Case:
    """A convolution between two others of `dims` dimensions, with a mean over space."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    parts = {"a": lambda: kind(3, 12, 1), "p": make, "b": lambda: kind(8, 4, 1)}
    space = tuple(range(2, 2 + dims))
    return Case(
        tuple(ops.split()), lambda m, x: m.b(m.p(m.a(x)).relu()).mean(space), parts, IMAGE[:2] + (5,) * dims, groups
    )


def transposed(dims: int, **options: int) -> object:
    return lambda: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](12, 8, 2, **options)


def of_experts() -> nn.Parameter:
    """Two weights, for a call that transformers defines."""
    pytest.importorskip("transformers.integrations.moe")
    return w(2, 12, 7)()


INTO = "channels 12: a.weight[0] a.bias[0] p.weight[{0}]"
OUT = "channels 8: p.weight[{0}] p.bias[0] b.weight[1]"
PLAIN, TURNED = (INTO.format(1), OUT.format(0)), (INTO.format(0), OUT.format(1))
IN_FOURS = (
    "channels 4: a.weight[0]/3 a.bias[0]/3 p.weight[0]/2 p.bias[0]/2 b.weight[1]/2",
    "channels 3: a.weight[0]/4 a.bias[0]/4 p.weight[1]",
    "channels 2: p.weight[0]/4 p.bias[0]/4 b.weight[1]/4",
)
TURNED_IN_FOURS = (
    "channels 4: a.weight[0]/3 a.bias[0]/3 p.weight[0]/3 p.bias[0]/2 b.weight[1]/2",
    "channels 3: a.weight[0]/4 a.bias[0]/4 p.weight[0]/4",
    "channels 2: p.weight[1] p.bias[0]/4 b.weight[1]/4",
)
WITH_W = "rows 12: a.weight[0] a.bias[0] b.weight[1] w[{0}]"

CASES = {
    "linear": rows("linear", lambda m, y: y.relu()),
    "linear, a vector": rows("linear", lambda m, y: y * F.linear(y, m.w)[:, None], groups=[WITH_W.format(0)], w=w(12)),
    "matmul": rows(
        "matmul",
        lambda m, y: torch.matmul(y, m.w),
        7,
        groups=["rows 12: a.weight[0] a.bias[0] w[0]", "rows 7: w[1] b.weight[1]"],
        w=w(12, 7),
    ),
    "mm": rows(
        "mm",
        lambda m, y: A.mm(y, m.w),
        7,
        groups=["rows 12: a.weight[0] a.bias[0] w[0]", "rows 7: w[1] b.weight[1]"],
        w=w(12, 7),
    ),
    "bmm": rows(
        "bmm",
        lambda m, y: torch.bmm(y.transpose(0, 1), m.w),
        7,
        SEQUENCE,
        groups=["rows 12: a.weight[0] a.bias[0] w[1]", "rows 7: w[2] b.weight[1]"],
        w=w(5, 12, 7),
    ),
    "mv": rows("mv", lambda m, y: y * torch.mv(y, m.w)[:, None], groups=[WITH_W.format(0)], w=w(12)),
    "dot": rows("dot", lambda m, y: y * torch.dot(m.v, m.w), groups=[THROUGH, "rows 7: v[0] w[0]"], v=w(7), w=w(7)),
    "vdot": rows("vdot", lambda m, y: y * torch.vdot(m.v, m.w), groups=[THROUGH, "rows 7: v[0] w[0]"], v=w(7), w=w(7)),
    "matmul, heads": rows(
        "matmul",
        lambda m, y: (y.view(4, 5, 3, 4).transpose(1, 2) @ m.w).transpose(1, 2).flatten(2),
        6,
        SEQUENCE,
        groups=[
            "heads 3: a.weight[0]/4 a.bias[0]/4 w[0] b.weight[1]/2",
            "rows 4: a.weight[0]/3 a.bias[0]/3 w[1]",
            "rows 2: w[2] b.weight[1]/3",
        ],
        w=w(3, 4, 2),
    ),
    "addmm": rows(
        "addmm",
        lambda m, y: torch.addmm(m.v, y, m.w, beta=0.5),
        7,
        groups=["rows 12: a.weight[0] a.bias[0] w[0]", "rows 7: v[0] w[1] b.weight[1]"],
        v=w(7),
        w=w(12, 7),
    ),
    "baddbmm": rows(
        "baddbmm",
        lambda m, y: torch.baddbmm(m.v, y, m.w.expand(4, 12, 7)),
        7,
        SEQUENCE,
        groups=["rows 12: a.weight[0] a.bias[0] w[1]", "rows 7: v[2] w[2] b.weight[1]"],
        v=w(1, 5, 7),
        w=w(1, 12, 7),
    ),
    "addmv": rows(
        "addmv",
        lambda m, y: y + torch.addmv(m.u, m.v, m.w),
        groups=["rows 12: a.weight[0] a.bias[0] u[0] v[0] b.weight[1]", "rows 5: v[1] w[0]"],
        u=w(12),
        v=w(12, 5),
        w=w(5),
    ),
    "addbmm": rows(
        "addbmm",
        lambda m, y: y + torch.addbmm(m.u, m.v, m.w),
        groups=["rows 12: a.weight[0] a.bias[0] u[1] w[2] b.weight[1]", "heads 3: v[0] w[0]", "rows 5: v[2] w[1]"],
        u=w(4, 12),
        v=w(3, 4, 5),
        w=w(3, 5, 12),
    ),
    "outer": rows(
        "outer",
        lambda m, y: y @ torch.outer(m.v, m.w),
        7,
        groups=["rows 12: a.weight[0] a.bias[0] v[0]", "rows 7: w[0] b.weight[1]"],
        v=w(12),
        w=w(7),
    ),
    "inner": rows(
        "inner",
        lambda m, y: torch.inner(y, m.w),
        7,
        groups=["rows 12: a.weight[0] a.bias[0] w[1]", "rows 7: w[0] b.weight[1]"],
        w=w(7, 12),
    ),
    "cosine": rows(
        "cosine_similarity",
        lambda m, y: y * F.cosine_similarity(y, m.c(y), dim=-1)[:, None],
        groups=["rows 12: a.weight[0] a.bias[0] b.weight[1] c.weight[0] c.weight[1] c.bias[0]"],
        c=lambda: nn.Linear(12, 12),
    ),
    "cosine, every row by every other": rows(
        "cosine_similarity",
        lambda m, y: y * F.cosine_similarity(y[:, None], m.w[None], dim=-1).sum(1, keepdim=True),
        groups=[THROUGH + " w[1]", "rows 5: w[0]"],
        w=w(5, 12),
    ),
    "cosine, a number repeated": rows(
        "cosine_similarity",
        lambda m, y: y * F.cosine_similarity(y, m.w, dim=-1)[:, None],
        groups=[],
        stays={"a.weight[0]": "no rule for aten.cosine_similarity"},
        w=w(1, 1),
    ),
    "bilinear": rows(
        "bilinear",
        lambda m, y: m.pair(y, m.c(y)),
        7,
        groups=[
            "rows 12: a.weight[0] a.bias[0] c.weight[1] pair.weight[1]",
            "rows 9: c.weight[0] c.bias[0] pair.weight[2]",
            "rows 7: pair.weight[0] pair.bias[0] b.weight[1]",
        ],
        c=lambda: nn.Linear(12, 9),
        pair=lambda: nn.Bilinear(12, 9, 7),
    ),
    "cdist": rows(
        "cdist",
        lambda m, y: torch.cdist(y, m.w),
        7,
        groups=["rows 12: a.weight[0] a.bias[0] w[1]", "rows 7: w[0] b.weight[1]"],
        w=w(7, 12),
    ),
    "weight norm": rows(
        "_weight_norm",
        lambda m, y: F.conv1d(y.transpose(1, 2), torch._weight_norm(m.v, m.w, 1)).amax(-1),
        7,
        SEQUENCE,
        groups=["channels 12: a.weight[0] a.bias[0] v[1] w[1]", "channels 7: v[0] b.weight[1]"],
        v=w(7, 12, 3),
        w=w(1, 12, 1),
    ),
    "einsum": rows(
        "einsum",
        lambda m, y: torch.einsum("bhd,hdo->bo", y.view(4, 3, 4), m.w),
        7,
        groups=[
            "rows 3: a.weight[0]/4 a.bias[0]/4 w[0]",
            "rows 4: a.weight[0]/3 a.bias[0]/3 w[1]",
            "rows 7: w[2] b.weight[1]",
        ],
        w=w(3, 4, 7),
    ),
    "einsum, a letter twice": rows(
        "einsum",
        lambda m, y: torch.einsum("bi,ii->bi", y, m.w),
        groups=["rows 12: a.weight[0] a.bias[0] b.weight[1] w[0] w[1]"],
        w=w(12, 12),
    ),
    "einsum, dots": rows(
        "einsum",
        lambda m, y: torch.einsum("...i,...ij->...j", y, m.w),
        7,
        SEQUENCE,
        groups=["rows 12: a.weight[0] a.bias[0] w[1]", "rows 7: w[2] b.weight[1]"],
        w=w(5, 12, 7),
    ),
    "einsum, no result": rows(
        "einsum",
        lambda m, y: torch.einsum("zi,ij", y, m.w).T,
        7,
        groups=["rows 12: a.weight[0] a.bias[0] w[0]", "rows 7: w[1] b.weight[1]"],
        w=w(12, 7),
    ),
    "einsum, size 1 repeated": rows("einsum", lambda m, y: y * torch.einsum("bi,bi->b", m.w, y)[:, None], w=w(1, 1)),
    "conv1d": conv("conv1d", lambda: nn.Conv1d(12, 8, 3), 1, *PLAIN),
    "conv2d": conv("conv2d", lambda: nn.Conv2d(12, 8, 3), 2, *PLAIN),
    "conv3d": conv("conv3d", lambda: nn.Conv3d(12, 8, 3), 3, *PLAIN),
    "conv1d, same": conv("conv1d.padding", lambda: nn.Conv1d(12, 8, 4, padding="same"), 1, *PLAIN),
    "conv2d, same": conv("conv2d.padding", lambda: nn.Conv2d(12, 8, 4, padding="same"), 2, *PLAIN),
    "conv3d, same": conv("conv3d.padding", lambda: nn.Conv3d(12, 8, 2, padding="same"), 3, *PLAIN),
    "conv2d, grouped": conv("conv2d", lambda: nn.Conv2d(12, 8, 3, groups=4), 2, *IN_FOURS),
    "conv2d, same and grouped": conv(
        "conv2d.padding", lambda: nn.Conv2d(12, 8, 4, groups=4, padding="same"), 2, *IN_FOURS
    ),
    "conv2d, depthwise": image(
        "conv2d",
        lambda m, y: m.p(y),
        24,
        [
            "channels 12: a.weight[0] a.bias[0] p.weight[0]/2 p.bias[0]/2 b.weight[1]/2",
            "channels 2: p.weight[0]/12 p.bias[0]/12 b.weight[1]/12",
        ],
        p=lambda: nn.Conv2d(12, 24, 3, groups=12),
    ),
    "transposed 1": conv("conv_transpose1d", transposed(1), 1, *TURNED),
    "transposed 2": conv("conv_transpose2d.input", transposed(2), 2, *TURNED),
    "transposed 3": conv("conv_transpose3d.input", transposed(3), 3, *TURNED),
    "transposed 2, grouped": conv("conv_transpose2d.input", transposed(2, groups=4), 2, *TURNED_IN_FOURS),
    "experts": rows(
        "grouped_mm_fallback",
        lambda m, y: torch.ops.transformers.grouped_mm_fallback(y, m.w, torch.tensor([2, 4], dtype=torch.int32)),
        7,
        groups=["rows 12: a.weight[0] a.bias[0] w[1]", "rows 7: w[2] b.weight[1]"],
        stays={"w[0]": "constants.c0 is a constant"},
        w=of_experts,
    ),
    "embedding": Case(
        ("embedding",),
        lambda m, x: m.b(m.a(x.abs().long().clamp(0, 9))).mean(1),
        {"a": lambda: nn.Embedding(10, 12), "b": lambda: nn.Linear(12, 3)},
        ROWS,
        ("rows 12: a.weight[1] b.weight[1]",),
        {"a.weight[0]": "rows are looked up by number"},
    ),
    "embedding bag": Case(
        ("embedding_bag.padding_idx",),
        lambda m, x: m.b(m.a(x.abs().long().clamp(0, 9))),
        {"a": lambda: nn.EmbeddingBag(10, 12, mode="max"), "b": lambda: nn.Linear(12, 3)},
        ROWS,
        ("rows 12: a.weight[1] b.weight[1]",),
        {"a.weight[0]": "rows are looked up by number"},
    ),
    "embedding bag, plain": Case(
        ("embedding_bag",),
        lambda m, x: m.b(A.embedding_bag(m.w, x.abs().long().clamp(0, 9).flatten(), torch.arange(0, 24, 6))[0]),
        {"w": w(10, 12), "b": lambda: nn.Linear(12, 3)},
        ROWS,
        ("rows 12: w[1] b.weight[1]",),
        {"w[0]": "rows are looked up by number"},
    ),
    "attention": rows(
        "scaled_dot_product_attention",
        lambda m, y: (
            F.scaled_dot_product_attention(*(t.unflatten(-1, (3, 4)).transpose(1, 2) for t in (y, m.c(y), m.d(y))))
            .transpose(1, 2)
            .flatten(2)
        ),
        12,
        SEQUENCE,
        groups=[
            "heads 3: a.weight[0]/4 a.bias[0]/4 b.weight[1]/4 c.weight[0]/4 c.weight[1]/4 c.bias[0]/4 "
            "d.weight[0]/4 d.weight[1]/4 d.bias[0]/4",
            "rows 4: a.weight[0]/3 a.bias[0]/3 c.weight[0]/3 c.weight[1]/3 c.bias[0]/3 d.weight[1]/3",
            "rows 4: b.weight[1]/3 d.weight[0]/3 d.bias[0]/3",
        ],
        c=lambda: nn.Linear(12, 12),
        d=lambda: nn.Linear(12, 12),
    ),
    "attention, groups of queries and a mask": rows(
        "scaled_dot_product_attention",
        lambda m, y: (
            F.scaled_dot_product_attention(
                y.view(4, 5, 6, 2).transpose(1, 2),
                m.c(y).view(4, 5, 2, 2).transpose(1, 2),
                m.d(y).view(4, 5, 2, 3).transpose(1, 2),
                attn_mask=m.w,
                enable_gqa=True,
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        18,
        SEQUENCE,
        groups=[
            "heads 2: a.weight[0]/6 a.bias[0]/6 b.weight[1]/9 c.weight[0]/2 c.weight[1]/6 c.bias[0]/2 "
            "d.weight[0]/3 d.weight[1]/6 d.bias[0]/3 w[0]/3",
            "heads 3: a.weight[0]/4 a.bias[0]/4 b.weight[1]/6 c.weight[1]/4 d.weight[1]/4 w[0]/2",
            "rows 2: a.weight[0]/6 a.bias[0]/6 c.weight[0]/2 c.weight[1]/6 c.bias[0]/2 d.weight[1]/6",
            "rows 3: b.weight[1]/6 d.weight[0]/2 d.bias[0]/2",
        ],
        c=lambda: nn.Linear(12, 4),
        d=lambda: nn.Linear(12, 6),
        w=w(6, 5, 5),
    ),
    "attention, keys": rows(
        "scaled_dot_product_attention",
        lambda m, y: F.scaled_dot_product_attention(y, m.v[None], m.w[None]),
        7,
        SEQUENCE,
        groups=["rows 12: a.weight[0] a.bias[0] v[1]", "rows 7: w[1] b.weight[1]"],
        stays={"v[0]": "keys", "w[0]": "keys"},
        v=w(9, 12),
        w=w(9, 7),
    ),
}
