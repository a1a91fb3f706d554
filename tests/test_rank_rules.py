"""Layers chosen by data in recipes: decided once, refused where data or a rule says nothing, and shown."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import ROWS, gpt2, unlabelled
from models import ZOO, first
from torch import Tensor, nn

import dwindle
from dwindle.frontends.rank import rank_layers
from dwindle.passes.rank import Ranking
from dwindle.runtime.errors import CalibrationError, RecipeError


@pytest.mark.parametrize("by", ["influence", "change", "greedy"])
def test_a_recipe_asks_for_it_and_is_decided_once(by: str) -> None:
    model, batches = gpt2()
    batches = unlabelled(batches)
    ranking = rank_layers(model, batches, by=by, quiet=True)  # type: ignore[arg-type]  # it is a way
    recipe = {"depth": {"keep": 2, "by": by}, "quantize": [{"activation": {"range": "static"}}]}
    small = dwindle.compress(model, recipe, inputs=batches[0], data=iter(batches))  # read twice
    gone = [edit.path for edit in small.plan.drops]
    assert gone == [f"{ROWS['gpt2']}.{i}" for i in range(4) if i not in ranking.keep(2)]
    said = {entry.where: entry.reason for entry in small.log if entry.rule == f"drop.{by}"}
    assert list(said) == gone
    assert all(("influence" if by == "influence" else "output changes by") in reason for reason in said.values())
    named = {"depth": {"keep_layers": list(ranking.keep(2))}, "quantize": recipe["quantize"]}
    same = dwindle.compress(model, named, inputs=batches[0], data=batches)
    assert torch.equal(first(small(**batches[1])), first(same(**batches[1])))
    again = small(**batches[1], output_hidden_states=True)  # a variant of its own
    assert len(again.hidden_states) == 3
    assert torch.equal(again.logits, first(small(**batches[1])))


def test_training_goes_by_data_too() -> None:
    model, batches = gpt2()
    ranking = rank_layers(model, unlabelled(batches), by="greedy", measure="logits", quiet=True)
    limit = sum(ranking.rows[0].changes[:2]) / 2
    stay = ranking.within(limit)
    assert len(stay) == 3
    recipe = {"depth": {"max_change": limit, "by": "greedy", "measure": "logits"}}
    student = dwindle.prepare(model, recipe, inputs=unlabelled(batches)[0], data=unlabelled(batches))
    assert [edit.path for edit in student.plan.drops] == [f"{ROWS['gpt2']}.{i}" for i in range(4) if i not in stay]
    student.loss(batches[0]).backward()


def test_a_second_rule_goes_by_what_the_first_has_left() -> None:
    model, inputs = ZOO["t5"]()
    for part in ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"):
        for number in (0, 1):
            for name, module in model.named_modules():
                if name.startswith(f"decoder.block.{number}.") and name.endswith(part):
                    nn.init.normal_(module.weight, std=0.3 * (number + 1))
    rules = [{"row": "encoder.block", "keep_layers": [1]}, {"row": "decoder.block", "keep": 1, "by": "change"}]
    small = dwindle.compress(model, {"depth": rules}, inputs=inputs, data=[inputs])
    drops = [edit.path for edit in small.plan.drops]
    assert drops[0] == "encoder.block.0"
    with torch.no_grad():
        whole = model(**inputs)
    apart: list[float] = []
    for number in (0, 1):
        both = [rules[0], {"row": "decoder.block", "keep_layers": [1 - number]}]
        found = dwindle.compress(model, {"depth": both}, inputs=inputs)(**inputs)
        kept = inputs["attention_mask"].bool()
        pairs = [(whole.logits, found.logits)]
        pairs += [(whole.encoder_last_hidden_state[kept], found.encoder_last_hidden_state[kept])]
        error = sum(float((a - b).detach().double().square().sum()) for a, b in pairs)
        apart.append(math.sqrt(error / sum(float(a.detach().double().square().sum()) for a, _ in pairs)))
    assert drops[1] == f"decoder.block.{apart.index(min(apart))}"
    said = next(e.reason for e in small.log if e.rule == "drop.change")
    assert float(said.split(" by ")[1].split()[0]) == pytest.approx(min(apart), rel=5e-3)


def batches_of(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    yield batch


def test_data_that_is_missing_or_says_nothing() -> None:
    model, batches = gpt2(2)
    (batch, _) = unlabelled(batches)
    recipe = {"depth": {"keep": 1, "by": "influence"}}
    with pytest.raises(CalibrationError, match=r"(?s)chooses layers by influence.*found: none.*cure: give data="):
        dwindle.compress(model, recipe, inputs=batch)
    with pytest.raises(CalibrationError, match=r"(?s)chooses layers by influence.*found: none.*cure: give data="):
        dwindle.prepare(model, recipe, inputs=batch)
    for none in (None, [], iter(())):
        with pytest.raises(CalibrationError, match=r"(?s)ranked by data.*required: data=.*cure: give data="):
            rank_layers(model, none, inputs=batch, quiet=True)
    with pytest.raises(CalibrationError, match=r"(?s)at least one batch"):
        dwindle.compress(model, recipe, inputs=batch, data=[])
    masked = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    with pytest.raises(CalibrationError, match=r"(?s)influence of transformer.h.0 cannot.*no padding.*found: none"):
        rank_layers(model, [masked], quiet=True)
    with pytest.raises(CalibrationError, match=r"(?s)change of the loss.*labels in inputs=.*found: logits.*cure"):
        rank_layers(model, [batch], by="change", measure="loss", quiet=True)
    assert rank_layers(model, batches_of(batch), quiet=True).rows[0].row == ROWS["gpt2"]
    nn.init.constant_(model.get_parameter("transformer.h.1.mlp.c_fc.bias"), math.nan)
    with pytest.raises(CalibrationError, match=r"transformer\.h\.1 cannot be measured"):
        rank_layers(model, [batch], quiet=True)
    bert, inputs = ZOO["bert"]()
    with pytest.raises(CalibrationError, match=r"(?s)output with logits.*found: last_hidden_state, pooler_output"):
        rank_layers(bert, [inputs], by="change", measure="logits", quiet=True)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"keep": 3, "by": "influence"}, "1 to 2 layers"),
        ({"keep": 2, "by": "influence"}, r"(?s)keeps all layers of encoder.layer of 2.*leave the rule out"),
        ({"keep": 2}, r"(?s)keeps all layers of encoder.layer of 2.*leave the rule out"),
        ({"keep_layers": [1, 0]}, "keeps all layers"),
        ({"max_change": 1e-6, "by": "greedy"}, "keeps all layers"),
        ({"keep": 1, "by": "size"}, "'influence', 'change' or 'greedy'"),
        ({"keep": 1, "by": "influence", "spread": "even"}, "by in place of spread"),
        ({"keep_layers": [1], "by": "influence"}, "by in place of"),
        ({"keep": 1, "max_change": 0.1}, "max_change beside by: greedy"),
        ({"keep": 1, "by": "influence", "max_change": 0.1}, "max_change beside by: greedy"),
        ({"keep": 1, "by": "influence", "measure": "loss"}, "measure beside by: change"),
        ({"by": "greedy", "max_change": 0}, "greater than 0"),
        ({"by": "greedy"}, "either keep or keep_layers"),
        ([{"keep": 1, "by": "influence"}, {"keep_layers": [1]}], r"(?s)one rule for each row.*encoder.layer"),
    ],
    ids=str,
)
def test_rules_that_contradict_themselves(rule: Any, words: str) -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(RecipeError, match=words):
        dwindle.compress(model, {"depth": rule}, inputs=inputs, data=[inputs])


def test_arguments_that_contradict_themselves() -> None:
    model, inputs = ZOO["bert"]()
    for wrong in ({"by": "size"}, {"keep": 0}, {"keep": 2}, {"by": "change", "max_change": 0.1}):
        with pytest.raises(RecipeError, match="required"):
            rank_layers(model, [inputs], quiet=True, **wrong)  # type: ignore[arg-type]  # that is the test
    ranking = rank_layers(model, [inputs], quiet=True)
    with pytest.raises(RecipeError, match=r"(?s)1 to 2 layers.*found: 3"):
        ranking.keep(3)
    with pytest.raises(RecipeError, match="an order by 'greedy'"):
        ranking.within(0.1)
    mlp, example = ZOO["mlp"]()
    with pytest.raises(RecipeError, match="no blocks that repeat"):
        rank_layers(mlp, [example], quiet=True)


def test_a_layer_that_all_calls_share_is_declined() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 99,
        "embedding_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    model = transformers.AlbertModel(transformers.AlbertConfig(intermediate_size=64, **sizes)).eval()
    batch = {"input_ids": torch.randint(3, 99, (2, 8))}
    ranking = rank_layers(model, [batch], quiet=True)
    assert ranking.order == ()
    assert "it is called 3 times" in str(ranking)
    with pytest.raises(RecipeError, match=r"(?s)one block, encoder.*it is called 3 times.*fewer calls"):
        dwindle.compress(model, {"depth": {"keep": 1, "by": "influence"}}, inputs=batch, data=[batch])
    with pytest.raises(RecipeError, match=r"(?s)one block, encoder.*it is called 3 times.*fewer calls"):
        dwindle.compress(model, {"depth": {"keep": 1}}, inputs=batch)


class Tower(nn.Module):
    """Two blocks that can go, and one between them that changes the width."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((8, 8), (8, 6), (6, 6))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in widths)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("by", ["influence", "change", "greedy"])
