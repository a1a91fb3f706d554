"""The numeric contract, against a re-implementation in numpy and by the properties that define it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import SLACK
from strategies import KINDS, UNIFORM, schemes, shapes, stochastic, tensors
from torch import Tensor

from dwindle.runtime import numerics
from dwindle.runtime.errors import SchemeError
from dwindle.runtime.numerics import Params, dequantize, fake_quantize, parameters, quantize, scale_shape
from dwindle.runtime.scheme import Scheme

SCHEMES = schemes()
LIMITS = torch.finfo(torch.float32)


def cases(strategy: st.SearchStrategy[Scheme], **options: Any) -> st.SearchStrategy[tuple[Scheme, Tensor]]:
    return strategy.flatmap(lambda s: st.tuples(st.just(s), tensors(s, **options)))


def rows(x: Tensor, scheme: Scheme) -> np.ndarray:
    """(groups, elements) in fp32, written without `blocks`."""
    a = x.float().numpy()
    match scheme.granularity:
        case "tensor":
            return a.reshape(1, a.size)
        case "channel":
            return a.reshape(len(a), -1)
        case "token":
            return a.reshape(-1, a.shape[-1])
    return a.reshape(-1, scheme.group_size)


def per_element(values: Tensor, x: Tensor, scheme: Scheme) -> np.ndarray:
    """One value per group, spread over `x`."""
    grouped = rows(x, scheme)
    return np.broadcast_to(values.numpy().reshape(-1, 1), grouped.shape).reshape(tuple(x.shape))


def oracle(x: Tensor, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scale (groups,), zero point (groups,) and codes of a uniform scheme, straight from the definition."""
    f32, b = np.float32, rows(x, scheme)
    if scheme.kind == "symmetric":
        low, high, q, least = np.zeros(len(b), f32), np.abs(b).max(1), 2 ** (scheme.bits - 1) - 1, None
    else:
        low, high, q, least = np.minimum(b.min(1), f32(0)), np.maximum(b.max(1), f32(0)), 2**scheme.bits - 1, 0
    s = (high - low) / f32(q)
    s = np.where(s < np.finfo(f32).tiny, f32(1), s)
    z = np.rint(-low / s).clip(0, q)
    codes = (np.rint(b / s[:, None]) + z[:, None]).clip(-q if least is None else least, q)
    return s, z, codes.astype(np.int64).reshape(tuple(x.shape))


