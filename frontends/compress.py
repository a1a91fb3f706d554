"""compress: a trained model in, a smaller one out, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..passes.certify import certify, tensor_sizes
from ..passes.distill import task_loss
from ..passes.pipeline import Job
from ..runtime.compressed import Compressed
from ..runtime.contract import Signature
from ..runtime.model import GraphModel
from ..runtime.own_state import own_state
from ..runtime.plan import Plan
from ..runtime.program import Program
from ..runtime.store import Store
from .assemble import (
    finish,
    forwarded,
    prepared,
    proof_inputs,
    replayed,
    require_effect,
    require_original,
    verification_inputs,
)
from .calibration import calibration_batches, require_data
from .capture import DynamicShapes, capture
from .inputs import as_arguments, refuse_one_batch
from .measure import measure
from .prepare import prepare
from .progress import late
from .recipe import Recipe, RecipeSource


def compress(
    model: nn.Module,
    recipe: RecipeSource = "zeroquant-w8a8",
    *,
    inputs: Any = None,
    data: Iterable[Any] | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    processes: int = 1,
    quiet: bool = False,
) -> Compressed:
    """Compress a trained model: without training or, by a recipe with `layerwise`, with its blocks trained one by one.

    recipe: a preset's name, a file, a dict or a Recipe
    inputs: one example batch (dict of keyword arguments, tuple, or tensor); made up for transformers models
    data: batches like `inputs`, for recipes with static activations, for weights rounded by gptq or awq, for smooth,
        for layers chosen by influence or change, for pruning by taylor or fisher (with labels) or by routed mass, and
        for `layerwise`
    dynamic_shapes: names of dimensions that vary, {"input_ids": {0: "batch"}}; None finds batch and sequence
    processes: blocks that `layerwise` trains at once; quiet: shows no progress of what takes long

    The model is borrowed: its tensors are read, never written, and nothing about it changes. Without `layerwise` what
    is not packed is shared with it. Returns a Compressed, called like the model. Raises RecipeError, CaptureError,
    CalibrationError, SchemeError, PassError, DistillationError or CertificateError, each with what was required, what
    was found and the cure.
    """
    recipe = Recipe.of(recipe)
    if recipe.layerwise is None:
        return _in_one_go(model, recipe, inputs, data, dynamic_shapes, quiet)
    require_data(recipe, data, "data=[batch, ...]")
    refuse_one_batch(data or ())
    batches = list(data or ())
    student = prepare(
        model, recipe, inputs=inputs, teacher=model, data=batches, dynamic_shapes=dynamic_shapes, quiet=quiet
    )
    student.distill_layers(batches, processes=processes, quiet=quiet)
    return student.finish()


@own_state()
def _in_one_go(
    model: nn.Module,
    recipe: Recipe,
    inputs: Any,
    data: Iterable[Any] | None,
    dynamic_shapes: DynamicShapes | None,
    quiet: bool,
) -> Compressed:
    """Without training."""
    require_original(model)
    arguments = as_arguments(model, inputs)
    signature = Signature.of(model)
    rules = recipe.rules()
    target = Store()
    captured = capture(model, arguments, Store.borrowing(model), dynamic_shapes=dynamic_shapes)
    sizes = tensor_sizes(captured)
    tensors = verification_inputs(captured, signature, arguments)

    batches = calibration_batches(captured, signature, recipe, data)
    job = Job(rules=rules, target=target, batches=batches, observer=recipe.calibration.observer)
    job.depth, job.prunes, job.inputs = recipe.depths(), recipe.prunes(), proof_inputs(captured, tensors)
    job.sparsifies, job.loss = recipe.sparsifies(), task_loss
    job.show = partial(late, quiet=quiet)
    driver = prepared(captured, tensors, job)
    require_effect(rules, job.plan, captured.log)
    program, lowering, output = finish(driver, tensors, job)
    plan = job.plan or Plan()
    certificate = certify(program, job.reference or program, tensors, sizes, lowering, output, plan.patterns)
    certificate.check()
    target.alias_as(captured.store)

    def grow(compressed: GraphModel, training: bool, call: Mapping[str, Any]) -> Program:
        fresh = capture(model, call, Store.borrowing(model), training=training, dynamic_shapes=dynamic_shapes)
        again = Job(plan=plan, target=compressed.store, masks=job.masks or {}, folds=job.folds)
        flat = verification_inputs(fresh, signature, call)
        again.inputs = proof_inputs(fresh, flat)
        # A training variant writes running statistics, so it is not run to verify it.
        tensors = None if training else flat
        return replayed(prepared(fresh, tensors, again), tensors, again)

    if plan.quantizations or plan.sparsities:
        target.freeze()
    elif plan:
        target.own()
    compressed = Compressed.named(model, "Compressed")(
        target,
        plan,
        signature,
        recipe=recipe.plain(),
        certificate=certificate,
        log=tuple(program.log),
        measure=lambda finished: measure(model, finished, arguments),
        grow=grow,
        attributes=forwarded(model),
    )
    compressed.add(program)
    return compressed
