"""What our operators compute, as functions that export traces: ATen, and ONNX nodes by name.

Codes are the Program's plus 128, as uint8, because the int8 x int8 kernel is about 80 times slower (128x768x768: 23 ms
against 0.29).
Measured on one core with AVX512-VNNI, ORT 1.31.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Plane, is_signed, planes
from ..scheme import Scheme

SHIFT = 128
SITE = "dwindle.site"  # a node's property: the Program's node whose rounding it does, see `check`
_TINY = torch.finfo(torch.float32).tiny


def onnx(
    name: str, inputs: Sequence[Any], shape: Sequence[Any], dtype: torch.dtype, *, site: str | None = None, **kw: Any
) -> Tensor:
    """One ONNX node with an output of `shape`; kw: its attributes."""
    properties = None if site is None else {SITE: site}
    version = 1 if "::" in name else None
    result: Tensor = torch.onnx.ops.symbolic(
        name, inputs, kw, dtype=dtype, shape=shape, version=version, metadata_props=properties
    )
    return result


def per_token(x: Tensor, site: str, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 codes and scales (..., 1)."""
    # Slower ways to 384 -> 1536 on 1024 tokens, 2.28 ms: axis=0 on flattened tokens 2.47, MatMulInteger and Cast 2.65
    # (one scale a tensor: 1.78).
    x = x.float()
    # Two reductions, where Abs would write a copy: 1536 -> 384 on 1024 tokens, 1.96 ms against 2.10.
    amax = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    scale = (amax / _largest(bits)).clamp_min(_TINY)  # (..., 1)
    zero = torch.full_like(scale, SHIFT, dtype=torch.uint8)
    return _by_token(x, scale, zero, site), scale


def _largest(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)


def _by_token(x: Tensor, scale: Tensor, zero: Tensor, site: str) -> Tensor:
    blocks = {"axis": x.dim() - 1, "block_size": int(x.shape[-1])}
    return onnx("QuantizeLinear", (x, scale, zero), x.shape, torch.uint8, site=site, **blocks)


def spread(x: Tensor, site: str, granularity: str, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 codes and scales of an image each (B, 1, 1, 1), or one of a tensor."""
    x = x.float()
    low, high = _ends(x, granularity)
    scale = (torch.maximum(high, -low) / _largest(bits)).clamp_min(_TINY)
    return _by_image(x, scale, torch.full_like(scale, SHIFT, dtype=torch.uint8), site), scale


def asymmetric(x: Tensor, site: str, granularity: str, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes, scales, and fp32 zero points less 128, as the Program has them."""
    x, shift = x.float(), 2 ** (bits - 1)
    low, high = _ends(x, granularity)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (2 * shift - 1)).clamp_min(_TINY)
    zero = torch.round(-low / scale).clamp(0, 2 * shift - 1) - shift
    stored = (zero + SHIFT).to(torch.uint8)
    codes = (_by_token if granularity == "token" else _by_image)(x, scale, stored, site)
    return _clipped(codes, bits, symmetric=False), scale, zero


