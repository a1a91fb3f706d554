"""What a recipe would do to a model, without doing it: the sites it selects, and the bytes they would take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from ..passes.driver import Driver
from ..passes.pipeline import PREPARE, Job, run_stages
from ..passes.quantize.sites import Site, find_sites
from ..runtime import numerics
from ..runtime.layout import pack
from ..runtime.plan import Quantize
from ..runtime.program import Entry
from ..runtime.report import MOST_ROWS, WIDE, block_of, size, spoken
from ..runtime.scheme import Scheme
from ..runtime.store import Store
from .capture import capture
from .inputs import as_arguments
from .recipe import Recipe, RecipeSource


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stored weight at one kind of call. scheme: None where the recipe leaves it; reason: why, where it cannot."""

    name: str
    operator: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    scheme: str | None
    activation: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Survey:
    """All sites of a model under one recipe, and what the model holds besides."""

    recipe: str
    rows: tuple[Row, ...]
    parameters: int
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield (
            _table("Sites", self.rows, options.max_width >= WIDE)
            if len(self.rows) <= MOST_ROWS
            else _by_block(self.rows)
        )
        refused = [row for row in self.rows if row.reason]
        if refused:
            table = Table("layer", "reason", box=box.SIMPLE_HEAD, title="Left as they are", **_TITLE)
            for row in refused:
                table.add_row(row.name, row.reason)
            yield table
        ratio = self.bytes_after / max(self.bytes_before, 1)
        chosen = sum(row.scheme is not None for row in self.rows)
        yield (
            f"{self.parameters:,} parameters, {size(self.bytes_before)}. "
            f"{self.recipe or 'The recipe'} quantises {chosen} of {len(self.rows)} sites: "
            f"{size(self.bytes_after)}, {ratio:.3f} of the bytes."
        )


_TITLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}


def survey(model: nn.Module, recipe: RecipeSource, inputs: Any = None) -> Survey:
    """Capture `model` and decide as `compress` does; nothing is calibrated, packed or written."""
    recipe = Recipe.of(recipe)
    arguments = as_arguments(model, inputs)
    driver = Driver(capture(model, arguments, Store.of(model)), None)
    names = [stage.name for stage in PREPARE]
    job = Job(rules=recipe.rules())
    program = run_stages(driver, PREPARE[: names.index("decide") + 1], job)
    refused = {e.where: e for e in program.log if e.stage == "decide" and not e.applied}
    rows: dict[tuple[str, str], Row] = {}
    for site in find_sites(program):
        weight = program.store.get(site.fqn)
        assert isinstance(weight, Tensor)
        edit = job.plan.quantize(site.fqn, site.operator) if job.plan is not None else None
        rows.setdefault((site.fqn, site.operator), _row(site, weight, edit, refused.get(site.fqn)))
    saved = {row.name: row.bytes_before - row.bytes_after for row in rows.values()}
    stored = list({id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    before = sum(t.numel() * t.element_size() for t in stored)
    return Survey(
        recipe=recipe.name,
        rows=tuple(rows.values()),
        parameters=sum(p.numel() for p in model.parameters()),
        bytes_before=before,
        bytes_after=before - sum(saved.values()),
    )


def _row(site: Site, weight: Tensor, edit: Quantize | None, refused: Entry | None) -> Row:
    shape = tuple(weight.shape[::-1]) if site.transposed else tuple(weight.shape)
    before = weight.numel() * weight.element_size()
    return Row(
        name=site.fqn,
        operator=site.operator,
        shape=shape,
        bytes_before=before,
        bytes_after=before if edit is None else _packed_bytes(shape, edit.weight),
        scheme=None if edit is None else edit.weight.spell(),
        activation=None if edit is None or edit.activation is None else edit.activation.spell(),
        reason="" if refused is None else refused.reason,
    )


def _packed_bytes(shape: tuple[int, ...], scheme: Scheme) -> int:
    """Codes, scales and zero points of a tensor of that shape; nothing is allocated."""
    unpacked = torch.empty((shape[0], math.prod(shape[1:])), dtype=scheme.code_dtype, device="meta")
    codes = pack(unpacked, scheme)
    scales = math.prod(numerics.scale_shape(shape, scheme)) * (2 if scheme.kind == "asymmetric" else 1)
    return codes.numel() * codes.element_size() + 4 * scales


def _table(title: str, rows: Sequence[Row], wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, **_TITLE)
    for name in ("layer", "operator", "shape", "activation") if wide else ("layer",):
        table.add_column(name, overflow="fold")
    table.add_column("weight", no_wrap=True)
    for name in ("before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shape, activation = " x ".join(map(str, row.shape)), spoken(row.activation) if row.activation else ""
        more = [row.operator, shape, activation] if wide else []
        weight = spoken(row.scheme) if row.scheme else "as it is"
        name = row.name.removesuffix(".weight")
        table.add_row(name, *more, weight, size(row.bytes_before), size(row.bytes_after))
    return table


def _by_block(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Sites by block", **_TITLE)
    table.add_column("block", overflow="fold")
    table.add_column("weights as", overflow="fold")
    for name in ("sites", "quantised", "before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(block_of(row.name), []).append(row)
    for name, members in blocks.items():
        schemes = sorted({spoken(row.scheme) for row in members if row.scheme})
        chosen = sum(row.scheme is not None for row in members)
        sizes = (size(sum(r.bytes_before for r in members)), size(sum(r.bytes_after for r in members)))
        table.add_row(name, ", ".join(schemes), str(len(members)), str(chosen), *sizes)
    return table
