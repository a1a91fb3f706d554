"""Pruning at its edges, through `compress`: nothing, nearly everything, what may not be touched, odd models."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from models import ZOO
from pruning import X, called, pruned, widths
from torch import Tensor, nn

import dwindle
from dwindle.runtime.compressed import Compressed
from dwindle.runtime.errors import CaptureError, DwindleError, RecipeError


def plain(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def zeroed(model: nn.Module, small: Compressed) -> nn.Module:
    """The model with zeros where the plan cuts."""
    with torch.no_grad():
        for edit in small.plan.slices:
            tensor = model.get_parameter(edit.fqn)
            tensor.index_fill_(edit.dim, torch.tensor(edit.removed), 0.0)
    return model


@pytest.mark.parametrize("rule", [{"ratio": 0.01}, {"ratio": 0.5, "multiple": 16}], ids=str)
def test_a_ratio_of_less_than_an_index_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="cuts nothing"):
        pruned(plain(6, 16, 4), X, **rule)
    with pytest.raises(RecipeError, match="cuts nothing"):
        dwindle.prepare(plain(6, 16, 4), {"prune": rule}, inputs=X)


@pytest.mark.parametrize("name", ["mlp", "bert", "resnet"])
def test_a_ratio_of_zero_is_the_model(name: str) -> None:
    model, inputs = ZOO[name]()
    small = pruned(model, inputs, ratio=0.0)
    assert not small.plan
    assert torch.equal(called(small, inputs), called(model, inputs))
    assert {n: t.shape for n, t in small.named_parameters()} == {n: t.shape for n, t in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "inner"), [("bert", False), ("resnet", False), ("convnext", False), ("llama", True), ("vit", True)]
)
def test_nearly_everything_leaves_one_index_of_each(name: str, inner: bool) -> None:
    model, inputs = ZOO[name]()
    small = pruned(model, inputs, ratio=1 - 1e-9, inner=inner)
    assert not [entry for entry in small.log if entry.rule == "prune.proof"]
    assert all(stay >= 1 for stay in widths(small).values())
    assert 1 in widths(small).values()
    assert called(small, inputs).shape == called(model, inputs).shape
    assert called(small, inputs).isfinite().all()


def test_a_squeeze_does_not_take_the_last_channel() -> None:
    """squeeze() without dimensions goes by sizes, which pruning changes."""

    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).mean((2, 3), keepdim=True).squeeze())

    inputs = torch.randn(3, 3, 6, 6)
    small = pruned(Squeezed().eval(), inputs, ratio=0.99)
    assert widths(small)["a.weight", 0] == 1
    assert called(small, inputs).shape == (3, 4)


def test_groups_of_two_and_of_one() -> None:
    model = plain(6, 2, 3)
    small = pruned(model, X, ratio=0.5)
    assert set(widths(small).values()) == {1}
    torch.testing.assert_close(called(small, X), called(zeroed(model, small), X))
    with pytest.raises(RecipeError, match="finds nothing to prune"):
        pruned(plain(6, 1, 3), X, ratio=0.5)
    with pytest.raises(RecipeError, match="cuts nothing"):  # never more than was asked for
        pruned(plain(6, 2, 3), X, ratio=0.4)


def test_all_heads_but_one_may_go() -> None:
    model, inputs = ZOO["bert"]()
    small = pruned(model, inputs, ratio=0.9999, scopes="heads")
    assert set(widths(small).values()) == {8}  # the size of one of four heads
    assert called(small, inputs).isfinite().all()


@pytest.mark.parametrize(
    ("modules", "said"),
    [("0", "0.weight[1]: input input_1"), ("2", "2.weight[0]: it is an output")],
)
def test_what_inputs_and_outputs_share_is_declined(modules: str, said: str) -> None:
    """The layer's other side belongs to a group, so it is asked for by a model without one."""
    model = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3)).eval()
    with pytest.raises(RecipeError) as caught:
        pruned(model, X, ratio=0.5, modules=modules)
    text = str(caught.value)
    assert said in text
    assert f"required: groups of heads, rows, channels, hidden, experts in modules {modules}" in text
    assert "cure: `dwindle inspect MODEL --groups`" in text


@pytest.mark.parametrize(
    ("rule", "required", "found", "cure"),
    [
        ({"scopes": "heads"}, "groups of heads in modules *", "groups of rows", "inspect MODEL --groups"),
        ({"modules": "decoder.*"}, "in modules decoder.*", "groups of rows", "inspect MODEL --groups"),
        ({"least": 11}, "with 11 indices or more", "groups of rows", "inspect MODEL --groups"),
        ({"score": "fisher"}, "calibration data", "none", "a score that goes by the weights alone"),
        ({"ratio": -0.1}, "greater than or equal to 0", "-0.1", ""),
        ({"ratio": 1.0}, "less than 1", "1.0", ""),
        ({"multiple": 0}, "greater than or equal to 1", "0", ""),
    ],
)
def test_what_is_asked_for_in_vain(rule: dict[str, Any], required: str, found: str, cure: str) -> None:
    with pytest.raises(DwindleError) as caught:
        pruned(plain(6, 10, 3), X, **{"ratio": 0.5, **rule})
    lines = {key: text for key, _, text in (line.strip().partition(": ") for line in str(caught.value).splitlines())}
    assert required in lines["required"]
    assert found in lines["found"]
    assert cure in lines.get("cure", "")


