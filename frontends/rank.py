"""rank_layers: which layers of a model matter least, by what calibration data says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, get_args

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from ..passes.canonicalize import canonicalize
from ..passes.choose_layers import row_of
from ..passes.depth import By, Measure, Row, find_rows
from ..passes.rank import Ranked, Ranking, rank
from ..runtime.contract import Signature
from ..runtime.errors import CalibrationError, RecipeError, nearest
from ..runtime.own_state import own_state
from ..runtime.report import Printed
from ..runtime.store import Store
from .assemble import require_original
from .capture import DynamicShapes, capture
from .inputs import as_arguments, flat_batches, refuse_one_batch
from .progress import late

SPOKEN = {
    "output": "relative change of the output",
    "logits": "divergence of the logits",
    "loss": "growth of the loss",
}


@dataclass(frozen=True)
class LayerRanking(Printed):
    """The layers of each row of blocks, ranked: `print()` shows them, `order` and `keep(k)` give their numbers.

    Where a model has several rows, `ranking["encoder.block"]` is that of one.
    """

    rows: tuple[Ranking, ...]

    def __getitem__(self, row: str) -> Ranking:
        """The ranking of one row. Raises RecipeError for one that there is not."""
        found = next((ranking for ranking in self.rows if ranking.row == row), None)
        if found is None:
            raise RecipeError("a row that was not ranked", required=self._names(), found=row)
        return found

    @property
    def order(self) -> tuple[int, ...]:
        """The numbers of the layers that can go, the least important first."""
        return self._only.order

    def keep(self, k: int) -> tuple[int, ...]:
        """The numbers of the k layers to keep, for keep_layers. Raises RecipeError where that cannot be."""
        return self._only.keep(k)

    def within(self, max_change: float) -> tuple[int, ...]:
        """The numbers to keep so that, going one by one, no step changes more; of a greedy ranking."""
        return self._only.within(max_change)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"rows": [asdict(ranking) for ranking in self.rows]}

    @property
    def _only(self) -> Ranking:
        if len(self.rows) != 1:
            raise RecipeError(
                "several rows of blocks were ranked",
                required="ranking[row] for one of them, or rank_layers(..., row=)",
                found=self._names(),
            )
        return self.rows[0]

    def _names(self) -> str:
        return ", ".join(repr(ranking.row) for ranking in self.rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for ranking in self.rows:
            yield Text(f"Layers of {ranking.row or 'the model'} by {ranking.by}", style="bold")
            yield _table(ranking)
            if ranking.by != "influence":
                yield f"alone: {SPOKEN[ranking.measure]} without this layer"
            for block in ranking.blocks:
                if block.reason:
                    yield f"{block.path} stays: {block.reason}"


def rank_layers(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    inputs: Any = None,
    row: str | None = None,
    by: By = "influence",
    measure: Measure = "output",
    keep: int = 1,
    max_change: float | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    quiet: bool = False,
) -> LayerRanking:
    """Rank the layers of `model` by what `data` says, the least important first; nothing is changed.

    data: batches as for `compress`; inputs: one such, the first of data where absent
    row: the path of the blocks, such as "encoder.layer"; where absent all rows but those within layers that can go
    by: "influence", 1 less the cosine of what goes into a layer and what comes out, over tokens: one forward a batch;
        "change" of what the model gives without each layer; "greedy", one by one, each given those that are gone
    measure: of a change: "output" (relative L2 over all outputs), "logits" (KL divergence), "loss" (with labels)
    keep, max_change: a greedy search ends with so many layers, or where any further would change more; both are asked
        of the result as well, so a search to the end answers all: `ranking.keep(6)`, `ranking.within(0.1)`
    quiet: shows no progress

    Raises CalibrationError where data is missing or says nothing, RecipeError for a row that is not there, and
    CaptureError.
    """
    require_original(model)
    _require_sense(by, measure, keep, max_change)
    if data is not None:
        refuse_one_batch(data)
    batches = None if data is None else list(data)
    if not batches:
        raise CalibrationError(
            "layers are ranked by data",
            required="data=[batch, ...]",
            found="none" if batches is None else "no batch",
            cure="give data=, on the shell --data: a few batches such as the model will meet",
        )
    arguments = as_arguments(model, batches[0] if inputs is None else inputs)
    with own_state():
        program = canonicalize(capture(model, arguments, Store.borrowing(model), dynamic_shapes=dynamic_shapes))
        program.tidy()
        flat = list(flat_batches(program, Signature.of(model), batches))
        found: list[Ranking] = []
        for path in _paths(find_rows(program, shared=True), row):
            with late(f"Ranking {path or 'layers'}", quiet=quiet) as advance:
                how: dict[str, Any] = {"by": by, "measure": measure, "keep": keep, "max_change": max_change}
                found.append(rank(program, path, flat, **how, advance=advance))
    return LayerRanking(tuple(found))


def _require_sense(by: By, measure: Measure, keep: int, max_change: float | None) -> None:
    for name, known, chosen in (("by", get_args(By), by), ("measure", get_args(Measure), measure)):
        if chosen not in known:
            cure = f"{name}={nearest(str(chosen), known)[0]!r}"
            raise RecipeError(
                f"no such {name} to rank layers", required=" or ".join(known), found=repr(chosen), cure=cure
            )
    if keep < 1 or ((keep > 1 or max_change is not None) and by != "greedy"):
        raise RecipeError(
            "where a ranking ends",
            required="keep >= 1 and max_change with by='greedy'; any other order is of all layers",
            found=f"by={by!r}, keep={keep}, max_change={max_change}",
            cure="take keep(k) of the result",
        )


def _paths(rows: list[Row], path: str | None) -> list[str]:
    """The rows to rank: the one that is named, or those that lie in no block that can go; of rows of which no block
    can go those that lie in no block at all.
    """
    if path is not None or not rows:
        return [row_of(rows, path).path]
    rows = [row for row in rows if len(row.blocks) > 1] or rows
    blocks = [block for row in rows for block in row.blocks]
    free, any_of = (tuple(f"{b.path}." for b in blocks if not b.reason or every) for every in (False, True))
    return [
        row.path
        for row in rows
        if not row.path.startswith(free if any(not block.reason for block in row.blocks) else any_of)
    ]


def _table(ranking: Ranking) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    table.add_column("goes", justify="right")
    table.add_column("influence", justify="right")
    if ranking.by != "influence":
        table.add_column("alone", justify="right")
    if ranking.by == "greedy":
        table.add_column("with those before", justify="right")
    for block in ranking.blocks:
        table.add_row(*_cells(ranking, block))
    return table


def _cells(ranking: Ranking, block: Ranked) -> list[str]:
    place = ranking.order.index(block.number) if block.number in ranking.order else None
    cells = [str(block.number), "" if place is None else str(place + 1), _number(block.influence)]
    if ranking.by != "influence":
        cells.append(_number(block.change))
    if ranking.by == "greedy":
        cells.append("" if place is None else _number(ranking.changes[place]))
    return cells


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
