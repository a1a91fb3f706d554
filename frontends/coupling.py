"""What has to be pruned together in a model, and why: as a table, as data, as a graph and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from ..passes.canonicalize import canonicalize
from ..passes.prune import cost
from ..passes.prune.axes import Atom
from ..passes.prune.groups import Group, coupling, find_groups, ties
from ..passes.prune.transfer import rule_of
from ..passes.prune.walk import Walk
from ..runtime.errors import RecipeError
from ..runtime.files import require_free
from ..runtime.report import WIDE, size
from ..runtime.store import Store
from .capture import DynamicShapes, capture
from .inputs import as_arguments

SUFFIXES = (".dot", ".graphml", ".svg")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group: its kind, name, how many indices it has and which stored dimensions they are.

    atom: how the first of these is made up, "4 of 8"; nbytes, flops: what pruning one index saves
    tied: by cut, the calls that tie it to the first; reason: why it stays
    """

    kind: str
    name: str
    size: int
    atom: str
    cuts: tuple[str, ...]
    nbytes: int
    flops: int
    outermost: bool
    tied: dict[str, list[str]]
    reason: str


@dataclass(frozen=True)
class Coupling:
    """All groups of a model."""

    rows: tuple[Row, ...]
    graph: nx.Graph

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"groups": [asdict(row) for row in self.rows]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = [row for row in self.rows if not row.reason and row.outermost]
        yield _table(free, options.max_width >= WIDE)
        inside = sum(not row.reason and not row.outermost for row in self.rows)
        if inside:
            yield f"{inside} more lie inside these (the size of a head): a rule with `inner: true` prunes them too."
        stays: dict[str, int] = {}
        for row in self.rows:
            if row.reason:
                stays[row.reason] = stays.get(row.reason, 0) + 1
        for reason, count in sorted(stays.items(), key=lambda item: -item[1]):
            yield f"{count} {'stays' if count == 1 else 'stay'}: {reason}"

    def write(self, path: str | Path) -> Path:
        """As .dot, .graphml or .svg. Raises RecipeError for another suffix."""
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise RecipeError("a graph of an unknown form", required=", ".join(SUFFIXES), found=path.suffix or path)
        require_free(path)
        if path.suffix == ".svg":
            path.write_text(picture(self.rows), encoding="utf-8")
        elif path.suffix == ".dot":
            path.write_text(_dot(self.graph), encoding="utf-8")
        else:
            nx.write_graphml(self.graph, path)
        return path


def couple(model: nn.Module, inputs: Any = None, *, dynamic_shapes: DynamicShapes | None = None) -> Coupling:
    """Capture `model` and find its groups; nothing is changed. Arguments as for `compress`."""
    program = canonicalize(capture(model, as_arguments(model, inputs), Store.of(model), dynamic_shapes=dynamic_shapes))
    walk = Walk.over(program, rule_of)
    graph = coupling(walk)
    products = cost.products(walk)
    whole = cost.flops(products, {})
    rows = [_row(walk, graph, group, products, whole) for group in find_groups(walk)]
    return Coupling(tuple(rows), _named(graph))


def _row(walk: Walk, graph: nx.Graph, group: Group, products: Sequence[cost.Product], whole: int) -> Row:
    first = walk.program.store.get(group.cuts[0].name)
    assert isinstance(first, Tensor)
    tied = {} if group.reason else ties(graph, group)
    return Row(
        kind=group.kind,
        name=group.name,
        size=group.size,
        atom=f"{group.size} of {group.cuts[0].times}" if group.cuts[0].times > 1 else str(group.size),
        cuts=tuple(f"{cut.name}[{cut.dim}]" for cut in group.cuts),
        nbytes=group.elements * first.element_size(),
        flops=0 if group.reason else (whole - cost.flops(products, {group.leaf: _without_one(group)})),
        outermost=group.outermost,
        tied={f"{cut.name}[{cut.dim}]": ops for cut, ops in tied.items()},
        reason=group.reason,
    )


