"""torch.compile(model, backend="dwindle"): exact where nothing is quantised, integers where something is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import ZOO
from numerics import error
from torch import nn

import dwindle

EXACT = {"recipe": {}, "inner": "eager"}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="dwindle", options=options, dynamic=True)


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_exact_when_nothing_is_quantised(name: str, training: bool) -> None:
    model, inputs = ZOO[name]()
    model.train(training)

    def step(call: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        model.zero_grad()
        torch.manual_seed(0)
        output = _first(call(**inputs))
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
        found = _first(_compiled(model, inner="eager")(**inputs))
        expected = _first(dwindle.compress(model, inputs=inputs)(**inputs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_inductor_runs_the_same_codes(name: str) -> None:
    model, inputs = ZOO[name]()
    with torch.no_grad():
        eager = _first(_compiled(model, inner="eager")(**inputs))
        fused = _first(_compiled(model)(**inputs))
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
