"""QTensor: its real size, its values, refreshing in place, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import schemes, shapes, stochastic, tensors
from torch import Tensor

from dwindle.runtime import numerics
from dwindle.runtime.errors import SchemeError
from dwindle.runtime.layout import row_nbytes
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme

PACKABLE = schemes(most_bits=8)
ASYMMETRIC_4 = Scheme(bits=4, kind="asymmetric", granularity="group", group_size=4)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(scheme: Scheme) -> st.SearchStrategy[tuple[Scheme, Tensor]]:
    return st.tuples(st.just(scheme), tensors(scheme).filter(lambda x: x.dim() > 1))


@given(PACKABLE.flatmap(matrices))
def test_values_are_those_of_the_contract(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    q = QTensor.quantize(x, scheme)
    p = numerics.parameters(x, scheme)
    codes = numerics.quantize(x, p, scheme)
    assert torch.equal(q.int_codes(), codes)
    assert q.int_codes().dtype == scheme.code_dtype
    assert q.shape == tuple(x.shape)
    assert torch.equal(q.dequantize(), numerics.dequantize(codes, p, scheme))
    assert q.dequantize().dtype == torch.float32


@given(PACKABLE.flatmap(lambda s: st.tuples(st.just(s), shapes(s).filter(lambda shape: len(shape) > 1))))
def test_nbytes_is_what_the_formula_says(case: tuple[Scheme, tuple[int, ...]]) -> None:
    scheme, shape = case
    q = QTensor.quantize(weight(*shape), scheme)
    row = weight(*shape)[0].numel()
    scales = numerics.parameters(weight(*shape), scheme).scale.numel()
    parameters = 2 if scheme.kind == "asymmetric" else 1
    assert q.nbytes == shape[0] * row_nbytes(row, scheme) + 4 * scales * parameters


@pytest.mark.parametrize(
    ("scheme", "names"),
    [(Scheme(), {"codes", "scale"}), (ASYMMETRIC_4, {"codes", "scale", "zero_point"})],
    ids=["symmetric", "asymmetric"],
)
def test_a_state_dict_holds_the_buffers_and_loads_back(scheme: Scheme, names: set[str]) -> None:
    q = QTensor.quantize(weight(3, 8), scheme)
    state = {name: t.clone() for name, t in q.state_dict().items()}
    assert set(state) == names
    assert sum(t.numel() * t.element_size() for t in state.values()) == q.nbytes
    other = QTensor.quantize(weight(3, 8, seed=1), scheme)
    other.load_state_dict(state)
    assert torch.equal(other.dequantize(), q.dequantize())


@pytest.mark.parametrize("scheme", [Scheme(), ASYMMETRIC_4, Scheme(kind="binary", bits=1)], ids=Scheme.spell)
def test_refresh_writes_into_the_same_buffers(scheme: Scheme) -> None:
    q = QTensor.quantize(weight(3, 8), scheme)
    before = {name: (buffer, buffer.data_ptr()) for name, buffer in q.named_buffers()}
    fresh = weight(3, 8, seed=1) * 5
    q.refresh(fresh)
    for name, buffer in q.named_buffers():
        assert buffer is before[name][0]
        assert buffer.data_ptr() == before[name][1]
    assert torch.equal(q.dequantize(), QTensor.quantize(fresh, scheme).dequantize())


@pytest.mark.parametrize(("shape", "dims"), [((8, 8), (1, 0)), ((8, 3), (1, 0)), ((4, 3, 2, 5), (0, 2, 3, 1))])
def test_refresh_keeps_the_order_of_dimensions(shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    q = QTensor.quantize(weight(*shape), Scheme(), dims=dims)
    fresh = weight(*shape, seed=1)
    q.refresh(fresh)
    assert torch.equal(q.dequantize(), QTensor.quantize(fresh.permute(dims), Scheme()).dequantize())
    with pytest.raises(SchemeError, match=re.escape(f"required: {shape}")):
        q.refresh(weight(*shape, 1))


def test_refresh_refuses_another_shape() -> None:
    q = QTensor.quantize(weight(3, 8), Scheme())
    with pytest.raises(SchemeError) as caught:
        q.refresh(weight(8, 3))
    assert "required: (3, 8)" in str(caught.value)
    assert "found: (8, 3)" in str(caught.value)


def test_refresh_leaves_the_parameters_it_was_made_with() -> None:
    p = numerics.parameters(weight(3, 8), Scheme())
    q = QTensor.quantize(weight(3, 8), Scheme(), p)
    kept = p.scale.clone()
    q.refresh(weight(3, 8, seed=1))
    assert torch.equal(p.scale, kept)


def test_given_parameters_are_used() -> None:
    p = numerics.Params(torch.full((3,), 0.5))
    q = QTensor.quantize(weight(3, 8), Scheme(), p)
    assert torch.equal(q.scale, p.scale)
    assert torch.equal(q.int_codes().float(), torch.round(weight(3, 8) / 0.5))


def test_stochastic_rounding_takes_a_key() -> None:
    scheme = stochastic(Scheme(bits=4))
    a, b, c = (QTensor.quantize(weight(3, 8), scheme, key=key) for key in (1, 1, 2))
    assert torch.equal(a.codes, b.codes)
    assert not torch.equal(a.codes, c.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("values", "found"),
    [([float("nan")], "1 NaN, 0 Inf of 6"), ([float("inf"), -float("inf"), float("nan")], "1 NaN, 2 Inf of 6")],
)
def test_what_is_not_finite_is_refused(dtype: torch.dtype, values: list[float], found: str) -> None:
    x = torch.ones(2, 3)
    x.view(-1)[: len(values)] = torch.tensor(values)
    with pytest.raises(SchemeError) as caught:
        QTensor.quantize(x.to(dtype), Scheme())
    text = str(caught.value)
    assert "required: finite values" in text
    assert f"found: {found}" in text
    assert "cure: " in text


def test_the_largest_finite_values_are_not_refused() -> None:
    q = QTensor.quantize(torch.full((1, 2), 3e38), Scheme())
    assert q.dequantize().isfinite().all()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_a_model_leaves_the_scales_fp32(cast: Any) -> None:
    q = QTensor.quantize(weight(3, 8), ASYMMETRIC_4)
    values = q.dequantize()
    getattr(torch.nn.Sequential(q), cast)()
    assert q.scale.dtype == torch.float32
    assert torch.equal(q.dequantize(), values)


def test_a_weight_that_requires_grad_leaves_no_graph() -> None:
    q = QTensor.quantize(torch.nn.Parameter(weight(3, 8)), Scheme())
    assert not any(b.requires_grad for b in q.buffers())
    assert list(q.parameters()) == []


def test_printing_says_scheme_shape_and_size() -> None:
    q = QTensor.quantize(weight(3, 8), ASYMMETRIC_4)
    assert "4-asymmetric-group4-nearest, shape=(3, 8), 60 bytes" in repr(q)
