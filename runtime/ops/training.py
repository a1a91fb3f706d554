"""Fake-quantise for training: how many levels there are, and how much of the float is left, are tensors.

    live       y = r x + (1 - r) Q(x)                  parameters from x itself: no element is clipped, dy/dx = 1
    ranged     the same with the range of a buffer      dy/dx = 1 inside the range, r outside
    learned    the same with a scale that is trained    dy/ds as in LSQ (Esser et al. 2020, arXiv 1902.08153, eq. 3)
    observe    e <- m e + (1 - m) e_batch               for both ends of a range (Jacob et al. 2018, section 3.1)

qmax (int32, 0-d) is the largest code, so a schedule changes the bits without a new trace; of a ternary or binary
scheme the codes are uniform up to qmax until qmax is 0. mix (fp32, 0-d) is r: 1 leaves x as it is. key (int64, 0-d)
seeds stochastic rounding. batched: x is an activation, whose first dimension is that of examples. qmax is an integer
so that casting a model to half leaves it alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..numerics import Params
from ..scheme import Scheme
from .operator import Kernel, Operator


def mixed(values: Tensor, x: Tensor, mix: Tensor) -> Tensor:
    """r x + (1 - r) values, exact at both ends, in x's dtype."""
    blend = torch.lerp(values.float(), x.detach().float(), mix.float()).to(x.dtype)
    return torch.where(mix == 0, values, blend)


def _live(x: Tensor, qmax: Tensor, mix: Tensor, key: Tensor | None, scheme: str) -> Tensor:
    with torch.no_grad():
        values = mixed(numerics.simulate(x, Scheme.parse(scheme), qmax=qmax, key=key), x, mix)
    return numerics.straight_through(values, x)


def _live_cpu(x: Tensor, qmax: Tensor, mix: Tensor, key: Tensor | None, scheme: str) -> Tensor:
    """In parts that stay in the cache, with the backward pass of a copy; nothing is computed while r is 1."""
    if float(mix) == 1.0:
        return x.view_as(x)
    y: Tensor = _Live.apply(x, qmax, mix, key, current(scheme, int(qmax)))  # type: ignore[no-untyped-call]
    return y


def current(scheme: str, qmax: int) -> Scheme:
    """The scheme as it is at `qmax`, so that no part is computed that is not used."""
    parsed = Scheme.parse(scheme)
    if parsed.kind == "asymmetric":
        return replace(parsed, bits=qmax.bit_length())
    return replace(parsed, kind="symmetric", bits=(qmax + 1).bit_length()) if qmax else parsed


class _Live(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, qmax: Tensor, mix: Tensor, key: Tensor | None, scheme: Scheme) -> Tensor:
        out, r = torch.empty_like(x, memory_format=torch.contiguous_format), float(mix)
        for part in numerics.chunks(x, scheme):
            values = numerics.simulate(x[part], scheme, key=key)
            out[part] = values if r == 0.0 else mixed(values, x[part], mix)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad, None, None, None, None


def _on_cpu(x: Tensor, *_: object) -> str | None:
    return None if x.device.type == "cpu" and x.dim() > 0 else "needs a CPU tensor"


def range_params(span: Tensor, scheme: Scheme, qmax: Tensor | None = None) -> Params:
    """Parameters of a range (2,): [low, high]."""
    low, high = span.float().unbind()
    levels: Tensor | int = scheme.qmax if qmax is None else qmax
    if scheme.kind == "asymmetric":
        return numerics.asymmetric_params(low, high, levels)
    return Params(numerics.symmetric_scale(torch.maximum(low.abs(), high.abs()), levels))


def _ranged(x: Tensor, span: Tensor, qmax: Tensor, mix: Tensor, scheme: str) -> Tensor:
    parsed = Scheme.parse(scheme)
    with torch.no_grad():
        params = range_params(span, parsed, qmax)
        values = mixed(numerics.simulate(x, parsed, params, qmax=qmax), x, mix)
        slope = torch.where(numerics.inside(x, params, parsed, qmax), torch.ones_like(mix), mix).to(x.dtype)
    return numerics.straight_through(values, x * slope)


def learned_scale(step: Tensor) -> Tensor:
    """The scale that a trained step stands for: an optimizer may push it past zero."""
    return step.float().abs().clamp_min(numerics.SMALLEST_SCALE)


def _learned(x: Tensor, scale: Tensor, qmax: Tensor, mix: Tensor, batched: bool, scheme: str) -> Tensor:
    parsed = Scheme.parse(scheme)
    levels = qmax.float()
    shape = numerics.blocks(x, parsed).shape  # (scales, elements)
    s = scaled_gradient(learned_scale(scale).reshape(-1, 1), gradient_factor(x, shape[1], levels, batched))
    ratio = x.float().reshape(shape) / s
    inner = torch.minimum(torch.maximum(ratio, -levels), levels)
    codes = inner + (torch.round(inner) - inner).detach()
    return torch.lerp((codes * s).reshape(x.shape), x.float(), mix.float()).to(x.dtype)


def gradient_factor(x: Tensor, elements: int, levels: Tensor, batched: bool) -> Tensor:
    """1 / sqrt(N qmax), N the elements of a scale; of an activation those of one example (LSQ, section 2.2)."""
    return torch.rsqrt(levels * (math.prod(x.shape[1:]) if batched else elements))


def scaled_gradient(s: Tensor, factor: Tensor) -> Tensor:
    return s.detach() + (s - s.detach()) * factor  # the value is s exactly


@torch.no_grad()
def _observe(span: Tensor, x: Tensor, momentum: float) -> None:
    if x.numel() == 0:
        return
    ends = torch.stack(torch.aminmax(x.detach().float())).to(span.dtype)
    # A range without width has seen nothing yet, and takes the first batch whole.
    after = torch.where(span[0] == span[1], ends, torch.lerp(ends, span, momentum))
    # NaN or infinity once would stay for good; a GradScaler skips such steps and goes on.
    span.copy_(torch.where(ends.isfinite().all(), after, span))


FAKE_QUANTIZE_LIVE = Operator(
    name="fake_quantize_live",
    schema="(Tensor x, Tensor qmax, Tensor mix, Tensor? key, str scheme) -> Tensor",
    reference=_live,
    kernels=(Kernel(name="cpu chunked", serves=_on_cpu, run=_live_cpu),),
)

FAKE_QUANTIZE_RANGED = Operator(
    name="fake_quantize_ranged",
    schema="(Tensor x, Tensor range, Tensor qmax, Tensor mix, str scheme) -> Tensor",
    reference=_ranged,
)

FAKE_QUANTIZE_LEARNED = Operator(
    name="fake_quantize_learned",
    schema="(Tensor x, Tensor scale, Tensor qmax, Tensor mix, bool batched, str scheme) -> Tensor",
    reference=_learned,
)

OBSERVE_RANGE = Operator(
    name="observe_range_",
    schema="(Tensor(a!) range, Tensor x, float momentum) -> ()",
    reference=_observe,
)
