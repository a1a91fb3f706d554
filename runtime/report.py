"""The report: the certificate, the log and the measurements, as tables or as plain data.

Tables are short however deep the model is: layers are shown by block, blocks of one kind together, and the layers
with the largest errors by name. `to_json()` leaves nothing out.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from .certificate import Certificate, Layer, Layered, Zeros
from .program import Entry
from .scheme import Scheme

PRINTED_WIDTH = 110
MOST_ROWS = 16  # more layers are shown by block, more blocks by kind
WORST = 5
WIDE, NARROW = 100, 64  # columns; tables of layers leave out what can be done without below each


@dataclass(frozen=True)
class Block(Layered):
    """Layers of one part of a model: `encoder.layer.3` and what lies below it."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def quantized(self) -> tuple[Layer, ...]:
        """Those stored as integers."""
        return tuple(layer for layer in self.layers if is_quantized(layer))

    @property
    def error(self) -> float | None:
        """The largest error of a layer, None where none was measured."""
        return max((layer.error for layer in self.layers if layer.error is not None), default=None)


@dataclass(frozen=True)
class Service:
    """A kernel, how many layers it serves, and why kernels before it did not: reason -> layers."""

    operator: str
    kernel: str
    layers: int
    declined: Mapping[str, int]


@dataclass(frozen=True)
class Refusal:
    """A rewrite that was not made for one reason at some places of the graph."""

    rule: str
    reason: str
    places: tuple[str, ...]


