"""The transfer rules of norms, reductions and extremes: statistics of what is kept, or nothing is pruned."""

from __future__ import annotations

import torch
from rules import SEQUENCE, THROUGH, Case, image, rows, w
from torch import nn
from torch.nn import functional as F

A = torch.ops.aten

IN_THREES = (
    "rows 3: a.weight[0]/4 a.bias[0]/4 b.weight[1]/4 w[0]/4",
    "rows 4: a.weight[0]/3 a.bias[0]/3 b.weight[1]/3 w[0]/3",
)
NORMED = "{0} 12: a.weight[0] a.bias[0] b.weight[1] p.weight[0] p.bias[0]"
ONE = "rows 12: a.weight[0] a.bias[0] b.weight[1] {0}"


def stays(ops: str, op: object, reason: str = "it looks at all of it", shape: tuple[int, ...] = (4, 6)) -> Case:
    """A call whose dimension cannot be pruned."""
    return rows(ops, op, shape=shape, groups=[], stays={"a.weight[0]": reason, "b.weight[1]": reason})  # type: ignore[arg-type]


def other(ops: str, op: object) -> Case:
    """The same call along a dimension that is not pruned."""
    return rows(ops, op, shape=SEQUENCE)  # type: ignore[arg-type]


def odd() -> nn.Parameter:
    """Eleven numbers near 2, and one near -2."""
    return nn.Parameter(torch.tensor([2.0] * 11 + [-2.0]))


