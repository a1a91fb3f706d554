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

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
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
    """Shape of the scales of a tensor: () tensor, (N,) channel, (..., 1) token, (..., K / G) group."""
    match scheme.granularity:
        case "tensor":
            return ()
        case "channel":
            return (shape[0],)
        case "token":
            return (*shape[:-1], 1)
        case "group":
            size = scheme.group_size or 1
            *lead, row = _rows(shape)
            if row % size:
                raise SchemeError(
                    f"a row of {row} does not divide into groups of {size}",
                    required=f"group_size that divides {row}",
                    found=size,
                    cure=f"group_size={_nearest_divisor(row, size)}, or exclude this layer in the recipe",
                )
            return (*lead, row // size)


def _rows(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """A weight of a convolution groups along its flattened filter, all else along the last dim."""
    if len(shape) == 4:
        return (shape[0], shape[1] * shape[2] * shape[3])
    return tuple(shape)


def _nearest_divisor(row: int, size: int) -> int:
    return max(d for d in range(1, min(row, size) + 1) if row % d == 0)


def blocks(x: Tensor, scheme: Scheme) -> Tensor:
    """View `x` as (groups, elements): every row shares one scale."""
    match scheme.granularity:
        case "tensor":
            return x.reshape(1, -1)
        case "channel":
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
    if alone or x.dim() < 2 or x.shape[0] <= step:
        return [slice(None)]
    return [slice(i, i + step) for i in range(0, x.shape[0], step)]


def parameters(x: Tensor, scheme: Scheme) -> Params:
    """Min-max (uniform) or mean-based (ternary, binary) parameters of `x`.

    x: any shape, any float dtype; computed in fp32. Returns fp32 tensors of `scale_shape(x.shape, scheme)`.
    """
    shape = scale_shape(x.shape, scheme)
    b = blocks(x.float(), scheme)  # (groups, elements)
    if b.shape[1] == 0:  # an empty batch as one tensor: minimum and mean want an element
        b = b.new_zeros(b.shape[0], 1)
    match scheme.kind:
        case "symmetric":
            return Params(symmetric_scale(b.abs().amax(1), scheme.qmax).reshape(shape))
        case "asymmetric":
            low, high = torch.aminmax(b, dim=1)
            return asymmetric_params(low.reshape(shape), high.reshape(shape), scheme.qmax)
        case "ternary":
            magnitude = b.abs()
            t = _TERNARY_THRESHOLD * magnitude.mean(1, keepdim=True)
            kept = magnitude > t
            s = (magnitude * kept).sum(1) / kept.sum(1).clamp_min(1)
            return Params(s.reshape(shape), threshold=t.reshape(shape))
        case "binary":
            return Params(b.abs().mean(1).reshape(shape))


def symmetric_scale(amax: Tensor, qmax: int) -> Tensor:
    """s = amax / qmax, with 1 in place of zero and subnormal scales."""
    # A tensor divisor: CUDA turns division by a Python scalar into a multiplication by its reciprocal.
    scale = amax / torch.full((), qmax, dtype=torch.float32, device=amax.device)
    return torch.where(scale < _SMALLEST_SCALE, 1.0, scale)


def asymmetric_params(low: Tensor, high: Tensor, qmax: int) -> Params:
    """Scale and integer zero point of the range [min(low, 0), max(high, 0)]."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = symmetric_scale(high - low, qmax)
    return Params(scale, torch.round(-low / scale).clamp(0, qmax))


def quantize(x: Tensor, params: Params, scheme: Scheme, *, key: Tensor | int | None = None) -> Tensor:
    """Codes of `x`, in its shape, dtype `scheme.code_dtype`. `key` seeds stochastic rounding."""
    return _codes(x, params, scheme, key).to(scheme.code_dtype).reshape(x.shape)


def dequantize(codes: Tensor, params: Params, scheme: Scheme) -> Tensor:
    """fp32 values of unpacked `codes`, in their shape."""
    b = blocks(codes, scheme).float()
    return _values(b, params).reshape(codes.shape)


def fake_quantize(
    x: Tensor, scheme: Scheme, params: Params | None = None, *, key: Tensor | int | None = None
) -> Tensor:
    """Quantise and dequantise in `x`'s shape and dtype, with a straight-through gradient.

    The value is exactly `dequantize(quantize(x))`; the gradient with respect to `x` is 1 where `x` is inside
    the representable range and 0 outside (Bengio et al. 2013, arXiv 1308.3432). `params` are taken as
    constants; None means they are computed from `x`.
    """
    with torch.no_grad():
        if params is None:
            params = parameters(x, scheme)
        values = _values(_codes(x, params, scheme, key), params).reshape(x.shape).to(x.dtype)
        inside = _inside(x, params, scheme)
    through = torch.where(inside, x, 0.0) if inside is not None else x
    # through - through.detach() is exactly zero, so only the gradient of x is added.
    return values + (through - through.detach())


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


def _codes(x: Tensor, params: Params, scheme: Scheme, key: Tensor | int | None) -> Tensor:
    """Integral fp32 codes, (groups, elements)."""
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
    return steps.clamp(scheme.qmin, scheme.qmax)


def _values(codes: Tensor, params: Params) -> Tensor:
    if params.zero_point is not None:
        codes = codes - params.zero_point.reshape(-1, 1)
    return codes * params.scale.reshape(-1, 1)


def _inside(x: Tensor, params: Params, scheme: Scheme) -> Tensor | None:
    if scheme.kind in ("ternary", "binary"):
        return None
    steps = blocks(x.float(), scheme) / params.scale.reshape(-1, 1)
    if params.zero_point is not None:
        steps = steps + params.zero_point.reshape(-1, 1)
    return ((steps >= scheme.qmin - 0.5) & (steps <= scheme.qmax + 0.5)).reshape(x.shape)