def test_blocks_that_cannot_go_are_listed_and_stay(by: Any) -> None:
    torch.manual_seed(0)
    model, x = Tower().eval(), torch.randn(16, 8)
    ranking = rank_layers(model, [x], by=by, quiet=True)
    assert sorted(ranking.order) == [0, 2]
    assert "blocks.1 stays: nothing that goes in has the shape of what comes out" in str(ranking)
    assert ranking.keep(1) == (1,)
    small = dwindle.compress(model, {"depth": {"keep": 1, "by": by}}, inputs=x, data=[x])
    assert [edit.path for edit in small.plan.drops] == ["blocks.0", "blocks.2"]
    frozen = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((8, 6), (6, 4), (4, 4)))).eval()
    with pytest.raises(RecipeError, match=r"(?s)2 layers.*at most 1.*found: 0: nothing that goes in.*keep more layers"):
        dwindle.compress(frozen, {"depth": {"row": "", "keep": 1, "by": by}}, inputs=x, data=[x])


def test_nothing_of_the_model_changes_and_all_is_shown() -> None:
    model, batches = gpt2()
    before = copy.deepcopy(model.state_dict())
    model.train()
    ranking = rank_layers(model, unlabelled(batches), by="greedy", quiet=True)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    shown = str(ranking)
    for word in ("Layers of transformer.h by greedy", "goes", "influence", "with those before", "relative change"):
        assert word in shown
    (row,) = ranking.to_json()["rows"]
    assert row["order"] == ranking.order
    assert [block["number"] for block in row["blocks"]] == [0, 1, 2, 3]
    assert dwindle.rank_layers is rank_layers
    assert isinstance(ranking["transformer.h"], Ranking)


def test_progress_is_shown_once_and_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.frontends.progress.PATIENCE", 0.0)
    model, batches = gpt2(2)
    rank_layers(model, unlabelled(batches), by="change")
    shown = capsys.readouterr()
    assert shown.err.count("Ranking transformer.h") == 1
    assert not shown.out
    rank_layers(model, unlabelled(batches), quiet=True)
    assert not capsys.readouterr().err
