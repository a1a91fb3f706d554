"""compress end to end on tiny models: what is packed, what is declined, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO, first
from numerics import error
from torch import nn

import dwindle
from dwindle.runtime.errors import CalibrationError, CaptureError, RecipeError, SchemeError
from dwindle.runtime.qtensor import QTensor

W4_GROUP = {"quantize": [{"weight": {"bits": 4, "group_size": 8}}]}
STATIC_LINEAR = {
    "quantize": [{"weight": {"bits": 8}, "activation": {"range": "static", "kind": "asymmetric"}}],
    "calibration": {"method": "minmax"},
}


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", "w8a16", "static-w8a8"])
def test_every_model_gets_smaller_and_stays_close(name: str, recipe: str) -> None:
    model, inputs = ZOO[name]()
    small = dwindle.compress(model, recipe, inputs=inputs, data=[inputs])
    with torch.no_grad():
        delta = error(first(model(**inputs)), first(small(**inputs)))
    assert 0 < delta < 0.06  # measured at most .03 (llama, t5), 8 bits on random weights
    assert small.certificate.bytes_after < small.certificate.bytes_before
    assert small.certificate.simulated == 0
    assert small.certificate.lowering_error < 1e-5
    packed = {n: v for n, v in small.store.entries() if isinstance(v, QTensor)}
    assert set(packed) == {edit.fqn for edit in small.plan}
    assert sum(v.nbytes for v in packed.values()) == sum(
        layer.bytes_after for layer in small.certificate.layers if layer.scheme[0].isdigit()
    )


def test_a_shared_input_is_quantised_once() -> None:
    model, inputs = ZOO["bert"]()
    (program,) = dwindle.compress(model, inputs=inputs).variants.values()
    quantize = torch.ops.dwindle.quantize_dynamic.default
    assert len(program.calls(torch.ops.dwindle.qlinear.default)) == 2 * 6 + 1  # two layers and the pooler
    assert len(program.calls(quantize)) == 2 * 4 + 1  # Q, K and V read the same codes


def test_tied_weights_stay_tied() -> None:
    model, inputs = ZOO["tied_lm"]()
    small = dwindle.compress(model, inputs=inputs)
    packed = [name for name, v in small.store.entries() if isinstance(v, QTensor)]
    assert sorted(packed) == ["down.weight", "embedding.weight", "up.weight"]
    assert small.store.aliases == {"head.weight": "embedding.weight"}
    (program,) = small.variants.values()
    (lookup,) = program.calls(torch.ops.dwindle.qembedding.default)
    heads = [n for n in program.calls(torch.ops.dwindle.qlinear.default) if n.args[2].target == lookup.args[1].target]
    assert len(heads) == 1


def test_a_tied_weight_that_is_wanted_in_float_once_stays_float() -> None:
    model, inputs = ZOO["tied_lm"]()
    recipe = {"quantize": [{"weight": {"bits": 8}}]}  # the linear alone; the embedding shares its weight
    small = dwindle.compress(model, recipe, inputs=inputs)
    assert {edit.fqn for edit in small.plan} == {"up.weight", "down.weight"}
    assert any("shared" in entry.reason for entry in small.log if not entry.applied)


def test_later_rules_override_earlier_ones() -> None:
    model, inputs = ZOO["bert"]()
    recipe = {
        "quantize": [
            {"weight": {"bits": 8}},
            {"modules": ["encoder.layer.1.*"], "weight": {"bits": 4, "group_size": 8}},
            {"modules": ["pooler.*"], "weight": None},
        ]
    }
    small = dwindle.compress(model, recipe, inputs=inputs)
    bits = {edit.fqn: edit.weight.bits for edit in small.plan}
    assert bits["encoder.layer.0.output.dense.weight"] == 8
    assert bits["encoder.layer.1.output.dense.weight"] == 4
    assert "pooler.dense.weight" not in bits


def test_a_new_call_captures_a_variant_on_the_same_weights() -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, inputs=inputs)
    before = {n: id(v) for n, v in small.store.entries() if isinstance(v, QTensor)}
    with torch.no_grad():
        hidden = small(**inputs, output_hidden_states=True)
        expected = model(**inputs, output_hidden_states=True)
    assert len(hidden.hidden_states) == len(expected.hidden_states)
    assert error(expected[0], hidden[0]) < 0.02
    assert len(small.variants) == 2
    assert before == {n: id(v) for n, v in small.store.entries() if isinstance(v, QTensor)}


def test_positional_and_keyword_calls_share_a_variant() -> None:
    model, inputs = ZOO["mlp"]()
    small = dwindle.compress(model, inputs=tuple(inputs.values()))
    with torch.no_grad():
        assert torch.equal(small(*inputs.values()), small(**inputs))
    assert len(small.variants) == 1


def test_transformers_models_need_no_inputs() -> None:
    model, inputs = ZOO["llama"]()
    with torch.no_grad():
        assert first(dwindle.compress(model)(**inputs)).shape == first(model(**inputs)).shape


def test_weights_of_several_granularities() -> None:
    model, inputs = ZOO["mlp"]()
    with torch.no_grad():
        expected = model(**inputs)
        for recipe in (W4_GROUP, STATIC_LINEAR, {"quantize": [{"weight": {"bits": 2, "kind": "ternary"}}]}):
            small = dwindle.compress(model, recipe, inputs=inputs, data=[inputs])
            assert error(expected, small(**inputs)) < 1.0
            assert small.certificate.lowering_error < 1e-5


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(x.abs().sum())):  # a count that goes by values
            x = self.linear(x)
        return x


def test_a_model_that_cannot_be_captured_names_its_line() -> None:
    with pytest.raises(CaptureError, match=r"test_compress\.py:\d+: for _ in range") as caught:
        dwindle.compress(_Counts(), inputs=torch.randn(2, 8))
    assert "cure" in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "pattern"),
    [
        ("zeroquant-w8a9", "did you mean zeroquant-w8a8"),
        ({"quantise": []}, "did you mean 'quantize'"),
        ({"quantize": [{"weight": {"bit": 8}}]}, "did you mean 'bits'"),
        ({"quantize": [{"weight": {"bits": 8, "granularity": "group"}}]}, "group_size"),
        ({"quantize": [{"weight": {"bits": 1}}]}, "2 to 16 bits"),
        ({"quantize": [{"modules": []}, {}]}, r"(?s)quantize\.0\.modules.*at least 1 item"),
        ({"quantize": [{"operators": []}, {}]}, r"(?s)quantize\.0\.operators.*at least 1 item"),
        ({"quantize": [{"modules": ["encodr.layer.0.*"]}]}, "nearest names: encoder"),
        ("nowhere.json", "no recipe file"),
    ],
)
def test_recipes_that_are_wrong_say_how(recipe: Any, pattern: str) -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises((RecipeError, SchemeError), match=pattern):
        dwindle.compress(model, recipe, inputs=inputs)


def test_recipes_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"quantize": [{"weight": {"bits": 8}}]}')
    (tmp_path / "r.yaml").write_text("quantize:\n  - weight:\n      bits: 8\n")
    (tmp_path / "bad.json").write_text('{"quantize": [')
    assert dwindle.Recipe.of(tmp_path / "r.json") == dwindle.Recipe.of(tmp_path / "r.yaml")
    assert dwindle.Recipe.of(dwindle.Recipe.of("w8a16").plain()) == dwindle.Recipe.of("w8a16")
    with pytest.raises(RecipeError, match="not valid JSON"):
        dwindle.Recipe.of(tmp_path / "bad.json")


def test_a_group_that_does_not_divide_names_layer_and_cure() -> None:
    model, inputs = ZOO["mlp"]()
    recipe = {"quantize": [{"weight": {"bits": 4, "group_size": 7}}]}
    with pytest.raises(SchemeError, match=r"(?s)0\.weight: a row of 16.*required.*found: 7.*cure: group_size=4"):
        dwindle.compress(model, recipe, inputs=inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model, inputs = ZOO["mlp"]()
    with torch.no_grad():
        next(model.parameters())[0, 0] = value
    with pytest.raises(SchemeError, match=r"(?s)0\.weight.*1 (NaN|Inf)|1 NaN|1 Inf"):
        dwindle.compress(model, inputs=inputs)


def test_calibration_data_is_asked_for_and_checked() -> None:
    model, inputs = ZOO["mlp"]()
    with pytest.raises(CalibrationError, match="data="):
        dwindle.compress(model, STATIC_LINEAR, inputs=inputs)
    with pytest.raises(CalibrationError, match="empty"):
        dwindle.compress(model, STATIC_LINEAR, inputs=inputs, data=[])
    with pytest.raises(CalibrationError, match="finite"):
        dwindle.compress(model, STATIC_LINEAR, inputs=inputs, data=[{n: v * float("inf") for n, v in inputs.items()}])


def test_calls_that_do_not_fit_say_what_does() -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, inputs=inputs)
    with pytest.raises(CaptureError, match="required: int64"):
        small(input_ids=inputs["input_ids"].float(), attention_mask=inputs["attention_mask"], **_rest(inputs))
    with pytest.raises(CaptureError, match="sequence = 8"):
        small(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"][:, :4], **_rest(inputs))


def _rest(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}


def test_a_compressed_model_does_not_train() -> None:
    model, inputs = ZOO["mlp"]()
    small = dwindle.compress(model, inputs=inputs)
    with pytest.raises(dwindle.DwindleError, match="prepare"):
        small.train()
    assert not any(p.requires_grad for p in small.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_labels_are_found_by_tools_that_read_the_signature() -> None:
    from transformers.utils.generic import find_labels

    model, inputs = ZOO["gpt2"]()
    student = dwindle.prepare(model, {}, inputs=inputs)
    assert find_labels(type(student)) == find_labels(type(model))
    assert student.config.to_dict() == model.config.to_dict()
    assert (student.device, student.dtype) == (model.device, model.dtype)
    labelled = {**inputs, "labels": inputs["input_ids"]}
    assert torch.equal(student(**labelled).loss, model(**labelled).loss)
    with torch.no_grad():
        assert student(**inputs).loss is None


def test_grouped_filters_are_packed_as_they_lie() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2)).eval()
    recipe = {"quantize": [{"operators": ["conv2d"], "weight": {"bits": 4, "group_size": 9}}]}
    small = dwindle.compress(model, recipe, inputs=torch.randn(2, 4, 9, 9))
    assert len(small.plan) == 2
    assert small.certificate.lowering_error < 1e-6
    (program,) = small.variants.values()
    assert len(program.calls(torch.ops.dwindle.dequantize.default)) == 2
