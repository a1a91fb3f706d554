"""Packing: the inverse, the size, and where each code lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KINDS
from torch import Tensor

from dwindle.runtime.errors import SchemeError
from dwindle.runtime.layout import LAYOUTS, pack, planes, row_nbytes, unpack
from dwindle.runtime.scheme import Scheme

SIZES = st.tuples(st.integers(0, 4), st.sampled_from((1, 2, 3, 5, 7, 8, 9, 15, 16, 31, 33, 64)))


@st.composite
def packable(draw: Any) -> tuple[Scheme, Tensor]:
    """A scheme of at most 8 bits and any of its codes, (rows, K)."""
    kind = draw(st.sampled_from(KINDS))
    bits = {"ternary": 2, "binary": 1}.get(kind) or draw(st.integers(2, 8))
    rows, columns = draw(SIZES)
    size = draw(st.sampled_from((None, 1, 2, 3, 4, 6, 8, 16)))
    if size is not None:
        columns *= size
    scheme = Scheme(kind=kind, bits=bits, granularity="channel" if size is None else "group", group_size=size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if kind == "binary":
        codes = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    else:
        codes = torch.randint(scheme.qmin, scheme.qmax + 1, (rows, columns), generator=generator)
    return scheme, codes.to(scheme.code_dtype)


@given(packable())
def test_unpack_is_the_inverse_of_pack(case: tuple[Scheme, Tensor]) -> None:
    scheme, codes = case
    found = unpack(pack(codes, scheme), codes.shape[1], scheme)
    assert found.dtype == scheme.code_dtype
    assert torch.equal(found, codes)


@given(packable())
def test_non_contiguous_codes_pack_the_same(case: tuple[Scheme, Tensor]) -> None:
    scheme, codes = case
    packed = pack(codes, scheme)
    assert torch.equal(pack(codes.t().contiguous().t(), scheme), packed)
    assert torch.equal(unpack(packed.t().contiguous().t(), codes.shape[1], scheme), codes)


@given(packable())
def test_a_row_takes_no_byte_too_many(case: tuple[Scheme, Tensor]) -> None:
    scheme, codes = case
    packed, columns = pack(codes, scheme), codes.shape[1]
    assert packed.element_size() == 1
    assert packed.shape == (codes.shape[0], row_nbytes(columns, scheme))
    assert row_nbytes(columns, scheme) == sum(-(-columns * width // 8) for width in LAYOUTS[scheme.bits])


@given(packable())
def test_codes_lie_where_the_docstring_says(case: tuple[Scheme, Tensor]) -> None:
    scheme, codes = case
    columns, start = codes.shape[1], 0
    packed = pack(codes, scheme).view(torch.uint8)
    for plane in planes(columns, scheme):
        per = 8 // plane.width
        share = plane.block // per
        for row, codes_of_row in zip(packed[:, start : start + plane.nbytes].tolist(), codes.tolist(), strict=True):
            for at, byte in enumerate(row):
                for part in range(per):
                    element = at // share * plane.block + at % share + part * share
                    code = codes_of_row[element] if element < columns else 0
                    stored = int(code > 0) if scheme.kind == "binary" else code % 2**scheme.bits
                    assert byte >> (plane.width * part) & (2**plane.width - 1) == stored >> plane.shift & (
                        2**plane.width - 1
                    )
        start += plane.nbytes
    assert start == packed.shape[1]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 40])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_every_layout_holds_every_code(bits: int, columns: int, kind: Any) -> None:
    scheme = Scheme(bits=bits, kind=kind)
    span = torch.arange(scheme.qmin, scheme.qmax + 1)
    codes = span.repeat(columns).reshape(-1, columns).to(scheme.code_dtype)
    assert torch.equal(unpack(pack(codes, scheme), columns, scheme), codes)


def test_two_halves_of_a_group_share_bytes() -> None:
    scheme = Scheme(bits=4, kind="asymmetric", granularity="group", group_size=4)
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert [hex(b) for b in pack(codes, scheme)[0].tolist()] == ["0x31", "0x42", "0x75", "0x86"]


def test_the_third_bit_lies_in_a_plane_of_its_own() -> None:
    scheme = Scheme(bits=3, kind="asymmetric")
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    low = [1 | 3 << 2 | 1 << 4 | 3 << 6, 2 | 0 << 2 | 2 << 4 | 0 << 6]  # elements 0, 2, 4, 6 and 1, 3, 5, 7, modulo 4
    assert pack(codes, scheme)[0].tolist() == [*low, 0b01111000]


def test_planes_add_up_to_the_bits() -> None:
    assert {bits: sum(widths) for bits, widths in LAYOUTS.items()} == {bits: bits for bits in range(1, 9)}


def test_more_than_8_bits_is_an_error() -> None:
    with pytest.raises(SchemeError, match="at most 8 bits") as caught:
        pack(torch.zeros(1, 1, dtype=torch.int32), Scheme(bits=9))
    assert "found: 9 bits" in str(caught.value)
