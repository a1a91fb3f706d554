"""What to prune: rules over groups become the indices that stay, proven before they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...runtime.errors import PassError, RecipeError
from ...runtime.ops.keep_top import largest
from ...runtime.program import Entry
from ..schedule import AT_A_STROKE, Ramp
from ..selection import selected_by
from . import cost
from .axes import Atom
from .choose import Cost, Ratio, Scores, at_part, local, to_target
from .groups import KINDS, Group, Kind, find_groups
from .keep import Kept
from .latency import latency
from .named import LISTING, Names, Side, require_expected, require_names, require_one
from .proof import LIMIT, proven
from .score import NOTHING, Evidence, Method, score
from .walk import Walk

STAGE = "prune"
Target = Literal["params", "flops", "bytes", "latency"]


@dataclass(frozen=True, kw_only=True)
class PruneRule:
    """Which groups lose how much.

    ratio: of each group's indices, a pair for the first layer and the last; or target: of the whole model's params,
        flops, bytes or latency, what may be left
    budget: each group gives the ratio, or all together
    kinds: heads, rows, channels, hidden, experts
    modules: globs over the paths of the modules that a group cuts, "*" for all; patterns: regular expressions searched
        for in them as well; side: where a group cuts the modules that are named, and then each must have a group
    num_heads, related: what heads are expected to number, and modules to be cut too (regular expressions)
    section: of a configuration; no two of its patterns may choose one module, no two of its rules one group
    inner: also what lies inside another prunable atom, such as the size of a head
    multiple: of it widths are; least: groups with fewer indices stay
    ramp: when, in training
    """

    ratio: Ratio = 0.0
    target: tuple[Target, float] | None = None
    budget: Literal["layer", "network"] = "layer"
    kinds: tuple[Kind, ...] = KINDS
    modules: tuple[str, ...] = ("*",)
    patterns: tuple[str, ...] = ()
    side: Side = "any"
    num_heads: int | None = None
    related: tuple[str, ...] = ()
    section: str = ""
    score: Method = "l2"
    inner: bool = False
    multiple: int = 1
    least: int = 2
    seed: int = 0
    ramp: Ramp = AT_A_STROKE

    @property
    def whole(self) -> float:
        """The share that goes in the end."""
        if self.target is not None:
            return 1 - self.target[1]
        return max(self.ratio) if isinstance(self.ratio, tuple) else self.ratio

    def takes(self, group: Group) -> bool:
        """Whether a group is of the right kind and size."""
        return group.kind in self.kinds and (group.outermost or self.inner) and group.size >= self.least

    def selects(self, group: Group, names: Names) -> bool:
        """Whether a group is meant: every rule takes a group whole."""
        return self.takes(group) and selected_by(names.of(group, self.side), self.modules, self.patterns)


def selected(walk: Walk, rules: Sequence[PruneRule]) -> dict[PruneRule, list[Group]]:
    """The groups of each rule; the last rule that selects a group has it.

    Raises RecipeError for a rule that selects nothing, or whose groups are not what it says they are.
    """
    groups, names = find_groups(walk), Names.over(walk)
    require_names(names, rules, groups)
    meant: dict[PruneRule, list[Group]] = {rule: [] for rule in rules}
    taken: dict[PruneRule, list[Group]] = {rule: [] for rule in rules}
    for group in groups:
        own = [rule for rule in rules if not group.reason and rule.selects(group, names)]
        require_one(own, group)
        for rule in own:
            meant[rule].append(group)
        if own:
            taken[own[-1]].append(group)
    for rule in rules:
        if not taken[rule]:
            raise _nothing(rule, groups, names)
        require_expected(names, rule, meant[rule])
        _require_cuts(rule, taken[rule])
    return taken


def _require_cuts(rule: PruneRule, groups: Sequence[Group]) -> None:
    """Raise RecipeError for a ratio above 0 of which whole indices are none, anywhere."""
    if not rule.whole or rule.target is not None or rule.budget == "network":
        return
    alike = {g.leaf: torch.ones(g.size) for g in groups}
    if not local(groups, alike, rule.ratio, rule.multiple):
        grid = f" in widths that are multiples of {rule.multiple}" if rule.multiple > 1 else ""
        sizes = ", ".join(f"{g.size} {g.kind}" for g in groups[:3]) + (", ..." if len(groups) > 3 else "")
        raise RecipeError(
            "a pruning rule cuts nothing",
            required=f"a ratio that is at least one index of a group{grid}",
            found=f"ratio {rule.ratio} of groups of {sizes}",
            cure="raise the ratio, lower multiple, or leave the rule out",
        )


def choose(
    walk: Walk,
    rule: PruneRule,
    groups: Sequence[Group],
    scores: Scores,
    part: float = 1.0,
    inputs: Sequence[Tensor] | None = None,
) -> dict[Atom, Tensor]:
    """What is kept of each leaf that loses something, by the groups' scores.

    part: of the pruning, in training; inputs: flat example, for latency. Raises RecipeError for a target that cannot
    be met, and for latency without an example.
    """
    if rule.target is None and rule.budget == "network":
        return to_target(groups, scores, partial(_held, groups), 1 - rule.whole * part, rule.multiple)
    if rule.target is None:
        return local(groups, scores, at_part(rule.ratio, part), rule.multiple)
    measure, left = rule.target
    return to_target(groups, scores, _cost(walk, measure, inputs), 1 - (1 - left) * part, rule.multiple)


def chosen(
    walk: Walk, rules: Sequence[PruneRule], evidence: Evidence = NOTHING, inputs: Sequence[Tensor] | None = None
) -> dict[Atom, Tensor]:
    """What is kept of each leaf that loses something, for all rules. Raises RecipeError as `selected` does."""
    kept: dict[Atom, Tensor] = {}
    for rule, groups in selected(walk, rules).items():
        scores = {g.leaf: score(walk, g, rule.score, evidence, rule.seed) for g in groups}
        kept |= choose(walk, rule, groups, scores, inputs=inputs)
    return kept


def _held(groups: Sequence[Group], of: Kept) -> float:
    """Numbers in what stays of the groups."""
    return sum((int(of[g.leaf].sum()) if g.leaf in of else g.size) * g.elements for g in groups)


def _cost(walk: Walk, measure: Target, inputs: Sequence[Tensor] | None) -> Cost:
    if measure == "latency":
        if inputs is None:
            raise RecipeError(
                "latency is measured on a model that is cut, and one in training is not",
                required="a target of flops, params or bytes, or a ratio",
                found="a target of latency",
                cure="train with a ratio, and compress() for the latency afterwards",
            )
        return latency(walk, inputs)
    if measure == "flops":
        products = cost.products(walk)
        return lambda of: cost.flops(products, of)
    return (lambda of: cost.numbers(walk, of)) if measure == "params" else (lambda of: cost.nbytes(walk, of))


def _nothing(rule: PruneRule, groups: Sequence[Group], names: Names) -> RecipeError:
    meant = [group for group in groups if rule.selects(group, names)]
    if any(not group.reason for group in meant):
        return RecipeError(
            "a pruning rule has nothing left to prune",
            required="a group that no later rule selects",
            found="later rules select all that it does",
            cure="put the wider rule first, or leave one of them out",
        )
    reasons = sorted({f"{group.name}: {group.reason}" for group in meant if group.reason})
    found = sorted({group.kind for group in groups if not group.reason})
    wide = f" with {rule.least} indices or more" if rule.least > 2 else ""
    return RecipeError(
        "a pruning rule finds nothing to prune",
        required=f"groups of {', '.join(rule.kinds)}{wide} in modules {', '.join((*rule.modules, *rule.patterns))}",
        found="; ".join(reasons[:5]) or f"groups of {', '.join(found) or 'no kind'}",
        cure=LISTING,
    )


def accepted(walk: Walk, kept: Kept, batches: Sequence[Sequence[Tensor]]) -> dict[Atom, Tensor]:
    """Of what was chosen, all for which the masked graph equals the sliced one; the others are logged and stay.

    All are tried at once; where that fails halves are, so that one wrong group costs a few runs and not one each.
    """
    if not kept or proven(walk, kept, batches) <= LIMIT:
        return dict(kept)
    if len(kept) == 1:
        _decline(walk, kept, f"masked and sliced differ by {proven(walk, kept, batches):.2g}")
        return {}
    items = list(kept.items())
    middle = len(items) // 2
    halves = [accepted(walk, dict(part), batches) for part in (items[:middle], items[middle:])]
    both = {**halves[0], **halves[1]}
    if proven(walk, both, batches) <= LIMIT:
        return both
    smaller, larger = sorted(halves, key=len)
    _decline(walk, smaller, "right alone, but not together with others")
    return larger


def require_proven(walk: Walk, kept: Kept, batches: Sequence[Sequence[Tensor]]) -> None:
    """Raise PassError where the masked graph does not equal the sliced one."""
    error = proven(walk, kept, batches) if kept else 0.0
    if error > LIMIT:
        raise PassError(
            "what was masked in training is not what is cut",
            required=f"at most {LIMIT:.2g} between the masked and the sliced graph in float64",
            found=f"{error:.2g}",
            cure="report this with the model's config",
        )


def provable(
    walk: Walk, rules: Sequence[PruneRule], batches: Sequence[Sequence[Tensor]]
) -> dict[PruneRule, list[Group]]:
    """The groups of each rule that are right to cut, tried with a random half of each; for training to choose from.

    Raises RecipeError for a rule that selects nothing, or nothing that is right.
    """
    taken = selected(walk, rules)
    trial = {
        group.leaf: largest(score(walk, group, "random"), max(group.floor, group.size // 2))
        for groups in taken.values()
        for group in groups
    }
    right = accepted(walk, trial, batches)
    for rule, groups in taken.items():
        taken[rule] = [group for group in groups if group.leaf in right]
        if not taken[rule]:
            raise RecipeError(
                "a pruning rule finds nothing that can be cut",
                required=f"groups of {', '.join(rule.kinds)} whose masked graph equals the sliced one",
                found=f"none of {len(groups)}",
                cure="report this with the model's config",
            )
    return taken


def _decline(walk: Walk, kept: Kept, reason: str) -> None:
    for group in find_groups(walk):
        if group.leaf in kept:
            entry = Entry(stage=STAGE, rule="prune.proof", where=group.name, applied=False, reason=reason)
            walk.program.log.append(entry)
