"""The house rules, checked on the source: a rule is a function over source texts, so it can be shown to fail.

Sources map a dotted module name to its text: `dwindle.runtime.ops.linear` for `runtime/ops/linear.py`, and
`dwindle.runtime.ops.__init__` for that folder's own.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import pytest

import dwindle

ROOT = Path(__file__).parents[1]
ROOMS = ("runtime", "passes", "frontends")  # lowest floor first
MAX_LINES = 400
MAX_NAMES = 12

# Not core dependencies: runtime and passes import them on first use.
OPTIONAL = {"matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "psutil", "tokenizers"}
OPTIONAL |= {"transformers", "triton", "typer", "yaml"}
# Packages that are themselves imported on first use, so may import these at the top.
LOADED_LAZILY = {
    "dwindle.runtime.onnx": {"onnx", "onnx_ir", "onnxruntime", "onnxscript"},
    "dwindle.runtime.kernels": {"triton"},
}


class Import(NamedTuple):
    target: str  # dotted and absolute
    line: int
    level: int  # 0 for an absolute import
    when: str  # "load", "call" (in a function) or "typing" (under TYPE_CHECKING)


def sources(*folders: str) -> dict[str, str]:
    """The modules under the folders; those of the rooms are named as they are imported."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[f"dwindle.{name}" if folder in ROOMS else name] = path.read_text()
    return found


def imports(name: str, modules: Mapping[str, str]) -> list[Import]:
    """Every import of a module, with `from . import x` resolved to x where x is a module."""
    package = name.split(".")[:-1]
    found: list[Import] = []

    def visit(node: ast.AST, when: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == "load":
            when = "call"
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, "typing")
            for child in node.orelse:
                visit(child, when)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, 0, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: max(0, len(package) - node.level + 1)] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.append(Import(inner if inner in modules else origin, node.lineno, node.level, when))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            match node.args:
                case [ast.Constant(value=str(target)), *_] if not target.startswith("."):
                    found.append(Import(target, node.lineno, 0, when))
        for part in ast.iter_child_nodes(node):
            visit(part, when)

    visit(ast.parse(modules[name]), "load")
    return found


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "dwindle" else ""


def upward(modules: Mapping[str, str]) -> Iterator[str]:
    """Imports of a higher floor, of the door, or of a room by an absolute name."""
    for name in modules:
        floor = ROOMS.index(room_of(name))
        for item in imports(name, modules):
            where = f"{name}:{item.line} imports {item.target}"
            top = item.target.split(".")[0]
            if item.level == 0 and top in ("dwindle", *ROOMS):
                yield f"{where}: required: a relative import"
            elif item.level and room_of(item.target) not in ROOMS:
                yield f"{where}: required: a module of a room, not the door"
            elif item.level and ROOMS.index(room_of(item.target)) > floor:
                yield f"{where}: imports go down only"


def bare(modules: Mapping[str, str]) -> Iterator[str]:
    """Imports of a room without `dwindle.` before it; a second copy would register operators twice."""
    for name in modules:
        for item in imports(name, modules):
            if item.level == 0 and item.target.split(".")[0] in ROOMS:
                yield f"{name}:{item.line} imports {item.target}: required: dwindle.{item.target}"


def borrowing(modules: Mapping[str, str]) -> Iterator[str]:
    """Tests that import a module of tests: what that one lacks or skips, they would lack too."""
    for name in modules:
        for item in imports(name, modules):
            if name.startswith("tests.test_") and item.target.removeprefix("tests.").startswith("test_"):
                yield f"{name}:{item.line} imports {item.target}: required: a module that both import"


def cycles(modules: Mapping[str, str]) -> Iterator[str]:
    """Modules that need one another, at load or in a function; annotations alone may."""
    graph = nx.DiGraph()
    for name in modules:
        graph.add_edges_from(
            (name, i.target) for i in imports(name, modules) if i.when != "typing" and i.target in modules
        )
    for component in nx.strongly_connected_components(graph):
        inside = graph.subgraph(component)
        if inside.number_of_edges():
            yield " -> ".join(edge[0] for edge in nx.find_cycle(inside))


def eager(modules: Mapping[str, str]) -> Iterator[str]:
    """Modules that load an optional dependency when they are loaded, directly or through others."""
    graph = nx.DiGraph()
    graph.add_nodes_from(modules)
    for name in modules:
        for item in imports(name, modules):
            top = item.target.split(".")[0]
            if item.when == "load" and (item.target in modules or (item.level == 0 and top in OPTIONAL)):
                graph.add_edge(name, item.target if item.target in modules else top)
    for name in modules:
        allowed = set[str]().union(
            *(names for p, names in LOADED_LAZILY.items() if name == p or name.startswith(f"{p}."))
        )
        for package in sorted((nx.descendants(graph, name) & OPTIONAL) - allowed):
            yield " -> ".join(nx.shortest_path(graph, name, package))


def beyond_docstring(source: str) -> bool:
    body = ast.parse(source).body
    return len(body) != 1 or ast.get_docstring(ast.parse(source)) is None


def too_long(source: str) -> bool:
    return len(source.splitlines()) > MAX_LINES


