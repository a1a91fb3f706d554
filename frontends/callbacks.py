"""A student inside the training loops of transformers and Lightning.

    Trainer(model=student, callbacks=[TrainerCallback(student)], ...)         transformers
    Trainer(callbacks=[LightningCallback(module.student)]).fit(module, ...)   lightning.pytorch or pytorch_lightning

Both follow the optimizer, so accumulated micro-batches and steps that a GradScaler skips do not count, tell before
the first step what the schedule will do, print each drop of bits, and log the average bits. The library is imported
when one is made.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch

from ..runtime.errors import MissingDependencyError, ScheduleError
from .student import Student
from .watch import Watch

BITS, KEPT = "average_bits", "kept"
LIGHTNING = ("lightning.pytorch", "pytorch_lightning")  # one library under two names, whose classes differ


class _Follower:
    """What every loop needs: begin before the first step, end after the last."""

    def __init__(self, student: Student) -> None:
        self.student = student
        self._open = ExitStack()

    def begin(self, optimizer: torch.optim.Optimizer, total_steps: int | None, *, quiet: bool) -> None:
        """Follow the optimizer; show what is ahead, and then each drop as a line below the loop's own bar."""
        self.end()
        self._open.callback(self.student.follow(optimizer))
        self._open.enter_context(Watch(self.student.pacer, total_steps, quiet=quiet, live=False))

    def end(self) -> None:
        """Leave the optimizer alone again."""
        self._open.close()

    def facts(self) -> dict[str, float]:
        """What to log: bits on average, and what part stays of what is pruned."""
        course, staying = self.student.course, self.student.pacer.pruning.staying()
        bits = {BITS: round(course.average_bits(), 4)} if course.weights else {}
        total = sum(of for _, _, of in staying)
        return bits | ({KEPT: round(sum(now for _, now, _ in staying) / total, 4)} if total else {})


def TrainerCallback(student: Student) -> Any:  # stands for the class that transformers has
    """A transformers TrainerCallback that steps `student`. Raises MissingDependencyError without transformers.

    From here on the student's state_dict has a copy for each name of a tied tensor: Trainer saves the state of what is
    no PreTrainedModel by safetensors' save_file, which refuses tensors that share memory.
    """
    try:
        base = importlib.import_module("transformers").TrainerCallback
    except ImportError as error:
        raise MissingDependencyError("transformers", "hf", "following its Trainer") from error
    student.register_state_dict_post_hook(_unshare)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    follower = _Follower(student)

    class Callback(base):  # type: ignore[misc, valid-type]  # known only now
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            quiet = not state.is_world_process_zero or args.disable_tqdm
            follower.begin(kwargs["optimizer"], state.max_steps, quiet=quiet)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            state.log_history[-1].update(follower.facts())
            if logs is not None:
                logs.update(follower.facts())  # for the callbacks after this one

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            follower.end()

    Callback.__name__ = "DwindleCallback"
    return Callback()


def LightningCallback(student: Student) -> Any:  # stands for the class that Lightning has
    """A Lightning Callback that steps `student`, a part of the module that is trained.

    It is of the library that is imported already, under either of its names; either one's Trainer takes it.
    Raises MissingDependencyError without Lightning; in training ScheduleError where no optimizer has the student's
    parameters.
    """
    base, follower = _lightning().Callback, _Follower(student)

    class Callback(base):  # type: ignore[misc, valid-type]  # known only now
        def on_train_start(self, trainer: Any, module: Any) -> None:
            total = trainer.estimated_stepping_batches
            quiet = not trainer.is_global_zero or trainer.progress_bar_callback is None
            steps = int(total) if total != float("inf") and total > 0 else None
            follower.begin(_optimizer_of(student, trainer.optimizers), steps, quiet=quiet)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            module.log_dict(follower.facts())

        def on_train_end(self, trainer: Any, module: Any) -> None:
            follower.end()

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            follower.end()

    Callback.__name__ = "DwindleCallback"
    return Callback()


def _unshare(student: Student, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    seen = set()
    for name, value in state.items():
        if name.startswith(prefix) and value.numel():
            place = value.untyped_storage().data_ptr()
            state[name] = value.clone() if place in seen else value
            seen.add(place)


def _lightning() -> Any:
    names = sorted(LIGHTNING, key=lambda name: name not in sys.modules)
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return importlib.import_module(name)
    raise MissingDependencyError("lightning", "lightning", "following its Trainer")


def _optimizer_of(student: Student, optimizers: Iterable[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    own, found = {id(p) for p in student.parameters()}, list(optimizers)
    for optimizer in found:
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    raise ScheduleError(
        "no optimizer trains the student",
        required="one that has parameters of the student",
        found=f"{len(found)} without any",
        cure="give student.parameters() to the optimizer of configure_optimizers",
    )
