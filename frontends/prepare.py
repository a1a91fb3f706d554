"""prepare: from a model and a recipe to a student."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..passes.certify import tensor_sizes
from ..passes.pipeline import Job
from ..passes.prune.pruning import Pruning
from ..passes.prune.sparsify import zero
from ..passes.quantize.course import Course
from ..passes.quantize.cuts import require_cuttable
from ..runtime.contract import Signature
from ..runtime.model import GraphModel
from ..runtime.own_state import own_state
from ..runtime.plan import Plan
from ..runtime.program import Program
from ..runtime.store import Store
from .assemble import (
    forwarded,
    prepared,
    proof_inputs,
    require_effect,
    require_original,
    verification_inputs,
)
from .calibration import calibration_batches
from .capture import DynamicShapes, capture
from .distillation import Distillation
from .inputs import as_arguments
from .pacing import Pacer
from .pairs import pairs_of
from .progress import late
from .recipe import Recipe, RecipeSource
from .student import Student
from .teacher import Teacher, require_vocabulary


@own_state()
def prepare(
    model: nn.Module,
    recipe: RecipeSource = "zeroquant-w8a8",
    *,
    inputs: Any = None,
    teacher: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    total_steps: int | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    quiet: bool = False,
) -> Student:
    """A trainable copy of `model` with the recipe's quantisation and pruning simulated; arguments as for `compress`.

    teacher: a model with the same call that `student.loss` learns from, such as `model` itself; it is not copied,
        trained or saved. What of it counts the recipe's `distill` says
    total_steps: optimizer steps that are planned; a schedule that does not end within them is refused
    quiet: shows no progress of what takes long

    The student is in the model's mode. Parameters and buffers are clones with the model's names and
    requires_grad; an empty recipe trains exactly as the model does. Static ranges are observed in training, from
    those that `data` gives on. What pruning will cut is masked, and chosen anew as its schedule says; it was proved
    beforehand that what is masked can be cut. Raises what `compress` does, and ScheduleError.
    """
    recipe = Recipe.of(recipe)
    recipe.require_nearest("training, in which weights move on,")
    require_original(model)
    arguments = as_arguments(model, inputs)
    signature = Signature.of(model)
    store = Store.of(model, clone=True)
    first = capture(model, arguments, store, dynamic_shapes=dynamic_shapes)
    tensors = verification_inputs(first, signature, arguments)
    momentum = recipe.calibration.momentum
    job = Job(rules=recipe.rules(), target=store, trains=True, seed=recipe.seed, momentum=momentum)
    job.depth, job.prunes, job.inputs = recipe.depths(), recipe.prunes(), proof_inputs(first, tensors)
    job.sparsifies = recipe.sparsifies()
    if data is not None:
        job.batches, job.observer = calibration_batches(first, signature, recipe, data), recipe.calibration.observer
    job.show = partial(late, quiet=quiet)
    program = prepared(first, tensors, job).program
    require_effect(job.rules, job.plan, first.log)
    plan = job.plan or Plan()
    course = job.course or Course(store, plan.quantizations, {}, recipe.seed)
    sizes, gone = tensor_sizes(program), unread(program, plan)
    for name in gone:
        store.take(name)
    pruning = Pruning(job.pruning, job.sparsity)
    if job.pruning is not None:
        require_cuttable(job.reference or program, plan, job.pruning.cuts())
    pruning.require_apart()
    pruning.require_reached(program, tensors)
    pruning.begin()

    def recapture(student: Student, training: bool, call: Mapping[str, Any], cuts: Plan | None) -> Program:
        own = student.store if cuts is None else student.store.fork()
        structured, sparse = student.pacer.pruning.structured, student.pacer.pruning.sparse
        again = Job(
            plan=plan if cuts is None else cuts, target=own, trains=True, course=student.course, momentum=momentum
        )
        with _lent(own, model, gone):
            fresh = capture(model, call, own, training=training, dynamic_shapes=dynamic_shapes)
            if cuts is None:
                again.pruning, again.sparsity = structured, sparse
            else:
                again.inputs = proof_inputs(fresh, verification_inputs(fresh, signature, call))
                if sparse is not None:
                    zero(own, {weight.fqn: mask for weight, mask in sparse.masks().items()})
            return prepared(fresh, None, again).program

    def grow(student: GraphModel, training: bool, call: Mapping[str, Any]) -> Program:
        assert isinstance(student, Student)
        return recapture(student, training, call, None)

    student = Student.named(model, "Student")(store, plan, signature, grow=grow, attributes=forwarded(model))
    student.recipe, student.example, student._recapture = recipe, arguments, recapture
    student._left_out = {name: sizes[name] for name in gone}
    student.pacer = Pacer(course, pruning, recipe.sensitivity, recipe.adaptive())
    student.add(program)
    if teacher is not None:
        student.distillation = _distillation(student, model, teacher, total_steps, dynamic_shapes)
    if total_steps is not None:
        student.forecast(total_steps).require_end()
    return student.train(model.training)


def _distillation(
    student: Student,
    model: nn.Module,
    teacher: nn.Module,
    total_steps: int | None,
    dynamic_shapes: DynamicShapes | None,
) -> Distillation:
    """What the teacher says, checked on the example. Raises DistillationError and RecipeError."""
    settings, batch = student.recipe.distill, student.example
    require_vocabulary(model, teacher)
    asked = Teacher(teacher, dynamic_shapes)
    taught = Distillation(asked, settings, student.store, settings.staged(total_steps))
    (own,) = student.variants.values()
    if settings.within:
        asked.ask(batch)  # first as it is: what it cannot take is refused in its own words
        taught.pairs = tuple(pairs_of(settings, own, student.plan, asked.program(batch)))
    taught.begin(student, own, batch)
    return taught


def unread(program: Program, plan: Plan) -> list[str]:
    """Names of the tensors of blocks that are left out, which nothing else reads."""
    read = {program.tensor_of(node) for node in program.graph.nodes}
    inside = tuple(f"{edit.path}." for edit in plan.drops)
    return [name for name, _ in program.store.entries() if name.startswith(inside) and name not in read]


@contextlib.contextmanager
def _lent(store: Store, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """With the model's own tensors under names that were taken out: a model is captured whole."""
    whole = Store.borrowing(model) if names else Store()
    for name in names:
        value = whole.get(name)
        assert value is not None, f"{name} is not the model's"
        store.put(name, value, persistent=whole.is_persistent(name))
    try:
        yield
    finally:
        for name in names:
            store.take(name)
