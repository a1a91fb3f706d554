"""The demo as a person runs it, on the real model and the real texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

import dwindle
from dwindle.frontends.demo import FLOAT, ONNX, OURS, run_demo
from dwindle.runtime.errors import ArtifactError


def test_an_existing_folder_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="choose another path"):
        run_demo(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers, torch.onnx
def test_quick_demo(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "demo"
    figures = run_demo(out, quick=True, quiet=True)
    assert {path.name for path in out.iterdir()} == {"artifact", "model.onnx", "report.html", "figures.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert json.loads((out / "figures.json").read_text()) == json.loads(json.dumps(figures.to_json()))
    # measured: fp32 .9352; int8 -.0058 with the interval -.0158 .. +.0017, cosine .99719
    base = figures.of(FLOAT)
    assert base.mrr == pytest.approx(0.935, abs=0.005)
    for form in (OURS, ONNX):
        quality = figures.of(form)
        assert quality.difference is not None
        mean, (low, high) = quality.difference
        assert low <= mean <= high
        assert abs(mean) < 0.02
        assert quality.cosine is not None
        assert quality.cosine > 0.995
        assert figures.bytes[form] < 0.27 * figures.bytes[FLOAT]
    assert all(timing.p50 for timing in figures.latency.timings)
    assert dwindle.load(out / "artifact").certificate.simulated == 0
    console = Console(width=80)
    with console.capture() as capture:
        console.print(figures)
    assert "report.html" in capture.get()
