"""prepare: a model that trains with its quantisation simulated, and becomes a finished one.

The student owns clones of the model's tensors under their own names. Its train and eval variants are two graphs
on one store; each computes exactly what the Plan will make of it, with straight-through gradients. What schedules
change lies in buffers, so no step traces anything anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..passes.certify import certify, tensor_sizes
from ..passes.distill import task_loss
from ..passes.driver import Driver
from ..passes.mismatch import code_mismatch
from ..passes.pipeline import Job
from ..passes.prune.sparsify import edits
from ..passes.quantize.course import Course
from ..passes.quantize.live import gauges, load_ranges, require_seen
from ..passes.verify import difference
from ..runtime.compressed import Compressed
from ..runtime.contract import Key
from ..runtime.errors import DistillationError, DwindleError, ScheduleError
from ..runtime.model import GraphModel, flat_outputs
from ..runtime.own_state import own_state
from ..runtime.plan import Plan
from ..runtime.program import Entry, Program
from ..runtime.store import Store
from .assemble import finish, own_dtype, replayed, verification_inputs
from .curvature import CurvatureTable
from .distill_settings import PARTS, DistillSettings
from .distillation import Compared, Distillation
from .forecast import Forecast, forecast
from .inputs import as_arguments
from .layerwise import LayerwiseResult, distill_layers, training_of
from .measure import measure
from .pacing import Change, Closure, Pacer, really_stepped
from .recipe import Recipe
from .settings import LayerwiseSettings
from .tapping import Tapping
from .teacher import Teacher, require_vocabulary
from .watch import Watch

# (the student, training, arguments, plan) -> the variant masked, or with the cuts of a plan made
Recapture = Callable[["Student", bool, Mapping[str, Any], Plan | None], Program]


class Student(Tapping):
    """A model in training: call it as the original; `finish()` gives the Compressed it has become.

    After each optimizer step call `step()`, or once `follow(optimizer)`. `state_dict()` holds the schedules too.
    """

    recipe: Recipe
    example: Mapping[str, Any]
    pacer: Pacer
    _recapture: Recapture
    distillation: Distillation | None = None
    _seen: frozenset[Key] = frozenset()  # variants all of whose static ranges have seen something
    _following: bool = False
    _again: Closure | None = None
    _loss: Tensor | None = None
    _left_out: Mapping[str, int] = MappingProxyType({})  # bytes of the tensors of blocks that were dropped, by name
    _anew = False  # whether a state of the model alone was loaded, and pruning has not begun anew by it

    NOT_COPIED = (*Tapping.NOT_COPIED, "pacer", "distillation", "_following", "_again", "_loss")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_begin_anew)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A student that trains on by itself, from here; it follows no optimizer yet. The teacher is shared."""
        other = super().__deepcopy__(memo)
        other.pacer = self.pacer.on(other.store)
        other.distillation = None if self.distillation is None else replace(self.distillation, store=other.store)
        other.register_load_state_dict_post_hook(_begin_anew)  # type: ignore[no-untyped-call]  # as above
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; another dtype is refused: graphs are captured with those of the model that was given."""
        for dtype in {t.dtype for t in self.parameters() if t.is_floating_point()}:
            found = fn(torch.empty(0, dtype=dtype)).dtype
            if found != dtype:
                raise DwindleError(
                    "a student keeps the dtype of the model that it was made of",
                    required=dtype,
                    found=f"a conversion to {found}",
                    cure="convert the model before prepare(), or train under torch.autocast",
                )
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]  # torch leaves it untyped

    @property
    def course(self) -> Course:
        """Where every weight is on its schedule."""
        return self.pacer.course

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super()._call(args, kwargs)
        if self.training and not torch.compiler.is_compiling():
            self._remember(task_loss(output), lambda: cast(Tensor, task_loss(self._call(args, kwargs))))
        return output

    def _run(self, program: Program, tensors: Sequence[Tensor]) -> Any:
        """Static ranges are observed in training mode; before that there is nothing to quantise by."""
        key = program.contract.key
        if not self.training and key not in self._seen and not torch.compiler.is_compiling():
            require_seen(program, self.plan)
            self._seen |= {key}
        return super()._run(program, tensors)

    def _remember(self, loss: Tensor | None, again: Closure) -> None:
        """The loss of the last batch, and how to compute it once more: what `step` goes by."""
        self._loss, self._again = (None, None) if loss is None else (loss.detach(), again)

    def loss(self, batch: Any, *, model: Callable[..., Any] | None = None) -> Tensor:
        """The loss to minimise: the task's, as the model computes it from labels, and the teacher's where there is one.

        batch: a dict of the forward's arguments, a tuple of them, or a tensor; the recipe's `distill` weighs the parts
        model: what to call in place of the student: itself wrapped by DistributedDataParallel or torch.compile
        Raises DistillationError where there is neither, or where student and teacher cannot be compared.
        """
        arguments, call = as_arguments(self, batch), self if model is None else model
        if self.distillation is not None:
            found = self.distillation.loss(self, call, arguments, self.pacer.course.step)
        else:
            self._require_taught()
            own = task_loss(call(**arguments))
            if own is None:
                raise DistillationError(
                    "the batch gives no loss",
                    required="labels in the batch of a model that computes its loss, or a teacher",
                    found=", ".join(arguments) or "an empty batch",
                )
            found = own
        if self.training:
            self._remember(found, lambda: self.loss(batch))
        return found

    def _require_taught(self) -> None:
        """A recipe that says what a teacher counts for is not trained without one by mistake."""
        if self.recipe.distill != DistillSettings():
            raise DistillationError(
                "the recipe learns from a teacher",
                required="a teacher, for what its distill says",
                found="none",
                cure="prepare(model, ..., teacher=model), or a recipe without distill",
            )

    def compare(self, batch: Any, *, model: Callable[..., Any] | None = None) -> Compared:
        """Both outputs for a batch and what was seen within: for a loss of one's own in place of `loss`.

        Raises DistillationError without a teacher.
        """
        if self.distillation is None:
            raise DistillationError("the student has no teacher", required="prepare(..., teacher=model)", found="none")
        arguments, weights = as_arguments(self, batch), dict.fromkeys(PARTS, 1.0)
        return self.distillation.compare(self, self if model is None else model, arguments, weights)

    def distill_layers(
        self,
        data: Iterable[Any],
        *,
        steps: int | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        seed: int | None = None,
        teacher: nn.Module | None = None,
        processes: int = 1,
        quiet: bool = False,
    ) -> LayerwiseResult:
        """Train each block by itself to give what the teacher's block gives on the teacher's own activations.

        data: batches as for `inputs`; no labels are needed, and `layerwise.random_tokens` gives some where there are
            none. steps: for each block, over the batches in a drawn order; lr, weight_decay, seed: of AdamW, anew for
            each block. What is not given is the recipe's `layerwise`, or 100 steps at 5e-6
        teacher: in place of prepare's; processes: as many blocks are trained at once, with the same result
        In memory: the teacher, the training state of a block for each process, and for each batch what goes into those
        blocks and comes out. Raises ScheduleError before all schedules are over, DistillationError where the two models
        do not have the same blocks, CalibrationError for batches that do not fit.
        """
        base = (self.recipe.layerwise or LayerwiseSettings()).training()
        training = training_of(base, steps=steps, lr=lr, weight_decay=weight_decay, seed=seed)
        with own_state():
            known = self.distillation.teacher if self.distillation is not None else None
            if teacher is not None:
                require_vocabulary(self, teacher)
            asked = known if teacher is None else Teacher(teacher)
            return distill_layers(self, data, asked, training, processes, quiet)

    def step(self, loss: Tensor | float | None = None, *, closure: Closure | None = None) -> list[Change]:
        """An optimizer step is done: schedules advance. Returns what changed its bits, and what was cut.

        loss: of the batch just trained on, for adaptive schedules; closure: computes it, for curvature. Neither is
        needed where the model's output has a loss.
        Raises ScheduleError where the student follows an optimizer, which calls this itself, or where a schedule
        needs a loss and has none.
        """
        if self._following:
            raise ScheduleError(
                "the student follows an optimizer, so its steps are counted already",
                required="follow(optimizer) or step(), not both",
                found="step()",
            )
        return self._advance(loss, closure)

    def follow(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Count the steps that `optimizer` really takes: not those that a GradScaler skips. Returns how to stop.

        Of an optimizer that another library wraps, the one inside is followed.
        """
        if self._following:
            raise ScheduleError(
                "the student follows an optimizer already, so a step would count twice",
                required="one follow(), or one callback",
                found="a second",
                cure="stop = student.follow(optimizer); stop() before the next",
            )
        while (inner := getattr(optimizer, "optimizer", None)) is not None:
            optimizer = inner

        def count(taken: torch.optim.Optimizer, *_: Any) -> None:
            if really_stepped(taken):
                self._advance()

        handle = optimizer.register_step_post_hook(count)
        self._following = True

        def stop() -> None:
            handle.remove()
            self._following = False

        return stop

    def _advance(self, loss: Tensor | float | None = None, closure: Closure | None = None) -> list[Change]:
        given = loss.detach() if isinstance(loss, Tensor) else loss
        drops = self.pacer.advance(self._loss if given is None else given, closure or self._again)
        self._loss = self._again = None
        return drops

    def forecast(self, total_steps: int) -> Forecast:
        """At which step each weight gets which bits and what is cut, and what is not over after `total_steps`."""
        return forecast(self.course, total_steps, self.pacer.pruning)

    def watch(self, total_steps: int | None = None, *, quiet: bool = False) -> Watch:
        """`with student.watch(344): ...` shows bits, loss and the next drop as the loop goes, and prints each drop.

        Warns before the first step where a schedule does not end within `total_steps`; quiet does that alone.
        """
        return Watch(self.pacer, total_steps, quiet=quiet)

    def sensitivity(self, closure: Closure | None = None) -> CurvatureTable:
        """How much the loss bends in each block, and what finding out took: `print(student.sensitivity())`.

        closure: computes the loss of a batch; of the last batch where the model's output has a loss. Schedules do not
        go by it. Raises ScheduleError with neither, CalibrationError for a loss that has no second derivative.
        """
        return CurvatureTable(self.pacer.curvature(closure or self._again), self.pacer.step_seconds)

    def get_extra_state(self) -> Tensor:
        """Schedules as JSON in a uint8 tensor, which every format of checkpoints takes."""
        return self.pacer.to_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`. Raises ScheduleError for a state of another model, recipe or version."""
        self.pacer.load_tensor(state)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, with the schedule beside it where there is one."""
        state = super().state_dict(*args, **kwargs)
        if not self.pacer.remembers:
            state.pop(f"{kwargs.get('prefix', '')}_extra_state", None)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        plain = self._is_plain(state_dict, prefix)
        if f"{prefix}_extra_state" not in state_dict and (plain or not self.pacer.remembers):
            self._anew = plain
            state_dict[f"{prefix}_extra_state"] = self.get_extra_state()
            own = self.state_dict()
            for name in self._own_names() & own.keys():
                state_dict.setdefault(prefix + name, own[name])
        load_ranges(self.store, self.plan, state_dict, prefix)
        left_out = tuple(f"{prefix}{edit.path}." for edit in self.plan.drops)
        for key in [key for key in state_dict if key.startswith(left_out)]:
            if self.store.get(key[len(prefix) :]) is None:  # of the whole model
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _is_plain(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Whether a state is one of the model alone, from which schedules begin anew."""
        return not any(prefix + name in state_dict for name in self._own_names())

    @own_state()
    def finish(self, *, early: bool = False) -> Compressed:
        """Pack the weights as they are now. The student is unchanged and shares no memory with the result.

        early: although schedules are not over; weights above eight bits then stay in floating point.
        Raises ScheduleError where they are not and `early` was not asked for; CertificateError when the finished
        model is not what was trained.
        """
        if not early:
            self.pacer.require_end()
        self.course.require_shown()
        self.pacer.pruning.require_learned()
        plan, trained = self._plan(), self.eval_variant()
        tensors = verification_inputs(trained, self.signature, self.example)
        cuts = plan if self.pacer.pruning.courses else None
        simulated = trained if cuts is None else self._recapture(self, False, self.example, cuts)
        job = Job(plan=plan, target=Store(), trains=True)
        driver = Driver(simulated.copy(), tensors)
        program, lowering, output = finish(driver, tensors, job)
        reference = job.reference or simulated
        apart = difference(flat_outputs(trained.run(tensors)), driver.outputs).relative
        program.log.append(Entry(stage="finish", rule="finish.compared", reason=f"relative error {apart:.3g}"))
        own = self._own_names()
        sizes = {name: nbytes for name, nbytes in tensor_sizes(trained).items() if name not in own}
        sizes |= self._left_out
        certificate = certify(program, reference, tensors, sizes, lowering, output, plan.patterns)
        certificate = replace(certificate, code_mismatch=code_mismatch(program, simulated, tensors))
        certificate.check()
        if plan.quantizations or plan.sparsities:
            job.target.freeze(clone=True)
        else:
            job.target.own()
        job.target.alias_as(self.store)

        def grow(compressed: GraphModel, training: bool, call: Mapping[str, Any]) -> Program:
            again = Job(plan=plan, target=compressed.store, trains=True)
            fresh = self._recapture(self, training, call, cuts)
            inputs = None if training else verification_inputs(fresh, self.signature, call)
            return replayed(Driver(fresh, inputs), inputs, again)

        compressed = Compressed.called(f"{type(self).__name__.removesuffix('Student')}Compressed", self.signature)(
            job.target,
            plan,
            self.signature,
            recipe=self.recipe.plain(),
            certificate=certificate,
            log=tuple(program.log),
            measured={"training": self.pacer.summary()} if self.course.step else None,
            measure=lambda finished: measure(self, finished, self.example),
            grow=grow,
            attributes={**self._attributes, **own_dtype(self)},
        )
        compressed.add(program)
        return compressed

    def _plan(self) -> Plan:
        """The edits at this moment; cuts come first."""
        pruning, sparsity = self.pacer.pruning.structured, self.pacer.pruning.sparse
        slices = [] if pruning is None else pruning.slices()
        zeros = () if sparsity is None else edits(sparsity.masks(), slices)
        return Plan((*self.plan.drops, *slices, *zeros, *self.course.plan()))

    def _own_names(self) -> set[str]:
        """What training keeps in the store besides the model's own tensors."""
        taught = set() if self.distillation is None else self.distillation.names()
        return gauges(self.plan, self.store) | self.pacer.pruning.names() | taught

    def eval_variant(self) -> Program:
        """A graph without dropout."""
        return next(p for p in self.variants.values() if not p.contract.training)


def _begin_anew(student: nn.Module, _: object) -> None:
    """Once the tensors of the model alone are loaded: what is cut is chosen by them, from the first step."""
    assert isinstance(student, Student)
    if student._anew:
        student._anew = False
        student.pacer.pruning.restart()
