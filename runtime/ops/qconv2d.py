"""Two-dimensional convolution on int8 operands, as one integer GEMM over gathered patches.

    y[b, o, p] = s_x s_w[o] sum_k W[o, k] patch[b, p, k] + bias[o]

codes (B, C, H, W) int8 of any memory format, weight (O, kh, kw, C / groups) int8: patches are runs of C in a
channels-last input, so gathering them is a few large copies. s_x is () or (B, 1, 1, 1), s_w is (O,). The result is
(B, O, H', W') in channels-last memory. Grouped convolution runs on fp32 copies of the codes: exact while a
filter has at most 1,040 weights, since 127^2 * 1040 < 2^24. Larger ones are not handled, and no pass makes any:
grouped convolutions are stored in 8 bits and computed in floating point.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import compat
from .operator import Operator


def _reference(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    x = codes.permute(0, 2, 3, 1)  # (B, H, W, C)
    vertical, horizontal = padding
    if any(padding):
        # Padding stands for 0.0, whose code is the zero point.
        x = _pad(x, vertical, horizontal, zero_point)
    if groups == 1:
        acc = _patch_gemm(x, weight, stride, dilation)  # (B, H', W', O)
    else:
        w = weight.permute(0, 3, 1, 2).float()
        y = F.conv2d(x.permute(0, 3, 1, 2).float(), w, None, stride, 0, dilation, groups)
        acc = y.permute(0, 2, 3, 1).contiguous()  # 1x1 filters keep an NCHW input's layout
    y = acc.float() * scale * weight_scale
    return (y if bias is None else y + bias).to(dtype).permute(0, 3, 1, 2)


def _pad(x: Tensor, vertical: int, horizontal: int, zero_point: Tensor | None) -> Tensor:
    b, h, w, c = x.shape
    shape = (b, h + 2 * vertical, w + 2 * horizontal, c)
    if zero_point is None:
        out = torch.zeros(shape, dtype=x.dtype, device=x.device)
    else:
        out = zero_point.to(x.dtype).expand(shape).clone()
    out[:, vertical : vertical + h, horizontal : horizontal + w] = x
    return out


def _patch_gemm(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    b, h, w, c = x.shape
    o, kh, kw, _ = weight.shape
    rows = (h - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (w - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    patches = [
        x[
            :,
            i * dilation[0] : i * dilation[0] + (rows - 1) * stride[0] + 1 : stride[0],
            j * dilation[1] : j * dilation[1] + (columns - 1) * stride[1] + 1 : stride[1],
        ]
        for i in range(kh)
        for j in range(kw)
    ]
    gathered = patches[0] if len(patches) == 1 else torch.cat(patches, -1)  # (B, H', W', kh kw C)
    acc = compat.int_mm(gathered.reshape(-1, kh * kw * c), weight.reshape(o, -1).t())
    return acc.reshape(b, rows, columns, o)


QCONV2D = Operator(
    name="qconv2d",
    schema="(Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, ScalarType dtype) -> Tensor",
    reference=_reference,
)
