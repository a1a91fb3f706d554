"""Bit layouts: how integer codes lie in bytes.

Codes of 1, 2, 4 or 8 bits lie in one plane; others in planes of these widths one after the other, the lowest bits
first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1. So a row of K codes of b bits takes K b / 8 bytes.

In a plane a row is cut into blocks (a group, or the whole row). With `per = 8 / width` fields a byte, byte j of a
block holds elements j, j + block/per, j + 2 block/per, ...: the first in the lowest bits. So a kernel that loads
consecutive bytes gets consecutive elements of each part with one shift and one mask, which is what the GPU kernels
want (halves of a group in one byte for 4 bits). 8-bit codes lie as they are.

Stored bits are the code's two's complement (symmetric, ternary), the code (asymmetric) or code > 0 (binary).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import compat
from .errors import SchemeError
from .scheme import Scheme


@dataclass(frozen=True)
class Plane:
    """Bits `shift` to `shift + width` of every code of a row: `block` elements interleaved, `nbytes` in all."""

    width: int
    shift: int
    block: int
    nbytes: int


# Widths of the planes that hold a code of so many bits, the lowest bits first.
LAYOUTS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def planes(columns: int, scheme: Scheme) -> Iterator[Plane]:
    """The planes of a row of `columns` codes. Raises SchemeError above 8 bits."""
    if scheme.bits not in LAYOUTS:
        raise SchemeError("no packed storage", required="at most 8 bits", found=f"{scheme.bits} bits")
    size, shift = scheme.group_size if scheme.granularity == "group" else None, 0
    for width in LAYOUTS[scheme.bits]:
        per = 8 // width
        block = size if size is not None and size % per == 0 else -(-columns // per) * per
        yield Plane(width, shift, block, -(-columns // max(block, 1)) * block // per)
        shift += width


def row_nbytes(columns: int, scheme: Scheme) -> int:
    """Bytes of a packed row. Raises SchemeError above 8 bits."""
    return sum(plane.nbytes for plane in planes(columns, scheme))


def is_signed(scheme: Scheme) -> bool:
    """Whether stored bits are a two's complement."""
    return scheme.kind in ("symmetric", "ternary")


def pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """Pack unpacked codes (rows, K) into the bytes of `scheme`: (rows, `row_nbytes`)."""
    parts = list(planes(codes.shape[1], scheme))
    if scheme.bits == 8:
        return codes
    stored = codes > 0 if scheme.kind == "binary" else codes
    return torch.cat([_interleaved(stored.to(torch.uint8) >> plane.shift, plane) for plane in parts], 1)


def unpack(packed: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Inverse of `pack`: codes (rows, columns) in `scheme.code_dtype`."""
    if scheme.bits == 8:
        return packed.to(scheme.code_dtype)
    parts = list(planes(columns, scheme))
    if scheme.kind == "binary" and _in_words(packed, parts[0]):
        return _signs(packed, parts[0], columns)
    rows, codes = torch.split(packed, [plane.nbytes for plane in parts], 1), None
    for plane, own in zip(parts, rows, strict=True):
        fields = _fields(own, plane, columns, signed=is_signed(scheme) and plane is parts[-1])
        codes = fields if codes is None else codes | (fields << plane.shift)
    assert codes is not None
    return (codes * 2 - 1 if scheme.kind == "binary" else codes).to(scheme.code_dtype)


def _interleaved(codes: Tensor, plane: Plane) -> Tensor:
    """The lowest bits of uint8 codes (rows, K) as a plane."""
    rows, columns = codes.shape
    per, block = 8 // plane.width, plane.block
    blocks = -(-columns // max(block, 1))
    codes = torch.nn.functional.pad(codes, (0, blocks * block - columns))
    parts = codes.reshape(rows, blocks, per, block // per) & (2**plane.width - 1)
    packed = torch.zeros_like(parts[:, :, 0])
    for i in range(per):
        packed |= parts[:, :, i] << (plane.width * i)
    return packed.flatten(1)


def _fields(packed: Tensor, plane: Plane, columns: int, *, signed: bool) -> Tensor:
    """int8 (rows, columns) of a plane; the highest plane of signed codes carries their sign."""
    per, width, block = 8 // plane.width, plane.width, plane.block
    bytes_ = packed.reshape(packed.shape[0], packed.shape[1] * per // max(block, 1), 1, block // per)
    if signed:  # shift the field to the top of an int8, then back down arithmetically: sign-extends
        fields = [(bytes_ << (8 - width * (i + 1))).view(torch.int8) >> (8 - width) for i in range(per)]
    else:
        fields = [((bytes_ >> (width * i)) & (2**width - 1)).view(torch.int8) for i in range(per)]
    return torch.cat(fields, 2).flatten(1)[:, :columns]


def _in_words(packed: Tensor, plane: Plane) -> bool:
    """Whether every eighth of a block is whole words of 8 bytes, as they lie in memory."""
    whole = packed.numel() > 0 and plane.block % 64 == 0 and packed.storage_offset() % 8 == 0
    return whole and packed.is_contiguous() and not compat.is_tracing(packed)


def _signs(packed: Tensor, plane: Plane, columns: int) -> Tensor:
    """int8 (rows, columns) of binary codes, eight at a time as the bytes of a word: 0xff - 254 b is 1 or -1 as int8.

    768 x 768 takes .091 ms where `_fields` takes .144 and a table of what each byte holds 1.05; 2 bits gain little
    (.085 for .092). One EPYC core.
    """
    words = packed.reshape(packed.shape[0], -1, 1, plane.block // 8).view(torch.int64)
    bits = torch.empty((*words.shape[:2], 8, words.shape[3]), dtype=torch.int64, device=packed.device)
    for i in range(8):
        torch.bitwise_right_shift(words[:, :, 0], i, out=bits[:, :, i])
    bits.bitwise_and_(0x0101010101010101).mul_(-254).sub_(1)
    return bits.view(torch.int8).flatten(1)[:, :columns]
