"""Where every group of a model in training is on its way to its final width, and the masks that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...runtime.plan import Slice
from ...runtime.store import Store
from .axes import Atom
from .decide import PruneRule, choose
from .gates import Gate
from .groups import Group
from .keep import Kept, count
from .masks import PARTS, MaskCourse, no_gradients
from .score import NOTHING, WITH_GRADIENT, Evidence, score
from .slices import slices_of
from .walk import Walk


class PruneCourse(MaskCourse[PruneRule]):
    """Of structured pruning: to finish, `slices()` are the cuts at this moment."""

    PART, WINDOW = "group", 16

    def __init__(self, walk: Walk, groups: Mapping[PruneRule, Sequence[Group]], evidence: Evidence = NOTHING) -> None:
        super().__init__(walk.program.store, (rule for rule, own in groups.items() if own))
        self.evidence = evidence
        self.walk = walk.on(walk.program.copy())  # the graph itself is about to be masked
        self.groups = {rule: tuple(groups[rule]) for rule in self.rules}
        self.gates = {
            group.leaf: Gate.of(walk, group, learned=rule.score == "movement")
            for rule, own in self.groups.items()
            for group in own
        }
        for gate in self.gates.values():
            gate.place_in(self.store)
        for rule, own in self.groups.items():
            for group in own if rule.score in WITH_GRADIENT else ():
                self.store.put(self.gates[group.leaf]("worth"), torch.zeros(group.size, dtype=torch.float64))

    def kind(self, rule: PruneRule) -> str:
        """What a rule prunes: "heads, rows"."""
        return ", ".join(dict.fromkeys(group.kind for group in self.groups[rule]))

    def parts(self, rule: PruneRule) -> int:
        """How many groups it has."""
        return len(self.groups[rule])

    def counts(self, rule: PruneRule) -> tuple[int, int]:
        """(how many indices stay now, of how many)."""
        groups = self.groups[rule]
        return sum(int(self.gates[g.leaf].kept(self.store).sum()) for g in groups), sum(g.size for g in groups)

    def gather(self, rule: PruneRule) -> None:
        """Add what this step's gradients say an index is worth, where the score goes by gradients."""
        if rule.score not in WITH_GRADIENT:
            return
        held = {cut.name: self.store.get(cut.name) for group in self.groups[rule] for cut in group.cuts}
        tensors = {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}
        if all(tensor.grad is None for tensor in tensors.values()):
            return
        # What is frozen, or of no use to the loss, changes nothing about it.
        gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items()}
        for group in self.groups[rule]:
            worth = self._worth(group)
            worth += score(self.walk, group, rule.score, Evidence({rule.score: gradients})).to(worth.device)

    def choose(self, rule: PruneRule, part: float) -> None:
        """Choose and write its masks at a part of its pruning."""
        groups = self.groups[rule]
        kept = choose(self.walk, rule, groups, self._scores(rule, groups), part) if part else {}
        for group in groups:
            mask = kept.get(group.leaf, torch.ones(group.size, dtype=torch.bool))
            self.gates[group.leaf].set(self.store, mask)

    def _scores(self, rule: PruneRule, groups: Sequence[Group]) -> dict[Atom, Tensor]:
        if rule.score == "movement":
            return {g.leaf: self.gates[g.leaf].learnt(self.store)[1].detach().double().cpu() for g in groups}
        if rule.score not in WITH_GRADIENT:
            return {g.leaf: score(self.walk, g, rule.score, self.evidence, rule.seed) for g in groups}
        found = {}
        for group in groups:
            worth = self._worth(group)
            if not bool(worth.any()):
                raise no_gradients(rule.score, self.step)
            found[group.leaf] = worth.clone().cpu()
            worth.zero_()
        return found

    def _worth(self, group: Group) -> Tensor:
        value = self.store.get(self.gates[group.leaf]("worth"))
        assert isinstance(value, Tensor)
        return value

    def kept(self) -> dict[Atom, Tensor]:
        """What stays now of each leaf that loses something, in the graph that was analysed."""
        masks = {leaf: gate.kept(self.store) for leaf, gate in self.gates.items()}
        return {leaf: mask for leaf, mask in masks.items() if not bool(mask.all())}

    def slices(self) -> list[Slice]:
        """The cuts at this moment."""
        return slices_of(self.walk, self.kept())

    def shape(self, fqn: str, kept: Kept) -> list[int] | None:
        """The shape that a stored tensor would have, were it sliced; None for one that the graph does not read."""
        axes = self.walk.stored.get(fqn)
        return None if axes is None else [count(axis, kept) for axis in axes]

    def cuts(self) -> dict[str, set[int]]:
        """By stored name, the dimensions of which something may go."""
        found: dict[str, set[int]] = {}
        for cut in (cut for groups in self.groups.values() for group in groups for cut in group.cuts):
            found.setdefault(cut.name, set()).add(cut.dim)
        return found

    def names(self) -> set[str]:
        """All names under which training may keep tensors for this."""
        return {gate(part) for gate in self.gates.values() for part in PARTS}

    def learned(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What learned masks go by, in the store, by the name of the count: (how many stay, scores (n,))."""
        return {gate("stay"): gate.learnt(self.store) for gate in self.gates.values() if gate.learned}

    def on(self, store: Store) -> PruneCourse:
        """The same course, to go on by itself on a copy of this one's store."""
        other = super().on(store)
        other.walk = self.walk.on(self.walk.program.copy(store))
        return other
