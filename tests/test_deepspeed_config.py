"""DeepSpeed's configuration: the shapes of its examples are read, and what it would ignore or crash on is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed_configs import (
    JSON,
    SHAPES,
    SIX,
    activations,
    bits,
    channels,
    engine,
    group,
    layers,
    mixed,
    moq,
    technique,
    weights,
    xtc,
)
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dwindle.frontends.deepspeed.config import DeepSpeedConfig, keys_of, parse
from dwindle.frontends.deepspeed.sections import (
    EVERYTHING,
    ActivationQuantization,
    ChannelPruning,
    Eigenvalue,
    HeadPruning,
    QuantizeTraining,
    RowPruning,
    SparsePruning,
    WeightGroup,
    WeightQuantization,
    drops,
)
from dwindle.passes.schedule import MoQ
from dwindle.runtime.errors import RecipeError

PRUNING = ("sparse_pruning", "row_pruning", "head_pruning", "channel_pruning")


SECTIONS = ("weight_quantization", "activation_quantization", *PRUNING, "layer_reduction")


def compress(**sections: Any) -> DeepSpeedConfig:
    return parse({"compression_training": sections})


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_the_examples_is_read(name: str, tmp_path: Path) -> None:
    data, enabled = SHAPES[name]
    config = parse(data)
    assert {section for section in SECTIONS if config.section(section) is not None} == enabled
    assert config.fp16 is data["fp16"]["enabled"]
    assert set(config.engine) == {*data} - {"compression_training"}
    (tmp_path / "ds.json").write_text(json.dumps(data))
    assert parse(tmp_path / "ds.json") == parse(str(tmp_path / "ds.json")) == config


def test_values_arrive_where_they_are_typed() -> None:
    config = parse(xtc(False, True, reduction=SIX))
    assert config.weight_quantization is not None
    assert config.weight_quantization.quantize_groups == 64
    assert config.weight_quantization.quantize_weight_in_forward
    (one,) = config.weight_quantization.groups
    assert (one.name, one.start_bits, one.target_bits, one.period, one.related) == ("wq1", 1, 1, 0, None)
    assert one.modules == ("attention.self", "attention.output.dense", "intermediate", "word_embeddings")
    assert config.layer_reduction is not None
    assert config.layer_reduction.teacher_layer == (1, 3, 5, 7, 9, 11)
    channel = parse(channels()).channel_pruning
    assert channel is not None
    assert channel.groups[0].related == (("layer....conv2", "layer....bn1"),)
    with pytest.raises(ValidationError, match="frozen"):
        one.period = 3


def test_defaults_are_those_of_the_code() -> None:
    wq, aq = WeightQuantization(), ActivationQuantization()
    assert (wq.schedule_offset, wq.quantize_groups, wq.quantization_type, wq.rounding) == (0, 1, "symmetric", "nearest")
    assert not wq.quantize_weight_in_forward
    assert wq.fp16_mixed_quantize.quantize_change_ratio == 0.001
    assert (aq.range_calibration, aq.schedule_offset) == ("dynamic", 1000)
    group = WeightGroup(name="a", start_bits=8, target_bits=8)
    assert (group.period, group.modules) == (1, EVERYTHING)
    sparse = SparsePruning()
    assert (sparse.method, sparse.schedule_offset, sparse.end, sparse.dense_ratio) == ("l1", 1000, 1000, 0.1)
    assert (sparse.schedule_offset_stride, sparse.block_pattern, sparse.excluded_modules) == (1, "4x1", ())
    assert (RowPruning().method, ChannelPruning().method) == ("l1", "l1")
    assert (HeadPruning(num_heads=12).method, HeadPruning(num_heads=12).schedule_offset) == ("topk", 1000)
    eigenvalue = Eigenvalue(layer_num=12)
    assert (eigenvalue.max_iter, eigenvalue.tol, eigenvalue.stability) == (100, 1e-2, 1e-6)
    assert (eigenvalue.gas_boundary_resolution, eigenvalue.layer_name) == (1, "bert.encoder.layer")
    legacy = parse(moq()).legacy
    assert legacy is not None
    assert (legacy.quantize_bits.start_bits, legacy.quantize_schedule.quantize_period) == (16, 1000)
    assert legacy.quantize_schedule.schedule_offset == 1000
    assert (legacy.quantize_algo.q_type, legacy.quantize_algo.rounding) == ("symmetric", "nearest")


@pytest.mark.parametrize(
    ("start", "target", "period", "kind", "steps"),
    [
        (12, 8, 10, {}, (10, 20, 40, 80)),
        (16, 8, 400, {}, tuple(400 * 2**k for k in range(8))),  # the last at 51200
        (8, 4, 1, {}, (1, 2, 4, 8)),
        (8, 4, 0, {}, (1, 2, 3, 4)),  # one bit per step
        (8, 8, 7, {}, ()),
        (12, 8, 10, {"factor": 5}, (10, 100, 1000, 10000)),
        (12, 8, 10 / 6, {}, (2, 4, 7, 14)),  # measured on the code of 2021, which counted 6 tensors a step
        (12, 8, 400 / 6, {}, (67, 134, 267, 534)),
        (12, 8, 64 / 6, {}, (11, 22, 43, 86)),
        (12, 8, 10 / 72, {}, (1, 2, 3, 4)),  # there 1, 1, 1, 2: several bits in a step
        (12, 8, 10 / 72, {"factor": 5}, (1, 2, 14, 139)),
    ],
)
def test_drops(start: int, target: int, period: float, kind: Any, steps: tuple[int, ...]) -> None:
    """As reported, and as the schedule goes."""
    assert drops(start, target, period, **kind) == steps
    if steps and steps[-1] < 1000:
        taken = MoQ(start_bits=start, period=period).drops(target, steps[-1], **kind)
        assert tuple(step for step, bits in taken if bits < start) == steps


def test_legacy_counts_in_steps() -> None:
    schedule = {"quantize_schedule": {"quantize_period": 36, "schedule_offset": 100}}
    plain = parse(moq({"start_bits": 12, "target_bits": 8}, **schedule)).legacy
    blocks = parse(moq({"start_bits": 12, "target_bits": 8}, **schedule, eigenvalue={"enabled": True, "layer_num": 12}))
    assert plain is not None
    assert (plain.tensors, plain.period, plain.schedule_offset) == (6, 6.0, 17)
    assert blocks.legacy is not None
    assert (blocks.legacy.tensors, blocks.legacy.period, blocks.legacy.schedule_offset) == (72, 0.5, 2)
    assert blocks.eigenvalue == blocks.legacy.eigenvalue


def test_eigenvalues_serve_weight_quantization_without_the_legacy_switch() -> None:
    nested = {"quantize_training": {"eigenvalue": {"enabled": True, "layer_num": 6}}}
    config = parse(engine(True, weight_quantization=weights()) | nested)
    assert config.eigenvalue is not None
    assert (config.eigenvalue.layer_num, config.legacy) == (6, None)
    assert parse(nested).eigenvalue is None  # for nothing that is on
    off = {"quantize_training": {"enabled": False, "eigenvalue": {"enabled": True, "layer_num": 0}}}
    assert parse(engine(True, weight_quantization=weights()) | off).eigenvalue is None


@pytest.mark.parametrize(
    ("modules", "meant"),
    [
        ("attention.self", ("attention.self",)),
        (None, EVERYTHING),
        ("*", EVERYTHING),
        (["*"], EVERYTHING),
        (["a", "b"], ("a", "b")),
    ],
)
def test_modules(modules: Any, meant: tuple[str, ...]) -> None:
    section = compress(weight_quantization=weights({"a": bits(8, 8, 0, modules)})).weight_quantization
    assert section is not None
    assert section.groups[0].modules == meant


def test_empty_groups_are_read_and_noted() -> None:
    config = compress(weight_quantization=technique())
    assert config.weight_quantization == WeightQuantization()
    assert "no module" in config.notes[0].text
    snip = technique(method="snip_momentum", schedule_offset=1000, schedule_offset_end=51000, dense_ratio=0.2)
    sparse = compress(sparse_pruning=snip)
    assert sparse.sparse_pruning is not None
    assert (sparse.sparse_pruning.end, sparse.notes) == (51000, ())


def test_shared_parameters_win() -> None:
    groups = {"a": group(start_bits=8, target_bits=8, quantize_groups=64, rounding="stochastic")}
    config = compress(weight_quantization=weights(groups, rounding="nearest"))
    assert config.weight_quantization is not None
    assert (config.weight_quantization.quantize_groups, config.weight_quantization.rounding) == (1, "nearest")
    place = "compression_training.weight_quantization.different_groups.a.params"
    assert [note.key for note in config.notes] == [f"{place}.quantize_groups", f"{place}.rounding"]
    assert "1, not 64" in config.notes[0].text


def test_the_trainers_auto_is_no_fp16() -> None:
    config = parse(engine("auto"))
    assert not config.fp16
    assert [note.key for note in config.notes] == ["fp16.enabled"]
    assert parse({"bf16": {"enabled": True}}).bf16


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(("enabled", "modules", "params", "start_bits", "method", "fp16_mixed_quantize", "dense_ratioo"))
MESS = st.dictionaries(KEYS | st.text(max_size=8), ANYTHING, max_size=4)


@given(MESS, MESS, MESS, st.sampled_from(("absent", False, None, 0)))
def test_a_section_that_is_off_may_hold_anything(shared: JSON, groups: JSON, rest: JSON, enabled: Any) -> None:
    shared = {key: value for key, value in shared.items() if key != "enabled"}
    switch = {} if enabled == "absent" else {"enabled": enabled}
    section = {**rest, "shared_parameters": shared | switch, "different_groups": groups}
    flat = {key: value for key, value in rest.items() if key != "enabled"} | switch
    names = ("weight_quantization", "activation_quantization", *PRUNING)
    data = {
        "compression_training": {**dict.fromkeys(names, section), "layer_reduction": flat},
        "quantize_training": flat,
    }
    before = copy.deepcopy(data)
    config = parse(data)
    assert data == before
    assert all(config.section(name) is None for name in (*SECTIONS, "quantize_training"))


@given(st.sampled_from(sorted(SHAPES)), ANYTHING, ANYTHING)
def test_the_callers_dict_is_never_changed(shape: str, one: Any, other: Any) -> None:
    data = copy.deepcopy(SHAPES[shape][0]) | {"comment": one}
    training = data.setdefault("compression_training", {})
    training["row_pruning"] = {"shared_parameters": {"enabled": False}, "different_groups": other}
    before = copy.deepcopy(data)
    config = parse(data)
    assert data == before
    assert config == parse(before)
    data["comment"] = object()
    assert config.engine["comment"] == parse(before).engine["comment"]


@pytest.mark.parametrize("model", [WeightQuantization, SparsePruning, QuantizeTraining])
def test_keys_of_are_the_keys_of_files(model: Any) -> None:
    assert {"name", "groups", "period", "related"}.isdisjoint(keys_of(model))


WQ, GROUP = "weight_quantization.shared_parameters", "weight_quantization.different_groups.wq1.params"
ONE = {"a": group(dense_ratio=0.5)}
BAD: list[tuple[JSON, str, str]] = [  # sections, the key that is named, what is said of it
    ({"weight_quantization": weights({"wq1": bits(4, 8)})}, f"{GROUP}.start_bits", "at least target_bits, 8"),
    ({"weight_quantization": weights({"wq1": bits(0, 0)})}, f"{GROUP}.start_bits", "greater than or equal to 1"),
    ({"weight_quantization": weights({"wq1": bits(17, 8)})}, f"{GROUP}.start_bits", "less than or equal to 16"),
    ({"weight_quantization": weights({"wq1": bits("8", 8)})}, f"{GROUP}.start_bits", "a valid integer"),
    ({"weight_quantization": weights({"wq1": bits(True, 1)})}, f"{GROUP}.start_bits", "a valid integer"),
    ({"weight_quantization": weights({"wq1": bits(8, 8, -1)})}, f"{GROUP}.quantization_period", "equal to 0"),
    ({"weight_quantization": weights({"wq1": group(start_bits=8)})}, f"{GROUP}.target_bits", "is missing"),
    ({"weight_quantization": weights(schedule_offset=-1)}, f"{WQ}.schedule_offset", "equal to 0"),
    ({"weight_quantization": weights(rounding="up")}, f"{WQ}.rounding", "'nearest' or 'stochastic'"),
    ({"weight_quantization": weights(quantize_groups=0)}, f"{WQ}.quantize_groups", "equal to 1"),
    ({"weight_quantization": weights(**mixed(0.0, True))}, f"{WQ}.fp16_mixed_quantize.quantize_change_ratio", "than 0"),
    ({"weight_quantization": technique(enabled="yes")}, f"{WQ}.enabled", "true or false"),
    ({"weight_quantization": {"shared_parameters": {"enabled": True}}}, "different_groups", "is missing"),
    ({"weight_quantization": 3}, "weight_quantization", "a mapping"),
    ({"weight_quantization": weights({"wq1": 3})}, "different_groups.wq1", "a mapping"),
    ({"weight_quantization": weights({"wq1": {"modules": ["a"]}})}, GROUP, "a mapping"),
    *(
        (
            {"weight_quantization": weights({"wq1": bits(8, n)}, quantization_type="asymmetric")},
            f"{WQ}.quant",
            "symmetric",
        )
        for n in (1, 2)
    ),
    ({"weight_quantization": weights({"wq1": bits(8, 8, 0, ["a("])})}, "wq1.modules", "regular expressions"),
    ({"weight_quantization": weights({"wq1": bits(8, 8, 0, [])})}, "wq1.modules", "at least 1 item"),
    *(
        ({"activation_quantization": technique({"aq1": group(bits=n)})}, "aq1.params.bits", "4 or 8")
        for n in (2, 6, 16)
    ),
    ({"activation_quantization": activations(range_calibration="fixed")}, "range_calibration", "'dynamic' or 'static'"),
    *(
        ({"row_pruning": technique({"rp1": group(dense_ratio=r)})}, "rp1.params.dense_ratio", "than")
        for r in (0.0, -0.1, 1.1, float("nan"))
    ),
    (
        {"row_pruning": technique({"rp1": group(("a", "b"), [["c"]], dense_ratio=1)})},
        "rp1.related_modules",
        "each of the 2",
    ),
    ({"row_pruning": technique({"rp1": group(("a",), [["c["]], dense_ratio=1)})}, "rp1", "regular expressions"),
    ({"head_pruning": technique(ONE)}, "head_pruning.shared_parameters.num_heads", "is missing"),
    ({"head_pruning": technique(ONE, num_heads=12, method="l2")}, "head_pruning", "'l1' or 'topk'"),
    ({"sparse_pruning": technique(method="snip_momentum", schedule_offset_end=9)}, "schedule_offset_end", "1000"),
    ({"sparse_pruning": technique(ONE, method="snip_momentum")}, "sparse_pruning", "NotImplementedError"),
    ({"sparse_pruning": technique(method="snip_momentum", block_pattern="4 by 1")}, "block_pattern", "match"),
    ({"layer_reduction": layers((1, 3), keep_number_layer=5)}, "layer_reduction.keep_number_layer", "teacher_layer, 2"),
    ({"layer_reduction": {"enabled": True, "teacher_layer": [1]}}, "layer_reduction.module_name_prefix", "is missing"),
    ({"layer_reduction": layers((1,), teacher_layer=1)}, "layer_reduction.teacher_layer", "a list"),
    ({"layer_reduction": layers((-1,))}, "layer_reduction.teacher_layer", "equal to 0"),
]


@pytest.mark.parametrize(("sections", "key", "said"), BAD)
def test_bad_input_is_refused(sections: JSON, key: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compress(**sections)
    assert key in caught.value.message
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("data", "cure"),
    [
        ({"compression_training": {"weight_quantizaton": weights()}}, "'weight_quantization'"),
        ({"compression_trainin": {}}, "'compression_training'"),
        ({"weight_quantization": weights()}, "compression_training.weight_quantization"),
        ({"compression_training": {"weight_quantization": weights(quantize_group=8)}}, "'quantize_groups'"),
        ({"compression_training": {"weight_quantization": weights({"a": group(start_bit=8)})}}, "'start_bits'"),
        ({"compression_training": {"weight_quantization": weights() | {"groups": {}}}}, "'different_groups'"),
        ({"compression_training": {"weight_quantization": weights(target_bits=8)}}, "different_groups.<group>.params"),
        ({"compression_training": {"sparse_pruning": technique(ONE, frequency=2)}}, "'schedule_offset_stride'"),
        ({"compression_training": {"layer_reduction": layers((1,)) | {"teacher_layers": []}}}, "'teacher_layer'"),
        ({"compression_training": {"weight_quantization": weights({"a": bits(8, 8) | {"module": []}})}}, "'modules'"),
        (moq(quantize_bit=8), "'quantize_bits'"),
        (moq({"target_bits": 8, "start": 16}), "'start_bits'"),
        (moq(eigenvalue={"enabled": True, "layer_nums": 12}), "'layer_num'"),
    ],
)
def test_a_misspelt_key_is_an_error_that_names_the_nearest(data: JSON, cure: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(data)
    assert cure in str(caught.value.cure)


def test_a_misspelt_key_of_a_section_that_is_off_is_a_note() -> None:
    misspelt = {"weight_quantizaton": weights(enabled=False), "row_pruning": technique(enabled=False, methd="l1")}
    notes = {note.key.removeprefix("compression_training."): note.text for note in compress(**misspelt).notes}
    assert "'weight_quantization'" in notes["weight_quantizaton"]
    assert "'method'" in notes["row_pruning.shared_parameters.methd"]
    switch = {"shared_parameters": {"enabeld": True}, "different_groups": {}}
    assert "'enabled'" in compress(row_pruning=switch).notes[0].text


@pytest.mark.parametrize(
    ("bits", "more", "said"),
    [
        ({"start_bits": 4, "target_bits": 8}, {}, "at least target_bits, 8"),
        ({"start_bits": 16}, {}, "target_bits is missing"),
        ({"target_bits": 2}, {"quantize_algo": {"q_type": "asymmetric"}}, "quantize_algo.q_type is not right"),
        ({"target_bits": 8}, {"quantize_schedule": {"quantize_period": -1}}, "greater than or equal to 0"),
        ({"target_bits": 8}, {"eigenvalue": {"enabled": True}}, "eigenvalue.layer_num is missing"),
        ({"target_bits": 8}, {"eigenvalue": {"enabled": True, "layer_num": 0}}, "greater than or equal to 1"),
        ({"target_bits": 8}, {"eigenvalue": {"enabled": True, "layer_num": 2, "layer_name": ""}}, "at least 1 char"),
    ],
)
def test_bad_legacy_input_is_refused(bits: JSON, more: JSON, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse(moq(bits, **more))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,\n "fp16": {"a": 1, "b": 2, "a": 3}}', "found: 'a'"),
        ('{"a": 1, "a": 2}', "found: 'a'"),
        ('{\n\t"fp16": {\n\t"enabled": FP16_ENABLE},\n"b": W_BIT1}', 'line 3: "enabled": FP16_ENABLE'),
        ('{\n\t"fp16": {\n\t"enabled": FP16_ENABLE},\n"b": W_BIT1}', "cure: replace FP16_ENABLE, W_BIT1"),
        ("{'excluded_modules': ['classifier']}", "double quotes"),
        ('{"a": ', "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "a mapping"),
    ],
)
def test_files_that_are_not_configurations(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        parse(tmp_path / "ds.json")
    assert said in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, "x" * 5000):
        with pytest.raises(RecipeError, match="no DeepSpeed configuration"):
            parse(path)
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(RecipeError, match="UTF-8"):
        parse(tmp_path / "latin")


def test_refusals_are_of_one_type() -> None:
    with pytest.raises(RecipeError, match="a mapping"):
        parse([1])  # type: ignore[arg-type]
