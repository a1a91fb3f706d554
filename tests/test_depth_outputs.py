"""What a model without some blocks gives in its lists of hidden states and attentions, and what its config says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import ROWS
from models import ZOO
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dwindle
from dwindle.passes.outputs import lists, names
from dwindle.runtime.errors import PassError

# Not the first block of T5, which has the position bias of all: no model without it can be built.
GONE = [(name, gone) for name in ROWS for gone in (0, 1) if (name, gone) != ("t5", 0)]


def eager(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """With attention written out: the fused one gives no weights."""
    model, inputs = ZOO[name]()
    model.set_attn_implementation("eager")  # type: ignore[operator]  # of transformers
    return model, inputs


def leaves(output: Any) -> list[Tensor]:
    found: list[Tensor] = tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return found


@pytest.mark.parametrize(("name", "gone"), GONE)
def test_lists_are_those_of_the_model_that_has_fewer_blocks(name: str, gone: int) -> None:
    model, inputs = eager(name)
    small = dwindle.compress(model, {"depth": {"row": ROWS[name], "keep_layers": [1 - gone]}}, inputs=inputs)
    short = copy.deepcopy(model)
    del short.get_submodule(ROWS[name])[gone]  # type: ignore[operator]  # it is a list
    for more in (
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_hidden_states": True, "output_attentions": True, "return_dict": False},
    ):
        with torch.no_grad():
            expected, found = short(**inputs, **more), small(**inputs, **more)
        assert type(found) is type(expected)
        if isinstance(found, dict):
            lengths = [{k: len(v) for k, v in o.items() if isinstance(v, tuple)} for o in (expected, found)]
            assert lengths[0] == lengths[1]
        assert len(leaves(expected)) == len(leaves(found))
        for a, b in zip(leaves(expected), leaves(found), strict=True):
            torch.testing.assert_close(a, b)


def test_lists_may_be_what_the_model_is_captured_with(tmp_path: Path) -> None:
    model, inputs = eager("bert")
    inputs |= {"output_attentions": True, "output_hidden_states": True}
    recipe = {"depth": {"keep_layers": [1]}, "quantize": [{"activation": {}}]}
    small = dwindle.compress(model, recipe, inputs=inputs)
    found = small(**inputs)
    assert (len(found.hidden_states), len(found.attentions)) == (2, 1)
    small.save(tmp_path / "small")
    again = dwindle.load(tmp_path / "small")(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(again), strict=True))
    student = dwindle.prepare(model, recipe, inputs=inputs)
    trained = student(**inputs)
    trained.last_hidden_state.sum().backward()
    finished = student.eval().finish()(**inputs)
    assert (len(finished.hidden_states), len(finished.attentions)) == (2, 1)


class Taps(nn.Module):
    """Three blocks; what each gives is given, the way `form` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.blocks = form, nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        if self.form == "some":
            return {"y": x, "taps": (outputs[0], outputs[2])}
        if self.form == "list":
            return {"y": x, "taps": outputs}
        return tuple(outputs)


@pytest.mark.parametrize(("form", "count"), [("some", 2), ("list", 2), ("tuple", 3)])
def test_only_a_list_inside_the_output_with_an_entry_for_each_block_is_shortened(form: str, count: int) -> None:
    torch.manual_seed(0)
    model, x = Taps(form).eval(), torch.randn(4, 8)
    small = dwindle.compress(model, {"depth": {"row": "blocks", "keep_layers": [0, 2]}}, inputs=x)
    found = small(x)
    one = model.blocks[0](x)
    expected = {"some": [one, model.blocks[2](one)], "list": [one, model.blocks[2](one)], "tuple": [one, one]}[form]
    given = found if form == "tuple" else found["taps"]
    assert len(given) == count
    for a, b in zip(expected, given, strict=False):
        torch.testing.assert_close(a.detach(), b)


class Weights(nn.Module):
    """Blocks whose weights one output has by name, and not all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Weighing() for _ in range(3))

    def forward(self, x: Tensor, tell: bool = False) -> Any:
        weights = []
        for block in self.blocks:
            x, weight = block(x)
            weights.append(weight)
        return {"y": x, "weights": (weights[0], weights[2])} if tell else {"y": x}


class _Weighing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.linear(x).softmax(-1)  # (B, 3)
        return x + weight.sum(-1, keepdim=True), weight


def test_what_a_block_alone_can_give_keeps_it_where_not_every_block_gives_it() -> None:
    torch.manual_seed(0)
    small = dwindle.compress(Weights().eval(), {"depth": {"keep_layers": [1, 2]}}, inputs={"x": torch.randn(4, 8)})
    with pytest.raises(PassError, match=r"(?s)blocks.0 cannot be dropped.*is used outside, and nothing that goes in"):
        small(x=torch.randn(4, 8), tell=True)


def test_places_and_names_of_a_structure() -> None:
    tensor, constant = {"kind": "tensor"}, {"kind": "constant", "value": None}
    inner = {"kind": "tuple", "items": [tensor, tensor]}
    output = {
        "kind": "dict",
        "items": {"a": tensor, "b": inner, "c": constant, "d": {"kind": "list", "items": [inner]}},
    }
    assert names(output) == ["a", "b", "b", "d", "d"]
    assert lists(output) == [[1, 2], [3, 4]]
    assert names(inner) == ["", ""]
    assert lists(inner) == []


def test_swin_counts_the_layers_of_each_stage(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 3], num_heads=[2, 2], window_size=4, num_labels=3
    )
    model = transformers.SwinForImageClassification(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    small = dwindle.compress(
        model, {"depth": {"row": "swin.encoder.layers.1.blocks", "keep_layers": [0, 1]}}, inputs=inputs
    )
    eager: Any = dwindle.transplant(small, model, inputs=inputs)
    assert (eager.config.depths, model.config.depths) == ([2, 2], [2, 3])
    eager.save_pretrained(tmp_path)
    again = transformers.SwinForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, small(**inputs).logits)


def test_gpt_neo_says_which_layer_attends_how(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=99,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        max_position_embeddings=32,
        window_size=4,
        attention_types=[[["global", "local"], 2]],
        use_cache=False,
    )
    model = transformers.GPTNeoForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(3, 99, (2, 9))}
    small = dwindle.compress(model, {"depth": {"keep_layers": [0, 1, 3]}}, inputs=inputs)
    eager: Any = dwindle.transplant(small, model, inputs=inputs)
    assert eager.config.attention_types == [[["global", "local", "local"], 1]]
    assert model.config.attention_types == [[["global", "local"], 2]]
    eager.save_pretrained(tmp_path)
    again = transformers.GPTNeoForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, small(**inputs).logits)


def test_bytes_before_are_the_whole_models_after_training_too() -> None:
    model, inputs = ZOO["bert"]()
    recipe = {"depth": {"keep_layers": [1]}, "quantize": [{"activation": {}}]}
    at_once = dwindle.compress(model, recipe, inputs=inputs).certificate
    student = copy.deepcopy(dwindle.prepare(model, recipe, inputs=inputs))
    trained = student.eval().finish().certificate
    assert at_once is not None
    assert trained is not None
    whole = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert trained.bytes_before == at_once.bytes_before == whole
    assert trained.bytes_after == at_once.bytes_after
    gone = [layer for layer in trained.layers if layer.name.startswith("encoder.layer.0.")]
    assert len(gone) == 16
    assert all(layer.bytes_after == 0 for layer in gone)
