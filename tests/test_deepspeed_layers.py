"""A student's layers from its teacher, and GPT-2's Conv1D as linear layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from deepspeed_configs import JSON, bits, engine, layers, weights
from models import ZOO, bert_classifier
from torch import nn
from transformers.pytorch_utils import Conv1D

from dwindle.deepspeed import convert_conv1d_to_linear, init_compression, redundancy_clean, student_initialization
from dwindle.frontends.deepspeed.inplace import require_steering
from dwindle.runtime.errors import DwindleError, RecipeError


def _bert(depth: int, seed: int, **more: Any) -> nn.Module:
    shape = {"hidden": 16, "heads": 2, "vocab": 50, "intermediate_size": 32, "max_position_embeddings": 16} | more
    model = bert_classifier(depth, seed=seed, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.bert.encoder.layer:
            layer.register_buffer("seen", torch.randn(3))
    return model


def _config(kept: tuple[int, ...] = (1, 3), **sections: Any) -> JSON:
    return engine(layer_reduction=layers(kept), **sections)


def test_layers_and_other_modules_are_the_teachers() -> None:
    teacher, student = _bert(4, 0), _bert(2, 1)
    before = {name: id(p) for name, p in student.named_parameters()}
    assert student_initialization(student, teacher, _config()) is None
    assert {name: id(p) for name, p in student.named_parameters()} == before
    for i, layer in enumerate((1, 3)):
        own, theirs = student.bert.encoder.layer[i].state_dict(), teacher.bert.encoder.layer[layer].state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in own.items())  # buffers too
    for name in ("bert.embeddings", "bert.pooler", "classifier"):
        own, theirs = (dict(m.get_submodule(name).named_parameters()) for m in (student, teacher))
        assert all(torch.equal(value, theirs[key]) for key, value in own.items())
        assert all(value is not theirs[key] for key, value in own.items())


def test_a_student_is_initialised_and_then_quantised() -> None:
    section = weights({"wq1": bits(8, 8, 0, ("attention.self",))})
    teacher, student = _bert(4, 0), _bert(2, 1)
    config = _config(weight_quantization=section)
    assert init_compression(student, config, teacher_model=teacher) is student
    assert len(student.bert.encoder.layer) == 2
    own, theirs = student.bert.encoder.layer[1], teacher.bert.encoder.layer[3]
    assert torch.equal(own.attention.self.query.weight, theirs.attention.self.query.weight)
    assert len(require_steering(student).course.weights) == 6
    redundancy_clean(student, config)
    tokens = torch.arange(8).reshape(2, 4)
    outputs = student(tokens, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert init_compression(_bert(2, 1), _config(), teacher) is not None  # layer reduction alone


@pytest.mark.parametrize(
    ("student", "teacher", "config", "says"),
    [
        ((4, 1), (4, 0), _config(), "student's layers.*2 layers.*4 layers.*num_hidden_layers"),
        ((2, 1), (3, 0), _config(), "does not have.*0 to 2.*3"),
        ((2, 1), (4, 0), engine(layer_reduction=layers((1, 3), enabled=False)), "nothing to initialise"),
        ((2, 1), (4, 0), engine(layer_reduction=layers((1, 3), module_name_prefix="bert.layers")), "no module"),
        ((2, 1), (4, 0), engine(layer_reduction=layers((1, 3), other_module_name=["head"])), "no module 'head'"),
        ((2, 1, {"intermediate_size": 16}), (4, 0), _config(), "another shape"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(student: Any, teacher: Any, config: JSON, says: str) -> None:
    models = [_bert(depth, seed, **(more[0] if more else {})) for depth, seed, *more in (student, teacher)]
    before = copy.deepcopy(models[0].state_dict())
    with pytest.raises(RecipeError, match=f"(?s){says}"):
        student_initialization(*models, config)
    assert all(torch.equal(value, before[name]) for name, value in models[0].state_dict().items())


def test_a_layer_of_another_build_is_refused() -> None:
    teacher, student = _bert(4, 0), _bert(2, 1)
    teacher.bert.encoder.layer[3].extra = nn.Parameter(torch.ones(2))
    with pytest.raises(RecipeError, match=r"(?s)layer\.1 is not built as.*layer\.3.*extra"):
        student_initialization(student, teacher, _config())


def test_conv1d_becomes_linear_in_place() -> None:
    model, inputs = ZOO["gpt2"]()
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    model.transformer.h[0].eval()
    calls: list[int] = []
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(**inputs).logits
    before = {name: id(p) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    assert convert_conv1d_to_linear(model, Conv1D) is model
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    linear = model.transformer.h[0].attn.c_attn
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features) == (32, 96) == linear.weight.shape[::-1]
    assert not linear.weight.requires_grad
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
    assert len(calls) == 2
    convert_conv1d_to_linear(model, Conv1D)  # nothing is left to convert


def test_tied_conv1d_are_transposed_once_and_foreign_ties_refused() -> None:
    one, two = Conv1D(8, 4), Conv1D(8, 4)
    two.weight = one.weight
    model, x = nn.ModuleList([one, two]), torch.randn(3, 4)
    expected = [module(x) for module in model]
    convert_conv1d_to_linear(model, Conv1D)
    assert model[0].weight is model[1].weight
    assert all(torch.allclose(module(x), y) for module, y in zip(model, expected, strict=True))
    tied = nn.ModuleList([Conv1D(8, 4), nn.Linear(8, 4)])
    tied[1].weight = tied[0].weight
    with pytest.raises(DwindleError, match=r"(?s)1\.weight is shared with a Conv1D"):
        convert_conv1d_to_linear(tied, Conv1D)
    assert isinstance(tied[0], Conv1D)
