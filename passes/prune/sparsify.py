"""Sparse pruning of a program: which weights, their masks at once or on a ramp in training.

W  ->  W m           m (bool, W's shape) in the store, chosen anew as the ramp says
W  ->  W spread(keep_top(s, k))      learned scores s; the course lowers k
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from ...runtime.errors import RecipeError
from ...runtime.ops.keep_top import KEEP_TOP
from ...runtime.plan import Slice, Sparsify
from ...runtime.program import Entry, Program, value_of
from ...runtime.store import Store
from ..quantize.sites import MASKED, find_sites
from ..schedule import AT_A_STROKE, Ramp
from ..selection import selected_by
from .masks import PARTS, MaskCourse, no_gradients
from .sparse import MOMENTUM, UNSTRUCTURED, Pattern, SparseScore, as_matrix, as_weight, each, together

aten = torch.ops.aten

STAGE = "sparsify"


@dataclass(frozen=True, kw_only=True)
class SparseRule:
    """Which weights get how many zeros.

    ratio: of zeros; pattern: where they may be; budget: each weight its share, or the network as a whole
    modules: globs over module paths; patterns, exclude: regular expressions searched for in them
    """

    ratio: float
    pattern: Pattern = UNSTRUCTURED
    score: SparseScore = "l1"
    budget: Literal["layer", "network"] = "layer"
    modules: tuple[str, ...] = ("*",)
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    operators: tuple[str, ...] = ("linear", "conv1d", "conv2d")
    ramp: Ramp = AT_A_STROKE

    @property
    def whole(self) -> float:
        """The share that goes in the end."""
        return self.ratio

    def selects(self, name: str, operator: str) -> bool:
        """Whether the weight of a module is meant."""
        if operator not in self.operators or any(re.search(pattern, name) for pattern in self.exclude):
            return False
        return selected_by([name], self.modules, self.patterns)


@dataclass(frozen=True)
class Sparse:
    """One weight with a pattern; transposed: its call reads it so (`sites.Site`)."""

    fqn: str
    pattern: Pattern
    transposed: bool
    learned: bool = False

    def __call__(self, part: str) -> str:
        """The name of one part: mask, or score and stay; and worth, of scores that are gathered over steps."""
        return f"{self.fqn}_sparse_{part}"

    def units(self, weight: Tensor) -> Tensor:
        """fp32: |w| of what stays or goes as one."""
        return self.pattern.units(self.matrix(weight).detach().float().abs())

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (outputs, inputs)."""
        return as_matrix(weight, transposed=self.transposed)

    def mask(self, units: Tensor, weight: Tensor) -> Tensor:
        """In the weight's shape, from units."""
        return as_weight(self.pattern.spread(units), weight.shape, transposed=self.transposed).contiguous()


def selected(program: Program, rules: Sequence[SparseRule]) -> dict[SparseRule, list[Sparse]]:
    """The weights of each rule; the last rule that selects a weight has it. What does not fit is logged and stays.

    Raises RecipeError for a rule that selects nothing.
    """
    taken: dict[SparseRule, list[Sparse]] = {rule: [] for rule in rules}
    seen, reasons = set[str](), dict[str, str]()
    for site in find_sites(program):
        name = site.name.rpartition(".")[0]
        rule = next((rule for rule in reversed(rules) if rule.selects(name, site.operator)), None)
        if rule is None or site.fqn in seen:
            continue
        seen.add(site.fqn)
        weight = program.store.get(site.fqn)
        assert isinstance(weight, Tensor)
        found = Sparse(site.fqn, rule.pattern, site.transposed, rule.score == "movement")
        reason = rule.pattern.misfit(*found.matrix(weight).shape)
        if reason:
            reasons[site.fqn] = reason
            program.log.append(Entry(stage=STAGE, rule=STAGE, where=site.fqn, applied=False, reason=reason))
        else:
            taken[rule].append(found)
    for rule, own in taken.items():
        if not own:
            raise RecipeError(
                "a sparse rule finds no weights",
                required=f"{', '.join(rule.operators)} in modules {', '.join((*rule.modules, *rule.patterns))}",
                found="; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3]) or "none",
                cure="choose other modules or another pattern",
            )
    return taken


