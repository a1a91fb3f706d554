"""Quantised layers as eager modules: what takes the place of a model's own.

Each calls the operator that the graph calls, on the same QTensor, so graph and module agree bit for bit.
Weights are frozen; gradients pass through to what lies below (`gradient`), so that adapters train.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gradient import Ranges, through_conv2d, through_linear
from .ops.catalog import LIBRARY
from .ops.operator import wants_gradient
from .ops.qconv2d import QCONV2D
from .ops.qembedding import QEMBEDDING
from .ops.qlinear import QLINEAR, QLINEAR_WEIGHT_ONLY
from .ops.quantize import QUANTIZE_ASYMMETRIC, QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from .qtensor import QTensor
from .scheme import Scheme

assert LIBRARY is not None  # importing the catalogue registers the operators


class _Quantized(nn.Module):
    """A packed weight and the activation that meets it.

    activation: its scheme, or None where only the weight is quantised
    input_scale, input_zero_point: calibrated scalars of a static activation; the zero point in int8 terms, with
        its contribution already in `bias`
    weight_sums: fp32, what the weights of each output add up to, for an asymmetric activation that is dynamic;
        of a shape that meets the product
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
        self.weight, self.activation, self.dtype = weight, activation, dtype
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero_point", input_zero_point)
        self.register_buffer("weight_sums", weight_sums)

    def _ranges(self) -> Ranges:
        """What `quantize_static` takes after x; empty for other activations."""
        if self.input_scale is None or self.activation is None:
            return ()
        return (self.input_scale, self.input_zero_point, self.activation.bits)

    def _product(self, x: Tensor, *options: list[int]) -> Tensor:
        """The product of x's codes with the weight; options: of `_integer`."""
        scheme = self.activation
        assert scheme is not None
        if self.input_scale is not None:
            codes = QUANTIZE_STATIC.overload(x, *self._ranges())
            return self._integer(codes, self.input_scale, self.input_zero_point, self.dtype, *options)
        if scheme.kind == "symmetric":
            codes, scale = QUANTIZE_DYNAMIC.overload(x, scheme.granularity, scheme.bits)
            return self._integer(codes, scale, None, self.dtype, *options)
        assert self.weight_sums is not None
        codes, scale, zero = QUANTIZE_ASYMMETRIC.overload(x, scheme.granularity, scheme.bits)
        share: Tensor = scale * zero * self.weight_sums
        return (self._integer(codes, scale, zero, torch.float32, *options) - share).to(self.dtype)

    def _integer(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, *options: list[int]
    ) -> Tensor:
        """(codes @ W) scale + bias."""
        raise NotImplementedError

    def _spelled(self) -> str:
        return "None" if self.activation is None else self.activation.spell()


class QuantizedLinear(_Quantized):
    """y = x W^T + b on a QTensor (N, K); in place of nn.Linear, or of GPT-2's Conv1D."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not wants_gradient(x):
            return self._any_product(x)
        w, y = self.weight, self._any_product(x.detach())
        return through_linear(x, y, self._ranges(), w.codes, w.scale, w.zero_point, w.scheme.stored.spell())

    def _any_product(self, x: Tensor) -> Tensor:
        if self.activation is not None:
            return self._product(x)
        w = self.weight
        args = (x, w.codes, w.scale, w.zero_point, self.bias, w.scheme.stored.spell())
        y: Tensor = QLINEAR_WEIGHT_ONLY.overload(*args)
        return y

    def _integer(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, *options: list[int]
    ) -> Tensor:
        w, scheme = self.weight, self.weight.scheme.stored.spell()
        y: Tensor = QLINEAR.overload(codes, scale, w.codes, w.scale, w.zero_point, self.bias, scheme, dtype)
        return y

    def extra_repr(self) -> str:
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, activation={self._spelled()}"


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


class QuantizedConv2d(_Quantized):
    """y = conv2d(x, W) + b on a QTensor of filters, whose `dims` say how they lie; in place of nn.Conv2d.

    With an activation the filters are (O, kh, kw, C) of 8 bits per channel; without one they are dequantised on
    each call.
    """

    def __init__(
        self,
        weight: QTensor,
        bias: Tensor | None,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        padding_mode: str = "zeros",
        activation: Scheme | None = None,
        dtype: torch.dtype = torch.float32,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        weight_sums: Tensor | None = None,
    ) -> None:
        ranges = {"input_scale": input_scale, "input_zero_point": input_zero_point, "weight_sums": weight_sums}
        super().__init__(weight, bias, activation=activation, dtype=dtype, **ranges)
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups, self.padding_mode = groups, padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W'), or both without B."""
        if x.dim() == 3:
            y: Tensor = self(x[None])
            return y[0]
        padding = self.padding
        if self.padding_mode != "zeros":
            rows, columns = padding
            x, padding = F.pad(x, (columns, columns, rows, rows), mode=self.padding_mode), [0, 0]
        if self.activation is None:
            return F.conv2d(x, self._filters(x.dtype), self.bias, self.stride, padding, self.dilation, self.groups)
        if not wants_gradient(x):
            return self._product(x, padding)
        window = (self.stride, padding, self.dilation, self.groups)
        return through_conv2d(
            x, self._product(x.detach(), padding), self._ranges(), self._codes(), self.weight.scale, *window
        )

    def _filters(self, dtype: torch.dtype) -> Tensor:
        """fp (O, C / groups, kh, kw)."""
        dims = self.weight.dims
        back = [dims.index(i) for i in range(len(dims))]
        return self.weight.dequantize().permute(back).to(dtype)

    def _codes(self) -> Tensor:
        return self.weight.codes.view(self.weight.shape)  # (O, kh, kw, C)

    def _integer(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, *options: list[int]
    ) -> Tensor:
        (padding,) = options
        filters = (self._codes(), self.weight.scale, self.bias, self.stride, padding, self.dilation, self.groups)
        y: Tensor = QCONV2D.overload(codes, scale, zero, *filters, dtype)
        return y

    def extra_repr(self) -> str:
        window = f"stride={self.stride}, padding={self.padding}"
        return f"{list(self.weight.shape)}, {window}, activation={self._spelled()}"


_BARE = frozenset(vars(nn.Module()))
_TENSORS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def become(old: nn.Module, new: nn.Module) -> None:
    """Make `old` what `new` is, in place: its hooks, its mode and every reference to it stay."""
    old.__class__ = type(new)
    vars(old).update({name: vars(new)[name] for name in _TENSORS})
    vars(old).update({name: value for name, value in vars(new).items() if name not in _BARE})
