"""What pruning means to scales that are trained: those of cut channels go with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ...runtime.errors import RecipeError
from ...runtime.plan import Plan
from ...runtime.program import Program
from .live import Gauge
from .sites import find_sites


def require_cuttable(program: Program, plan: Plan, cut: Mapping[str, Collection[int]]) -> None:
    """Raise RecipeError where scales would be others once a weight is cut than they are while it is masked.

    cut: by name of what is pruned, the dimensions that lose something
    """
    transposed = {site.fqn for site in find_sites(program) if site.transposed}
    for edit in plan.quantizations:
        scheme, dims = edit.weight, cut.get(edit.fqn, ())
        columns = [dim for dim in dims if dim != (1 if edit.fqn in transposed else 0)]
        if not columns and scheme.granularity != "tensor":
            continue
        if scheme.group_size is not None or scheme.kind in ("ternary", "binary"):
            raise RecipeError(
                f"{edit.fqn} is pruned, and its scales are of what would move or be averaged anew",
                required="weights of one scale a channel or tensor, that goes by the largest number",
                found=scheme.spell(),
                cure="leave out group_size, ternary and binary for what is pruned",
            )


def slice_scales(program: Program, plan: Plan) -> None:
    """Take the learned scales of cut channels out of a program whose weights are cut."""
    learned = {edit.fqn for edit in plan.quantizations if edit.learned and edit.weight.granularity == "channel"}
    outer = {site.fqn: 1 if site.transposed else 0 for site in find_sites(program) if site.fqn in learned}
    for cut in plan.slices:
        if outer.get(cut.fqn) == cut.dim:
            step = Gauge(cut.fqn).tensor(program.store, "step").detach()
            program.store.put(Gauge(cut.fqn)("step"), nn.Parameter(step[cut.kept.to(step.device)]))