class Printed:
    """Something that rich can show, and print() too."""

    def __str__(self) -> str:
        console = Console(width=PRINTED_WIDTH, no_color=True, force_terminal=False, record=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


@dataclass(frozen=True)
class Report(Printed):
    """Facts about one compressed model; `print(report)` shows them, `to_json()` gives everything.

    measured: {"latency": [{"batch", "eager_p50", "eager_p95", "p50", "p95"}, ...] in seconds, "machine": ...,
        "training": {"steps", "bits": (first, last), "curve": [(step, loss, bits), ...], "changes", "curvature",
            "kept": [(what is pruned, indices that stay, of how many), ...]}}
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

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The certificate's layers, layer.2 before layer.10."""
        return tuple(sorted(self.certificate.layers, key=lambda layer: _natural(layer.name)))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The layers by block."""
        return _grouped((block_of(layer.name), layer) for layer in self.layers)

    @property
    def services(self) -> tuple[Service, ...]:
        """What the operators dispatched to, the most used first."""
        served = Counter((layer.operator, layer.kernel) for layer in self.layers if layer.operator)
        declined = {
            key: Counter(r for layer in self.layers if (layer.operator, layer.kernel) == key for r in layer.declined)
            for key in served
        }
        return tuple(Service(*key, count, declined[key]) for key, count in served.most_common())

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Rewrites that were declined, by rule and reason."""
        places: dict[tuple[str, str], list[str]] = defaultdict(list)
        for entry in self.log:
            if not entry.applied:
                places[entry.rule, entry.reason].append(entry.where)
        return tuple(Refusal(*key, tuple(where)) for key, where in sorted(places.items()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width, narrow = options.max_width, options.max_width < NARROW
        yield self._summary()
        yield from self._layers(width)
        if self.services:
            yield self._services()
        if self.measured.get("latency"):
            yield self._latency(narrow)
        if self.refusals:
            yield self._refusals()

    def _summary(self) -> Table:
        c = self.certificate
        ratio = c.bytes_after / max(c.bytes_before, 1)
        table = _table(str(self.recipe.get("name") or "Certificate"), show_header=False)
        table.add_row("tensors", f"{size(c.bytes_before)} -> {size(c.bytes_after)} ({ratio:.3f} of the bytes)")
        if c.sparse:
            table.add_row("zeros", zeros(c))
            table.add_row("stored", stored(c))
        table.add_row("output error", differences(c.output_error))
        table.add_row("lowering error", f"{c.lowering_error:.2e} relative, largest of a layer")
        if c.code_mismatch is not None:
            table.add_row("codes unlike training's", f"{c.code_mismatch:.2%}")
        table.add_row("simulated nodes", str(c.simulated))
        table.add_row("graph breaks", str(c.graph_breaks))
        table.add_row("checked on", c.inputs)
        if "training" in self.measured:
            table.add_row("training", trained(self.measured["training"]))
        if "disk" in self.measured:
            table.add_row("on disk", str(self.measured["disk"]))
        return table

    def _layers(self, width: int) -> Iterator[Table]:
        narrow = width < NARROW
        changed, title = [layer for layer in self.layers if layer.operator or is_quantized(layer)], "Quantised layers"
        if not changed:
            changed = [layer for layer in self.layers if layer.bytes_after != layer.bytes_before]
            title = "Pruned tensors"
        if len(changed) <= MOST_ROWS:
            if changed:
                yield _layer_table(title, changed, width)
            return
        blocks = self.blocks
        if len(blocks) > MOST_ROWS:
            blocks = _alike(blocks)
        table = _table("Blocks")
        table.add_column("block", overflow="fold")
        for name in ("tensors", "quantised", "before", "after", "largest error"):
            if not (narrow and name in ("tensors", "before")):
                table.add_column(name, justify="right", no_wrap=True)
        for block in blocks:
            numbers = [str(len(block.layers)), str(len(block.quantized)), size(block.bytes_before)]
            shown = [numbers[1]] if narrow else numbers
            table.add_row(block.name, *shown, size(block.bytes_after), _error(block.error))
        yield table
        worst = sorted((layer for layer in changed if layer.error is not None), key=lambda layer: -(layer.error or 0.0))
        if worst:
            yield _layer_table("Layers with the largest errors", worst[:WORST], width)

    def _services(self) -> Table:
        table = _table("What runs")
        for name in ("operator", "kernel"):
            table.add_column(name, overflow="fold")
        table.add_column("layers", justify="right")
        table.add_column("others declined", overflow="fold")
        for service in self.services:
            why = "; ".join(f"{reason} ({count})" for reason, count in service.declined.items())
            table.add_row(service.operator, service.kernel, str(service.layers), why)
        return table

    def _latency(self, narrow: bool) -> Table:
        table = _table(f"Latency, ms ({self.measured.get('machine', '')})")
        columns = ("batch", "eager p50", "p95", "compressed p50", "p95", "ratio of p50")
        for name in columns:
            if not (narrow and name == "p95"):
                table.add_column(name.removesuffix(" of p50") if narrow else name, justify="right")
        keys = ("eager_p50", "p50") if narrow else ("eager_p50", "eager_p95", "p50", "p95")
        for row in self.measured["latency"]:
            times = [f"{row[key] * 1e3:.2f}" for key in keys]
            table.add_row(str(row["batch"]), *times, f"{row['p50'] / row['eager_p50']:.2f}")
        return table

    def _refusals(self) -> Table:
        table = _table("Declined, and why")
        for name in ("rule", "reason"):
            table.add_column(name, overflow="fold")
        table.add_column("at", overflow="fold")
        for refusal in self.refusals:
            first, more = refusal.places[0], len(refusal.places) - 1
            table.add_row(refusal.rule, refusal.reason, f"{first} and {more} more" if more else first)
        return table


def is_quantized(layer: Layer) -> bool:
    """Whether it is stored under a scheme; others are named by their dtype, or were folded away."""
    return layer.scheme[:1].isdigit()


def block_of(name: str) -> str:
    """The part of a model that a tensor belongs to: up to its first number, or its first name."""
    path = name.split(".")
    numbers = [i for i, part in enumerate(path) if part.isdigit()]
    return ".".join(path[: numbers[0] + 1]) if numbers else path[0]


def spoken(scheme: str) -> str:
    """A stored form in words: "int8 per channel", "ternary in groups of 64"; a dtype stays as it is."""
    if not scheme[:1].isdigit():
        return scheme
    s = Scheme.parse(scheme)
    kind = {"symmetric": f"int{s.bits}", "asymmetric": f"uint{s.bits}"}.get(s.kind, str(s.kind))
    if s.group_size is None:
        return f"{kind} per {s.granularity}"
    return f"{kind} in groups of {s.group_size}{' channels' if s.granularity == 'rows' else ''}"


def size(count: int) -> str:
    """Bytes in decimal units, three digits: "90.9 MB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.{0 if value >= 99.95 else 1}f} {unit}"


def zeros(certificate: Certificate) -> str:
    """How many zeros there are in pruned weights, by pattern, and what they are good for, in one line."""
    found: dict[str, list[Zeros]] = defaultdict(list)
    for layer in certificate.sparse:
        if layer.zeros is not None:
            found[layer.zeros.pattern].append(layer.zeros)
    parts = []
    for pattern, own in found.items():
        count, total = sum(item.zeros for item in own), sum(item.total for item in own)
        weights = f"{len(own)} weight{'' if len(own) == 1 else 's'}"
        parts.append(f"{count:,} of {total:,} numbers in {weights} ({pattern}, {count / max(total, 1):.1%})")
    return f"{'; '.join(parts)}. In memory they take the room of other numbers, and they make nothing faster here"


def stored(certificate: Certificate) -> str:
    """What leaving zeros out comes to in a saved model, in one line."""
    now, whole = certificate.bytes_stored, certificate.bytes_after
    if now == whole:
        return f"{size(now)} of tensors in a saved model: compressed, these zeros would take no less"
    return f"{size(now)} of tensors in a saved model, where zeros are left out; {size(whole)} in memory"


def trained(training: Mapping[str, Any]) -> str:
    """What was done in training, in one line."""
    first, last = training["bits"]
    parts = [f"{training['steps']:,} steps" + (f", {first:.4g} -> {last:.4g} bits on average" if last else "")]
    parts += [f"{now:,} of {total:,} {what} stay" for what, now, total in training.get("kept", ())]
    losses = [loss for _, loss, _ in training["curve"] if loss is not None]
    if losses:
        parts.append(f"loss {losses[0]:.4g} -> {losses[-1]:.4g}")
    if training["curvature"] is not None:
        parts.append(f"curvature {training['curvature']['cost']}")
    return "; ".join(parts)


def differences(error: Mapping[str, float | None]) -> str:
    """An output error in one line."""
    sqnr = error.get("sqnr")
    shown = "exact" if sqnr is None else f"SQNR {sqnr:.1f} dB"
    return f"{shown}, relative {error.get('relative') or 0.0:.2e}, cosine {error.get('cosine') or 0.0:.5f}"


def dumps(report: Report) -> str:
    """The report as JSON text."""
    return json.dumps(report.to_json(), indent=1, default=str)


def _grouped(named: Iterable[tuple[str, Layer]]) -> tuple[Block, ...]:
    groups: dict[str, list[Layer]] = defaultdict(list)
    for name, layer in named:
        groups[name].append(layer)
    return tuple(Block(name, tuple(layers)) for name, layers in groups.items())


def _alike(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Numbered blocks of one parent as one: `encoder.layer.0-11`."""
    families: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        parent, _, leaf = block.name.rpartition(".")
        families[parent if leaf.isdigit() else block.name].append(block)
    merged = []
    for parent, members in families.items():
        name = members[0].name
        if len(members) > 1:
            ends = [member.name.rpartition(".")[2] for member in (members[0], members[-1])]
            name = f"{parent}.{ends[0]}-{ends[1]}".lstrip(".")
        merged.append(Block(name, tuple(layer for member in members for layer in member.layers)))
    return tuple(merged)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _layer_table(title: str, layers: Iterable[Layer], width: int) -> Table:
    table = _table(title)
    table.add_column("layer", overflow="fold")
    if width >= NARROW:
        table.add_column("stored as", no_wrap=True)
    if width >= WIDE:
        table.add_column("kernel", overflow="fold")
        table.add_column("before", justify="right", no_wrap=True)
    for name in ("after", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in layers:
        cells = [layer.name.removesuffix(".weight")]
        cells += [spoken(layer.scheme)] if width >= NARROW else []
        cells += [layer.kernel, size(layer.bytes_before)] if width >= WIDE else []
        table.add_row(*cells, size(layer.bytes_after), _error(layer.error))
    return table


def _table(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=Text(title), title_justify="left", title_style="bold", show_header=show_header, box=box.SIMPLE_HEAD
    )


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.3g}"
