"""Quantised layers as eager modules: what `transplant` puts in the place of a model's own.

Each calls the operator that the graph calls, on the same QTensor, so graph and module agree bit for bit.
Weights are frozen; gradients pass through to what lies below (`gradient`), so that adapters train.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gradient import through_linear
from .ops.catalog import LIBRARY
from .ops.operator import wants_gradient
from .ops.qembedding import QEMBEDDING
from .ops.qlinear import QLINEAR, QLINEAR_WEIGHT_ONLY
from .ops.quantize import QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from .qtensor import QTensor

assert LIBRARY is not None  # importing the catalogue registers the operators


class QuantizedLinear(nn.Module):
    """y = x W^T + b on a QTensor (N, K); in place of nn.Linear, or of GPT-2's Conv1D.

    activation: granularity of dynamic quantisation ("token" or "tensor"), or None for weight-only
    input_scale, input_zero_point: calibrated scalars of a static activation; the zero point in int8 terms, with
        its contribution already in `bias`
    """

    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        weight: QTensor,
        bias: Tensor | None,
        *,
        activation: str | None,
        dtype: torch.dtype = torch.float32,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.activation, self.dtype = weight, activation, dtype
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not wants_gradient(x):
            return self._product(x)
        w, ranges = self.weight, (self.input_scale, self.input_zero_point)
        return through_linear(
            x, self._product(x.detach()), *ranges, w.codes, w.scale, w.zero_point, w.scheme.stored.spell()
        )

    def _product(self, x: Tensor) -> Tensor:
        w, scheme = self.weight, self.weight.scheme.stored.spell()
        if self.activation is None:
            args = (x, w.codes, w.scale, w.zero_point, self.bias, scheme)
            y: Tensor = QLINEAR_WEIGHT_ONLY.overload(*args)
            return y
        if self.input_scale is not None:
            codes, scale = QUANTIZE_STATIC.overload(x, self.input_scale, self.input_zero_point), self.input_scale
        else:
            codes, scale = QUANTIZE_DYNAMIC.overload(x, self.activation)
        y = QLINEAR.overload(codes, scale, w.codes, w.scale, w.zero_point, self.bias, scheme, self.dtype)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"


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
