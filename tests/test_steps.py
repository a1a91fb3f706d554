"""Training computes what the integer kernel will: steps, their scales, and the product of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import error
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.passes.mismatch import code_mismatch
from dwindle.runtime import numerics
from dwindle.runtime.ops.catalog import OPS
from dwindle.runtime.ops.qlinear import QLINEAR, is_integer
from dwindle.runtime.ops.quantize import QUANTIZE_DYNAMIC
from dwindle.runtime.ops.steps import LINEAR_OF_STEPS, STEPS_LEARNED, STEPS_LIVE, STEPS_RANGED
from dwindle.runtime.ops.training import FAKE_QUANTIZE_LEARNED, FAKE_QUANTIZE_LIVE, FAKE_QUANTIZE_RANGED
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import A8_TENSOR, A8_TOKEN, Scheme

assert OPS  # importing the catalogue registers the operators

WHOLE = [
    Scheme(bits=8),
    Scheme(bits=4),
    Scheme(bits=3, granularity="rows", group_size=4),
    Scheme(bits=8, granularity="tensor"),
    Scheme(bits=2, kind="ternary"),
    Scheme(bits=1, kind="binary"),
]
GROUPED = [Scheme(bits=4, granularity="group", group_size=8), Scheme(bits=4, kind="asymmetric")]
NONE, HALF, ALL = torch.tensor(0.0), torch.tensor(0.5), torch.tensor(1.0)


def levels(scheme: Scheme) -> Tensor:
    return torch.tensor(0 if scheme.kind in ("ternary", "binary") else scheme.qmax, dtype=torch.int32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def beside(scale: Tensor, scheme: Scheme) -> Tensor:
    return scale.reshape(-1, 1) if scheme.granularity in ("channel", "rows") else scale


@pytest.mark.parametrize("scheme", WHOLE, ids=Scheme.spell)
@given(seed=st.integers(0, 500), rows=st.integers(1, 9), columns=st.sampled_from((16, 40, 104)))
def test_training_gives_the_numbers_of_the_integer_kernel(scheme: Scheme, seed: int, rows: int, columns: int) -> None:
    assert is_integer(scheme.stored)
    x, w, b = random(rows, columns, seed=seed), random(12, columns, seed=seed + 1), random(12, seed=seed + 2)
    u, s = STEPS_LIVE.overload(x, torch.tensor(127, dtype=torch.int32), NONE, None, A8_TOKEN.spell())
    v, t = STEPS_LIVE.overload(w, levels(scheme), NONE, None, scheme.spell())
    codes, scale = QUANTIZE_DYNAMIC.overload(x, "token")
    packed = QTensor.quantize(w, scheme)
    assert torch.equal(u, codes.float())
    assert torch.equal(v, packed.int_codes().float())
    args = (packed.codes, packed.scale, None, b, scheme.stored.spell(), torch.float32)
    assert torch.equal(LINEAR_OF_STEPS.overload(u, s, v, t, b), QLINEAR.overload(codes, scale, *args))


@pytest.mark.parametrize("scheme", [s for s in WHOLE if s.kind == "symmetric"], ids=Scheme.spell)
@pytest.mark.parametrize("mix", [NONE, HALF, ALL], ids=["quantised", "mixed", "float"])
def test_steps_times_scale_is_the_simulated_value(scheme: Scheme, mix: Tensor) -> None:
    w, step = random(8, 16), random(*numerics.scale_shape((8, 16), scheme)).abs() * 0.1 + 0.01
    span = torch.tensor([-0.7, 1.1])
    for steps, values, rest in (
        (STEPS_LIVE, FAKE_QUANTIZE_LIVE, (levels(scheme), mix, None, scheme.spell())),
        (STEPS_LIVE, FAKE_QUANTIZE_LIVE, (levels(scheme), mix, None, A8_TOKEN.spell())),
        (STEPS_RANGED, FAKE_QUANTIZE_RANGED, (span, levels(scheme), mix, A8_TENSOR.spell())),
        (STEPS_LEARNED, FAKE_QUANTIZE_LEARNED, (step, levels(scheme), mix, False, scheme.spell())),
        (STEPS_LEARNED, FAKE_QUANTIZE_LEARNED, (torch.tensor(0.1), levels(scheme), mix, True, A8_TENSOR.spell())),
    ):
        of = Scheme.parse(str(rest[-1]))
        for run in (steps.overload, steps.reference):
            u, s = run(w, *rest)
            assert torch.equal(u * beside(s, of), values.overload(w, *rest))
            assert mix != 0 or torch.equal(u, u.round())


def gradients(product: Any, *leaves: Tensor) -> list[Tensor]:
    own = [leaf.clone().requires_grad_() for leaf in leaves]
    (product(*own) * random(6, 8, seed=9)).sum().backward()
    return [leaf.grad for leaf in own if leaf.grad is not None]


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("mix", [NONE, HALF, ALL], ids=["quantised", "mixed", "float"])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_are_those_of_the_simulated_product(mix: Tensor, learned: bool, reference: bool) -> None:
    """As of fake(x) @ fake(W)^T, to fp32 rounding."""
    x, w, b, step = random(6, 16), random(8, 16, seed=1), random(8, seed=2), random(8, seed=3).abs() * 0.2 + 0.05
    q, scheme = torch.tensor(7, dtype=torch.int32), Scheme(bits=4)
    span = torch.tensor([-1.0, 1.5])

    def run(op: Any, *args: Any) -> Any:
        return (op.reference if reference else op.overload)(*args)

    def on_steps(x: Tensor, w: Tensor, b: Tensor, step: Tensor) -> Tensor:
        u, s = run(STEPS_RANGED, x, span, q, mix, A8_TENSOR.spell())
        if learned:
            v, t = run(STEPS_LEARNED, w, step, q, mix, False, scheme.spell())
        else:
            v, t = run(STEPS_LIVE, w, q, mix, None, scheme.spell())
        y: Tensor = run(LINEAR_OF_STEPS, u, s, v, t, b)
        return y

    def on_values(x: Tensor, w: Tensor, b: Tensor, step: Tensor) -> Tensor:
        fx = FAKE_QUANTIZE_RANGED.reference(x, span, q, mix, A8_TENSOR.spell())
        if learned:
            fw = FAKE_QUANTIZE_LEARNED.reference(w, step, q, mix, False, scheme.spell())
        else:
            fw = FAKE_QUANTIZE_LIVE.reference(w, q, mix, None, scheme.spell())
        return F.linear(fx, fw, b)

    found, expected = gradients(on_steps, x, w, b, step), gradients(on_values, x, w, b, step)
    assert len(found) == len(expected) == (4 if learned else 3)
    for one, two in zip(found, expected, strict=True):
        assert error(one, two) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_do_not_overflow(dtype: torch.dtype) -> None:
    """127^2 * 1024 is far above fp16's 65,504."""
    x, w = torch.ones(2, 1024, dtype=dtype), torch.ones(4, 1024, dtype=dtype)
    u, s = STEPS_LIVE.overload(x, torch.tensor(127, dtype=torch.int32), NONE, None, A8_TOKEN.spell())
    v, t = STEPS_LIVE.overload(w, torch.tensor(127, dtype=torch.int32), NONE, None, Scheme().spell())
    y = LINEAR_OF_STEPS.overload(u, s, v, t, None)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), torch.full((2, 4), 1024.0), rtol=1e-2)


