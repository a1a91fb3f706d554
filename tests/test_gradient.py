"""Gradients through quantised layers: those of the same computation fake-quantised in floating point."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO
from numerics import assert_close, error
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.runtime import numerics
from dwindle.runtime.errors import DwindleError
from dwindle.runtime.modules import QuantizedLinear
from dwindle.runtime.ops.catalog import OPS
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import A8_TENSOR, A8_TOKEN, Scheme

assert OPS  # registers the operators
ops = torch.ops.dwindle

ASYMMETRIC = Scheme(kind="asymmetric", granularity="tensor")
W4 = Scheme(bits=4, kind="asymmetric", granularity="group", group_size=8)
STATIC = {"quantize": [{"activation": {"range": "static", "kind": "asymmetric"}}]}
STATIC_CONV = {"quantize": [{"operators": ["conv2d"], "activation": {"range": "static", "kind": "asymmetric"}}]}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(value, dL/dx) where dL/dy is the same random tensor for all."""
    x = x.clone().requires_grad_()
    y = call(x)
    (found,) = torch.autograd.grad(y, x, random(*y.shape, seed=9).to(y.dtype))
    return y.detach(), found


def layer(weight: Scheme, activation: str, dtype: torch.dtype) -> tuple[QuantizedLinear, Callable[[Tensor], Tensor]]:
    """A quantised layer, and the same layer fake-quantised in floating point."""
    q, bias = QTensor.quantize(random(6, 16), weight), random(6, seed=1)
    w, b = q.dequantize().to(dtype), bias.to(dtype)
    dynamic = {"token": A8_TOKEN, "tensor": A8_TENSOR}
    if activation == "none":
        return QuantizedLinear(q, b, activation=None, dtype=dtype), lambda x: F.linear(x, w, b)
    if activation in dynamic:
        module = QuantizedLinear(q, bias, activation=dynamic[activation], dtype=dtype)
        return module, lambda x: F.linear(numerics.fake_quantize(x, dynamic[activation]), w, b)
    scheme = ASYMMETRIC if activation == "asymmetric" else A8_TENSOR
    params = numerics.parameters(random(40, 16, seed=2) * 0.5, scheme)  # half the range: some of x is clipped
    zero = None if params.zero_point is None else params.zero_point - 128
    corrected = bias if zero is None else bias - zero * params.scale * q.dequantize().sum(1)
    ranges = {"input_scale": params.scale, "input_zero_point": zero}
    module = QuantizedLinear(q, corrected, activation=scheme, dtype=dtype, **ranges)
    return module, lambda x: F.linear(numerics.fake_quantize(x, scheme, params), w, b)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),  # measured 2e-7, and .006 where products round to bf16
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize("activation", ["none", "token", "tensor", "symmetric", "asymmetric"])
@pytest.mark.parametrize("weight", [Scheme(), W4], ids=["w8", "w4"])
def test_a_layer_has_the_gradient_of_its_fake_quantised_form(
    weight: Scheme, activation: str, dtype: torch.dtype, tolerance: float
) -> None:
    module, simulated = layer(weight, activation, dtype)
    x = random(3, 5, 16, seed=3).to(dtype)
    value, found = gradient(module, x)
    _, expected = gradient(simulated, x)
    assert error(found, expected) < tolerance
    if activation in ("symmetric", "asymmetric"):
        assert (found == 0).any()  # what was clipped
    with torch.no_grad():
        assert torch.equal(value, module(x))


