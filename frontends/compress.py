"""compress, and what it shares with prepare: capture, one plan, the pipeline, a finished model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.certify import certify, lowering_error, rounding, tensor_sizes
from ..passes.driver import Driver
from ..passes.pipeline import FINISH, PREPARE, SETTLE, Job, run_stages
from ..passes.prune.score import WITH_DATA
from ..passes.quantize.decide import QuantizeRule
from ..passes.quantize.twins import twins_of
from ..passes.staying import data_is_wanted
from ..passes.verify import Difference, difference
from ..runtime.certificate import require_lowered
from ..runtime.compressed import Compressed
from ..runtime.contract import Signature
from ..runtime.errors import CalibrationError, CaptureError, RecipeError
from ..runtime.model import DTYPE, GraphModel
from ..runtime.own_state import own_state
from ..runtime.plan import Plan
from ..runtime.program import Entry, Program, checks
from ..runtime.store import Store
from .capture import DynamicShapes, capture
from .distill import task_loss
from .inputs import as_arguments, flat_batches
from .measure import measure
from .progress import late
from .recipe import Recipe

RecipeSource = Recipe | Mapping[str, Any] | str | Path

# What tools read from a model besides its tensors.
FORWARDED = ("config", "main_input_name", "base_model_prefix", "name_or_path")


@own_state()
def compress(
    model: nn.Module,
    recipe: RecipeSource = "zeroquant-w8a8",
    *,
    inputs: Any = None,
    data: Iterable[Any] | None = None,
    dynamic_shapes: DynamicShapes | None = None,
) -> Compressed:
    """Compress a trained model without training.

    recipe: a preset's name, a file, a dict or a Recipe
    inputs: one example batch (dict of keyword arguments, tuple, or tensor); made up for transformers models
    data: batches like `inputs`, for recipes with static activations, for weights rounded by gptq or awq, for smooth,
        for layers chosen by influence or change, and for pruning by taylor or fisher (with labels) or by routed mass
    dynamic_shapes: names of dimensions that vary, {"input_ids": {0: "batch"}}; None finds batch and sequence

    The model is borrowed: its tensors are read, never written, and nothing about it changes. Returns a
    Compressed, called like the model. Raises RecipeError, CaptureError, CalibrationError, SchemeError,
    PassError or CertificateError, each with what was required, what was found and the cure.
    """
    recipe = Recipe.of(recipe)
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
    job.show = late
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


def require_original(model: object) -> None:
    """Raise CaptureError for what compress, prepare and init_compression have made."""
    if isinstance(model, nn.Module) and next(twins_of(model), None) is not None:
        raise CaptureError(
            "the model is in training since init_compression",
            required="the original model",
            found="modules with simulated quantisation",
            cure="redundancy_clean(model, config) makes them integers; or begin with another copy of the model",
        )
    if isinstance(model, GraphModel):
        raise CaptureError(
            "the model is dwindle's already",
            required="the original model",
            found=type(model).__name__,
            cure="student.finish() packs a student; a compressed model is compressed",
        )


def require_effect(rules: Sequence[QuantizeRule], plan: Plan | None, log: Iterable[Entry]) -> None:
    """Raise RecipeError when a recipe that quantises has quantised nothing."""
    if rules and not plan:
        reasons = sorted({entry.reason for entry in log if not entry.applied})
        raise RecipeError(
            "the recipe quantises nothing in this model",
            required="a linear, embedding or conv2d that reads its weight as it is stored, and that a rule selects",
            found="; ".join(reasons) or "none",
            cure="choose another recipe; an empty one, {}, leaves the model as it is",
        )


def prepared(program: Program, tensors: Sequence[Tensor] | None, job: Job) -> Driver:
    """Take a captured program to one that simulates the plan; the driver holds it and its errors."""
    driver = Driver(program, tensors)
    run_stages(driver, PREPARE, job)  # weights that are not finite are named by the pass that meets them
    _require_finite(driver.captured)
    return driver


def _require_finite(outputs: Sequence[Tensor]) -> None:
    """Some elements may be infinite (masked logits); an output without any finite one proves nothing."""
    if any(t.is_floating_point() and t.numel() and not t.isfinite().any() for t in outputs):
        raise CaptureError(
            "the model gives nothing finite on the example inputs",
            required="outputs that can be compared",
            found="an output of NaN or Inf alone",
            cure="check inputs= and the checkpoint",
        )


def lowered(driver: Driver, job: Job) -> Program:
    """Make real what a prepared program simulates."""
    return run_stages(driver, (*SETTLE, *FINISH), job)


def replayed(driver: Driver, tensors: Sequence[Tensor] | None, job: Job) -> Program:
    """A further variant, lowered and verified as the first one was; without `tensors` it is not verified."""
    if tensors is None:
        return lowered(driver, job)
    program, lowering, _ = finish(driver, tensors, job)
    require_lowered(lowering, rounding(program))
    return program


def finish(driver: Driver, tensors: Sequence[Tensor], job: Job) -> tuple[Program, float, Difference]:
    """Lower a prepared program: (program, error of lowering, error against the captured program)."""
    simulated = run_stages(driver, SETTLE, job)
    program = run_stages(driver, FINISH, job)
    return program, lowering_error(program, simulated, tensors), difference(driver.captured, driver.outputs)


def verification_inputs(program: Program, signature: Signature, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The example as flat inputs, cut to a batch of two: enough to verify, cheap to run after every pass.

    Whole, where the graph was captured for a value: that of two may be another.
    """
    (tensors,) = flat_batches(program, signature, [arguments])
    if any(checks(node) for node in program.graph.nodes):
        return tensors
    for i, spec in enumerate(program.contract.inputs):
        for dim, name in enumerate(spec.shape):
            if name == "batch":
                tensors[i] = tensors[i].narrow(dim, 0, min(2, tensors[i].shape[dim]))
    return tensors


