"""Tensors with zeros as they lie in a file. Memory has them whole.

    mask     1 bit a number, set where it is not zero, and those that are not
    N:4      N numbers of every 4 along a dimension, and the place of each in 2 bits (what 2:4 kernels read)

A number of b bits takes b (1 - zeros) + 1 bits under a mask and b N/4 + N/2 as N:4. So 3:4 is always stored under a
mask; 2:4 costs as much as a mask does, less the zeros beyond one half, and has rows of one length.

What comes back has the same bits, but for the sign of a zero: w * 0 is -0.0 for every negative w, and 0.0 afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError
from .qtensor import QTensor

Parts = dict[str, Tensor]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_stored(x: Tensor) -> Tensor:
    """bool, in the shape of `x`: what is neither 0.0 nor -0.0, by its bits; so also where subnormals count as zero."""
    return (as_bits(x) << 1) != 0 if x.is_floating_point() else x != 0  # the sign shifted out


def as_bits(x: Tensor) -> Tensor:
    """Floating point as the integers of its bits: gather and scatter change those of a NaN in bf16."""
    return x.view(_BITS[x.element_size()]) if x.is_floating_point() else x


def pack_fields(fields: Tensor, width: int) -> Tensor:
    """uint8 or bool (count,), each below 2^width, to uint8 (count * width / 8 rounded up,), the first lowest."""
    per = 8 // width
    padded = torch.nn.functional.pad(fields.to(torch.uint8), (0, -len(fields) % per)).reshape(-1, per)
    packed = torch.zeros_like(padded[:, 0])
    for i in range(per):
        packed |= padded[:, i] << (width * i)
    return packed


def unpack_fields(packed: Tensor, width: int, count: int) -> Tensor:
    """Inverse of `pack_fields`: uint8 (count,)."""
    fields = [(packed >> (width * i)) & (2**width - 1) for i in range(8 // width)]
    return torch.stack(fields, 1).flatten()[:count]


def pack_masked(x: Tensor) -> tuple[Tensor, Tensor]:
    """Any shape to (values (kept,) in the dtype of `x`, mask uint8 (numel / 8 rounded up,)), both in row order."""
    kept = is_stored(x)
    return as_bits(x)[kept].view(x.dtype), pack_fields(kept.flatten(), 1)


def unpack_masked(values: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack_masked`: a contiguous tensor of `shape`."""
    held = as_bits(values)
    x = torch.zeros(math.prod(shape), dtype=held.dtype, device=held.device)
    x[unpack_fields(mask, 1, len(x)).bool()] = held
    return x.view(values.dtype).reshape(tuple(shape))


