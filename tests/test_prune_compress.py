"""Pruning after training: one rule, the finished model, its file, further variants, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO, first
from pruning import Transformer, walked
from torch import Tensor, nn

import dwindle
from dwindle.passes.prune import cost
from dwindle.passes.prune.slices import leaves_of
from dwindle.runtime.errors import DwindleError, PassError, RecipeError
from dwindle.runtime.plan import Plan

THIRD = {"prune": {"ratio": 0.3}}
EXACT = ["bert", "gpt2", "llama", "t5", "vit", "resnet", "convnext"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", EXACT)
def test_a_ratio_alone_prunes_what_can_be_pruned(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = dwindle.compress(model, THIRD, inputs=inputs)
    assert count(small) < 0.9 * count(model)
    with torch.no_grad():
        expected = first(small(**inputs))
        assert expected.shape == first(model(**inputs)).shape
        assert expected.isfinite().all()
        small.save(tmp_path / "saved")
        assert torch.equal(first(dwindle.load(tmp_path / "saved")(**inputs)), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert Plan.from_json(small.plan.to_json()) == small.plan


def test_it_equals_the_model_with_what_was_cut_at_zero() -> None:
    """The FFN of an MLP by hand: rows of the first layer and columns of the second."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(4, 6)
    small = dwindle.compress(model, {"prune": {"ratio": 0.3, "score": "l1"}}, inputs=x)
    worth = model[0].weight.abs().sum(1) + model[0].bias.abs() + model[2].weight.abs().sum(0)
    gone = set(worth.argsort()[:3].tolist())
    cuts = {(edit.fqn, edit.dim): set(edit.removed) for edit in small.plan.slices}
    assert cuts == {("0.weight", 0): gone, ("0.bias", 0): gone, ("2.weight", 1): gone}
    with torch.no_grad():
        model[2].weight[:, list(gone)] = 0
        torch.testing.assert_close(small(x), model(x))


def test_it_composes_with_quantisation_and_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, THIRD | {"quantize": [{"activation": {}}]}, inputs=inputs)
    assert small.plan.slices
    assert small.plan.quantizations
    assert small.certificate.lowering_error < 1e-5
    assert small.export_onnx(tmp_path / "model.onnx").exists()


def test_a_further_variant_has_the_same_cuts() -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, THIRD, inputs=inputs)
    sizes = {name: value.shape for name, value in small.state_dict().items()}
    with torch.no_grad():
        again = small(**inputs, output_hidden_states=True)
        assert torch.equal(first(again), first(small(**inputs)))
    assert {name: value.shape for name, value in small.state_dict().items()} == sizes


@pytest.mark.parametrize(
    ("rule", "kinds"),
    [
        ({"scopes": "heads"}, {"attention"}),
        ({"scopes": ["rows"]}, {"intermediate", "output"}),
        ({"modules": "encoder.layer.1.*"}, {"attention", "intermediate", "output"}),
    ],
)
def test_scopes_and_modules_narrow_it(rule: dict[str, Any], kinds: set[str]) -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, {"prune": {"ratio": 0.3, **rule}}, inputs=inputs)
    touched = {edit.fqn.split(".")[3] for edit in small.plan.slices}
    assert touched == kinds
    if "modules" in rule:
        assert all(edit.fqn.startswith("encoder.layer.1.") for edit in small.plan.slices)


def test_later_rules_override_earlier_ones() -> None:
    model, inputs = ZOO["bert"]()
    rules = [{"ratio": 0.25}, {"ratio": 0.5, "scopes": "rows", "modules": "encoder.layer.0.*"}]
    small = dwindle.compress(model, {"prune": rules}, inputs=inputs)
    widths = [small.store.get(f"encoder.layer.{i}.intermediate.dense.weight").shape[0] for i in range(2)]
    assert widths == [32, 48]


@pytest.mark.parametrize("measure", ["params", "flops", "bytes"])
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_a_target_is_met_and_not_by_much_more(name: str, measure: str) -> None:
    model, inputs = ZOO[name]()
    small = dwindle.compress(model, {"prune": {"target": {measure: 0.8}}}, inputs=inputs)
    walk, _ = walked(model, inputs)
    kept = leaves_of(walk, small.plan.slices)
    measured = {
        "params": lambda of: cost.numbers(walk, of),
        "flops": lambda of: cost.flops(cost.products(walk), of),
        "bytes": lambda of: cost.nbytes(walk, of),
    }[measure]
    assert 0.7 < measured(kept) / measured({}) <= 0.8
    if measure == "params":
        assert count(small) / count(model) <= 0.8


