"""Ranges of activations from data: pure functions and small accumulators, no graph.

    min-max          the extremes over all batches
    moving average   e <- m e + (1 - m) e_batch for each extreme (Jacob et al. 2018, section 3.1)
    percentile       symmetric tails cut off: quantiles (1 - p) and p
    mse              the clip ratio c of the min-max range in (0, 1] that gives the least squared error,
                     by search over 40 ratios (Choukroun et al. 2019, arXiv 1902.06822)

Percentile and MSE look at a sample: every k-th element of each batch, at most 2^16 a batch, k coprime to the number
of elements. Then k shares no factor with any dimension, so all channels and all tokens have their part in it: with
k = 24 and rows of 384 it would be 16 channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...runtime import numerics
from ...runtime.errors import CalibrationError
from ...runtime.numerics import Params
from ...runtime.scheme import Scheme

Method = Literal["minmax", "moving-average", "percentile", "mse"]

SAMPLE = 1 << 16
CLIP_RATIOS = 40


@dataclass
class Observer:
    """What was seen of one activation. `observe` each batch, then `params`.

    momentum: of the moving average; percentile: in percent, e.g. 99.99
    """

    method: Method = "mse"
    momentum: float = 0.9
    percentile: float = 99.99
    low: float | None = None
    high: float | None = None
    samples: list[Tensor] = field(default_factory=list)

    def observe(self, x: Tensor) -> None:
        """Take in one batch, any shape. Raises CalibrationError when it is not finite."""
        if x.numel() == 0:
            raise CalibrationError(
                "calibration data makes an activation without elements",
                required="batches of at least one example",
                found=f"shape {list(x.shape)}",
            )
        low, high = (float(v) for v in torch.aminmax(x.detach().float()))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):  # false for NaN too
            raise CalibrationError(
                "calibration data makes an activation that is not finite",
                required="finite activations",
                found=f"range [{low}, {high}]",
                cure="check the data and the checkpoint",
            )
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif self.method == "moving-average":
            m = self.momentum
            self.low, self.high = m * self.low + (1 - m) * low, m * self.high + (1 - m) * high
        else:
            self.low, self.high = min(self.low, low), max(self.high, high)
        if self.method in ("percentile", "mse"):
            self.samples.append(sample(x.detach()).float())

    def params(self, scheme: Scheme) -> Params:
        """Per-tensor scale and zero point for `scheme`. Raises CalibrationError if nothing was observed."""
        if self.low is None or self.high is None:
            raise CalibrationError(
                "no calibration data reached an activation",
                required="at least one batch",
                found="none",
                cure="pass data=[batch, ...]",
            )
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        if self.method == "mse":
            return least_squares(torch.cat(self.samples), low, high, scheme)
        if self.method == "percentile":
            low, high = _quantiles(torch.cat(self.samples), self.percentile / 100)
        return _params(low, high, scheme)


def sample(x: Tensor) -> Tensor:
    """At most SAMPLE elements of `x`, spread over every dimension: a flat copy."""
    count = x.numel()
    k = -(-count // SAMPLE)
    while math.gcd(k, count) > 1:
        k += 1
    return x.flatten()[::k].clone()


def least_squares(x: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Params:
    """The clipped range with the least mean squared error on `x` (flat fp32)."""
    best, least = _params(low, high, scheme), float("inf")
    for i in range(CLIP_RATIOS, 0, -1):
        ratio = i / CLIP_RATIOS
        params = _params(low * ratio, high * ratio, scheme)
        error = float((numerics.fake_quantize(x, scheme, params) - x).square().mean())
        if error < least:
            best, least = params, error
    return best


def _quantiles(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    ordered = x.sort().values
    last = ordered.numel() - 1
    return ordered[round((1 - p) * last)], ordered[round(p * last)]


def _params(low: Tensor, high: Tensor, scheme: Scheme) -> Params:
    if scheme.kind == "asymmetric":
        return numerics.asymmetric_params(low, high, scheme.qmax)
    return Params(numerics.symmetric_scale(torch.maximum(high.abs(), low.abs()), scheme.qmax))


METHODS: tuple[Method, ...] = ("minmax", "moving-average", "percentile", "mse")
MakeObserver = Callable[[], Observer]
