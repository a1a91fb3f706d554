"""A quantised tensor as a module of plain buffers, so that its state_dict is its real size on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from . import numerics
from .errors import SchemeError
from .layout import pack, row_nbytes, unpack
from .numerics import Params
from .scheme import Scheme


class QTensor(nn.Module):
    """Packed codes, scales and zero points of one parameter, under the parameter's own name.

    Invariants:
        codes      (shape[0], row bytes), uint8 or int8; see `layout`
        scale      fp32, `numerics.scale_shape(shape, scheme)`
        zero_point fp32 as scale for asymmetric schemes, else absent
        dequantize() == numerics.dequantize(int_codes(), params, scheme), in `shape`
        dims       shape[i] == parameter.shape[dims[i]]: operators may want it transposed or permuted; not saved
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: Scheme,
        shape: tuple[int, ...],
        dims: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.shape = scheme, tuple(shape)
        self.dims = dims or tuple(range(len(self.shape)))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @staticmethod
    def quantize(
        weight: Tensor,
        scheme: Scheme,
        params: Params | None = None,
        *,
        key: int | None = None,
        dims: tuple[int, ...] | None = None,
    ) -> QTensor:
        """Quantise `weight` (2 or more dims, finite), with its dimensions in the order `dims`; `params`: min-max.

        Raises SchemeError when the weight is not finite or does not divide into groups.
        """
        require_finite(weight)
        weight = weight if dims is None else weight.permute(dims)
        with torch.no_grad():
            # Some rows at a time, so that no temporary is as large as an embedding table.
            parts = numerics.chunks(weight, scheme) if params is None else [slice(None)]
            made = [_packed(weight[part], scheme, params, key) for part in parts]
        zeros = [p.zero_point for _, p in made if p.zero_point is not None]
        packed, scale = _joined([codes for codes, _ in made]), _joined([p.scale for _, p in made])
        return QTensor(packed, scale, _joined(zeros) if zeros else None, scheme, tuple(weight.shape), dims)

    @property
    def params(self) -> Params:
        """Scale and zero point (the threshold of a ternary tensor is only needed to quantise)."""
        return Params(self.scale, self.zero_point)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: what lies on disk."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def int_codes(self) -> Tensor:
        """Unpacked codes, in `shape`, dtype `scheme.code_dtype`."""
        return unpack(self.codes, math.prod(self.shape[1:]), self.scheme).reshape(self.shape)

    def dequantize(self) -> Tensor:
        """fp32 values in `shape`."""
        return numerics.dequantize(self.int_codes(), self.params, self.scheme)

    def refresh(self, weight: Tensor) -> None:
        """Quantise a new value of the parameter into the same buffers (safe under CUDA graphs)."""
        required = tuple(self.shape[self.dims.index(i)] for i in range(len(self.dims)))
        if tuple(weight.shape) != required:
            raise SchemeError("refresh with another shape", required=required, found=tuple(weight.shape))
        fresh = QTensor.quantize(weight, self.scheme, dims=self.dims)
        for name, buffer in self.named_buffers():
            buffer.copy_(fresh.get_buffer(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with its model but keeps its dtypes: scales stay fp32 in a model cast to half."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.scheme.spell()}, shape={self.shape}, {self.nbytes} bytes"


def packed_nbytes(shape: tuple[int, ...], scheme: Scheme) -> int:
    """Bytes of a QTensor of this shape: codes, and an fp32 scale and zero point for each group."""
    codes = shape[0] * row_nbytes(math.prod(shape[1:]), scheme)
    scales = math.prod(numerics.scale_shape(shape, scheme))
    return codes + 4 * scales * (2 if scheme.kind == "asymmetric" else 1)


def _packed(weight: Tensor, scheme: Scheme, params: Params | None, key: int | None) -> tuple[Tensor, Params]:
    params = params or numerics.parameters(weight, scheme)
    codes = numerics.quantize(weight, params, scheme, key=key)
    return pack(codes.reshape(codes.shape[0], -1), scheme), params


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """On memory of its own: `refresh` writes into a QTensor's buffers, never into the caller's parameters."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def require_finite(weight: Tensor, name: str = "weight") -> None:
    """Raise SchemeError when `weight` holds NaN or Inf, with their counts."""
    # max|x| is finite exactly when all of x is; it costs one pass and no temporary of the weight's size.
    if weight.numel() and not all(math.isfinite(v) for v in torch.aminmax(weight.detach().float())):
        nan, inf = int(weight.isnan().sum()), int(weight.isinf().sum())
        raise SchemeError(
            f"{name} cannot be quantised",
            required="finite values",
            found=f"{nan} NaN, {inf} Inf of {weight.numel()}",
            cure="repair the checkpoint, or exclude this layer in the recipe",
        )
