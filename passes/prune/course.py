"""Where every group of a model in training is on its way to its final width, and the masks that show it.

    after each optimizer step     course.advance()        what is cut is chosen anew where a ramp says so
    to finish                     course.slices()         the cuts at this moment

What stays is chosen by the weights as they are then, cut ones too, so an index may come back while a ramp rises.
Scores that go by gradients are averaged over the last WINDOW steps before each choice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import ScheduleError
from ...runtime.plan import Slice
from ...runtime.store import Store
from .axes import Atom
from .decide import PruneRule, choose
from .gates import PARTS, Gate
from .groups import Group
from .keep import Kept, count
from .score import WITH_GRADIENT, score
from .slices import slices_of
from .walk import Walk

WINDOW = 16


@dataclass(frozen=True)
class Thinning:
    """What a rule's groups keep changed after `step` steps: `after` of `total` indices stay in `groups` groups."""

    step: int
    kind: str
    before: int
    after: int
    total: int
    groups: int

    def __str__(self) -> str:
        many = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"step {self.step}: {self.kind}: {self.before} -> {self.after} of {self.total} stay{many}"


class PruneCourse:
    """Invariant: the masks in the store are what was chosen at the last move that a ramp has made."""

    def __init__(self, walk: Walk, groups: Mapping[PruneRule, Sequence[Group]]) -> None:
        self.walk = walk.on(walk.program.copy())  # the graph itself is about to be masked
        self.store, self.step = walk.program.store, 0
        self.groups = {rule: tuple(own) for rule, own in groups.items() if own}
        self.gates = {
            group.leaf: Gate.of(walk, group, learned=rule.score == "movement")
            for rule, own in self.groups.items()
            for group in own
        }
        for gate in self.gates.values():
            gate.place_in(self.store)
        for rule in self.groups:
            for gate in self._gates(rule) if rule.score in WITH_GRADIENT else ():
                self.store.put(gate("worth"), torch.zeros(gate.size, dtype=torch.float64))

    def begin(self) -> list[Thinning]:
        """Before the first step: ramps without an offset move."""
        return self._move()

    def advance(self) -> list[Thinning]:
        """One optimizer step is done. Raises ScheduleError where a score wants gradients and there are none."""
        self.step += 1
        for rule in self.groups:
            ahead = rule.ramp.until_move(self.step)
            if rule.score in WITH_GRADIENT and ahead is not None and ahead < WINDOW:
                self._gather(rule)
        return self._move()

    def _move(self) -> list[Thinning]:
        found = []
        for rule, groups in self.groups.items():
            if rule.ramp.moves(self.step):
                before = self._staying(rule)
                self._choose(rule, groups)
                after = self._staying(rule)
                if after != before:
                    kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
                    total = sum(group.size for group in groups)
                    found.append(Thinning(self.step, kinds, before, after, total, len(groups)))
        return found

    def _choose(self, rule: PruneRule, groups: Sequence[Group]) -> None:
        part = rule.ramp.part(self.step)
        kept = choose(self.walk, rule, groups, self._scores(rule, groups), part) if part else {}
        for group in groups:
            mask = kept.get(group.leaf, torch.ones(group.size, dtype=torch.bool))
            self.gates[group.leaf].set(self.store, mask)

    def _scores(self, rule: PruneRule, groups: Sequence[Group]) -> dict[Atom, Tensor]:
        if rule.score == "movement":
            return {g.leaf: self._tensor(self.gates[g.leaf], "score").detach().double().cpu() for g in groups}
        if rule.score not in WITH_GRADIENT:
            return {g.leaf: score(self.walk, g, rule.score, seed=rule.seed) for g in groups}
        found = {}
        for group in groups:
            worth = self._tensor(self.gates[group.leaf], "worth")
            if not bool(worth.any()):
                raise ScheduleError(
                    f"pruning by {rule.score} goes by gradients, and there were none before step {self.step}",
                    required="step() before optimizer.zero_grad(), and an offset of at least 1",
                    found="none",
                )
            found[group.leaf] = worth.clone().cpu()
            worth.zero_()
        return found

    def _gather(self, rule: PruneRule) -> None:
        """Add what this step's gradients say an index is worth."""
        gradients = {
            cut.name: tensor.grad
            for group in self.groups[rule]
            for cut in group.cuts
            if isinstance(tensor := self.store.get(cut.name), Tensor) and tensor.grad is not None
        }
        if gradients:
            for group in self.groups[rule]:
                worth = self._tensor(self.gates[group.leaf], "worth")
                worth += score(self.walk, group, rule.score, gradients).to(worth.device)

    def _tensor(self, gate: Gate, part: str) -> Tensor:
        value = self.store.get(gate(part))
        assert isinstance(value, Tensor)
        return value

    def _gates(self, rule: PruneRule) -> Iterator[Gate]:
        return (self.gates[group.leaf] for group in self.groups[rule])

    def _staying(self, rule: PruneRule) -> int:
        return sum(int(gate.kept(self.store).sum()) for gate in self._gates(rule))

    def kept(self) -> dict[Atom, Tensor]:
        """What stays now of each leaf that loses something, in the graph that was analysed."""
        masks = {leaf: gate.kept(self.store) for leaf, gate in self.gates.items()}
        return {leaf: mask for leaf, mask in masks.items() if not bool(mask.all())}

    def slices(self) -> list[Slice]:
        """The cuts at this moment."""
        return slices_of(self.walk, self.kept())

    def shape(self, fqn: str, kept: Kept) -> list[int] | None:
        """The shape that a stored tensor would have, were it sliced; None for one that is not cut."""
        axes = self.walk.stored.get(fqn)
        return None if axes is None else [count(axis, kept) for axis in axes]

    def final_shape(self, fqn: str) -> list[int] | None:
        """The shape that a stored tensor will have at the end, as far as the weights of today tell."""
        final: dict[Atom, Tensor] = {}
        for rule, groups in self.groups.items():
            final |= choose(self.walk, rule, groups, {g.leaf: score(self.walk, g, "l2") for g in groups})
        return self.shape(fqn, final)

    def cut_names(self) -> set[str]:
        """The stored tensors of which something may go."""
        return {cut.name for groups in self.groups.values() for group in groups for cut in group.cuts}

    def names(self) -> set[str]:
        """All names under which training may keep tensors for this."""
        return {gate(part) for gate in self.gates.values() for part in PARTS}

    def describe(self, rule: PruneRule) -> str:
        """What a rule prunes, in words: "rows in 6 groups"."""
        groups = self.groups[rule]
        kinds = ", ".join(dict.fromkeys(group.kind for group in groups))
        return f"{kinds} in {len(groups)} group{'s' if len(groups) > 1 else ''}"

    def staying(self) -> list[tuple[str, int, int]]:
        """By rule: what it prunes, how many indices stay now, and of how many."""
        return [
            (self.describe(rule), self._staying(rule), sum(group.size for group in groups))
            for rule, groups in self.groups.items()
        ]

    def unsettled(self) -> list[PruneRule]:
        """Rules whose ramp is not at its end."""
        return [rule for rule in self.groups if self.step < rule.ramp.last]

    def require_settled(self) -> None:
        """Raise ScheduleError where a ramp is not at its end."""
        left = self.unsettled()
        if left:
            last = max(rule.ramp.last for rule in left)
            raise ScheduleError(
                "pruning is not at the end of its schedule",
                required=f"{last} steps",
                found=f"{self.step}, at which {self.describe(left[0])} are at {left[0].ramp.part(self.step):.0%}",
                cure="train on, shorten the schedule, or finish(early=True) with what is cut now",
            )

    def on(self, store: Store) -> PruneCourse:
        """The same course, to go on by itself on a copy of this one's store."""
        other = copy.copy(self)
        other.store, other.walk = store, self.walk.on(self.walk.program.copy(store))
        return other

    def to_json(self) -> dict[str, Any]:
        """Plain data; masks and scores are in the state_dict."""
        stays = {gate("stay"): int(self._tensor(gate, "stay")) for gate in self.gates.values() if gate.learned}
        return {"step": self.step, "gates": sorted(gate("mask") for gate in self.gates.values()), "stay": stays}

    def load_json(self, data: Mapping[str, Any]) -> None:
        """Inverse of `to_json`. Raises ScheduleError where it is another model's or recipe's."""
        if data["gates"] != self.to_json()["gates"]:
            raise ScheduleError(
                "the saved pruning is of another model or recipe",
                required="the same groups",
                found="others",
                cure="prepare the model with the recipe of the run that is resumed",
            )
        self.step = data["step"]
        with torch.no_grad():
            for gate in self.gates.values():
                if gate.learned:
                    self._tensor(gate, "stay").fill_(data["stay"][gate("stay")])
