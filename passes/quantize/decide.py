"""What to quantise, and how: rules over sites become edits of the Plan.

Later rules override earlier ones. A weight that several calls share (a tied embedding) gets one scheme: the one
with the most bits that its calls were given, or none if one of them must stay floating point.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...runtime.errors import RecipeError, SchemeError
from ...runtime.numerics import scale_shape
from ...runtime.plan import Quantize
from ...runtime.program import Entry, Program, value_of
from ...runtime.qtensor import packed_nbytes, require_finite
from ...runtime.scheme import Scheme
from .sites import Site, find_sites, readers

STAGE = "decide"

# A convolution that gathers patches of few channels copies more than its GEMM saves: 4x3x224x224, 7x7 to 64
# channels took 9.3 ms in int8 against 3.8 in fp32; from 64 channels on int8 takes .3-.6 of the time (one EPYC core).
MIN_CONV_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class QuantizeRule:
    """Which modules of which operators get which schemes.

    modules: globs over module paths, "*" for all; weight: None leaves them in floating point
    activation: None is weight-only; static: calibrate the activation's range instead of taking it on each call
    """

    modules: tuple[str, ...] = ("*",)
    operators: tuple[str, ...] = ("linear",)
    weight: Scheme | None = None
    activation: Scheme | None = None
    static: bool = False


def decide(program: Program, rules: Sequence[QuantizeRule]) -> tuple[Quantize, ...]:
    """Edits for every site that a rule selects. Raises RecipeError or SchemeError; see the rules' docstring."""
    sites = find_sites(program)
    _require_matches(program, sites, rules)
    wanted: dict[str, list[tuple[Site, QuantizeRule | None]]] = defaultdict(list)
    for site in sites:
        wanted[site.fqn].append((site, _rule_for(program, site, rules)))
    return tuple(edit for fqn, calls in wanted.items() for edit in _edits(program, fqn, calls))


def names_of(program: Program, site: Site) -> list[str]:
    """The module paths a site answers to: those of its weight under all its names."""
    return [name.rpartition(".")[0] or name for name in program.store.names_of(site.fqn)]


def _rule_for(program: Program, site: Site, rules: Sequence[QuantizeRule]) -> QuantizeRule | None:
    names = names_of(program, site)
    for rule in reversed(rules):
        if site.operator in rule.operators and any(
            fnmatch.fnmatchcase(n, pattern) for n in names for pattern in rule.modules
        ):
            return rule if rule.weight is not None else None
    return None


def _require_matches(program: Program, sites: Sequence[Site], rules: Sequence[QuantizeRule]) -> None:
    for rule in rules:
        known = sorted({n for s in sites if s.operator in rule.operators for n in names_of(program, s)})
        for pattern in rule.modules:
            if pattern == "*" or fnmatch.filter(known, pattern):
                continue
            near = difflib.get_close_matches(pattern.strip("*."), known, n=3, cutoff=0.3) or known[:3]
            raise RecipeError(
                f"the rule for modules {pattern!r} matches nothing",
                required=f"a glob over the {len(known)} modules with {' or '.join(rule.operators)}",
                found=pattern,
                cure=f"nearest names: {', '.join(near) or 'none, the model has no such operator'}",
            )


def _edits(program: Program, fqn: str, calls: Sequence[tuple[Site, QuantizeRule | None]]) -> list[Quantize]:
    chosen = [(site, rule) for site, rule in calls if rule is not None]
    if not chosen:
        return []
    reason = _unfit(program, fqn, calls)
    if reason is not None:
        program.log.append(Entry(stage=STAGE, rule="decide.quantize", where=fqn, applied=False, reason=reason))
        return []
    scheme = max((rule.weight for _, rule in chosen if rule.weight), key=lambda s: s.bits)
    _require_fits(program, chosen[0][0], scheme)
    reason = _no_gain(program, chosen[0][0], scheme)
    if reason is not None:
        program.log.append(Entry(stage=STAGE, rule="decide.quantize", where=fqn, applied=False, reason=reason))
        return []
    edits: dict[str, Quantize] = {}
    for site, rule in chosen:
        edit = Quantize(
            fqn=fqn,
            operator=site.operator,
            weight=scheme,
            activation=rule.activation if site.operator != "embedding" else None,
            static=rule.static and rule.activation is not None and site.operator != "embedding",
        )
        edits[site.operator] = _affordable(program, site, edit)
    return list(edits.values())


def _unfit(program: Program, fqn: str, calls: Sequence[tuple[Site, QuantizeRule | None]]) -> str | None:
    left_out = [site.node.name for site, rule in calls if rule is None]
    if left_out:
        return f"the weight is shared with {', '.join(left_out)}, which the recipe leaves in floating point"
    if len({site.transposed for site, _ in calls}) > 1:
        return "the weight is read both as it is and transposed"
    known = {site.node for site, _ in calls}
    others = [node.name for node in readers(program, fqn) if node not in known]
    return f"the weight is read by {', '.join(others)} as well" if others else None


def _no_gain(program: Program, site: Site, scheme: Scheme) -> str | None:
    weight = program.store.get(site.fqn)
    assert isinstance(weight, Tensor)
    shape = tuple(weight.shape[::-1]) if site.transposed else tuple(weight.shape)
    before, after = weight.numel() * weight.element_size(), packed_nbytes(shape, scheme)
    return f"packed it would take {after} bytes, now {before}" if after >= before else None


def _require_fits(program: Program, site: Site, scheme: Scheme) -> None:
    weight = program.store.get(site.fqn)
    assert isinstance(weight, Tensor)
    require_finite(weight, site.fqn)
    shape = tuple(weight.shape[::-1]) if site.transposed else tuple(weight.shape)
    try:
        scale_shape(shape, scheme)
    except SchemeError as error:
        raise SchemeError(
            f"{site.fqn}: {error.message}", required=error.required, found=error.found, cure=error.cure
        ) from error


def _affordable(program: Program, site: Site, edit: Quantize) -> Quantize:
    """Convolutions whose integer form would not pay keep int8 storage and compute in floating point."""
    if site.operator != "conv2d" or edit.activation is None:
        return edit
    weight = program.store.get(site.fqn)
    assert isinstance(weight, Tensor)
    groups = site.node.args[6] if len(site.node.args) > 6 else 1
    reason = None
    if site.activation is not None and value_of(site.activation).dim() != 4:
        reason = "the input has no batch dimension; stored only"
    elif groups != 1:
        reason = f"{groups} groups: no integer GEMM to gain; stored in {edit.weight.bits} bits, computed in float"
    elif weight.shape[1] < MIN_CONV_CHANNELS:
        reason = f"{weight.shape[1]} input channels: gathering patches costs more than int8 gains; stored only"
    if reason is None:
        return edit
    program.log.append(
        Entry(stage=STAGE, rule="decide.quantize_activation", where=site.fqn, applied=False, reason=reason)
    )
    return replace(edit, activation=None, static=False)
