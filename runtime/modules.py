"""Quantised layers as eager modules: what `transplant` puts in the place of a model's own.

Each calls the operator that the graph calls, on the same QTensor, so graph and module agree bit for bit.
Weights are frozen; gradients pass through to what lies below (`gradient`), so that adapters train.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gradient import Ranges, through_linear
from .ops.catalog import LIBRARY
from .ops.operator import wants_gradient
from .ops.qembedding import QEMBEDDING
from .ops.qlinear import QLINEAR, QLINEAR_WEIGHT_ONLY
from .ops.quantize import QUANTIZE_ASYMMETRIC, QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from .qtensor import QTensor
from .scheme import Scheme

assert LIBRARY is not None  # importing the catalogue registers the operators


class QuantizedLinear(nn.Module):
    """y = x W^T + b on a QTensor (N, K); in place of nn.Linear, or of GPT-2's Conv1D.

    activation: its scheme, or None for weight-only
    input_scale, input_zero_point: calibrated scalars of a static activation; the zero point in int8 terms, with
        its contribution already in `bias`
    weight_sums: fp32 (N,), what each row of W adds up to, for an asymmetric dynamic activation
    """

    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    weight_sums: Tensor | None

    def __init__(
        self,
        weight: QTensor,
        bias: Tensor | None,
        *,
        activation: Scheme | None,
        dtype: torch.dtype = torch.float32,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        weight_sums: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.activation, self.dtype = weight, activation, dtype
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)
        self.register_buffer("weight_sums", weight_sums)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not wants_gradient(x):
            return self._product(x)
        w = self.weight
        ranges: Ranges = ()
        if self.input_scale is not None and self.activation is not None:
            ranges = (self.input_scale, self.input_zero_point, self.activation.bits)
        return through_linear(
            x, self._product(x.detach()), ranges, w.codes, w.scale, w.zero_point, w.scheme.stored.spell()
        )

    def _product(self, x: Tensor) -> Tensor:
        if self.activation is None:
            w = self.weight
            args = (x, w.codes, w.scale, w.zero_point, self.bias, w.scheme.stored.spell())
            y: Tensor = QLINEAR_WEIGHT_ONLY.overload(*args)
            return y
        bits, span = self.activation.bits, self.activation.granularity
        if self.input_scale is not None:
            codes = QUANTIZE_STATIC.overload(x, self.input_scale, self.input_zero_point, bits)
            return self._integer(codes, self.input_scale, self.dtype)
        if self.activation.kind == "symmetric":
            codes, scale = QUANTIZE_DYNAMIC.overload(x, span, bits)
            return self._integer(codes, scale, self.dtype)
        assert self.weight_sums is not None
        codes, scale, zero = QUANTIZE_ASYMMETRIC.overload(x, span, bits)
        share: Tensor = scale * zero * self.weight_sums
        return (self._integer(codes, scale, torch.float32) - share).to(self.dtype)

    def _integer(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        w, scheme = self.weight, self.weight.scheme.stored.spell()
        y: Tensor = QLINEAR.overload(codes, scale, w.codes, w.scale, w.zero_point, self.bias, scheme, dtype)
        return y

    def extra_repr(self) -> str:
        spelled = None if self.activation is None else self.activation.spell()
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={spelled}"


class QuantizedEmbedding(nn.Module):
    """Rows of a QTensor (V, K); in place of nn.Embedding."""

    def __init__(self, weight: QTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight, self.dtype = weight, dtype

    def forward(self, indices: Tensor) -> Tensor:
        """(...) integer -> (..., K)."""
        w = self.weight
        args = (indices, w.codes, w.scale, w.zero_point, self.embedding_dim, w.scheme.stored.spell(), self.dtype)
        y: Tensor = QEMBEDDING.overload(*args)
        return y

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
