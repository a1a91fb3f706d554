"""What compress and prepare share: checks of the model, a captured program prepared, lowered and verified."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.certify import lowering_error, rounding
from ..passes.driver import Driver
from ..passes.pipeline import FINISH, PREPARE, SETTLE, Job, run_stages
from ..passes.quantize.decide import QuantizeRule
from ..passes.quantize.twins import twins_of
from ..passes.verify import Difference, difference
from ..runtime.certificate import require_lowered
from ..runtime.contract import Signature
from ..runtime.errors import CaptureError, RecipeError
from ..runtime.model import DTYPE, GraphModel
from ..runtime.plan import Plan
from ..runtime.program import Entry, Program, checks
from .inputs import flat_batches

# What tools read from a model besides its tensors.
FORWARDED = ("config", "main_input_name", "base_model_prefix", "name_or_path")


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
    # Copies: what is written into a student's config, as transformers' Trainer does, is not the caller's.
    return own_dtype(model) | {name: copy.deepcopy(getattr(model, name)) for name in FORWARDED if hasattr(model, name)}


def own_dtype(model: nn.Module) -> dict[str, str]:
    """The dtype of `model`, which cannot be seen from its tensors once all are packed."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return {} if dtype is None else {DTYPE: str(dtype).removeprefix("torch.")}
