"""Zeros in saved models: left out, back at their places, counted, and refused where a file contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO
from pruning import Transformer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dwindle
from dwindle.frontends.page import page
from dwindle.runtime import saving
from dwindle.runtime.errors import ArtifactError
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.report import size
from dwindle.runtime.sparse_storage import form_of, stored_nbytes

W8 = [{"weight": {"bits": 8}, "activation": {"bits": 8}}]
W4 = [{"weight": {"bits": 4}, "activation": {"bits": 8}}]


def identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture(scope="module")
def example() -> Tensor:
    return torch.randn(6, 5, 10, generator=torch.Generator().manual_seed(0))


def small(quantize: Any = (), **rule: Any) -> Any:
    x = torch.randn(6, 5, 10, generator=torch.Generator().manual_seed(0))
    recipe = {"sparsify": {"modules": "blocks.*", **rule}, "quantize": list(quantize)}
    return dwindle.compress(Transformer().eval(), recipe, inputs=x)


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / saving.MANIFEST).read_text())
    return found


def tensor_bytes(folder: Path) -> int:
    """What the tensors take in the file: all of it behind its header."""
    content = (folder / saving.WEIGHTS).read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("quantize", [(), W8, W4], ids=["float", "w8a8", "w4"])
@pytest.mark.parametrize("rule", [{"ratio": 0.75}, {"pattern": "2:4"}, {"ratio": 0.5, "pattern": "4x1"}], ids=str)
def test_a_saved_model_is_smaller_and_the_same(rule: Any, quantize: Any, example: Tensor, tmp_path: Path) -> None:
    model = small(quantize, **rule)
    folder = model.save(tmp_path / "saved")
    loaded = dwindle.load(folder)
    assert torch.equal(loaded(example), model(example))
    assert loaded.certificate == model.certificate
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(identical(value, after[name]) for name, value in before.items())

    c, manifest = model.certificate, manifest_of(folder)
    entries = [e for entry in manifest["tensors"].values() for e in entry.get("parts", {"": entry}).values()]
    assert manifest["format"] == 2
    assert sum(entry["bytes"] for entry in entries) == tensor_bytes(folder) == c.bytes_stored
    assert c.bytes_after == model.store.nbytes()
    forms = {entry["stored"]["form"] for entry in entries if "stored" in entry}
    if quantize != W4:  # where zeros do not fill bytes, little is to be had
        assert sum("stored" in entry for entry in entries) == 12
        assert forms == {"2:4" if "ratio" not in rule else "mask"}
        share = {"0.75": 0.25 + 1 / 8, "None": 0.5 + 1 / 8, "0.5": 0.5 + 1 / 8}[str(rule.get("ratio"))]
        if not quantize:
            share -= 1 / 8 - 1 / 32
        own = [(layer.zeros.stored, layer.bytes_after) for layer in c.sparse if layer.zeros]
        scales = sum(v.scale.nbytes for _, v in model.store.entries() if isinstance(v, QTensor))
        most = sum(whole for _, whole in own) - scales
        assert 0.9 * share * most < sum(stored for stored, _ in own) - scales <= share * most


@pytest.mark.parametrize("quantize", [(), W8], ids=["float", "w8a8"])
def test_zeros_are_counted_as_they_are(quantize: Any) -> None:
    model = small(quantize, pattern="2:4")
    assert [layer.name for layer in model.certificate.sparse] == sorted(model.plan.patterns)
    for layer in model.certificate.sparse:
        value = model.store.get(layer.name)
        shown = value.dequantize() if isinstance(value, QTensor) else value
        assert layer.zeros.zeros == int((shown == 0).sum()) >= layer.zeros.total // 2
        assert layer.zeros.stored == stored_nbytes(value, "2:4") < layer.bytes_after


class Image(nn.Module):
    """(N, 8, 6, 6) to (N, 16, 4, 4), its weight channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@pytest.mark.parametrize("quantize", [[], [{"operators": "conv2d", **W8[0]}]], ids=["float", "w8a8"])