CASES = {
    "batch norm": rows(
        "batch_norm",
        lambda m, y: m.p(y),
        groups=["rows 12: a.weight[0] a.bias[0] b.weight[1] p.weight[0] p.bias[0] p.running_mean[0] p.running_var[0]"],
        p=lambda: nn.BatchNorm1d(12),
    ),
    "batch norm, of a weight": image(
        "batch_norm",
        lambda m, y: F.conv2d(y, F.batch_norm(m.w.reshape(1, 7, 108), None, None, training=True).view(7, 12, 3, 3)),
        7,
        ["channels 12: a.weight[0] a.bias[0] w[1]", "channels 7: w[0] b.weight[1]"],
        w=w(7, 12, 3, 3),
    ),
    "layer norm": rows("layer_norm", lambda m, y: m.p(y), groups=[NORMED.format("rows")], p=lambda: nn.LayerNorm(12)),
    "layer norm, two dimensions": rows(
        "layer_norm",
        lambda m, y: m.p(y),
        12,
        SEQUENCE,
        [ONE.format("p.weight[1] p.bias[1]")],
        p=lambda: nn.LayerNorm((5, 12)),
    ),
    "rms norm": rows("rms_norm", lambda m, y: m.p(y), groups=[ONE.format("p.weight[0]")], p=lambda: nn.RMSNorm(12)),
    "group norm": rows("group_norm", lambda m, y: F.group_norm(y, 3, m.w, m.w), groups=IN_THREES, w=w(12)),
    "group norm, space": rows(
        "group_norm", lambda m, y: F.group_norm(y, 5).mean(1), 12, SEQUENCE, [], {"a.weight[0]": "a statistic over it"}
    ),
    "instance norm": image(
        "instance_norm",
        lambda m, y: m.p(y),
        groups=[NORMED.format("channels")],
        p=lambda: nn.InstanceNorm2d(12, affine=True),
    ),
    "instance norm, space": rows(
        "instance_norm",
        lambda m, y: F.instance_norm(y).mean(1),
        12,
        SEQUENCE,
        [],
        {"a.weight[0]": "a statistic over it"},
    ),
    "prelu": image(
        "prelu",
        lambda m, y: m.p(y),
        groups=["channels 12: a.weight[0] a.bias[0] b.weight[1] p.weight[0]"],
        p=lambda: nn.PReLU(12),
    ),
    "prelu, rows": rows("prelu", lambda m, y: m.p(y), groups=[ONE.format("p.weight[0]")], p=lambda: nn.PReLU(12)),
    "prelu, one for all": image("prelu", lambda m, y: m.p(y), p=nn.PReLU),
    "softmax": rows("softmax.int", lambda m, y: y.softmax(-1)),
    "softmax, special": rows("special_softmax", lambda m, y: torch.special.softmax(y, -1)),
    "_softmax": rows("_softmax", lambda m, y: A._softmax(y, -1, False)),
    "softmax, another dimension": other("softmax.int", lambda m, y: y.softmax(1).amax(1)),
    "mean": rows("mean.dim", lambda m, y: y - y.mean(-1, keepdim=True)),
    "mean of all": rows("mean", lambda m, y: y - y.mean()),
    "sum": rows("sum.dim_IntList", lambda m, y: y - y.sum(-1, keepdim=True)),
    "sum of all": rows("sum", lambda m, y: y - y.sum()),
    "nansum": rows("nansum", lambda m, y: y - y.nansum(-1, keepdim=True)),
    "norm": rows("linalg_vector_norm", lambda m, y: y / y.norm(dim=-1, keepdim=True)),
    "norm, the largest": rows("linalg_vector_norm", lambda m, y: y / y.norm(float("inf"), dim=-1, keepdim=True)),
    "norm, the least": stays(
        "linalg_vector_norm", lambda m, y: y / torch.linalg.vector_norm(y, -1, dim=-1, keepdim=True)
    ),
    "norm, the old one": rows("norm.ScalarOpt_dim", lambda m, y: y / A.norm.ScalarOpt_dim(y, 2, [-1], True)),
    "norm, the old one's least": stays("norm.ScalarOpt_dim", lambda m, y: y / A.norm.ScalarOpt_dim(y, -1, [-1], True)),
    **{
        name: stays(ops, lambda m, y, op=op: y * op(y, -1))
        for name, ops, op in (
            ("argmin", "argmin", lambda y, d: y.argmin(d, keepdim=True)),
            ("min, and which", "min.dim", lambda y, d: sum(y.min(d, keepdim=True))),
            ("any", "any.dim", lambda y, d: (y > 0.9).any(d, keepdim=True)),
            ("all", "all.dim", lambda y, d: (y > -0.9).all(d, keepdim=True)),
            ("prod", "prod.dim_int", lambda y, d: y.prod(d, keepdim=True)),
            ("median", "median.dim", lambda y, d: y.median(d, keepdim=True)[0]),
            ("var", "var.dim", lambda y, d: A.var.dim(y, [d], True, True)),
            ("std", "std.dim", lambda y, d: A.std.dim(y, [d], True, True)),
            ("var, corrected", "var.correction", lambda y, d: y.var(d, correction=0, keepdim=True)),
            ("std, corrected", "std.correction", lambda y, d: y.std(d, correction=0, keepdim=True)),
            ("var and mean", "var_mean.dim", lambda y, d: A.var_mean.dim(y, [d], True, True)[1]),
            ("std and mean", "std_mean.dim", lambda y, d: A.std_mean.dim(y, [d], True, True)[0]),
            (
                "var and mean, corrected",
                "var_mean.correction",
                lambda y, d: torch.var_mean(y, d, correction=0, keepdim=True)[0],
            ),
            (
                "std and mean, corrected",
                "std_mean.correction",
                lambda y, d: torch.std_mean(y, d, correction=0, keepdim=True)[1],
            ),
            ("kthvalue", "kthvalue", lambda y, d: y.kthvalue(4, d, keepdim=True)[0]),
        )
    },
    **{
        f"{name} of all": rows(
            name, lambda m, y, op=op: y * op(m.w), groups=[THROUGH], stays={"w[0]": "it looks at all of it"}, w=odd
        )
        for name, op in (
            ("any", lambda v: (v < 0).any()),
            ("all", lambda v: (v > 0).all()),
            ("prod", torch.prod),
            ("var", A.var.default),
            ("std", A.std.default),
        )
    },
    **{
        f"the {name}": rows(ops, lambda m, y, op=op: y - op(y))
        for name, ops, op in (
            ("largest", "amax", lambda y: y.amax(-1, keepdim=True)),
            ("largest of all", "max", lambda y: y.max()),
            ("largest, not which", "max.dim", lambda y: y.max(-1, keepdim=True)[0]),
            ("least", "amin", lambda y: y.amin(-1, keepdim=True)),
            ("least of all", "min", lambda y: y.min()),
            ("least, not which", "min.dim", lambda y: y.min(-1, keepdim=True)[0]),
            ("logarithm of a sum", "logsumexp", lambda y: y.logsumexp(-1, keepdim=True)),
        )
    },
    "the largest of two dimensions": rows(
        "amax",
        lambda m, y: y - y.view(4, 3, 4).amax((1, 2), keepdim=True).flatten(1),
        groups=[f"rows {n}: a.weight[0]/{k} a.bias[0]/{k} b.weight[1]/{k}" for n, k in ((3, 4), (4, 3))],
    ),
    "the largest of whole numbers": stays("amax", lambda m, y: y * (y > 0).long().amax(-1, keepdim=True)),
    "max, another dimension": other("max.dim", lambda m, y: y.max(1)[0]),
    "var, another dimension": other("var.correction", lambda m, y: y.var(1, correction=0)),
    "kthvalue, another dimension": other("kthvalue", lambda m, y: y.kthvalue(2, 1)[0]),
}
