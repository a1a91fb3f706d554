"""Clipping: a group's range is made smaller where the few largest numbers cost the many small ones too much.

    r* = argmin_r  d_r H_g d_r^T        d_r = Q(w; r max|w|) - w  of one group,  H = X X^T of its inputs, r in (0, 1]

Lin et al. 2023 (arXiv 2306.00978), as their code searches it beside AWQ's scale; here the error is of the layer's
output over all calibration data, in closed form. A row stays as it was where that does not help the row as a whole.

Handled: symmetric and asymmetric codes of any granularity (the zero point follows the range), inputs that are always
zero (the range stays whole), zeros (which stay zeros).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...runtime import numerics
from ...runtime.numerics import Params
from ...runtime.scheme import Scheme

RATIOS = tuple(1 - i / 20 for i in range(11))  # down to a half, as in the paper's code


class Rounded(NamedTuple):
    """A weight that was rounded: fp32 (N, K), and parameters with which quantising it again gives its codes."""

    weight: Tensor
    params: Params


def output_error(change: Tensor, hessian: Tensor) -> Tensor:
    """|dW X|^2 of each row of `change` (N, K): fp64 (N,)."""
    d = change.double()
    return ((d @ hessian.double()) * d).sum(1).clamp_min(0)  # negative by rounding alone


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
