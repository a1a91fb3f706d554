"""Which values of a student are compared with which of its teacher: rows, layers and modules brought together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..passes.depth import Block, Row, spread_over
from ..passes.taps import Tap, attentions, rows_of
from ..runtime.errors import DistillationError
from ..runtime.plan import Plan
from ..runtime.program import Program
from .distill_settings import DistillSettings, HiddenSettings, Loss, ScoreSettings


@dataclass(frozen=True)
class Pair:
    """A value of the student and the one of the teacher that it is to become.

    part: whose weight it has; decodes: it lies in the decoder of a model that has an encoder as well
    """

    part: str
    student: Tap
    teacher: Tap
    loss: Loss = "mse"
    weight: float = 1.0
    decodes: bool = False


def pairs_of(settings: DistillSettings, student: Program, plan: Plan, teacher: Program) -> list[Pair]:
    """What is compared within. Raises DistillationError for rows, layers and modules that are not there."""
    pairs: list[Pair] = []
    gone = [edit.path for edit in plan.drops]
    several = len(rows_of(student, gone)) > 1
    for part, wanted in (("hidden", settings.hidden), ("scores", settings.scores)):
        if wanted is not None:
            for mine, its in _rows(student, gone, teacher, wanted.row):
                found = _along(part, wanted, mine, its, _layers(mine, gone, its, wanted.layers))
                decodes = several and "decoder" in mine.path
                pairs += [replace(pair, decodes=decodes) for pair in found]
    for tap in settings.taps:
        pairs.append(
            Pair("taps", Tap("output", tap.student), Tap("output", tap.teacher or tap.student), tap.loss, tap.weight)
        )
    return pairs


def _along(
    part: str, wanted: HiddenSettings | ScoreSettings, mine: Row, its: Row, blocks: Sequence[tuple[Block, Block]]
) -> Iterator[Pair]:
    if isinstance(wanted, HiddenSettings):
        if wanted.embeddings:
            yield Pair(part, Tap("start", mine.path), Tap("start", its.path), wanted.loss)
        for own, other in blocks:
            yield Pair(part, Tap("end", own.path), Tap("end", other.path), wanted.loss)
        return
    for own, other in blocks:
        for index in range(max(1, len(attentions(own)))):
            yield Pair(part, Tap("scores", own.path, index), Tap("scores", other.path, index))


def _rows(student: Program, gone: Sequence[str], teacher: Program, row: str | None) -> list[tuple[Row, Row]]:
    """Rows of both that belong together: of one path, of one last part of it, or the only ones."""
    mine, its = rows_of(student, gone), rows_of(teacher)
    mine = [r for r in mine if row is None or r.path == row]
    found = []
    for own in mine:
        named = [r for r in its if r.path == own.path]
        ending = [r for r in its if r.path.endswith(f".{own.path}") or own.path.endswith(f".{r.path}")]
        match = named or ending or (its if len(its) == len(mine) == 1 else [])
        if len(match) == 1 and all(len(r.blocks) > 1 or r.blocks[0].instead for r in (own, match[0])):
            found.append((own, match[0]))
    if not its:
        raise DistillationError(
            "the teacher has no blocks to learn from",
            required='repeated blocks, with names such as "encoder.layer.3"',
            found="none in its graph; a model that was saved and loaded keeps no names of modules",
            cure="give the model itself as the teacher, or leave hidden and scores out: logits need no blocks",
        )
    reasons = {block.path: block.reason for r in (*mine, *its) for block in r.blocks if block.reason}
    if not found and reasons:
        raise DistillationError(
            "no blocks of the student can be compared with the teacher's",
            required="blocks that give on what they are given, in the same shape, and are called once",
            found="; ".join(f"{path}: {reason}" for path, reason in list(reasons.items())[:3]),
            cure="leave hidden and scores out: logits need no blocks; or name modules of both: taps: [...]",
        )
    if not found:
        raise DistillationError(
            "no blocks of the student are the teacher's" if row is None else f"the student has no blocks at {row!r}",
            required=f"one of the teacher's rows: {', '.join(map(str, its)) or 'none'}",
            found=", ".join(map(str, rows_of(student, gone))) or "none",
            cure='name modules of both: taps: [{student: "...", teacher: "..."}]',
        )
    return found


def _layers(mine: Row, gone: Sequence[str], its: Row, given: tuple[int, ...] | None) -> list[tuple[Block, Block]]:
    numbers = {block.number: block for block in its.blocks}
    dropped = [path for path in gone if path.rpartition(".")[0] == mine.path]
    if given is not None:
        strange = [n for n in given if n not in numbers]
        if strange or len(given) != len(mine.blocks):
            raise DistillationError(
                f"the teacher's layers for {mine}",
                required=f"{len(mine.blocks)} numbers from {min(numbers)} to {max(numbers)}",
                found=f"{strange[0]}" if strange else f"{len(given)}: {list(given)}",
            )
        return [(own, numbers[n]) for own, n in zip(mine.blocks, given, strict=True)]
    if len(mine.blocks) + len(dropped) == len(its.blocks) and all(b.number in numbers for b in mine.blocks):
        return [(block, numbers[block.number]) for block in mine.blocks]
    if len(mine.blocks) > len(its.blocks):
        raise DistillationError(
            f"the student has more layers than the teacher: {mine}",
            required=f"at most {len(its.blocks)}",
            found=len(mine.blocks),
            cure="say which: hidden: {layers: [...]}",
        )
    even = spread_over(len(its.blocks), len(mine.blocks), "even")
    return [(own, its.blocks[i]) for own, i in zip(mine.blocks, even, strict=True)]