def masks_of(rule: SparseRule, weights: Sequence[Sparse], units: Sequence[Tensor], part: float = 1.0) -> list[Tensor]:
    """bool masks of units by their scores, at a part of the pruning."""
    divide = each if rule.budget == "layer" else together
    return divide(units, [weight.pattern for weight in weights], rule.ratio * part)


def chosen(program: Program, rules: Sequence[SparseRule]) -> dict[Sparse, Tensor]:
    """bool masks of weights, by their own scores. Raises RecipeError as `selected` does."""
    found: dict[Sparse, Tensor] = {}
    for rule, weights in selected(program, rules).items():
        if rule.score != "l1":
            raise RecipeError(
                f"zeros by {rule.score} come about in training",
                required="prepare(model, recipe)",
                found="compress()",
                cure="prepare the model and train it, or choose score: l1",
            )
        held = [program.store.get(weight.fqn) for weight in weights]
        tensors = [tensor for tensor in held if isinstance(tensor, Tensor)]
        units = [weight.units(tensor) for weight, tensor in zip(weights, tensors, strict=True)]
        for weight, tensor, mask in zip(weights, tensors, masks_of(rule, weights, units), strict=True):
            found[weight] = weight.mask(mask, tensor)
    return found


def zero(store: Store, masks: Mapping[str, Tensor]) -> None:
    """Put weights with their zeros into a store, in place of those without; those themselves are not written."""
    for name, mask in masks.items():
        weight = store.get(name)
        if isinstance(weight, Tensor):
            value = weight.detach() * mask
            new = nn.Parameter(value, requires_grad=weight.requires_grad) if isinstance(weight, nn.Parameter) else value
            store.put(name, new, persistent=store.is_persistent(name))


def edits(masks: Mapping[Sparse, Tensor], slices: Sequence[Slice] = ()) -> list[Sparsify]:
    """What masks come to, for the Plan; slices: what else is cut of the weights."""
    found = []
    for weight, mask in masks.items():
        for cut in slices:
            if cut.fqn == weight.fqn:
                mask = mask.index_select(cut.dim, cut.kept.to(mask.device))
        zeros = mask.numel() - int(mask.count_nonzero())
        found.append(Sparsify(fqn=weight.fqn, pattern=str(weight.pattern), zeros=zeros, total=mask.numel()))
    return found


