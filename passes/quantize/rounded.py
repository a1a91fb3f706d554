"""Rounds weights by the data that reaches them, layer after layer: where GPTQ and AWQ's clipping meet the graph.

    for each linear layer, in graph order:   H = X X^T of its input, with all layers before it already rounded
                                             W  ->  Q(W), with its scale (and zero point) beside it in the store

All in one forward pass over all batches (`stream`). Layers that read one value share its H. A weight that several
calls read is rounded at the last of them, for all their inputs together. Activations stay in floating point meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from ...runtime import numerics
from ...runtime.errors import CalibrationError
from ...runtime.plan import Plan, Quantize, weight_scale_name, weight_zero_name
from ...runtime.program import Entry, Program
from ...runtime.qtensor import QTensor
from ...runtime.store import Store
from ..progress import Advance
from ..stream import Stream, require_batches
from .clip import Rounded, clip, output_error
from .gptq import gptq, gram
from .sites import Site, find_sites, matrix

aten = torch.ops.aten
STAGE = "round"

# In `Store.forms`: a weight that is already what its codes say.
ROUNDED = "rounded"


def edits_by_data(plan: Plan) -> dict[str, Quantize]:
    """Edits whose codes go by data, by weight."""
    return {edit.fqn: edit for edit in plan.quantizations if edit.method != "nearest"}


def round_by_data(program: Program, plan: Plan, batches: Iterable[Sequence[Tensor]], advance: Advance) -> Program:
    """Put rounded weights, and their parameters, in place of the plan's weights whose method is not nearest."""
    edits, masked = edits_by_data(plan), plan.patterns
    sites = [site for site in find_sites(program) if site.fqn in edits and site.activation is not None]
    for site in sites:
        if site.transposed and len(site.weight.users) == 1:
            site.node.prepend(site.weight)  # read when it is wanted, and not before it is rounded
    left, waiting = Counter(site.fqn for site in sites), Counter(site.activation for site in sites)
    shared: dict[fx.Node, Tensor] = {}
    sums: dict[str, Tensor] = {}
    with Stream(program, require_batches(batches)) as stream:
        for done, site in enumerate(sites, 1):
            x = site.activation
            assert x is not None
            w = matrix(program, site)
            if x not in shared:
                shared[x] = gram(stream.values(x), w.shape[1], w.device)[0]
                _require_finite(shared[x], site)
            left[site.fqn] -= 1
            waiting[x] -= 1
            hessian = shared[x] if site.fqn not in sums else sums[site.fqn] + shared[x]
            if not waiting[x]:
                del shared[x]
            if left[site.fqn]:
                sums[site.fqn] = hessian
                continue
            sums.pop(site.fqn, None)
            edit = edits[site.fqn]
            keep = w != 0 if edit.fqn in masked else None
            found = _rounded(w, hessian, edit, keep)
            _put(program, site, found)
            program.log.append(_said(site, edit, w, found, hessian))
            advance(done, len(sites))
    return program


def replayed(program: Program, plan: Plan, target: Store) -> Program:
    """In a further variant: the codes that the first one found."""
    sites = {site.fqn: site for site in find_sites(program)}
    for fqn in edits_by_data(plan):
        packed, site = target.get(fqn), sites.get(fqn)
        if site is not None and isinstance(packed, QTensor):
            _put(program, site, Rounded(packed.dequantize(), packed.params))
    return program


def _rounded(w: Tensor, hessian: Tensor, edit: Quantize, keep: Tensor | None) -> Rounded:
    if edit.method == "gptq":
        return gptq(w, hessian, edit.weight, keep=keep)
    return clip(w, hessian, edit.weight)


def _put(program: Program, site: Site, found: Rounded) -> None:
    """The rounded weight and its parameters into the program's store, in place of the plain one."""
    store = program.store
    old = store.get(site.fqn)
    assert isinstance(old, Tensor)
    value = found.weight.to(old.dtype)  # half precision: off by 2^-9 of a value, which its code is less than half of
    store.put(site.fqn, nn.Parameter(value.t().contiguous() if site.transposed else value, requires_grad=False))
    store.forms[site.fqn] = ROUNDED
    store.put(weight_scale_name(site.fqn), found.params.scale)
    if found.params.zero_point is not None:
        store.put(weight_zero_name(site.fqn), found.params.zero_point)


def _said(site: Site, edit: Quantize, w: Tensor, found: Rounded, hessian: Tensor) -> Entry:
    """The relative error of the layer's output, and what rounding to nearest would have made of it."""
    whole = output_error(w, hessian).sum().clamp_min(torch.finfo(torch.float64).tiny)
    nearest = numerics.simulate(w.float(), edit.weight.nearest)
    own, plain = (float((output_error(q - w, hessian).sum() / whole).sqrt()) for q in (found.weight, nearest))
    reason = f"relative error {own:.3g} of the output, {plain:.3g} rounded to nearest"
    return Entry(stage=STAGE, rule=f"round.{edit.method}", where=site.fqn, reason=reason)


def _require_finite(hessian: Tensor, site: Site) -> None:
    if not hessian.isfinite().all():
        raise CalibrationError(
            f"the input of {site.fqn} is not finite on the calibration data",
            required="finite numbers",
            found="NaN or Inf in it",
            cure="check the data, and the model on it",
        )
