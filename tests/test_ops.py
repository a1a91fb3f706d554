"""Operators: every kernel against its reference, and the references against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import SLACK, assert_close
from strategies import DTYPES, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dwindle.runtime import compat, numerics
from dwindle.runtime.ops.catalog import OPS, SIMULATED, by_overload
from dwindle.runtime.ops.operator import NAMESPACE, Kernel, Operator
from dwindle.runtime.ops.qconv2d import QCONV2D
from dwindle.runtime.ops.qlinear import QLINEAR, QLINEAR_WEIGHT_ONLY
from dwindle.runtime.ops.quantize import FAKE_QUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import A8_TENSOR, A8_TOKEN, Scheme

ops = getattr(torch.ops, NAMESPACE)

# (scheme, columns): odd ones wherever the scheme allows
WEIGHTS = [
    (Scheme(), 33),
    (Scheme(kind="asymmetric"), 33),
    (Scheme(bits=8, granularity="group", group_size=11), 33),
    (Scheme(bits=4), 33),
    (Scheme(bits=4, granularity="group", group_size=16), 48),
    (Scheme(bits=4, kind="asymmetric", granularity="group", group_size=5), 35),
    (Scheme(bits=2), 33),
    (Scheme(bits=3, kind="asymmetric"), 7),
    (Scheme(bits=2, kind="ternary"), 33),
    (Scheme(bits=1, kind="binary"), 33),
    (Scheme(bits=1, kind="binary", granularity="group", group_size=8), 40),
    (Scheme(bits=4, granularity="tensor"), 9),
]
LEADS = [(1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)]
IDS = [scheme.spell() for scheme, _ in WEIGHTS]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of a larger tensor."""
    return torch.stack((x, x), -1)[..., 0]


def of_weight(q: QTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return q.codes, q.scale, q.zero_point


def test_every_operator_is_registered_once() -> None:
    assert len({op.name for op in OPS}) == len(OPS)
    for op in OPS:
        assert by_overload(op.overload) is op
    assert by_overload(torch.ops.aten.linear.default) is None
    assert set(SIMULATED) <= set(OPS)


# Quantising activations


def activations() -> st.SearchStrategy[Tensor]:
    return st.sampled_from(DTYPES).flatmap(lambda dtype: tensors(A8_TOKEN, (dtype,)))


@given(activations(), st.booleans())
def test_dynamic_kernel_equals_the_contract(x: Tensor, spread: bool) -> None:
    x = strided(x) if spread else x
    for granularity, scheme in (("token", A8_TOKEN), ("tensor", A8_TENSOR)):
        codes, scale = ops.quantize_dynamic(x, granularity)
        reference_codes, reference_scale = QUANTIZE_DYNAMIC.reference(x, granularity)
        p = numerics.parameters(x, scheme)
        assert torch.equal(codes, reference_codes)
        assert torch.equal(scale, reference_scale)
        assert torch.equal(codes, numerics.quantize(x, p, scheme))
        assert torch.equal(scale, p.scale)
        assert scale.shape == p.scale.shape
        assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)


@given(activations(), st.booleans(), st.sampled_from((None, -128, -127, -5, 0, 127)))
def test_static_kernel_equals_its_reference(x: Tensor, spread: bool, zero: int | None) -> None:
    x = strided(x) if spread else x
    scale = numerics.parameters(x * 0.5, A8_TENSOR).scale  # clips
    zero_point = None if zero is None else torch.tensor(float(zero))
    codes = ops.quantize_static(x, scale, zero_point)
    assert torch.equal(codes, QUANTIZE_STATIC.reference(x, scale, zero_point))
    expected = (torch.round(x.float() / scale) + (zero or 0)).clamp(-127 if zero is None else -128, 127)
    assert torch.equal(codes.float(), expected)


