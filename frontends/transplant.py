"""transplant: the Plan's edits on the eager module, for what a graph cannot do (generate, pipelines, PEFT)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..passes.fold import BATCH_NORM_INTO_CONV
from ..passes.lower import asymmetric_shift, corrected_bias_name, sums_name
from ..passes.quantize.twins import symmetric_padding
from ..runtime.compressed import Compressed
from ..runtime.model import GraphModel
from ..runtime.modules import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear
from ..runtime.own_state import own_state
from ..runtime.plan import Quantize, Slice, input_scale_name, input_zero_name
from ..runtime.qtensor import QTensor
from .inputs import as_arguments
from .resize import Beside, TransplantError, analysed, examples, fit_layers, resize
from .shorten import shortened

# Module and graph call the same operators on the same codes: measured exactly 0 on all tiny models, dynamic and
# static. Room is left for layers that stay floating point and round otherwise (addmm against linear), since one
# rounding may flip a code.
LIMIT = 2e-2

# Where nothing is quantised both round alike, up to the order of a sum.
EXACT = 1e-5


@own_state()
def transplant(small: Compressed, model: nn.Module, *, inputs: Any = None) -> nn.Module:
    """A copy of the eager `model` that is cut as `small` is, and runs its quantised layers.

    Every tensor is that of `small`, trained ones too, and the model's own where `small` has no use for it. Parameters
    are shared, not duplicated, and none is trainable; buffers are the copy's own, since a forward may write them.
    Where something was cut or left out the parameters are the copy's own too, and train as the model's do if none is
    packed. Its modules' numbers (heads, widths) follow the cuts, and blocks that stay are numbered anew; a config has
    the new number of layers, and stays as it was otherwise unless a forward reads it.
    It has the model's class, config and methods, and is run beside `small` on `inputs` (made up for transformers
    models). Raises TransplantError for edits that have no eager form, naming them, and if the two differ.
    """
    if not isinstance(small, Compressed):
        raise TransplantError(
            "there is nothing to transplant",
            required="what compress() or student.finish() gives",
            found=type(small).__name__,
            cure="student.finish()" if isinstance(small, GraphModel) else None,
        )
    arguments, shorter = as_arguments(model, inputs), bool(small.plan.drops)
    if shorter:
        model, small = shortened(model, small)
    edits = small.plan.quantizations
    unfit = sorted({e.fqn for e in edits if not _expressible(model, small.store.names_of(e.fqn), e.operator)})
    unfit += sorted({e.fqn for e in edits if e.operator == "conv2d" and _folds(small)})
    if unfit:
        raise TransplantError(
            "the plan has edits that the eager module cannot express",
            required="quantised linears, embeddings, and convolutions without a batch norm folded into them",
            found=", ".join(unfit[:5]) + (f" and {len(unfit) - 5} more" if len(unfit) > 5 else ""),
            cure="call the compressed model itself, or leave these modules out in the recipe",
        )
    names = [name for edit in edits for name in small.store.names_of(edit.fqn)]
    several = [name for name in names if _differ(small, name)]
    if several:
        raise TransplantError(
            "a module of the eager model has one static range, and some are called with several inputs",
            required="modules that are called once, or dynamic activations",
            found=", ".join(several[:5]),
            cure="call the compressed model itself, or choose range 'dynamic'",
        )
    copied = _copy(model, small, own=shorter or bool(small.plan.slices)).eval()
    limit = EXACT if not edits and small.dtype in (torch.float32, torch.float64) else LIMIT
    if not small.plan.slices:
        _replace_all(copied, small)
        _verify(Beside.of(copied, small, [arguments], limit))
        return copied
    walk, kept = analysed(model, small, arguments)
    fit_layers(model, copied, walk, kept)
    _replace_all(copied, small)
    resize(model, Beside.of(copied, small, examples(small, arguments), limit), walk, kept)
    return copied


def _differ(small: Compressed, name: str) -> bool:
    """Whether a weight has static ranges that differ from call to call."""
    for of in (input_scale_name, input_zero_name):
        stored = itertools.takewhile(
            lambda tensor: tensor is not None, (small.store.get(of(name, i)) for i in itertools.count())
        )
        tensors = [tensor for tensor in stored if isinstance(tensor, Tensor)]
        if any(not torch.equal(tensors[0], other) for other in tensors[1:]):
            return True
    return False


def _expressible(model: nn.Module, names: list[str], operator: str) -> bool:
    """Whether a module of that kind owns the weight, under any of its names (a tied one has several)."""
    owners = [name.rpartition(".") for name in names]
    return any(leaf == "weight" and _operator(model.get_submodule(owner)) == operator for owner, _, leaf in owners)


def _operator(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear"
    if isinstance(module, nn.Conv2d) and symmetric_padding(module) is not None:
        return "conv2d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def _folds(small: Compressed) -> bool:
    return any(entry.rule == BATCH_NORM_INTO_CONV.name and entry.applied for entry in small.log)


def _copy(model: nn.Module, small: Compressed, *, own: bool) -> nn.Module:
    """New modules on the tensors of `small`; on their own memory where something went, so that they may train."""
    # Folding writes other weights under a convolution's own names. Only compress folds; it changes nothing else.
    folded = _folds(small)
    trains = own and not small.plan.quantizations
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    cuts = _cuts(dict(named), small)
    held: dict[int, Any] = {}
    for name, old in named:
        if id(old) in held:
            continue
        stored, cut = small.store.get(name), _without(old.detach(), cuts.get(id(old), []))
        value = stored.detach() if isinstance(stored, Tensor) and not folded else cut
        if value.shape != cut.shape:
            raise _another(name, f"shape {list(value.shape)}", list(cut.shape))
        if isinstance(old, nn.Parameter):
            held[id(old)] = nn.Parameter(value.clone() if own else value, requires_grad=trains and old.requires_grad)
        else:
            held[id(old)] = value.clone()
    return copy.deepcopy(model, held)


def _cuts(named: Mapping[str, Tensor], small: Compressed) -> dict[int, list[Slice]]:
    """By the identity of the model's tensors, which a tied one has one of under all its names."""
    found: dict[int, list[Slice]] = {}
    for edit in small.plan.slices:
        own = named.get(edit.fqn)
        if own is None or own.dim() <= edit.dim or own.shape[edit.dim] != edit.size:
            raise _another(edit.fqn, f"size {edit.size} in dimension {edit.dim}", None if own is None else [*own.shape])
        found.setdefault(id(own), []).append(edit)
    return found


