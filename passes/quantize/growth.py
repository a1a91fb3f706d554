"""By how much a loss is predicted to grow when a weight loses bits.

    d_b = Q_b(w) - w                                   the error of rounding to b bits
    from gradients     1/2 sum g^2 (d_low^2 - d_high^2)        g^2 in place of the Hessian's diagonal (Fisher)
    from curvature     1/2 c sum (d_low^2 - d_high^2)          c an eigenvalue or mean trace (HAWQ-V2, arXiv 1911.03852)

First-order terms are left out: training has made gradients small on average, and rounding errors have mean zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import numerics
from ...runtime.scheme import Scheme


@torch.no_grad()
def growth(weight: Tensor, high: Scheme, low: Scheme, curvature: float | None = None) -> float:
    """Predicted growth from scheme `high` to scheme `low`; from `weight.grad` where no curvature is given."""
    w = weight.detach().float()
    more = (numerics.simulate(w, low.nearest) - w).square() - (numerics.simulate(w, high.nearest) - w).square()
    if curvature is not None:
        return 0.5 * curvature * float(more.sum())
    assert weight.grad is not None
    return 0.5 * float((weight.grad.float().square() * more).sum())
