"""One recipe that drops layers, prunes, puts in zeros and quantises, with one teacher: one artifact, in one order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_classifier
from torch import Tensor

import dwindle
from dwindle.runtime.plan import EDITS
from dwindle.runtime.qtensor import QTensor

pytest.importorskip("transformers")

RECIPE: dict[str, Any] = {
    "quantize": [
        {"weight": {"bits": 4}, "activation": {"bits": 8}},
        {"modules": "*.query", "weight": {"bits": 2, "kind": "ternary"}},
        {"operators": "embedding", "weight": {"bits": 1, "kind": "binary"}},
    ],
    "sparsify": {"ratio": 0.5, "modules": "bert.pooler.*"},
    "prune": {"ratio": 0.5, "scopes": ["heads", "rows"], "modules": "*.encoder.*"},
    "depth": {"keep": 2},
    "distill": {"hidden": 1.0, "scores": 1.0},
}
# In what is pruned as well, which training refuses
ZEROS_TOO = {"sparsify": {"ratio": 0.5, "modules": ["bert.pooler.*", "*.query"]}}


def classifier() -> Any:
    return bert_classifier(4, vocab=50, num_labels=3)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}


def trained(recipe: dict[str, Any]) -> Any:
    model, given = classifier(), batch()
    student = dwindle.prepare(model, recipe, inputs=given, teacher=model)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for _ in range(4):
        student.loss(given).backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
    return student


@pytest.mark.parametrize("trains", [True, False])
def test_layers_go_then_structures_then_zeros_then_bits(trains: bool, tmp_path: Path) -> None:
    given = batch()
    student = trained(RECIPE) if trains else None
    small = student.finish() if student else dwindle.compress(classifier(), RECIPE | ZEROS_TOO, inputs=given)
    kinds = [EDITS.index(type(edit)) for edit in small.plan]
    assert kinds == sorted(kinds)
    assert set(kinds) == {0, 1, 2, 3}
    kept = {edit.fqn.split(".")[3] for edit in small.plan.quantizations if ".layer." in edit.fqn}
    assert kept == {"1", "3"}
    assert not [name for name in small.state_dict() if ".layer.0." in name or ".layer.2." in name]
    query = small.store.get("bert.encoder.layer.3.attention.self.query.weight")
    assert isinstance(query, QTensor)
    assert (query.shape, query.scheme.kind) == ((16, 32), "ternary")  # half of the heads are gone
    if student is None:
        assert (query.int_codes() == 0).sum() >= 16 * 32 // 2
        stages = list(dict.fromkeys(entry.stage for entry in small.log))
        order = [stages.index(stage) for stage in ("drop", "prune", "sparsify", "insert", "lower")]
        assert order == sorted(order)
    small.save(tmp_path / "small")
    loaded = dwindle.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, small(**given).logits)
        if student is not None:
            assert torch.allclose(small(**given).logits, student(**given).logits, atol=1e-4)


def test_the_order_of_a_recipe_does_not_matter() -> None:
    given = batch()
    backwards = dict(reversed(RECIPE.items()))
    one, other = (dwindle.compress(classifier(), recipe, inputs=given) for recipe in (RECIPE, backwards))
    assert one.plan == other.plan
    with torch.no_grad():
        assert torch.equal(one(**given).logits, other(**given).logits)


def test_what_is_pruned_is_chosen_among_the_layers_that_stay() -> None:
    model, given = classifier(), batch()
    with torch.no_grad():
        for n in (0, 2):  # which go
            for p in model.bert.encoder.layer[n].parameters():
                p.mul_(1e-3)
    whole = {"params": 0.5}
    small = dwindle.compress(model, {"depth": {"keep": 2}, "prune": {"target": whole}}, inputs=given)
    assert {edit.fqn.split(".")[3] for edit in small.plan.slices if ".layer." in edit.fqn} == {"1", "3"}
