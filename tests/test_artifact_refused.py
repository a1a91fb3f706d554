"""Artifacts that are damaged, newer, or changed on purpose: each is refused by name, and nothing in it runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO

import dwindle
from dwindle.runtime import saving
from dwindle.runtime.artifact import load
from dwindle.runtime.errors import ArtifactError

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised MLP, saved; tests copy it."""
    model, inputs = ZOO["mlp"]()
    return dwindle.compress(model, "zeroquant-w8a8", inputs=inputs).save(tmp_path_factory.mktemp("saved") / "mlp")


@pytest.fixture
def folder(artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def rewrite(folder: Path, edit: Edit, *, sign: bool = True) -> None:
    """Change the manifest as someone would who also corrects its digest."""
    file = folder / saving.MANIFEST
    manifest = json.loads(file.read_text())
    edit(manifest)
    if sign:
        manifest["sha256"] = saving.digest(manifest)
    file.write_text(json.dumps(manifest))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"found: no manifest\.json"):
        load(tmp_path)


def test_a_flipped_byte(folder: Path) -> None:
    weights = bytearray((folder / saving.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / saving.WEIGHTS).write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"(?s)weights\.safetensors is damaged.*required: sha256.*found: sha256"):
        load(folder)


def test_a_truncated_file(folder: Path) -> None:
    size = (folder / saving.WEIGHTS).stat().st_size
    os.truncate(folder / saving.WEIGHTS, size - 100)
    with pytest.raises(ArtifactError, match=rf"(?s)required: {size} bytes.*found: {size - 100} bytes"):
        load(folder)


@pytest.mark.parametrize("name", [saving.WEIGHTS, saving.MANIFEST])
def test_a_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"null", b"\xff", b'{"format": 1}', b"[" * 100_000])
def test_a_manifest_that_is_none(text: bytes, folder: Path) -> None:
    (folder / saving.MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        load(folder)


def test_a_manifest_rewritten_but_not_changed_is_read(folder: Path) -> None:
    """So what follows is refused for its edit."""
    rewrite(folder, lambda m: None)
    assert load(folder).recipe["name"] == "zeroquant-w8a8"


def test_a_manifest_edited_by_hand(folder: Path) -> None:
    rewrite(folder, lambda m: m["recipe"].update(name="another"), sign=False)
    with pytest.raises(ArtifactError, match="required: contents with sha256"):
        load(folder)


def test_a_newer_format(folder: Path) -> None:
    rewrite(folder, lambda m: m.update(format=saving.FORMAT + 1, dwindle="9.0", sha256="?"), sign=False)
    with pytest.raises(ArtifactError, match=r"(?s)newer.*format 4, written by dwindle 9\.0.*cure: update dwindle"):
        load(folder)


def _node(manifest: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in manifest["variants"][0]["graph"] if node["op"] == op)


def _set(path: str, value: Any) -> Edit:
    """The edit that sets one entry; `#op` is the first node of that kind."""

    def edit(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        *parents, last = path.split("/")
        for part in parents:
            place = _node(manifest, part[1:]) if part[0] == "#" else place[int(part) if part.isdigit() else part]
        place[last] = value

    return edit


TAMPERED: dict[str, Edit] = {
    "os.system": _set("#call_function/target", "os.system"),
    "torch.load": _set("#call_function/target", "torch.load"),
    "attribute": _set("#get_attr/target", "w9.codes"),
    "output": _set("#output/args", [{"tuple": []}]),
    "no input": lambda m: m["variants"][0]["contract"]["inputs"].clear(),
    "input dtype": lambda m: m["variants"][0]["contract"]["inputs"][0].update(dtype="load"),
    "structure": _set("variants/0/contract/output", {"kind": "call", "items": []}),
    "file elsewhere": lambda m: m["files"].update({"../secret": {"bytes": 1, "sha256": ""}}),
    "no file": _set("files", {}),
    "shape": _set("tensors/0.bias/shape", [16, 2]),
    "dtype": _set("tensors/0.bias/dtype", "float16"),
    "order": _set("tensors/0.bias/order", [3]),
    "kind": _set("tensors/0.bias/kind", "module"),
    "scheme": _set("tensors/0.weight/scheme", "4-symmetric-group8-nearest"),
    "no scheme": _set("tensors/0.weight/scheme", "8-symmetric"),
    "logical shape": _set("tensors/0.weight/shape", [32, 8]),
    "zero point": _set("tensors/0.weight/parts/zero_point", {"dtype": "float32", "shape": [64], "bytes": 256}),
    "part": lambda m: m["tensors"]["0.weight"]["parts"].pop("scale"),
    "tensor": lambda m: m["tensors"].pop("2.weight"),
    "alias": _set("aliases", {"other": "w9"}),
    "alias of itself": _set("aliases", {"0.bias": "0.weight"}),
    "edit": lambda m: m["plan"][0].update(edit="Delete"),
    "edit scheme": lambda m: m["plan"][0]["weight"].update(bits=99),
    "signature": lambda m: m["signature"].update(names=["x=__import__('os').system('true')"]),
    "certificate": _set("certificate", {}),
    "log": _set("log", [{"line": 1}]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_manifest_is_refused(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(os, "system", calls.append)
    rewrite(folder, TAMPERED[name])
    with pytest.raises(ArtifactError, match=str(folder)):
        load(folder)
    assert calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_missing_device_is_not_called_damage(artifact: Path) -> None:
    with pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda"):
        load(artifact, device="cuda")