def test_widths_are_rounded_up_to_a_multiple() -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, {"prune": {"ratio": 0.3, "scopes": "rows", "multiple": 16}}, inputs=inputs)
    assert small.store.get("encoder.layer.0.intermediate.dense.weight").shape[0] == 48  # of 64, 45 would stay


@pytest.mark.parametrize("score", ["l1", "l2", "random", "scale"])
def test_every_score_gives_a_model_that_runs(score: str) -> None:
    model, inputs = ZOO["convnext"]()
    small = dwindle.compress(model, {"prune": {"ratio": 0.3, "score": score}}, inputs=inputs)
    with torch.no_grad():
        assert first(small(**inputs)).isfinite().all()


def test_the_extremes() -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, {"prune": {"ratio": 0.0}, "quantize": [{}]}, inputs=inputs)
    assert not small.plan.slices
    least = dwindle.compress(model, {"prune": {"ratio": 0.9999}}, inputs=inputs)
    assert least.store.get("encoder.layer.0.intermediate.dense.weight").shape == (1, 32)
    assert least.store.get("encoder.layer.0.attention.self.query.weight").shape == (8, 32)  # one head is left


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"ratio": 0.3, "target": {"params": 0.5}}, "a ratio or a target"),
        ({}, "a ratio or a target"),
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": 0.3, "scopes": ["head"]}, "heads"),
        ({"ratio": 0.3, "scopes": "channels"}, "finds nothing"),
        ({"ratio": 0.3, "modules": "decoder.*"}, "finds nothing"),
        ({"target": {"params": 0.01}}, "cannot be pruned to its target"),
        ({"ratio": 0.3, "score": "taylor"}, "prunes by score taylor"),
    ],
)
def test_what_is_wrong_is_said(rule: dict[str, Any], said: str) -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(DwindleError, match=said):
        dwindle.compress(model, {"prune": rule}, inputs=inputs)


def test_what_cannot_be_pruned_says_why() -> None:
    with pytest.raises(RecipeError, match=r"(?s)it is an output.*inspect"):
        dwindle.compress(nn.Linear(6, 4), THIRD, inputs=torch.randn(3, 6))


@pytest.mark.parametrize("recipe", [THIRD, {"sparsify": {"ratio": 0.5}}], ids=["prune", "sparsify"])
def test_compile_refuses_by_name(recipe: dict[str, Any]) -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(Exception, match=r"torch\.compile cannot prune"), torch.no_grad():
        torch.compile(model, backend="dwindle", options={"recipe": recipe})(**inputs)


def test_a_budget_of_the_network_takes_the_least_wherever_they_are() -> None:
    torch.manual_seed(0)
    model = Transformer()
    with torch.no_grad():  # nearly all of the first block's rows are worth little
        model.blocks[0].up.weight[10:] *= 0.01
        model.blocks[0].up.bias[10:] *= 0.01
        model.blocks[0].down.weight[:, 10:] *= 0.01
    rule = {"ratio": 0.25, "budget": "network", "scopes": "rows"}
    small = dwindle.compress(model, {"prune": rule}, inputs=torch.randn(3, 5, 10))
    gone = {cut.fqn: len(cut.removed) for cut in small.plan.slices}
    assert gone == {f"blocks.0.{name}": 64 for name in ("up.weight", "up.bias", "down.weight")}
    with pytest.raises(RecipeError, match="a budget of the network is one ratio"):
        dwindle.compress(model, {"prune": {**rule, "ratio": [0.1, 0.2]}}, inputs=torch.randn(3, 5, 10))


class Telling(nn.Module):
    """(N, 6) to (N, 3), and on request what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, also: bool = False) -> Any:
        y = self.up(x).relu()
        return (self.down(y), y) if also else self.down(y)


def test_an_output_that_was_cut_is_refused_by_name() -> None:
    small = dwindle.compress(Telling(), {"prune": {"ratio": 0.5}}, inputs=torch.randn(3, 6))
    with pytest.raises(PassError, match="cannot be cut in another graph"):
        small(torch.randn(3, 6), also=True)


def test_a_report_shows_what_was_cut() -> None:
    small = dwindle.compress(Telling(), {"prune": {"ratio": 0.5}}, inputs=torch.randn(3, 6))
    text = str(small.report())
    assert "Quantised layers" not in text
    lines = [line.split() for line in text.splitlines()]
    assert ["up", "float32", "192", "B", "96", "B"] in [line[:6] for line in lines]
    plain = dwindle.compress(Telling(), {}, inputs=torch.randn(3, 6))
    assert "Pruned tensors" not in str(plain.report())