class SparseCourse(MaskCourse[SparseRule]):
    """Of sparse pruning in training: to finish, `masks()` are those of this moment."""

    PART = "weight"

    def __init__(self, program: Program, rules: Sequence[SparseRule]) -> None:
        taken = selected(program, rules)
        super().__init__(program.store, rules)
        self.weights = {rule: tuple(own) for rule, own in taken.items()}
        for rule, own in self.weights.items():
            for weight in own:
                self._place(rule, weight)

    def _place(self, rule: SparseRule, weight: Sparse) -> None:
        tensor = self.weight(weight)
        units = weight.units(tensor)
        if weight.learned:
            grid = weight.pattern.grid(units)
            self.store.put(weight("score"), nn.Parameter(torch.zeros_like(grid)))
            stay = torch.tensor(grid.shape[-1], device=tensor.device)
            self.store.put(weight("stay"), stay, persistent=False)
            return
        self.store.put(weight("mask"), torch.ones_like(tensor, dtype=torch.bool))
        if rule.score == "snip_momentum":
            self.store.put(weight("worth"), torch.zeros_like(units))

    def weight(self, weight: Sparse) -> Tensor:
        """The stored weight itself."""
        return self._tensor(weight.fqn)

    def _tensor(self, name: str) -> Tensor:
        value = self.store.get(name)
        assert isinstance(value, Tensor), f"{name} is not stored"
        return value

    def kind(self, rule: SparseRule) -> str:
        """What a rule prunes."""
        return f"numbers ({rule.pattern})"

    def parts(self, rule: SparseRule) -> int:
        """How many weights it has."""
        return len(self.weights[rule])

    def counts(self, rule: SparseRule) -> tuple[int, int]:
        """(how many numbers stay now, of how many)."""
        own = self.weights[rule]
        return sum(int(self.mask(w).sum()) for w in own), sum(self.weight(w).numel() for w in own)

    def gather(self, rule: SparseRule) -> None:
        """snip_momentum: S <- 0.9 S + |w g|."""
        for weight in self.weights[rule] if rule.score == "snip_momentum" else ():
            tensor = self.weight(weight)
            if tensor.grad is not None:
                product = weight.pattern.units(weight.matrix(tensor.detach() * tensor.grad).float().abs())
                self._tensor(weight("worth")).mul_(MOMENTUM).add_(product)

    def choose(self, rule: SparseRule, part: float) -> None:
        """Choose and write its masks at a part of its pruning."""
        own = self.weights[rule]
        if rule.score == "movement":
            for weight in own:
                stay, score = self._learnt(weight)
                stay.fill_(weight.pattern.stay(score.shape[-1], rule.ratio * part))
            return
        units = [self._units(rule, weight) for weight in own]
        if part and rule.score == "snip_momentum" and not any(bool(u.any()) for u in units):
            raise no_gradients(rule.score, self.step)
        for weight, mask in zip(own, masks_of(rule, own, units, part), strict=True):
            self._tensor(weight("mask")).copy_(weight.mask(mask, self.weight(weight)))

    def _units(self, rule: SparseRule, weight: Sparse) -> Tensor:
        return weight.units(self.weight(weight)) if rule.score == "l1" else self._tensor(weight("worth"))

    def mask(self, weight: Sparse) -> Tensor:
        """bool, in the weight's shape: what stays now."""
        if not weight.learned:
            return self._tensor(weight("mask"))
        stay, score = self._learnt(weight)
        tensor = self.weight(weight)
        return weight.mask((KEEP_TOP(score.detach(), stay) > 0.5).reshape(weight.units(tensor).shape), tensor)

    def masks(self) -> dict[Sparse, Tensor]:
        """Of all weights."""
        return {weight: self.mask(weight) for own in self.weights.values() for weight in own}

    def names(self) -> set[str]:
        """All names under which training may keep tensors for this."""
        return {weight(part) for own in self.weights.values() for weight in own for part in PARTS}

    def learned(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What learned masks go by, in the store, by the name of the count: (how many stay, scores (rows, n))."""
        weights = [weight for own in self.weights.values() for weight in own if weight.learned]
        return {weight("stay"): self._learnt(weight) for weight in weights}

    def _learnt(self, weight: Sparse) -> tuple[Tensor, Tensor]:
        return self._tensor(weight("stay")), self._tensor(weight("score"))


def sparsified(program: Program, course: SparseCourse) -> Program:
    """Mask every weight of the course, in place."""
    by_name = {weight.fqn: weight for own in course.weights.values() for weight in own}
    for node in [n for n in program.graph.nodes if program.tensor_of(n) in by_name]:
        weight, readers, anchor = by_name[str(node.target)], list(node.users), node.next
        last = node
        while len(readers) == 1 and MASKED in readers[0].meta:  # structured masks come first
            last, anchor, readers = readers[0], readers[0].next, list(readers[0].users)
        mask = _mask_node(program, weight, last, anchor)
        product = program.emit_alike(aten.mul.Tensor, last, mask, like=anchor)
        product.meta[MASKED] = True
        for user in readers:
            user.replace_input_with(last, product)
    return program


def _mask_node(program: Program, weight: Sparse, x: fx.Node, before: fx.Node) -> fx.Node:
    if not weight.learned:
        return program.get_attr(weight("mask"), before)
    score, stay = (program.get_attr(weight(part), before) for part in ("score", "stay"))
    mask = program.emit_alike(KEEP_TOP.overload, score, stay, like=before)
    tensor = program.store.get(weight.fqn)
    assert isinstance(tensor, Tensor)
    mask = program.emit(aten.reshape.default, mask, list(weight.units(tensor).shape), like=before)
    if weight.pattern.kind == "block":
        for dim, n in enumerate((weight.pattern.n, weight.pattern.m)):
            mask = program.emit(aten.repeat_interleave.self_int, mask, n, dim, like=before)
    shape, dtype = list(value_of(x).shape), value_of(x).dtype
    if value_of(mask).dtype != dtype:
        mask = program.emit(aten.to.dtype, mask, dtype, like=before)
    if len(shape) > 2:
        mask = program.emit(aten.reshape.default, mask, [shape[0], *shape[2:], shape[1]], like=before)
        return program.emit(aten.movedim.int, mask, -1, 1, like=before)
    return program.emit(aten.t.default, mask, like=before) if weight.transposed else mask
