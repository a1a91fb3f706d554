"""How far two sets of outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """Over all floating-point outputs together.

    largest: max |a - b|;  relative: |a - b|_2 / |a|_2;  sqnr: -20 log10(relative), dB;
    cosine: <a, b> / (|a| |b|). NaN where b is not finite and a is.
    """

    largest: float
    relative: float
    sqnr: float
    cosine: float

    def to_json(self) -> dict[str, float | None]:
        """Plain data; an infinite SQNR (no difference) is null."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}


def difference(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Difference:
    """Compare outputs one by one; integer outputs count as equal or not (largest is inf where they differ).

    Elements where the reference is not finite (masked logits) are compared by equality and left out of norms.
    """
    largest = error = norm = norm_other = product = 0.0
    for a, b in zip(reference, other, strict=True):
        if not a.is_floating_point():
            largest = largest if torch.equal(a, b) else math.inf
            continue
        a64, b64 = a.detach().double(), b.detach().double()
        finite = a64.isfinite()
        if not finite.all():
            if not torch.equal(a64[~finite].nan_to_num(), b64[~finite].nan_to_num()):
                largest = math.inf
            a64, b64 = a64[finite], b64[finite]
        if not b64.isfinite().all():
            return Difference(math.nan, math.nan, math.nan, math.nan)
        if a64.numel():
            delta = a64 - b64
            largest = max(largest, float(delta.abs().max()))
            error += float(delta.square().sum())
            norm += float(a64.square().sum())
            norm_other += float(b64.square().sum())
            product += float((a64 * b64).sum())
    relative = math.sqrt(error / norm) if norm else math.sqrt(error)
    cosine = product / math.sqrt(norm * norm_other) if norm and norm_other else 1.0
    return Difference(largest, relative, -20 * math.log10(relative) if relative else math.inf, cosine)
