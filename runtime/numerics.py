"""The one numeric contract: scale, zero point, codes and back, defined once for every backend.

    symmetric    s = amax / qmax                     code = clamp(rint(x / s), -qmax, qmax)
    asymmetric   s = (hi - lo) / qmax, hi >= 0 >= lo   z = rint(-lo / s)
                                                     code = clamp(rint(x / s) + z, 0, qmax)
    ternary      t = 0.7 mean|x|, s = mean of |x| where |x| > t        code = sign(x) [|x| > t]
    binary       s = mean|x|                         code = x >= 0 ? 1 : -1
    value        (code - z) * s

All in fp32 with true IEEE division, in this order; rint rounds half to even. A uniform group whose scale
would be zero or subnormal gets s = 1 and so quantises to zeros. What follows and is tested:

    Q(Q(x; p); p) == Q(x; p), and for min-max symmetric also when p is computed again from Q(x; p)
    |x - Q(x)| <= s / 2 for uniform min-max parameters

Stochastic rounding is floor(x / s + u) with u in [0, 1) from a counter-based hash of (key, element), where
the key stands for seed, step and parameter name: no generator state, so resumed and parallel runs agree.
Sources: symmetric and asymmetric as in Jacob et al. 2018 (arXiv 1712.05877), ternary Li et al. 2016 (arXiv
1605.04711, eq. 6), binary Rastegari et al. 2016 (arXiv 1603.05279, eq. 6).
"""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import SchemeError
from .scheme import Scheme

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_TERNARY_THRESHOLD = 0.7

# Elements that work without a gradient takes at a time: fp32 temporaries of 1 MiB stay in the L2 cache and are
# reused by the allocator, where whole-tensor temporaries cost fresh pages (1024x1536: 5.2 ms against 1.0, one EPYC
# core) and several times a large weight's memory.
CHUNK_ELEMENTS = 1 << 18


