"""Distillation and depth that cannot be: said before training, with what was required, what was found and the cure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dwindle
from dwindle.runtime.errors import CalibrationError, DistillationError, RecipeError

pytest.importorskip("transformers")

W4: dict[str, Any] = {"quantize": [{"weight": {"bits": 4}, "activation": {}}]}


def bert(layers: int = 3, vocab: int = 50, width: int = 32) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=vocab, **sizes)).eval()


def batch(labels: bool = False) -> dict[str, Tensor]:
    words = torch.randint(20, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    return given | ({"labels": torch.tensor([0, 1])} if labels else {})


def student(settings: Mapping[str, Any], *, labels: bool = False, **more: Any) -> dwindle.Student:
    model = bert()
    recipe = {**W4, "distill": settings}
    return dwindle.prepare(model, recipe, inputs=batch(labels), **{"teacher": model, **more})


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"kd_until": 1000}, "1000"),
        ({"kd_until": 10}, "10"),
        ({"stages": [{"until": 5000, "logits": 0}, {}]}, "5000"),
    ],
)
def test_a_part_that_would_never_begin(settings: Any, found: str) -> None:
    with pytest.raises(RecipeError, match=rf"(?s)never begin.*total_steps=10.*found: {found}\n"):
        student(settings, total_steps=10)
    assert student(settings, total_steps=6000).distillation is not None


@pytest.mark.parametrize("settings", [{"task": 0, "logits": 0}, {"task": 0, "stages": 2}])
def test_a_stage_in_which_nothing_counts(settings: Any) -> None:
    with pytest.raises(RecipeError, match=r"(?s)nothing counts.*hidden, scores"):
        student(settings, total_steps=10)


def test_an_early_end_wants_labels_from_the_first_step() -> None:
    ending = student({"hidden": 1, "kd_until": 2})
    with pytest.raises(DistillationError, match=r"(?s)from step 2 on.*labels in every batch"):
        ending.loss(batch())
    assert ending.loss(batch(labels=True)).isfinite()


def test_a_recipe_that_learns_from_a_teacher_wants_one() -> None:
    alone = student({"hidden": 1}, teacher=None)
    assert alone(**batch()).logits.shape == (2, 2)
    with pytest.raises(DistillationError, match=r"(?s)learns from a teacher.*teacher=model"):
        alone.loss(batch(labels=True))


def test_a_model_that_was_loaded_has_no_blocks(tmp_path: Path) -> None:
    small = dwindle.compress(bert(), "zeroquant-w8a8", inputs=batch())
    small.save(tmp_path / "saved")
    assert student({"hidden": 1, "scores": 1}, teacher=small).loss(batch()).isfinite()
    loaded = dwindle.load(tmp_path / "saved")
    with pytest.raises(DistillationError, match=r"(?s)no blocks to learn from.*saved and loaded"):
        student({"hidden": 1}, teacher=loaded)
    assert student({}, teacher=loaded).loss(batch()).isfinite()


def test_the_whole_model_is_no_place() -> None:
    with pytest.raises(DistillationError, match=r"(?s)output of the model.*near names are 'bert"):
        student({"taps": [{"student": ""}]}, labels=True)


def test_blocks_that_cannot_be_compared_say_why() -> None:
    from transformers import AlbertConfig, AlbertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    model = AlbertModel(AlbertConfig(vocab_size=50, embedding_size=16, **sizes)).eval()
    with pytest.raises(DistillationError, match="called 3 times"):
        dwindle.prepare(model, {**W4, "distill": {"hidden": 1}}, inputs=batch(), teacher=model)


def test_layers_of_another_vocabulary_or_width() -> None:
    own = student({})
    with pytest.raises(DistillationError, match="different vocabularies"):
        own.distill_layers([batch()], teacher=bert(vocab=20), steps=1)
    with pytest.raises(DistillationError, match=r"(?s)required: [^\n]*16\)[^\n]*\n  found: [^\n]*32\)") as error:
        own.distill_layers([batch()], teacher=bert(width=16), steps=1)
    assert "sym_size" not in str(error.value)


def test_a_block_whose_training_fails_is_as_it_was() -> None:
    own = student({})
    before = {name: p.detach().clone() for name, p in own.named_parameters()}
    with pytest.raises(DistillationError, match="lower lr"):
        own.distill_layers([batch()], lr=1e30, steps=2)
    assert all(torch.equal(p, before[name]) for name, p in own.named_parameters())


def test_one_batch_is_not_several() -> None:
    model, own = bert(), student({})
    for call in (
        lambda: dwindle.rank_layers(model, batch()),
        lambda: own.distill_layers(batch()),
        lambda: dwindle.compress(model, "static-w8a8", inputs=batch(), data=batch()),
        lambda: dwindle.compress(model, {**W4, "layerwise": {}}, inputs=batch(), data=batch()),
    ):
        with pytest.raises(CalibrationError, match=r"(?s)one batch.*data=\[batch\]"):
            call()


def test_rankings_by_what_there_is_not() -> None:
    with pytest.raises(RecipeError, match=r"(?s)measure.*found: 'kl'"):
        dwindle.rank_layers(bert(), [batch()], by="change", measure="kl")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"cure: by='change'"):
        dwindle.rank_layers(bert(), [batch()], by="chnge")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="allow more change"):
        dwindle.compress(bert(), {"depth": {"by": "greedy", "max_change": 1e-9}}, inputs=batch(), data=[batch()])


def test_the_callers_config_is_the_callers() -> None:
    model = bert()
    before = dict(vars(model.config))
    small = dwindle.compress(model, {"depth": {"keep": 2}}, inputs=batch(labels=True))
    own = dwindle.prepare(model, W4, inputs=batch(labels=True), teacher=model)
    own.loss(batch(labels=True))
    own.config.use_cache = not own.config.use_cache
    assert vars(model.config) == before
    assert small.config.to_dict() == model.config.to_dict()
