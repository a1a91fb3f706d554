"""The part of a report's page that shows training: bits and loss over steps, each change, and curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..passes.schedule import FULL
from ..runtime.report import trained
from .charts import curve_chart


def training(run: Mapping[str, Any] | None) -> str:
    """The section, or nothing for a model that was not trained."""
    if not run:
        return ""
    steps, curve, (start, end) = run["steps"], run["curve"], run["bits"]
    marks = [(step, f"step {step}: {_change(*rest)}") for step, *rest in run["changes"]]
    bits = [(0, start), *((step, bits) for step, _, bits in curve), (steps, end)]
    losses = [(step, loss) for step, loss, _ in curve]
    parts = [
        "<section>",
        "<h2>Training</h2>",
        f"<p>{escape(trained(run))}.</p>",
    ]
    if end:
        chart = curve_chart(bits, end=steps, label="Bits by step", stairs=True, marks=marks)
        parts.append(_figure("Bits on average", chart))
    if any(loss is not None for _, loss in losses):
        parts.append(_figure("Loss", curve_chart(losses, end=steps, label="Loss by step", marks=marks)))
    rows: list[tuple[str, ...]]
    if run["changes"]:
        rows = [(f"{step:,}", _change(*rest)) for step, *rest in run["changes"]]
        parts.append(_folded(f"{len(rows)} changes", ("step", "change"), rows))
    if run["curvature"] is not None:
        blocks = run["curvature"]["blocks"].items()
        rows = [(name, f"{value:.3g}", str(factor)) for name, (value, factor) in blocks]
        parts.append(_folded("Curvature as last measured", ("block", "curvature", "period times"), rows))
    return "\n".join([*parts, "</section>"])


def _change(before: int, after: int, count: int, kind: str) -> str:
    if kind not in ("weight", "activation"):
        return f"{before:,} to {after:,} of {count:,} {kind} stay"
    was = "float" if before == FULL else f"{before} bits"
    return f"{was} to {after} bits, {count} {kind}{'' if count == 1 else 's'}"


def _figure(name: str, chart: str) -> str:
    return f'<h3 class="axis">{name}</h3><div class="wide">{chart}</div>'


def _folded(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<details><summary>{escape(name)}</summary><div class="wide">{table}</div></details>'
