"""Masks from trained scores: the largest stay, and the gradient of a mask is that of its scores.

    m_i = 1 where s_i is among the `stay` largest of its row, else 0;  of equal ones the first        dm/ds = 1

Movement pruning with a straight-through estimator (Sanh et al. 2020, arXiv 2005.07683, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from .operator import Kernel, Operator


def _keep_top(scores: Tensor, stay: Tensor) -> Tensor:
    with torch.no_grad():
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        mask = (rank < stay).to(scores.dtype)
    return numerics.straight_through(mask, scores)


def largest(rows: Tensor, stay: int) -> Tensor:
    """bool (..., n): the `stay` largest of each row, of equal ones the first; found without sorting."""
    n = rows.shape[-1]
    if not 0 < stay < n:
        return torch.full_like(rows, stay >= n, dtype=torch.bool)
    last = rows.kthvalue(n - stay + 1, dim=-1, keepdim=True).values
    above, equal = rows > last, rows == last
    return above | (equal & (equal.cumsum(-1) <= stay - above.sum(-1, keepdim=True)))


def _keep_top_cpu(scores: Tensor, stay: Tensor) -> Tensor:
    with torch.no_grad():
        mask = largest(scores, int(stay)).to(scores.dtype)
    return numerics.straight_through(mask, scores)


def _on_cpu(scores: Tensor, stay: Tensor) -> str | None:
    return None if scores.device.type == "cpu" and scores.numel() else "needs a CPU tensor"


KEEP_TOP = Operator(
    name="keep_top",
    schema="(Tensor scores, Tensor stay) -> Tensor",
    reference=_keep_top,
    kernels=(Kernel(name="cpu selection", serves=_on_cpu, run=_keep_top_cpu),),
)
