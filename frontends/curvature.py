"""What a measurement of curvature found and cost, for people."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from ..passes.quantize.sensitivity import Sensitivity
from ..runtime.report import Printed


@dataclass(frozen=True)
class CurvatureTable(Printed):
    """One measurement by block. step_seconds: what a training step takes, where some were seen."""

    found: Sensitivity
    step_seconds: float | None = None

    @property
    def cost(self) -> str:
        """One line: products, seconds, and as how many training steps that is."""
        return self.found.cost + in_steps(self.found.seconds, self.step_seconds)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        eigen = self.found.measure == "eigenvalue"
        table = Table(title="Curvature by block", caption=self.cost)
        table.add_column("block", overflow="fold")
        for name in ("largest |eigenvalue|" if eigen else "trace / parameters", "of the largest", "period times"):
            table.add_column(name, justify="right")
        shares, factors = self.found.normalized(), self.found.factors()
        for name, block in self.found.blocks.items():
            value = f"{block.value:.3g}" if block.finite else "not finite"
            doubt = "" if block.converged or not block.finite else " (not settled)"
            table.add_row(name, value + doubt, f"{shares[name]:.2f}", str(factors[name]))
        yield table


def in_steps(seconds: float, step_seconds: float | None) -> str:
    """Seconds as training steps, "" where the time of a step is not known."""
    return "" if not step_seconds else f", as long as {seconds / step_seconds:.3g} training steps"