@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", "w8a16", "w4a8-g32", STATIC], ids=str)
@pytest.mark.parametrize("form", ["graph", "loaded", "module"])
def test_models_pass_gradients_to_their_input(recipe: Any, form: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = random(8, 32)
    small: Any = dwindle.compress(model, recipe, inputs=x, data=[x * 0.6])
    student = dwindle.prepare(model, recipe, inputs=x, data=[x * 0.6])
    expected = gradient(lambda x: x + student(x), x)[1]
    if form == "module":
        small = dwindle.transplant(small, model, inputs=x)
    if form == "loaded":
        small = dwindle.load(small.save(tmp_path / "small"))
    with torch.no_grad():
        value = small(x)
    assert torch.equal(small(x.clone().requires_grad_()), value)
    found = gradient(lambda x: x + small(x), x)[1]
    assert error(found, expected) < 1e-4  # measured 4e-7; a code at an edge may flip


def test_convolutions_pass_gradients_to_their_input() -> None:
    layers = [nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 16, (1, 3), dilation=2)]
    model, x = nn.Sequential(*layers).eval(), random(2, 16, 9, 12)
    small = dwindle.compress(model, STATIC_CONV, inputs=x, data=[x * 0.6])
    (program,) = small.variants.values()
    assert len(program.calls(ops.qconv2d.default)) == 2
    student = dwindle.prepare(model, STATIC_CONV, inputs=x, data=[x * 0.6])
    assert error(gradient(small, x)[1], gradient(student, x)[1]) < 1e-4


def test_the_graph_of_a_compressed_model_stays_as_it_was() -> None:
    model, x = nn.Sequential(nn.Linear(32, 64)).eval(), random(8, 32)
    small = dwindle.compress(model, inputs=x)
    (program,) = small.variants.values()
    before = str(program.graph)
    gradient(small, x)
    assert str(program.graph) == before
    assert len(small.variants) == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_compiled_layers_pass_gradients() -> None:
    torch._dynamo.reset()
    module, _ = layer(Scheme(), "asymmetric", torch.float32)
    x = random(3, 16)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for found, expected in zip(gradient(compiled, x), gradient(module, x), strict=True):
        assert_close(found, expected, "kernel")
    torch._dynamo.reset()


def test_biases_that_train_get_their_gradient() -> None:
    for activation in ("none", "token"):
        module, _ = layer(Scheme(), activation, torch.float32)
        module.bias.requires_grad_()
        y = module(random(3, 16).requires_grad_())
        y.sum().backward()
        assert torch.equal(module.bias.grad, torch.full((6,), 3.0))


def test_codes_alone_would_lose_the_gradient_and_are_refused() -> None:
    x = random(3, 16).requires_grad_()
    for quantize in (lambda: ops.quantize_dynamic(x, "token"), lambda: ops.quantize_static(x, torch.ones(()), None)):
        with pytest.raises(DwindleError, match="carry no gradient"):
            quantize()
        with torch.no_grad():
            quantize()


class _LoRA(nn.Module):
    """y = base(x) + x A B, base frozen (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Module, k: int, n: int) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Parameter(random(k, 4, seed=4) / k), nn.Parameter(random(4, n, seed=5) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


class _Simulated(nn.Module):
    """A QuantizedLinear fake-quantised in floating point."""

    def __init__(self, real: QuantizedLinear) -> None:
        super().__init__()
        self.weight, self.bias = real.weight.dequantize(), real.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(numerics.fake_quantize(x, A8_TOKEN), self.weight, self.bias)


def _adapted(eager: nn.Module) -> list[nn.Parameter]:
    """Adapters on the queries and values of a llama."""
    for block in eager.model.layers:
        attention = block.self_attn
        attention.q_proj = _LoRA(attention.q_proj, 32, 32)
        attention.v_proj = _LoRA(attention.v_proj, 32, 16)
    return [p for p in eager.parameters() if p.requires_grad]


def _simulated(eager: nn.Module) -> nn.Module:
    other = copy.deepcopy(eager)
    for name, module in list(other.named_modules()):
        if isinstance(module, QuantizedLinear):
            owner, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(owner), leaf, _Simulated(module))
    return other


def test_adapters_on_a_transplanted_llama_train() -> None:
    model, inputs = ZOO["llama"]()
    eager = dwindle.transplant(dwindle.compress(model, inputs=inputs), model, inputs=inputs)
    reference = _simulated(eager)
    adapters, references = _adapted(eager), _adapted(reference)
    assert len(adapters) == 2 * 2 * 2
    call = {**inputs, "labels": inputs["input_ids"]}
    optimizer = torch.optim.Adam(adapters, lr=5e-2)
    reference(**call).loss.backward()
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        loss = eager(**call).loss
        loss.backward()
        if step == 0:
            for found, expected in zip(adapters, references, strict=True):
                assert error(found.grad, expected.grad) < 1e-3  # measured 3e-6
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
