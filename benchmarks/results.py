"""Results as JSON beside the scripts that made them, so that a run can be stopped and taken up again.

    arguments = command_line(__doc__).parse_args()
    results = Results("torch_cpu", again=arguments.again)
    for shape in SHAPES:
        row = results.point({"shape": shape, "rounds": 15}, lambda: measure(shape))

A point is one dict of plain data. It is found again by its commit, configuration and machine, and measured when
it is not there or when all are asked for `again`. Each point is written to results/<name>.json as soon as it is
measured, by renaming a finished file; points of other commits stay. The commit is the last that changed the sources,
not one of documents or results; with changes that are not committed it is `abc1234+<digest of the changes>`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE / "results"
SOURCES = ("passes", "runtime", "frontends")  # what a result depends on, besides the script
VERSIONS = ("dwindle", "torch", "transformers", "onnxruntime", "torchvision", "timm", "torch-pruning")
KEY = ("commit", "configuration", "machine")

Point = dict[str, Any]


class Results:
    """The points of one benchmark, read from its file and written back one by one."""

    def __init__(self, name: str, *, again: bool = False) -> None:
        self.file, self.again = FOLDER / f"{name}.json", again
        self.common = {"commit": commit(), "machine": machine()}

    def point(self, configuration: Mapping[str, Any], measure: Callable[[], Point], *, peer: bool = False) -> Point:
        """The stored result of a configuration, or what `measure` finds now; of a peer one of any commit will do."""
        entry: Point = {**self.common, "configuration": json.loads(json.dumps(configuration))}
        parts = KEY[1:] if peer else KEY
        known = next((p for p in self._stored() if all(p[part] == entry[part] for part in parts)), None)
        if known is None or self.again:
            known = {**entry, "versions": versions(), "command": command(), "result": measure()}
            self._write(known)
        found: Point = json.loads(json.dumps(known))["result"]  # as a stored one would read
        return found

    def _stored(self) -> list[Point]:
        return json.loads(self.file.read_text()) if self.file.exists() else []

    def _write(self, entry: Point) -> None:
        points = [p for p in self._stored() if any(p[part] != entry[part] for part in KEY)] + [entry]
        FOLDER.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=FOLDER, suffix=".tmp", delete=False) as draft:
            draft.write(json.dumps(points, indent=1) + "\n")
        Path(draft.name).chmod(0o644)
        os.replace(draft.name, self.file)


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows `--again`, and says of a script what its docstring says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure what is already there as well")
    return parser


def commit() -> str:
    """The last commit of the sources, with a digest of what was changed since; "unversioned" outside git."""
    head = _git("log", "-1", "--format=%h", "--", *SOURCES)
    if not head:
        return "unversioned"
    changes = _git("diff", "HEAD", "--", *SOURCES) or ""
    for name in (_git("ls-files", "--others", "--exclude-standard", "--", *SOURCES) or "").splitlines():
        changes += f"\n{name}\n{(HERE.parent / name).read_text(errors='replace')}"
    return head if not changes else f"{head}+{hashlib.sha256(changes.encode()).hexdigest()[:6]}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE.parent)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> str:
    """Processor, cores and system, as one line."""
    return f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def versions() -> dict[str, str]:
    """What was installed of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command line of this run, with the script's path from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(HERE.parent) if script.is_relative_to(HERE.parent) else script.name
    return shlex.join(["python", str(shown), *sys.argv[1:]])
