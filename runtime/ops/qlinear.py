"""Linear on quantised operands.

    qlinear               y = (codes @ W^T) s_x s_w + b      codes (..., K) int8, W (N, K) of up to 8 bits, as int8
                          groups of K, or zero points:  y = (codes @ dequantize(W)^T) s_x + b
    qlinear_weight_only   y = x @ dequantize(W)^T + b        x floating

s_x is (..., 1) token-wise or () per tensor, s_w is (N,) per channel or (N, K / G) per group.
Integer products accumulate in int32: exact for K <= 2^31 / 127^2 = 133,152.
Not handled: more than 8 bits (`layout` refuses them at packing).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import compat, numerics
from ..layout import unpack
from ..numerics import Params
from ..scheme import Scheme
from ..unpacked import int8_codes
from .operator import Kernel, Operator, wants_gradient
from .quantize import chunk_rows


def dequantize_packed(packed: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, columns: int) -> Tensor:
    """fp32 (N, columns) of packed codes."""
    codes = unpack(packed, columns, scheme)
    return numerics.dequantize(codes, Params(scale, zero_point), scheme)


def is_integer(scheme: Scheme) -> bool:
    """Whether a weight's codes are multiplied as integers: no zero point, and no scale within a row."""
    return scheme.bits <= 8 and scheme.kind != "asymmetric" and scheme.granularity in ("channel", "tensor")


def _as_int8(packed: Tensor, columns: int, scheme: Scheme) -> Tensor:
    return packed if scheme.bits == 8 else unpack(packed, columns, scheme)


def _reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> Tensor:
    lead, k, parsed = codes.shape[:-1], codes.shape[-1], Scheme.parse(scheme)
    if is_integer(parsed):
        w = _as_int8(weight, k, parsed)
        acc = compat.int_mm(codes.reshape(-1, k), w.t()).reshape(*lead, w.shape[0])
        y = acc.float() * scale * weight_scale
    else:
        w = dequantize_packed(weight, weight_scale, zero_point, parsed, k)
        y = F.linear(codes.float(), w) * scale
    return (y if bias is None else y + bias).to(dtype)


@torch.no_grad()
def _int8_cpu(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> Tensor:
    k, n = codes.shape[-1], weight.shape[0]
    rows = codes.reshape(-1, k)
    per_row = None if scale.dim() == 0 else scale.reshape(-1, 1)
    out = torch.empty((rows.shape[0], n), dtype=dtype)
    step = chunk_rows(n)
    wt = int8_codes(weight, k, Scheme.parse(scheme)).t()
    for i in range(0, rows.shape[0], step):
        y = compat.int_mm(rows[i : i + step], wt).float()
        y.mul_(scale if per_row is None else per_row[i : i + step]).mul_(weight_scale)
        if bias is None:
            out[i : i + step] = y
        else:
            torch.add(y, bias, out=out[i : i + step])
    return out.reshape(*codes.shape[:-1], n)


def _serves_int8_cpu(codes: Tensor, scale: Tensor, weight: Tensor, *rest: object) -> str | None:
    if codes.device.type != "cpu":
        return "needs a CPU tensor"
    if wants_gradient(scale, weight, *rest):
        return "needs no gradient"
    return None if is_integer(Scheme.parse(str(rest[3]))) else "needs weights without zero points or groups"


def _weight_only_reference(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, scheme: str
) -> Tensor:
    w = dequantize_packed(weight, scale, zero_point, Scheme.parse(scheme), x.shape[-1])
    return F.linear(x, w.to(x.dtype), bias)


@torch.no_grad()
def _weight_only_cpu(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, scheme: str
) -> Tensor:
    """Rows of W in chunks that stay in the cache: 1x4096x4096 takes 1.7 ms in 8 bits (fp32 2.6, whole W 56)."""
    k, n = x.shape[-1], weight.shape[0]
    rows, out = x.reshape(-1, k).float(), torch.empty((x.shape[:-1].numel(), n))
    parsed = Scheme.parse(scheme)
    per_channel = parsed.bits == 8 and is_integer(parsed)
    step = chunk_rows(k)
    for i in range(0, n, step):
        part = slice(i, i + step)
        if per_channel:
            w = weight[part].float()  # the scale is constant along K, so it multiplies the product instead
        else:
            zeros = None if zero_point is None else _rows_of(zero_point, part)
            w = dequantize_packed(weight[part], _rows_of(scale, part), zeros, parsed, k)
        torch.mm(rows, w.t(), out=out[:, part])
    if per_channel:
        out.mul_(scale)
    if bias is not None:
        out.add_(bias)
    return out.reshape(*x.shape[:-1], n).to(x.dtype)


def _rows_of(values: Tensor, part: slice) -> Tensor:
    return values if values.dim() == 0 else values[part]


def _serves_weight_only_cpu(x: Tensor, weight: Tensor, *rest: object) -> str | None:
    if x.device.type != "cpu":
        return "needs a CPU tensor"
    if wants_gradient(x, *rest):
        return "needs no gradient"
    return None if x.numel() and weight.shape[0] else "nothing to multiply"


QLINEAR = Operator(
    name="qlinear",
    schema="(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? zero_point, "
    "Tensor? bias, str scheme, ScalarType dtype) -> Tensor",
    reference=_reference,
    kernels=(Kernel(name="cpu int8 gemm", serves=_serves_int8_cpu, run=_int8_cpu),),
)

QLINEAR_WEIGHT_ONLY = Operator(
    name="qlinear_weight_only",
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, str scheme) -> Tensor",
    reference=_weight_only_reference,
    kernels=(Kernel(name="cpu chunked", serves=_serves_weight_only_cpu, run=_weight_only_cpu),),
)
