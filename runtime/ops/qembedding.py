"""Embedding lookup in a packed table: only the rows asked for are unpacked.

y[i] = dequantize(W[index[i]])      W (V, K) packed, scales per row (V,) or per group of a row (V, K / G)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..layout import unpack
from ..numerics import Params
from ..scheme import Scheme
from .operator import Operator


def _reference(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    columns: int,
    scheme: str,
    dtype: torch.dtype,
) -> Tensor:
    parsed = Scheme.parse(scheme)
    flat = indices.reshape(-1)
    codes = unpack(weight[flat], columns, parsed)  # (indices, K)
    per_row = scale if scale.dim() == 0 else scale[flat]
    zeros = zero_point if zero_point is None or zero_point.dim() == 0 else zero_point[flat]
    values = numerics.dequantize(codes, Params(per_row, zeros), parsed)
    return values.reshape(*indices.shape, columns).to(dtype)


QEMBEDDING = Operator(
    name="qembedding",
    schema="(Tensor indices, Tensor weight, Tensor scale, Tensor? zero_point, int columns, str scheme, "
    "ScalarType dtype) -> Tensor",
    reference=_reference,
)
