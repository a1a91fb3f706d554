"""Curvature against Hessians that are known or can be formed, and what it must leave alone."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import ZOO
from torch import Tensor, nn

from dwindle.passes.quantize.sensitivity import Curvature, Sensitivity, eigenvalues, traces
from dwindle.runtime.errors import ArtifactError, CalibrationError

Loss = Callable[[], Tensor]
Blocks = dict[str, list[nn.Parameter]]
MEASURES = (eigenvalues, traces)

# Measured over 1,500 random symmetric matrices of 2 to 8 rows whose second eigenvalue is at most 0.6 of the top
# one: never more than 1.7e-6 below the top, nor 1.4e-7 above
TIGHT: dict[str, Any] = {"tolerance": 1e-5}
WITHIN = 1e-4
ROUNDING = 1e-6


def quadratic(hessian: Tensor) -> tuple[Loss, Blocks]:
    """x' H x / 2 with x in one block."""
    x = nn.Parameter(torch.zeros(len(hessian), dtype=hessian.dtype))
    return lambda: 0.5 * x @ hessian @ x, {"x": [x]}


def of(hessian: Tensor, **options: Any) -> Curvature:
    return eigenvalues(*quadratic(hessian), **options).blocks["x"]


def diagonal(*spectrum: float) -> Tensor:
    return torch.diag(torch.tensor(spectrum))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(spectrum: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(normal(len(spectrum), len(spectrum), seed=seed)).Q
    return (basis * spectrum) @ basis.T


def network(dtype: torch.dtype = torch.float32, *, dropout: float = 0.0) -> tuple[Loss, Blocks]:
    """A smooth MLP of three blocks with weights and biases, on 16 examples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)]
        model = nn.Sequential(layers[0], nn.Tanh(), nn.Dropout(dropout), layers[1], nn.GELU(), layers[2]).to(dtype)
    x, labels = normal(16, 5).to(dtype), torch.arange(16) % 3
    blocks = {f"layer.{i}": list(layer.parameters()) for i, layer in enumerate(layers)}
    return lambda: nn.functional.cross_entropy(model(x), labels), blocks


def exact(loss: Loss, block: list[nn.Parameter]) -> Tensor:
    """The block's Hessian, formed column by column."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), block, create_graph=True)])
    rows = [torch.autograd.grad(g, block, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [
        ((3.0, -3.0), 3.0),  # the Rayleigh quotient of these stands still wherever it starts
        ((-3.0, 3.0, -3.0, 0.1), 3.0),
        ((1.0, 0.5, 0.1), 1.0),
        ((-4.0, 1.0, 0.5), 4.0),
        ((0.0, 0.0, 7.0, 0.0), 7.0),
        ((2.0,), 2.0),
        ((0.0, 0.0), 0.0),
        ((1e9, 1e3), 1e9),
    ],
)
def test_a_known_spectrum_gives_its_largest_magnitude(spectrum: tuple[float, ...], expected: float) -> None:
    found = of(diagonal(*spectrum), **TIGHT)
    assert found.value == pytest.approx(expected, rel=WITHIN)
    assert found.converged
    assert found.finite
    assert abs(found.rayleigh) <= found.value * (1 + ROUNDING)
    if -expected not in spectrum or expected not in spectrum:  # one sign at the top
        assert found.rayleigh == pytest.approx(max(spectrum, key=abs), rel=WITHIN)


def test_growth_never_falls_and_a_limit_on_iterations_is_a_lower_bound() -> None:
    hessian = rotated(torch.tensor([1.0, -0.9, 0.8, 0.3, -0.2], dtype=torch.float64))
    found = [of(hessian, iterations=n, tolerance=0.0) for n in range(1, 30)]
    values = [c.value for c in found]
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(values))
    assert values[-1] <= 1 + 1e-12
    assert [c.iterations for c in found] == list(range(1, 30))
    assert not found[0].converged


@given(
    size=st.integers(2, 8),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from((1e-9, 1e-3, 1.0, 1e4)),
    sign=st.sampled_from((-1.0, 1.0)),
)
def test_random_symmetric_matrices(size: int, seed: int, scale: float, sign: float) -> None:
    spectrum = normal(size, seed=seed).clamp(-3, 3) * (0.6 / 3)
    spectrum[0] = sign  # the others are at most 0.6
    hessian = rotated(spectrum * scale, seed).float()
    hessian = (hessian + hessian.T) / 2
    top = float(torch.linalg.eigvalsh(hessian.double()).abs().max())
    found = of(hessian, stability=0.0, **TIGHT)
    assert found.value <= top * (1 + ROUNDING)
    assert found.value >= top * (1 - WITHIN)
    assert of(hessian, seed=seed).value <= top * (1 + ROUNDING)


def test_blocks_of_a_network_against_their_hessians() -> None:
    loss, blocks = network(torch.float64)
    found = eigenvalues(loss, blocks, tolerance=1e-7, iterations=1000)
    for name, block in blocks.items():
        spectrum = torch.linalg.eigvalsh(exact(loss, block))
        assert found.blocks[name].value == pytest.approx(float(spectrum.abs().max()), rel=1e-4)
        assert found.blocks[name].parameters == len(spectrum)
    by_default = eigenvalues(loss, blocks)
    for name in blocks:
        assert by_default.blocks[name].value == pytest.approx(found.blocks[name].value, rel=0.05)
    assert by_default.products == sum(c.iterations for c in by_default.blocks.values())
    assert str(by_default.products) in by_default.cost


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
def test_the_comparison_agrees_with_torch_func() -> None:
    w, hidden, labels = nn.Parameter(normal(3, 4)), normal(16, 4, seed=1), torch.arange(16) % 3

    def loss(w: Tensor = w) -> Tensor:
        return nn.functional.cross_entropy((hidden @ w.T).tanh(), labels)

    formed = torch.func.hessian(loss)(w.detach()).reshape(12, 12)
    torch.testing.assert_close(exact(loss, [w]), formed)
    found = eigenvalues(loss, {"w": [w]}, tolerance=1e-7, iterations=1000).blocks["w"]
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(formed).abs().max()), rel=1e-4)


