"""What has to be pruned together, told: as a table, as data, as a graph and as a picture."""

from __future__ import annotations

import io
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import networkx as nx
import pytest
from models import ZOO
from pruning import walked
from rich.console import Console
from typer.testing import CliRunner

import dwindle
from dwindle.frontends.commands import app
from dwindle.frontends.coupling import couple
from dwindle.passes.prune import cost
from dwindle.passes.prune.groups import find_groups, kept_count
from dwindle.runtime.errors import RecipeError

HEADS, FFN = "encoder.layer.0.attention.self.query.weight[0]/8", "encoder.layer.0.intermediate.dense.weight[0]"


def test_the_groups_of_an_encoder() -> None:
    model, inputs = ZOO["bert"]()
    rows = {row.name: row for row in couple(model, inputs).rows if not row.reason and row.outermost}
    assert [row.kind for row in rows.values()] == ["heads", "rows"] * 2
    heads = rows[HEADS]
    assert heads.atom == "4 of 8"
    assert heads.nbytes == 4 * 8 * (3 * (32 + 1) + 32)  # rows of Q, K and V with their biases, columns of the output
    assert heads.tied["encoder.layer.0.attention.output.dense.weight[1]"] == [
        "linear",
        "view",
        "scaled_dot_product_attention",
        "linear_3",
    ]
    assert rows[FFN].tied["encoder.layer.0.output.dense.weight[1]"] == ["linear_4", "linear_5"]
    assert rows[FFN].nbytes == 4 * (32 + 1 + 32)
    assert rows[FFN].flops > 0


def test_what_an_index_saves_is_what_slicing_saves() -> None:
    model, inputs = ZOO["llama"]()
    coupling = couple(model, inputs)
    small = dwindle.compress(model, {"prune": {"ratio": 0.25, "scopes": "rows"}}, inputs=inputs)
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    rows = [row for row in coupling.rows if row.kind == "rows" and row.outermost and not row.reason]
    assert 4 * saved == sum(row.nbytes * (row.size // 4) for row in rows)


def test_each_kind_is_named() -> None:
    kinds = {}
    for name in ("mlp", "gpt2", "llama", "resnet", "cnn"):
        kinds[name] = {g.kind for g in find_groups(walked(*ZOO[name]())[0]) if not g.reason and g.outermost}
    assert kinds == {
        "mlp": {"rows"},
        "gpt2": {"hidden", "heads", "rows"},
        "llama": {"hidden", "heads", "rows"},
        "resnet": {"channels"},
        "cnn": {"channels"},
    }


def test_multiplications_are_counted() -> None:
    walk, _ = walked(*ZOO["mlp"]())
    batch = walk.shape(walk.program.graph.find_nodes(op="placeholder")[0])[0]
    assert cost.flops(cost.products(walk), {}) == 2 * batch * (16 * 32 + 32 * 24 + 24 * 5)
    assert cost.numbers(walk, {}) == 16 * 32 + 32 + 32 * 24 + 24 + 24 * 5


def test_files(tmp_path: Path) -> None:
    coupling = couple(*ZOO["bert"]())
    for suffix in (".svg", ".dot", ".graphml"):
        coupling.write(tmp_path / f"groups{suffix}")
    graph = nx.read_graphml(tmp_path / "groups.graphml")
    assert nx.has_path(graph, HEADS.partition("/")[0], "encoder.layer.0.attention.output.dense.weight[1]")
    picture = ET.fromstring((tmp_path / "groups.svg").read_text())
    dots = [element for element in picture.iter() if element.tag.endswith("circle")]
    assert len(dots) == 2 * (7 + 3)
    assert '"encoder.layer.0.intermediate.dense.weight[0]" --' in (tmp_path / "groups.dot").read_text()
    with pytest.raises(RecipeError, match=r"\.svg"):
        coupling.write(tmp_path / "groups.png")


def test_the_table_says_what_stays() -> None:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(couple(*ZOO["bert"]()))
    text = console.export_text()
    assert "4 of 8" in text
    assert "2 stay: it is an output" in text
    assert "inner: true" in text


def test_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.py").write_text("from models import ZOO\n\ndef mlp(): return ZOO['mlp']()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    done = CliRunner().invoke(app, ["inspect", "tiny:mlp", "--groups", "--json"], prog_name="dwindle")
    assert done.exit_code == 0, done.output
    assert {row["size"] for row in json.loads(done.stdout)["groups"]} == {16, 32, 24, 5}
    done = CliRunner().invoke(app, ["inspect", "tiny:mlp", "--graph", "groups.svg"], prog_name="dwindle")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "groups.svg").exists()


@pytest.mark.parametrize(
    ("n", "ratio", "multiple", "stay"),
    [(10, 0.3, 1, 7), (4, 0.3, 1, 3), (2, 0.3, 1, 2), (3, 0.99, 1, 1), (64, 0.3, 16, 48), (10, 0.0, 8, 10)],
)
def test_how_many_stay(n: int, ratio: float, multiple: int, stay: int) -> None:
    assert kept_count(n, ratio, multiple) == stay
