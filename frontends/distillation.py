"""What passes between a teacher and its student in one batch: what is compared, and what it counts for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..passes.distill import divergence, kept_positions, kept_states, logits_of, scores_apart, states_apart, task_loss
from ..runtime.errors import DistillationError
from ..runtime.program import Program
from ..runtime.store import Store
from ..runtime.structure import rebuild
from .distill_settings import PARTS, DistillSettings, StageSettings
from .inputs import flat_batches
from .pairs import Pair
from .tapping import Tapping
from .teacher import Teacher

PROJECTIONS = "distillation_projections"


@dataclass(frozen=True)
class Compared:
    """One batch: both outputs, and by pair what was seen within; a teacher's values have no gradient."""

    output: Any
    taught: Any
    within: tuple[tuple[Pair, Tensor, Tensor], ...] = ()


@dataclass
class Distillation:
    """A student's teacher, and what of it counts when.

    pairs: what is compared within; stages: as the recipe has them; store: the student's, which holds projections
    """

    teacher: Teacher
    settings: DistillSettings
    store: Store
    stages: tuple[StageSettings, ...] = (StageSettings(),)
    pairs: tuple[Pair, ...] = ()
    projections: dict[tuple[int, int], str] = field(default_factory=dict)

    def loss(self, student: Tapping, call: Callable[..., Any], batch: Mapping[str, Any], step: int) -> Tensor:
        """The student's loss on `batch` at optimizer step `step`. Raises DistillationError where there is none."""
        weights = self.settings.weights(step, self.stages)
        return self.total(self.compare(student, call, batch, weights), batch, weights)

    def compare(
        self, student: Tapping, call: Callable[..., Any], batch: Mapping[str, Any], weights: Mapping[str, float]
    ) -> Compared:
        """Ask both, for what has a weight alone."""
        pairs = [pair for pair in self.pairs if weights[pair.part] * pair.weight > 0]
        with student.tapping([pair.student for pair in pairs]) as seen:
            output = call(**batch)
        if not pairs and weights["logits"] == 0:
            return Compared(output, None)
        taught, shown = self.teacher.ask(batch, [pair.teacher for pair in pairs])
        return Compared(output, taught, tuple(zip(pairs, seen, shown, strict=True)))

    def total(self, compared: Compared, batch: Mapping[str, Any], weights: Mapping[str, float]) -> Tensor:
        """What was compared, weighed and summed."""
        terms, own = list[Tensor](), task_loss(compared.output)
        if own is None and self.settings.kd_until is not None:
            raise DistillationError(
                f"from step {self.settings.kd_until} on the task's loss is alone",
                required="labels in every batch, of a model that computes its loss",
                found=", ".join(batch),
                cure="give labels, or leave kd_until out",
            )
        if own is not None and weights["task"] > 0:
            terms.append(weights["task"] * own)
        if weights["logits"] > 0:
            logits, taught = logits_of(compared.output), logits_of(compared.taught)
            kept = kept_positions(logits, batch)
            terms.append(weights["logits"] * divergence(logits, taught, self.settings.temperature, kept))
        for pair, s, t in compared.within:
            terms.append(weights[pair.part] * pair.weight * self._apart(pair, s, t, batch))
        if not terms:
            raise DistillationError(
                "nothing of the loss counts for this batch",
                required="labels in the batch of a model that computes its loss, or a part of the teacher's",
                found=", ".join(f"{part} {weights[part]:g}" for part in PARTS),
                cure="give labels, or a weight to logits, hidden, scores or taps",
            )
        return torch.stack([term.float() for term in terms]).sum() if len(terms) > 1 else terms[0]

    def _apart(self, pair: Pair, s: Tensor, t: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if pair.part == "scores":
            return scores_apart(s, t, kept_states(s.shape[::2][:2], batch, pair.decodes))
        name = self.projections.get((s.shape[-1], t.shape[-1]))
        if name is not None:
            weight = self.store.get(name)
            assert isinstance(weight, Tensor)
            s = F.linear(s, weight.to(s.dtype))
        return states_apart(s, t, pair.loss, kept_states(s.shape[:-1], batch, pair.decodes))

    def names(self) -> set[str]:
        """What it keeps in the student's store."""
        return set(self.projections.values())

    def begin(self, student: Tapping, program: Program, batch: Mapping[str, Any]) -> None:
        """Ask both for the first time, by this variant; what does not fit is said now. Raises DistillationError."""
        (tensors,) = flat_batches(program, student.signature, [batch])
        with torch.no_grad(), program.unwritten(), student.tapping([pair.student for pair in self.pairs]) as seen:
            # Not by a call: ranges that training has yet to observe are no matter, shapes alone are.
            output = rebuild(program.contract.output, Tapping._run(student, program, tensors))
        taught, shown = self.teacher.ask(batch, [pair.teacher for pair in self.pairs])
        own, its = _logits_or_none(output), _logits_or_none(taught)
        if self.settings.logits and own is not None and its is not None:
            divergence(own, its)
        for pair, s, t in zip(self.pairs, seen, shown, strict=True):
            self._fit(pair, s, t)

    def _fit(self, pair: Pair, s: Tensor, t: Tensor) -> None:
        """Equal shapes, or a projection from the student's width to the teacher's."""
        if s.shape == t.shape:
            return
        if pair.part == "scores" or s.shape[:-1] != t.shape[:-1]:
            raise DistillationError(
                f"{pair.student} of the student and {pair.teacher} of the teacher have different shapes",
                required=tuple(t.shape),
                found=tuple(s.shape),
                cure="compare hidden states, which may differ in width" if pair.part == "scores" else None,
            )
        widths = s.shape[-1], t.shape[-1]
        if widths not in self.projections:
            weight = s.new_empty(widths[1], widths[0], device="cpu", dtype=torch.float32)
            nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(0))
            name = f"{PROJECTIONS}.from_{widths[0]}_to_{widths[1]}"
            self.store.put(name, nn.Parameter(weight.to(s)))
            self.projections[widths] = name


def _logits_or_none(output: Any) -> Tensor | None:
    try:
        return logits_of(output)
    except DistillationError:
        return None
