"""compress() with weights rounded by data and scales moved into weights: sequential, alike in every variant, exact."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO
from numerics import assert_close
from torch import Tensor, nn

import dwindle
from dwindle.frontends import compress as compressing
from dwindle.frontends.capture import capture
from dwindle.frontends.recipe import Recipe
from dwindle.passes.canonicalize import TO_LINEAR, canonicalize
from dwindle.passes.quantize import rounded as rounding
from dwindle.passes.quantize.clip import clip
from dwindle.passes.quantize.decide import decide
from dwindle.passes.quantize.equalize import find_folds, refold
from dwindle.passes.quantize.gptq import gptq, gram
from dwindle.passes.rewrite import apply_rules
from dwindle.passes.waiting import Advance
from dwindle.runtime.errors import CalibrationError, RecipeError
from dwindle.runtime.plan import Plan
from dwindle.runtime.program import Program
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme
from dwindle.runtime.store import Store

W4 = Scheme(bits=4, granularity="group", group_size=16)
SMOOTH = {"quantize": [{"activation": {"range": "static", "smooth": 0.5}}]}


def recipe(method: str, **more: Any) -> dict[str, Any]:
    return {"quantize": [{"weight": {"bits": 4, "group_size": 16, "method": method, **more}}]}


def batches(inputs: dict[str, Tensor], count: int = 6) -> list[dict[str, Tensor]]:
    """Other inputs of the same kind."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            name: torch.randint(3, 99, (4, 16), generator=generator)
            if name == "input_ids"
            else (torch.ones if name == "attention_mask" else torch.zeros)(4, 16, dtype=torch.int64)
            for name in inputs
        }
        for _ in range(count)
    ]


def first(output: Any) -> Tensor:
    value: Tensor = next(iter(output.values())) if hasattr(output, "values") else output
    return value