def proof_inputs(program: Program, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The example, and one example more where the batch may vary: a cut is proved at both sizes."""
    more = list(tensors)
    for i, spec in enumerate(program.contract.inputs):
        for dim, name in enumerate(spec.shape):
            if name == "batch":
                more[i] = torch.cat([more[i], more[i].narrow(dim, 0, 1)], dim)
    same = all(a is b for a, b in zip(more, tensors, strict=True))
    return [list(tensors)] if same else [list(tensors), more]


def forwarded(model: nn.Module) -> dict[str, Any]:
    """The attributes of `model` that a graph model answers for it."""
    return own_dtype(model) | {name: getattr(model, name) for name in FORWARDED if hasattr(model, name)}


def own_dtype(model: nn.Module) -> dict[str, str]:
    """The dtype of `model`, which cannot be seen from its tensors once all are packed."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return {} if dtype is None else {DTYPE: str(dtype).removeprefix("torch.")}


def calibration_batches(
    program: Program, signature: Signature, recipe: Recipe, data: Iterable[Any] | None
) -> Callable[[], Iterable[Sequence[Tensor]]]:
    """Flat batches of `data`, asked for only where something needs them; then no data is an error."""
    rules = (*(r.score in WITH_DATA for r in recipe.prunes()), *(bool(r.by) for r in recipe.depths()))
    if isinstance(data, Iterator) and (recipe.by_data() or any(rules)):
        data = list(data)  # depth, pruning and rounding read it, and so may ranges

    def batches() -> Iterable[Sequence[Tensor]]:
        if data is None:
            raise data_is_missing(recipe, "data=[batch, ...]")
        return flat_batches(program, signature, data)

    return batches


def data_is_missing(recipe: Recipe, given: str) -> CalibrationError:
    """For a recipe that goes by data, in depth, a score, rounding or static activations; `given`: how to give it."""
    by = next((rule.by for rule in recipe.depths() if rule.by is not None), None)
    if by is not None:
        return data_is_wanted(by, given)
    by_data = next((rule.score for rule in recipe.prunes() if rule.score in WITH_DATA), None)
    if by_data is not None:
        return CalibrationError(
            f"the recipe {recipe.name or 'given'} prunes by score {by_data}",
            required="calibration data",
            found="none",
            cure=f"give {given}, or a score that goes by the weights alone, such as l2",
        )
    if recipe.by_data():
        return CalibrationError(
            f"the recipe {recipe.name or 'given'} has {' and '.join(recipe.by_data())}",
            required="calibration data",
            found="none",
            cure=f"give {given}, or method 'nearest' and no smooth, which need none",
        )
    return CalibrationError(
        f"the recipe {recipe.name or 'given'} has static activations",
        required="calibration data",
        found="none",
        cure=f"give {given}, or a recipe with dynamic activations such as zeroquant-w8a8",
    )
