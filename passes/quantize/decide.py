"""What to quantise, and how: rules over sites become edits of the Plan.

Later rules override earlier ones. A weight that several calls share (a tied embedding) gets one scheme: the one
with the most bits that its calls were given, or none if one of them must stay floating point.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
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
from .schedule import AT_ONCE, Schedule
from .sites import Site, find_sites, readers

STAGE = "decide"

# A convolution that gathers patches of few channels copies more than its GEMM saves: 4x3x224x224, 7x7 to 64
# channels took 9.3 ms in int8 against 3.8 in fp32; from 64 channels on int8 takes .3-.6 of the time (one EPYC core).
MIN_CONV_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class QuantizeRule:
    """Which modules of which operators get which schemes.

    modules: globs over module paths, "*" for all; patterns: regular expressions searched for in them as well
    weight: None leaves them in floating point, unless `adds`: then the rule says only what their activation gets, and
        their weight is as earlier rules have it; groups: how many scales it has, in place of the scheme's granularity
    learned: the weight's scale is trained; schedule: its bits while training
    activation: None is weight-only; static: calibrate the activation's range instead of taking it on each call
    """

    modules: tuple[str, ...] = ("*",)
    patterns: tuple[str, ...] = ()
    operators: tuple[str, ...] = ("linear",)
    weight: Scheme | None = None
    adds: bool = False
    groups: int | None = None
    learned: bool = False
    schedule: Schedule = AT_ONCE
    activation: Scheme | None = None
    static: bool = False
    activation_schedule: Schedule = AT_ONCE

    def selects(self, names: Sequence[str]) -> bool:
        """Whether a module that answers to `names` is meant."""
        globbed = any(fnmatch.fnmatchcase(name, glob) for name in names for glob in self.modules)
        return globbed or any(re.search(pattern, name) for name in names for pattern in self.patterns)


@dataclass(frozen=True)
class Pace:
    """The schedules of one weight and of the activation that meets it."""

    weight: Schedule = AT_ONCE
    activation: Schedule = AT_ONCE


def decide(program: Program, rules: Sequence[QuantizeRule]) -> dict[Quantize, Pace]:
    """Edits for every site that a rule selects. Raises RecipeError or SchemeError; see the rules' docstring."""
    sites = find_sites(program)
    _require_matches(program, sites, rules)
    wanted: dict[str, list[tuple[Site, QuantizeRule | None]]] = defaultdict(list)
    for site in sites:
        wanted[site.fqn].append((site, _rule_for(program, site, rules)))
    return {edit: pace for fqn, calls in wanted.items() for edit, pace in _edits(program, fqn, calls)}


def names_of(program: Program, site: Site) -> list[str]:
    """The module paths a site answers to: those of its weight under all its names."""
    return [name.rpartition(".")[0] or name for name in program.store.names_of(site.fqn)]


def _rule_for(program: Program, site: Site, rules: Sequence[QuantizeRule]) -> QuantizeRule | None:
    names, added = names_of(program, site), None
    for rule in reversed(rules):
        if site.operator not in rule.operators or not rule.selects(names):
            continue
        if rule.adds:
            added = added or rule
            continue
        if rule.weight is None or added is None:
            return rule if rule.weight is not None else None
        pace = added.activation_schedule
        return replace(rule, activation=added.activation, static=added.static, activation_schedule=pace)
    return None


def _require_matches(program: Program, sites: Sequence[Site], rules: Sequence[QuantizeRule]) -> None:
    for rule in rules:
        known = sorted({n for s in sites if s.operator in rule.operators for n in names_of(program, s)})
        for pattern, of in (*((p, "glob") for p in rule.modules), *((p, "pattern") for p in rule.patterns)):
            if pattern == "*" or (fnmatch.filter(known, pattern) if of == "glob" else _searched(pattern, known)):
                continue
            near = difflib.get_close_matches(pattern.strip("*."), known, n=3, cutoff=0.3) or known[:3]
            raise RecipeError(
                f"the rule for modules {pattern!r} matches nothing",
                required=f"a {of} over the {len(known)} modules with {' or '.join(rule.operators)}",
                found=pattern,
                cure=f"nearest names: {', '.join(near) or 'none, the model has no such operator'}",
            )


def _searched(pattern: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if re.search(pattern, name)]


def _edits(
    program: Program, fqn: str, calls: Sequence[tuple[Site, QuantizeRule | None]]
) -> list[tuple[Quantize, Pace]]:
    chosen = [(site, rule) for site, rule in calls if rule is not None]
    if not chosen:
        return []
    reason = _unfit(program, fqn, calls)
    if reason is not None:
        program.log.append(Entry(stage=STAGE, rule="decide.quantize", where=fqn, applied=False, reason=reason))
        return []
    widest = max((rule for _, rule in chosen), key=lambda rule: rule.weight.bits if rule.weight else 0)
    scheme = _fitted(program, chosen[0][0], widest)
    reason = _no_gain(program, chosen[0][0], scheme)
    if reason is not None:
        program.log.append(Entry(stage=STAGE, rule="decide.quantize", where=fqn, applied=False, reason=reason))
        return []
    edits: dict[str, tuple[Quantize, Pace]] = {}
    for site, rule in chosen:
        meets = _meeting(site, rule.activation)
        edit = Quantize(
            fqn=fqn,
            operator=site.operator,
            weight=scheme,
            activation=meets,
            static=rule.static and meets is not None,
            learned=widest.learned,
        )
        edits[site.operator] = _affordable(program, site, edit), Pace(widest.schedule, rule.activation_schedule)
    return list(edits.values())


def _meeting(site: Site, activation: Scheme | None) -> Scheme | None:
    """The scheme of a site's activation: what is token-wise for a linear layer is image-wise for a convolution."""
    if activation is None or site.operator == "embedding":
        return None
    if activation.granularity == "tensor":
        return activation
    return replace(activation, granularity="image" if site.operator.startswith("conv") else "token")


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


def _fitted(program: Program, site: Site, rule: QuantizeRule) -> Scheme:
    """The rule's scheme for one weight. Raises SchemeError where it does not divide."""
    weight, scheme = program.store.get(site.fqn), rule.weight
    assert isinstance(weight, Tensor) and scheme is not None
    require_finite(weight, site.fqn)
    shape = tuple(weight.shape[::-1]) if site.transposed else tuple(weight.shape)
    try:
        if rule.groups is not None and site.operator == "embedding":
            scheme = replace(scheme, granularity="channel", group_size=None)  # a row at a time is what is looked up
        elif rule.groups is not None:
            scheme = scheme.divided(shape, rule.groups)
        scale_shape(shape, scheme)
    except SchemeError as error:
        raise SchemeError(
            f"{site.fqn}: {error.message}", required=error.required, found=error.found, cure=error.cure
        ) from error
    return scheme


def _affordable(program: Program, site: Site, edit: Quantize) -> Quantize:
    """Convolutions whose integer form would not pay keep int8 storage and compute in floating point."""
    if not site.operator.startswith("conv") or edit.activation is None:
        return edit
    weight = program.store.get(site.fqn)
    assert isinstance(weight, Tensor)
    groups = site.node.args[6] if len(site.node.args) > 6 else 1
    reason = None
    stored = edit.weight.stored
    if site.operator == "conv1d":
        reason = "no integer convolution in one dimension; stored only"
    elif (stored.bits, stored.kind, stored.granularity) != (8, "symmetric", "channel"):
        reason = f"no integer convolution for weights {edit.weight.spell()}; stored only"
    elif site.activation is not None and value_of(site.activation).dim() != 4:
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
