"""The report: the certificate, the log and the measurements, as a table or as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from .certificate import Certificate
from .program import Entry


@dataclass(frozen=True)
class Report:
    """Facts about one compressed model; `print(report)` shows it, `to_json()` gives everything.

    measured: {"latency": [{"batch", "eager_p50", "eager_p95", "p50", "p95"}, ...] in seconds, "machine": ...}
    """

    certificate: Certificate
    recipe: Mapping[str, Any]
    log: tuple[Entry, ...]
    measured: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "certificate": self.certificate.to_json(),
            "recipe": dict(self.recipe),
            "log": [entry.to_json() for entry in self.log],
            "measured": dict(self.measured),
        }

    def __str__(self) -> str:
        console = Console(width=110, no_color=True, force_terminal=False, record=False)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()

    def __rich__(self) -> Group:
        parts = [self._layers(), self._summary()]
        if self.measured.get("latency"):
            parts.append(self._latency())
        declined = sorted({f"{e.rule} {e.where}: {e.reason}" for e in self.log if not e.applied})
        if declined:
            parts.append(_column("Declined, and why", declined))
        return Group(*parts)

    def _layers(self) -> Table:
        table = Table(title="Layers", title_justify="left")
        for name in ("layer", "stored as", "operator", "kernel"):
            table.add_column(name, overflow="fold")
        for name in ("bytes before", "after", "error"):
            table.add_column(name, justify="right")
        for layer in self.certificate.layers:
            error = "" if layer.error is None else f"{layer.error:.2e}"
            before, after = f"{layer.bytes_before:,}", f"{layer.bytes_after:,}"
            table.add_row(layer.name, layer.scheme, layer.operator, layer.kernel, before, after, error)
        return table

    def _summary(self) -> Table:
        c = self.certificate
        rows = [
            (
                "tensors",
                f"{c.bytes_before:,} -> {c.bytes_after:,} bytes ({c.bytes_after / max(c.bytes_before, 1):.3f})",
            ),
            ("output error", _differences(c.output_error)),
            ("lowered against simulated", f"{c.lowering_error:.2e} relative"),
            ("nodes that only simulate", str(c.simulated)),
            ("graph breaks", str(c.graph_breaks)),
            ("checked on", c.inputs),
        ]
        if "disk" in self.measured:
            rows.append(("on disk", self.measured["disk"]))
        table = Table(title="Certificate", title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*row)
        return table

    def _latency(self) -> Table:
        table = Table(title=f"Latency, ms ({self.measured.get('machine', '')})", title_justify="left")
        for name in ("batch", "eager p50", "p95", "compressed p50", "p95", "ratio of p50"):
            table.add_column(name, justify="right")
        for row in self.measured["latency"]:
            times = [f"{row[k] * 1e3:.2f}" for k in ("eager_p50", "eager_p95", "p50", "p95")]
            table.add_row(str(row["batch"]), *times, f"{row['p50'] / row['eager_p50']:.2f}")
        return table


def _differences(error: Mapping[str, float | None]) -> str:
    sqnr = error.get("sqnr")
    shown = "exact" if sqnr is None else f"SQNR {sqnr:.1f} dB"
    return f"{shown}, relative {error.get('relative') or 0.0:.2e}, cosine {error.get('cosine') or 0.0:.5f}"


def _column(title: str, lines: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for line in lines:
        table.add_row(line)
    return table


def dumps(report: Report) -> str:
    """The report as JSON text."""
    return json.dumps(report.to_json(), indent=1, default=str)
