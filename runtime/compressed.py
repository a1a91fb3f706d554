"""The finished model: runs, saves, exports, and says what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from .certificate import Certificate
from .contract import Key, Signature
from .errors import DwindleError
from .gradient import differentiable
from .model import GraphModel, Grow
from .ops.operator import wants_gradient
from .plan import Plan
from .program import Entry, Program
from .report import Report
from .store import Store

Measure = Callable[["Compressed"], Mapping[str, Any]]


class Compressed(GraphModel):
    """A compressed model: call it as the original. Its inputs may have gradients.

    Weights are frozen where any is quantised or has zeros that were asked for; a model that is only pruned trains on,
    on tensors of its own.

    certificate: what it is; recipe: how it was made (plain data); log: every rewrite applied or declined
    measured: latency and other figures taken on some machine, by `report()`, and the course of training; they
        travel with the artifact
    """

    NOT_COPIED = (*GraphModel.NOT_COPIED, "_measure", "_differentiable")

    def __init__(
        self,
        store: Store,
        plan: Plan,
        signature: Signature,
        *,
        recipe: Mapping[str, Any],
        certificate: Certificate,
        log: tuple[Entry, ...] = (),
        measured: Mapping[str, Any] | None = None,
        measure: Measure | None = None,
        grow: Grow | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(store, plan, signature, grow=grow, attributes=attributes)
        self.recipe, self.certificate, self.log = dict(recipe), certificate, log
        self.measured: Mapping[str, Any] | None = measured
        self._measure = measure
        self._differentiable: dict[Key, Program] = {}
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As for any graph model."""
        other = super().__deepcopy__(memo)
        other._measure, other._differentiable = self._measure, {}
        return other

    def train(self, mode: bool = True) -> Self:
        """One that is only pruned trains on. Integers have no gradient, and zeros in weights would not stay zeros."""
        if mode and (self.plan.quantizations or self.plan.sparsities):
            raise DwindleError(
                "a compressed model cannot be trained",
                required="eval mode",
                found="train()",
                cure="student = dwindle.prepare(model, recipe), train the student, then student.finish()",
            )
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move to a device; another dtype is refused, since the operators give the one they were made for."""
        if self.plan.quantizations and fn(torch.zeros(1, dtype=self.dtype)).dtype is not self.dtype:
            raise DwindleError(
                "a compressed model keeps its dtype",
                required=self.dtype,
                found=fn(torch.zeros(1, dtype=self.dtype)).dtype,
                cure="dwindle.compress(model.to(dtype), recipe)",
            )
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _run(self, program: Program, tensors: Sequence[Tensor]) -> Any:
        """A call that wants the gradient of an input is served by a second form of the graph, made on first use."""
        if self.plan.quantizations and wants_gradient(*tensors):
            program = self._differentiable.get(program.contract.key) or self._made_differentiable(program)
        return program.module(*tensors)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def _made_differentiable(self, program: Program) -> Program:
        return self._differentiable.setdefault(program.contract.key, differentiable(program))

    def report(self) -> Report:
        """What was done and what it gained; measures latency on first use where the original is at hand."""
        if self._measure is not None and "latency" not in (self.measured or {}):
            self.measured = {**(self.measured or {}), **self._measure(self)}
        return Report(self.certificate, self.recipe, self.log, self.measured or {})

    def save(self, path: str | Path) -> Path:
        """Write an artifact folder that `dwindle.load` reads. Raises ArtifactError if `path` exists."""
        from .saving import save

        return save(self, Path(path))

    def export_onnx(self, path: str | Path, *, provider: str = "cpu", **options: Any) -> Path:
        """Write an ONNX model for one execution provider; see `runtime.onnx.export.export_onnx`."""
        from .onnx.export import export_onnx

        return export_onnx(self, Path(path), provider=provider, **options)