def test_autocast_does_not_overflow() -> None:
    model = nn.Linear(1024, 16)
    x = torch.ones(2, 1024)
    student = dwindle.prepare(model, {"quantize": [{"activation": {}}]}, inputs=x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert error(student(x).float(), model(x).float()) < 5e-2


@pytest.mark.parametrize("scheme", [*WHOLE, *GROUPED], ids=Scheme.spell)
@pytest.mark.parametrize("span", ["dynamic", "static"])
def test_a_deep_student_is_its_finished_model_bit_for_bit(scheme: Scheme, span: str) -> None:
    """Twelve layers: a single code that fell otherwise would show."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(12)]
    model, x = nn.Sequential(*layers), torch.randn(32, 64)
    groups = {"rows": {"groups": 16}, "tensor": {"granularity": "tensor"}}.get(scheme.granularity, {})
    sized = {"group_size": scheme.group_size} if scheme.granularity == "group" else groups
    weight = {"bits": scheme.bits, "kind": scheme.kind, **sized}
    student = dwindle.prepare(model, {"quantize": [{"weight": weight, "activation": {"range": span}}]}, inputs=x)
    optimizer = torch.optim.SGD(student.parameters(), 1e-2)
    for _ in range(2):
        student(x).square().mean().backward()
        optimizer.step()
        student.step()
    student.eval()
    with torch.no_grad():
        assert torch.equal(student.finish()(x), student(x))


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("span", ["dynamic", "static"])
def test_the_certificate_counts_codes_that_fall_otherwise(kind: str, span: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(32, 64)
    entry = {"activation": {"kind": kind, "range": span}}
    student = dwindle.prepare(model.train(), {"quantize": [entry]}, inputs=x)
    student(x)
    certificate = student.finish().certificate
    assert certificate.code_mismatch == 0
    assert "codes unlike training's" in str(student.finish().report())
    first, second = student.eval().variants.values(), student.finish().variants.values()
    (trained,), (finished,) = ([p for p in side if not p.contract.training] for side in (first, second))
    with torch.no_grad():
        inputs = [x]
        assert code_mismatch(finished, trained, inputs) == 0
        student.get_parameter("0.bias").add_(0.05)  # what the second layer reads moves by several steps
    moved = code_mismatch(finished, trained, inputs)
    assert moved is not None
    assert 0.3 < moved < 0.6  # half of all codes are of the first layer, and stay


def test_a_student_in_onnx_runtime(tmp_path: Any) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(4)]
    model, x = nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(64, 64)
    student = dwindle.prepare(model, {"quantize": [{"weight": {"bits": 4}, "activation": {}}]}, inputs=x)
    student.train()(x).square().mean().backward()
    student.eval().finish().export_onnx(tmp_path / "m.onnx")
    (found,) = ort.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"input": x.numpy()})
    with torch.no_grad():
        expected = student(x)
    assert (torch.from_numpy(found).argmax(1) == expected.argmax(1)).all()