def test_static_asymmetric_is_the_contract_less_128() -> None:
    x, scheme = random(5, 33), Scheme(kind="asymmetric", granularity="tensor")
    p = numerics.parameters(x * 0.5, scheme)
    codes = ops.quantize_static(x, p.scale, p.zero_point - 128)
    assert torch.equal(codes.int() + 128, numerics.quantize(x, p, scheme).int())


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_chunks_do_not_show(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken 16 at a time; the edges of chunks are where a slip would be."""
    monkeypatch.setattr("dwindle.runtime.numerics.CHUNK_ELEMENTS", 1)
    x, w = random(rows, 7) * 5, QTensor.quantize(random(5, 7, seed=1), Scheme())
    assert all(map(torch.equal, ops.quantize_dynamic(x, "token"), QUANTIZE_DYNAMIC.reference(x, "token")))
    scale = torch.tensor(0.01)
    assert torch.equal(ops.quantize_static(x, scale, None), QUANTIZE_STATIC.reference(x, scale, None))
    codes, s = ops.quantize_dynamic(x, "token")
    args = (codes, s, *of_weight(w), random(5, seed=2), w.scheme.spell(), torch.float32)
    assert torch.equal(ops.qlinear(*args), QLINEAR.reference(*args))


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(),
        Scheme(bits=4, granularity="tensor"),
        Scheme(bits=4, kind="asymmetric", granularity="group", group_size=4),
        Scheme(bits=2, kind="ternary"),
    ],
    ids=Scheme.spell,
)
def test_chunks_do_not_show_in_weights(scheme: Scheme, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without a gradient nor packed; both are taken some rows at a time."""
    monkeypatch.setattr("dwindle.runtime.numerics.CHUNK_ELEMENTS", 1)
    for w in (random(rows, 8) * 5, random(8, rows).t(), random(rows, 2, 2, 2)):
        expected = FAKE_QUANTIZE.reference(w, None, None, scheme.spell())
        assert torch.equal(ops.fake_quantize(w, None, None, scheme.spell()), expected)
        assert torch.equal(QTensor.quantize(w, scheme).dequantize(), expected)


def test_a_wanted_gradient_takes_the_reference() -> None:
    w = random(4, 8).requires_grad_()
    assert FAKE_QUANTIZE.explain(w, None, None, Scheme().spell())[0] == "reference"
    with torch.no_grad():
        assert FAKE_QUANTIZE.explain(w, None, None, Scheme().spell())[0] == "cpu chunked"


@pytest.mark.parametrize("lead", LEADS)
def test_activations_of_any_rank_and_empty_batches(lead: tuple[int, ...]) -> None:
    x = random(*lead, 5)
    codes, scale = ops.quantize_dynamic(x, "token")
    assert (codes.shape, scale.shape) == (x.shape, (*lead, 1))
    codes, scale = ops.quantize_dynamic(x, "tensor")
    assert (codes.shape, scale.shape) == (x.shape, ())
    assert scale.isfinite()
    assert ops.quantize_static(x, scale, None).shape == x.shape


# Linear


def qlinear_args(
    scheme: Scheme, columns: int, lead: tuple[int, ...], granularity: str = "token", bias: bool = True
) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of qlinear and its value in float64."""
    q = QTensor.quantize(random(7, columns), scheme)
    x = random(*lead, columns, seed=1)
    codes, s = ops.quantize_dynamic(x, granularity)
    b = random(7, seed=2) if bias else None
    expected = (codes.double() * s.double()) @ q.dequantize().double().t()
    if b is not None:
        expected = expected + b.double()
    return (codes, s, *of_weight(q), b, scheme.spell(), torch.float32), expected


@pytest.mark.parametrize(("scheme", "columns"), WEIGHTS, ids=IDS)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_qlinear_against_float64(scheme: Scheme, columns: int, lead: tuple[int, ...]) -> None:
    for granularity, bias in itertools.product(("token", "tensor"), (True, False)):
        args, expected = qlinear_args(scheme, columns, lead, granularity, bias)
        found = ops.qlinear(*args)
        assert_close(found, expected.float(), "kernel")
        assert torch.equal(found, QLINEAR.reference(*args))
        assert torch.equal(ops.qlinear(strided(args[0]), *args[1:]), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_qlinear_rounds_once_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    args, _ = qlinear_args(Scheme(), 33, (2, 3))
    bias = args[5].to(dtype)
    for b in (bias, None):
        narrow = (*args[:5], b, args[6], dtype)
        found = ops.qlinear(*narrow)
        wide = QLINEAR.reference(*args[:5], None if b is None else b.float(), args[6], torch.float32)
        assert torch.equal(found, wide.to(dtype))
        assert torch.equal(found, QLINEAR.reference(*narrow))


def test_int8_products_are_exact() -> None:
    """Sums near 127^2 K, where fp32 accumulation would round."""
    columns = 2049
    codes, weight = torch.full((1, columns), 127, dtype=torch.int8), torch.full((1, columns), 127, dtype=torch.int8)
    codes[0, 0] = 126
    one = torch.ones(1)
    found = ops.qlinear(codes, one[0], weight, one, None, None, Scheme().spell(), torch.float32)
    assert float(found) == torch.tensor(float(127 * 127 * columns - 127)).item()


@pytest.mark.parametrize(("scheme", "columns"), WEIGHTS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only_against_float64(scheme: Scheme, columns: int, dtype: torch.dtype) -> None:
    q = QTensor.quantize(random(7, columns), scheme)
    w = q.dequantize().to(dtype).double()
    for lead, bias in itertools.product(LEADS, (random(7, seed=2, dtype=dtype), None)):
        x = random(*lead, columns, seed=1, dtype=dtype)
        expected = F.linear(x.double(), w, None if bias is None else bias.double()).to(dtype)
        args = (*of_weight(q), bias, scheme.spell())
        found = ops.qlinear_weight_only(x, *args)
        assert_close(found, expected, "kernel")
        # The kernel multiplies in fp32 and scales the product; the reference multiplies in x's dtype.
        assert_close(QLINEAR_WEIGHT_ONLY.reference(x, *args), expected, "kernel")
        assert_close(ops.qlinear_weight_only(strided(x), *args), expected, "kernel")


def layouts(x: Tensor) -> list[Tensor]:
    """`x` and some of `x`'s values in strides that a view can have; a dimension of 1 may have any."""
    rows, columns = x.shape
    found = [x, strided(x), x.t().clone(memory_format=torch.contiguous_format).t(), torch.cat((x, x), 1)[:, :columns]]
    found.append(x[:1].expand(rows, columns))
    if rows == 1:
        found += [x.as_strided((1, columns), (stride, 1)) for stride in (0, 1, 2, columns)]
    if columns == 1:
        found += [x.as_strided((rows, 1), (1, stride)) for stride in (0, 1, rows)]
    return found


@pytest.mark.parametrize("k", [1, 2, 3, 17])
@pytest.mark.parametrize("m", [0, 1, 2, 17])
def test_integer_products_are_exact_in_every_layout(m: int, k: int) -> None:
    for n in (1, 2, 17):
        for a, w in itertools.product(layouts(int8(m, k)), layouts(int8(n, k, seed=1))):
            expected = a.int() @ w.int().t()
            assert torch.equal(compat.int_mm(a, w.t()), expected)
            assert torch.equal(compat.int_mm(a, w.t().contiguous()), expected)


# Embedding and plain dequantising


@pytest.mark.parametrize(("scheme", "columns"), WEIGHTS, ids=IDS)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
def test_qembedding_is_a_row_of_the_dequantised_table(scheme: Scheme, columns: int, shape: tuple[int, ...]) -> None:
    q = QTensor.quantize(random(11, columns), scheme)
    indices = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        found = ops.qembedding(indices, *of_weight(q), columns, scheme.spell(), dtype)
        assert torch.equal(found, F.embedding(indices, q.dequantize()).to(dtype))
        assert torch.equal(ops.qembedding(strided(indices), *of_weight(q), columns, scheme.spell(), dtype), found)


@pytest.mark.parametrize(("scheme", "columns"), WEIGHTS, ids=IDS)
def test_dequantize_is_the_qtensors_own(scheme: Scheme, columns: int) -> None:
    for shape in ((7, columns), (7, columns, 1, 1)):
        q = QTensor.quantize(random(*shape), scheme)
        found = ops.dequantize(*of_weight(q), list(shape), scheme.spell(), torch.float32)
        assert torch.equal(found, q.dequantize())


# Convolution


@st.composite
def convolutions(draw: Any) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of qconv2d and the float64 convolution of the dequantised operands, padded with 0.0.

    The zero point's share of the sum is folded into the bias, as the pass that makes this call does.
    """
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    per = draw(st.integers(1, 4))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    stride, padding, dilation = ([draw(st.integers(low, 2)) for _ in range(2)] for low in (1, 0, 1))
    size = [draw(st.integers(d * (k - 1) + 1, d * (k - 1) + 5)) for d, k in zip(dilation, kernel, strict=True)]
    seed = draw(st.integers(0, 1000))
    codes = int8(draw(st.integers(0, 3)), groups * per, *size, seed=seed)
    if draw(st.booleans()):
        codes = codes.contiguous(memory_format=torch.channels_last)
    outputs = groups * draw(st.integers(1, 3))
    weight = int8(outputs, *kernel, per, seed=seed + 1)  # (O, kh, kw, C / groups)
    s_x, s_w = torch.tensor(0.37), random(outputs, seed=seed).abs() + 0.1
    bias = random(outputs, seed=seed + 2) * 100 if draw(st.booleans()) else None
    z = draw(st.sampled_from((None, -128, -7, 0, 127)))
    folded = bias
    if z is not None:
        share = s_x * s_w * z * weight.float().sum((1, 2, 3))
        folded = (0.0 if bias is None else bias) - share
    x = (codes.double() - (z or 0)) * s_x
    w = weight.permute(0, 3, 1, 2).double() * s_w.double().reshape(-1, 1, 1, 1)
    expected = F.conv2d(x, w, None if bias is None else bias.double(), stride, padding, dilation, groups)
    zero_point = None if z is None else torch.tensor(float(z))
    args = (codes, s_x, zero_point, weight, s_w, folded, stride, padding, dilation, groups, torch.float32)
    return args, expected


@given(convolutions())
def test_qconv2d_against_float64(case: tuple[tuple[Any, ...], Tensor]) -> None:
    args, expected = case
    found = ops.qconv2d(*args)
    assert found.shape == expected.shape
    if found.numel():
        # The zero point's share cancels, so the scale of what is added up is the yardstick.
        size = max(float(expected.abs().max()), 0.0 if args[2] is None else float(args[5].abs().max()))
        assert float((found.double() - expected).abs().max()) <= SLACK["convolution"] * size
    assert found.is_contiguous(memory_format=torch.channels_last) or found.numel() == 0
    for other in (strided(args[0]), args[0].contiguous()):
        assert torch.equal(ops.qconv2d(other, *args[1:]), found)
    assert torch.equal(QCONV2D.reference(*args), found)


# Which kernel, and why


@pytest.mark.parametrize(
    ("op", "args", "kernel", "declined"),
    [
        (QUANTIZE_DYNAMIC, (torch.ones(2, 3), "token"), "cpu chunked", []),
        (QUANTIZE_DYNAMIC, (torch.ones(2, 3), "tensor"), "reference", ["cpu chunked: needs granularity 'token'"]),
        (QUANTIZE_STATIC, (torch.ones(2, 3), torch.ones(()), None), "cpu chunked", []),
        (QLINEAR, qlinear_args(Scheme(), 33, (2,))[0], "cpu int8 gemm", []),
        (QLINEAR, qlinear_args(Scheme(bits=4), 33, (2,))[0], "cpu int8 gemm", []),
        (
            QLINEAR,
            qlinear_args(Scheme(bits=4, granularity="group", group_size=11), 33, (2,))[0],
            "reference",
            ["cpu int8 gemm: needs weights without zero points or groups"],
        ),
        (
            QLINEAR,
            tuple(a.to("meta") if isinstance(a, Tensor) else a for a in qlinear_args(Scheme(), 33, (2,))[0]),
            "reference",
            ["cpu int8 gemm: needs a CPU tensor"],
        ),
    ],
    ids=["token", "tensor", "static", "w8", "w4", "groups", "meta"],
)
def test_explain_names_the_kernel_and_why_others_do_not_serve(
    op: Operator, args: tuple[Any, ...], kernel: str, declined: list[str]
) -> None:
    assert op.explain(*args) == (kernel, declined)


def test_dispatch_takes_the_first_kernel_that_serves() -> None:
    def kernel(name: str, reason: str | None) -> Kernel:
        return Kernel(name=name, serves=lambda x: reason, run=lambda x: name)

    op = Operator(
        name="none",
        schema="(Tensor x) -> Tensor",
        reference=lambda x: "reference",
        kernels=(kernel("a", "too small"), kernel("b", None), kernel("c", None)),
    )
    x = torch.ones(1)
    assert op(x) == "b"
    assert op.explain(x) == ("b", ["a: too small"])
    with FakeTensorMode() as mode:
        assert op(mode.from_tensor(x)) == "reference"  # tracing sees through to the definition
