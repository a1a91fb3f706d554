"""A report as one HTML file: no network, no library, the same bytes for the same report.

The page's frame, style and script lie in `page.html`; here is what goes into it. Everything that came from a model
or a recipe is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ..runtime.certificate import Certificate, Layer, lowering_limit
from ..runtime.files import appearing
from ..runtime.program import Entry
from ..runtime.report import Report, block_of, is_quantized, size, spoken, stored, zeros
from .charts import Bar, bar_chart
from .training_page import training

FRAME = Path(__file__).with_name("page.html")


def write_page(report: Report, path: str | Path, *, title: str = "Compressed model") -> Path:
    """Write the report to the new file `path`, which appears whole or not at all. Raises ArtifactError if it exists."""
    path = Path(path)
    with appearing(path) as draft:
        draft.write_text(page(report, title=title), encoding="utf-8")
    return path


def page(report: Report, *, title: str = "Compressed model") -> str:
    """The report as HTML text."""
    return Template(FRAME.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=_subtitle(report),
        tiles="\n".join(_tiles(report)),
        training=training(report.measured.get("training")),
        latency=_latency(report),
        errors=_errors(report),
        blocks=_blocks(report),
        kernels=_kernels(report),
        layers=_layers(report),
        certificate=_certificate(report.certificate),
        log=_log(report),
        environment=_environment(report),
    )


def _subtitle(report: Report) -> str:
    quantized = sum(is_quantized(layer) for layer in report.layers)
    recipe = escape(str(report.recipe.get("name") or "a recipe of its own"))
    return f"<b>{recipe}</b>, {quantized} of {len(report.layers)} tensors quantised"


def _tiles(report: Report) -> Iterable[str]:
    c = report.certificate
    before, after = size(c.bytes_before), size(c.bytes_after)
    ratio = c.bytes_before / max(c.bytes_after, 1)
    bars = _pair(("before", before, 1.0), ("after", after, c.bytes_after / max(c.bytes_before, 1)))
    yield _tile("Size", f"{ratio:.2f}<small>× smaller</small>", bars)
    sqnr, relative = c.output_error.get("sqnr"), c.output_error.get("relative") or 0.0
    cosine = c.output_error.get("cosine")
    below = f"relative error {relative:.3g}" + ("" if cosine is None else f"<br>cosine {cosine:.5f}")
    yield _tile("Output error", "exact" if sqnr is None else f"{sqnr:.1f}<small>dB SQNR</small>", f"<p>{below}</p>")
    for row in report.measured.get("latency", ()):
        gain = row["eager_p50"] / row["p50"]
        word = "× faster" if gain >= 1 else "× the time"
        most = max(row["eager_p50"], row["p50"])
        times = _pair(
            ("eager", _ms(row["eager_p50"]), row["eager_p50"] / most), ("ours", _ms(row["p50"]), row["p50"] / most)
        )
        shown = f"{gain if gain >= 1 else 1 / gain:.2f}<small>{word}</small>"
        yield _tile(f"Latency at batch {row['batch']}", shown, times)


def _tile(name: str, value: str, below: str) -> str:
    return f'<div class="tile"><h3>{escape(name)}</h3><p class="value">{value}</p>{below}</div>'


def _pair(*bars: tuple[str, str, float]) -> str:
    """Two bars below one another, the first the original's."""
    rows = (
        f'<dt>{name}</dt><dd><i class="{kind}" style="width:{share:.2%}"></i></dd><dd>{value}</dd>'
        for (name, value, share), kind in zip(bars, ("was", "is"), strict=True)
    )
    return f'<dl class="pair">{"".join(rows)}</dl>'


def _latency(report: Report) -> str:
    rows = report.measured.get("latency")
    if not rows:
        return _nothing("Not measured: the original was not at hand.")
    cells = [[str(r["batch"]), *(_ms(r[k]) for k in ("eager_p50", "eager_p95", "p50", "p95")), _ratio(r)] for r in rows]
    heads = ("batch", "eager p50", "eager p95", "compressed p50", "compressed p95", "ratio of p50")
    return _table(heads, [[_number(cell) for cell in row] for row in cells], numbers=range(6))