def pack_places(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(rows, columns), of every 4 neighbours in a row at most `n` not zero.

    To (values (rows, columns * n / 4) in the dtype of `x`, places uint8 (rows * columns * n / 16 rounded up,)). Places
    of one four ascend; where fewer than n are not zero, the first zeros are stored as well.
    """
    fours = x.reshape(-1, 4)
    kept = is_stored(fours).to(torch.uint8)
    held = kept[:, 0] | kept[:, 1] << 1 | kept[:, 2] << 2 | kept[:, 3] << 3
    places = torch.tensor([_chosen(bits, n) for bits in range(16)], dtype=torch.uint8, device=x.device)[held.int()]
    values = as_bits(fours).gather(1, places.long()).view(x.dtype)
    return values.reshape(x.shape[0], x.shape[1] // 4 * n), pack_fields(places.flatten(), 2)


def unpack_places(values: Tensor, places: Tensor, n: int) -> Tensor:
    """Inverse of `pack_places`: (rows, columns)."""
    where, held = unpack_fields(places, 2, values.numel()).reshape(-1, n), as_bits(values)
    x = torch.zeros((len(where), 4), dtype=held.dtype, device=held.device)
    x.scatter_(1, where.long(), held.reshape(-1, n))
    return x.view(values.dtype).reshape(values.shape[0], values.shape[1] // n * 4)


def _chosen(held: int, n: int) -> list[int]:
    """n places of four, ascending: those whose bits are set, then the first others. More than n set have no form."""
    return sorted(sorted(range(4), key=lambda place: not held >> place & 1)[:n])


@dataclass(frozen=True)
class Masked:
    """A tensor of `dtype` and `shape`, of which `kept` numbers are stored, and a mask."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    kept: int

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each stored tensor."""
        return {"values": (self.dtype, (self.kept,)), "mask": (torch.uint8, (-(-math.prod(self.shape) // 8),))}

    def pack(self, x: Tensor) -> Parts:
        """The stored tensors of `x`, by part."""
        return dict(zip(self.parts(), pack_masked(x), strict=True))

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Inverse of `pack`."""
        return unpack_masked(parts["values"], parts["mask"], self.shape)

    def misfit(self, parts: Mapping[str, Tensor]) -> str:
        """What is wrong with parts that have the right shapes; empty where nothing is."""
        bits = int(unpack_fields(parts["mask"], 1, 8 * len(parts["mask"])).count_nonzero())
        within = int(unpack_fields(parts["mask"], 1, math.prod(self.shape)).count_nonzero())
        return "" if bits == within == self.kept else f"a mask with {bits} bits set, {within} of them inside the shape"

    def to_json(self) -> dict[str, Any]:
        """As the manifest says it."""
        return {"form": "mask", "values": self.kept}


@dataclass(frozen=True)
class Places:
    """A tensor of `dtype` and `shape`, seen as `view`, of which n of every 4 along `dim` are stored."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    n: int
    view: tuple[int, ...]
    dim: int

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each stored tensor."""
        columns = self.view[self.dim]
        kept = math.prod(self.view) // 4 * self.n
        rows = math.prod(self.view) // max(columns, 1)
        return {"values": (self.dtype, (rows, columns // 4 * self.n)), "places": (torch.uint8, (-(-kept // 4),))}

    def pack(self, x: Tensor) -> Parts:
        """The stored tensors of `x`, by part."""
        matrix = x.reshape(self.view).movedim(self.dim, -1).reshape(-1, self.view[self.dim])
        return dict(zip(self.parts(), pack_places(matrix, self.n), strict=True))

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Inverse of `pack`: a contiguous tensor."""
        others = [size for dim, size in enumerate(self.view) if dim != self.dim]
        matrix = unpack_places(parts["values"], parts["places"], self.n).reshape(*others, self.view[self.dim])
        return matrix.movedim(-1, self.dim).reshape(self.shape).contiguous()

    def misfit(self, parts: Mapping[str, Tensor]) -> str:
        """What is wrong with parts that have the right shapes; empty where nothing is."""
        places, kept = parts["places"], parts["values"].numel()
        fields, where = unpack_fields(places, 2, 4 * len(places)), unpack_fields(places, 2, kept).reshape(-1, self.n)
        if bool(fields[kept:].any()):
            return "places behind the last value"
        return "" if bool((where[:, 1:] > where[:, :-1]).all()) else "places that do not ascend"

    def to_json(self) -> dict[str, Any]:
        """As the manifest says it."""
        return {"form": f"{self.n}:4", "view": list(self.view), "dim": self.dim}


Form = Masked | Places


def nbytes(form: Form) -> int:
    """Bytes of all stored parts."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in form.parts().values())


def form_of(x: Tensor, pattern: str, view: Sequence[int] | None = None) -> Form | None:
    """How a tensor with zeros in `pattern` ("2:4", "4x1", "unstructured") is stored; None as it is, which is smaller.

    view: the shape in which its numbers are those of a weight, where it is another than its own
    """
    x, shape, whole = x.detach(), tuple(x.shape), x.numel() * x.element_size()
    if x.is_complex() or not x.numel():
        return None
    kept, found = is_stored(x), re.fullmatch(r"([12]):4", pattern)
    if found is not None:
        n, seen = int(found[1]), tuple(shape if view is None else view)
        for dim in _inputs_first(len(seen)):
            if seen[dim] % 4 == 0 and _at_most(kept.reshape(seen).movedim(dim, -1), n):
                form = Places(x.dtype, shape, n, seen, dim)
                return form if nbytes(form) < whole else None
    masked = Masked(x.dtype, shape, int(kept.count_nonzero()))
    return masked if nbytes(masked) < whole else None


def forms_of(value: Tensor | QTensor, pattern: str) -> dict[str, Form]:
    """How the parts of a stored weight are that are not stored whole: "" is a tensor itself, "codes" a QTensor's."""
    if isinstance(value, QTensor):
        # Narrower codes share bytes with others, so that the view of a weight is lost.
        form = form_of(value.codes, pattern, value.shape if value.scheme.bits == 8 else None)
        return {} if form is None else {"codes": form}
    form = form_of(value, pattern)
    return {} if form is None else {"": form}


def stored_nbytes(value: Tensor | QTensor, pattern: str) -> int:
    """Bytes of a weight in a file, its scales too."""
    forms, tensors = forms_of(value, pattern), {"": value} if isinstance(value, Tensor) else dict(value.named_buffers())
    whole = sum(tensor.numel() * tensor.element_size() for part, tensor in tensors.items() if part not in forms)
    return whole + sum(nbytes(form) for form in forms.values())


def read_form(dtype: torch.dtype, shape: Sequence[int], data: Mapping[str, Any]) -> Form:
    """Inverse of `to_json`. Raises ArtifactError on what this version does not know or what contradicts itself."""
    found = re.fullmatch(r"mask|([1-3]):4", data["form"])
    if found is None:
        required = "mask, or N:4 with N from 1 to 3"
        raise ArtifactError("a tensor is stored in an unknown form", required=required, found=data["form"])
    shape = _sizes(shape)
    if found[1] is None:
        return Masked(dtype, shape, int(data["values"]))
    view, dim = _sizes(data["view"]), data["dim"]
    if math.prod(view) != math.prod(shape) or dim not in range(len(view)) or view[dim] % 4:
        required = f"a view of the shape {list(shape)} and a dimension of fours"
        raise ArtifactError("a tensor is stored in a form that does not fit it", required=required, found=dict(data))
    return Places(dtype, shape, int(found[1]), view, dim)


def _inputs_first(dims: int) -> Iterable[int]:
    """Dimensions that a weight's inputs may lie along: the second, the last (filters, channels last), the first."""
    return dict.fromkeys(dim for dim in (1, dims - 1, 0) if 0 <= dim < dims)


def _at_most(kept: Tensor, n: int) -> bool:
    return bool((kept.reshape(-1, 4).sum(1, dtype=torch.int8) <= n).all())


def _sizes(values: Sequence[int]) -> tuple[int, ...]:
    if any(not isinstance(size, int) or size < 0 for size in values):
        raise ArtifactError("a tensor is stored in a form without a shape", required="sizes", found=list(values))
    return tuple(values)
