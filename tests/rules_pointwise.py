"""The transfer rules of calls element by element, of copies, and of calls without a rule."""

from __future__ import annotations

from typing import Any

import torch
from rules import THROUGH, rows, w
from torch.nn import functional as F

A = torch.ops.aten

BESIDE = THROUGH + " w[0]"


def beside(ops: str, op: Any) -> Any:
    """y met with a parameter of its width."""
    return rows(ops, lambda m, y: op(y, m.w), groups=[BESIDE], w=w(12))


def written(m: Any, y: Any) -> Any:
    y = y * 2
    y[:, 3:7] = m.w
    return y


CASES = {
    **{
        name: rows(name, lambda m, y, op=op: op(y))
        for name, op in (
            ("relu", F.relu),
            ("gelu", F.gelu),
            ("gelu_", lambda y: A.gelu_(y * 2)),
            ("sigmoid", torch.sigmoid),
            ("hardswish", F.hardswish),
            ("hardswish_", lambda y: A.hardswish_(y * 2)),
            ("log_sigmoid", F.logsigmoid),
            ("rrelu", F.rrelu),
            ("pow.Tensor_Scalar", lambda y: y**2),
            ("square", lambda y: y.square()),
            ("square_", lambda y: (y * 2).square_()),
            ("negative", torch.negative),
            ("absolute", torch.absolute),
            ("masked_fill.Scalar", lambda y: y.masked_fill(y > 0, 0.5)),
            ("masked_fill.Tensor", lambda y: y.masked_fill(y > 0, y.new_ones(()))),
            ("masked_fill_.Scalar", lambda y: (y * 2).masked_fill_(y > 0, 0.5)),
            ("masked_fill_.Tensor", lambda y: (y * 2).masked_fill_(y > 0, y.new_ones(()))),
            ("where.ScalarOther", lambda y: torch.where(y > 0, y, 0.5)),
            ("where.ScalarSelf", lambda y: torch.where(y > 0, 0.5, y)),
            ("where.Scalar", lambda y: torch.where(y > 0, 0.5, 2.0)),
            ("contiguous", lambda y: y.t().contiguous().t()),
            ("clone", lambda y: y.clone()),
            ("alias", A.alias),
            ("detach", lambda y: y.detach()),
            ("requires_grad_", lambda y: A.requires_grad_(y * 2)),
            ("detach_", lambda y: (y * 2).detach_()),
            ("_to_copy", lambda y: A._to_copy(y, dtype=torch.float64).float()),
            ("to.dtype", lambda y: y.to(torch.float64).float()),
            ("to.dtype_layout", lambda y: A.to.dtype_layout(y, dtype=torch.float64).float()),
            ("to.device", lambda y: A.to.device(y, torch.device("cpu"), torch.float64).float()),
            ("to.other", lambda y: A.to.other(y, torch.zeros(1, dtype=torch.float64)).float()),
            ("type_as", lambda y: y.type_as(torch.zeros(1, dtype=torch.float64)).float()),
            ("dropout", lambda y: A.dropout(y, 0.5, True)),
            ("dropout_", lambda y: A.dropout_(y * 2, 0.5, True)),
            ("feature_dropout", lambda y: A.feature_dropout(y, 0.5, True)),
            ("alpha_dropout", lambda y: F.alpha_dropout(y, 0.5, False)),
            ("bernoulli", lambda y: (y > 0).float().bernoulli()),
            ("bernoulli.p", lambda y: y.bernoulli(1.0)),
            ("bernoulli_.float", lambda y: (y * 2).bernoulli_(1.0)),
            ("zero_", lambda y: (y * 2).zero_()),
            ("fill_.Scalar", lambda y: (y * 2).fill_(2.0)),
            ("zeros_like", lambda y: torch.zeros_like(y)),
            ("ones_like", lambda y: torch.ones_like(y)),
            ("empty_like", lambda y: torch.empty_like(y).fill_(2.0)),
            ("full_like", lambda y: torch.full_like(y, 2.0)),
            ("rand_like", lambda y: torch.rand_like(y).ceil()),
            ("randn_like", lambda y: torch.randn_like(y).abs().sign()),
        )
    },
    **{
        name: beside(name, op)
        for name, op in (
            ("add.Tensor", torch.add),
            ("mul.Tensor", torch.mul),
            ("addcmul", lambda y, v: torch.addcmul(y, y, v)),
            ("lerp.Tensor", lambda y, v: torch.lerp(y, v, v.sigmoid())),
            ("where.self", lambda y, v: torch.where(y > 0, y, v)),
            ("clamp.Tensor", lambda y, v: y.clamp(v, v + 1)),
            ("copy_", lambda y, v: y + (y * 2).copy_(v)),
            ("multiply.Tensor", torch.multiply),
            ("divide.Tensor", torch.divide),
            ("subtract.Tensor", torch.subtract),
            ("true_divide.Tensor", torch.true_divide),
            ("multiply_.Tensor", lambda y, v: (y * 2).multiply_(v)),
            ("divide_.Tensor", lambda y, v: (y * 2).divide_(v)),
            ("subtract_.Tensor", lambda y, v: (y * 2).subtract_(v)),
        )
    },
    "a written stretch": rows(
        "copy_ slice.Tensor",
        written,
        groups=[THROUGH.replace("12", "3"), BESIDE.replace("12", "4"), THROUGH.replace("12", "5")],
        w=w(4),
    ),
    "lift_fresh_copy": rows(
        "lift_fresh_copy",
        lambda m, y: y * torch.tensor([1.0, 2, 3] * 4),
        groups=[],
        stays={"a.weight[0]": "is a constant"},
    ),
    "sizes that do not meet": rows(
        "mul.Tensor",
        lambda m, y: y.view(4, 3, 4).flatten(1) * m.w.view(4, 3).flatten(),
        groups=[],
        stays={"a.weight[0]": "no common factor"},
        w=w(12),
    ),
}

NO_RULE: dict[str, Any] = {
    "masked_scatter": lambda m, y: y.masked_scatter(y > 0, y),
    "index.Tensor": lambda m, y: y * y[y > 0].sum(),
    "diag_embed": lambda m, y: y @ torch.diag_embed(m.w),
    "block_diag": lambda m, y: torch.block_diag(y, y),
    "nanmedian": lambda m, y: y * y.nanmedian(),
    "count_nonzero": lambda m, y: y * y.count_nonzero(-1)[:, None],
    "histc": lambda m, y: y * y.histc(4, -1, 1).sum(),
    "view.dtype": lambda m, y: y.view(torch.int32).float(),
    "rot90": lambda m, y: y.view(2, 2, 12).rot90(1, [0, 1]).flatten(0, 1),
}