def _ratio(row: Any) -> str:
    return f"{row['p50'] / row['eager_p50']:.2f}"


def _errors(report: Report) -> str:
    measured = [layer for layer in report.layers if layer.error is not None]
    if not measured:
        return _nothing("No layer was quantised.")
    bars = [
        Bar(layer.error or 0.0, f"{layer.name}\n{layer.error:.3g}, {spoken(layer.scheme)}", block_of(layer.name))
        for layer in measured
    ]
    worst = max(measured, key=lambda layer: layer.error or 0.0)
    label = f"Relative error of {len(bars)} layers; the largest, {worst.error:.3g}, is of {worst.name}"
    note = f"The largest is {worst.error:.3g}, at <code>{escape(worst.name)}</code>."
    return f'<p>{note}</p><div class="wide">{bar_chart(bars, label=label)}</div>'


def _blocks(report: Report) -> str:
    most = max((block.bytes_before for block in report.blocks), default=0) or 1
    rows = []
    for block in report.blocks:
        was, now = block.bytes_before / most, block.bytes_after / most
        bars = f'<i class="was" style="width:{was:.2%}"></i><i class="is" style="width:{now:.2%}"></i>'
        rows.append(
            [
                f"<td><code>{escape(block.name)}</code></td>",
                f'<td class="bars" aria-hidden="true">{bars}</td>',
                _number(size(block.bytes_before), block.bytes_before),
                _number(size(block.bytes_after), block.bytes_after),
                _number("" if block.error is None else f"{block.error:.3g}", block.error or 0.0),
            ]
        )
    heads = ("block", "bytes", "before", "after", "largest error")
    return _table(heads, rows, numbers=(2, 3, 4), sortable=True)


def _kernels(report: Report) -> str:
    if not report.services:
        return _nothing("Nothing runs on dwindle's operators.")
    rows = []
    for service in report.services:
        why = "<br>".join(f"{escape(reason)} ({count} layers)" for reason, count in service.declined.items())
        rows.append(
            [
                f"<td><code>{escape(service.operator)}</code></td>",
                f"<td>{escape(service.kernel)}</td>",
                _number(str(service.layers)),
                f"<td>{why or '<span class=none>none before it</span>'}</td>",
            ]
        )
    return _table(("operator", "kernel", "layers", "kernels that declined, and why"), rows, numbers=(2,))


def _layers(report: Report) -> str:
    heads = ("layer", "stored as", "kernel", "before", "after", "error")
    rows = [_layer(layer) for layer in report.layers]
    changed = [layer.scheme == "folded away" or is_quantized(layer) for layer in report.layers]
    return _table(heads, rows, numbers=(3, 4, 5), sortable=True, marks=["" if c else "same" for c in changed])


def _layer(layer: Layer) -> list[str]:
    served = " / ".join(escape(part) for part in (layer.operator, layer.kernel) if part)
    return [
        f"<td><code>{escape(layer.name)}</code></td>",
        f"<td>{escape(_form(layer))}</td>",
        f'<td title="{escape("; ".join(layer.declined))}">{served}</td>' if layer.declined else f"<td>{served}</td>",
        _number(f"{layer.bytes_before:,}", layer.bytes_before),
        _number(f"{layer.bytes_after:,}", layer.bytes_after),
        _number("" if layer.error is None else f"{layer.error:.3g}", layer.error or 0.0),
    ]


def _form(layer: Layer) -> str:
    """How a layer is held, and how many zeros a pruned one has."""
    if layer.zeros is None:
        return spoken(layer.scheme)
    share = layer.zeros.zeros / max(layer.zeros.total, 1)
    return f"{spoken(layer.scheme)}, {share:.1%} zeros ({layer.zeros.pattern}); {layer.zeros.stored:,} bytes when saved"