def test_a_model_with_nothing_to_prune() -> None:
    with pytest.raises(RecipeError, match="groups of no kind"):
        pruned(nn.ReLU(), X, ratio=0.5)


def test_the_later_of_two_rules_wins() -> None:
    rules = [{"ratio": 0.5}, {"ratio": 0.2, "modules": "0"}]
    small = dwindle.compress(plain(6, 10, 20, 3), {"prune": rules}, inputs=X)
    assert widths(small)["0.weight", 0] == 8
    assert widths(small)["2.weight", 0] == 10


def test_a_rule_that_later_ones_leave_nothing_says_so() -> None:
    rules = [{"ratio": 0.2, "modules": "0"}, {"ratio": 0.5}]
    with pytest.raises(RecipeError, match=r"(?s)nothing left to prune.*later rules select all.*wider rule first"):
        dwindle.compress(plain(6, 10, 20, 3), {"prune": rules}, inputs=X)


@pytest.mark.parametrize(("multiple", "stay"), [(4, 8), (16, 10), (1, 5)])
def test_a_multiple_wider_than_the_layer_leaves_it(multiple: int, stay: int) -> None:
    small = pruned(plain(6, 10, 32, 3), X, ratio=0.5, multiple=multiple)
    assert widths(small).get(("0.weight", 0), 10) == stay
    assert widths(small)["2.weight", 0] == 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    everything, one = plain(6, 10, 3), plain(6, 10, 8, 3)
    everything[0].weight.data[2, 3] = bad  # type: ignore[union-attr, operator]
    one[4].weight.data[0, 3] = bad  # type: ignore[union-attr, operator]  # of one output
    with pytest.raises(DwindleError, match="finite"):
        pruned(everything, X, ratio=0.5)
    with pytest.raises(RecipeError, match=r"(?s)score of 4.weight is not finite.*leave the module out"):
        pruned(one, X, ratio=0.5)
    assert widths(pruned(one, X, ratio=0.5, modules="0"))["0.weight", 0] == 5


class Tied(nn.Module):
    """An embedding that is also the output's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y + self.layer(y).relu())


def test_a_tied_head_is_cut_with_its_embedding() -> None:
    torch.manual_seed(0)
    model, words = Tied().eval(), torch.randint(0, 11, (4, 5))
    small = pruned(model, words, ratio=0.5)
    assert widths(small) == {
        ("embed.weight", 1): 4,
        ("layer.weight", 0): 4,
        ("layer.weight", 1): 4,
        ("layer.bias", 0): 4,
    }
    torch.testing.assert_close(called(small, words), called(zeroed(model, small), words))
    shared = small.state_dict()
    assert shared["head.weight"].data_ptr() == shared["embed.weight"].data_ptr()


class Twice(nn.Module):
    """A layer that is used two times, so that what it reads is what it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.shared(self.shared(self.a(x)).relu()))


def test_a_module_that_is_used_twice() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    small = pruned(model, X, ratio=0.5)
    assert len({edit.removed for edit in small.plan.slices}) == 1
    assert widths(small)["shared.weight", 0] == widths(small)["shared.weight", 1] == 4
    torch.testing.assert_close(called(small, X), called(zeroed(model, small), X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = plain(6, 10, 3).to(dtype)
    small = pruned(model, X.to(dtype), ratio=0.5)
    found, expected = called(small, X.to(dtype)), called(zeroed(model, small), X.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_a_model_in_training_mode_is_pruned_as_one_for_inference() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = pruned(model, X, ratio=0.5)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert called(small, X).isfinite().all()
    assert small.plan == pruned(model, X, ratio=0.5).plan
    assert widths(small)["1.running_mean", 0] == 5


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_one_example_in_the_batch(name: str) -> None:
    model, inputs = ZOO[name]()
    one = {key: value[:1] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    assert pruned(model, one, ratio=0.5).plan == pruned(model, inputs, ratio=0.5).plan


def test_static_shapes() -> None:
    model = plain(6, 10, 3)
    small = pruned(model, X, dynamic_shapes={}, ratio=0.5)
    torch.testing.assert_close(called(small, X), called(zeroed(model, small), X))


def test_a_model_whose_output_is_never_finite_is_refused() -> None:
    class Lost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * float("nan")

    with pytest.raises(CaptureError, match="nothing finite"):
        pruned(Lost().eval(), X, ratio=0.5)