@given(cases(schemes(UNIFORM)))
def test_uniform_equals_numpy(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    scale, zero, codes = oracle(x, scheme)
    p = parameters(x, scheme)
    assert tuple(p.scale.shape) == scale_shape(x.shape, scheme)
    assert p.scale.dtype == torch.float32
    np.testing.assert_array_equal(p.scale.numpy().ravel(), scale)
    if scheme.kind == "asymmetric":
        assert p.zero_point is not None
        np.testing.assert_array_equal(p.zero_point.numpy().ravel(), zero)
    else:
        assert p.zero_point is None
    found = quantize(x, p, scheme)
    assert found.dtype == scheme.code_dtype
    np.testing.assert_array_equal(found.numpy().astype(np.int64), codes)
    expected = (codes - per_element(torch.from_numpy(zero), x, scheme)).astype(np.float32) * per_element(
        p.scale, x, scheme
    )
    np.testing.assert_array_equal(dequantize(found, p, scheme).numpy(), expected)


@given(cases(schemes(("ternary", "binary"))))
def test_ternary_and_binary_equal_numpy(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    b, p = rows(x, scheme).astype(np.float64), parameters(x, scheme)
    mean = np.abs(b).mean(1)
    close = {"rtol": SLACK["mean"], "atol": LIMITS.smallest_normal * SLACK["mean"]}
    if scheme.kind == "binary":
        np.testing.assert_allclose(p.scale.numpy().ravel(), mean, **close)
        codes = np.where(b >= 0, 1, -1)
    else:
        assert p.threshold is not None
        np.testing.assert_allclose(p.threshold.numpy().ravel(), 0.7 * mean, **close)
        kept = np.abs(b) > p.threshold.numpy().reshape(-1, 1)
        s = (np.abs(b) * kept).sum(1) / kept.sum(1).clip(1)
        np.testing.assert_allclose(p.scale.numpy().ravel(), s, **close)
        codes = np.sign(b) * kept
    np.testing.assert_array_equal(quantize(x, p, scheme).numpy(), codes.reshape(tuple(x.shape)))


@given(cases(SCHEMES))
def test_quantising_twice_changes_nothing(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    p = parameters(x, scheme)
    once = dequantize(quantize(x, p, scheme), p, scheme)
    assert once.isfinite().all()
    assert torch.equal(dequantize(quantize(once, p, scheme), p, scheme), once)


@given(cases(schemes(("symmetric",))))
def test_symmetric_is_idempotent_when_parameters_are_computed_again(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    p = parameters(x, scheme)
    once = dequantize(quantize(x, p, scheme), p, scheme)
    again = parameters(once, scheme)
    assert torch.equal(dequantize(quantize(once, again, scheme), again, scheme), once)


@given(cases(schemes(UNIFORM)))
def test_error_is_at_most_half_a_step(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    p = parameters(x, scheme)
    error = (x.double() - dequantize(quantize(x, p, scheme), p, scheme).double()).abs().numpy()
    step = per_element(p.scale.double(), x, scheme)
    assert (error <= step * (0.5 + SLACK["half step"] * scheme.qmax)).all()


@given(cases(schemes(("symmetric",))))
def test_the_largest_value_is_representable(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    p = parameters(x, scheme)
    codes = rows(quantize(x, p, scheme), scheme)
    b = rows(x, scheme)
    for row, code, s in zip(b, codes, p.scale.numpy().ravel(), strict=True):
        top = np.abs(row).argmax()
        if np.abs(row[top]) / np.float32(scheme.qmax) >= LIMITS.smallest_normal:
            assert code[top] == np.sign(row[top]) * scheme.qmax
            assert abs(code[top] * s - row[top]) <= np.spacing(np.abs(row[top]))


@given(cases(schemes(("asymmetric",))))
def test_asymmetric_holds_zero_exactly(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    p = parameters(x, scheme)
    assert p.zero_point is not None
    assert torch.equal(p.zero_point, p.zero_point.round())
    zeros = torch.zeros_like(x)
    assert torch.equal(dequantize(quantize(zeros, p, scheme), p, scheme), zeros.float())


@given(SCHEMES.flatmap(lambda s: st.tuples(st.just(s), shapes(s))))
def test_zeros_stay_zeros(case: tuple[Scheme, tuple[int, ...]]) -> None:
    scheme, shape = case
    x = torch.zeros(shape)
    p = parameters(x, scheme)
    assert torch.equal(dequantize(quantize(x, p, scheme), p, scheme), x)
    assert torch.equal(fake_quantize(x, scheme), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, -3.7e-30, 1e38, -1e38, 4e-36])
def test_a_constant_group_stays_that_constant(kind: Any, value: float) -> None:
    scheme = Scheme(kind=kind, bits={"ternary": 2, "binary": 1}.get(kind, 8))
    x = torch.full((1, 3), value)
    q = fake_quantize(x, scheme)
    ulps = (q - x).abs().numpy() / np.spacing(np.abs(x.numpy()))
    assert ulps.max() <= 1


def test_binary_sign_of_zero_is_plus_one() -> None:
    scheme = Scheme(kind="binary", bits=1)
    codes = quantize(torch.tensor([[0.0, -0.0, 1.0, -1.0]]), Params(torch.ones(1)), scheme)
    assert codes.tolist() == [[1, 1, 1, -1]]


def test_rint_rounds_half_to_even() -> None:
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    assert quantize(x, Params(torch.ones(1)), Scheme()).tolist() == [[-2, -2, 0, 0, 2, 2]]


def test_subnormal_scales_become_one() -> None:
    x = torch.tensor([[1e-40, -1e-40], [1e-30, 0.0]])
    p = parameters(x, Scheme())
    assert p.scale[0] == 1.0
    assert p.scale[1] < 1e-30
    assert quantize(x, p, Scheme()).tolist() == [[0, 0], [127, 0]]


# Fake-quantise


@given(cases(SCHEMES))
def test_fake_quantize_is_dequantize_of_quantize(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    given_params = parameters(x * 0.5, scheme)  # clips, where uniform
    for p in (None, given_params):
        q = p or parameters(x, scheme)
        expected = dequantize(quantize(x, q, scheme), q, scheme).to(x.dtype)
        found = fake_quantize(x, scheme, p)
        assert found.dtype == x.dtype
        assert torch.equal(found, expected)


@given(cases(schemes(UNIFORM, most_bits=8), dtypes=(torch.float32,)))
def test_gradient_passes_inside_the_range_and_not_outside(case: tuple[Scheme, Tensor]) -> None:
    scheme, x = case
    p = parameters(x * 0.5, scheme)
    x = x.clone().requires_grad_()
    fake_quantize(x, scheme, p).sum().backward()
    assert x.grad is not None
    steps = x.detach().double().numpy() / per_element(p.scale.double(), x.detach(), scheme)
    if p.zero_point is not None:
        steps = steps + per_element(p.zero_point.double(), x.detach(), scheme)
    outside = np.maximum(scheme.qmin - 0.5 - steps, steps - scheme.qmax - 0.5)
    sure = np.abs(outside) > SLACK["half step"] * scheme.qmax * 4
    np.testing.assert_array_equal(x.grad.numpy()[sure], (outside < 0)[sure].astype(np.float32))
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}


def test_gradient_of_clipped_values_is_zero() -> None:
    x = torch.tensor([[-3.0, -1.0, 0.0, 0.3, 1.0, 3.0]], requires_grad=True)
    fake_quantize(x, Scheme(), Params(torch.tensor([1 / 127]))).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_gradient_of_ternary_and_binary_passes_everywhere(kind: Any, dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    fake_quantize(x, Scheme(kind=kind, bits={"ternary": 2, "binary": 1}[kind])).backward(torch.full_like(x, 2.0))
    assert x.grad is not None
    assert (x.grad == 2.0).all()


# Stochastic rounding


@given(cases(schemes(UNIFORM).map(stochastic)), st.integers(0, 2**32 - 1))
def test_stochastic_is_a_function_of_key_and_element_within_one_step(case: tuple[Scheme, Tensor], key: int) -> None:
    scheme, x = case
    p = parameters(x, scheme)
    state = torch.get_rng_state()
    first = quantize(x, p, scheme, key=key)
    other = quantize(x, p, scheme, key=key ^ 1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    assert other.shape == first.shape
    assert torch.equal(quantize(x, p, scheme, key=torch.tensor(key)), first)  # whatever was called between
    error = (x.double() - dequantize(first, p, scheme).double()).abs().numpy()
    assert (error <= per_element(p.scale.double(), x, scheme) * (1 + SLACK["half step"] * scheme.qmax)).all()


@pytest.mark.parametrize("kind", UNIFORM)
def test_stochastic_is_unbiased(kind: Any) -> None:
    scheme = stochastic(Scheme(kind=kind, bits=4))
    x = torch.linspace(-1.0, 1.3, 37).reshape(1, -1)
    p = parameters(x, scheme)
    draws = 2000
    keys = [numerics.stochastic_key(0, step, "w") for step in range(draws)]
    mean = torch.stack([dequantize(quantize(x, p, scheme, key=k), p, scheme) for k in keys]).double().mean(0)
    if p.zero_point is not None:  # the rounded zero point clips up to half a step off one end
        z = float(p.zero_point)
        x = x.clamp((scheme.qmin - z) * float(p.scale), (scheme.qmax - z) * float(p.scale))
    # the variance of one draw is at most s^2 / 4; five standard deviations of the mean
    assert (mean - x).abs().max() <= 5 * 0.5 * float(p.scale) / math.sqrt(draws)


def test_stochastic_keys_differ() -> None:
    scheme = stochastic(Scheme())
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    p = parameters(x, scheme)
    keys = {numerics.stochastic_key(*k) for k in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]}
    assert len(keys) == 4
    codes = [quantize(x, p, scheme, key=k) for k in keys]
    assert all(not torch.equal(codes[0], c) for c in codes[1:])


@given(st.integers(0, 2**32 - 1))
def test_uniform_is_the_documented_hash(key: int) -> None:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    found = numerics.uniform(50, key)
    assert found.tolist() == [(mix(mix(i) ^ key) >> 8) / 2**24 for i in range(50)]


def test_uniform_is_uniform() -> None:
    u = numerics.uniform(100_000, 12345)
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * 100_000)
    counts = torch.histc(u, 64, 0, 1)
    assert float(((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum()) < 120  # chi square, 63 degrees: p < 1e-5


def test_stochastic_without_a_key_is_an_error() -> None:
    scheme = stochastic(Scheme())
    with pytest.raises(SchemeError, match=r"stochastic_key"):
        quantize(torch.ones(1, 2), Params(torch.ones(1)), scheme)


def test_ternary_without_a_threshold_is_an_error() -> None:
    with pytest.raises(SchemeError, match=r"Params\.threshold"):
        quantize(torch.ones(1, 2), Params(torch.ones(1)), Scheme(kind="ternary", bits=2))


# Shapes


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        ("tensor", (3, 5), ()),
        ("channel", (3, 5), (3,)),
        ("channel", (3, 5, 2, 2), (3,)),
        ("token", (2, 3, 5), (2, 3, 1)),
        ("group", (3, 12), (3, 3)),
        ("group", (2, 3, 12), (2, 3, 3)),
        ("group", (3, 2, 2, 3), (3, 3)),
    ],
)
def test_scale_shape(granularity: Any, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    scheme = Scheme(granularity=granularity, group_size=4 if granularity == "group" else None)
    assert scale_shape(shape, scheme) == expected
    assert tuple(parameters(torch.randn(shape), scheme).scale.shape) == expected


@pytest.mark.parametrize(("row", "size", "cure"), [(10, 4, 2), (13, 4, 1), (96, 128, 96), (100, 64, 50)])
def test_a_group_that_does_not_divide_is_an_error(row: int, size: int, cure: int) -> None:
    scheme = Scheme(granularity="group", group_size=size)
    with pytest.raises(SchemeError) as caught:
        parameters(torch.ones(2, row), scheme)
    text = str(caught.value)
    assert f"a row of {row} does not divide into groups of {size}" in text
    assert f"required: group_size that divides {row}" in text
    assert f"found: {size}" in text
    assert f"cure: group_size={cure}" in text


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_nothing_to_quantise(kind: Any, granularity: Any, shape: tuple[int, ...]) -> None:
    """An empty batch has empty codes and finite parameters."""
    scheme = Scheme(kind=kind, bits={"ternary": 2, "binary": 1}.get(kind, 8), granularity=granularity)
    x = torch.zeros(shape)
    if granularity == "channel" and shape[0]:
        return  # a channel without elements is not an activation
    p = parameters(x, scheme)
    assert p.scale.isfinite().all()
    assert tuple(dequantize(quantize(x, p, scheme), p, scheme).shape) == shape
