"""AWQ: scales inputs up where they are large, so that rounding their weights errs less, and clips each group.

    Q(W diag(s)) (diag(s)^-1 X)        s = s_X^alpha,  s_X the mean of |x| of each input
    alpha*  minimises |W X - Q(W diag(s)) diag(s)^-1 X|^2 over a grid of [0, 1]; alpha = 0 is s = 1

Lin et al. 2023 (arXiv 2306.00978), equations 4 and 5; s is divided by sqrt(max s min s), as their code does. The error
is tr(D H D^T) with H = X X^T of all calibration data. Then each group's range is shrunk by the ratio that errs least
on its own inputs (`clip`); a row stays as it was where that does not help the row as a whole.

Handled: an input that is always zero (s = 1), symmetric and asymmetric codes of any granularity. With `exact` s is
rounded to powers of two, which fold into weights of half precision without rounding them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import numerics
from ...runtime.numerics import Params
from ...runtime.scheme import Scheme
from .gptq import Rounded, output_error

GRID = 20  # values of alpha, as in the paper
RATIOS = tuple(1 - i / 20 for i in range(11))  # of a group's range: down to a half, as in the paper's code
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


def clip(weight: Tensor, hessian: Tensor, scheme: Scheme, *, ratios: Sequence[float] = RATIOS) -> Rounded:
    """Round `weight` (N, K) to nearest, with the ranges of its groups shrunk where that errs less.

    ratios: of the whole range, the first one 1
    """
    w = weight.detach().float()
    whole = numerics.parameters(w, scheme)
    best, least = whole, _errors(w, whole, hessian, scheme)
    for ratio in ratios[1:]:
        shrunk = _shrunk(w, scheme, ratio)
        errors = _errors(w, shrunk, hessian, scheme)
        best, least = _where(errors < least, shrunk, best), torch.minimum(errors, least)
    chosen, plain = (numerics.simulate(w, scheme.nearest, params) for params in (best, whole))
    better = _by_scale(output_error(chosen - w, hessian), scheme) < _by_scale(output_error(plain - w, hessian), scheme)
    if scheme.granularity == "group":
        better = better[:, None]
    params = _where(better, best, whole)
    return Rounded(numerics.simulate(w, scheme.nearest, params), params)


def _errors(w: Tensor, params: Params, hessian: Tensor, scheme: Scheme) -> Tensor:
    """What each scale's own numbers err by, as if all others were exact; in the scales' shape, fp64."""
    d = numerics.simulate(w, scheme.nearest, params) - w
    if scheme.granularity != "group":
        return _by_scale(output_error(d, hessian), scheme)
    size = scheme.group_size or 1
    count = w.shape[1] // size
    own = hessian.double().reshape(count, size, count, size).diagonal(dim1=0, dim2=2)  # (G, G, K / G)
    parts = d.double().reshape(w.shape[0], count, size)
    return torch.einsum("ngi,ijg,ngj->ng", parts, own, parts)


def _by_scale(rows: Tensor, scheme: Scheme) -> Tensor:
    """Errors of rows (N,) as errors of scales: () of a tensor, (N,) with those of rows that share one summed up."""
    match scheme.granularity:
        case "tensor":
            return rows.sum()
        case "rows":
            size = scheme.group_size or 1
            return rows.reshape(-1, size).sum(1).repeat_interleave(size)
    return rows


def _shrunk(w: Tensor, scheme: Scheme, ratio: float) -> Params:
    """Parameters of the range that is left: those of the weight made smaller, which min-max is linear in."""
    return numerics.parameters(w * ratio, scheme)


def _where(mask: Tensor, one: Params, other: Params) -> Params:
    zero = None
    if one.zero_point is not None and other.zero_point is not None:
        zero = torch.where(mask, one.zero_point, other.zero_point)
    return Params(torch.where(mask, one.scale, other.scale), zero)
