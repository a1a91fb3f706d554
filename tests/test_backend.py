"""torch.compile(model, backend="dwindle"): exact where nothing is quantised, integers where something is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import ZOO, first
from numerics import error
from torch import nn
from transformers.pytorch_utils import Conv1D

import dwindle
from dwindle.frontends.packed import PackedWeights
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme

EXACT = {"recipe": {}, "inner": "eager"}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="dwindle", options=options, dynamic=True)


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_exact_when_nothing_is_quantised(name: str, training: bool) -> None:
    model, inputs = ZOO[name]()
    model.train(training)

    def step(call: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        model.zero_grad()
        torch.manual_seed(0)
        output = first(call(**inputs))
        output.float().sin().sum().backward()
        return output.detach(), {n: p.grad for n, p in model.named_parameters()}

    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected, gradients = step(model)
    model.load_state_dict(state)
    found, found_gradients = step(_compiled(model, **EXACT))
    assert torch.equal(found, expected)
    for key, gradient in gradients.items():
        other = found_gradients[key]
        assert (gradient is None) == (other is None), key
        assert gradient is None or torch.equal(gradient, other), key


@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2", "tied_lm"])
def test_inference_is_quantised_as_compress_does_it(name: str) -> None:
    model, inputs = ZOO[name]()
    with torch.no_grad():
        found = first(_compiled(model, inner="eager")(**inputs))
        expected = first(dwindle.compress(model, inputs=inputs)(**inputs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_inductor_runs_the_same_codes(name: str) -> None:
    model, inputs = ZOO[name]()
    with torch.no_grad():
        eager = first(_compiled(model, inner="eager")(**inputs))
        fused = first(_compiled(model)(**inputs))
    assert error(eager, fused) < 5e-3  # other sums may flip a code at an edge; measured 3e-7 and 5e-4


def test_a_compressed_model_compiles_in_one_graph() -> None:
    model, inputs = ZOO["bert"]()
    compressed = dwindle.compress(model, inputs=inputs)
    with torch.no_grad():
        expected = compressed(**inputs)[0]
        found = torch.compile(compressed, fullgraph=True)(**inputs)[0]
    assert error(expected, found) < 5e-3


def test_weights_that_change_are_quantised_again() -> None:
    model, inputs = ZOO["mlp"]()
    compiled = _compiled(model, inner="eager")
    with torch.no_grad():
        before = compiled(**inputs)
        for parameter in model.parameters():
            parameter.mul_(2.0)
        after = compiled(**inputs)
        expected = dwindle.compress(model, inputs=inputs)(**inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, expected)


class _Block(nn.Module):
    """Something of each kind that a graph is called with: weights, a bias, a table, statistics, a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table, self.linear, self.norm = nn.Embedding(9, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.conv1d = Conv1D(24, 16)
        self.register_buffer("shift", torch.zeros(24))
        self.eval()
        _rewrite(self, seed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv1d(self.norm(self.linear(self.table(ids)))) + self.shift
        return y


def _rewrite(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0.5 if tensor.dim() > 1 else -0.1))


IDS = torch.arange(8)
LINEARS = {"quantize": [{"operators": ["linear"]}]}
"""Weights alone are quantised: the table, bias, statistics and buffer are the ones of each call in floating point."""


def _count_packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    packed: list[tuple[int, ...]] = []
    quantize = QTensor.quantize

    def counting(weight: torch.Tensor, *args: Any, **kwargs: Any) -> QTensor:
        packed.append(tuple(weight.shape))
        return quantize(weight, *args, **kwargs)

    monkeypatch.setattr(QTensor, "quantize", counting)
    return packed


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", LINEARS], ids=["all", "linears"])
def test_blocks_that_share_a_graph_have_their_own_weights(inner: str, recipe: Any) -> None:
    blocks = [_Block(seed) for seed in range(3)]
    compiled = [_compiled(block, inner=inner, recipe=recipe) for block in blocks]
    with torch.no_grad():
        for _ in range(2):
            for block, call in zip(blocks, compiled, strict=True):
                assert error(block(IDS), call(IDS)) < 2e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_blocks_in_turn_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [_Block(seed) for seed in range(12)]
    compiled = [_compiled(block, inner="eager", recipe=LINEARS) for block in blocks]
    packed = _count_packed(monkeypatch)
    with torch.no_grad():
        for call in compiled * 3:
            call(IDS)
    assert len(packed) == 2 * len(blocks)


def test_packed_weights_die_with_their_parameters() -> None:
    parameters = [nn.Parameter(torch.randn(4, 8)) for _ in range(3)]
    weights = PackedWeights([(parameters[0], QTensor.quantize(parameters[0], Scheme()))])
    held = weakref.ref(weights([parameters[1]])[0])
    weights([parameters[2]])
    assert held() is not None
    del parameters[1]
    assert held() is None


def _replaced(parameter: nn.Parameter, block: _Block) -> None:
    block.linear.weight = nn.Parameter(parameter.flip(0) * 2)


def _redirected(parameter: nn.Parameter, block: _Block) -> None:
    parameter.data = parameter.flip(0) * 2


def _written(parameter: nn.Parameter, block: _Block) -> None:
    parameter.copy_(parameter.flip(0) * 2)


def _written_as_data(parameter: nn.Parameter, block: _Block) -> None:
    parameter.data.copy_(parameter.flip(0) * 2)


def _added_as_data(parameter: nn.Parameter, block: _Block) -> None:
    parameter.data += parameter.flip(0) * 2


def _everything(parameter: nn.Parameter, block: _Block) -> None:
    _rewrite(block, 7)


def _loaded(parameter: nn.Parameter, block: _Block) -> None:
    block.load_state_dict(_Block(7).state_dict())


WRITES = (_replaced, _redirected, _written, _written_as_data, _added_as_data, _everything, _loaded)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__.strip("_"))
def test_every_way_to_write_a_weight_is_seen(
    write: Callable[[nn.Parameter, _Block], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = _Block(0)
    compiled = _compiled(block, inner="eager", recipe=LINEARS)
    with torch.no_grad():
        compiled(IDS)
        write(block.linear.weight, block)
        assert error(block(IDS), compiled(IDS)) < 2e-2
        packed = _count_packed(monkeypatch)
        compiled(IDS)
        assert not packed


def test_a_write_to_a_few_values_of_data_is_seen_after_a_reset() -> None:
    block = _Block(0)
    compiled = _compiled(block, inner="eager", recipe=LINEARS)
    with torch.no_grad():
        compiled(IDS)
        block.linear.weight.data[0] *= 50
        torch.compiler.reset()
        assert error(block(IDS), compiled(IDS)) < 2e-2


@pytest.mark.parametrize("shape", [(16, 16), (16, 24)], ids=["square", "oblong"])
def test_transposed_weights_are_packed_again_transposed(shape: tuple[int, int]) -> None:
    layer, x = Conv1D(shape[1], shape[0]).eval(), torch.randn(5, shape[0])
    compiled = _compiled(layer, inner="eager")
    with torch.no_grad():
        for _ in range(2):
            layer.weight.copy_(torch.randn(shape))
            assert error(layer(x), compiled(x)) < 2e-2


@pytest.mark.parametrize("channels", [3, 16], ids=["stored only", "integer"])
def test_filters_are_packed_again_as_filters(channels: int) -> None:
    layer, x = nn.Conv2d(channels, 8, 3).eval(), torch.randn(2, channels, 8, 8)
    compiled = _compiled(layer, inner="eager", recipe={"quantize": [{"operators": ["conv2d"]}]})
    with torch.no_grad():
        for _ in range(2):
            layer.weight.copy_(torch.randn(layer.weight.shape))
            assert error(layer(x), compiled(x)) < 2e-2


@pytest.mark.parametrize("name", ["gpt2", "tied_lm"])
def test_a_state_that_is_loaded_is_packed_again(name: str) -> None:
    model, inputs = ZOO[name]()
    compiled = _compiled(model, inner="eager")
    with torch.no_grad():
        compiled(**inputs)
        model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
        found = first(compiled(**inputs))
        torch._dynamo.reset()
        expected = first(_compiled(model, inner="eager")(**inputs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_statistics_are_written_to_the_module_of_the_call(inner: str, grad: bool) -> None:
    blocks, plain = [_Block(seed).train() for seed in range(2)], [_Block(seed).train() for seed in range(2)]
    compiled = [_compiled(block, inner=inner, recipe=LINEARS) for block in blocks]
    with torch.set_grad_enabled(grad):
        for call, block, other in zip(compiled, blocks, plain, strict=True):
            assert error(other(IDS).detach(), call(IDS).detach()) < 2e-2
            assert int(block.norm.num_batches_tracked) == int(other.norm.num_batches_tracked)
            assert error(other.norm.running_mean, block.norm.running_mean) < 2e-2


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_is_token_identical_when_nothing_is_quantised(name: str) -> None:
    model, inputs = ZOO[name]()
    prompt = {k: v[:1, :5] for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    expected = model.generate(**prompt, **settings)
    model.forward = _compiled(model.forward, **EXACT)
    assert torch.equal(model.generate(**prompt, **settings), expected)


def test_generate_runs_in_int8() -> None:
    model, inputs = ZOO["llama"]()
    model.forward = _compiled(model.forward, inner="eager")
    tokens = model.generate(input_ids=inputs["input_ids"][:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, inputs["input_ids"].shape[1] + 4)


@pytest.mark.parametrize("options", [{"recipe": "zeroquant-w8a8", "inward": 1}, {"inner": "nothing"}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    model, inputs = ZOO["mlp"]()
    with pytest.raises(Exception, match="options of the dwindle backend"):
        _compiled(model, **options)(**inputs)


def test_static_recipes_are_refused() -> None:
    model, inputs = ZOO["mlp"]()
    with pytest.raises(Exception, match="calibration data"), torch.no_grad():
        _compiled(model, recipe="static-w8a8")(**inputs)
