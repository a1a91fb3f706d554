"""How much each index of a group matters: pure functions of tensors, and their sum over all that a group cuts.

    l1           sum |w|
    l2           sqrt(sum w^2)
    taylor       |sum w g|, what the loss would change by to first order (Molchanov et al. 2019, arXiv 1906.10771)
                 over calibration data g is the mean gradient; in training the scores of all steps are summed, so that
                 what pulls one way in one step and back in the next still counts
    fisher       sum (w g)^2, the diagonal of the empirical Fisher matrix in place of the Hessian (Theis et al. 2018)
    scale        |gamma| of the norms in the group alone (Liu et al. 2017, arXiv 1708.06519)
    random       by a seed
    movement     learned in training with a straight-through estimator (Sanh et al. 2020, arXiv 2005.07683); `gates`
    routed       sum of the weights with which a router has chosen it, over calibration data: of experts

w runs over all stored numbers that an index holds, g is the gradient of the loss by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...runtime.errors import RecipeError
from .axes import Atom, Axis, leaves, norm, size
from .groups import Group
from .walk import Walk

Method = Literal["l1", "l2", "taylor", "fisher", "scale", "random", "movement", "routed"]
WITH_GRADIENT: tuple[Method, ...] = ("taylor", "fisher")
WITH_DATA: tuple[Method, ...] = (*WITH_GRADIENT, "routed")

Mass = tuple[Axis, Tensor]
"""What a router gave each index of an axis of experts: fp64 (n,)."""


@dataclass(frozen=True)
class Evidence:
    """What data said. gradients: by score, by stored name; masses: of all routers, None where none was watched."""

    gradients: Mapping[Method, Mapping[str, Tensor]] = field(default_factory=dict)
    masses: Sequence[Mass] | None = None


NOTHING = Evidence()


def elements(w: Tensor, g: Tensor | None, method: Method) -> Tensor:
    """What each number adds to the sum of its index, in fp64 and w's shape; of a complex one both parts do."""
    if w.is_complex():
        parts = None if g is None else torch.view_as_real(g)
        return elements(torch.view_as_real(w), parts, method).sum(-1)
    w = w.detach().double()
    if method == "l1":
        return w.abs()
    if method in ("l2", "scale"):
        return w.square()
    assert g is not None
    product = w * g.detach().double()
    return product.square() if method == "fisher" else product


def finished(total: Tensor, method: Method) -> Tensor:
    """The score of an index from the sum over its numbers."""
    if method in ("l2", "scale"):
        return total.sqrt()
    return total.abs() if method == "taylor" else total


def score(
    walk: Walk,
    group: Group,
    method: Method,
    evidence: Evidence = NOTHING,
    seed: int = 0,
) -> Tensor:
    """fp64 (n,): the score of each index of a group; the least go first.

    evidence: what data said, for methods that want it. Raises RecipeError where it is missing, for scores that only
    training gives, and where a number is not finite.
    """
    if method == "movement":
        raise RecipeError(
            "pruning by movement is learned",
            required="training: prepare(model, recipe)",
            found="compress()",
            cure="prepare the model and train it, or choose a score of the weights: l1, l2, scale",
        )
    if method == "routed":
        return _routed(group, evidence.masses)
    if method == "random":
        digest = hashlib.sha256(f"{seed} {group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        return torch.rand(group.size, generator=generator, dtype=torch.float64)
    total = torch.zeros(group.size, dtype=torch.float64)
    for cut in group.cuts:
        w = walk.program.store.get(cut.name)
        if not isinstance(w, torch.nn.Parameter) or (method == "scale" and w.dim() != 1):
            continue  # running statistics say nothing about what an index is worth
        g = evidence.gradients.get(method, {}).get(cut.name)
        if method in WITH_GRADIENT and g is None:
            raise RecipeError(
                f"pruning by {method} needs gradients",
                required="data with labels, for a model whose output has a loss",
                found=f"no gradient of {cut.name}",
                cure="give inputs= and data= with labels, or choose a score of the weights: l1, l2, scale",
            )
        each = elements(w, g, method)
        if not bool(each.isfinite().all()):
            raise RecipeError(
                f"the {method} score of {cut.name} is not finite",
                required="finite numbers in all that is scored",
                found="NaN or Inf",
                cure="check the checkpoint, leave the module out with modules=, or choose score 'random'",
            )
        others = [dim for dim in range(w.dim()) if dim != cut.dim]
        total += folded(walk.stored[cut.name][cut.dim], each.sum(others) if others else each, group.leaf).cpu()
    return finished(total, method)


def _routed(group: Group, masses: Sequence[Mass] | None) -> Tensor:
    if masses is None:
        raise RecipeError(
            "pruning by routed mass needs data",
            required="compress(model, recipe, data=[batch, ...])",
            found="no data that routers were watched on",
            cure="choose l1, l2 or scale, which go by the weights alone",
        )
    own = [folded(axis, mass, group.leaf) for axis, mass in masses if group.leaf in leaves(axis)]
    if not own:
        raise RecipeError(
            "only experts that a router chooses have a routed mass",
            required="groups of experts with a router",
            found=f"{group.name}, of kind {group.kind}",
            cure="scopes: experts; or choose another score for this rule",
        )
    return torch.stack(own).sum(0)


def routed_mass(chosen: Tensor, weights: Tensor, n: int) -> Tensor:
    """fp64 (n,): the sum of the weights with which each index was chosen.

    chosen: int (..., k), indices; weights: (..., k). m[e] = sum of weights where chosen = e.
    """
    mass = torch.zeros(n, dtype=torch.float64)  # on the CPU, where the order of a sum does not change
    return mass.index_add_(0, chosen.reshape(-1).long().cpu(), weights.detach().reshape(-1).double().cpu())


def folded(axis: Axis, values: Tensor, leaf: Atom) -> Tensor:
    """(leaf.size,): values (n,) of an axis, summed over all its indices that are one index of the leaf."""
    axis = norm(axis)
    grid = values.reshape([atom.size for atom in axis])
    total = values.new_zeros(leaf.size)
    for i, atom in enumerate(axis):
        others = [j for j in range(len(axis)) if j != i]
        own = grid.sum(others) if others else grid
        if atom is leaf:
            total = total + own
        elif atom.parts is not None:
            for part, piece in zip(atom.parts, torch.split(own, [size(p) for p in atom.parts]), strict=True):
                total = total + folded(part, piece, leaf)
    return total


def relative(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores of several groups made comparable: over each group's mean."""
    return [s / s.mean().clamp_min(torch.finfo(s.dtype).tiny) for s in scores]
