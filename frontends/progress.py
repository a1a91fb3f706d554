"""What a person sees while waiting: one line a step, on the error stream, so that output can be piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

Advance = Callable[[int, int], None]
"""Called as advance(done, total)."""

T = TypeVar("T")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None or task.total <= 1 else f"{int(task.completed)}/{int(task.total)}")


class Steps:
    """Steps of one command; each stays on screen, with the time it took, when it is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def step(self, name: str) -> Iterator[Advance]:
        """Show `name` as under way; what it yields sets how far it is."""
        task = self._progress.add_task(name, total=None)

        def advance(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        try:
            yield advance
        except BaseException:
            self._progress.update(task, description=f"{name}: stopped")
            self._progress.stop_task(task)
            raise
        total = self._progress.tasks[task].total or 1
        self._progress.update(task, completed=total, total=total)

    def track(self, items: Iterable[T], name: str) -> Iterator[T]:
        """The items, counted as they are taken; begins when the first is asked for."""
        total = len(items) if isinstance(items, Sized) else None
        with self.step(name) as advance:
            for done, item in enumerate(items, 1):
                yield item
                advance(done, total or done + 1)


@contextmanager
def steps(*, quiet: bool = False) -> Iterator[Steps]:
    """Show steps until the block ends; quiet shows none."""
    console = Console(file=sys.stderr)
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        _Count(),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet) as progress:
        yield Steps(progress)


@contextmanager
def delayed(name: str, total: int, *, quiet: bool = False, after: float = 2.0) -> Iterator[Callable[[], None]]:
    """One step of `total` turns, shown once it has taken `after` seconds; call what it yields after each turn."""
    started, done = time.perf_counter(), 0
    with ExitStack() as stack:
        shown: Advance | None = None

        def advance() -> None:
            nonlocal shown, done
            done += 1
            if shown is None and not quiet and time.perf_counter() - started >= after:
                shown = stack.enter_context(stack.enter_context(steps()).step(name))
            if shown is not None:
                shown(done, total)

        yield advance