def worst(small: Any, model: nn.Module, data: list[Any]) -> float:
    with torch.no_grad():
        pairs = [(first(small(**batch)).double(), first(model(**batch)).double()) for batch in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def packed(small: dwindle.Compressed) -> dict[str, QTensor]:
    return {name: value for name, value in small.store.entries() if isinstance(value, QTensor)}


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


def mlp() -> tuple[nn.Sequential, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model, _ = ZOO["mlp"]()
    mixing = torch.randn(16, 16, generator=generator)
    return model, [torch.randn(20, 16, generator=generator) @ mixing for _ in range(3)]  # type: ignore[return-value]


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
    def shown(name: str) -> Iterator[Advance]:
        yield lambda done, total: seen.append((name, done, total))

    monkeypatch.setattr(compressing, "late", shown)
    dwindle.compress(
        model,
        recipe("gptq"),
        inputs=inputs,
        data=batches(inputs),
    )
    assert len(calls) == 2 * 4 + 1  # QKV, output, gate and up, down; the head
    assert seen == [("Rounding by data", i, 15) for i in range(1, 16)]


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


@pytest.mark.parametrize("given", [recipe("gptq"), recipe("awq", kind="asymmetric"), SMOOTH])
def test_a_second_variant_has_the_same_codes(given: dict[str, Any]) -> None:
    model, inputs = ZOO["llama"]()
    data = batches(inputs)
    small = dwindle.compress(model, given, inputs=inputs, data=iter(data))
    names, before = set(packed(small)), first(small(**inputs))
    labelled = small(**inputs, labels=inputs["input_ids"])
    assert torch.equal(labelled.logits, before)
    assert len(small.variants) == 2
    assert set(packed(small)) == names
    assert len(names) == 15
    # Here the last norm is read by the output as well as by the head, so what it gave up is given back.
    hidden = small(**inputs, output_hidden_states=True)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert_close(hidden.logits, before, "approximate")
    relative = float((hidden.hidden_states[-1] - expected).norm() / expected.norm())
    assert relative < 0.2  # of weights in 4 bits; .02 in 8
    assert set(packed(small)) == names


class Gate(nn.Module):
    """A norm, a gate, and an output that may be asked for what lies between."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = norm, nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, details: bool = False) -> Any:
        """(B, 16) -> (B, 8)."""
        y = self.norm(self.before(x))
        up = self.up(y)
        y = self.after(torch.relu(self.down(nn.functional.silu(self.gate(y)) * up)))
        return (y, up) if details else y


def gated(norm: str, dtype: torch.dtype = torch.float32) -> tuple[Gate, list[Tensor]]:
    torch.manual_seed(0)
    model = Gate(nn.LayerNorm(16) if norm == "layer" else nn.RMSNorm(16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    sizes = torch.exp(torch.randn(16))
    return model.eval().to(dtype), [(torch.randn(10, 16) * sizes).to(dtype) for _ in range(3)]


def folded(model: nn.Module, data: list[Any], given: Any) -> tuple[Program, Program, Any]:
    """(as captured, folded, folds) of a model's graph; nothing is quantised."""
    inputs = data[0] if isinstance(data[0], dict) else {"x": data[0]}
    program = canonicalize(capture(model, inputs, Store.borrowing(model)))
    apply_rules(program, TO_LINEAR, "linearize")
    plain = program.copy(program.store.fork())
    edits = tuple(decide(program, Recipe.of(given).rules()))
    flat = [list(batch.values()) if isinstance(batch, dict) else [batch] for batch in data]
    folds = find_folds(program, edits, flat, lambda done, total: None)
    return plain, refold(program, folds), folds


@pytest.mark.parametrize("given", [SMOOTH, recipe("awq", group_size=8)], ids=["smooth", "awq"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_folded_computes_the_same_before_anything_is_quantised(
    dtype: torch.dtype, norm: str, given: dict[str, Any]
) -> None:
    model, data = gated(norm, dtype)
    plain, program, folds = folded(model, data, given)
    assert [fold.weights for fold in folds] == [("up.weight", "gate.weight"), ("down.weight",), ("after.weight",)]
    sources = [{name for name, _ in fold.source.parts} for fold in folds]
    bias = {"norm.bias"} if norm == "layer" else set()
    assert sources == [{"norm.weight"} | bias, {"up.weight", "up.bias"}, {"down.weight", "down.bias"}]
    assert any(not torch.equal(fold.scale, torch.ones_like(fold.scale)) for fold in folds)
    assert len(program.graph.nodes) == len(plain.graph.nodes)  # nothing more to compute
    for x in data:
        with torch.no_grad():
            (before,), (after,) = plain.run([x]), program.run([x])
        if dtype is torch.bfloat16:  # powers of two
            assert torch.equal(before, after)
        else:
            assert_close(after, before, "approximate")


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_real_architectures_are_folded_exactly(name: str) -> None:
    model, inputs = ZOO[name]()
    data = batches(inputs, 2) if name != "vit" else [inputs]
    plain, program, folds = folded(model, data, SMOOTH)
    assert len(folds) == {"llama": 7, "gpt2": 4, "vit": 4}[name]
    with torch.no_grad():
        for before, after in zip(plain.run(data[0].values()), program.run(data[0].values()), strict=True):
            assert_close(after, before, "approximate")


def test_what_a_variant_reads_besides_is_given_back() -> None:
    model, data = gated("layer")
    small = dwindle.compress(model, SMOOTH, inputs={"x": data[0]}, data=data)
    y, up = small(data[0], details=True)
    assert_close(y, small(data[0]), "approximate")
    with torch.no_grad():
        expected = model(data[0], details=True)[1]
    assert float((up - expected).norm() / expected.norm()) < 0.03
    assert {"up.weight", "up.weight_1"} & set(packed(small)) == {"up.weight"}


def test_smoothing_helps_where_a_few_inputs_are_large() -> None:
    model, data = gated("layer")
    with torch.no_grad():
        model.norm.weight[:2] *= 60
        for layer in (model.up, model.gate):
            layer.weight[:, :2] /= 60
    plain = {"quantize": [{"activation": {"range": "static"}}], "calibration": {"method": "minmax"}}
    smooth = {**SMOOTH, "calibration": {"method": "minmax"}}

    def off(given: dict[str, Any]) -> float:
        error = dwindle.compress(model, given, inputs={"x": data[0]}, data=data).certificate.output_error["relative"]
        assert error is not None
        return error

    assert off(smooth) < 0.5 * off(plain)


def test_bert_reads_its_norms_twice_so_nothing_of_it_can_be_smoothed() -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(RecipeError, match=r"(?s)smooth finds no activation.*comes from aten\.gelu.*cure"):
        dwindle.compress(model, SMOOTH, inputs=inputs, data=batches(inputs))
    small = dwindle.compress(model, recipe("awq"), inputs=inputs, data=batches(inputs))
    declined = {e.where: e.reason for e in small.log if e.rule == "equalize.fold"}
    assert "encoder.layer.0.output.dense.weight" in declined
    assert all(not e.applied for e in small.log if e.rule == "equalize.fold")


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


@pytest.mark.parametrize("given", [recipe("gptq"), recipe("awq"), SMOOTH], ids=["gptq", "awq", "smooth"])
def test_the_eager_module_takes_them_over(given: dict[str, Any]) -> None:
    model, inputs = ZOO["llama"]()
    small = dwindle.compress(model, given, inputs=inputs, data=batches(inputs))
    eager = dwindle.transplant(small, model)
    with torch.no_grad():
        assert float((eager(**inputs).logits - small(**inputs).logits).norm() / small(**inputs).logits.norm()) < 1e-5


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