def test_traces_of_a_network_are_within_their_standard_errors() -> None:
    loss, blocks = network(torch.float64)
    found = traces(loss, blocks, samples=400)
    assert found.products == 400
    for name, block in blocks.items():
        curvature, hessian = found.blocks[name], exact(loss, block)
        assert curvature.standard_error is not None
        assert abs(curvature.value - float(hessian.trace()) / len(hessian)) < 3 * curvature.standard_error
        assert 0 < curvature.standard_error < 0.5 * curvature.value
    few = traces(loss, blocks, samples=4)
    assert all(few.blocks[name].standard_error > found.blocks[name].standard_error for name in blocks)


def test_the_trace_of_a_diagonal_is_exact_from_one_sample() -> None:
    found = traces(*quadratic(diagonal(1.0, -2.0, 7.0)), samples=1).blocks["x"]
    assert found.value == pytest.approx(2.0)
    assert found.standard_error is None
    assert traces(*quadratic(diagonal(1.0, -2.0, -7.0)), samples=3).blocks["x"].value == pytest.approx(-8 / 3)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_seed_decides_everything(measure: Callable[..., Sensitivity]) -> None:
    loss, blocks = network(dropout=0.5)
    once, again, other = measure(loss, blocks), measure(loss, blocks), measure(loss, blocks, seed=1)
    assert once == again
    assert once != other


@pytest.mark.parametrize("measure", MEASURES)
def test_the_order_of_blocks_does_not_matter(measure: Callable[..., Sensitivity]) -> None:
    loss, blocks = network()
    found = measure(loss, blocks)
    turned = measure(loss, dict(reversed(blocks.items())))
    assert list(turned.blocks) == list(reversed(blocks))
    assert turned.blocks == found.blocks


def test_an_eigenvalue_does_not_depend_on_other_blocks() -> None:
    loss, blocks = network()
    found = eigenvalues(loss, blocks)
    for name, block in blocks.items():
        alone = eigenvalues(loss, {name: block}).blocks[name]
        assert alone.value == pytest.approx(found.blocks[name].value, rel=ROUNDING)
        assert alone.iterations == found.blocks[name].iterations


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_and_random_state_stay(measure: Callable[..., Sensitivity]) -> None:
    loss, blocks = network(dropout=0.5)
    parameters = [p for block in blocks.values() for p in block]
    parameters[0].grad = kept = torch.ones_like(parameters[0])
    values, state = [p.detach().clone() for p in parameters], torch.get_rng_state()
    measure(loss, blocks)
    assert torch.equal(torch.get_rng_state(), state)
    assert parameters[0].grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for p in parameters[1:])
    assert all(map(torch.equal, parameters, values))