@pytest.mark.parametrize("rule", [{"ratio": 0.5}, {"pattern": "2:4"}], ids=str)
def test_a_convolution_keeps_its_order_in_memory(rule: Any, quantize: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    model = dwindle.compress(Image().eval(), {"sparsify": rule, "quantize": quantize}, inputs=x)
    loaded = dwindle.load(model.save(tmp_path / "saved"))
    assert torch.equal(loaded(x), model(x))
    before, after = model.store.get("conv.weight"), loaded.store.get("conv.weight")
    entry = manifest_of(tmp_path / "saved")["tensors"]["conv.weight"]
    if isinstance(before, QTensor):
        assert isinstance(after, QTensor)
        before, after, entry = before.codes, after.codes, entry["parts"]["codes"]
    assert entry["stored"]["form"] == rule.get("pattern", "mask")
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    assert after.stride() == before.stride()
    assert identical(after, before)


def test_a_weight_read_transposed_has_its_fours_along_the_other_dimension(tmp_path: Path) -> None:
    model, inputs = ZOO["gpt2"]()
    sparse = dwindle.compress(model, {"sparsify": {"pattern": "2:4", "modules": "*c_fc"}}, inputs=inputs)
    folder = sparse.save(tmp_path / "saved")
    stored = [entry["stored"] for entry in manifest_of(folder)["tensors"].values() if "stored" in entry]
    assert stored
    assert {(entry["form"], entry["dim"]) for entry in stored} == {("2:4", 0)}
    with torch.no_grad():
        expected, found = sparse(**inputs), dwindle.load(folder)(**inputs)
    assert torch.equal(expected.logits, found.logits)


def test_without_zeros_files_are_as_they_were(tmp_path: Path) -> None:
    model, inputs = ZOO["mlp"]()
    folder = dwindle.compress(model, "zeroquant-w8a8", inputs=inputs).save(tmp_path / "saved")
    manifest = manifest_of(folder)
    assert manifest["format"] == 1
    assert "stored" not in json.dumps(manifest["tensors"])
    assert all("zeros" not in layer for layer in manifest["certificate"]["layers"])


def test_too_few_zeros_are_stored_as_they_are(example: Tensor, tmp_path: Path) -> None:
    model = small(ratio=0.02)
    folder = model.save(tmp_path / "saved")
    assert not any("stored" in entry for entry in manifest_of(folder)["tensors"].values())
    assert tensor_bytes(folder) == model.certificate.bytes_stored == model.certificate.bytes_after
    assert torch.equal(dwindle.load(folder)(example), model(example))
    assert "compressed, these zeros would take no less" in str(model.report())


# What a report says


def test_a_report_says_what_zeros_are_good_for() -> None:
    model = small(pattern="2:4")
    model._measure = None
    report, c = model.report(), model.certificate
    total = sum(layer.zeros.total for layer in c.sparse)
    console = Console(width=300, record=True, quiet=True)
    console = Console(width=300)
    with console.capture() as capture:
        console.print(report)
    said = f"{total // 2:,} of {total:,} numbers in 12 weights (2:4, 50.0%)"
    useless = "In memory they take the room of other numbers, and they make nothing faster here"
    kept = f"of tensors in a saved model, where zeros are left out; {size(c.bytes_after)} in memory"
    for text in (capture.get(), page(report)):
        for part in (said, useless, kept, f"{size(c.bytes_stored)} of tensors"):
            assert part in text
    assert c.bytes_stored < c.bytes_after == c.bytes_before  # nothing is said to be smaller in memory
    first = c.sparse[0].zeros
    assert f"float32, 50.0% zeros (2:4); {first.stored:,} bytes when saved" in page(report)


def test_a_report_of_a_model_without_zeros_says_nothing_of_them() -> None:
    model, inputs = ZOO["mlp"]()
    report = dwindle.compress(model, {}, inputs=inputs).report()
    assert "zeros" not in str(report)
    assert "Zeros" not in page(report)


# Files that contradict themselves

Edit = Callable[[dict[str, Any]], None]


def _entry(**values: Any) -> Edit:
    return lambda manifest: manifest["tensors"]["blocks.0.up.weight"].update(values)


def _stored(**values: Any) -> Edit:
    return lambda manifest: manifest["tensors"]["blocks.0.up.weight"]["stored"].update(values)


WRONG: dict[str, dict[str, Edit]] = {
    "2:4": {
        "form": _stored(form="3:8"),
        "form of none": _stored(form=None),
        "another n": _stored(form="1:4"),
        "a mask": _stored(form="mask", values=4096),
        "view": _stored(view=[64, 64, 2]),
        "negative view": _stored(view=[-64, -64]),
        "no view": _stored(view=7),
        "dim": _stored(dim=2),
        "bytes": _entry(bytes=1),
        "shape": _entry(shape=[4, 4]),
        "dtype": _entry(dtype="float16"),
        "not stored": lambda manifest: manifest["tensors"]["blocks.0.up.weight"].pop("stored"),
        "zeros": lambda manifest: manifest["certificate"]["layers"][0].update(zeros={"pattern": "2:4"}),
    },
    "unstructured": {
        "values": _stored(values=1),
        "values in words": _stored(values="many"),
        "bytes": _entry(bytes=1),
        "shape": _entry(shape=[1 << 40, 1 << 20]),
        "negative shape": _entry(shape=[-64, -64]),
        "order": _entry(order=[0, 0]),
        "places": _stored(form="2:4", view=[64, 64], dim=1),
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model saved with zeros of both kinds."""
    path = tmp_path_factory.mktemp("saved")
    rules: dict[str, Any] = {"2:4": {"pattern": "2:4"}, "unstructured": {"ratio": 0.5}}
    return {name: small(**rule).save(path / name.replace(":", "-")) for name, rule in rules.items()}


def rewritten(folder: Path, target: Path, edit: Edit, weights: dict[str, Tensor] | None = None) -> Path:
    """A copy with the manifest changed, and its digests corrected; weights: in place of what the file has."""
    target.mkdir()
    file = target / saving.WEIGHTS
    save_file({**load_file(folder / saving.WEIGHTS), **(weights or {})}, file)
    manifest = manifest_of(folder)
    edit(manifest)
    manifest["files"] = {saving.WEIGHTS: saving.fingerprint(file)}
    manifest["sha256"] = saving.digest(manifest)
    (target / saving.MANIFEST).write_text(json.dumps(manifest))
    return target


@pytest.mark.parametrize("pattern", WRONG)
def test_a_manifest_rewritten_but_not_changed_is_read(
    pattern: str, folders: dict[str, Path], example: Tensor, tmp_path: Path
) -> None:
    """So what follows is refused for its edit."""
    copy = rewritten(folders[pattern], tmp_path / "copy", lambda manifest: None)
    assert torch.equal(dwindle.load(copy)(example), dwindle.load(folders[pattern])(example))


@pytest.mark.parametrize(("pattern", "name"), [(pattern, name) for pattern, edits in WRONG.items() for name in edits])
def test_a_wrong_entry_is_refused(pattern: str, name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copy = rewritten(folders[pattern], tmp_path / "copy", WRONG[pattern][name])
    with pytest.raises(ArtifactError, match=str(copy)):
        dwindle.load(copy)


@pytest.mark.parametrize(
    ("pattern", "part", "damage", "message"),
    [
        ("2:4", "places", lambda t: torch.zeros_like(t), "places that do not ascend"),
        ("unstructured", "mask", lambda t: torch.full_like(t, 255), "a mask with"),
        ("unstructured", "values", lambda t: t[1:].clone(), "found: torch.float32"),
        ("2:4", "values", lambda t: t.half(), "found: torch.float16"),
    ],
)
def test_wrong_parts_are_refused(
    pattern: str, part: str, damage: Any, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    name = f"blocks.0.up.weight.{part}"
    changed = damage(load_file(folders[pattern] / saving.WEIGHTS)[name])
    copy = rewritten(folders[pattern], tmp_path / "copy", lambda manifest: None, {name: changed})
    with pytest.raises(ArtifactError, match=rf"(?s)blocks\.0\.up\.weight.*{message}"):
        dwindle.load(copy)


# ONNX


@pytest.mark.parametrize("quantize", [(), W8], ids=["float", "w8a8"])
def test_an_exported_model_has_its_zeros_as_plain_numbers(quantize: Any, example: Tensor, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = small(quantize, ratio=0.75)
    file = model.export_onnx(tmp_path / "model.onnx")
    (found,) = onnxruntime.InferenceSession(str(file)).run(None, {"x": example.numpy()})
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if not quantize else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(torch.from_numpy(found), model(example), **tolerance)
    graph = onnx.load(file).graph
    assert not graph.sparse_initializer
    held = [torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer]
    weights = [tensor for tensor in held if tensor.numel() >= 1024 and (tensor == 0).float().mean() >= 0.75]
    assert len(weights) == 12
    assert all(form_of(tensor, "unstructured") for tensor in weights)  # in a file of ours they would take less
