"""Moves the size of inputs into weights, for SmoothQuant and AWQ: what gives an input gives it divided by s.

    y = norm(x; g, b), W y      ->   norm(x; g / s, b / s), (W diag(s)) y
    y = V x + c, W y            ->   (diag(s)^-1 V) x + c / s, (W diag(s)) y      also past relu and a gate: W (f(z) y)

The same in real numbers, and free: no call is added. So it is done only where all that reads y is products whose
weights take s over, and declined with the reason where y is read elsewhere (a residual, as after BERT's norms), where
what gives it has no weight of its own, or where a weight meets several inputs. One forward pass finds all scales.

`refold` does the same in another variant of the model. Where something reads y there that does not take s over, such
as an output, y is multiplied by s again behind its source, and divided where the weights expect it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ...runtime.errors import CalibrationError
from ...runtime.plan import Quantize
from ...runtime.program import Entry, Program, value_of
from ..match import full_args
from ..progress import Advance
from ..stream import Stream, require_batches
from .awq import search_scale
from .gptq import gram
from .sites import Site, find_sites, matrix, readers
from .smooth import smoothing

aten = torch.ops.aten
STAGE = "equalize"

# In `Store.forms`: a tensor that has taken over a scale, or given one up.
SCALED = "scaled"


@dataclass(frozen=True)
class Source:
    """What gives a value: names of the tensors that it is proportional to, each with the dimension its indices have."""

    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Fold:
    """weights: names of those that are multiplied by `scale` (K,), whose input comes from `source` and is divided."""

    weights: tuple[str, ...]
    source: Source
    scale: Tensor


def find_folds(
    program: Program, edits: Sequence[Quantize], batches: Iterable[Sequence[Tensor]], advance: Advance
) -> tuple[Fold, ...]:
    """Scales for every input that an edit wants smoothed or scaled, and that can be; the rest is logged."""
    wanted = {edit.fqn: edit for edit in edits if edit.moves_scale}
    groups: dict[fx.Node, list[Site]] = {}
    for site in find_sites(program):
        if site.activation is not None and site.fqn in wanted:
            groups.setdefault(site.activation, []).append(site)
    chosen: list[tuple[fx.Node, list[Site], Source]] = []
    for x, sites in groups.items():
        found = _foldable(program, x, sites, wanted)
        if isinstance(found, Source):
            chosen.append((x, sites, found))
        else:
            where = ", ".join(site.fqn for site in sites)
            program.log.append(Entry(stage=STAGE, rule="equalize.fold", where=where, applied=False, reason=found))
    folds = []
    with Stream(program, require_batches(batches) if chosen else []) as stream:
        for done, (x, sites, source) in enumerate(chosen, 1):
            own = [wanted[site.fqn] for site in sites]
            scale, reason = _scale(program, sites, own, stream.values(x))
            folds.append(Fold(tuple(site.fqn for site in sites), source, scale))
            where = ", ".join(site.fqn for site in sites)
            program.log.append(Entry(stage=STAGE, rule="equalize.fold", where=where, reason=reason))
            advance(done, len(chosen))
    return tuple(folds)


def _scale(
    program: Program, sites: Sequence[Site], edits: Sequence[Quantize], xs: Sequence[Tensor]
) -> tuple[Tensor, str]:
    weights = [matrix(program, site) for site in sites]
    width, exact = weights[0].shape[1], weights[0].dtype in (torch.float16, torch.bfloat16)
    flat = [x.reshape(-1, width).float() for x in xs]
    if not all(bool(x.isfinite().all()) for x in flat):
        raise CalibrationError(
            f"the input of {sites[0].fqn} is not finite", required="finite numbers", found="NaN or Inf in it"
        )
    alpha = edits[0].smooth
    if alpha is not None:
        largest = torch.stack([x.abs().amax(0) for x in flat if len(x)] or [torch.zeros(width)]).amax(0)
        scale = smoothing(largest, weights, alpha, exact=exact)
        before, after = float(largest.max()), float((largest / scale).max())
        return scale, f"smoothed by {alpha:g}: max|x| {before:.3g} to {after:.3g}"
    hessian, rows = gram(flat, width, weights[0].device)
    magnitude = torch.stack([x.abs().sum(0) for x in flat]).sum(0) / max(rows, 1)
    found = search_scale(weights, [edit.weight for edit in edits], magnitude, hessian, exact=exact)
    gain = found.error / found.plain if found.plain else 1.0
    return found.scale, f"alpha {found.alpha:g}: {gain:.3f} of the squared error of rounding to nearest"


def _foldable(program: Program, x: fx.Node, sites: Sequence[Site], wanted: dict[str, Quantize]) -> Source | str:
    """What gives `x`, if its scale can go into `sites`; else why not."""
    nodes = {site.node for site in sites}
    others = [user.name for user in x.users if user not in nodes]
    if others:
        return f"the input is read by {', '.join(others)} as well"
    several = [s.fqn for s in sites if len(list(readers(program, s.fqn))) > 1]
    if several:
        return f"{several[0]} is read by several calls"
    if len({(wanted[s.fqn].method == "awq", wanted[s.fqn].smooth) for s in sites}) > 1:
        return "layers that share the input ask for different things"
    return scale_source(program, x)


def scale_source(program: Program, x: fx.Node) -> Source | str:
    """The tensors that every index of the last dimension of `x` is proportional to, read nowhere else; or why none."""
    size = value_of(x).shape[-1]
    while len(x.args) and isinstance(x.args[0], fx.Node):
        if x.target is aten.relu.default or (x.target is aten.slice.Tensor and _not_last(x)):
            x = x.args[0]
        elif x.target is aten.mul.Tensor and (factor := _factor(program, x)) is not None:
            if program.tensor_of(factor) is not None:
                return _sole(program, [(factor, 0)], size)
            x = factor
        else:
            break
        if len(x.users) > 1:
            return f"what gives the input, {x.name}, is read elsewhere as well"
    args = full_args(x)
    if x.target is aten.layer_norm.default and len(args[1]) == 1:
        return _sole(program, [(args[2], 0), (args[3], 0)], size)
    if x.target is aten.rms_norm.default and len(args[1]) == 1:
        return _sole(program, [(args[2], 0)], size)
    if x.target is aten.linear.default:
        transposed = args[1].target in (aten.t.default, aten.numpy_T.default)
        weight = args[1].args[0] if transposed else args[1]
        return _sole(program, [(weight, 1 if transposed else 0), (args[2], 0)], size)
    return f"the input comes from {x.target}, which has no weight to divide"


def _not_last(node: fx.Node) -> bool:
    """Whether a slice leaves the last dimension whole."""
    assert isinstance(node.args[0], fx.Node)
    return full_args(node)[1] not in (-1, value_of(node.args[0]).dim() - 1)


def _factor(program: Program, product: fx.Node) -> fx.Node | None:
    """The operand of a product that carries its scale: the weight of a norm, or a linear layer behind a gate."""
    operands = [n for n in product.args if isinstance(n, fx.Node)]
    for node in operands:
        stored = program.store.get(str(node.target)) if node.op == "get_attr" else None
        if isinstance(stored, nn.Parameter) and stored.dim() == 1:
            return node
    shape = value_of(product).shape
    return next((n for n in operands if n.target is aten.linear.default and value_of(n).shape == shape), None)


def _sole(program: Program, parts: Sequence[tuple[object, int]], size: object) -> Source | str:
    found = []
    for node, dim in parts:
        if node is None:
            continue
        name = program.tensor_of(node)
        stored = None if name is None else program.store.get(name)
        if name is None or not isinstance(stored, nn.Parameter):
            return "what gives the input has no weight of its own"
        if len(list(readers(program, name))) > 1:
            return f"{name} is read elsewhere as well"
        if stored.shape[dim] != size:
            return f"{name} has no index for each input"
        found.append((name, dim))
    return Source(tuple(found)) if found else "what gives the input has no weight of its own"


def refold(program: Program, folds: Sequence[Fold]) -> Program:
    """Make folds in a program whose tensors are the model's own; these are not written."""
    plans = [(fold, *_places(program, fold)) for fold in folds]  # before any node is added
    for fold, sources, inputs in plans:
        transposed = {site.fqn: site.transposed for site in find_sites(program)}
        for name in fold.weights:
            _rescale(program, name, 0 if transposed.get(name) else 1, fold.scale)
        for name, dim in fold.source.parts:
            _rescale(program, name, dim, fold.scale.reciprocal())
        for node in sources:
            _multiplied(program, node, fold.scale, node.next, list(node.users))
        for users in inputs.values():
            x = users[0].args[0]  # by now perhaps the product behind its source
            assert isinstance(x, fx.Node)
            _multiplied(program, x, fold.scale.reciprocal(), users[0], users)
    program.tidy()
    return program


