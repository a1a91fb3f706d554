"""The migration report: one finding per key of the file, and the verdict that DeepSpeed's code deserves."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed_configs import JSON, SHAPES, SIX, activations, bits, engine, group, mixed, moq, technique, weights
from rich.console import Console

from dwindle.frontends.deepspeed.config import DEAD, TECHNIQUES, keys_of, parse
from dwindle.frontends.deepspeed.migration import Finding, Migration, migrate

WQ, AQ, ROOT = "weight_quantization", "activation_quantization", "compression_training"
MAPS, DIFFERS, NO_EFFECT, NOT_YET = "maps", "differs", "no effect in DeepSpeed", "not yet"


def report(sections: JSON, *, fp16: bool = True, top: JSON | None = None, total: int | None = None) -> Migration:
    return migrate(parse(engine(fp16, **sections) | (top or {})), total_steps=total)


def wq(groups: JSON | None = None, *, forward: bool = False, fp16: bool = True, **shared: Any) -> Migration:
    return report({WQ: weights(groups, quantize_weight_in_forward=forward, **shared)}, fp16=fp16)


def shared(migration: Migration, key: str, section: str = WQ) -> Finding:
    return migration.of(f"{section}.shared_parameters.{key}")


def param(migration: Migration, key: str, name: str = "wq1", section: str = WQ) -> Finding:
    return migration.of(f"{section}.different_groups.{name}.{key}")


def leaves(data: Any, path: str = "") -> Iterator[str]:
    """The keys of a file, those of the engine whole."""
    for key, value in data.items():
        here = f"{path}.{key}".lstrip(".")
        inside = here.startswith((ROOT, "quantize_training", "eigenvalue"))
        if inside and isinstance(value, dict) and value:
            yield from leaves(value, here)
        else:
            yield here


@pytest.mark.parametrize("name", SHAPES)
def test_every_key_has_one_finding(name: str) -> None:
    data = SHAPES[name][0]
    migration = migrate(parse(data), total_steps=1000)
    assert sorted(f.key for f in migration.findings if f.given) == sorted(leaves(data))
    assert json.loads(json.dumps(migration.to_json()))["summary"] == migration.summary()
    assert migration.rejected == ()
    engines = {f.key for f in migration.findings if f.verdict == "engine"}
    assert engines == {*data} - {ROOT}
    for width in (50, 80, 120):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(migration)
        assert max(map(len, capture.get().splitlines())) <= width


def test_every_key_that_is_read_has_a_fact() -> None:
    """With all keys given, in both modes: no key falls through to 'shared parameters win'."""
    for name, (model, group_model) in TECHNIQUES.items():
        values: JSON = {"num_heads": 12, "method": "topk", "block_pattern": "4x1", "excluded_modules": ["a"]}
        values |= {"schedule_offset_end": 2000, **mixed(0.1, True), "dense_ratio": 0.5, "bits": 8}
        values |= {"start_bits": 12, "target_bits": 8, "quantization_period": 10}
        given = {key: values[key] for key in keys_of(group_model)}
        one = group(("a",), [["b"]], **given)
        defaults = {key: model.model_fields[key].default for key in keys_of(model) if key not in values}
        section = technique({"g": one}, **defaults, **{key: values[key] for key in keys_of(model) if key in values})
        for finding in report({name: section}).findings:
            assert "wins over" not in finding.note, finding


def test_sections_that_are_off_have_no_effect() -> None:
    assert f"{ROOT}.head_pruning is off: 7 keys" in str(migrate(parse(SHAPES["W1A8 fp32"][0])))
    migration = report({"row_pruning": technique({"a": group(dense_ratio=7)}, False, method="x")})
    assert shared(migration, "method", "row_pruning").verdict == NO_EFFECT
    assert shared(migration, "enabled", "row_pruning") == Finding(
        key=f"{ROOT}.row_pruning.shared_parameters.enabled", value=False, verdict=MAPS, to="nothing: it is off"
    )


CASES: list[tuple[Migration, str, str, str]] = [  # report, key after the section, verdict, what the note says
    (
        wq({"wq1": bits(12, 8)}, forward=True),
        "different_groups.wq1.params.start_bits",
        NO_EFFECT,
        "target_bits, 8, at once",
    ),
    (wq({"wq1": bits(8, 8)}, forward=True), "different_groups.wq1.params.start_bits", MAPS, ""),
    (wq(forward=True, rounding="stochastic"), "shared_parameters.rounding", NO_EFFECT, "to nearest"),
    (wq(forward=True, quantizer_kernel=True), "shared_parameters.quantizer_kernel", NO_EFFECT, "not in the forward"),
    (wq(forward=True, quantize_verbose=True), "shared_parameters.quantize_verbose", NO_EFFECT, "not in the forward"),
    (
        wq(forward=True, **mixed(0.1, True)),
        "shared_parameters.fp16_mixed_quantize.quantize_change_ratio",
        NO_EFFECT,
        "not in the forward",
    ),
    (wq(forward=True, **mixed(0.1, True)), "shared_parameters.fp16_mixed_quantize.enabled", NO_EFFECT, ""),
    (wq(quantizer_kernel=True, rounding="nearest"), "shared_parameters.rounding", DIFFERS, "really stochastic"),
    (wq(quantizer_kernel=True), "shared_parameters.rounding", DIFFERS, "really stochastic"),
    (wq(rounding="stochastic"), "shared_parameters.rounding", MAPS, ""),
    (wq({"wq1": bits(2, 2)}, rounding="stochastic"), "shared_parameters.rounding", DIFFERS, "asserts"),
    (wq(quantizer_kernel=True), "shared_parameters.quantizer_kernel", DIFFERS, "1 and 2 bits"),
    (
        wq(quantizer_kernel=True, **mixed(0.1, True)),
        "shared_parameters.fp16_mixed_quantize.enabled",
        DIFFERS,
        "crashed",
    ),
    (wq(quantization_type="symmetric"), "shared_parameters.quantization_type", DIFFERS, "+max is representable"),
    (wq(), "shared_parameters.quantization_type", DIFFERS, "2^(B-1)"),
    (wq(quantization_type="asymmetric"), "shared_parameters.quantization_type", DIFFERS, "zero point"),
    (wq({"wq1": bits(1, 1)}), "different_groups.wq1.params.target_bits", DIFFERS, "sign(0) = +1"),
    (wq({"wq1": bits(1, 1)}, quantization_type="symmetric"), "shared_parameters.quantization_type", MAPS, ""),
    (wq({"wq1": bits(2, 2)}), "different_groups.wq1.params.target_bits", MAPS, "three values"),
    (wq(quantize_groups=64), "shared_parameters.quantize_groups", MAPS, "an embedding has one scale per row"),
    (wq(), "shared_parameters.quantize_groups", MAPS, "an embedding has one scale per row"),
    (wq(fp16=False), "shared_parameters.quantize_weight_in_forward", DIFFERS, "any precision"),
    (wq(fp16=True), "shared_parameters.quantize_weight_in_forward", MAPS, ""),
    (wq(forward=True, schedule_offset=5), "shared_parameters.schedule_offset", DIFFERS, "crashed on convolutions"),
    (wq({"wq1": bits(8, 8, 0, "attention")}), "different_groups.wq1.modules", DIFFERS, "letter by letter"),
    (wq({"wq1": bits(8, 8, 0, None)}), "different_groups.wq1.modules", DIFFERS, "re.error"),
    (wq({"wq1": bits(8, 8, 0, "*")}), "different_groups.wq1.modules", DIFFERS, "re.error"),
    (
        wq({"wq1": group(start_bits=8, target_bits=8, quantize_groups=64)}),
        "different_groups.wq1.params.quantize_groups",
        NO_EFFECT,
        "wins",
    ),
]


@pytest.mark.parametrize(("migration", "key", "verdict", "said"), CASES, ids=[f"{c[1]} {c[2]}" for c in CASES])
def test_weight_quantization(migration: Migration, key: str, verdict: str, said: str) -> None:
    finding = migration.of(f"{WQ}.{key}")
    assert finding.verdict == verdict
    assert said in finding.note


def test_activation_defaults_are_told() -> None:
    bare = report({AQ: technique({"a": group(bits=8)})})
    offset, ranges = shared(bare, "schedule_offset", AQ), shared(bare, "range_calibration", AQ)
    assert (offset.value, offset.given, ranges.value, ranges.given) == (1000, False, "dynamic", False)
    assert "documentation says 0" in offset.note
    assert "documentation says static" in ranges.note
    assert "documentation" not in shared(report({AQ: activations(schedule_offset=1000)}), "schedule_offset", AQ).note
    assert shared(report({AQ: activations(range_calibration="static")}), "range_calibration", AQ).verdict == DIFFERS


@pytest.mark.parametrize(
    ("period", "total", "said"),
    [
        (10, None, "the steps 10, 20, 40, 80"),
        (10, 60, "3 of 4 lie within 60 steps, which end at 9 bits"),
        (10, 80, "all of 4 lie within 80 steps, which end at 8 bits"),
        (0, 3, "the steps 1, 2, 3, 4; 3 of 4"),
        (1, None, "the steps 1, 2, 4, 8"),
        (400, 344, "400, 800, 1600, 3200; 0 of 4 lie within 344 steps, which end at 12 bits"),  # the tutorial's MRPC
    ],
)
def test_moq_drops(period: int, total: int | None, said: str) -> None:
    section = weights({"wq1": bits(12, 8, period)})
    assert said in param(report({WQ: section}, total=total), "params.quantization_period").note


def test_moq_drops_start_at_the_offset_and_slow_down_with_eigenvalues() -> None:
    section = weights({"wq1": group(start_bits=12, target_bits=8)}, schedule_offset=100)
    nested = {"quantize_training": {"eigenvalue": {"enabled": True, "layer_num": 12}}}
    finding = param(report({WQ: section}, top=nested), "params.quantization_period")
    assert (finding.given, finding.value) == (False, 1)
    assert "the steps 101, 102, 104, 108" in finding.note
    assert "the last drop at 1100 at most" in finding.note  # 1 * 10^3 later
    unchanged = param(report({WQ: weights({"wq1": bits(8, 8, 5)})}), "params.quantization_period")
    assert unchanged.verdict == NO_EFFECT


def test_legacy_periods_are_divided() -> None:
    twelve = {"start_bits": 12, "target_bits": 8}
    schedule = {"quantize_schedule": {"quantize_period": 10, "schedule_offset": 0}}
    key = "quantize_training.quantize_schedule.quantize_period"
    plain = migrate(parse(moq(twelve, **schedule)), total_steps=10).of(key)
    assert plain.verdict == DIFFERS
    assert "6 per step" in plain.note
    assert "2, 4, 7, 14; 3 of 4 lie within 10 steps" in plain.note
    blocks = migrate(parse(moq(twelve, **schedule, eigenvalue={"enabled": True, "layer_num": 12}))).of(key)
    assert "72 per step" in blocks.note
    assert "1, 2, 3, 4; eigenvalues delay the last to 139" in blocks.note
    default = migrate(parse(moq(twelve))).of(key)
    assert (default.value, default.given) == (1000, False)
    assert "tutorial says 100" in default.note


def test_legacy_keys_that_nothing_reads_are_rejected() -> None:
    algo = {"q_type": "symmetric", "rounding": "nearest"}
    dead = moq(quantize_type="symmetric", quantize_eigenvalue=True, **{"quantize-algo": algo})
    dead["eigenvalue"] = {"enabled": True, "model_name": "bert.encoder.layer", "layer_num": 12}
    migration = migrate(parse(dead))
    named = {finding.key: finding.note for finding in migration.rejected}
    assert {*named} == {
        "quantize_training.quantize_type",
        "quantize_training.quantize_eigenvalue",
        "quantize_training.quantize-algo.q_type",
        "quantize_training.quantize-algo.rounding",
        "eigenvalue.enabled",
        "eigenvalue.model_name",
        "eigenvalue.layer_num",
    }
    assert named["quantize_training.quantize_type"].endswith("quantize_training.quantize_algo.q_type")
    assert named["quantize_training.quantize-algo.rounding"].endswith("quantize_training.quantize_algo.rounding")
    assert named["eigenvalue.model_name"].endswith("quantize_training.eigenvalue.layer_name")
    assert all(meant.startswith("quantize_training.") for meant in DEAD.values())
    assert "7 rejected" in migration.summary()
    off = migrate(parse(dead | {"eigenvalue": {"enabled": False, "model_name": "x"}}))
    assert off.of("eigenvalue.model_name").verdict == NO_EFFECT


def test_eigenvalues_work_here() -> None:
    legacy = moq(eigenvalue={"enabled": True, "layer_num": 12, "layer_name": "bert.encoder.layer"})
    finding = migrate(parse(legacy)).of("quantize_training.eigenvalue.enabled")
    assert finding.verdict == DIFFERS
    assert "works here" in finding.note
    assert migrate(parse(legacy)).of("quantize_training.enabled").verdict == DIFFERS


@pytest.mark.parametrize(
    ("name", "method", "given", "said"),
    [
        ("sparse_pruning", "l1", True, "schedule_offset_end"),
        ("sparse_pruning", "topk", True, "schedule_offset_end"),
        ("sparse_pruning", "l1", False, "schedule_offset_end"),
        ("channel_pruning", "l1", True, "crashed"),
        ("channel_pruning", "l1", False, "crashed"),
        ("channel_pruning", "topk", True, ""),
        ("row_pruning", "l1", True, "code l1 too"),
        ("row_pruning", "topk", True, "start at random"),
        ("head_pruning", "l1", True, "NotImplementedError"),
        ("head_pruning", "topk", False, "start at random"),
    ],
)
def test_pruning(name: str, method: str, given: bool, said: str) -> None:
    groups = {"a": group(dense_ratio=0.5)}
    more: JSON = ({"method": method} if given else {}) | ({"num_heads": 12} if name == "head_pruning" else {})
    migration = report({name: technique(groups, **more)})
    finding = shared(migration, "method", name)
    assert (finding.verdict, finding.value, finding.given) == (DIFFERS, method, given)
    assert said in finding.note
    assert finding.to == f"score {'l1' if method == 'l1' else 'movement'}"
    assert ("weights at init_compression" in finding.note) is (method == "l1")
    assert param(migration, "params.dense_ratio", "a", name).verdict == MAPS
    assert not [found for found in migration.findings if found.verdict in (NOT_YET, "rejected")]
    offset = shared(migration, "schedule_offset", name)
    assert (offset.value, offset.given) == (1000, False)


def test_snip_momentum_and_second_pairs() -> None:
    snip = report({"sparse_pruning": technique(method="snip_momentum", block_pattern="2:4")})
    assert "imported" in shared(snip, "method", "sparse_pruning").note
    assert "schedule_offset_end" not in shared(snip, "method", "sparse_pruning").note
    assert "prunes N of every M" in shared(snip, "block_pattern", "sparse_pruning").note
    assert snip.of("sparse_pruning.different_groups").note == "all linears and convolutions but excluded_modules"
    assert report({WQ: technique()}).of(f"{WQ}.different_groups").note == "no groups: nothing is chosen"
    channels = report({"sparse_pruning": technique(method="snip_momentum", block_pattern="channelx1")})
    assert shared(channels, "block_pattern", "sparse_pruning").verdict == NOT_YET
    idle = report({"sparse_pruning": technique({"a": group(dense_ratio=1)}, block_pattern="2:4")})
    assert shared(idle, "block_pattern", "sparse_pruning").verdict == NO_EFFECT
    for pairs, said in ((2, True), (1, False)):
        rows = {"a": group(tuple("ab"[:pairs]), [["c"]] * pairs, dense_ratio=0.5)}
        note = param(report({"row_pruning": technique(rows)}), "related_modules", "a", "row_pruning").note
        assert ("first pair's mask" in note) is said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("row_pruning", "taken out"),
        ("head_pruning", "head counts"),
        ("channel_pruning", "masked before the batch norm"),
    ],
)
def test_structures_are_taken_out(name: str, said: str) -> None:
    one = group(("a",), [["b"]], dense_ratio=0.5)
    heads: JSON = {"num_heads": 12} if name == "head_pruning" else {}
    migration = report({name: technique({"a": one}, **heads)})
    enabled = shared(migration, "enabled", name)
    assert enabled.verdict == DIFFERS
    assert said in enabled.note
    assert "without related_modules DeepSpeed only set it to zero" in enabled.note
    related = param(migration, "related_modules", "a", name)
    assert (related.verdict, related.to) == (DIFFERS, "an expectation")
    assert "is an error, where DeepSpeed set numbers to zero" in param(migration, "modules", "a", name).note
    if heads:
        assert shared(migration, "num_heads", name).to == "an expectation: 12 heads"


def test_layer_reduction() -> None:
    migration = report({"layer_reduction": SIX})
    kept = migration.of("layer_reduction.keep_number_layer")
    assert kept.verdict == NO_EFFECT
    assert "never reads it" in kept.note
    assert migration.of("layer_reduction.teacher_layer").to == "depth keep_layers (1, 3, 5, 7, 9, 11)"
    assert "the teacher" in migration.of("layer_reduction.module_name_prefix").note
    assert migration.of("layer_reduction.other_module_name").verdict == DIFFERS


def test_summary_json_and_text() -> None:
    data = engine(True, **{WQ: weights({"wq1": bits(1, 1)}), "layer_reduction": SIX})
    before = copy.deepcopy(data)
    migration = migrate(parse(data))
    given = [finding for finding in migration.findings if finding.given]
    assert migration.summary().startswith(f"{len(given)} keys: ")
    assert "\n" not in migration.summary()
    plain = migration.to_json()
    assert {*plain["findings"][0]} == {"key", "value", "verdict", "note", "to", "given"}
    teachers = next(f for f in plain["findings"] if f["key"].endswith("teacher_layer"))
    assert teachers["value"] == [1, 3, 5, 7, 9, 11]
    plain["findings"][0]["value"] = plain["notes"] = None
    assert migrate(parse(data)) == migration
    assert data == before
    text = str(migration)
    assert f"{ROOT}.{WQ}" in text
    assert text.splitlines()[-1].strip() in migration.summary()
    assert "sign(0) = +1" in text
    with pytest.raises(KeyError):
        migration.of("absent")
    assert migrate(parse({ROOT: {}})).summary() == "1 keys: 1 map"
