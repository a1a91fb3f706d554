"""What pruning means to scales that are trained: those of cut channels go with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from ...runtime.errors import RecipeError
from ...runtime.plan import Plan
from ...runtime.program import Program
from .live import Gauge
from .sites import find_sites


def require_cuttable(
    program: Program, plan: Plan, cut: Iterable[str], shape: Callable[[str], Sequence[int] | None]
) -> None:
    """Raise RecipeError where a weight that pruning cuts has groups of columns that will not be whole, or not the same.

    cut: names of what is pruned; shape: what a stored tensor has in the end
    """
    names, transposed = set(cut), {site.fqn for site in find_sites(program) if site.transposed}
    for edit in plan.quantizations:
        scheme, left = edit.weight, shape(edit.fqn)
        if edit.fqn not in names or scheme.group_size is None or left is None:
            continue
        if edit.learned:
            raise RecipeError(
                f"{edit.fqn} is pruned, and its learned scales are of groups of its columns",
                required="a learned scale per channel or tensor",
                found=scheme.spell(),
                cure="leave out group_size, or learned",
            )
        columns = left[0] if edit.fqn in transposed else math.prod(left[1:])
        if columns % scheme.group_size:
            raise RecipeError(
                f"{edit.fqn} is pruned to a width that does not divide into its groups",
                required=f"a multiple of {scheme.group_size} columns",
                found=columns,
                cure=f"prune with multiple: {scheme.group_size}, or choose a group_size that divides the width",
            )


def slice_scales(program: Program, plan: Plan) -> None:
    """Take the learned scales of cut channels out of a program whose weights are cut."""
    learned = {edit.fqn for edit in plan.quantizations if edit.learned and edit.weight.granularity == "channel"}
    outer = {site.fqn: 1 if site.transposed else 0 for site in find_sites(program) if site.fqn in learned}
    for cut in plan.slices:
        if outer.get(cut.fqn) == cut.dim:
            step = Gauge(cut.fqn).tensor(program.store, "step").detach()
            program.store.put(Gauge(cut.fqn)("step"), nn.Parameter(step[cut.kept.to(step.device)]))
