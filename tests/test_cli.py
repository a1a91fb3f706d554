"""The shell on tiny models: what it writes and prints, exit codes, errors a person can read."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import dwindle
from dwindle.frontends import cli
from dwindle.frontends.bench import bench, shaped
from dwindle.frontends.commands import app
from dwindle.frontends.measure import WARM_UP, measure
from dwindle.frontends.models import TEXTS, Source, SourceError, load_data, load_source
from dwindle.frontends.recipe import Recipe
from dwindle.frontends.survey import survey
from dwindle.runtime.errors import CalibrationError, CaptureError, DwindleError, ExportError, RecipeError

FACTORIES = """
import torch
from models import ZOO

def mlp(): return ZOO["mlp"]()
def llama(): return ZOO["llama"]()[0]
def bare(): return torch.nn.Linear(4, 4)
def text(): return "a text"
def broken(): raise ValueError("no [weights] here")
def batches(): return [ZOO["mlp"]()[1] for _ in range(3)]
def tokens(): return [ZOO["llama"]()[1] for _ in range(2)]
def number(): return 3
def half(): return torch.nn.Linear(4, 4).bfloat16(), torch.ones(2, 4).bfloat16()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of one's own with factories in tiny.py, and figures taken in no time."""
    (tmp_path / "tiny.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    monkeypatch.setattr("dwindle.frontends.measure.SECONDS_EACH", 0.01)
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), prog_name="dwindle")


def test_compress_writes_artifact_and_report_and_inspect_reads_it(here: Path) -> None:
    done = run("compress", "tiny:mlp", "--out", "small")
    assert done.exit_code == 0, done.output
    assert "Wrote small" in done.stdout
    assert {p.name for p in (here / "small").iterdir()} >= {"manifest.json", "weights.safetensors", "report.html"}
    model, inputs = ZOO["mlp"]()
    assert dwindle.load(here / "small")(**inputs) == pytest.approx(model(**inputs).detach(), abs=0.1)
    seen = run("inspect", "small", "--json")
    facts = json.loads(seen.stdout)
    assert facts["variants"] == ["eval(input=float32['batch', 16])"]
    assert facts["files"]["weights.safetensors"] == (here / "small/weights.safetensors").stat().st_size
    assert len(facts["measured"]["latency"]) == 2
    shown = run("inspect", "small")
    assert "report.html" in shown.stdout
    assert "Loading small" in shown.stderr


def test_compress_calibrates_on_a_factory_of_batches(here: Path) -> None:
    done = run("compress", "tiny:mlp", "-r", "static-w8a8", "-d", "tiny:batches", "-o", "small", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["certificate"]["simulated"] == 0


def test_inspect_ranks_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.frontends.progress.PATIENCE", 0.0)
    done = run("inspect", "tiny:llama", "--layers", "greedy", "--data", "tiny:tokens", "--json")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["row"], len(row["order"]), len(row["changes"])) == ("model.layers", 1, 1)
    shown = run("inspect", "tiny:llama", "--layers", "influence", "--data", "tiny:tokens")
    assert "Layers of model.layers by influence" in shown.stdout
    assert "Ranking model.layers" in shown.stderr
    for wrong, words in ((["influence"], "--data"), (["size", "--data", "tiny:tokens"], "'size'")):
        refused = run("inspect", "tiny:llama", "--layers", *wrong)
        assert refused.exit_code == 1
        assert words in refused.stderr


def test_a_recipe_that_chooses_layers_by_data_asks_for_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.frontends.progress.PATIENCE", 0.0)
    (here / "short.json").write_text('{"depth": {"keep": 1, "by": "influence"}}')
    refused = run("compress", "tiny:llama", "--recipe", "short.json", "--out", "small")
    assert refused.exit_code == 1
    assert "--data" in refused.stderr
    done = run("compress", "tiny:llama", "-r", "short.json", "-d", "tiny:tokens", "-o", "small")
    assert done.exit_code == 0, done.output
    assert "Ranking layers" in done.stderr


