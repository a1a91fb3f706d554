"""Scales that move into weights: exact before quantisation, given back where a variant needs that, or declined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_data import SMOOTH, batches, packed, recipe
from models import ZOO, first
from numerics import assert_close
from torch import Tensor, nn

import dwindle
from dwindle.frontends.capture import capture
from dwindle.frontends.recipe import Recipe
from dwindle.passes.canonicalize import TO_LINEAR, canonicalize
from dwindle.passes.quantize.decide import decide
from dwindle.passes.quantize.equalize import find_folds, refold
from dwindle.passes.rewrite import apply_rules
from dwindle.runtime.errors import RecipeError
from dwindle.runtime.program import Program
from dwindle.runtime.store import Store


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


@pytest.mark.parametrize("given", [recipe("gptq"), recipe("awq"), SMOOTH], ids=["gptq", "awq", "smooth"])
def test_the_eager_module_takes_them_over(given: dict[str, Any]) -> None:
    model, inputs = ZOO["llama"]()
    small = dwindle.compress(model, given, inputs=inputs, data=batches(inputs))
    eager = dwindle.transplant(small, model)
    with torch.no_grad():
        assert float((eager(**inputs).logits - small(**inputs).logits).norm() / small(**inputs).logits.norm()) < 1e-5