def _ends(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    dims = {"token": [-1], "image": list(range(1, x.dim())), "tensor": list(range(x.dim()))}[granularity]
    keep = granularity != "tensor"
    return torch.amin(x, dims, keepdim=keep), torch.amax(x, dims, keepdim=keep)


def _by_image(x: Tensor, scale: Tensor, zero: Tensor, site: str) -> Tensor:
    if not scale.dim():
        return onnx("QuantizeLinear", (x, scale, zero), x.shape, torch.uint8, site=site)
    inputs = (x, scale.reshape(-1), zero.reshape(-1))
    return onnx("QuantizeLinear", inputs, x.shape, torch.uint8, site=site, axis=0)


def _clipped(codes: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """QuantizeLinear saturates at 8 bits alone, and there at -128 too."""
    largest = _largest(bits)
    return codes if bits == 8 else codes.clamp(SHIFT - largest - (not symmetric), SHIFT + largest)


def per_tensor(x: Tensor, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes, scale, zero point."""
    codes, scale, zero = torch.onnx.ops.symbolic_multi_out(
        "DynamicQuantizeLinear",
        (x.float(),),
        {},
        dtypes=(torch.uint8, torch.float32, torch.uint8),
        shapes=(x.shape, (), ()),
        metadata_props={SITE: site},
    )
    return codes, scale, zero


def static(x: Tensor, scale: Tensor, zero: Tensor, site: str, bits: int, symmetric: bool) -> Tensor:
    """uint8 codes."""
    codes = onnx("QuantizeLinear", (x.float(), scale, zero), x.shape, torch.uint8, site=site)
    return _clipped(codes, bits, symmetric=symmetric)


def _gemm(codes: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, zero: Tensor, bias: Any) -> Tensor:
    shape = (*codes.shape[:-1], weight.shape[1])
    inputs = (codes, weight, scale, weight_scale, zero, None, bias)
    return onnx("com.microsoft::MatMulIntegerToFloat", inputs, shape, torch.float32)


def gemm_per_token(
    codes: Tensor,
    scale: Tensor,
    one: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of zero point 128 with a scale (..., 1); weight (K, N) int8, bias (1, N)."""
    y = _gemm(codes, weight, one, weight_scale, zero, None) * scale
    return (y if bias is None else y + bias).to(dtype)


def gemm_per_tensor(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Codes with one scale and zero point; weight (K, N) int8, bias (N,)."""
    return _gemm(codes, weight, scale, weight_scale, zero, bias).to(dtype)


def by_nbits(
    x: Tensor,
    b: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    attributes: dict[str, int],
    bias: Tensor | None,
    dtype: torch.dtype,
    site: str,
) -> Tensor:
    """x (..., K) floating; b, scale and zero as in `nbits`."""
    shape = (*x.shape[:-1], attributes["N"])
    inputs = (x.float(), b, scale, zero)
    y = onnx("com.microsoft::MatMulNBits", inputs, shape, torch.float32, site=site, **attributes)
    return (y if bias is None else y + bias).to(dtype)


def floating(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """fp32 values of codes."""
    return (codes.float() - zero.float()) * scale


def unpacked(packed: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """fp32 codes (rows, columns) of packed ones, by arithmetic that ONNX has on every type: see `layout`."""
    if scheme.bits == 8:
        return packed.float()
    parts = list(planes(columns, scheme))
    rows = torch.split(packed, [plane.nbytes for plane in parts], 1)
    fields = [_fields(own, plane)[:, :columns] for plane, own in zip(parts, rows, strict=True)]
    codes = fields[0]
    for plane, higher in zip(parts[1:], fields[1:], strict=True):
        codes = codes + higher * 2.0**plane.shift
    if is_signed(scheme):
        codes = torch.where(codes >= 2 ** (scheme.bits - 1), codes - 2**scheme.bits, codes)
    return codes * 2 - 1 if scheme.kind == "binary" else codes


def _fields(packed: Tensor, plane: Plane) -> Tensor:
    """fp32 (rows, K), unsigned, K rounded up to whole blocks."""
    per = 8 // plane.width
    rest, fields = packed.float().reshape(packed.shape[0], -1, 1, plane.block // per), []
    for _ in range(per):
        above = torch.floor(rest * 2.0**-plane.width)
        fields.append(rest - above * 2.0**plane.width)
        rest = above
    return torch.cat(fields, 2).reshape(packed.shape[0], -1)


def _values(packed: Tensor, scale: Tensor, zero: Tensor | None, columns: int, spelled: str) -> Tensor:
    """fp32 (rows, columns): the scales of a row are one, or one a group."""
    codes = unpacked(packed, columns, Scheme.parse(spelled))
    groups = scale.shape[1] if scale.dim() == 2 else 1
    grouped = codes.reshape(codes.shape[0], groups, -1)
    if zero is not None:
        grouped = grouped - (zero if not zero.dim() else zero.reshape(-1, groups, 1))
    grouped = grouped * (scale if not scale.dim() else scale.reshape(-1, groups, 1))
    return grouped.reshape(codes.shape)


def lookup(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    columns: int,
    spelled: str,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a packed table; scale and zero one a row or one a group of a row.

    1024 rows of 384 take .48 ms in 1 bit and .59 in 2; GatherBlockQuantized takes .31 in 2 bits and knows no single
    ones: a table of 1 bit would be twice as large, to save a two-hundredth of a MiniLM's time.
    """
    flat = indices.reshape(-1)
    rows, scales = weight.index_select(0, flat), scale.index_select(0, flat) if scale.dim() else scale
    zeros = zero if zero is None or not zero.dim() else zero.index_select(0, flat)
    return _values(rows, scales, zeros, columns, spelled).reshape(*indices.shape, columns).to(dtype)


def whole(
    codes: Tensor, scale: Tensor, zero: Tensor | None, shape: list[int], spelled: str, dtype: torch.dtype
) -> Tensor:
    """A packed tensor in `shape`."""
    columns = math.prod(shape[1:])
    return _values(codes.reshape(codes.shape[0], -1), scale, zero, columns, spelled).reshape(shape).to(dtype)


def convolution(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    requantised: bool,
) -> Tensor:
    """NCHW codes, OIHW weight int8; scale and zero one a tensor or an image.

    requantised: what follows is a QuantizeLinear, maybe after an activation.
    """
    # ConvInteger would be no better: 64 channels of 56x56, 3x3: 5.97 ms, fp32 1.00, QLinearConv .37.
    if scale.dim():
        x = (codes.float() - zero.float()) * scale
    else:
        x = onnx("DequantizeLinear", (codes, scale, zero), codes.shape, torch.float32)
    if requantised:
        w = onnx("DequantizeLinear", (weight, weight_scale), weight.shape, torch.float32, axis=0)
    else:  # arithmetic, which a session does once on loading, where it would leave DequantizeLinear for each run
        w = weight.float() * weight_scale.reshape(-1, 1, 1, 1)
    return torch.nn.functional.conv2d(x, w, bias, stride, padding, dilation, groups).to(dtype)


def asymmetric_convolution(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """The product of codes whose zero point is this call's, as qconv2d has it: the Program takes that off next."""
    w = weight.float() * weight_scale.reshape(-1, 1, 1, 1)
    x = (codes.float() - (zero + SHIFT)) * scale  # padding is zero here, and the zero point there
    y = torch.nn.functional.conv2d(x, w, bias, stride, padding, dilation, groups)
    return (y + scale * zero * w.sum((1, 2, 3)).reshape(1, -1, 1, 1)).to(dtype)
