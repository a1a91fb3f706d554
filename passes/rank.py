"""The order in which the blocks of a row matter least, by what calibration data says.

By influence (see `influence`) blocks are ordered after one forward a batch; by what the model gives without each of
them (see `change`) after one, and what follows each block. Greedily the block goes without which least has changed from
the whole model, given those that are gone, and what is left is measured anew. Of equals the later goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.errors import CalibrationError, RecipeError
from ..runtime.plan import DropBlock
from ..runtime.program import Program
from .change import Change, Sums
from .depth import Block, By, Measure, drop_blocks, find_rows
from .influence import influences
from .outputs import leave_out, left_out
from .progress import Advance, no_progress
from .stream import Batch, Stream
from .tail import Tail


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One block. influence, change: without it alone, None where not measured; reason: why it cannot go, or empty"""

    number: int
    path: str
    kind: str
    reason: str
    influence: float | None = None
    change: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The blocks of one row. order: numbers of those that can go, the least important first

    changes: where the order is greedy, without the first of them, the first two and so on
    """

    row: str
    by: By
    measure: Measure
    blocks: tuple[Ranked, ...]
    order: tuple[int, ...]
    changes: tuple[float, ...] = ()

    def keep(self, k: int) -> tuple[int, ...]:
        """The numbers of the k blocks that stay. Raises RecipeError where so many cannot go, or were not ranked."""
        n = len(self.blocks)
        if not 0 < k <= n:
            raise RecipeError(f"a depth of {self.row} of {n}", required=f"1 to {n} layers", found=k)
        if n - k > len(self.order):
            fixed = [f"{block.path}: {block.reason}" for block in self.blocks if block.reason]
            ended = "" if len(fixed) + len(self.order) == n else f"a search that ended at {n - len(self.order)}"
            raise RecipeError(
                f"{n - k} layers of {self.row} are to go",
                required=f"at most {len(self.order)}",
                found=ended or "; ".join(fixed),
                cure="search further" if ended else "keep more layers",
            )
        return self._without(n - k)

    def within(self, max_change: float) -> tuple[int, ...]:
        """The numbers that stay when blocks go, one by one, until the next would change more than that.

        Raises RecipeError for an order that is not greedy: what several blocks change together was not measured.
        """
        if self.by != "greedy":
            raise RecipeError("layers within a change", required="an order by 'greedy'", found=repr(self.by))
        return self._without(next((i for i, c in enumerate(self.changes) if not c <= max_change), len(self.changes)))

    def _without(self, count: int) -> tuple[int, ...]:
        gone = set(self.order[:count])
        return tuple(block.number for block in self.blocks if block.number not in gone)

    def said(self, number: int) -> str:
        """What the order goes by, for one block that goes."""
        block = next(block for block in self.blocks if block.number == number)
        if self.by == "influence":
            return f"influence {block.influence:.3g}"
        if self.by == "change":
            return f"{self.measure} changes by {block.change:.3g} without it"
        place = self.order.index(number)
        beside = "" if not place else f" and {place} more"
        return f"{self.measure} changes by {self.changes[place]:.3g} without it{beside}"


def rank(
    program: Program,
    path: str,
    batches: Sequence[Batch],
    *,
    by: By,
    measure: Measure = "output",
    keep: int = 1,
    max_change: float | None = None,
    gone: Sequence[DropBlock] = (),
    advance: Advance = no_progress,
) -> Ranking:
    """Rank the blocks of the row of that path on batches of flat inputs; nothing is changed.

    keep, max_change: where a greedy search ends; gone: blocks of other rows that are out already
    Raises CalibrationError for no batch, for values that are not finite, and for an output without such a measure;
    RecipeError where the row went with a block.
    """
    if not batches:
        raise CalibrationError("layers are ranked by data", required="at least one batch", found="none")
    whole = _without_lists(program)
    program = drop_blocks(whole.copy(), gone) if gone else whole
    row = next((row for row in find_rows(program, shared=True) if row.path == path), None)
    if row is None:
        raise RecipeError("a row that is gone", required="rows that lie in no block that goes", found=path)
    blocks = [block for block in row.blocks if not block.reason]
    change = None if by == "influence" else Change(whole, measure)
    ends = max(len(row.blocks) - keep, 0) if by == "greedy" else 1 if by == "change" else 0
    bar = _Bar(advance, len(batches) * (1 + sum(len(blocks) - i for i in range(min(ends, len(blocks))))))
    influence = influences(program, blocks, batches, bar.step)
    alone: dict[int, float] = {}
    taken: list[tuple[int, float]] = []
    while change is not None and blocks and len(taken) < ends:
        found = changes(program, blocks, batches, change, whole, bar.step)
        alone = alone or found
        if by == "change":
            break
        number = least(found)[0]
        if max_change is not None and not found[number] <= max_change:
            break
        taken.append((number, found[number]))
        program = drop_blocks(program.copy(), [DropBlock(path=next(b.path for b in blocks if b.number == number))])
        left = {block.number for block in blocks} - {number}
        rows = find_rows(program)  # one block alone is none
        blocks = [b for row in rows if row.path == path for b in row.blocks if b.number in left and not b.reason]
    bar.end()
    order = {"influence": least(influence), "change": least(alone), "greedy": [number for number, _ in taken]}[by]
    return Ranking(
        row=path,
        by=by,
        measure=measure,
        blocks=tuple(
            Ranked(
                number=block.number,
                path=block.path,
                kind=block.kind.rpartition(".")[2],
                reason=block.reason,
                influence=influence.get(block.number),
                change=alone.get(block.number),
            )
            for block in row.blocks
        ),
        order=tuple(order),
        changes=tuple(value for _, value in taken),
    )


def least(values: dict[int, float]) -> list[int]:
    """Numbers of blocks, that of the least value first, of equals the later one."""
    return sorted(values, key=lambda number: (values[number], -number))


def _without_lists(program: Program) -> Program:
    """A copy without the lists in the output that have an entry for each block: fewer blocks have shorter ones."""
    plain = program.copy()
    places = {place for row in find_rows(plain) for entries in row.lists for place in entries}
    if places:
        leave_out(plain, places)
        left_out(plain)
        plain.tidy()
    return plain


class _Bar:
    """Counts steps of a total that may be more than are needed."""

    def __init__(self, advance: Advance, total: int) -> None:
        self._advance, self._total, self._done = advance, total, 0

    def step(self) -> None:
        self._done += 1
        self._advance(self._done, self._total)

    def end(self) -> None:
        if self._done < self._total:
            self._advance(self._total, self._total)


def changes(
    program: Program,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    change: Change,
    reference: Program,
    step: Callable[[], None],
) -> dict[int, float]:
    """By number of each block: what changes without it from what `reference` gives."""
    wanted, nodes = change.wanted(program), list(program.graph.nodes)
    tails = sorted((Tail(program, block, wanted) for block in blocks), key=lambda tail: tail.start)
    ends = {node: i for i, tail in enumerate(tails) for node in tail.cut}  # the last tail that reads it
    sums: dict[int, list[Sums]] = {block.number: [] for block in blocks}
    for batch in batches:
        with torch.random.fork_rng(devices=[]), Stream(program, [batch]) as stream:
            before = _run(reference, batch, change)
            for node in ends:
                stream.keep(node)
            for i, tail in enumerate(tails):
                if tail.cut:
                    stream.advance(nodes[tail.start - 1])
                torch.manual_seed(0)  # as for `before`
                after = tail.run(batch, {node: stream.values(node)[0] for node in tail.cut})
                sums[tail.block.number].append(change.sums(batch, before, after))
                for node in [node for node in tail.cut if ends[node] == i]:
                    stream.drop(node)
                step()
    return {number: change.of(found) for number, found in sums.items()}


def _run(program: Program, batch: Batch, change: Change) -> list[Tensor]:
    torch.manual_seed(0)
    with program.unwritten():
        outputs = program.run([t.clone() for t in batch])
    return [outputs[place] for place in change.places]