class Params(NamedTuple):
    """Parameters of quantisation, fp32; one value per group, in the shape `scale_shape` gives.

    `zero_point` (fp32 holding integers) only for asymmetric, `threshold` only for ternary.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    threshold: Tensor | None = None


def scale_shape(shape: torch.Size | tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the scales: () tensor, (N,) channel or rows, (B, 1, ...) image, (..., 1) token, (..., K / G) group."""
    match scheme.granularity:
        case "tensor":
            return ()
        case "channel":
            return (shape[0],)
        case "rows":
            _require_divides(shape[0], scheme.group_size or 1, "channels")
            return (shape[0],)
        case "image":
            return (shape[0], *(1 for _ in shape[1:]))
        case "token":
            return (*shape[:-1], 1)
        case "group":
            size = scheme.group_size or 1
            *lead, row = _rows(shape)
            _require_divides(row, size, "a row of")
            return (*lead, row // size)


def _rows(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """A weight of a convolution groups along its flattened filter, all else along the last dim."""
    if len(shape) == 4:
        return (shape[0], shape[1] * shape[2] * shape[3])
    return tuple(shape)


def _require_divides(whole: int, size: int, what: str) -> None:
    if whole % size:
        raise SchemeError(
            f"{what} {whole} does not divide into groups of {size}"
            if what == "a row of"
            else f"{whole} {what} do not divide into groups of {size}",
            required=f"group_size that divides {whole}",
            found=size,
            cure=f"group_size={_nearest_divisor(whole, size)}, or exclude this layer in the recipe",
        )


def _nearest_divisor(row: int, size: int) -> int:
    return max(d for d in range(1, min(row, size) + 1) if row % d == 0)


def blocks(x: Tensor, scheme: Scheme) -> Tensor:
    """View `x` as (scales, elements): every row is divided by one scale."""
    match scheme.granularity:
        case "tensor":
            return x.reshape(1, -1)
        case "channel" | "image" | "rows":
            return x.reshape(x.shape[0], math.prod(x.shape[1:]))
        case "token":
            return x.reshape(-1, x.shape[-1])
        case "group":
            scale_shape(x.shape, scheme)
            return x.reshape(-1, scheme.group_size or 1)


def chunks(x: Tensor, scheme: Scheme) -> list[slice]:
    """Parts of dimension 0, of about CHUNK_ELEMENTS each, that may be quantised one by one: no group is in two.

    Parameters are cut alike. One part alone where a sum or a random counter runs over the whole tensor.
    """
    alone = scheme.granularity == "tensor" or scheme.kind in ("ternary", "binary") or scheme.rounding != "nearest"
    step = max(16, CHUNK_ELEMENTS // max(math.prod(x.shape[1:]), 1))
    if scheme.granularity == "rows":
        step += -step % (scheme.group_size or 1)
    if alone or x.dim() < 2 or x.shape[0] <= step:
        return [slice(None)]
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def parameters(x: Tensor, scheme: Scheme, qmax: Tensor | int | None = None) -> Params:
    """Min-max (uniform) or mean-based (ternary, binary) parameters of `x`.

    x: any shape, any float dtype; computed in fp32. qmax: the largest code, where it is not the scheme's.
    Returns fp32 tensors of `scale_shape(x.shape, scheme)`.
    """
    shape, size = scale_shape(x.shape, scheme), 1
    b = blocks(x.float(), scheme)  # (groups, elements)
    if scheme.granularity == "rows":
        size = scheme.group_size or 1
        b = b.reshape(b.shape[0] // size, size * b.shape[1])
    if b.shape[1] == 0:  # an empty batch as one tensor: minimum and mean want an element
        b = b.new_zeros(b.shape[0], 1)
    found = _parameters(b, scheme, scheme.qmax if qmax is None else qmax)
    spread = [None if t is None else (t.repeat_interleave(size) if size > 1 else t).reshape(shape) for t in found]
    assert spread[0] is not None
    return Params(spread[0], *spread[1:])


def _parameters(b: Tensor, scheme: Scheme, qmax: Tensor | int) -> Params:
    """Of (groups, elements), as (groups,)."""
    match scheme.kind:
        case "symmetric":
            return Params(symmetric_scale(b.abs().amax(1), qmax))
        case "asymmetric":
            return asymmetric_params(*torch.aminmax(b, dim=1), qmax)
        case "ternary":
            magnitude = b.abs()
            t = _TERNARY_THRESHOLD * magnitude.mean(1, keepdim=True)
            kept = magnitude > t
            return Params((magnitude * kept).sum(1) / kept.sum(1).clamp_min(1), threshold=t.squeeze(1))
        case "binary":
            return Params(b.abs().mean(1))


def symmetric_scale(amax: Tensor, qmax: Tensor | int) -> Tensor:
    """s = amax / qmax, with 1 in place of zero and subnormal scales."""
    # A tensor divisor: CUDA turns division by a Python scalar into a multiplication by its reciprocal.
    divisor = torch.full((), qmax, dtype=torch.float32, device=amax.device) if isinstance(qmax, int) else qmax.float()
    scale = amax / divisor
    return torch.where(scale < SMALLEST_SCALE, 1.0, scale)


def asymmetric_params(low: Tensor, high: Tensor, qmax: Tensor | int) -> Params:
    """Scale and integer zero point of the range [min(low, 0), max(high, 0)]."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = symmetric_scale(high - low, qmax)
    zero = torch.round(-low / scale).clamp_min(0)
    return Params(scale, zero.clamp_max(qmax if isinstance(qmax, int) else qmax.float()))


def quantize(x: Tensor, params: Params, scheme: Scheme, *, key: Tensor | int | None = None) -> Tensor:
    """Codes of `x`, in its shape, dtype `scheme.code_dtype`. `key` seeds stochastic rounding."""
    return _codes(x, params, scheme, key).to(scheme.code_dtype).reshape(x.shape)


def dequantize(codes: Tensor, params: Params, scheme: Scheme) -> Tensor:
    """fp32 values of unpacked `codes`, in their shape."""
    b = blocks(codes, scheme).float()
    return (_less_zero(b, params) * params.scale.reshape(-1, 1)).reshape(codes.shape)


def simulate(
    x: Tensor,
    scheme: Scheme,
    params: Params | None = None,
    *,
    qmax: Tensor | None = None,
    key: Tensor | int | None = None,
) -> Tensor:
    """`dequantize(quantize(x))` in `x`'s shape and dtype, without a gradient; arguments as of `steps_of`."""
    steps, scale = steps_of(x, scheme, params, qmax=qmax, key=key)
    return (blocks(steps, scheme) * scale.reshape(-1, 1)).reshape(x.shape).to(x.dtype)


def steps_of(
    x: Tensor,
    scheme: Scheme,
    params: Params | None = None,
    *,
    qmax: Tensor | None = None,
    key: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes less the zero point, fp32 in `x`'s shape, and the scales: their product is the quantised value.

    params: None computes them from `x`. qmax: the largest code as a tensor, which may change from call to call; of a
    ternary or binary scheme the codes are uniform and symmetric up to qmax, and its own where qmax is 0.
    """
    if qmax is None or scheme.kind in ("symmetric", "asymmetric"):
        found = parameters(x, scheme, qmax) if params is None else params
        return _less_zero(_codes(x, found, scheme, key, qmax), found).reshape(x.shape), found.scale
    uniform = steps_of(x, scheme.at(8), params, qmax=qmax.clamp_min(1), key=key)
    own = steps_of(x, scheme, params, key=key)
    return torch.where(qmax > 0, uniform[0], own[0]), torch.where(qmax > 0, uniform[1], own[1])


def fake_quantize(
    x: Tensor, scheme: Scheme, params: Params | None = None, *, key: Tensor | int | None = None
) -> Tensor:
    """Quantise and dequantise in `x`'s shape and dtype, with a straight-through gradient.

    The value is exactly `dequantize(quantize(x))`; the gradient with respect to `x` is 1 where `x` is inside
    the representable range and 0 outside (Bengio et al. 2013, arXiv 1308.3432). `params` are taken as
    constants; None means they are computed from `x`, and then all of it is inside.
    """
    with torch.no_grad():
        values = simulate(x, scheme, params, key=key)
        clipped = params is not None and scheme.kind in ("symmetric", "asymmetric")
        within = inside(x, params, scheme) if clipped and params is not None else None
    return straight_through(values, x if within is None else torch.where(within, x, 0.0))


def straight_through(values: Tensor, x: Tensor) -> Tensor:
    """`values`, with the gradient of `x`."""
    return values + (x - x.detach())  # x - x.detach() is exactly zero, so only the gradient of x is added


def stochastic_key(seed: int, step: int, name: str) -> int:
    """The key of stochastic rounding for one parameter at one step: 32 bits."""
    return zlib.crc32(f"{seed}:{step}:{name}".encode())


def uniform(count: int, key: Tensor | int, device: torch.device | str = "cpu") -> Tensor:
    """`count` fp32 numbers in [0, 1) by hashing (key, index): 24 bits each, no state.

    Two rounds of a 32-bit integer finaliser in the manner of Wellons' "hash prospector" (2018).
    """
    index = torch.arange(count, device=device, dtype=torch.int64)
    return (_mix(_mix(index) ^ key) >> 8).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    # int64 arithmetic wraps, so the low 32 bits of each product are those of uint32 arithmetic.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _codes(x: Tensor, params: Params, scheme: Scheme, key: Tensor | int | None, qmax: Tensor | None = None) -> Tensor:
    """Integral fp32 codes, (scales, elements)."""
    b = blocks(x.float(), scheme)
    if scheme.kind == "binary":
        return torch.where(b >= 0, 1.0, -1.0)
    if scheme.kind == "ternary":
        if params.threshold is None:
            raise SchemeError("ternary quantisation needs a threshold", required="Params.threshold", found=None)
        return torch.sign(b) * (b.abs() > params.threshold.reshape(-1, 1))
    ratio = b / params.scale.reshape(-1, 1)
    if scheme.rounding == "nearest":
        steps = torch.round(ratio)
    else:
        if key is None:
            raise SchemeError("stochastic rounding needs a key", required="numerics.stochastic_key(...)", found=None)
        steps = torch.floor(ratio + uniform(x.numel(), key, x.device).reshape(b.shape))
    if params.zero_point is not None:
        steps = steps + params.zero_point.reshape(-1, 1)
    return steps.clamp(*_limits(scheme, qmax))


def _limits(scheme: Scheme, qmax: Tensor | None) -> tuple[Tensor, Tensor] | tuple[int, int]:
    if qmax is None:
        return scheme.qmin, scheme.qmax
    high = qmax.float()
    return (torch.zeros_like(high) if scheme.kind == "asymmetric" else -high), high


def _less_zero(codes: Tensor, params: Params) -> Tensor:
    return codes if params.zero_point is None else codes - params.zero_point.reshape(-1, 1)


def inside(x: Tensor, params: Params, scheme: Scheme, qmax: Tensor | None = None) -> Tensor:
    """Where `x` lies in the range that a uniform scheme represents."""
    steps = blocks(x.float(), scheme) / params.scale.reshape(-1, 1)
    if params.zero_point is not None:
        steps = steps + params.zero_point.reshape(-1, 1)
    low, high = _limits(scheme, qmax)
    return ((steps >= low - 0.5) & (steps <= high + 0.5)).reshape(x.shape)
