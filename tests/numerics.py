"""The one table of tolerances. A loosened number carries a comment with the measured maximum.

    max |actual - expected|  <=  tolerance * max |expected|

relative to the output's scale, not to each element, because a sum in another order moves small elements by
the rounding of large ones. What each kind promises:

    exact         structural: what is computed does not change, so neither does one bit
    approximate   the same in real numbers, other rounding: fused attention, folded batch norm, folded scales
    sliced        masked == sliced: zeros left out of a sum, which changes the order in which it is added up
    kernel        an operator against float64 on the same codes and scales
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["exact", "approximate", "sliced", "kernel"]

TOLERANCES: dict[tuple[Kind, torch.dtype], float] = {
    ("exact", torch.float64): 0.0,
    ("exact", torch.float32): 0.0,
    ("exact", torch.bfloat16): 0.0,
    ("exact", torch.float16): 0.0,
    # Measured on tests/models.py (2 layers): written-out attention against scaled_dot_product_attention is
    # 7.7e-8 in fp64 (llama's softmax and rotary tables are fp32), 2.2e-7 in fp32, 4.8e-3 in bf16; folding
    # batch norm stays below that in all three
    ("approximate", torch.float64): 1e-6,
    ("approximate", torch.float32): 1e-5,
    ("approximate", torch.bfloat16): 2e-2,
    # Measured on one product over 256 columns, 70 % kept: fp64 3.6e-16, fp32 5.1e-7
    ("sliced", torch.float64): 1e-9,
    ("sliced", torch.float32): 1e-5,
    # A sum of at most 50 products; torch's CPU products round partial sums to bf16 and fp16.
    ("kernel", torch.float32): 1e-6,
    ("kernel", torch.bfloat16): 1e-2,
    ("kernel", torch.float16): 2e-3,
}

# Slack of the numeric contract, in units that its tests name.
SLACK: dict[str, float] = {
    # |x - Q(x)| <= s (1/2 + slack * qmax): x / s, the scale and (code - z) * s round once each, at most 2^-24
    # of the range qmax * s
    "half step": 4 * 2.0**-24,
    # qconv2d against float64, of the largest sum (where the zero point's share cancels, of that share)
    "convolution": 1e-6,
    # fp32 mean of at most 200 numbers against fp64, relative
    "mean": 1e-5,
}


def error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected| over finite elements; infinite where anything else differs."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    finite = expected.isfinite()
    rest_equal = torch.equal(actual[~finite].nan_to_num(0.0), expected[~finite].nan_to_num(0.0))
    if not rest_equal or not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    if not finite.any():
        return 0.0
    wide = torch.float64 if not expected.is_complex() else torch.complex128
    difference = (actual[finite].to(wide) - expected[finite].to(wide)).abs().max()
    scale = expected[finite].to(wide).abs().max()
    return float(difference / scale) if difference else 0.0


def assert_close(actual: Tensor, expected: Tensor, kind: Kind) -> None:
    """Hold `actual` to the table's row for this kind and dtype; integers and booleans must be equal."""
    exact = not expected.is_floating_point()
    allowed = 0.0 if exact else TOLERANCES[kind, expected.dtype]
    found = error(actual, expected)
    assert found <= allowed, (
        f"{kind}: error {found:.3g} of the output's scale, allowed {allowed:.3g} "
        f"({tuple(actual.shape)} {actual.dtype} against {tuple(expected.shape)} {expected.dtype})"
    )
