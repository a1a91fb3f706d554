"""Experts: a router chooses them by number; cutting them gives the smaller mixture that a person would have built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import FAMILIES, Dispatched, experts, logits, mixture, tokens
from pruning import groups_of, random_cut, walked
from torch import Tensor, nn
from typer.testing import CliRunner

import dwindle
from dwindle.frontends.commands import app
from dwindle.passes.prune import cost
from dwindle.passes.prune.groups import find_groups
from dwindle.passes.prune.proof import LIMIT, proven
from dwindle.passes.prune.slices import leaves_of
from dwindle.runtime.errors import CalibrationError, RecipeError

COMMON = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_has_a_group_of_experts_and_masked_equals_sliced(name: str) -> None:
    walk, batch = walked(mixture(name), tokens())
    groups = groups_of(walk, lambda g: experts(g) and g.outermost)
    assert len(groups) == (1 if name == "deepseek_v3" else 2)  # whose first layer is dense
    for seed in (0, 1):
        assert proven(walk, random_cut(groups, 0.5, seed), [batch], seed) < 1e-12
    everything = groups_of(walk)
    assert proven(walk, random_cut(everything, 0.3), [batch]) < 1e-12


@pytest.mark.parametrize(("name", "how"), [("granitemoe", "largest"), ("phimoe", "largest"), ("olmoe", "softmax")])
def test_a_router_that_still_sees_the_cut_experts_is_found(name: str, how: str) -> None:
    walk, batch = walked(mixture(name), tokens())
    cut = random_cut(groups_of(walk, experts), 0.5)
    blind = replace(walk, endings=[ending for ending in walk.endings if ending.how != how])
    assert proven(blind, cut, [batch]) > 100 * LIMIT


@pytest.mark.parametrize("name", [*COMMON, "granitemoe", "llama4"])
def test_it_is_the_model_with_fewer_experts(name: str) -> None:
    """transformers' own model of that size, with the rows that stay, on another batch than the example."""
    model = mixture(name)
    small = dwindle.compress(model, {"prune": {"scopes": "experts", "ratio": 0.5}}, inputs=tokens())
    state = dict(model.state_dict())
    for edit in small.plan.slices:
        stay = [i for i in range(edit.size) if i not in edit.removed]
        assert len(stay) == 4
        state[edit.fqn] = state[edit.fqn].index_select(edit.dim, torch.tensor(stay))
    fewer = mixture(name, experts=4)
    fewer.load_state_dict(state)
    with torch.no_grad():
        for batch in (tokens(), tokens(3, 11, seed=2)):
            torch.testing.assert_close(logits(small(**batch)), logits(fewer(**batch)), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(logits(small(**batch)), logits(model(**batch)), atol=1e-2)


def test_groups_of_experts_with_a_corrected_router() -> None:
    """DeepSeek-V3 chooses two of four groups, then experts in them: whole groups go, with their corrections."""
    model = mixture("deepseek_v3")
    small = dwindle.compress(model, {"prune": {"scopes": "experts", "ratio": 0.9}}, inputs=tokens())
    cuts = {edit.fqn.partition("mlp.")[2]: edit for edit in small.plan.slices}
    assert set(cuts) == {"gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj", "experts.down_proj"}
    (gone,) = {edit.removed for edit in cuts.values()}
    assert len(gone) == 4  # two groups of two stay: as many groups as are chosen
    assert {i // 2 for i in gone} == {gone[0] // 2, gone[-1] // 2}
    fewer = mixture("deepseek_v3", n_group=2, n_routed_experts=4)
    stay = [i for i in range(8) if i not in gone]
    fewer.load_state_dict(
        {
            name: value[stay] if name.partition("mlp.")[2] in cuts and value.shape[0] == 8 else value
            for name, value in model.state_dict().items()
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(logits(small(**tokens())), logits(fewer(**tokens())), rtol=1e-4, atol=1e-5)


def test_as_many_stay_as_are_chosen_at_once() -> None:
    least = dwindle.compress(mixture("mixtral"), {"prune": {"scopes": "experts", "ratio": 0.99}}, inputs=tokens())
    assert least.store.get("model.layers.0.mlp.gate.weight").shape[0] == 2
    walk, _ = walked(mixture("phimoe"), tokens())
    assert [group.floor for group in groups_of(walk, experts)] == [2, 2]  # the largest, twice in turn
    with pytest.raises(RecipeError, match="2 are chosen at once, and there are 2"):
        dwindle.compress(mixture("mixtral", 2), {"prune": {"scopes": "experts", "ratio": 0.5}}, inputs=tokens())


def test_one_expert_can_be_left_where_one_is_chosen() -> None:
    model = mixture("mixtral", num_experts_per_tok=1)
    small = dwindle.compress(model, {"prune": {"scopes": "experts", "ratio": 0.99}}, inputs=tokens())
    assert small.store.get("model.layers.1.mlp.experts.down_proj").shape[0] == 1
    with torch.no_grad():
        assert logits(small(**tokens())).isfinite().all()


def test_weights_that_are_picked_for_each_token() -> None:
    """The other implementation in transformers: w[chosen] and a batched product."""
    model = mixture("mixtral", experts_implementation="batched_mm")
    walk, batch = walked(model, tokens())
    assert not any("grouped_mm" in str(node.target) for node in walk.program.graph.nodes)
    groups = groups_of(walk, experts)
    assert [len(group.cuts) for group in groups] == [3, 3]
    assert proven(walk, random_cut(groups, 0.5), [batch]) < 1e-12


@pytest.mark.parametrize("way", ["one hot", "one hot and spare", "scatter", "the best alone"])
def test_mixtures_by_hand(way: str) -> None:
    walk, batch = walked(Dispatched(way), torch.randn(7, 6))
    (group,) = groups_of(walk, experts)
    assert {(cut.name, cut.dim) for cut in group.cuts} == {
        (n, 0) for n in ("router.weight", "router.bias", "up", "down")
    }
    assert proven(walk, random_cut([group], 0.5), [batch]) < 1e-12


@pytest.mark.parametrize("way", ["shifted", "compared", "averaged"])
def test_numbers_that_are_read_otherwise_freeze_the_experts(way: str) -> None:
    walk, _ = walked(Dispatched(way), torch.randn(7, 6))
    reasons = {group.reason for group in find_groups(walk) if any(cut.name == "router.weight" for cut in group.cuts)}
    assert any("reads which of them were chosen" in reason for reason in reasons)
    assert not groups_of(walk, lambda g: any(cut.name == "router.weight" and cut.dim == 0 for cut in g.cuts))


class Best(nn.Module):
    """The largest of some features, which chooses nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).topk(3).values)


def test_the_largest_of_features_that_choose_nothing_depend_on_all() -> None:
    walk, _ = walked(Best(), torch.randn(4, 6))
    assert {group.reason for group in find_groups(walk)} >= {"topk: it looks at all of it"}
    assert not groups_of(walk)


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).cumsum(-1).relu())


def test_a_running_sum_goes_on_without_what_is_cut() -> None:
    walk, batch = walked(Running(), torch.randn(4, 6))
    cut = random_cut(groups_of(walk), 0.5)
    assert cut
    assert proven(walk, cut, [batch]) < 1e-12
    blind = replace(walk, endings=[e for e in walk.endings if "cumsum" not in str(e.node.target)])
    assert proven(blind, cut, [batch]) > 100 * LIMIT


def test_scores_of_weights_and_a_global_choice_work_too() -> None:
    model = mixture("mixtral")
    for rule in ({"ratio": 0.25, "score": "l2"}, {"target": {"bytes": 0.8}}):
        small = dwindle.compress(model, {"prune": {"scopes": "experts", **rule}}, inputs=tokens())
        assert {edit.fqn.rpartition(".")[2] for edit in small.plan.slices} == {"weight", "gate_up_proj", "down_proj"}
    walk, _ = walked(model, tokens())
    kept = leaves_of(walk, small.plan.slices)
    assert 0.6 < cost.nbytes(walk, kept) / cost.nbytes(walk, {}) <= 0.8


def test_what_an_expert_costs() -> None:
    """Its weights in bytes; in multiplications only its row of the router: as many experts are chosen as before."""
    walk, _ = walked(mixture("mixtral"), tokens())
    (group, _) = groups_of(walk, experts)
    one = torch.ones(8, dtype=torch.bool)
    one[0] = False
    rows = walk.program.contract.example()[0].numel()
    assert cost.nbytes(walk, {}) - cost.nbytes(walk, {group.leaf: one}) == 4 * (32 + 3 * 24 * 32)
    products = cost.products(walk)
    assert cost.flops(products, {}) - cost.flops(products, {group.leaf: one}) == 2 * rows * 32
    experts_only = [p for p in products if len(p.axes) == 3 and p.flops({}) == 2 * rows * 2 * 48 * 32]
    assert len(experts_only) == 2  # gate and up of two experts for each row, in each layer


def test_it_quantises_saves_and_has_further_variants(tmp_path: Path) -> None:
    model = mixture("qwen2_moe")
    recipe = {
        "prune": [{"scopes": ["heads", "rows"], "ratio": 0.25}, {"scopes": "experts", "ratio": 0.5}],
        "quantize": [{"activation": {}}],
    }
    small = dwindle.compress(model, recipe, inputs=tokens())
    assert small.plan.quantizations
    with torch.no_grad():
        expected = logits(small(**tokens()))
        assert expected.isfinite().all()
        assert torch.equal(logits(small(**tokens(), output_hidden_states=True)), expected)
        small.save(tmp_path / "saved")
        assert torch.equal(logits(dwindle.load(tmp_path / "saved")(**tokens())), expected)


def test_inspect_lists_experts(tmp_path: Path) -> None:
    mixture("mixtral").save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "model"), "--groups"])
    assert result.exit_code == 0, result.output
    assert "experts" in result.output


@pytest.mark.parametrize(
    ("rule", "error", "said"),
    [
        ({"scopes": "experts", "ratio": 0.5, "score": "routed"}, CalibrationError, r"(?s)score routed.*give data="),
        ({"ratio": 0.5, "score": "routed"}, RecipeError, "give it with scopes: experts"),
        ({"ratio": [0.5, 1.0]}, RecipeError, "less than 1"),
        ({"ratio": [0.1, 0.2, 0.3]}, RecipeError, "ratio"),
    ],
)
def test_what_is_wrong_is_said(rule: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        dwindle.compress(mixture("mixtral"), {"prune": rule}, inputs=tokens())
