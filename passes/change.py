"""How much what a model gives has changed: sums over batches, and the number that they come to.

output  |y' - y|_2 / |y|_2                    over all floating-point outputs but the loss, and without padding
logits  E_t KL( softmax y_t || softmax y'_t ) over tokens t that are no padding, or that have labels
loss    E (loss' - loss)                      over batches
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..runtime.errors import CalibrationError
from ..runtime.program import Program, is_float
from .depth import Measure
from .distill import divergences
from .outputs import given, names
from .tokens import counted, mask_of, tokens

Sums = tuple[float, float]
"""What is added up over batches, and what it is divided by."""


class Change:
    """One measure for the graphs of one model. Raises CalibrationError where its output has nothing to measure."""

    def __init__(self, program: Program, measure: Measure) -> None:
        self.measure = measure
        values, called = given(program), names(program.contract.output)
        floats = [i for i, value in enumerate(values) if is_float(value)]
        self.places = [i for i in floats if (called[i] == "loss") == (measure == "loss")]
        if measure == "logits":
            self.places = [i for i in floats if called[i] == "logits"] or (self.places if len(self.places) == 1 else [])
        if not self.places:
            wants = {
                "loss": "an output with a loss, and labels in inputs= and data=",
                "logits": "an output with logits",
            }
            raise CalibrationError(
                f"the change of the {measure} cannot be measured",
                required=wants.get(measure, "an output of floating-point numbers"),
                found=", ".join(dict.fromkeys(filter(None, called))) or f"{len(values)} outputs without names",
                cure="measure the change of the output" if measure != "output" else None,
            )
        decodes = [not called[i].startswith("encoder") for i in self.places]
        self._masks = [mask_of(program, values[i], decodes=d) for i, d in zip(self.places, decodes, strict=True)]
        inputs = [spec.name for spec in program.contract.inputs]
        self._labels = inputs.index("labels") if "labels" in inputs else None

    def wanted(self, program: Program) -> list[fx.Node]:
        """The outputs that count."""
        values = given(program)
        return [values[i] for i in self.places]

    def sums(self, batch: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor]) -> Sums:
        """Of one batch of flat inputs: the outputs that count, of the whole model and of the other."""
        if self.measure == "loss":
            return float(after[0]) - float(before[0]), 1.0
        if self.measure == "logits":
            return self._divergence(batch, before[0], after[0])
        error = norm = 0.0
        for a, b, mask in zip(before, after, self._masks, strict=True):
            if mask is not None:
                a, b = (tokens(t, batch[mask]) for t in (a, b))
            finite = a.isfinite()  # masked logits may be infinite
            a, b = a[finite].float(), b[finite].float()
            error += float((a - b).square().sum(dtype=torch.float64))
            norm += float(a.square().sum(dtype=torch.float64))
        return error, norm

    def _divergence(self, batch: Sequence[Tensor], before: Tensor, after: Tensor) -> Sums:
        labels, mask = (None if place is None else batch[place] for place in (self._labels, self._masks[0]))
        kept = counted(before.shape[:-1], labels, mask)
        each = divergences(tokens(after, kept), tokens(before, kept))  # (tokens,)
        return float(each.sum(dtype=torch.float64)), float(len(each))

    def of(self, sums: Sequence[Sums]) -> float:
        """The measure over all batches; infinite where something is no longer finite."""
        over, under = sum(found[0] for found in sums), sum(found[1] for found in sums)
        if not math.isfinite(under) or (not under and self.measure != "output"):
            raise CalibrationError(
                f"the change of the {self.measure} cannot be measured on the calibration data",
                required="finite outputs, and tokens that are no padding",
                found="none" if not under else "an output that is not finite",
            )
        if not math.isfinite(over):
            return math.inf
        if self.measure == "output":
            return math.sqrt(over / under) if under else math.sqrt(over)
        return over / under