def _places(program: Program, fold: Fold) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]]]:
    """Sources whose values have to be multiplied again, and inputs that have to be divided: none where it folds."""
    sites = [site for site in find_sites(program) if site.fqn in fold.weights]
    inputs: dict[fx.Node, list[fx.Node]] = {}
    for site in sites:
        if site.activation is not None:
            inputs.setdefault(site.activation, []).append(site.node)
    whole = len(sites) == len(fold.weights) and len(inputs) == 1
    if whole and all(len(x.users) == len(inputs[x]) and scale_source(program, x) == fold.source for x in inputs):
        return [], {}
    sources = {reader: None for name, _ in fold.source.parts for reader in readers(program, name)}
    return list(sources), inputs


def _rescale(program: Program, name: str, dim: int, scale: Tensor) -> None:
    tensor = program.store.get(name)
    if not isinstance(tensor, Tensor):
        return
    along = scale.to(tensor.device).double().reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
    value = (tensor.detach().double() * along).to(tensor.dtype)
    program.store.put(name, nn.Parameter(value, requires_grad=tensor.requires_grad))
    program.store.forms[name] = SCALED


def _multiplied(program: Program, x: fx.Node, scale: Tensor, before: fx.Node, users: Sequence[fx.Node]) -> None:
    """Let `users` read x times scale."""
    read = program.get_attr(program.store.constant(scale.to(value_of(x).dtype)), before)
    product = program.emit(aten.mul.Tensor, x, read, like=before)
    for user in users:
        user.replace_input_with(x, product)
