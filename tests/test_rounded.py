"""compress() with weights rounded by data: layer after layer, alike in every variant, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from by_data import SMOOTH, W4, batches, mlp, packed, recipe, worst
from models import ZOO, first
from torch import Tensor, nn

import dwindle
from dwindle.frontends import compress as compressing
from dwindle.frontends.recipe import Recipe
from dwindle.passes.progress import Advance
from dwindle.passes.quantize import rounded as rounding
from dwindle.passes.quantize.clip import clip
from dwindle.passes.quantize.gptq import gptq, gram
from dwindle.runtime.errors import CalibrationError, RecipeError
from dwindle.runtime.plan import Plan
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_both_err_less_than_rounding_to_nearest_and_are_saved(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = batches(inputs)
    nearest = worst(dwindle.compress(model, recipe("nearest"), inputs=inputs), model, data)
    for method in ("gptq", "awq"):
        small = dwindle.compress(model, recipe(method), inputs=inputs, data=data)
        assert worst(small, model, data) < nearest
        assert small.certificate.lowering_error < 1e-5
        assert small.certificate.simulated == 0
        again = dwindle.load(small.save(tmp_path / method))
        assert torch.equal(first(again(**inputs)), first(small(**inputs)))
        assert {edit.method for edit in again.plan.quantizations} == {method}
        assert again.plan == small.plan
        assert Plan.from_json(small.plan.to_json()) == small.plan
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_a_layer_is_rounded_for_what_the_rounded_layers_before_it_give(method: str, kind: str) -> None:
    model, data = mlp()
    small = dwindle.compress(
        model,
        {"quantize": [{"weight": {"bits": 4, "group_size": 8, "kind": kind, "method": method}}]},
        inputs=data[0],
        data=data,
    )
    scheme = Scheme(bits=4, granularity="group", group_size=8, kind=kind)  # type: ignore[arg-type]  # a kind
    store, xs = small.store, data
    assert small.store.forms["0.weight"] == rounding.ROUNDED
    for layer, activation in ((0, torch.relu), (2, nn.functional.gelu), (5, None)):
        weight, qtensor = store.get(f"{layer}.weight"), packed(small)[f"{layer}.weight"]
        assert isinstance(weight, QTensor)
        w = model[layer].weight.detach()
        if method == "awq":  # the first layer's rows and the second's columns share a scale; see below
            continue
        found = gptq(w, gram(xs, w.shape[1])[0], scheme)
        assert torch.equal(qtensor.dequantize(), found.weight)
        assert torch.equal(qtensor.scale, found.params.scale)
        bias = model[layer].bias
        xs = [nn.functional.linear(x, found.weight, bias) for x in xs]
        xs = [activation(x) for x in xs] if activation is not None else xs
    if method == "awq":
        last, xs = packed(small)["5.weight"], data
        for layer, activation in ((0, torch.relu), (2, nn.functional.gelu)):
            bias = store.get(f"{layer}.bias")
            assert isinstance(bias, Tensor)
            xs = [activation(nn.functional.linear(x, packed(small)[f"{layer}.weight"].dequantize(), bias)) for x in xs]
        found = clip(model[5].weight, gram(xs, 24)[0], scheme)  # gelu lets no scale through
        assert torch.equal(last.dequantize(), found.weight)


def test_layers_that_share_an_input_share_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ZOO["llama"]()
    calls, seen = [], []
    monkeypatch.setattr(rounding, "gram", lambda *args: calls.append(args) or gram(*args))

    @contextmanager
    def shown(name: str, *, quiet: bool) -> Iterator[Advance]:
        yield lambda done, total: None if quiet else seen.append((name, done, total))

    monkeypatch.setattr(compressing, "late", shown)
    dwindle.compress(
        model,
        recipe("gptq"),
        inputs=inputs,
        data=batches(inputs),
    )
    assert len(calls) == 2 * 4 + 1  # QKV, output, gate and up, down; the head
    assert seen == [("Rounding by data", i, 15) for i in range(1, 16)]
    seen.clear()
    dwindle.compress(model, recipe("gptq"), inputs=inputs, data=batches(inputs), quiet=True)
    assert not seen


class Twice(nn.Module):
    """One layer that is called twice, on different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 16) -> (B, 16)."""
        return self.shared(torch.tanh(self.own(torch.sin(self.shared(x)))))


def test_a_weight_that_two_calls_read_is_rounded_once_for_both_inputs() -> None:
    torch.manual_seed(0)
    model, data = Twice().eval(), [torch.randn(30, 16) for _ in range(2)]
    small = dwindle.compress(model, recipe("gptq"), inputs=data[0], data=data)
    own = packed(small)["own.weight"].dequantize()
    with torch.no_grad():  # the first call is not rounded yet when it is run
        later = [torch.tanh(nn.functional.linear(torch.sin(model.shared(x)), own, model.own.bias)) for x in data]
    both = gram(data, 16)[0] + gram(later, 16)[0]
    assert torch.equal(packed(small)["shared.weight"].dequantize(), gptq(model.shared.weight, both, W4).weight)
    declined = dwindle.compress(model, recipe("awq"), inputs=data[0], data=data)
    reasons = [e.reason for e in declined.log if e.rule == "equalize.fold" and not e.applied]
    assert "shared.weight is read by several calls" in reasons


def test_a_head_that_is_also_looked_up_is_rounded_to_nearest() -> None:
    model, inputs = ZOO["tied_lm"]()
    data = [{"input_ids": torch.randint(3, 99, (4, 8))} for _ in range(3)]
    both = {
        "quantize": [*recipe("gptq")["quantize"], {"operators": "embedding", "weight": {"bits": 4, "group_size": 16}}]
    }
    small = dwindle.compress(model, both, inputs=inputs, data=data)
    methods = {edit.fqn: edit.method for edit in small.plan.quantizations}
    assert methods == {"embedding.weight": "nearest", "up.weight": "gptq", "down.weight": "gptq"}
    expected = QTensor.quantize(model.embedding.weight, W4)
    assert torch.equal(packed(small)["embedding.weight"].codes, expected.codes)
    assert [e.where for e in small.log if e.rule == "decide.gptq"] == ["embedding.weight"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_after_pruning_and_zeros_and_fewer_layers(method: str) -> None:
    model, inputs = ZOO["llama"]()
    whole = {
        "depth": {"keep": 1},
        "sparsify": {"ratio": 0.5, "pattern": "2:4"},
        **recipe(method, kind="asymmetric"),
    }
    small = dwindle.compress(model, whole, inputs=inputs, data=batches(inputs))
    for name in small.plan.patterns:
        qtensor = packed(small)[name]
        assert float((qtensor.dequantize().reshape(-1, 4).count_nonzero(1) <= 2).double().mean()) == 1
    logits = small(**inputs).logits
    assert torch.equal(small(**inputs, labels=inputs["input_ids"]).logits, logits)
    cut = {"prune": {"ratio": 0.25, "scopes": "rows"}, **recipe(method, group_size=None)}
    small = dwindle.compress(model, cut, inputs=inputs, data=batches(inputs))
    assert packed(small)["model.layers.0.mlp.up_proj.weight"].shape == (36, 32)
    assert torch.equal(small(**inputs, labels=inputs["input_ids"]).logits, small(**inputs).logits)


@pytest.mark.parametrize(
    ("weight", "operators", "said"),
    [
        ({"method": "optq"}, "linear", r"method is not right"),
        ({"method": "gptq"}, "embedding", r"method 'gptq'[\s\S]*found: embedding"),
        ({"method": "awq"}, ["linear", "embedding"], r"give the others a rule of their own"),
        ({"method": "gptq", "kind": "ternary", "bits": 2}, "linear", r"found: kind 'ternary'"),
        ({"method": "gptq", "kind": "binary", "bits": 1}, "linear", r"found: kind 'binary'"),
        ({"method": "gptq", "rounding": "stochastic"}, "linear", r"rounding 'stochastic'"),
        ({"method": "awq", "learned": True}, "linear", r"a learned scale"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(weight: dict[str, Any], operators: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.of({"quantize": [{"operators": operators, "weight": weight}]})


def test_smooth_is_a_share_of_linear_layers() -> None:
    with pytest.raises(RecipeError, match="smooth"):
        Recipe.of({"quantize": [{"activation": {"smooth": 1.5}}]})
    with pytest.raises(RecipeError, match="operators 'linear'"):
        Recipe.of({"quantize": [{"operators": "conv2d", "activation": {"smooth": 0.5}}]})
    both = {"quantize": [{"weight": {"method": "awq"}, "activation": {"smooth": 0.5}}]}
    model, data = mlp()
    with pytest.raises(RecipeError, match="is to be scaled twice"):
        dwindle.compress(model, both, inputs=data[0], data=data)


def test_data_that_is_missing_or_not_finite_is_said_to_be() -> None:
    model, data = mlp()
    with pytest.raises(CalibrationError, match=r"(?s)has method 'gptq'.*calibration data.*cure"):
        dwindle.compress(model, recipe("gptq", group_size=8), inputs=data[0])
    with pytest.raises(CalibrationError, match=r"(?s)has smooth.*cure"):
        dwindle.compress(model, SMOOTH, inputs=data[0])
    for given in (recipe("gptq", group_size=8), recipe("awq", group_size=8), SMOOTH):
        with pytest.raises(CalibrationError, match="calibration data is empty"):
            dwindle.compress(model, given, inputs=data[0], data=[])
        with pytest.raises(CalibrationError, match="not finite"):
            dwindle.compress(model, given, inputs=data[0], data=[data[0], data[1] * torch.inf])


@pytest.mark.parametrize("given", [recipe("gptq", group_size=8), recipe("awq"), SMOOTH], ids=["gptq", "awq", "smooth"])
def test_training_and_the_backend_refuse_them(given: dict[str, Any]) -> None:
    model, data = mlp()
    with pytest.raises(RecipeError, match=r"(?s)training.*cannot round.*cure: dwindle\.compress"):
        dwindle.prepare(model, given, inputs=data[0], data=data)
    compiled = torch.compile(model, backend="dwindle", options={"recipe": given})
    with torch.no_grad(), pytest.raises(Exception, match=r"no calibration data|static activations"):
        compiled(data[0])


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_any_data_is_read_once_from_the_caller(kind: str) -> None:
    model, data = mlp()
    taken = itertools.count()
    given = {
        "quantize": [
            {
                "weight": {"bits": 4, "group_size": 8, "method": "gptq"},
                "activation": {"range": "static", "kind": kind, "smooth": 0.5},
            }
        ]
    }
    small = dwindle.compress(model, given, inputs=data[0], data=(x for x in data if next(taken) >= 0))
    assert next(taken) == len(data)
    assert small.certificate.lowering_error < 1e-5
    assert {e.rule for e in small.log if e.applied} >= {"equalize.fold", "round.gptq"}
