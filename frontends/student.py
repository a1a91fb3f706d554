"""prepare: a model that trains with its quantisation simulated, and becomes a finished one.

The student owns clones of the model's tensors under their own names. Its train and eval variants are two graphs
on one store; each computes exactly what the Plan will make of it, with straight-through gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..passes.certify import certify, tensor_sizes
from ..passes.driver import Driver
from ..passes.pipeline import Job
from ..runtime.compressed import Compressed
from ..runtime.contract import Signature
from ..runtime.model import GraphModel
from ..runtime.plan import Plan
from ..runtime.program import Program
from ..runtime.randomness import own_random_state
from ..runtime.store import Store
from .capture import DynamicShapes, capture
from .compress import (
    RecipeSource,
    calibration_batches,
    finish,
    forwarded,
    own_dtype,
    prepared,
    replayed,
    require_effect,
    require_original,
    verification_inputs,
)
from .inputs import as_arguments
from .measure import measure
from .recipe import Recipe


class Student(GraphModel):
    """A model in training: call it as the original; `finish()` gives the Compressed it has become."""

    recipe: Recipe
    example: Mapping[str, Any]

    @own_random_state()
    def finish(self) -> Compressed:
        """Pack the weights as they are now. The student is unchanged and shares no memory with the result.

        Raises CertificateError when the finished model is not what was trained.
        """
        simulated = next(p for p in self.variants.values() if not p.contract.training).copy()
        tensors = verification_inputs(simulated, self.signature, self.example)
        job = Job(plan=self.plan, target=Store(), trains=True)
        program, lowering, output = finish(Driver(simulated.copy(), tensors), tensors, job)
        certificate = certify(program, simulated, tensors, tensor_sizes(simulated), lowering, output)
        certificate.check()
        job.target.freeze(clone=True)
        job.target.alias_as(self.store)

        regrow = self._grow
        assert regrow is not None  # a student is always made with its model at hand

        def grow(training: bool, call: Mapping[str, Any]) -> Program:
            again = Job(plan=self.plan, target=job.target, trains=True)
            fresh = regrow(training, call)
            inputs = None if training else verification_inputs(fresh, self.signature, call)
            return replayed(Driver(fresh, inputs), inputs, again)

        compressed = Compressed.called(f"{type(self).__name__.removesuffix('Student')}Compressed", self.signature)(
            job.target,
            self.plan,
            self.signature,
            recipe=self.recipe.plain(),
            certificate=certificate,
            log=tuple(program.log),
            measure=lambda finished: measure(self, finished, self.example),
            grow=grow,
            attributes={**self._attributes, **own_dtype(self)},
        )
        compressed.add(program)
        return compressed


@own_random_state()
def prepare(
    model: nn.Module,
    recipe: RecipeSource = "zeroquant-w8a8",
    *,
    inputs: Any = None,
    data: Iterable[Any] | None = None,
    dynamic_shapes: DynamicShapes | None = None,
) -> Student:
    """A trainable copy of `model` with the recipe's quantisation simulated; arguments as for `compress`.

    The student is in the model's mode. Parameters and buffers are clones with the model's names and
    requires_grad; an empty recipe trains exactly as the model does.
    """
    recipe = Recipe.of(recipe)
    require_original(model)
    arguments = as_arguments(model, inputs)
    signature = Signature.of(model)
    store = Store.of(model, clone=True)
    first = capture(model, arguments, store, dynamic_shapes=dynamic_shapes)
    tensors = verification_inputs(first, signature, arguments)
    batches = calibration_batches(first, signature, recipe, data)
    job = Job(rules=recipe.rules(), target=store, batches=batches, observer=recipe.calibration.observer, trains=True)
    program = prepared(first, tensors, job).program
    require_effect(job, first)
    plan = job.plan or Plan()

    def grow(training: bool, call: Mapping[str, Any]) -> Program:
        fresh = capture(model, call, store, training=training, dynamic_shapes=dynamic_shapes)
        return prepared(fresh, None, Job(plan=plan, target=store, trains=True)).program

    student = Student.named(model, "Student")(store, plan, signature, grow=grow, attributes=forwarded(model))
    student.recipe, student.example = recipe, arguments
    student.add(program)
    return student.train(model.training)