def _certificate(c: Certificate) -> str:
    facts = (
        (c.simulated == 0, "No node only simulates", f"{c.simulated} fake-quantise nodes left"),
        (c.graph_breaks == 0, "One graph", f"{c.graph_breaks} graph breaks"),
        (
            c.lowering_error <= lowering_limit(c.rounding),
            "Integers compute what was simulated",
            f"relative error {c.lowering_error:.2g}, at most {lowering_limit(c.rounding):.2g} allowed",
        ),
        (c.bytes_after <= c.bytes_before, "Smaller", f"{c.bytes_before:,} bytes, now {c.bytes_after:,}"),
    )
    items = (
        f'<li class="{"yes" if ok else "no"}"><b>{"✓" if ok else "✗"} {name}</b><span>{found}</span></li>'
        for ok, name, found in facts
    )
    sparse = f"<p>Zeros: {escape(zeros(c))}.</p><p>Stored: {escape(stored(c))}.</p>" if c.sparse else ""
    return f'<ul class="facts">{"".join(items)}</ul>{sparse}<p>Checked on <code>{escape(c.inputs)}</code>.</p>'


def _log(report: Report) -> str:
    declined = _nothing("Nothing was declined.")
    if report.refusals:
        rows = [
            [
                f"<td><code>{escape(refusal.rule)}</code></td>",
                f"<td>{escape(refusal.reason)}</td>",
                f"<td>{_places(refusal.places)}</td>",
            ]
            for refusal in report.refusals
        ]
        declined = _table(("rule", "reason", "where"), rows)
    whole = [_entry(entry) for entry in report.log]
    everything = _table(("stage", "rule", "where", "what"), whole)
    return f"{declined}<details><summary>The whole log, {len(whole)} entries</summary>{everything}</details>"


def _entry(entry: Entry) -> list[str]:
    done = "applied" if entry.applied else "declined"
    return [
        f"<td>{escape(entry.stage)}</td>",
        f"<td><code>{escape(entry.rule)}</code></td>",
        f"<td>{escape(entry.where)}</td>",
        f"<td>{escape(f'{done}: {entry.reason}' if entry.reason else done)}</td>",
    ]


def _places(places: Sequence[str]) -> str:
    if len(places) <= 3:
        return "<br>".join(f"<code>{escape(place)}</code>" for place in places)
    inside = "<br>".join(f"<code>{escape(place)}</code>" for place in places)
    return f"<details><summary>{len(places)} places</summary>{inside}</details>"


def _environment(report: Report) -> str:
    facts = [("captured with", f"torch {report.certificate.torch}")]
    facts += [(name, str(value)) for name, value in report.measured.items() if name not in ("latency", "training")]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    recipe = escape(json.dumps(dict(report.recipe), indent=2, default=str))
    return f'<dl class="plain">{rows}</dl><details><summary>The recipe</summary><pre>{recipe}</pre></details>'


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Iterable[int] = (),
    sortable: bool = False,
    marks: Sequence[str] = (),
) -> str:
    right = set(numbers)
    cells = []
    for i, head in enumerate(heads):
        text = f'<button type="button">{escape(head)}</button>' if sortable else escape(head)
        cells.append(f'<th scope="col"{" class=number" if i in right else ""}>{text}</th>')
    kinds = [f' class="{mark}"' if mark else "" for mark in marks] or [""] * len(rows)
    body = "\n".join(f"<tr{kind}>{''.join(row)}</tr>" for row, kind in zip(rows, kinds, strict=True))
    table = f"<table{' class=sortable' if sortable else ''}>"
    return f'<div class="wide">{table}<thead><tr>{"".join(cells)}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _number(text: str, value: float | None = None) -> str:
    key = "" if value is None else f' data-value="{value:g}"'
    return f'<td class="number"{key}>{text}</td>'


def _nothing(text: str) -> str:
    return f'<p class="none">{escape(text)}</p>'


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
