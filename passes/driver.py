"""Runs passes and holds each to its promise.

After every pass: the graph lints, its code is regenerated, every get_attr names a tensor of the store, and the
program is run on the caller's inputs. An exact pass may not move an output bit; any other must keep outputs
finite where they were, and its error against the graph before it is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.errors import DwindleError, PassError
from ..runtime.model import flat_outputs
from ..runtime.program import Entry, Program
from .outputs import left_out
from .verify import Difference, difference

Transform = Callable[[Program], Program]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One step. exact: outputs stay bit-identical. limit: largest relative L2 error it may add, if any."""

    name: str
    run: Transform
    exact: bool = False
    limit: float | None = None


class Driver:
    """Applies passes to one program in order, verifying on `inputs` (flat tensors; None verifies structure only).

    captured, outputs: flat outputs of the program before the first pass and after the last; neither has what a pass
        has left out
    errors: by pass, the difference it made
    """

    def __init__(self, program: Program, inputs: Sequence[Tensor] | None) -> None:
        self.program, self.inputs = program, inputs
        self.ran: list[str] = []
        self.errors: dict[str, Difference] = {}
        self.captured = self.outputs = self._run("capture")

    def apply(self, *passes: Pass) -> Program:
        """Run each pass. Raises PassError naming what ran before; the store may then be half-edited."""
        for step in passes:
            try:
                self.program = step.run(self.program)
                self._check_structure()
            except DwindleError:
                raise
            except Exception as error:
                raise self._broken(step.name, f"{type(error).__name__}: {error}") from error
            self._verify(step)
            self.ran.append(step.name)
        return self.program

    def _verify(self, step: Pass) -> None:
        gone = left_out(self.program)
        if self.inputs is None:
            return
        self.captured = [t for i, t in enumerate(self.captured) if i not in gone]
        before = [t for i, t in enumerate(self.outputs) if i not in gone]
        after = self._run(step.name)
        if len(before) != len(after):
            raise self._broken(step.name, f"{len(before)} outputs became {len(after)}")
        delta = difference(before, after)
        self.errors[step.name] = delta
        self.outputs = after
        if step.exact and delta.largest != 0.0:
            raise self._broken(step.name, f"an exact pass moved an output by {delta.largest:.3g}")
        if math.isnan(delta.relative):
            raise self._broken(step.name, "an output is no longer finite")
        if step.limit is not None and delta.relative > step.limit:
            raise self._broken(step.name, f"relative error {delta.relative:.3g}, at most {step.limit:.3g} promised")
        self.program.log.append(
            Entry(stage=step.name, rule="driver.verified", reason=f"relative error {delta.relative:.3g}")
        )

    def _run(self, stage: str) -> list[Tensor]:
        if self.inputs is None:
            return []
        # A fixed seed makes dropout the same before and after a pass on a training variant.
        with torch.no_grad(), torch.random.fork_rng(devices=[]), self.program.unwritten():
            torch.manual_seed(0)
            try:
                return [t.clone() for t in flat_outputs(self.program.run([t.clone() for t in self.inputs]))]
            except DwindleError:
                raise
            except Exception as error:
                raise self._broken(stage, f"{type(error).__name__}: {error}") from error

    def _check_structure(self) -> None:
        self.program.module.recompile()
        self.program.graph.lint()

    def _broken(self, name: str, problem: str) -> PassError:
        before = ", ".join(self.ran) or "capture alone"
        return PassError(f"{name} failed after: {before}", found=problem, cure="report this with the model's config")
