"""`dwindle migrate`: the report on a DeepSpeed configuration, and the recipe that does the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed_configs import JSON, SHAPES, activations, engine, falling, group, layers, mixed, moq, static, technique
from models import ZOO
from typer.testing import CliRunner

import dwindle
from dwindle.frontends.commands import app
from dwindle.frontends.deepspeed.config import parse
from dwindle.frontends.deepspeed.migration import migrate
from dwindle.frontends.recipe import Recipe


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["migrate", *map(str, arguments)], prog_name="dwindle")


def write(folder: Path, config: JSON) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return path


CONFIG = engine(weight_quantization=falling(12, 8, 10), activation_quantization=activations())


def test_the_report_is_printed(tmp_path: Path) -> None:
    done = run(write(tmp_path, CONFIG), "--total-steps", 30)
    assert done.exit_code == 0, done.output
    expected = migrate(parse(CONFIG), total_steps=30)
    assert expected.summary() in " ".join(done.stdout.split())
    plain = run(tmp_path / "ds.json", "--total-steps", 30, "--json")
    assert json.loads(plain.stdout) == json.loads(json.dumps(expected.to_json()))
    without = json.loads(run(tmp_path / "ds.json", "--json").stdout)
    assert without != json.loads(plain.stdout)  # which drops are reached is told


ROWS = technique({"rp1": group(("intermediate",), [["output.dense"]], dense_ratio=0.3)}, method="topk")
HEADS = technique({"rp1": group(("output.dense",), dense_ratio=0.9)}, num_heads=4, schedule_offset=3)
RECIPES: dict[str, JSON] = {
    "moq": CONFIG,
    "mixed": engine(weight_quantization=falling(8, 1, 3, **mixed(0.1, enabled=True))),
    "static": engine(activation_quantization=static("asymmetric", schedule_offset=4)),
    "legacy": moq({"target_bits": 4}, eigenvalue={"enabled": True, "layer_num": 2, "layer_name": "encoder.layer"}),
    "structures": engine(row_pruning=ROWS, head_pruning=HEADS, weight_quantization=falling(8, 4)),
    "nothing": engine(),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_that_is_written_is_the_configuration(name: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "recipe.json"
    done = run(write(tmp_path, RECIPES[name]), "--output", output)
    assert done.exit_code == 0, done.output
    assert "Wrote" in done.stdout
    assert "compression_training" not in output.read_text()
    assert Recipe.of(output) == Recipe.of_deepspeed(parse(RECIPES[name]))


def test_both_prepare_alike(tmp_path: Path) -> None:
    output = tmp_path / "recipe.json"
    assert run(write(tmp_path, CONFIG), "-o", output, "--json").exit_code == 0
    model, inputs = ZOO["bert"]()
    one, two = (dwindle.prepare(model, source, inputs=inputs) for source in (CONFIG, output))
    assert one.plan == two.plan
    assert one.course.paces == two.course.paces


def test_what_cannot_be_done_leaves_no_file(tmp_path: Path) -> None:
    config = engine(layer_reduction=layers((3, 1)))
    done = run(write(tmp_path, config), "--output", tmp_path / "new" / "recipe.json")
    assert done.exit_code == 1
    assert "13 keys" in done.stdout  # the report comes all the same
    assert "in order" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ds.json"]


def test_errors_are_readable(tmp_path: Path) -> None:
    config = write(tmp_path, {"compression_training": {"weight_quantizaton": {"shared_parameters": {"enabled": True}}}})
    done = run(config)
    assert done.exit_code == 1
    assert "did you mean 'weight_quantization'?" in " ".join(done.stderr.replace("│", " ").split())
    assert run(tmp_path / "absent.json").exit_code == 1
    assert run(config, "--output", tmp_path / "recipe.txt").exit_code == 2
    (tmp_path / "there.json").write_text("{}")
    done = run(write(tmp_path, CONFIG), "--output", tmp_path / "there.json")
    assert done.exit_code == 1
    assert (tmp_path / "there.json").read_text() == "{}"


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_reported(name: str, tmp_path: Path) -> None:
    assert run(write(tmp_path, SHAPES[name][0]), "--total-steps", 100).exit_code == 0
