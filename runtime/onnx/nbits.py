"""Weights as com.microsoft::MatMulNBits stores them.

    blocks   (N, ceil(K / block), block * bits / 8) uint8, element i of a block in bits i * bits and up
    scales   (N, ceil(K / block)) fp32
    zeros    (N, ceil(ceil(K / block) * bits / 8)) uint8, absent where every one is 2^(bits - 1)
    value    (stored - zero) * scale

Codes are stored plus 2^(bits - 1) where they are signed. Bits are 2, 4 or 8: three are stored as four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ExportError
from ..layout import unpack
from ..scheme import Scheme

# Sizes with a kernel that computes in int8, the widest first: fewer scales are read.
BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True)
class NBits:
    """One weight."""

    blocks: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int


def onnx_bits(scheme: Scheme) -> int:
    """Bits of a stored code: 2, 4 or 8, the fewest that hold it."""
    return next(bits for bits in (2, 4, 8) if bits >= scheme.bits)


def nbits_weight(packed: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, columns: int) -> NBits:
    """Repack (N, K) codes. Raises ExportError for a group size that no kernel has."""
    bits, rows = onnx_bits(scheme), packed.shape[0]
    block = _block(scheme, columns)
    count = -(-columns // block)
    codes = unpack(packed, columns, scheme).to(torch.int16)
    if zero is None:
        codes = codes + 2 ** (bits - 1)
        filler = 2 ** (bits - 1)
    else:
        filler = 0
    codes = torch.nn.functional.pad(codes, (0, count * block - columns), value=filler).to(torch.uint8)
    blocks = _packed(codes.reshape(rows * count, block), bits).reshape(rows, count, -1)
    zeros = None if zero is None else _packed(_spread(zero, rows, count).to(torch.uint8), bits)
    return NBits(blocks, _spread(scale, rows, count), zeros, block)


def _block(scheme: Scheme, columns: int) -> int:
    size = scheme.group_size
    if size is None:
        return next((b for b in BLOCKS if columns % b == 0), 32)
    for block in (256, *BLOCKS):
        if size % block == 0:
            return block
    raise ExportError(
        f"groups of {size} weights have no ONNX Runtime kernel",
        required=f"a multiple of one of {', '.join(map(str, reversed(BLOCKS)))}",
        found=size,
        cure="compress with group_size=32, 64 or 128",
    )


def _spread(values: Tensor, rows: int, count: int) -> Tensor:
    """One value a tensor, row or group to one a block."""
    table = values.detach().reshape(1, 1) if not values.dim() else values.detach().reshape(rows, -1)
    return table.expand(rows, -1).repeat_interleave(count // table.shape[1], 1).contiguous()


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, n) with 8 / bits of them a byte, the first in the lowest bits."""
    per = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per))
    parts = codes.reshape(codes.shape[0], -1, per)
    packed = torch.zeros_like(parts[..., 0])
    for i in range(per):
        packed |= parts[..., i] << (bits * i)
    return packed
