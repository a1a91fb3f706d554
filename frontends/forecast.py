"""What a schedule will do in a run of so many steps, before the run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from ..passes.prune.course import PruneCourse
from ..passes.prune.pruning import Pruning
from ..passes.prune.sparsify import SparseCourse
from ..passes.quantize.course import Course
from ..passes.schedule import AT_ONCE, Held
from ..runtime.errors import ScheduleError
from ..runtime.report import Printed

MOST_MOVES = 8  # that a table shows


@dataclass(frozen=True)
class Path:
    """What some weights, or inputs of some, have in common: (step, bits) of each change, their target, and when."""

    weights: tuple[str, ...]
    drops: tuple[tuple[int, int], ...]
    target: int
    last: int

    @property
    def goal(self) -> str:
        """Where it ends."""
        return f"{self.target} bits"

    def __str__(self) -> str:
        return f"{len(self.weights)} weights, such as {self.weights[0]}"


@dataclass(frozen=True)
class Ramped:
    """How one pruning rule comes about: (step, part of what will be cut) of each move, and when the last one is."""

    what: str
    moves: tuple[tuple[int, float], ...]
    last: int

    @property
    def goal(self) -> str:
        """Where it ends."""
        return "its final widths"

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Forecast(Printed):
    """Paths of all weights and prunings in `total_steps` steps. Adaptive schedules are not known beforehand.

    The curvature of MoQ's layers is not known either: paths are those of a factor of 1, the fastest.
    """

    total_steps: int
    paths: tuple[Path, ...]
    ramps: tuple[Ramped, ...] = ()

    @property
    def late(self) -> tuple[Path | Ramped, ...]:
        """What does not end within the run."""
        every: tuple[Path | Ramped, ...] = (*self.paths, *self.ramps)
        return tuple(path for path in every if path.last > self.total_steps)

    def require_end(self) -> None:
        """Raise ScheduleError where a weight or a width does not reach its target within the run."""
        if self.late:
            worst = max(self.late, key=lambda path: path.last)
            raise ScheduleError(
                "the schedule does not end within the run",
                required=f"{worst.goal} after at most {self.total_steps} steps",
                found=f"{worst.goal} after {worst.last} steps for {worst}",
                cure="shorten the period or the length, start with fewer bits, or train longer",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        paths = [{"weights": list(p.weights), "drops": list(p.drops), "last": p.last} for p in self.paths]
        ramps = [{"what": r.what, "moves": [list(move) for move in r.moves], "last": r.last} for r in self.ramps]
        return {"total_steps": self.total_steps, "paths": paths, "ramps": ramps}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.paths:
            table = _table(f"Bits over {self.total_steps} steps", "weights", "bits from step", "target reached")
            for path in self.paths:
                drops = ", ".join(f"{bits} from {step}" for step, bits in path.drops) or "none"
                more = f" and {len(path.weights) - 1} more" if len(path.weights) > 1 else ""
                table.add_row(f"{path.weights[0]}{more}", drops, self._end(path.last))
            yield table
        if self.ramps:
            table = _table(f"Pruning over {self.total_steps} steps", "what", "part of it by step", "done")
            for ramp in self.ramps:
                every = max(1, -(-len(ramp.moves) // MOST_MOVES))
                shown = dict.fromkeys((*ramp.moves[::every], *ramp.moves[-1:]))
                moves = ", ".join(f"{part:.0%} from {step}" for step, part in shown) or "none"
                table.add_row(ramp.what, moves, self._end(ramp.last))
            yield table

    def _end(self, last: int) -> str:
        return f"step {last}" if last <= self.total_steps else f"[bold red]not before {last}[/]"


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def forecast(course: Course, total_steps: int, pruning: Pruning | None = None) -> Forecast:
    """The paths of all weights, alike ones together, and the ramps of what is pruned."""
    groups: dict[tuple[Any, int, bool], list[str]] = defaultdict(list)
    for fqn, pace in course.paces.items():
        bits = course.targets[fqn].bits
        done = pace.weight.settled(course.weights[fqn], bits)
        if not isinstance(pace.weight, Held) or pace.weight.offset > total_steps:
            groups[pace.weight, bits, done].append(fqn)
        if fqn in course.meets and pace.activation != AT_ONCE:
            activation = course.meets[fqn].bits
            done = pace.activation.settled(course.inputs[fqn], activation)
            groups[pace.activation, activation, done].append(f"input of {fqn}")
    paths = [
        Path(
            tuple(names),
            tuple(schedule.drops(bits, total_steps)),
            bits,
            min(course.step, total_steps) if done else schedule.last(bits),
        )
        for (schedule, bits, done), names in groups.items()
    ]
    courses = () if pruning is None else pruning.courses
    ramps = [_ramped(course, i, total_steps) for course in courses for i in range(len(course.rules))]
    return Forecast(total_steps, tuple(paths), tuple(ramps))


def _ramped(course: PruneCourse | SparseCourse, number: int, total_steps: int) -> Ramped:
    ramp, whole = course.rules[number].ramp, course.rules[number].whole
    moves = [(step, ramp.part(step, whole)) for step in range(min(total_steps, ramp.last) + 1) if ramp.moves(step)]
    done = course.step >= ramp.last
    what = course.describe(course.rules[number])  # type: ignore[arg-type]  # a rule of its own
    return Ramped(what, tuple(moves), min(course.step, ramp.last) if done else ramp.last)