def run(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The house as it is


def test_imports_go_down_and_are_relative() -> None:
    assert list(upward(sources(*ROOMS))) == []


def test_rooms_are_never_imported_bare() -> None:
    assert list(bare(sources(*ROOMS, "dwindle", "tests", "examples", "benchmarks"))) == []


def test_tests_import_no_tests() -> None:
    assert list(borrowing(sources("tests"))) == []


def test_no_cycles() -> None:
    assert list(cycles(sources(*ROOMS))) == []


def test_optional_dependencies_wait_for_first_use() -> None:
    assert list(eager(sources("runtime", "passes"))) == []


def test_every_folder_of_a_room_is_a_package_with_a_docstring_and_nothing_else() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    folders |= {parent for path in folders for parent in path.parents if ROOT in parent.parents}
    wrong = []
    for folder in sorted(folders):
        init = folder / "__init__.py"
        if not init.exists() or beyond_docstring(init.read_text()):
            wrong.append(str(init.relative_to(ROOT)))
    assert wrong == []


def test_files_are_short() -> None:
    files = [
        path
        for folder in (*ROOMS, "dwindle", "tests", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".html", ".css", ".js")
    ]
    files += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", ".ci/run")]
    assert [str(path.relative_to(ROOT)) for path in files if too_long(path.read_text())] == []


def test_the_rooms_are_relative_links() -> None:
    links = {path.name: path.readlink() for path in (ROOT / "dwindle").iterdir() if path.is_symlink()}
    assert links == {room: Path("..") / room for room in ROOMS}


# The house when loaded


def test_everything_loads_and_no_room_is_loaded_bare() -> None:
    """From the root, where a bare import would succeed. Modules of absent optional packages are left out."""
    code = f"""
import importlib, pkgutil, sys, dwindle
for module in pkgutil.walk_packages(dwindle.__path__, "dwindle."):
    if module.name == "dwindle.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in {OPTIONAL!r}:
            raise
print(sorted(n for n in sys.modules if n.split(".")[0] in {ROOMS!r}))
"""
    assert run(code) == "[]"
    assert [name for name in sys.modules if name.split(".")[0] in ROOMS] == []


def test_the_door_alone_loads_no_torch() -> None:
    code = "import sys, dwindle; dir(dwindle); print(sorted({'torch', 'numpy', 'onnx'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_the_door_is_one_screen() -> None:
    assert len(dwindle.__all__) <= MAX_NAMES
    assert dir(dwindle) == sorted(dwindle.__all__)
    with pytest.raises(AttributeError, match="no attribute 'squash'"):
        dwindle.squash  # noqa: B018


@pytest.mark.parametrize("name", dwindle.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(dwindle, name) is not None


def test_what_mypy_sees_is_what_is_loaded() -> None:
    tree = ast.parse((ROOT / "dwindle/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: "." * node.level + (node.module or "")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == dwindle._HOME
    assert {*declared, "__version__"} == set(dwindle.__all__)


# The rules on small bad houses


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dwindle.runtime.a", "from ..passes import b"),
        ("dwindle.runtime.a", "def f():\n    from ..passes.b import g"),
        ("dwindle.runtime.a", "if TYPE_CHECKING:\n    from ..frontends import c"),
        ("dwindle.passes.b", "from ..frontends.c import g"),
        ("dwindle.passes.b", "from ... import compress"),
        ("dwindle.passes.b", "from .. import compress"),
        ("dwindle.passes.b", "import dwindle"),
        ("dwindle.passes.b", "from dwindle.runtime.a import g"),
        ("dwindle.passes.b", "import runtime.a"),
        ("dwindle.passes.b", "import importlib\nimportlib.import_module('dwindle.runtime.a')"),
    ],
)
def test_upward_refuses(name: str, source: str) -> None:
    house = {"dwindle.runtime.a": "", "dwindle.passes.b": "", "dwindle.frontends.c": ""}
    assert list(upward(house)) == []
    assert len(list(upward(house | {name: source}))) == 1


def test_upward_allows_going_down() -> None:
    house = {
        "dwindle.runtime.a": "import torch",
        "dwindle.passes.b": "from ..runtime import a\nfrom . import c",
        "dwindle.passes.c": "from ..runtime.a import f",
        "dwindle.frontends.d": "from ..passes.b import g\nfrom ..runtime import a",
    }
    assert list(upward(house)) == []


def test_bare_refuses() -> None:
    assert len(list(bare({"tests.t": "from runtime.a import f", "tests.u": "import dwindle.runtime.a"}))) == 1


def test_borrowing_refuses() -> None:
    assert len(list(borrowing({"tests.test_t": "from test_u import f\nimport testing, models"}))) == 1


def test_cycles_refuses() -> None:
    house = {"dwindle.passes.a": "from .b import f", "dwindle.passes.b": "def f():\n    from . import a"}
    assert len(list(cycles(house))) == 1
    assert list(cycles(house | {"dwindle.passes.b": "if TYPE_CHECKING:\n    from . import a"})) == []


def test_eager_refuses() -> None:
    house = {
        "dwindle.runtime.a": "try:\n    import onnx.helper\nexcept ImportError:\n    pass",
        "dwindle.runtime.b": "def f():\n    import triton",
        "dwindle.runtime.c": "from .onnx import export",
        "dwindle.runtime.onnx.export": "import onnx",
        "dwindle.runtime.onnx.tune": "import triton",
        "dwindle.runtime.kernels.k": "import triton",
    }
    assert sorted(eager(house)) == [
        "dwindle.runtime.a -> onnx",
        "dwindle.runtime.c -> dwindle.runtime.onnx.export -> onnx",
        "dwindle.runtime.onnx.tune -> triton",
    ]


@pytest.mark.parametrize(
    ("source", "wrong"), [('"""A room."""\n', False), ('"""A room."""\nx = 1\n', True), ("", True)]
)
def test_beyond_docstring(source: str, wrong: bool) -> None:
    assert beyond_docstring(source) is wrong


def test_too_long() -> None:
    assert not too_long("x\n" * MAX_LINES)
    assert too_long("x\n" * (MAX_LINES + 1))