def _without_one(group: Group) -> Tensor:
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[0] = False
    return mask


def _table(rows: Sequence[Row], wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Groups", title_justify="left", title_style="bold")
    table.add_column("kind", no_wrap=True)
    table.add_column("first tensor", overflow="fold")
    table.add_column("indices", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right", no_wrap=True)
    for name in ("bytes", "MFLOP") if wide else ("bytes",):
        table.add_column(f"{name} an index", justify="right", no_wrap=True)
    if wide:
        table.add_column("tied by", overflow="fold")
    for row in rows:
        ops = list(dict.fromkeys(op for path in row.tied.values() for op in path))
        shown = " ".join(ops[:6]) + (f" and {len(ops) - 6} more" if len(ops) > 6 else "")
        more = [f"{row.flops / 1e6:.3g}", shown] if wide else []
        table.add_row(row.kind, row.name, row.atom, str(len(row.cuts)), size(row.nbytes), *more)
    return table


def _named(graph: nx.Graph) -> nx.Graph:
    """The same graph with text for nodes, as files have it."""
    named = nx.relabel_nodes(graph, {n: f"atom {n.number} ({n.size})" for n in graph if isinstance(n, Atom)})
    for node in named:
        named.nodes[node]["kind"] = "atom" if str(node).startswith("atom ") else "stored"
    return named


def _dot(graph: nx.Graph) -> str:
    lines = ["graph coupling {", "  rankdir=LR; node [shape=box];"]
    for node, facts in graph.nodes(data=True):
        lines.append(f'  "{node}"' + (" [shape=ellipse];" if facts["kind"] == "atom" else ";"))
    lines += [f'  "{a}" -- "{b}" [label="{facts["op"]}"];' for a, b, facts in graph.edges(data=True)]
    return "\n".join([*lines, "}", ""])


ROW, LANE, TOP = 18.0, 16.0, 28.0  # heights of a tensor's row, width of a group's lane, in the picture's units
COLOURS = {"heads": "#3b6fb6", "rows": "#4f9d69", "channels": "#b5651d", "hidden": "#8b5fa8", "experts": "#b03a48"}


def picture(rows: Sequence[Row]) -> str:
    """SVG: a line for each stored dimension, a lane for each group, a dot where the group cuts it."""
    shown = [row for row in rows if not row.reason and row.outermost]
    names = list(dict.fromkeys(cut for row in shown for cut in row.cuts))
    place = {name: TOP + ROW * i for i, name in enumerate(names)}
    left = 7.0 * max((len(name) for name in names), default=0) + 20
    width, height = left + LANE * (len(shown) + 1) + 20, TOP + ROW * len(names) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="monospace" font-size="11" role="img" aria-label="coupled dimensions">',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
    ]
    for i, (kind, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{10 + 75 * i}" y="14" fill="{colour}">{kind}</text>')
    for name, y in place.items():
        parts.append(f'<line x1="{left:g}" x2="{width - 10:g}" y1="{y:g}" y2="{y:g}" stroke="#eee"/>')
        parts.append(f'<text x="{left - 8:g}" y="{y + 4:g}" text-anchor="end">{escape(name)}</text>')
    for i, row in enumerate(shown):
        x, ys, colour = left + LANE * (i + 1), [place[cut] for cut in row.cuts], COLOURS[row.kind]
        title = f"<title>{escape(f'{row.kind} {row.name}: {row.atom}, {len(row.cuts)} tensors')}</title>"
        line = f'<line x1="{x:g}" x2="{x:g}" y1="{min(ys):g}" y2="{max(ys):g}" stroke="{colour}" stroke-width="2"/>'
        dots = "".join(f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{colour}"/>' for y in ys)
        parts.append(f"<g>{title}{line}{dots}</g>")
    return "\n".join([*parts, "</svg>", ""])
