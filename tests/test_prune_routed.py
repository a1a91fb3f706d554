"""Experts by routed mass, and ratios that change from layer to layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mixtures import Dispatched, logits, mixture, tokens
from pruning import walked
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.passes.prune.routed import masses
from dwindle.passes.prune.score import routed_mass


def test_routed_mass_by_hand() -> None:
    chosen, weights = torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.125]])
    assert torch.equal(routed_mass(chosen, weights, 4), torch.tensor([0.75, 0.125, 0.75, 0], dtype=torch.float64))


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mixtral": lambda s: (p := s.softmax(-1).topk(2).values) / p.sum(-1, keepdim=True),
    "qwen2_moe": lambda s: s.softmax(-1).topk(2).values,
    "granitemoe": lambda s: s.topk(2).values.softmax(-1),
    "llama4": lambda s: s.topk(2).values.sigmoid(),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_routed_mass_is_what_the_router_gives(name: str) -> None:
    """Read off the graph, and by hooks on the model's routers."""
    model, data = mixture(name), [tokens(seed=s) for s in (1, 2, 3)]
    walk, _ = walked(model, data[0])
    expected: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.shape == (8, 32):
            module.register_forward_pre_hook(
                lambda module, args, name=module_name: expected.__setitem__(name, _added(expected, name, module, args))
            )

    def _added(sums: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        scores = F.linear(args[0].reshape(-1, 32), module.weight)
        chosen = scores.topk(2).indices
        return sums.get(name, 0) + routed_mass(chosen, WEIGHTS[family](scores), 8)

    family = name
    found = masses(walk, [list(batch.values()) for batch in data])
    with torch.no_grad():
        for batch in data:
            model(**batch)
    assert len(found) == len(expected) == 2
    for (_, mass), wanted in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(mass, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("once", [False, True])
def test_the_experts_that_go_are_those_with_the_least_mass(once: bool) -> None:
    model, data = mixture("mixtral"), [tokens(seed=s) for s in (1, 2)]
    walk, _ = walked(model, data[0])
    found = masses(walk, [list(batch.values()) for batch in data])
    recipe = {
        "prune": {"scopes": "experts", "ratio": 0.5, "score": "routed"},
        "quantize": [{"activation": {"range": "static"}}],
    }
    small = dwindle.compress(model, recipe, inputs=data[0], data=iter(data) if once else data)
    gone = {edit.fqn: list(edit.removed) for edit in small.plan.slices}
    for i, (_, mass) in enumerate(found):
        assert gone[f"model.layers.{i}.mlp.gate.weight"] == sorted(mass.argsort()[:4].tolist())


def test_experts_that_are_never_chosen_cost_nothing() -> None:
    """Routers without a preference choose the same two for every token; the model without the others is the same."""
    model = mixture("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    rule = {"scopes": "experts", "ratio": 0.75, "score": "routed"}
    small = dwindle.compress(model, {"prune": rule}, inputs=tokens(), data=[tokens()])
    assert small.store.get("model.layers.0.mlp.gate.weight").shape[0] == 2
    with torch.no_grad():
        torch.testing.assert_close(logits(small(**tokens())), logits(model(**tokens())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("way", "chosen"), [("one hot", 2), ("scatter", 2), ("the best alone", 1)])
def test_routed_mass_of_mixtures_by_hand(way: str, chosen: int) -> None:
    model = Dispatched(way)
    walk, batch = walked(model, torch.randn(7, 6))
    ((_, mass),) = masses(walk, [batch])
    best = model.router(batch[0]).softmax(-1).topk(chosen)
    torch.testing.assert_close(mass, routed_mass(best.indices, best.values, 5), rtol=1e-5, atol=1e-6)


def test_a_pair_of_ratios_goes_from_the_first_layer_to_the_last() -> None:
    model = mixture("mixtral", num_hidden_layers=5)
    rules = [{"scopes": "experts", "ratio": [0.0, 0.5]}, {"scopes": "rows", "ratio": (0.5, 0.25)}]
    small = dwindle.compress(model, {"prune": rules}, inputs=tokens())
    shapes = [small.store.get(f"model.layers.{i}.mlp.experts.down_proj").shape for i in range(5)]
    assert [shape[0] for shape in shapes] == [8, 7, 6, 5, 4]
    assert [shape[2] for shape in shapes] == [12, 14, 15, 17, 18]  # of 24: 0.5, 0.4375, 0.375, 0.3125, 0.25 go
    assert dwindle.Recipe.of(small.recipe).prunes()[0].ratio == (0.0, 0.5)


def test_a_group_in_several_layers_loses_the_mean_of_theirs() -> None:
    model = mixture("mixtral")
    small = dwindle.compress(model, {"prune": {"scopes": "hidden", "ratio": [0.25, 0.5]}}, inputs=tokens())
    (hidden,) = {edit.size - len(edit.removed) for edit in small.plan.slices if edit.size == 32}
    assert hidden == 20  # of 32, 0.375 go
