"""transplant: the Plan's edits on the eager module, for what a graph cannot do (generate, pipelines, PEFT)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..passes.lower import ASYMMETRIC_SHIFT, corrected_bias_name
from ..passes.verify import difference
from ..runtime.contract import Signature
from ..runtime.errors import DwindleError
from ..runtime.model import GraphModel, flat_outputs
from ..runtime.modules import QuantizedEmbedding, QuantizedLinear
from ..runtime.plan import Quantize, input_scale_name, input_zero_name
from ..runtime.qtensor import QTensor
from ..runtime.structure import flatten
from .inputs import as_arguments

# Module and graph call the same operators on the same codes: measured exactly 0 on all tiny models, dynamic and
# static. Room is left for layers that stay floating point and round otherwise (addmm against linear), since one
# rounding may flip a code.
LIMIT = 2e-2


class TransplantError(DwindleError):
    """A Plan that the eager module cannot express."""


def transplant(small: GraphModel, model: nn.Module, *, inputs: Any = None) -> nn.Module:
    """A copy of the eager `model` that runs the quantised layers of `small`.

    The copy shares its tensors with `small` and `model` (nothing is duplicated, nothing is trainable) and has the
    model's class, config and methods. It is run beside `small` on `inputs` (made up for transformers models).
    Raises TransplantError for edits that have no eager form, naming them, and if the two differ.
    """
    edits = [edit for edit in small.plan if isinstance(edit, Quantize)]
    unfit = sorted({e.fqn for e in edits if not _expressible(model, small.store.names_of(e.fqn), e.operator)})
    if unfit:
        raise TransplantError(
            "the plan has edits that the eager module cannot express",
            required="quantised linears and embeddings",
            found=", ".join(unfit[:5]) + (f" and {len(unfit) - 5} more" if len(unfit) > 5 else ""),
            cure="call the compressed model itself, or leave these modules out in the recipe",
        )
    copied = _copy(model)
    for edit in edits:
        for name in small.store.names_of(edit.fqn):
            _replace(copied, name, edit, small)
    _verify(small, copied.eval(), model, inputs)
    return copied


def _expressible(model: nn.Module, names: list[str], operator: str) -> bool:
    """Whether a module of that kind owns the weight, under any of its names (a tied one has several)."""
    owners = [name.rpartition(".") for name in names]
    return any(leaf == "weight" and _operator(model.get_submodule(owner)) == operator for owner, _, leaf in owners)


def _operator(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear"
    return "embedding" if isinstance(module, nn.Embedding) else None


def _copy(model: nn.Module) -> nn.Module:
    """New modules on the same tensors."""
    held: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    held.update({id(b): b for b in model.buffers()})
    return copy.deepcopy(model, held)


def _replace(model: nn.Module, fqn: str, edit: Quantize, small: GraphModel) -> None:
    path = fqn.rpartition(".")[0]
    owner, _, leaf = path.rpartition(".")
    old, weight = model.get_submodule(path), small.store.get(edit.fqn)
    operator = _operator(old)
    if operator is None:  # another name of a module that is already replaced
        return
    if not isinstance(weight, QTensor):
        raise TransplantError("a planned tensor is not packed", required="QTensor", found=edit.fqn)
    dtype = cast(Tensor, old.weight).dtype
    new: nn.Module
    if operator == "embedding":
        new = QuantizedEmbedding(weight, dtype)
    else:
        decided = small.plan.quantize(edit.fqn, "linear") or edit
        new = _linear(weight, cast("Tensor | None", old.bias), small.store.canonical(f"{path}.bias"), decided, small)
    setattr(model.get_submodule(owner), leaf, new)


def _linear(weight: QTensor, bias: Tensor | None, bias_name: str, edit: Quantize, small: GraphModel) -> QuantizedLinear:
    dtype = small.dtype
    granularity = edit.activation.granularity if edit.activation is not None else None
    if not edit.static:
        return QuantizedLinear(weight, bias, activation=granularity, dtype=dtype)
    stored = [small.store.get(n) for n in (input_scale_name(edit.fqn), input_zero_name(edit.fqn))]
    scale, zero = (t if isinstance(t, Tensor) else None for t in stored)
    zero = zero - ASYMMETRIC_SHIFT if zero is not None else None
    corrected = small.store.get(corrected_bias_name(edit.fqn, None if bias is None else bias_name))
    bias = corrected if isinstance(corrected, Tensor) else bias
    return QuantizedLinear(weight, bias, activation=granularity, dtype=dtype, input_scale=scale, input_zero_point=zero)


def _verify(small: GraphModel, copied: nn.Module, model: nn.Module, inputs: Any) -> None:
    arguments = as_arguments(model, inputs)
    call = {n: v for n, v in arguments.items() if n in Signature.of(copied).names}
    with torch.no_grad():
        expected = flat_outputs(flatten(small(**arguments))[1])
        found = flat_outputs(flatten(copied(**call))[1])
    delta = difference(expected, found)
    if not delta.relative <= LIMIT:
        raise TransplantError(
            "the eager module does not compute what the graph does",
            required=f"a relative difference of at most {LIMIT}",
            found=f"{delta.relative:.3g}",
            cure="some module reads its weight itself; leave it out in the recipe",
        )