@pytest.mark.slow
def test_compress_exports_onnx(here: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert run("compress", "tiny:mlp", "--out", "small", "--onnx").exit_code == 0
    assert (here / "small/model.onnx").stat().st_size > 0


def test_an_export_that_fails_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")

    def fail(*args: object, **kwargs: object) -> None:
        raise ExportError("no")

    monkeypatch.setattr("dwindle.runtime.onnx.export.check", fail)
    assert run("compress", "tiny:mlp", "--out", "new/small", "--onnx").exit_code == 1
    assert [path.name for path in here.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_without_its_packages_is_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else known(name))
    done = run("compress", "tiny:broken", "--out", "small", "--onnx")  # the model is not even loaded
    assert done.exit_code == 1
    assert "pip install 'dwindle[onnx]'" in done.stderr
    assert not (here / "small").exists()


@pytest.mark.parametrize("recipe", ["w8a16", {}])
def test_bfloat16_is_not_exported(here: Path, recipe: Any) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.ones(2, 16, dtype=torch.bfloat16)
    small = dwindle.compress(nn.Linear(16, 16).bfloat16(), recipe, inputs=x)
    with pytest.raises(ExportError, match=r"(?s)float32.*bfloat16.*compress model\.float\(\)"):
        small.export_onnx(here / "model.onnx")
    done = run("compress", "tiny:half", "--out", "small", "--onnx")
    assert done.exit_code == 1
    assert "bfloat16" in done.stderr
    assert not list(here.glob("*.onnx")) + list(here.glob("small"))


def test_an_existing_folder_is_refused_before_the_work(here: Path) -> None:
    (here / "small").mkdir()
    for command in (["compress", "tiny:mlp", "--out", "small"], ["demo", "--out", "small"]):
        done = run(*command)
        assert done.exit_code == 1
        assert "remove it, or choose another path" in done.stderr
    assert list((here / "small").iterdir()) == []


def test_inspect_tells_what_a_recipe_would_take() -> None:
    facts = json.loads(run("inspect", "tiny:mlp", "--json").stdout)
    assert [row["name"] for row in facts["rows"]] == ["0.weight", "2.weight", "5.weight"]
    small = dwindle.compress(*ZOO["mlp"]()[:1], inputs=ZOO["mlp"]()[1])
    assert facts["bytes_before"] == small.certificate.bytes_before
    assert facts["bytes_after"] == small.certificate.bytes_after
    shown = run("inspect", "tiny:llama", "-r", "w8a16")
    assert shown.exit_code == 0, shown.output
    assert "quantises 16 of 16 sites" in " ".join(shown.stdout.split())


def test_inspect_names_what_is_left_and_why() -> None:
    model, inputs = ZOO["tied_lm"]()
    found = survey(model, {"quantize": [{"operators": ["linear"]}]}, inputs)
    assert {row.name: bool(row.reason) for row in found.rows}["embedding.weight"]
    assert found.bytes_after < found.bytes_before


def test_bench_gives_figures(here: Path) -> None:
    done = run("bench", "tiny:llama", "--batch", "1,3", "--seq", "4", "--seconds", "0.01", "--no-compile", "--json")
    facts = json.loads(done.stdout)
    shapes = [(t["contender"], t["batch"], t["sequence"]) for t in facts["timings"]]
    assert shapes == [(name, batch, 4) for batch in (1, 3) for name in ("eager", "compressed")]
    assert all(0 < t["p50"] <= t["p95"] and t["runs"] >= 5 for t in facts["timings"])
    assert facts["bytes_after"] < facts["bytes_before"]


def test_bench_prints_a_table_and_leaves_tokens_out_for_other_models() -> None:
    done = run("bench", "tiny:mlp", "--batch", "2", "--seconds", "0.01", "--no-compile")
    assert done.exit_code == 0, done.output
    assert "speedup" in done.stdout
    assert "tokens" not in done.stdout


def test_a_contender_that_may_fail_is_a_figure_and_any_other_an_error() -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("no compiler\nat all")

    forms = {"whole": lambda **_: None, "broken": broken}
    found = bench(forms, {"x": torch.ones(2, 3)}, batches=[1], seconds=0.0, may_fail=["broken"])
    assert found.of("broken", 1).failure == "RuntimeError: no compiler"
    assert found.speedup(found.of("broken", 1)) is None
    with pytest.raises(DwindleError, match="broken cannot be run at batch 1"):
        bench(forms, {"x": torch.ones(2, 3)}, batches=[1], seconds=0.0)


def test_shaped_repeats_and_cuts() -> None:
    call = shaped({"input_ids": torch.arange(6).reshape(2, 3), "scale": torch.ones(2, 5), "flag": True}, 5, 2)
    assert call["input_ids"].shape == (5, 2)
    assert call["scale"].shape == (5, 5)
    assert call["flag"] is True


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nowhere", "no such path"),
        ("tiny.py", "a file"),
        ("tiny:absent", "cannot be imported"),
        ("absent:mlp", "cannot be imported"),
        ("tiny:text", "gives no model"),
        ("tiny:broken", "no [weights] here"),
        ("tiny:bare", "a factory that returns (module, inputs)"),
    ],
)
def test_a_wrong_model_is_explained(model: str, said: str) -> None:
    done = run("inspect", model)
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["inspect", "tiny:mlp", "-r", "zeroquant"], 1, "did you mean zeroquant-w8a8"),
        (["compress", "tiny:mlp", "-r", "static-w8a8", "-o", "x"], 1, "give --data"),
        (["compress", "tiny:mlp", "-r", "zeroquant-w4a8-lkd", "-o", "x"], 1, "give --data"),
        (["compress", "tiny:mlp", "-d", "tiny:number", "-o", "x"], 1, "gives no batches"),
        (["compress", "tiny:mlp", "-d", "absent.txt", "-o", "x"], 1, "no such file"),
        (["compress", "tiny:mlp", "-d", "tiny.py", "-o", "x"], 1, "has no tokenizer"),
        (["bench", "tiny:mlp", "--batch", "1,x"], 2, "positive numbers"),
        (["bench", "tiny:mlp", "--batch", "0"], 2, "positive numbers"),
        (["compress", "tiny:mlp"], 2, "--out"),
        (["squash"], 2, "No such command"),
    ],
)
def test_exit_codes(arguments: list[str], code: int, said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == code
    assert said in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("name", ["r.json", "r.yaml"])
def test_files_that_are_not_utf8_are_named(here: Path, name: str) -> None:
    for file in (name, "texts.txt"):
        (here / file).write_bytes(b'{"name": "caf\xe9"}')
    done = run("compress", "tiny:mlp", "-r", name, "-o", "x")
    assert done.exit_code == 1
    assert f"{name} is not text" in done.stderr
    with pytest.raises(SourceError, match=r"(?s)texts\.txt is not text.*required: text in UTF-8.*position"):
        load_data("texts.txt", Source("tiny", nn.Linear(4, 4), None, tokenizer=object()))


def test_debug_shows_where() -> None:
    done = run("inspect", "nowhere", "--debug")
    assert done.exit_code == 1
    assert isinstance(done.exception, SourceError)


def test_an_artifact_is_not_compressed_again(here: Path) -> None:
    assert run("compress", "tiny:mlp", "--out", "small").exit_code == 0
    done = run("compress", "small", "--out", "smaller")
    assert done.exit_code == 1
    assert "compressed already" in done.stderr


def test_a_transformers_directory_with_a_tokenizer(here: Path) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    model, _ = ZOO["bert"]()
    model.save_pretrained(here / "bert")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "prices", "rose", "again"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(here / "bert")
    source = load_source("bert")
    assert (source.name, type(source.model).__name__) == ("bert", "BertModel")
    assert source.inputs["input_ids"].shape[0] == 2
    assert source.inputs["attention_mask"].all()  # an example of real tokens alone
    lengths = [len(ids) for ids in source.tokenizer(list(TEXTS))["input_ids"]]
    assert source.inputs["input_ids"].shape[1] == min(lengths) < max(lengths)
    (here / "texts.txt").write_text("prices rose\n\nrose again\n" * 5)
    batches = list(load_data("texts.txt", source))
    assert [batch["input_ids"].shape for batch in batches] == [(8, 2), (2, 2)]


def test_help_does_not_load_torch_and_names_the_commands() -> None:
    code = (
        "import sys; from dwindle.frontends import commands\n"
        "from typer.testing import CliRunner\n"
        "done = CliRunner().invoke(commands.app, ['--help'])\n"
        "print(done.exit_code, 'torch' in sys.modules, all(c in done.stdout for c in ('compress', 'inspect', 'bench')))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "False", "True"], done.stderr


def test_without_typer_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"pip install 'dwindle\[cli\]'"):
        cli.main()


# What is passed in place of a model, its inputs or a recipe


class _Nameless(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0] * 2


class _Rest(nn.Module):
    def forward(self, x: Tensor, *rest: Tensor, **more: Tensor) -> Tensor:
        return x * 2


def test_batches_with_labels() -> None:
    model, x = nn.Linear(4, 4).eval(), torch.ones(2, 4)
    with pytest.raises(CaptureError, match="a dict of the forward's arguments, or inputs without labels"):
        dwindle.compress(model, inputs=(x, x))
    with pytest.raises(CaptureError, match="one batch, such as next"):
        dwindle.compress(model, inputs=DataLoader([x]))  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="a dict of the forward's arguments, or inputs without labels"):
        dwindle.compress(model, "static-w8a8", inputs=x, data=[[x, x]])


