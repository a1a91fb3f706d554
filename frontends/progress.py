"""What a person sees while waiting: one line a step, on the error stream, so that output can be piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..passes.progress import Advance

T = TypeVar("T")


PATIENCE = 2.0  # seconds of work that nobody needs to be shown


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


# The steps that are on screen: what has steps of its own and runs within them adds to them.
_SHOWN: ContextVar[Steps | None] = ContextVar("shown", default=None)


@contextmanager
def steps(*, quiet: bool = False) -> Iterator[Steps]:
    """Show steps until the block ends; quiet shows none."""
    shown = _SHOWN.get()
    if shown is not None and not quiet:
        yield shown
        return
    console = Console(file=sys.stderr)
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(24),
        _Count(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet) as progress:
        shown = Steps(progress)
        token = None if quiet else _SHOWN.set(shown)
        try:
            yield shown
        finally:
            if token is not None:
                _SHOWN.reset(token)


@contextmanager
def late(name: str, *, quiet: bool = False) -> Iterator[Advance]:
    """A step that is shown once it has taken `PATIENCE` seconds, and until it is done or the block ends."""
    begun = time.monotonic()
    with ExitStack() as open_steps:
        under_way: list[Advance] = []

        def advance(done: int, total: int) -> None:
            if not under_way:
                if quiet or time.monotonic() - begun < PATIENCE:
                    return
                under_way.append(open_steps.enter_context(open_steps.enter_context(steps()).step(name)))
            under_way[0](done, total)
            if done >= total:
                under_way.clear()
                open_steps.close()

        yield advance
