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
from dwindle.runtime.layout import LAYOUTS, Layout, block_of, layout_of, pack, unpack
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
    packed = pack(codes, scheme)
    assert packed.element_size() == 1
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] * layout_of(scheme).bits // 8))


@given(packable())
def test_codes_lie_where_the_docstring_says(case: tuple[Scheme, Tensor]) -> None:
    scheme, codes = case
    bits, columns = layout_of(scheme).bits, codes.shape[1]
    per, block = 8 // bits, block_of(codes.shape[1], scheme)
    packed = pack(codes, scheme).view(torch.uint8)
    for row, codes_of_row in zip(packed.tolist(), codes.tolist(), strict=True):
        for at, byte in enumerate(row):
            start, j = at // (block // per) * block, at % (block // per)
            for part in range(per):
                element = start + j + part * (block // per)
                code = codes_of_row[element] if element < columns else 0
                stored = int(code > 0) if scheme.kind == "binary" else code % 2**bits
                assert byte >> (bits * part) & (2**bits - 1) == stored


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.bits}bit")
@pytest.mark.parametrize("columns", [1, 7, 8, 40])
@pytest.mark.parametrize("signed", [True, False])
def test_every_layout_holds_every_code(layout: Layout, columns: int, signed: bool) -> None:
    low, high = (-(2 ** (layout.bits - 1)), 2 ** (layout.bits - 1) - 1) if signed else (0, 2**layout.bits - 1)
    dtype = torch.int8 if signed else torch.uint8
    span = torch.arange(high - low + 1) + low
    codes = span.repeat(columns).reshape(-1, columns).to(dtype)
    per = 8 // layout.bits
    block = -(-columns // per) * per
    found = layout.unpack(layout.pack(codes, block), columns, block, signed)
    assert torch.equal(found.to(dtype), codes)


def test_two_halves_of_a_group_share_bytes() -> None:
    scheme = Scheme(bits=4, kind="asymmetric", granularity="group", group_size=4)
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert [hex(b) for b in pack(codes, scheme)[0].tolist()] == ["0x31", "0x42", "0x75", "0x86"]


def test_layouts_go_from_narrow_to_wide() -> None:
    assert [layout.bits for layout in LAYOUTS] == [1, 2, 4, 8]
    assert [layout_of(Scheme(bits=b)).bits for b in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]


def test_more_than_8_bits_is_an_error() -> None:
    with pytest.raises(SchemeError, match="at most 8 bits") as caught:
        pack(torch.zeros(1, 1, dtype=torch.int32), Scheme(bits=9))
    assert "found: 9 bits" in str(caught.value)
