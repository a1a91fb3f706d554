"""What a schedule will do in a run of so many steps, before the run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from ..passes.quantize.course import Course
from ..passes.quantize.schedule import AT_ONCE, Held
from ..runtime.errors import ScheduleError
from ..runtime.report import Printed


@dataclass(frozen=True)
class Path:
    """What some weights, or inputs of some, have in common: (step, bits) of each change, their target, and when."""

    weights: tuple[str, ...]
    drops: tuple[tuple[int, int], ...]
    target: int
    last: int


@dataclass(frozen=True)
class Forecast(Printed):
    """Paths of all weights in `total_steps` steps. Adaptive schedules are not known beforehand and left out.

    The curvature of MoQ's layers is not known either: paths are those of a factor of 1, the fastest.
    """

    total_steps: int
    paths: tuple[Path, ...]

    @property
    def late(self) -> tuple[Path, ...]:
        """Paths that do not end within the run."""
        return tuple(path for path in self.paths if path.last > self.total_steps)

    def require_end(self) -> None:
        """Raise ScheduleError where a weight does not reach its target within the run."""
        if self.late:
            worst = max(self.late, key=lambda path: path.last)
            raise ScheduleError(
                "the schedule does not end within the run",
                required=f"{worst.target} bits after at most {self.total_steps} steps",
                found=f"{worst.target} bits after {worst.last} steps for {len(worst.weights)} weights, "
                f"such as {worst.weights[0]}",
                cure="shorten the period or the length, start with fewer bits, or train longer",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        paths = [{"weights": list(p.weights), "drops": list(p.drops), "last": p.last} for p in self.paths]
        return {"total_steps": self.total_steps, "paths": paths}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"Bits over {self.total_steps} steps")
        for name in ("weights", "bits from step", "target reached"):
            table.add_column(name, overflow="fold")
        for path in self.paths:
            drops = ", ".join(f"{bits} from {step}" for step, bits in path.drops) or "none"
            end = f"step {path.last}" if path.last <= self.total_steps else f"[bold red]not before {path.last}[/]"
            more = f" and {len(path.weights) - 1} more" if len(path.weights) > 1 else ""
            table.add_row(f"{path.weights[0]}{more}", drops, end)
        yield table


def forecast(course: Course, total_steps: int) -> Forecast:
    """The paths of all weights, alike ones together."""
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
    return Forecast(total_steps, tuple(paths))
