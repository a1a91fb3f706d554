"""Zeros left out of tensors and put back: bit for bit, in the form that is smaller."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dwindle.runtime.sparse_storage import (
    Form,
    Masked,
    Places,
    form_of,
    nbytes,
    pack_fields,
    pack_masked,
    pack_places,
    read_form,
    unpack_fields,
    unpack_masked,
    unpack_places,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8)


def bits(x: Tensor) -> Tensor:
    """As integers, -0.0 as 0.0."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = x.contiguous().view(sizes[x.element_size()])
    return whole.masked_fill((whole << 1) == 0, 0) if x.is_floating_point() else whole


def identical(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))


def numbers(*shape: int, dtype: torch.dtype = torch.float32, zeros: float = 0.5, seed: int = 0) -> Tensor:
    """Among them NaN, infinities, the least subnormal, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        x = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1, shape, generator=generator).to(dtype)
        return x * (torch.rand(shape, generator=generator) >= zeros)
    info = torch.finfo(dtype)
    odd = torch.tensor([math.nan, math.inf, -math.inf, info.smallest_normal * info.eps, info.max], dtype=dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    x = torch.where(torch.rand(shape, generator=generator) < 0.2, odd[torch.randint(5, shape, generator=generator)], x)
    zero = torch.tensor([0.0, -0.0], dtype=dtype)[torch.randint(2, shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < zeros, zero, x)


def of_every_four(x: Tensor, n: int, seed: int = 0) -> Tensor:
    """`x` (rows, columns) with all but n of every four in a row at zero."""
    order = torch.rand(x.numel() // 4, 4, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return x.reshape(-1, 4).masked_fill(order >= n, 0).reshape(x.shape)


# Pairs that pack and unpack


@given(st.lists(st.integers(0, 255), max_size=40), st.sampled_from([1, 2, 4]))
def test_fields_lie_side_by_side(values: list[int], width: int) -> None:
    fields = torch.tensor([v % 2**width for v in values], dtype=torch.uint8)
    packed = pack_fields(fields, width)
    whole = sum(int(v) << (width * i) for i, v in enumerate(fields))
    assert bytes(packed.tolist()) == whole.to_bytes(-(-len(fields) * width // 8), "little")
    assert torch.equal(unpack_fields(packed, width, len(fields)), fields)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_mask_and_what_is_not_zero(dtype: torch.dtype, shape: list[int], zeros: float, seed: int) -> None:
    x = numbers(*shape, dtype=dtype, zeros=zeros, seed=seed)
    values, mask = pack_masked(x)
    assert values.dtype == dtype
    assert len(values) == int((bits(x) != 0).sum())
    assert (mask.dtype, len(mask)) == (torch.uint8, -(-x.numel() // 8))
    back = unpack_masked(values, mask, shape)
    assert identical(back, x)
    assert not (torch.signbit(back) & (back == 0)).any()  # masked zeros come back as 0.0


@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 3),
    rows=st.integers(0, 5),
    fours=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_places_of_n_in_four(dtype: torch.dtype, n: int, rows: int, fours: int, seed: int) -> None:
    x = of_every_four(numbers(rows, 4 * fours, dtype=dtype, zeros=0.2, seed=seed), n, seed)
    values, places = pack_places(x, n)
    assert (values.dtype, tuple(values.shape)) == (dtype, (rows, fours * n))
    assert (places.dtype, len(places)) == (torch.uint8, -(-rows * fours * n // 4))
    assert identical(unpack_places(values, places, n), x)


def test_a_subnormal_is_no_zero() -> None:
    x = torch.zeros(2, 4)
    x[0, 1] = torch.finfo(torch.float32).smallest_normal / 4
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor computes with subnormals only")
    try:
        values, mask = pack_masked(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(unpack_masked(values, mask, x.shape).view(torch.int32), x.view(torch.int32))


# Which form is chosen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 24), (16, 8, 3), (16, 8, 3, 3)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_two_of_four_along_either_dimension(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    lines = numbers(*shape, dtype=dtype, zeros=0).movedim(dim, -1)
    x = of_every_four(lines.reshape(-1, shape[dim]), 2).reshape(lines.shape).movedim(-1, dim)
    form = form_of(x, "2:4")
    assert form == Places(dtype, shape, 2, shape, dim)
    assert nbytes(form) == x.numel() * x.element_size() // 2 + x.numel() // 8
    check(x, form)


def check(x: Tensor, form: Form) -> None:
    """A form says what it packs, packs what it says, and is read from what the manifest has."""
    parts = form.pack(x)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in parts.items()} == form.parts()
    assert sum(t.numel() * t.element_size() for t in parts.values()) == nbytes(form)
    assert form.misfit(parts) == ""
    back = form.unpack(parts)
    assert identical(back, x)
    assert back.is_contiguous()
    assert read_form(x.dtype, x.shape, json.loads(json.dumps(form.to_json()))) == form


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "3:4", "2:8"])
def test_other_patterns_have_a_mask(pattern: str) -> None:
    x = of_every_four(numbers(16, 24, zeros=0), 2)
    assert form_of(x, pattern) == Masked(x.dtype, (16, 24), 192)
    check(x, Masked(x.dtype, (16, 24), 192))


def test_a_pattern_that_the_numbers_do_not_have_is_no_reason_to_lose_any() -> None:
    x = torch.zeros(16, 24)
    x[3, :3] = x[4:7, 8] = 1
    form = form_of(x.t(), "2:4")
    assert form == Masked(x.dtype, (24, 16), 6)
    check(x.t(), form)
    assert form_of(x.reshape(-1)[:0], "2:4") is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_stored_that_takes_more_room(dtype: torch.dtype) -> None:
    x, least = torch.ones(64, 64, dtype=dtype), -(-64 * 64 // (8 * dtype.itemsize))
    x.view(-1)[:least] = 0
    assert form_of(x, "unstructured") is None
    x.view(-1)[least] = 0
    assert form_of(x, "unstructured") == Masked(dtype, (64, 64), 64 * 64 - least - 1)


def test_bits_behind_the_end_are_refused() -> None:
    masked, places = Masked(torch.float32, (3,), 1), Places(torch.float32, (1, 4), 2, (1, 4), 1)
    parts = {"values": torch.ones(1), "mask": torch.tensor([0b1000], dtype=torch.uint8)}
    assert masked.misfit(parts) == "a mask with 1 bits set, 0 of them inside the shape"
    parts = {"values": torch.ones(1, 2), "places": torch.tensor([0b10100], dtype=torch.uint8)}
    assert places.misfit(parts) == "places behind the last value"
    assert places.misfit({**parts, "places": torch.tensor([0b0100], dtype=torch.uint8)}) == ""