def test_the_loss_is_called_once_and_all_products_see_its_dropout() -> None:
    loss, blocks = network(torch.float64, dropout=0.5)
    calls = []

    def counted() -> Tensor:
        calls.append(torch.get_rng_state())
        return loss()

    found = eigenvalues(counted, blocks, tolerance=1e-7, iterations=1000)
    assert len(calls) == 1

    def replayed() -> Tensor:
        torch.set_rng_state(calls[0])
        return loss()

    with torch.random.fork_rng(devices=[]):
        top = max(torch.linalg.eigvalsh(exact(replayed, blocks["layer.0"])).abs().tolist())
    assert found.blocks["layer.0"].value == pytest.approx(top, rel=1e-4)


class Once(torch.autograd.Function):
    """Twice its input, with no second derivative: autograd would take it for zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def fused(q: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return nn.functional.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("tail", [None, torch.sum, Once.apply, fused])
def test_nothing_holds_the_graph_afterwards(measure: Callable[..., Sensitivity], tail: Any) -> None:
    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    loss, blocks = network()
    held: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        held.append(weakref.ref(saved := Saved(tensor.detach())))
        return saved

    def watched() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            found = loss()
            return found if tail is None else found + tail(blocks["layer.1"][0][None, None]).square().sum()

    error = None  # with its traceback
    try:
        measure(watched, blocks)
    except CalibrationError as raised:
        error = raised
    assert (error is not None) == (tail in (Once.apply, fused))
    x = nn.Parameter(torch.ones(()))
    torch.autograd.grad(x * x, [x])  # torch's queue holds the rest of a failed backward until the next one
    gc.collect()
    assert held
    assert not [ref for ref in held if ref() is not None]


def test_a_block_that_is_not_finite_is_the_most_sensitive() -> None:
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    found = eigenvalues(lambda: good.square().sum() + bad.sqrt().sum(), {"bad": [bad], "good": [good]})
    assert not found.blocks["bad"].finite
    assert not found.blocks["bad"].converged
    assert found.blocks["bad"].iterations == 1
    assert found.blocks["good"].value == pytest.approx(2.0)
    assert found.normalized() == {"bad": 1.0, "good": 1.0}
    mean = traces(lambda: good.square().sum() + bad.sqrt().sum(), {"bad": [bad], "good": [good]}, samples=5)
    assert [c.finite for c in mean.blocks.values()] == [False, True]
    assert [c.iterations for c in mean.blocks.values()] == [1, 5]
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["blocks"]["bad"]["value"] == 0.0


@pytest.mark.parametrize("measure", MEASURES)
def test_frozen_unreached_and_linear_parameters_bend_nothing(measure: Callable[..., Sensitivity]) -> None:
    used, frozen, unreached, linear = (nn.Parameter(torch.ones(2)) for _ in range(4))
    frozen.requires_grad_(False)
    blocks = {
        "mixed": [frozen, used, unreached, used],
        "frozen": [frozen],
        "unreached": [unreached],
        "linear": [linear],
        "empty": [],
    }
    found = measure(lambda: (used * frozen).square().sum() + linear.sum(), blocks)
    assert [c.value for c in found.blocks.values()] == pytest.approx([2.0, 0.0, 0.0, 0.0, 0.0])
    assert [c.parameters for c in found.blocks.values()] == [2, 0, 0, 2, 0]
    assert found.factors() == {"mixed": 5, "frozen": 1, "unreached": 1, "linear": 1, "empty": 1}
    assert measure(lambda: used.square().sum(), {}).blocks == {}


def test_a_parameter_in_two_blocks_counts_in_both() -> None:
    shared, own = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    found = traces(lambda: 3 * shared.square().sum() + own.square().sum(), {"a": [shared], "b": [own, shared]})
    assert [c.value for c in found.blocks.values()] == pytest.approx([6.0, 4.0])


def test_normalized_is_a_share_of_the_largest_and_factors_follow_moq() -> None:
    def share(values: list[float], **options: Any) -> Sensitivity:
        blocks = {str(i): Curvature(value=v, **options) for i, v in enumerate(values)}
        return Sensitivity(measure="eigenvalue", blocks=blocks, products=1, seconds=0.0)

    found = share([8.0, 0.0, 2.0, 3.99, 4.0, 6.0, -8.0])
    assert list(found.normalized().values()) == [1.0, 0.0, 0.25, 3.99 / 8, 0.5, 0.75, 1.0]
    assert list(found.factors().values()) == [5, 1, 2, 2, 3, 4, 5]
    assert set(share([0.0, 0.0]).normalized().values()) == {0.0}
    assert set(share([0.0, 3.0], finite=False).factors().values()) == {5}


@pytest.mark.parametrize("measure", MEASURES)
def test_json_there_and_back(measure: Callable[..., Sensitivity]) -> None:
    found = measure(*network())
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Sensitivity.from_json(json.loads(text)) == found
    for damaged in ({}, {"blocks": []}, json.loads(text) | {"other": 1}, {"blocks": {"a": {"value": 1, "odd": 2}}}):
        with pytest.raises(ArtifactError, match="measure it again"):
            Sensitivity.from_json(damaged)


@pytest.mark.parametrize("measure", MEASURES)
def test_losses_that_cannot_be_measured(measure: Callable[..., Sensitivity]) -> None:
    x = nn.Parameter(torch.ones(2))
    q = nn.Parameter(normal(1, 1, 4, 8).float())
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: x * x, r"not a scalar[\s\S]*required[\s\S]*shape \[2\][\s\S]*cure"),
        (lambda: 3.0, r"not a scalar[\s\S]*float[\s\S]*cure"),
        (lambda: x.sum() * math.nan, "not finite"),
        (lambda: x.detach().sum(), r"no gradient graph[\s\S]*required[\s\S]*found[\s\S]*cure"),
        (lambda: fused(q).square().sum(), r"differentiated twice[\s\S]*not implemented[\s\S]*cure"),
        (lambda: Once.apply(x).square().sum(), r"differentiated twice[\s\S]*once_differentiable[\s\S]*cure"),
    ]
    for loss, message in cases:
        with pytest.raises(CalibrationError, match=message):
            measure(loss, {"x": [x, q]})
    with pytest.raises(CalibrationError, match="1 or more"):
        measure(lambda: x.square().sum(), {"x": [x]}, **{"iterations" if measure is eigenvalues else "samples": 0})


def test_it_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        assert of(diagonal(2.0, 2.0)).value == pytest.approx(2.0)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),  # H, v and H v are rounded; measured 2.9e-3 and 1.2e-3
    [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_half_precision_is_summed_in_full(dtype: torch.dtype, tolerance: float) -> None:
    x = nn.Parameter(torch.zeros(20_000, dtype=dtype))  # a bf16 sum of its squares would stop at 256
    found = eigenvalues(lambda: 1.5 * x.float().square().sum(), {"x": [x]}).blocks["x"]
    assert found.value == pytest.approx(3.0, rel=tolerance)
    mean = traces(lambda: 1.5 * x.float().square().sum(), {"x": [x]}, samples=2).blocks["x"]
    assert mean.value == pytest.approx(3.0, rel=tolerance)
    small = rotated(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)).to(dtype)
    assert of(small).value == pytest.approx(2.0, rel=tolerance)


@pytest.mark.parametrize("training", [False, True])
def test_blocks_of_an_encoder_with_fused_attention(training: bool) -> None:
    model, inputs = ZOO["bert"]()
    model.train(training)
    blocks = {f"encoder.layer.{i}": list(layer.parameters()) for i, layer in enumerate(model.encoder.layer)}

    def loss() -> Tensor:
        return model(**inputs).pooler_output.square().mean()

    found = eigenvalues(loss, blocks, tolerance=1e-4)
    assert all(c.finite and c.converged and c.value > 0 for c in found.blocks.values())
    assert {c.parameters for c in found.blocks.values()} == {8544}
    assert max(found.normalized().values()) == 1.0
    assert max(found.factors().values()) == 5
    assert all(c.finite for c in traces(loss, blocks, samples=2).blocks.values())
