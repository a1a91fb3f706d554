"""Which blocks stay: rules name them, spread them over a row, or go by what calibration data says."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.errors import CalibrationError, RecipeError
from ..runtime.plan import DropBlock
from ..runtime.program import Entry, Program
from .depth import DepthRule, Row, find_rows, outermost, spread_over
from .progress import Advance, no_progress
from .rank import Ranking, rank
from .stream import Batches

STAGE = "drop"


def drops_of(
    program: Program, rules: Sequence[DepthRule], batches: Batches | None = None, advance: Advance = no_progress
) -> list[DropBlock]:
    """The blocks that go. A rule that measures does so without what the rules before it have dropped.

    batches: of flat inputs. Raises RecipeError for a row that is not there, for layers that it does not have, none or
    all of them, or one twice, and for a block that cannot go; CalibrationError where data is wanted and missing.
    """
    chosen = [row_of(find_rows(program, shared=True), rule.row) for rule in rules]
    paths = [row.path for row in chosen]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise RecipeError("two rules of depth concern one row", required="one rule for each row", found=twice)
    gone: list[DropBlock] = []
    for rule, row in zip(rules, chosen, strict=True):
        stay = _staying(row, rule) if rule.by is None else _measured(program, gone, row, rule, batches, advance)
        if not set(_numbers(row)) - stay:
            raise RecipeError(
                f"a rule of depth keeps all layers of {row}",
                required="fewer layers than there are",
                found=f"{len(stay)} that stay",
                cure="leave the rule out, " + ("or keep fewer" if rule.max_change is None else "or allow more change"),
            )
        for block in (block for block in row.blocks if block.number not in stay):
            if block.reason:
                raise RecipeError(
                    f"block {block.path} cannot be dropped",
                    required="a block that gives on what it is given, in the same shape",
                    found=block.reason,
                    cure="keep it, with keep_layers: [...]",
                )
            gone.append(DropBlock(path=block.path))
    return gone


def row_of(rows: Sequence[Row], path: str | None) -> Row:
    """The row of that path, or the only one that lies in no block of another. Raises RecipeError."""
    outer = outermost(rows)
    named = [row for row in outer if len(row.blocks) > 1] if path is None else [r for r in rows if r.path == path]
    shared = [block for row in outer if row not in named for block in row.blocks if len(row.blocks) == 1]
    if not named and shared:
        raise RecipeError(
            "a rule of depth means no row of blocks",
            required="blocks with weights of their own",
            found=f"one block, {shared[0].path}: {shared[0].reason}",
            cure="build the model with fewer calls of it",
        )
    if len(named) == 1:
        return named[0]
    raise RecipeError(
        "a rule of depth means no row of blocks" if not named else "a rule of depth may mean several rows of blocks",
        required="row: the path of one",
        found=path if not named else ", ".join(map(str, named)),
        cure=f"rows are {', '.join(map(str, rows[:6]))}" if rows else "this model has no blocks that repeat",
    )


def _numbers(row: Row) -> list[int]:
    return [block.number for block in row.blocks]


def _measured(
    program: Program,
    gone: Sequence[DropBlock],
    row: Row,
    rule: DepthRule,
    batches: Batches | None,
    advance: Advance,
) -> set[int]:
    """The numbers that stay by what data says; what went by is written to the log."""
    assert rule.by is not None
    assert isinstance(rule.layers, int)
    if batches is None:
        raise data_is_wanted(rule.by)
    found = rank(
        program,
        row.path,
        list(batches()),
        by=rule.by,
        measure=rule.measure,
        keep=rule.layers,
        max_change=rule.max_change,
        gone=gone,
        advance=advance,
    )
    stay = found.keep(rule.layers) if rule.max_change is None else found.within(rule.max_change)
    _log(program, row, found, set(stay))
    return set(stay)


def data_is_wanted(by: str, given: str = "data=[batch, ...]") -> CalibrationError:
    """For a rule that goes by data, where there is none; `given`: how to give it."""
    return CalibrationError(
        f"the recipe chooses layers by {by}",
        required="calibration data",
        found="none",
        cure=f"give {given}, or choose them by spread: even",
    )


def _log(program: Program, row: Row, found: Ranking, stay: set[int]) -> None:
    for block in row.blocks:
        if block.number not in stay:
            said = found.said(block.number)
            program.log.append(Entry(stage=STAGE, rule=f"drop.{found.by}", where=block.path, reason=said))


def _staying(row: Row, rule: DepthRule) -> set[int]:
    numbers = _numbers(row)
    if isinstance(rule.layers, int):
        kinds = sorted({block.kind.rpartition(".")[2] for block in row.blocks})
        if not 0 < rule.layers <= len(numbers):
            raise RecipeError(
                f"a depth of {row}",
                required=f"1 to {len(numbers)} layers",
                found=rule.layers,
                cure="keep fewer; a preset with a depth is for models with more layers",
            )
        if len(kinds) > 1:
            raise RecipeError(
                f"the blocks of {row.path} are not alike", required="keep_layers: [...]", found=", ".join(kinds)
            )
        return {numbers[i] for i in spread_over(len(numbers), rule.layers, rule.spread)}
    strange = sorted(set(rule.layers) - set(numbers))
    twice = sorted({n for n in rule.layers if rule.layers.count(n) > 1})
    if strange or twice or not rule.layers:
        raise RecipeError(
            f"layers of {row}",
            required=f"numbers from {min(numbers)} to {max(numbers)}, each once, and at least one",
            found=f"{strange[0]}" if strange else f"{twice[0]} twice" if twice else "none",
            cure="list the layers that stay, or say how many with keep: ...",
        )
    return set(rule.layers)
