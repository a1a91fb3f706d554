"""Bit layouts: how integer codes lie in bytes.

A row of codes is cut into blocks of `block` elements (a group, or the whole row). With `per = 8 / bits` codes
a byte, byte j of a block holds elements j, j + block/per, j + 2 block/per, ...: the first in the lowest bits.
So a kernel that loads consecutive bytes gets consecutive elements of each part with one shift and one mask,
which is what the GPU kernels want (halves of a group in one byte for 4 bits). 8-bit codes lie as they are.

Stored bits are the code's two's complement (symmetric, ternary), the code (asymmetric) or code > 0 (binary).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SchemeError
from .scheme import Scheme


@dataclass(frozen=True)
class Layout:
    """A pair of inverse functions on codes of shape (rows, K): `unpack(pack(c, b), K, b, signed) == c`."""

    bits: int
    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int, bool], Tensor]


def pack(codes: Tensor, scheme: Scheme) -> Tensor:
    """Pack unpacked codes (rows, K) into the bytes of `scheme`: (rows, ceil(K / block) * block * bits / 8)."""
    layout = layout_of(scheme)
    stored = (codes > 0).to(torch.int8) if scheme.kind == "binary" else codes
    return layout.pack(stored, block_of(codes.shape[1], scheme))


def unpack(packed: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Inverse of `pack`: codes (rows, columns) in `scheme.code_dtype`."""
    signed = scheme.kind in ("symmetric", "ternary")
    codes = layout_of(scheme).unpack(packed, columns, block_of(columns, scheme), signed)
    if scheme.kind == "binary":
        codes = codes * 2 - 1
    return codes.to(scheme.code_dtype)


def layout_of(scheme: Scheme) -> Layout:
    """The narrowest layout that holds the scheme's codes. Raises SchemeError above 8 bits."""
    for layout in LAYOUTS:
        if layout.bits >= scheme.bits:
            return layout
    raise SchemeError("no packed storage", required="at most 8 bits", found=f"{scheme.bits} bits")


def block_of(columns: int, scheme: Scheme) -> int:
    """Elements that are interleaved together: the group, or the row rounded up to whole bytes."""
    per = 8 // layout_of(scheme).bits
    size = scheme.group_size if scheme.granularity == "group" else None
    if size is not None and size % per == 0:
        return size
    return -(-columns // per) * per


def _pack_interleaved(codes: Tensor, bits: int, block: int) -> Tensor:
    rows, columns = codes.shape
    per = 8 // bits
    blocks = -(-columns // block)
    codes = torch.nn.functional.pad(codes, (0, blocks * block - columns)).to(torch.uint8)
    parts = codes.reshape(rows, blocks, per, block // per) & (2**bits - 1)
    packed = torch.zeros_like(parts[:, :, 0])
    for i in range(per):
        packed |= parts[:, :, i] << (bits * i)
    return packed.flatten(1)


def _unpack_interleaved(packed: Tensor, bits: int, columns: int, block: int, signed: bool) -> Tensor:
    rows, per = packed.shape[0], 8 // bits
    bytes_ = packed.reshape(rows, packed.shape[1] * per // block, 1, block // per)
    if signed:  # shift the field to the top of an int8, then back down arithmetically: sign-extends
        fields = [(bytes_ << (8 - bits * (i + 1))).view(torch.int8) >> (8 - bits) for i in range(per)]
    else:
        fields = [((bytes_ >> (bits * i)) & (2**bits - 1)).view(torch.int8) for i in range(per)]
    return torch.cat(fields, 2).flatten(1)[:, :columns]


def _interleaved(bits: int) -> Layout:
    return Layout(
        bits,
        lambda codes, block: _pack_interleaved(codes, bits, block),
        lambda packed, columns, block, signed: _unpack_interleaved(packed, bits, columns, block, signed),
    )


PACKED_1BIT = _interleaved(1)
PACKED_2BIT = _interleaved(2)
PACKED_4BIT = _interleaved(4)
PLAIN_8BIT = Layout(8, lambda codes, block: codes, lambda packed, columns, block, signed: packed)

LAYOUTS = (PACKED_1BIT, PACKED_2BIT, PACKED_4BIT, PLAIN_8BIT)
