"""AWQ: scales inputs up where they are large, so that rounding their weights errs less.

    Q(W diag(s)) (diag(s)^-1 X)        s = s_X^alpha,  s_X the mean of |x| of each input
    alpha*  minimises |W X - Q(W diag(s)) diag(s)^-1 X|^2 over a grid of [0, 1); alpha = 0 is s = 1

Lin et al. 2023 (arXiv 2306.00978), equations 4 and 5; s is divided by sqrt(max s min s), as their code does. The error
is tr(D H D^T) with H = X X^T of all calibration data. Afterwards ranges are clipped, see `clip`.

Handled: an input that is always zero (s = 1), symmetric and asymmetric codes of any granularity. With `exact` s is
rounded to powers of two, which fold into weights of half precision without rounding them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import numerics
from ...runtime.scheme import Scheme
from .clip import output_error

GRID = 20  # values of alpha, as in the paper
SMALLEST = 1e-4  # of s before it is normalised


class Scaling(NamedTuple):
    """s (K,) fp32, and the error it has beside that of rounding without it."""

    scale: Tensor
    alpha: float
    error: float
    plain: float


def search_scale(
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    magnitude: Tensor,
    hessian: Tensor,
    *,
    grid: int = GRID,
    exact: bool = False,
) -> Scaling:
    """The scale of an input that `weights` (N_i, K) share, each rounded by its scheme.

    magnitude: mean |x| of each input (K,); hessian: X X^T (K, K)
    """
    best: Scaling | None = None
    plain = 0.0
    for i in range(grid):
        alpha = i / grid
        s = powers(magnitude, alpha, exact=exact)
        error = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            w = weight.detach().float()
            error += float(output_error(numerics.simulate(w * s, scheme.nearest) / s - w, hessian).sum())
        plain = error if i == 0 else plain
        if best is None or error < best.error:
            best = Scaling(s, alpha, error, plain)
    assert best is not None
    return best


def powers(magnitude: Tensor, alpha: float, *, exact: bool) -> Tensor:
    """s_X^alpha around 1, fp32 (K,)."""
    seen = magnitude > 0
    if alpha == 0 or not seen.any():
        return torch.ones_like(magnitude, dtype=torch.float32)
    s = magnitude.float().pow(alpha).clamp_min(SMALLEST)
    s = s / torch.sqrt(s[seen].max() * s[seen].min())
    return torch.where(seen, to_powers_of_two(s) if exact else s, 1.0)


def to_powers_of_two(s: Tensor) -> Tensor:
    """The nearest powers of two, by which every float is multiplied exactly."""
    return torch.exp2(torch.round(torch.log2(s)))
