"""Where every weight and activation of a model in training is on its schedule, and the store that shows it.

    after each optimizer step     course.advance(factors)       schedules move, buffers are written
    to finish                     course.plan()                 the Plan at the precision of this moment

All of it is plain data and comes back from `to_json`, so that a resumed run goes on bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...runtime import numerics
from ...runtime.errors import ScheduleError
from ...runtime.plan import Plan, Quantize
from ...runtime.scheme import Scheme
from ...runtime.store import Store
from ..schedule import FULL, Held, Precision
from .decide import Pace
from .live import Gauge

WIDEST = 8  # bits that a finished weight can have


@dataclass(frozen=True)
class Drop:
    """A weight, or the activation that meets it, changed its bits after `step` steps."""

    step: int
    fqn: str
    before: int
    after: int
    of_input: bool = False

    def __str__(self) -> str:
        what = f"input of {self.fqn}" if self.of_input else self.fqn
        return f"step {self.step}: {what}: {_spoken(self.before)} -> {_spoken(self.after)}"


class Course:
    """Invariant: the store's gauges show `weights` and `inputs`, and keys that belong to `step`."""

    def __init__(self, store: Store, edits: Iterable[Quantize], paces: Mapping[str, Pace], seed: int) -> None:
        self.store, self.seed, self.step = store, seed, 0
        self.edits = tuple(edits)
        self.paces = {edit.fqn: paces.get(edit.fqn, Pace()) for edit in self.edits}
        self.targets = {edit.fqn: edit.weight for edit in self.edits}
        self.meets = {edit.fqn: edit.activation for edit in self.edits if edit.activation is not None}
        self.weights = {fqn: self.paces[fqn].weight.begin(scheme.bits) for fqn, scheme in self.targets.items()}
        self.inputs = {fqn: self.paces[fqn].activation.begin(scheme.bits) for fqn, scheme in self.meets.items()}
        for edit in self.edits:
            self._place(edit)
        self.write()

    def _place(self, edit: Quantize) -> None:
        weight = self.store.get(edit.fqn)
        assert isinstance(weight, Tensor)
        Gauge(edit.fqn).place(self.store, weight.device)
        if edit.activation is not None:
            Gauge(edit.fqn, of_input=True).place(self.store, weight.device)

    def on(self, store: Store) -> Course:
        """The same course, to go on by itself on a copy of this one's store."""
        other = copy.copy(self)
        other.store, other.weights, other.inputs = store, dict(self.weights), dict(self.inputs)
        return other

    def advance(self, factors: Mapping[str, int] | None = None) -> list[Drop]:
        """One optimizer step is done. factors: MoQ's stretching of the period, by weight."""
        self.step += 1
        drops = []
        for fqn, now in self.weights.items():
            pace, target = self.paces[fqn].weight, self.targets[fqn]
            drops += self._set(fqn, pace.advance(now, target.bits, self.step, (factors or {}).get(fqn, 1)))
        for fqn, now in self.inputs.items():
            after = self.paces[fqn].activation.advance(now, self.meets[fqn].bits, self.step)
            if after.bits != now.bits:
                drops.append(Drop(self.step, fqn, now.bits, after.bits, of_input=True))
            self.inputs[fqn] = after
        self.write()
        return drops

    def falls_next(self) -> bool:
        """Whether the next step takes a bit from some weight."""
        return any(
            self.paces[fqn].weight.advance(now, self.targets[fqn].bits, self.step + 1).bits < now.bits < FULL
            for fqn, now in self.weights.items()
        )

    def change(self, fqn: str, by: int) -> list[Drop]:
        """Give or take bits of one weight, within its start and target; a controller's move."""
        now = self.weights[fqn]
        drops = self._set(fqn, replace(now, bits=now.bits + by, dropped=self.step))
        Gauge(fqn).set(self.store, self.targets[fqn], self.weights[fqn])
        return drops

    def _set(self, fqn: str, after: Precision) -> list[Drop]:
        before, self.weights[fqn] = self.weights[fqn], after
        return [Drop(self.step, fqn, before.bits, after.bits)] if before.bits != after.bits else []

    def write(self) -> None:
        """Show the state in the store."""
        for fqn, target in self.targets.items():
            gauge = Gauge(fqn)
            gauge.set(self.store, target, self.weights[fqn])
            if target.rounding == "stochastic":
                with torch.no_grad():
                    gauge.tensor(self.store, "key").fill_(numerics.stochastic_key(self.seed, self.step, fqn))
        for fqn, target in self.meets.items():
            Gauge(fqn, of_input=True).set(self.store, target, self.inputs[fqn])

    def require_shown(self) -> None:
        """Raise ScheduleError where the store shows another precision, as one does that buffers were copied into."""
        gauges = [(Gauge(fqn), target, self.weights[fqn]) for fqn, target in self.targets.items()]
        gauges += [(Gauge(fqn, of_input=True), target, self.inputs[fqn]) for fqn, target in self.meets.items()]
        for gauge, target, now in gauges:
            shown = int(gauge.tensor(self.store, "qmax"))
            if shown != gauge.levels(target, now):
                raise ScheduleError(
                    f"{gauge.fqn} is simulated at another precision than its schedule has",
                    required=f"codes up to {gauge.levels(target, now)}",
                    found=f"up to {shown}, in buffers that something else has written",
                    cure="where this is an average of another student's weights: "
                    "average.module.set_extra_state(student.get_extra_state())",
                )

    def unsettled(self) -> list[str]:
        """Weights whose schedule is not over, or whose activation is not quantised yet."""
        return [
            fqn
            for fqn, now in self.weights.items()
            if not self.paces[fqn].weight.settled(now, self.targets[fqn].bits)
            or (fqn in self.inputs and self.inputs[fqn].bits == FULL)
        ]

    def require_settled(self, cure: str) -> None:
        """Raise ScheduleError where a schedule is not over; `cure`: what the caller offers then."""
        left = self.unsettled()
        if left:
            raise ScheduleError(
                f"{len(left)} of {len(self.weights)} weights are not at the end of their schedule",
                required="every weight at its target, and every activation quantised",
                found=f"{self.average_bits():.2f} bits on average after {self.step} steps: "
                + ", ".join(left[:3])
                + (" ..." if len(left) > 3 else ""),
                cure=cure,
            )

    def scheme(self, fqn: str) -> Scheme | None:
        """The scheme of a weight as it is now; None while it is in full precision, or wider than can be packed."""
        bits = self.weights[fqn].bits
        return self.targets[fqn].at(bits) if bits <= WIDEST else None

    def plan(self) -> Plan:
        """The edits at the precision of this moment; weights that cannot be packed are left out."""
        edits = []
        for edit in self.edits:
            scheme = self.scheme(edit.fqn)
            if scheme is not None:
                off = edit.activation is not None and self.inputs[edit.fqn].bits == FULL
                now = replace(edit, weight=scheme)
                edits.append(now.without_activation() if off else now)
        return Plan(tuple(edits))

    def average_bits(self) -> float:
        """Over the elements of all weights."""
        sizes = {fqn: self.elements(fqn) for fqn in self.weights}
        return sum(self.weights[fqn].bits * n for fqn, n in sizes.items()) / max(sum(sizes.values()), 1)

    def elements(self, fqn: str) -> int:
        """Of one weight."""
        weight = self.store.get(fqn)
        assert isinstance(weight, Tensor)
        return weight.numel()

    def held(self) -> list[str]:
        """Weights that a controller lowers, and that have begun."""
        return [
            fqn for fqn, now in self.weights.items() if isinstance(self.paces[fqn].weight, Held) and now.bits != FULL
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "step": self.step,
            "weights": {fqn: asdict(now) for fqn, now in self.weights.items()},
            "inputs": {fqn: asdict(now) for fqn, now in self.inputs.items()},
        }

    def require_same(self, data: Mapping[str, Any]) -> None:
        """Raise ScheduleError where what `to_json` gave is another model's."""
        for name, own in (("weights", self.weights), ("inputs", self.inputs)):
            if set(data[name]) != set(own):
                odd = sorted(set(data[name]) ^ set(own))
                raise ScheduleError(
                    "the saved schedule is of another model or recipe",
                    required=f"the same {len(own)} quantised {name}",
                    found=f"a difference in {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}",
                    cure="prepare the model with the recipe of the run that is resumed",
                )

    def load_json(self, data: Mapping[str, Any]) -> None:
        """Inverse of `to_json`, of a state that `require_same` has passed."""
        self.step = data["step"]
        self.weights = {fqn: Precision(**now) for fqn, now in data["weights"].items()}
        self.inputs = {fqn: Precision(**now) for fqn, now in data["inputs"].items()}
        self._show()

    def _show(self) -> None:
        """Write a state that was loaded: learned scales come with it and are not stretched."""
        for fqn in self.targets:
            step = self.store.get(Gauge(fqn)("step"))
            kept = step.detach().clone() if isinstance(step, Tensor) else None
            Gauge(fqn).set(self.store, self.targets[fqn], self.weights[fqn])
            if isinstance(step, Tensor) and kept is not None:
                with torch.no_grad():
                    step.copy_(kept)
        self.write()


def _spoken(bits: int) -> str:
    return "float" if bits == FULL else f"{bits} bits"
