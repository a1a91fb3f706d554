"""Before compression: a student's layers from its teacher, and GPT-2's Conv1D as linear layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...runtime.errors import DwindleError, RecipeError
from .sections import LayerReduction


def initialise(student: nn.Module, teacher: nn.Module, section: LayerReduction) -> None:
    """Copy the teacher's layer teacher_layer[i] to the student's layer i, and other_module_name; buffers too.

    The student has as many layers as teacher_layer names: it is not cut. Raises RecipeError, before anything is
    written, where names, counts or shapes do not fit.
    """
    prefix, chosen = section.module_name_prefix, section.teacher_layer
    own, theirs = (len(_submodule(model, prefix, whose)._modules) for model, whose in _both(student, teacher))
    if own != len(chosen):
        raise RecipeError(
            f"the student's layers below {prefix!r} are not those of teacher_layer",
            required=f"{len(chosen)} layers, one for each of teacher_layer",
            found=f"{own} layers",
            cure=f"build the student with {len(chosen)} layers (num_hidden_layers in a config of transformers)",
        )
    if max(chosen) >= theirs:
        raise RecipeError(
            "teacher_layer names a layer that the teacher does not have",
            required=f"0 to {theirs - 1}",
            found=max(chosen),
        )
    pairs = [(f"{prefix}.{i}", f"{prefix}.{layer}") for i, layer in enumerate(chosen)]
    pairs += [(name, name) for name in section.other_module_name]
    copies = [copy for pair in pairs for copy in _copies(student, teacher, *pair)]
    with torch.no_grad():
        for to, value in copies:
            to.copy_(value)


def _both(student: nn.Module, teacher: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    return (student, "student"), (teacher, "teacher")


def _submodule(model: nn.Module, path: str, whose: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        known = [name for name, _ in model.named_children()]
        raise RecipeError(
            f"the {whose} has no module {path!r}", required=f"a path that begins with {', '.join(known)}", found=error
        ) from error


def _copies(student: nn.Module, teacher: nn.Module, own: str, theirs: str) -> list[tuple[Tensor, Tensor]]:
    to, given = _tensors(_submodule(student, own, "student")), _tensors(_submodule(teacher, theirs, "teacher"))
    if to.keys() != given.keys():
        odd = sorted(to.keys() ^ given.keys())
        raise RecipeError(
            f"the student's {own} is not built as the teacher's {theirs}",
            required=f"the same {len(given)} parameters and buffers",
            found=f"a difference in {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}",
        )
    for name, value in given.items():
        if to[name].shape != value.shape:
            raise RecipeError(
                f"the student's {own}.{name} has another shape than the teacher's",
                required=list(value.shape),
                found=list(to[name].shape),
                cure="layers are copied as they are; leave this module out of other_module_name",
            )
    return [(to[name], value) for name, value in given.items()]


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def linearise(model: nn.Module, kind: type[nn.Module]) -> None:
    """Make every module of `kind`, which stores its weight as (K, N), an nn.Linear (N, K), in place.

    Modules and parameters stay the same objects, so ties, hooks, mode and requires_grad do. Raises DwindleError where
    a weight is not a matrix, or is shared with a module of another kind.
    """
    chosen = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    own = {id(module) for _, module in chosen}
    weights: dict[int, nn.Parameter] = {}
    for name, module in chosen:
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            raise DwindleError(
                f"{name} cannot become a linear layer", required="a parameter `weight` of two dimensions", found=weight
            )
        weights[id(weight)] = weight
    for name, module in model.named_modules():
        shared = [leaf for leaf, p in module._parameters.items() if id(p) in weights and id(module) not in own]
        if shared:
            raise DwindleError(
                f"{name}.{shared[0]} is shared with a {kind.__name__}, whose weight would be transposed",
                required="weights that no other kind of module reads",
                found=type(module).__name__,
            )
    with torch.no_grad():
        for weight in weights.values():
            weight.data = weight.data.t().contiguous()
    for _, module in chosen:
        module.__class__ = nn.Linear
        rows, columns = module.get_parameter("weight").shape
        vars(module).update(out_features=rows, in_features=columns)
        bias = module._parameters.get("bias")
        if bias is None:
            module._parameters["bias"] = None
        elif bias.dim() != 1:
            bias.data = bias.data.view(-1)
