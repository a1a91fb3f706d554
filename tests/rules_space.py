"""The transfer rules of calls that know channels and space, and of those that move along a dimension."""

from __future__ import annotations

from typing import Any

import torch
from rules import CHANNELS, SEQUENCE, Case, image, rows, w
from torch import nn
from torch.nn import functional as F

A = torch.ops.aten

IN_FOURS = "channels 3: a.weight[0]/4 a.bias[0]/4 b.weight[1]"
SHUFFLED = (
    "channels 3: a.weight[0]/4 a.bias[0]/4 b.weight[1]/4",
    "channels 4: a.weight[0]/3 a.bias[0]/3 b.weight[1]/3",
)


def pooled(ops: str, dims: int, op: Any) -> Case:
    """A call over `dims` dimensions of space between two convolutions."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    parts = {"a": lambda: kind(3, 12, 3, padding=1), "b": lambda: kind(12, 4, 1)}
    space = tuple(range(2, 2 + dims))
    return Case(tuple(ops.split()), lambda m, x: m.b(op(m.a(x))).mean(space), parts, (2, 3) + (6,) * dims, (CHANNELS,))


def up(mode: str, **options: bool) -> Any:
    return lambda y: F.interpolate(y, scale_factor=1.5, mode=mode, **options)


def moved(ops: str, op: Any) -> dict[str, Case]:
    """A call along a dimension (its second argument): what is pruned stays, another one does not matter."""
    reason = {"a.weight[0]": "it moves along it", "b.weight[1]": "it moves along it"}
    return {
        f"{ops}, what is pruned": rows(ops, lambda m, y: op(y, -1), groups=[], stays=reason),
        f"{ops}, another dimension": rows(ops, lambda m, y: op(y, 1).select(1, 1), shape=SEQUENCE),
    }


CASES = {
    "pixel shuffle": image("pixel_shuffle", lambda m, y: F.pixel_shuffle(y, 2), 3, [IN_FOURS], {}),
    "pixel unshuffle": image(
        "pixel_unshuffle",
        lambda m, y: F.pixel_unshuffle(y, 2),
        48,
        ["channels 12: a.weight[0] a.bias[0] b.weight[1]/4"],
    ),
    "pixel shuffle, space": rows(
        "pixel_shuffle",
        lambda m, y: F.pixel_shuffle(y[:, :4, None], 2).flatten(1),
        48,
        SEQUENCE,
        [],
        {"a.weight[0]": "it moves along it"},
    ),
    "pixel unshuffle, space": rows(
        "pixel_unshuffle",
        lambda m, y: F.pixel_unshuffle(y[:, None, :4], 2).flatten(1),
        48,
        SEQUENCE,
        [],
        {"a.weight[0]": "it moves along it"},
    ),
    "channel shuffle": image("channel_shuffle", lambda m, y: F.channel_shuffle(y, 3).relu(), groups=SHUFFLED),
    "channel shuffle, native": image(
        "native_channel_shuffle", lambda m, y: A.native_channel_shuffle(y, 3), groups=SHUFFLED
    ),
    "glu": rows("glu", lambda m, y: F.glu(y), 6, groups=["rows 6: a.weight[0]/2 a.bias[0]/2 b.weight[1]"]),
    "glu, inside a factor": rows(
        "glu",
        lambda m, y: F.glu(y.view(4, 3, 4).flatten(1)),
        6,
        groups=[],
        stays={"a.weight[0]": "cut at 6 inside a factor"},
    ),
    "im2col": Case(
        ("im2col",),
        lambda m, x: m.b(F.unfold(m.a(x), 3).transpose(1, 2)).mean(1),
        {"a": lambda: nn.Conv2d(3, 12, 1), "b": lambda: nn.Linear(108, 4)},
        (2, 3, 5, 5),
        ("channels 12: a.weight[0] a.bias[0] b.weight[1]/9",),
    ),
    "col2im": Case(
        ("col2im",),
        lambda m, x: m.b(F.fold(m.a(x).transpose(1, 2), (6, 6), 3)).mean((2, 3)),
        {"a": lambda: nn.Linear(6, 108), "b": lambda: nn.Conv2d(12, 4, 1)},
        (2, 16, 6),
        ("channels 12: a.weight[0]/9 a.bias[0]/9 b.weight[1]",),
    ),
    "unfold": rows(
        "unfold",
        lambda m, y: y.unfold(1, 3, 2).flatten(2).mean(1),
        36,
        SEQUENCE,
        ["rows 12: a.weight[0] a.bias[0] b.weight[1]/3"],
        {},
    ),
    "unfold, what is pruned": rows(
        "unfold", lambda m, y: y.unfold(-1, 3, 2).flatten(1), 15, groups=[], stays={"a.weight[0]": "it moves along it"}
    ),
    "grid sampler": image(
        "grid_sampler",
        lambda m, y: F.grid_sample(y, m.w.expand(2, 5, 5, 2), align_corners=False),
        stays={"w[3]": "it moves along it"},
        w=w(1, 5, 5, 2),
    ),
    "grid sampler, space": rows(
        "grid_sampler",
        lambda m, y: F.grid_sample(y[:, None], m.w.expand(4, 1, 5, 2), align_corners=False).flatten(1),
        5,
        SEQUENCE,
        ["rows 5: b.weight[1] w[2]"],
        {"a.weight[0]": "it moves along it"},
        w=w(1, 1, 5, 2),
    ),
    "unpool": image(
        "max_unpool2d",
        lambda m, y: y * F.max_unpool2d(F.max_pool2d(y, 2), F.max_pool2d(m.c(y), 2, return_indices=True)[1], 2),
        groups=["channels 12: a.weight[0] a.bias[0] b.weight[1] c.weight[0] c.weight[1] c.bias[0]"],
        c=lambda: nn.Conv2d(12, 12, 1),
    ),
    "tril": rows(
        "tril triu",
        lambda m, y: torch.einsum("bst,btd->bsd", (m.w.tril() + m.v.triu()).sum(0, keepdim=True).expand(4, 5, 5), y),
        shape=SEQUENCE,
        groups=[CHANNELS.replace("channels", "rows"), "rows 3: v[0] w[0]"],
        w=w(3, 5, 5),
        v=w(3, 5, 5),
    ),
    "tril, what is pruned": rows(
        "tril",
        lambda m, y: y @ m.w.tril(),
        groups=[],
        stays={"a.weight[0]": "what stays goes by its number"},
        w=w(12, 12),
    ),
    "triu, what is pruned": rows(
        "triu",
        lambda m, y: y @ m.w.triu(),
        groups=[],
        stays={"a.weight[0]": "what stays goes by its number"},
        w=w(12, 12),
    ),
    **{
        name: pooled(ops, dims, op)
        for name, ops, dims, op in (
            ("adaptive mean 1", "adaptive_avg_pool1d", 1, lambda y: F.adaptive_avg_pool1d(y, 2)),
            ("adaptive mean 2", "adaptive_avg_pool2d", 2, lambda y: F.adaptive_avg_pool2d(y, 2)),
            ("adaptive mean 3", "adaptive_avg_pool3d", 3, lambda y: F.adaptive_avg_pool3d(y, 2)),
            ("adaptive maximum 1", "adaptive_max_pool1d", 1, lambda y: F.adaptive_max_pool1d(y, 2)),
            ("adaptive maximum 2", "adaptive_max_pool2d", 2, lambda y: F.adaptive_max_pool2d(y, 2)),
            ("adaptive maximum 3", "adaptive_max_pool3d", 3, lambda y: F.adaptive_max_pool3d(y, 2)),
            ("mean 1", "avg_pool1d", 1, lambda y: F.avg_pool1d(y, 2)),
            ("mean 2", "avg_pool2d", 2, lambda y: F.avg_pool2d(y, 2)),
            ("mean 3", "avg_pool3d", 3, lambda y: F.avg_pool3d(y, 2)),
            ("maximum 1", "max_pool1d", 1, lambda y: F.max_pool1d(y, 2)),
            ("maximum 2", "max_pool2d", 2, lambda y: F.max_pool2d(y, 2)),
            ("maximum 3", "max_pool3d", 3, lambda y: F.max_pool3d(y, 2)),
            ("places 1", "max_pool1d_with_indices", 1, lambda y: F.max_pool1d(y, 2, return_indices=True)[0]),
            ("places 2", "max_pool2d_with_indices", 2, lambda y: F.max_pool2d(y, 2, return_indices=True)[0]),
            ("places 3", "max_pool3d_with_indices", 3, lambda y: F.max_pool3d(y, 2, return_indices=True)[0]),
            ("nearest 1", "upsample_nearest1d.vec", 1, up("nearest")),
            ("nearest 2", "upsample_nearest2d.vec", 2, up("nearest")),
            ("nearest 3", "upsample_nearest3d.vec", 3, up("nearest")),
            ("nearest, exact 1", "_upsample_nearest_exact1d.vec", 1, up("nearest-exact")),
            ("nearest, exact 2", "_upsample_nearest_exact2d.vec", 2, up("nearest-exact")),
            ("nearest, exact 3", "_upsample_nearest_exact3d.vec", 3, up("nearest-exact")),
            ("linear 1", "upsample_linear1d.vec", 1, up("linear")),
            ("linear 2", "upsample_bilinear2d.vec", 2, up("bilinear")),
            ("linear 3", "upsample_trilinear3d.vec", 3, up("trilinear")),
            ("cubic", "upsample_bicubic2d.vec", 2, up("bicubic")),
            ("linear, smooth", "_upsample_bilinear2d_aa.vec", 2, up("bilinear", antialias=True)),
            ("cubic, smooth", "_upsample_bicubic2d_aa.vec", 2, up("bicubic", antialias=True)),
        )
    },
    "pooling, what is pruned": rows(
        "max_pool1d", lambda m, y: F.max_pool1d(y, 2), 6, SEQUENCE, [], {"a.weight[0]": "it moves along it"}
    ),
    "cumsum": rows("cumsum", lambda m, y: y.cumsum(-1)),
    "cumsum, another dimension": rows("cumsum", lambda m, y: y.cumsum(1).select(1, 1), shape=SEQUENCE),
    **moved("cumprod", lambda y, d: y.cumprod(d)),
    **moved("logcumsumexp", lambda y, d: y.logcumsumexp(d)),
    **moved("cummax", lambda y, d: y.cummax(d)[0]),
    **moved("cummin", lambda y, d: y.cummin(d)[0]),
    **moved("flip", lambda y, d: y.flip(d)),
    **moved("roll", lambda y, d: y.roll(2, d)),
    **moved("sort", lambda y, d: y.sort(d)[0]),
    **moved("sort.stable", lambda y, d: y.sort(dim=d, stable=True)[0]),
    **moved("argsort", lambda y, d: y.argsort(d).float()),
    **moved("argsort.stable", lambda y, d: y.argsort(dim=d, stable=True).float()),
    **moved("log_softmax.int", lambda y, d: y.log_softmax(d)),
    "roll, all of it": rows("roll", lambda m, y: y.roll(3), groups=[], stays={"a.weight[0]": "it moves along it"}),
    "topk": rows("topk", lambda m, y: y.topk(3, 1)[0].sum(1), shape=SEQUENCE),
}
