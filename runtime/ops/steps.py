"""Linear in training as it will be computed when it is finished: on integers, with the scales put on afterwards.

    steps     u, s with u s = fake(x): codes less the zero point, and their scale     du/dx = 1 / s
    product   y = (u_x @ u_W^T) s_x s_W + b        the order of qlinear; fp32 sums of integers below 2^24 are exact

So a layer in training gives the very numbers of the integer kernel, and no code of the next layer falls otherwise:
fake(x) @ fake(W)^T, rounded in between, is off by 1e-7, and on trained MiniLM that flips codes enough for the whole
network to differ by 5 %. Where x is still mixed with its float (r > 0), u is that value and s is 1.

Not handled: several scales in a row, which no sum of integers has; such a weight is simulated as a value.

In 16 bits, or under autocast, the sums of integers would overflow or be rounded: there fake(x) @ fake(W)^T it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import numerics
from ..scheme import Scheme
from .operator import Kernel, Operator
from .training import current, gradient_factor, learned_scale, mixed, range_params, scaled_gradient

Steps = tuple[Tensor, Tensor]


def _pure(steps: Tensor, scale: Tensor, x: Tensor, mix: Tensor, scheme: Scheme) -> Steps:
    """(steps, scale), or the mixed value and ones while r > 0; without a gradient."""
    values = (numerics.blocks(steps, scheme) * scale.reshape(-1, 1)).reshape(x.shape).to(x.dtype)
    u = torch.where(mix == 0, steps.to(x.dtype), mixed(values, x, mix))
    return u, torch.where(mix == 0, scale, torch.ones_like(scale))


def _live(x: Tensor, qmax: Tensor, mix: Tensor, key: Tensor | None, scheme: str) -> Steps:
    parsed = Scheme.parse(scheme)
    with torch.no_grad():
        u, s = _pure(*numerics.steps_of(x, parsed, qmax=qmax, key=key), x, mix, parsed)
    return numerics.straight_through(u, (x / _beside(s, x, parsed)).to(x.dtype)), s


def _beside(scale: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    """Scales as they multiply x in its own shape: one an output channel of a weight, or as they are."""
    return scale.reshape(-1, 1) if scheme.granularity in ("channel", "rows") else scale


def _live_cpu(x: Tensor, qmax: Tensor, mix: Tensor, key: Tensor | None, scheme: str) -> Steps:
    """In parts that stay in the cache; nothing is computed while r is 1."""
    found: Steps = _Steps.apply(x, mix, key, current(scheme, int(qmax)))  # type: ignore[no-untyped-call]
    return found


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: Tensor, key: Tensor | None, scheme: Scheme) -> Steps:
        ctx.scheme, r = scheme, float(mix)
        shape = numerics.scale_shape(x.shape, scheme)
        if r == 1.0:
            u, s = x.view_as(x), torch.ones(shape)
        else:
            u, scales = torch.empty_like(x, memory_format=torch.contiguous_format), []
            for part in numerics.chunks(x, scheme):
                steps, scale = numerics.steps_of(x[part], scheme, key=key)
                pure = (steps, scale) if r == 0.0 else _pure(steps, scale, x[part], mix, scheme)
                u[part] = pure[0]
                scales.append(pure[1])
            s = scales[0] if len(scales) == 1 else torch.cat(scales)
        ctx.save_for_backward(s)
        ctx.mark_non_differentiable(s)
        return u, s

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (s,) = ctx.saved_tensors
        return (grad / _beside(s, grad, ctx.scheme)).to(grad.dtype), None, None, None


def _on_cpu(x: Tensor, *_: object) -> str | None:
    return None if x.device.type == "cpu" and x.dim() > 0 else "needs a CPU tensor"


def _ranged(x: Tensor, span: Tensor, qmax: Tensor, mix: Tensor, scheme: str) -> Steps:
    parsed = Scheme.parse(scheme)
    with torch.no_grad():
        params = range_params(span, parsed, qmax)
        u, s = _pure(*numerics.steps_of(x, parsed, params, qmax=qmax), x, mix, parsed)
        slope = torch.where(numerics.inside(x, params, parsed, qmax), torch.ones_like(mix), mix).to(x.dtype)
    return numerics.straight_through(u, x * slope / s), s


def _learned(x: Tensor, scale: Tensor, qmax: Tensor, mix: Tensor, batched: bool, scheme: str) -> Steps:
    parsed = Scheme.parse(scheme)
    levels = qmax.float()
    shape = numerics.blocks(x, parsed).shape  # (scales, elements)
    s = scaled_gradient(learned_scale(scale), gradient_factor(x, shape[1], levels, batched))
    ratio = x.float().reshape(shape) / s.reshape(-1, 1)
    inner = torch.minimum(torch.maximum(ratio, -levels), levels)
    steps = (inner + (torch.round(inner) - inner).detach()).reshape(x.shape)
    values = torch.lerp(steps * _beside(s, x, parsed), x.float(), mix.float())
    pure = mix == 0
    return torch.where(pure, steps, values).to(x.dtype), torch.where(pure, s, torch.ones_like(s))


def _product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        values = w if w_scale is None else (w * w_scale.reshape(-1, 1)).to(w.dtype)
        return F.linear((x * x_scale).to(x.dtype), values, bias)
    y = F.linear(x, w) * x_scale
    y = y if w_scale is None else y * w_scale
    return y if bias is None else y + bias


STEPS_LIVE = Operator(
    name="steps_live",
    schema="(Tensor x, Tensor qmax, Tensor mix, Tensor? key, str scheme) -> (Tensor, Tensor)",
    reference=_live,
    kernels=(Kernel(name="cpu chunked", serves=_on_cpu, run=_live_cpu),),
)

STEPS_RANGED = Operator(
    name="steps_ranged",
    schema="(Tensor x, Tensor range, Tensor qmax, Tensor mix, str scheme) -> (Tensor, Tensor)",
    reference=_ranged,
)

STEPS_LEARNED = Operator(
    name="steps_learned",
    schema="(Tensor x, Tensor scale, Tensor qmax, Tensor mix, bool batched, str scheme) -> (Tensor, Tensor)",
    reference=_learned,
)

LINEAR_OF_STEPS = Operator(
    name="linear_of_steps",
    schema="(Tensor x, Tensor x_scale, Tensor weight, Tensor? weight_scale, Tensor? bias) -> Tensor",
    reference=_product,
)
