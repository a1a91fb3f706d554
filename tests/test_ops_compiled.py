"""Operators under torch.library.opcheck and torch.compile: codes are bit-identical whatever runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close
from torch import Tensor

from dwindle.runtime import numerics
from dwindle.runtime.ops.catalog import OPS
from dwindle.runtime.ops.operator import NAMESPACE, Operator
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import A8_TENSOR, A8_TOKEN, Scheme

ops = getattr(torch.ops, NAMESPACE)

W8, W4 = Scheme(), Scheme(bits=4, granularity="group", group_size=4)
A4 = Scheme(bits=4, kind="asymmetric", granularity="group", group_size=4)
TERNARY, BINARY = Scheme(bits=2, kind="ternary"), Scheme(bits=1, kind="binary")
SCHEMES = (W8, W4, A4, TERNARY, BINARY)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def packed(scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    q = QTensor.quantize(random(5, 12), scheme)
    return q.codes, q.scale, q.zero_point


def fake_args(scheme: Scheme, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    p = numerics.parameters(random(5, 12) * 0.5, scheme)
    return random(5, 12).to(dtype).requires_grad_(), p.scale, p.zero_point, scheme.spell()


X, ONE, ZERO = random(3, 12), torch.tensor(0.05), torch.tensor(3.0)
LEVELS, HALF, KEY = torch.tensor(7, dtype=torch.int32), torch.tensor(0.5), torch.tensor(3)
TERNARY = Scheme(bits=2, kind="ternary")
UNIFORM = [s for s in SCHEMES if s.kind in ("symmetric", "asymmetric")]
WHOLE = [s for s in SCHEMES if s.granularity != "group"]
EXAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "require": [(torch.tensor(True), True, "model.py:3: if x.any():"), (torch.tensor([0.0]), False, "if x:")],
    "fake_quantize": [
        *((random(5, 12).requires_grad_(), None, None, s.spell()) for s in SCHEMES),
        *(fake_args(s) for s in UNIFORM),
        fake_args(W8, torch.bfloat16),
    ],
    "fake_quantize_live": [
        *((random(5, 12).requires_grad_(), LEVELS, HALF, KEY, s.spell()) for s in SCHEMES),
        (random(5, 12).bfloat16(), LEVELS * 0, HALF * 0, None, TERNARY.spell()),
    ],
    "fake_quantize_ranged": [
        (random(5, 12).requires_grad_(), torch.tensor([-0.5, 1.0]), LEVELS, mix, A8_TENSOR.spell())
        for mix in (HALF, HALF * 0)
    ],
    "fake_quantize_learned": [
        (random(5, 12).requires_grad_(), torch.rand(n).requires_grad_(), LEVELS, mix, batched, s.spell())
        for mix in (HALF, HALF * 0)
        for n, batched, s in (((5,), False, W8), ((), True, A8_TENSOR))
    ],
    "steps_live": [
        *((random(5, 12).requires_grad_(), LEVELS, mix, KEY, s.spell()) for s in WHOLE for mix in (HALF, HALF * 0)),
        (random(5, 12).bfloat16(), LEVELS * 0, HALF * 0, None, TERNARY.spell()),
        (random(2, 5, 12).requires_grad_(), LEVELS, HALF * 2, None, A8_TOKEN.spell()),
    ],
    "steps_ranged": [
        (random(5, 12).requires_grad_(), torch.tensor([-0.5, 1.0]), LEVELS, mix, A8_TENSOR.spell())
        for mix in (HALF, HALF * 0)
    ],
    "steps_learned": [
        (random(5, 12).requires_grad_(), torch.rand(n).requires_grad_(), LEVELS, mix, batched, s.spell())
        for mix in (HALF, HALF * 0)
        for n, batched, s in (((5,), False, W8), ((), True, A8_TENSOR))
    ],
    "linear_of_steps": [
        (X.round().requires_grad_(), torch.rand(3, 1), random(5, 12).requires_grad_(), scale, random(5))
        for scale in (torch.rand(5), torch.rand(()), None)
    ],
    "keep_top": [(random(*shape).requires_grad_(), torch.tensor(k)) for shape in ((12,), (5, 4)) for k in (0, 3, 99)],
    "observe_range_": [(torch.zeros(2), X, 0.9), (torch.tensor([-1.0, 1.0]), X.bfloat16(), 0.9)],
    "quantize_dynamic": [(X, "token"), (X, "tensor"), (random(2, 3, 5).half(), "token"), (X, "image", 4)],
    "quantize_asymmetric": [(X, "token"), (X, "tensor", 4), (random(2, 3, 5).half(), "image")],
    "quantize_static": [(X, ONE, None), (X.bfloat16(), ONE, ZERO), (X, ONE, ZERO, 4)],
    "qlinear": [
        *((int8(3, 12), torch.rand(3, 1), *packed(s), random(5), s.spell(), torch.float32) for s in SCHEMES),
        (int8(2, 3, 12), ONE, *packed(W8), None, W8.spell(), torch.bfloat16),
    ],
    "qlinear_weight_only": [
        *((X.clone().requires_grad_(), *packed(s), random(5), s.spell()) for s in SCHEMES),
        (random(2, 3, 12).bfloat16(), *packed(W4), None, W4.spell()),
    ],
    "qembedding": [(torch.tensor([[0, 4], [2, 2]]), *packed(s), 12, s.spell(), torch.float32) for s in SCHEMES],
    "qconv2d": [
        (int8(2, 4, 5, 6), ONE, z, int8(6, 3, 2, 4 // g), torch.rand(6), random(6), [2, 1], [1, 0], [1, 2], g, dtype)
        for z, g, dtype in [(None, 1, torch.float32), (ZERO, 2, torch.float32), (ZERO, 1, torch.bfloat16)]
    ],
    "dequantize": [(*packed(s), [5, 3, 2, 2], s.spell(), torch.float32) for s in SCHEMES],
}
CASES = [
    pytest.param(op, args, id=f"{op.name}-{i}", marks=pytest.mark.slow if i else ())
    for op in OPS
    for i, args in enumerate(EXAMPLES[op.name])
]


@pytest.mark.parametrize(("op", "args"), CASES)
def test_opcheck(op: Operator, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(op.overload, args)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_schema_and_shapes_are_true_for_every_scheme(op: Operator) -> None:
    for args in EXAMPLES[op.name]:
        torch.library.opcheck(op.overload, args, test_utils=("test_schema", "test_faketensor"))


# torch.compile. x has rows enough that division by a reciprocal would show: about 4 % of scales, 0.01 % of codes.


def activations(rows: int) -> Tensor:
    return random(rows, 61) * torch.logspace(-3, 3, rows).reshape(-1, 1)


def quantised(x: Tensor, params: numerics.Params) -> tuple[Tensor, ...]:
    a, s = ops.quantize_dynamic(x, "token")
    b, t = ops.quantize_dynamic(x, "tensor")
    c = ops.quantize_static(x, params.scale, None)
    d = ops.quantize_static(x, params.scale, ZERO)
    return a, s, b, t, c, d


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_codes_are_bit_identical() -> None:
    compiled = torch.compile(quantised, dynamic=True, fullgraph=True)
    for rows in (2000, 3):
        x = activations(rows)
        params = numerics.parameters(x * 0.5, A8_TENSOR)
        for found, expected in zip(compiled(x, params), quantised(x, params), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_a_reciprocal_would_have_shown() -> None:
    """The test above can fail: on its inputs, multiplying by 1 / 127 or by 1 / s gives other bits."""
    x = activations(2000)
    codes, s = ops.quantize_dynamic(x, "token")
    assert not torch.equal(x.abs().amax(1, keepdim=True) * torch.tensor(1 / 127), s)
    halves = torch.arange(1, 254, 2) * 0.5 * s[:, :1]  # (2000, 127), ties of rint
    assert not torch.equal(torch.round(halves / s), torch.round(halves * (1 / s)))
    assert codes.dtype == torch.int8


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_ties_round_as_in_eager() -> None:
    """x is an odd multiple of s / 2 to within rounding: the quotient's last bit decides the code."""
    s = random(2000, 1).abs() + 0.01
    x = torch.arange(-253, 254, 2) * 0.5 * s
    x = torch.cat([x, 127 * s], 1)  # amax / 127 is s again, or its neighbour

    def both(x: Tensor) -> tuple[Tensor, ...]:
        return ops.quantize_dynamic(x, "token") + (ops.quantize_static(x, ONE, None),)

    for found, expected in zip(torch.compile(both, dynamic=True)(x), both(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("dynamic", "shapes"),
    [
        (True, [(1, 1, 12), (5, 1)]),
        pytest.param(True, [(1, 12), (2, 3, 12), (1, 1, 1)], marks=pytest.mark.slow),
        pytest.param(False, [(1, 1, 12), (5, 1), (1, 12), (2, 3, 12), (1, 1, 1)], marks=pytest.mark.slow),
    ],
)
def test_compiled_linear_on_one_row_and_one_column(dynamic: bool, shapes: list[tuple[int, ...]]) -> None:
    """Where a dimension is 1 its stride may be anything, which torch._int_mm on CPU does not bear."""

    def linear(x: Tensor, q: tuple[Tensor, Tensor, None]) -> Tensor:
        return ops.qlinear(*ops.quantize_dynamic(x, "token"), *q, None, W8.spell(), torch.float32)

    compiled = torch.compile(linear, dynamic=dynamic, fullgraph=True)
    for shape in shapes:
        q = QTensor.quantize(random(5, shape[-1]), W8)
        args = (random(*shape), (q.codes, q.scale, None))
        assert_close(compiled(*args), linear(*args), "kernel")


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_fake_quantize_equals_eager() -> None:
    def faked(x: Tensor) -> list[Tensor]:
        return [ops.fake_quantize(x, None, None, s.spell()) for s in (W8, W4, A4)]

    x = random(257, 12).requires_grad_()
    eager, compiled = faked(x), torch.compile(faked, dynamic=True, fullgraph=True)(x)
    assert all(map(torch.equal, compiled, eager))
    (from_eager,) = torch.autograd.grad(eager, x, [torch.ones_like(x)] * 3)
    (from_compiled,) = torch.autograd.grad(compiled, x, [torch.ones_like(x)] * 3)
    assert torch.equal(from_compiled, from_eager)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("schemes", "convolution"),
    [
        pytest.param((A4,), False, id="4 bits"),
        pytest.param((), True, id="convolution", marks=pytest.mark.slow),
        pytest.param(SCHEMES, True, id="all", marks=pytest.mark.slow),
    ],
)
def test_compiled_operators_are_close_to_eager(schemes: tuple[Scheme, ...], convolution: bool) -> None:
    def everything(x: Tensor, ids: Tensor, image: Tensor, weights: list[Any]) -> list[Tensor]:
        codes, s = ops.quantize_dynamic(x, "token")
        out = []
        for q, spelt in zip(weights, spellings, strict=True):
            out.append(ops.qlinear(codes, s, *q, None, spelt, torch.float32))
            out.append(ops.qlinear_weight_only(x, *q, None, spelt))
            out.append(ops.qembedding(ids, *q, 12, spelt, torch.float32))
        if convolution:
            pixels, ones = ops.quantize_static(image, ONE, None), [1, 1]
            out.append(ops.qconv2d(pixels, ONE, ZERO, kernel, ONE.expand(6), None, ones, ones, ones, 1, torch.float32))
        return out

    kernel, spellings = int8(6, 3, 3, 4), [s.spell() for s in schemes]
    compiled = torch.compile(everything, dynamic=True, fullgraph=True)
    weights = [packed(s) for s in schemes]
    for rows in (7, 33):
        args = (random(rows, 12), torch.arange(rows) % 5, random(rows, 4, 5, 6), weights)
        for found, expected in zip(compiled(*args), everything(*args), strict=True):
            assert_close(found, expected, "kernel")
