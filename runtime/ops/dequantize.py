"""A packed tensor back in floating point, for calls that have no integer form: it saves room, not time.

y = (codes - z) s       in `shape`, dtype as asked
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import numerics
from ..layout import unpack
from ..numerics import Params
from ..scheme import Scheme
from .operator import Operator


def _reference(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, shape: list[int], scheme: str, dtype: torch.dtype
) -> Tensor:
    parsed = Scheme.parse(scheme)
    codes = unpack(weight, math.prod(shape[1:]), parsed).reshape(shape)
    return numerics.dequantize(codes, Params(scale, zero_point), parsed).to(dtype)


DEQUANTIZE = Operator(
    name="dequantize",
    schema="(Tensor weight, Tensor scale, Tensor? zero_point, int[] shape, str scheme, ScalarType dtype) -> Tensor",
    reference=_reference,
)
