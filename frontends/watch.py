"""What a person sees of a schedule while a model trains: blocks, bits, loss and the next drop, on the error stream.

with student.watch(total_steps):       a table that renews itself, on a terminal
    for batch in loader: ...           elsewhere a line for each drop, so that a log shows them
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..passes.prune.masks import Thinning
from ..passes.quantize.course import Course, Drop
from ..passes.schedule import FULL, Held
from ..runtime.report import block_of, size
from .curvature import CurvatureTable
from .forecast import forecast
from .pacing import Change, Pacer

MOST_ROWS = 16
RENEW_SECONDS = 0.25
AHEAD = 10_000  # steps that are looked ahead where the length of the run is not known


class ScheduleWarning(UserWarning):
    """A schedule that does not end within the run."""


class Watch:
    """Watches a pacer from `with` to its end.

    quiet: shows nothing, and warns all the same; live: renew a table, by itself on a terminal alone
    Warns with a ScheduleWarning where a schedule does not end within `total_steps`.
    """

    def __init__(
        self,
        pacer: Pacer,
        total_steps: int | None = None,
        *,
        quiet: bool = False,
        live: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self.pacer, self.quiet = pacer, quiet or not (pacer.course.weights or pacer.pruning.courses)
        self.total = total_steps if total_steps is not None and total_steps > 0 else None
        self.console = console or Console(file=sys.stderr)
        self._live: Live | None = None
        if not self.quiet and (self.console.is_terminal if live is None else live):
            self._live = Live(console=self.console, auto_refresh=False)
        self._next: dict[Any, tuple[int, int] | None] = {}
        self._bytes, self._renewed, self._measured_at = 0, 0.0, pacer.measured_at

    def __enter__(self) -> Self:
        self._look_ahead()
        self._bytes = self.pacer.nbytes()
        self.pacer.watchers.append(self._after)
        if self._live is not None:
            self._live.start()
            self._renew()
        return self

    def __exit__(self, *_: object) -> None:
        self.pacer.watchers.remove(self._after)
        if self._live is not None:
            self._renew()
            self._live.stop()

    def _look_ahead(self) -> None:
        if self.total is None:
            return
        ahead = forecast(self.pacer.course, self.total, self.pacer.pruning)
        if (ahead.paths or ahead.ramps) and not self.quiet:
            self.console.print(ahead)
        if ahead.late:
            worst = max(ahead.late, key=lambda path: path.last)
            warnings.warn(
                f"the schedule reaches {worst.goal} after {worst.last} steps and the run ends after "
                f"{self.total}; finish() will want early=True",
                ScheduleWarning,
                stacklevel=3,
            )

    def _after(self, changes: Sequence[Change]) -> None:
        if changes:
            self._bytes = self.pacer.nbytes()
        if self.quiet:
            return
        for line in self._lines(changes):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        if self._live is not None and time.monotonic() - self._renewed >= RENEW_SECONDS:
            self._renew()

    def _lines(self, changes: Sequence[Change]) -> Iterator[str]:
        """What happened in this step: a measurement of curvature, drops that are alike together, and cuts."""
        pacer, found = self.pacer, self.pacer.sensitivity
        if found is not None and pacer.measured_at != self._measured_at:
            self._measured_at = pacer.measured_at
            yield f"step {pacer.course.step}: curvature: {CurvatureTable(found, pacer.step_seconds).cost}"
        alike: dict[tuple[int, int, bool], list[Drop]] = defaultdict(list)
        for drop in (change for change in changes if isinstance(change, Drop)):
            alike[drop.before, drop.after, drop.of_input].append(drop)
        loss = pacer.history.loss() if changes else None
        now = f"{pacer.course.average_bits():.4g} bits on average, " if pacer.course.weights else ""
        now += size(self._bytes) + ("" if loss is None else f", loss {loss:.4g}")
        for same in alike.values():
            first, more = same[0], f" and {len(same) - 1} more" if len(same) > 1 else ""
            yield f"{replace(first, fqn=first.fqn + more)} ({now})"
        yield from (f"{change} ({now})" for change in changes if isinstance(change, Thinning))

    def _renew(self) -> None:
        assert self._live is not None
        self._renewed = time.monotonic()
        self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        course, loss = self.pacer.course, self.pacer.history.loss()
        facts = [f"step {course.step}" + (f" of {self.total}" if self.total else "")]
        facts += [f"{course.average_bits():.4g} bits on average"] if course.weights else []
        facts += [f"{now:,} of {all_:,} {what} stay" for what, now, all_ in self.pacer.pruning.staying()]
        facts += [size(self._bytes)]
        facts += [] if loss is None else [f"loss {loss:.4g}"]
        found = self.pacer.sensitivity
        cost = [] if found is None else [f"curvature: {CurvatureTable(found, self.pacer.step_seconds).cost}"]
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("block", "bits", "next drop"):
            table.add_column(name, overflow="fold")
        rows = list(self._rows())
        for row in rows[:MOST_ROWS]:
            table.add_row(*row)
        if len(rows) > MOST_ROWS:
            table.add_row(f"and {len(rows) - MOST_ROWS} more", "", "")
        return Group(*(Text(line) for line in (", ".join(facts), *cost)), *([table] if rows else []))

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        """Neighbouring blocks that are alike share a row."""
        blocks: dict[str, list[str]] = defaultdict(list)
        for fqn in self.pacer.course.weights:
            blocks[block_of(fqn)].append(fqn)
        factors = self.pacer.factors()
        rows: list[tuple[list[str], str, str]] = []
        for name, fqns in blocks.items():
            seen = (_bits(self.pacer.course, fqns), self._next_drop(fqns, factors))
            if rows and rows[-1][1:] == seen:
                rows[-1][0].append(name)
            else:
                rows.append(([name], *seen))
        for names, bits, coming in rows:
            yield names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}", bits, coming

    def _next_drop(self, fqns: Sequence[str], factors: dict[str, int]) -> str:
        """Of the weights together, the first; what a controller decides is not known before."""
        course, controller = self.pacer.course, self.pacer.controller
        if controller is not None and any(isinstance(course.paces[fqn].weight, Held) for fqn in fqns):
            return f"decided at step {course.step + controller.budget.interval - len(controller.losses)}"
        coming = [found for fqn in fqns if (found := self._change(fqn, factors.get(fqn, 1))) is not None]
        if coming:
            step, bits = min(coming)
            return f"step {step}: {bits} bits"
        done = all(course.paces[fqn].weight.settled(course.weights[fqn], course.targets[fqn].bits) for fqn in fqns)
        return "at its target" if done else "not in this run"

    def _change(self, fqn: str, factor: int) -> tuple[int, int] | None:
        """(step, bits) of the next change of one weight within the run, found once for all that are alike."""
        course = self.pacer.course
        pace, target, now = course.paces[fqn].weight, course.targets[fqn].bits, replace(course.weights[fqn], mix=0.0)
        key = (pace, target, now, factor)
        if key not in self._next:
            last = self.total if self.total is not None else course.step + AHEAD
            after, found = now, None
            for step in range(course.step + 1, last + 1):
                after = pace.advance(after, target, step, factor)
                if after.bits != now.bits:
                    found = step, after.bits
                    break
            self._next[key] = found
        return self._next[key]


def _bits(course: Course, fqns: Sequence[str]) -> str:
    found = sorted({course.weights[fqn].bits for fqn in fqns})
    spoken = ["float" if bits == FULL else str(bits) for bits in found]
    return spoken[0] if len(spoken) == 1 else f"{spoken[0]} to {spoken[-1]}"
