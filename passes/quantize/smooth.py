"""SmoothQuant: makes inputs of a layer alike in size, and its weights take over what they differed by.

    X' = X diag(s)^-1,  W' = W diag(s)        W X = W' X' in real numbers
    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

Xiao et al. 2022 (arXiv 2211.10438), equations 3 and 4. alpha = 1 leaves all the work to the weights, 0 none; .5 shares
it. Weights that share an input share s: max|w_j| is over all of them. Handled: an input or a column that is always
zero (s = 1). With `exact` s is rounded to powers of two, see `awq`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .awq import to_powers_of_two

# s stays within these, so that neither side of a fold leaves half precision's range by it.
LEAST, MOST = 2.0**-10, 2.0**10


def smoothing(largest: Tensor, weights: Sequence[Tensor], alpha: float, *, exact: bool = False) -> Tensor:
    """s, fp32 (K,); largest: max |x| of each input (K,); weights: (N_i, K)."""
    of_weight = torch.stack([w.detach().float().abs().amax(0) for w in weights]).amax(0)
    s = largest.float().pow(alpha) / of_weight.pow(1 - alpha)
    s = torch.where((largest > 0) & (of_weight > 0), s, 1.0).clamp(LEAST, MOST)
    return to_powers_of_two(s) if exact else s
