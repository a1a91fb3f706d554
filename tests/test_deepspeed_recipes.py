"""What a DeepSpeed configuration becomes: recipes, and training with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_configs import activations, bits, engine, layers, mixed, moq, pruning_off, weights
from models import ZOO

import dwindle
from dwindle.frontends.recipe import Recipe
from dwindle.passes.schedule import Constant, MoQ
from dwindle.runtime.errors import RecipeError
from dwindle.runtime.qtensor import QTensor

ALL = ("query", "key", "value", "dense")


def _in_forward(target: int, **shared: Any) -> dict[str, Any]:
    return weights({"wq1": bits(12, target, modules=ALL)}, quantize_weight_in_forward=True, **shared)


def test_in_the_forward_the_target_holds_at_once() -> None:
    recipe = Recipe.of(engine(weight_quantization=_in_forward(4, schedule_offset=5, rounding="stochastic")))
    (rule,) = recipe.rules()
    assert rule.weight is not None
    assert (rule.weight.bits, rule.weight.rounding) == (4, "nearest")  # DeepSpeed's forward ignores rounding
    assert rule.schedule == Constant(offset=5)


@pytest.mark.parametrize(("target", "kind"), [(1, "binary"), (2, "ternary"), (3, "symmetric")])
def test_few_bits_are_binary_and_ternary(target: int, kind: str) -> None:
    (rule,) = Recipe.of(engine(weight_quantization=_in_forward(target))).rules()
    assert rule.weight is not None
    assert rule.weight.kind == kind


def test_moq_keeps_its_period_mixing_and_rounding() -> None:
    section = weights(
        {"wq1": bits(12, 8, 10, ALL)},
        schedule_offset=3,
        quantize_groups=8,
        rounding="stochastic",
        **mixed(0.01, enabled=True),
    )
    (rule,) = Recipe.of(engine(fp16=True, weight_quantization=section)).rules()
    assert rule.schedule == MoQ(start_bits=12, period=10, offset=3, change=0.01)
    assert rule.groups == 8
    assert rule.weight is not None
    assert rule.weight.rounding == "stochastic"


def test_the_legacy_period_is_turned_into_steps() -> None:
    (rule,) = Recipe.of(moq()).rules()
    assert isinstance(rule.schedule, MoQ)
    assert rule.modules == ("*",)


def test_activations_are_added_to_the_weights_that_match() -> None:
    config = engine(
        weight_quantization=_in_forward(4),
        activation_quantization=activations(("query", "key"), schedule_offset=7),
    )
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model.train(), config, inputs=inputs)
    found = {edit.fqn: edit for edit in student.plan}
    query = found["encoder.layer.0.attention.self.query.weight"]
    value = found["encoder.layer.0.attention.self.value.weight"]
    assert query.activation is not None
    assert (query.weight.bits, value.weight.bits, value.activation) == (4, 4, None)
    assert student.course.paces[query.fqn].activation == Constant(offset=7)


def test_activations_alone_bring_weights_of_eight_bits() -> None:
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model, engine(activation_quantization=activations(("query",))), inputs=inputs)
    assert {edit.weight.bits for edit in student.plan} == {8}
    assert len(student.plan) == 2


def test_layers_are_left_out_of_the_teacher() -> None:
    reduction = layers((1,), module_name_prefix="encoder.layer", other_module_name=["embeddings"])
    config = engine(weight_quantization=_in_forward(8), layer_reduction=reduction)
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model, config, inputs=inputs)
    assert [edit.path for edit in student.plan.drops] == ["encoder.layer.0"]
    assert {edit.weight.bits for edit in student.plan.quantizations} == {8}
    for order in ((3, 1), (1, 1)):
        with pytest.raises(RecipeError, match=r"(?s)each layer once and in order.*init_compression"):
            Recipe.of(engine(layer_reduction=layers(order)))
    Recipe.of(engine(weight_quantization=_in_forward(8), **pruning_off()))  # off, it may say anything


@pytest.mark.parametrize("target", [8, 4, 2, 1])
def test_a_file_trains_and_leaves_integers(target: int, tmp_path: Path) -> None:
    config = engine(
        fp16=True,
        weight_quantization=weights({"wq1": bits(10, target, modules=ALL)}, quantize_groups=4),
        activation_quantization=activations(ALL, schedule_offset=2),
        **pruning_off(),
    )
    (tmp_path / "ds.json").write_text(json.dumps(config))
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model.train(), tmp_path / "ds.json", inputs=inputs)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
    student.follow(optimizer)
    for _ in range(12):
        student(**inputs)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    packed = [value for _, value in student.finish().store.entries() if isinstance(value, QTensor)]
    assert {value.scheme.bits for value in packed} == {target}
