"""How a pass that takes long says how far it is, to whom it does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int, int], None]
"""Called as advance(done, total)."""

Show = Callable[[str], AbstractContextManager[Advance]]
"""`with show("Ranking layers") as advance: ...`"""


def no_progress(done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def no_steps(name: str) -> Iterator[Advance]:
    """A `Show` that shows nothing."""
    yield no_progress
