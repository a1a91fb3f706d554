"""A student inside transformers' training loop.

    Trainer(model=student, callbacks=[TrainerCallback(student)], ...)

It follows the optimizer, so accumulated micro-batches and steps that a GradScaler skips do not count, tells before
the first step what the schedule will do, and logs the average bits. transformers is imported when one is made.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from ..runtime.errors import MissingDependencyError
from .student import Student

BITS = "average_bits"


class ScheduleWarning(UserWarning):
    """A schedule that does not end within the run."""


class _Follower:
    """What every loop needs: begin before the first step, end after the last."""

    def __init__(self, student: Student) -> None:
        self.student = student
        self._stop: Callable[[], None] | None = None

    def begin(self, optimizer: Any, total_steps: int | None, *, quiet: bool) -> None:
        """Follow the optimizer below whatever wraps it; show what is ahead."""
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # accelerate's wrapper
        self.end()
        self._stop = self.student.follow(optimizer)
        if total_steps is None or total_steps <= 0 or not self.student.course.weights:
            return
        ahead = self.student.forecast(total_steps)
        if not quiet:
            Console(stderr=True).print(ahead)
        if ahead.late:
            last = max(path.last for path in ahead.late)
            warnings.warn(
                f"the schedule ends after {last} steps and the run after {total_steps}; finish() will want early=True",
                ScheduleWarning,
                stacklevel=2,
            )

    def end(self) -> None:
        """Leave the optimizer alone again."""
        if self._stop is not None:
            self._stop()
            self._stop = None


def TrainerCallback(student: Student) -> Any:  # stands for the class that transformers has
    """A transformers TrainerCallback that steps `student`. Raises MissingDependencyError without transformers."""
    try:
        base = importlib.import_module("transformers").TrainerCallback
    except ImportError as error:
        raise MissingDependencyError("transformers", "hf", "following its Trainer") from error
    follower = _Follower(student)

    class Callback(base):  # type: ignore[misc, valid-type]  # known only now
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            quiet = not state.is_world_process_zero or args.disable_tqdm
            follower.begin(kwargs["optimizer"], state.max_steps, quiet=quiet)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if student.course.weights:
                bits = {BITS: round(student.course.average_bits(), 4)}
                state.log_history[-1].update(bits)
                if logs is not None:
                    logs.update(bits)  # for the callbacks after this one

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            follower.end()

    Callback.__name__ = "DwindleCallback"
    return Callback()
