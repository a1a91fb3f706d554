"""What people install: the wheel, the sdist, the editable install, and the two commands of the README."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("runtime", "passes", "frontends")
DATA = {".py", ".json", ".html", ".yaml", ".yml"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ours() -> set[str]:
    """Every file that must be installed, by its path in an installed dwindle."""
    files = {f"dwindle/{path.name}" for path in (ROOT / "dwindle").iterdir() if path.is_file()}
    for room in ROOMS:
        files |= {f"dwindle/{path.relative_to(ROOT)}" for path in (ROOT / room).rglob("*") if path.suffix in DATA}
    return files


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def copy_of_the_repository(to: Path) -> Path:
    """Links stay links; nothing that an earlier build left behind comes along."""
    to.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("dwindle", "tests", *ROOMS):
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it, away from the repository."""
    folder = tmp_path_factory.mktemp("built")
    source = copy_of_the_repository(folder / "source")
    call(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", folder, cwd=source)
    return folder


@pytest.mark.slow
def test_sdist_has_real_folders(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert ours() <= names
    assert {name.split("/")[0] for name in names} & {*ROOMS, "tests"} == set()


@pytest.mark.slow
def test_wheel_has_dwindle_alone_and_all_of_it(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    inside = {name for name in names if not name.startswith("dwindle-")}
    assert inside == ours()


@pytest.mark.slow
def test_installed_wheel_works_from_elsewhere(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    call(*pip, "--target", target, wheel, cwd=tmp_path)
    installed = {path.name for path in target.iterdir()} - {"bin"}
    assert installed == {"dwindle", f"dwindle-{version()}.dist-info"}
    assert not any(path.is_symlink() for path in target.rglob("*"))
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import dwindle, dwindle.runtime.errors as errors\n"
        "assert dwindle.DwindleError is errors.DwindleError\n"
        "print(errors.__file__)"
    )
    assert call(sys.executable, "-c", code, cwd=tmp_path) == str(target / "dwindle/runtime/errors.py")


@pytest.mark.slow
def test_editable_install_exposes_dwindle_alone(tmp_path: Path) -> None:
    source = copy_of_the_repository(tmp_path / "source")
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    call(sys.executable, "-c", code, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    venv, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    call(*pip, wheel, cwd=elsewhere)
    code = (
        "from importlib.util import find_spec\n"
        "import dwindle.runtime.errors as errors\n"
        "print(errors.__file__)\n"
        f"print([name for name in {(*ROOMS, 'tests')!r} if find_spec(name)])"
    )
    path, bare = call(python, "-c", code, cwd=elsewhere).splitlines()
    assert Path(path).resolve() == source / "runtime/errors.py"
    assert bare == "[]"


# What the repository says about itself


def version() -> str:
    """`dwindle.__version__` as written, where setuptools reads it."""
    for node in ast.parse((ROOT / "dwindle/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise AssertionError("dwindle/__init__.py sets no __version__")


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [block.strip() for block in blocks]


def test_ci_runs_the_second_command_of_the_readme() -> None:
    install, test = readme_commands()[:2]
    assert call("bash", ROOT / ".ci/run", "--show", cwd=ROOT) == test
    assert test.endswith("&& make check")
    assert install.endswith("&& dwindle demo")
    assert "\n" not in install + test


def canonical(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def test_every_dependency_is_pinned_once() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    # no address, no local tag
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\d.]+", pin)] == []
    names = [canonical(pin) for pin in pins]
    assert len(names) == len(set(names))
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(r for extra in extras if extra != "gpu" for r in extras[extra])]
    assert {canonical(requirement) for requirement in wanted} - {"dwindle", *names} == set()


def test_readme_and_ci_install_the_pinned_torch_first() -> None:
    pins = (ROOT / "constraints.txt").read_text().split()
    for command in readme_commands()[:2]:
        first = re.findall(r"pip install -c constraints.txt (\S+)", command)[0]
        assert first.startswith("torch==")
        assert first in pins