@pytest.mark.parametrize(
    ("wrapped", "cure"),
    [
        (lambda model: torch.compile(model), r"model\._orig_mod"),
        (lambda model: nn.DataParallel(model), r"model\.module"),
        (lambda _: _Nameless(), "names each argument"),
        (lambda _: _Rest(), "names each argument"),
    ],
)
def test_models_without_names_for_their_arguments(wrapped: Any, cure: str) -> None:
    with pytest.raises(CaptureError, match=f"(?s)required.*found.*cure.*{cure}"):
        dwindle.compress(wrapped(nn.Linear(4, 4)), {}, inputs=(torch.ones(2, 4), torch.ones(2, 4)))


def test_a_forward_of_further_arguments_that_are_not_given() -> None:
    small = dwindle.compress(_Rest().eval(), {}, inputs=torch.ones(2, 4))
    assert torch.equal(small(torch.ones(3, 4)), torch.ones(3, 4) * 2)


def test_one_glob_or_operator_may_be_given_as_text() -> None:
    (entry,) = Recipe.of({"quantize": [{"modules": "0", "operators": "linear"}]}).quantize
    assert (entry.modules, entry.operators) == (("0",), ("linear",))
    with pytest.raises(RecipeError):
        Recipe.of({"quantize": [{"operators": "lineer"}]})


def test_both_sides_are_warm_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"model": 0, "small": 0}

    def count(name: str) -> Any:
        return lambda *_: counted.update({name: counted[name] + 1})

    model, x = nn.Linear(4, 4).eval(), torch.ones(2, 4)
    small = dwindle.compress(model, {}, inputs=x)
    model.register_forward_hook(count("model"))
    small.register_forward_hook(count("small"))
    monkeypatch.setattr("dwindle.frontends.measure.MOST_RUNS", 5)
    assert WARM_UP >= 3
    batches = len(measure(model, small, {"input": x})["latency"])
    assert counted == {"model": batches * (5 + WARM_UP), "small": batches * (5 + WARM_UP)}
