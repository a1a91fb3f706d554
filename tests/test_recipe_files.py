"""The recipes in examples/recipes: each is read, and does what its script does to a model of the family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_classifier, first
from torch import Tensor, nn

import dwindle
from dwindle.frontends.recipe import Recipe
from dwindle.runtime.plan import Plan

pytest.importorskip("yaml")

FOLDER = Path(__file__).parent.parent / "examples" / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
HIDDEN = 192  # 48 and 64 scales a weight, 12 heads


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bert(layers: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
    return bert_classifier(layers, hidden=HIDDEN, heads=12, intermediate_size=HIDDEN), tokens()


def twelve() -> tuple[nn.Module, dict[str, Tensor]]:
    return bert(12)


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 99, "n_positions": 64, "n_embd": HIDDEN, "n_layer": 1, "n_head": 4}
    config = GPT2Config(**shape, bos_token_id=0, eos_token_id=1)
    config.use_cache = False
    return GPT2LMHeadModel(config).eval(), tokens()


class Block(nn.Module):
    """Two convolutions with batch norms, and what goes in beside them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), the same."""
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """With the names of the CIFAR script's model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.layer1, self.layer2 = nn.Sequential(Block(8), Block(8)), nn.Sequential(Block(8))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 5)."""
        return self.fc(self.layer2(self.layer1(torch.relu(self.conv1(x)))).mean((2, 3)))


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    return ResNet().eval(), {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def widths(plan: Plan) -> dict[str, str]:
    """Bits of weight and activation of what is quantised, by the end of its name."""
    found = {}
    for edit in plan.quantizations:
        name = ".".join(edit.fqn.removesuffix(".weight").split(".")[-3:])
        met = "" if edit.activation is None else f"a{edit.activation.bits}"
        found[name] = f"w{edit.weight.bits}{met} {edit.weight.granularity}"
    return found


def of_bert(attention: str, rest: str, words: str | None) -> dict[str, str]:
    names = {f"attention.self.{name}": attention for name in ("query", "key", "value")}
    names |= {"attention.output.dense": rest, "0.intermediate.dense": rest, "0.output.dense": rest}
    return names if words is None else names | {"bert.embeddings.word_embeddings": words}


def of_gpt2(attention: str, mlp: str) -> dict[str, str]:
    return {"0.attn.c_attn": attention, "0.attn.c_proj": attention, "0.mlp.c_fc": mlp, "0.mlp.c_proj": mlp}


def kept(plan: Plan) -> list[int]:
    """Numbers of the twelve layers that stay."""
    gone = {int(edit.path.rpartition(".")[2]) for edit in plan.drops}
    return [number for number in range(12) if number not in gone]


ONE = of_bert("w1a8 tensor", "w1a8 tensor", "w1 channel")
SIX, FIVE = [1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10]
QUANTISED: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "bert_xtc_w1a8": (bert, ONE),
    "bert_zeroquant_w8a8": (bert, of_bert("w8a8 rows", "w8a8 rows", "w8 channel")),
    "bert_zeroquant_w48a8_lkd": (
        functools.partial(bert, 2),  # one block alone is no row of them
        of_bert("w8a8 rows", "w4 rows", None)
        | {"attention.output.dense": "w8a8 rows", "1.intermediate.dense": "w4 rows", "1.output.dense": "w4 rows"},
    ),
    "bert_quant_weight": (bert, of_bert("w4 rows", "w2 rows", "w4 channel")),
    "bert_quant_activation": (bert, of_bert("w8a8 channel", "w8a4 channel", None)),
    "gpt2_zeroquant_w8a8": (gpt2, of_gpt2("w8a8 rows", "w8a8 rows")),
    "gpt2_zeroquant_w48a8": (gpt2, of_gpt2("w8a8 rows", "w4a8 rows")),
}
SHORTENED: dict[str, tuple[list[int], bool]] = {
    "bert_layer_reduction": (FIVE, False),
    "bert_xtc_layer_reduction": (SIX, False),
    "bert_xtc_layer_reduction_w1a8": (SIX, True),
    "bert_xtc_5_layers_w1a8": (FIVE, True),
}
# Groups that are masked in training, and what one of them keeps.
PRUNED: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "bert_pruning_row": (bert, (116, HIDDEN)),
    "bert_pruning_head": (bert, (8, 12)),
    "cifar_channel_pruning": (resnet, (4, 8)),
}
ZEROS = ("bert_pruning_sparse", "bert_pruning_sparse_snip_momentum")


def test_every_file_is_read_and_tried_below() -> None:
    tried = {*QUANTISED, *SHORTENED, *PRUNED, *ZEROS}
    assert tried == {path.stem for path in FILES}
    names = [Recipe.of(path).name for path in FILES]
    assert len(set(names)) == len(FILES)
    assert all(path.read_text().startswith("# DeepSpeedExamples compression/") for path in FILES)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTISED)
def test_bits(name: str) -> None:
    make, expected = QUANTISED[name]
    model, inputs = make()
    small = dwindle.compress(model, FOLDER / f"{name}.yaml", inputs=inputs, data=[inputs])
    assert widths(small.plan) == expected
    learned = [entry for entry in small.log if entry.stage == "layerwise"]
    assert len(learned) == (2 if name.endswith("lkd") else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTENED)
def test_layers(name: str) -> None:
    stay, binary = SHORTENED[name]
    model, inputs = twelve()
    small = dwindle.compress(model, FOLDER / f"{name}.yaml", inputs=inputs)
    assert kept(small.plan) == stay
    assert {edit.weight.kind for edit in small.plan.quantizations} == ({"binary"} if binary else set())
    assert len(small.plan.quantizations) == (6 * len(stay) + 1 if binary else 0)


def started(name: str, make: Callable[[], Any]) -> Any:
    """A student some steps behind which its recipe has been carried out."""
    model, inputs = make()
    plain = Recipe.of(FOLDER / f"{name}.yaml").plain()
    for entry in (*plain.get("prune", ()), *plain.get("sparsify", ())):
        entry["schedule"] = {"type": entry.get("schedule", {}).get("type", "cubic"), "offset": 1}
    student = dwindle.prepare(model.train(), plain, inputs=inputs)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
    for _ in range(3):
        first(student(**inputs)).square().mean().backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
    return student


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNED)
def test_structures(name: str) -> None:
    make, (left, whole) = PRUNED[name]
    cuts = started(name, make).eval().finish().plan.slices
    assert cuts
    per = HIDDEN // 12 if name == "bert_pruning_head" else 1
    assert {(cut.size - len(cut.removed), cut.size) for cut in cuts} == {(left * per, whole * per)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZEROS)
def test_zeros(name: str) -> None:
    found = started(name, bert).eval().finish().plan.sparsities
    ratio = 0.6 if name == "bert_pruning_sparse" else 0.8
    assert abs(sum(edit.zeros for edit in found) / sum(edit.total for edit in found) - ratio) < 0.01
    names = {edit.fqn.split(".")[-2] for edit in found}
    every = {"query", "key", "value"} | ({"dense"} if "snip" in name else set())
    assert names == every
