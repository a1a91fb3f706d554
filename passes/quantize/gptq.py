"""GPTQ: rounds a weight column by column, and lets the columns that follow make up for what was rounded.

    minimise |W X - Q X|^2 = tr((W - Q) H (W - Q)^T)        H = X X^T, of the inputs that calibration data gives
    column j:  e = (w_j - quant(w_j)) / [U]_jj              H^-1 = U^T U, U upper triangular
               W_:,k -= e [U]_jk  for k > j

Frantar et al. 2022 (arXiv 2210.17323), equations 2 and 3 with section 3.3: H + lambda I, lambda a share of the mean of
the diagonal; one Cholesky factor in place of an inverse for each column; columns in blocks, what follows a block is
updated once. Letters are the paper's. A group's scale is taken when its first column is met, from the columns as they
are by then. `order` takes columns with large inputs first (the paper's code calls it act-order): groups by their sums,
and then the columns within each, so that a group is still met at once. Ranges are not the paper's, which go by the
largest number: `clip` finds them for the inputs.

Handled: an input that is always zero (rounded to nearest, and its rounding moves nothing), inputs that depend on one
another or an H that is not positive definite (more damping), numbers that have to stay zero (`keep`). Ternary and
binary codes have scales by means, which this does not do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ...runtime import numerics
from ...runtime.errors import CalibrationError, SchemeError
from ...runtime.numerics import Params
from ...runtime.scheme import Scheme
from .clip import Rounded, clip

DAMPING = 0.01  # of the mean of the diagonal, as in the paper
MORE = 10.0  # by which damping grows until there is a Cholesky factor
BLOCK = 128  # columns, as in the paper


def gram(xs: Iterable[Tensor], width: int, device: torch.device | str = "cpu") -> tuple[Tensor, int]:
    """(X X^T, rows): fp64 (K, K) of inputs (..., K) together, and how many there were; K = `width`."""
    total, rows = torch.zeros(width, width, dtype=torch.float64, device=device), 0
    for x in xs:
        flat = x.detach().reshape(-1, width).float()
        total += flat.T @ flat  # a batch in fp32, batches in fp64
        rows += flat.shape[0]
    return total, rows


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    order: bool = True,
    clipped: bool = True,
    damping: float = DAMPING,
    block: int = BLOCK,
    keep: Tensor | None = None,
) -> Rounded:
    """Round `weight` (N, K) for inputs whose X X^T is `hessian` (K, K).

    order: large inputs first; clipped: ranges go by output error, else by the largest number
    keep: bool (N, K), False where a zero has to stay one
    Raises SchemeError for a scheme that is not uniform or does not divide the weight, CalibrationError for a Hessian
    of another shape or that is not finite.
    """
    _require_fit(weight, hessian, scheme)
    w, k = weight.detach().float().clone(), weight.shape[1]
    grouped = scheme.granularity == "group"
    params = clip(w, hessian, scheme).params if clipped and not grouped else numerics.parameters(w, scheme)
    size = scheme.group_size or 1 if grouped else 1
    turn = largest_first(hessian.diagonal(), size) if order else torch.arange(k, device=w.device)
    w, h = w[:, turn], hessian.double()[turn][:, turn]
    u = inverse_factor(h, damping).float()
    kept = None if keep is None else keep[:, turn]
    places = turn.tolist()
    step = max(block // size, 1) * size  # whole groups
    q, alone = torch.empty_like(w), _of_one(scheme)
    for start in range(0, k, step):
        end = min(start + step, k)
        part, errors = w[:, start:end], torch.empty_like(w[:, start:end])
        for j in range(start, end):
            if grouped and j % size == 0:
                columns, inputs = part[:, j - start : j - start + size], h[j : j + size, j : j + size]
                found = clip(columns, inputs, alone).params if clipped else numerics.parameters(columns, alone)
                _take(params, found, places[j] // size)
            column, own = part[:, j - start], _of_column(params, scheme, places[j], w.shape[0])
            rounded = numerics.simulate(column[:, None], alone, own)[:, 0]
            q[:, j] = rounded if kept is None else rounded * kept[:, j]
            e = (column - q[:, j]) / u[j, j]
            part[:, j - start :] -= e[:, None] * u[j, j:end]
            errors[:, j - start] = e
        w[:, end:] -= errors @ u[start:end, end:]
    back = torch.empty_like(q)
    back[:, turn] = q
    return Rounded(back, params)


def largest_first(diagonal: Tensor, size: int = 1) -> Tensor:
    """Indices of `diagonal` (K,), groups of `size` by their sums and then within each, int64 (K,)."""
    d = diagonal.reshape(-1, size)
    groups = torch.argsort(d.sum(1), descending=True, stable=True)
    inside = torch.argsort(d, dim=1, descending=True, stable=True)[groups]
    return (groups[:, None] * size + inside).flatten()


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """U, upper triangular with H^-1 = U^T U, of H with lambda I added; fp64 (K, K).

    An input that was never seen gets the mean of the diagonal and is tied to no other; damping grows tenfold until H
    is positive definite.
    """
    h = hessian.double()
    largest = float(h.abs().max())
    h = h / (largest if largest > 0 else 1.0)  # of U only the ratios within a row count
    dead = h.diagonal() <= 0
    mean = 1.0 if dead.all() else float(h.diagonal()[~dead].mean())
    h[dead], h[:, dead] = 0.0, 0.0
    h.diagonal()[dead] = mean
    one, more = torch.eye(len(h), dtype=h.dtype, device=h.device), damping * mean
    while True:  # ends: once lambda is K, H is dominated by its diagonal
        lower, failed = torch.linalg.cholesky_ex(h + more * one)
        if not failed:
            u, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and u.isfinite().all():
                break
        more = max(more, DAMPING * mean) * MORE
    factor: Tensor = u
    return factor


def _require_fit(weight: Tensor, hessian: Tensor, scheme: Scheme) -> None:
    if scheme.kind not in ("symmetric", "asymmetric"):
        raise SchemeError("rounding by output error", required="kind symmetric or asymmetric", found=scheme.spell())
    if weight.dim() != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise CalibrationError(
            "inputs and weight do not fit",
            required=f"a matrix (N, K) and X X^T (K, K), K = {weight.shape[-1]}",
            found=f"{list(weight.shape)} and {list(hessian.shape)}",
        )
    if not hessian.isfinite().all():
        raise CalibrationError(
            "calibration data gives inputs that are not finite",
            required="finite numbers",
            found="NaN or Inf in X X^T",
            cure="check the data, and the model on it",
        )


def _of_one(scheme: Scheme) -> Scheme:
    """The scheme of one column (N, 1): each row has a scale of its own."""
    return replace(scheme.nearest, granularity="channel", group_size=None)


def _take(params: Params, found: Params, group: int) -> None:
    """Write the parameters (N,) of one group."""
    params.scale[:, group] = found.scale
    if params.zero_point is not None and found.zero_point is not None:
        params.zero_point[:, group] = found.zero_point


def _of_column(params: Params, scheme: Scheme, column: int, rows: int) -> Params:
    """Those of one column, (N,) each."""

    def pick(values: Tensor) -> Tensor:
        grouped = scheme.granularity == "group"
        return values[:, column // (scheme.group_size or 1)] if grouped else values.expand(rows)

    return Params(pick(params.scale), None if params.zero_point is None else pick(params.zero_point))