def _without(tensor: Tensor, cuts: Sequence[Slice]) -> Tensor:
    for edit in cuts:
        tensor = tensor.index_select(edit.dim, edit.kept.to(tensor.device))
    return tensor


def _another(name: str, required: object, found: object) -> TransplantError:
    return TransplantError(f"{name} is not of the model that was compressed", required=required, found=found)


def _replace_all(copied: nn.Module, small: Compressed) -> None:
    for edit in small.plan.quantizations:
        for name in small.store.names_of(edit.fqn):
            _replace(copied, name, edit, small)


def _replace(model: nn.Module, fqn: str, edit: Quantize, small: Compressed) -> None:
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
        decided = small.plan.quantize(edit.fqn, operator) or edit
        bias, options = _activation(cast("Tensor | None", old.bias), fqn, decided, small)
        if isinstance(old, nn.Conv2d):
            options |= {"padding_mode": old.padding_mode, "padding": symmetric_padding(old)}
            options |= {name: getattr(old, name) for name in ("stride", "dilation", "groups")}
            new = QuantizedConv2d(weight, bias, dtype=dtype, **options)
        else:
            new = QuantizedLinear(weight, bias, dtype=dtype, **options)
    setattr(model.get_submodule(owner), leaf, new)


def _activation(
    bias: Tensor | None, weight: str, edit: Quantize, small: Compressed
) -> tuple[Tensor | None, dict[str, Any]]:
    """What the module with that weight is told of its activation, and its bias with the zero point folded in."""
    activation = edit.activation
    if not edit.static or activation is None:
        sums = small.store.get(sums_name(edit.fqn))
        return bias, {"activation": activation, "weight_sums": sums if isinstance(sums, Tensor) else None}
    stored = [small.store.get(n) for n in (input_scale_name(weight), input_zero_name(weight))]
    scale, zero = (t if isinstance(t, Tensor) else None for t in stored)
    zero = zero - asymmetric_shift(activation) if zero is not None else None
    own = small.store.canonical(f"{weight.rpartition('.')[0]}.bias")
    corrected = small.store.get(corrected_bias_name(weight, None if bias is None else own))
    bias = corrected if isinstance(corrected, Tensor) else bias
    return bias, {"activation": activation, "input_scale": scale, "input_zero_point": zero}


def _verify(beside: Beside) -> None:
    failure = beside.failure()
    if failure is not None and failure.where is not None:  # a packed weight is no tensor
        raise TransplantError(
            "the eager module does not run with packed weights",
            required="modules that alone read their weights",
            found=f"{failure.what} in {failure.where or 'the model'}",
            cure="some module reads the weight of another; leave it out in the recipe",
        )
    if failure is not None:
        raise TransplantError(
            "the eager module does not compute what the graph does",
            required=f"a relative difference of at most {beside.limit}",
            found=failure.what,
            cure="some module reads its weight itself; leave it out in the recipe",
        )
