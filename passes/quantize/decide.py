"""What to quantise, and how: rules over sites become edits of the Plan.

Later rules override earlier ones. A weight that several calls share (a tied embedding) gets one scheme: the one
with the most bits that its calls were given, or none if one of them must stay floating point.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ...runtime.errors import RecipeError, SchemeError, nearest
from ...runtime.numerics import scale_shape
from ...runtime.plan import Quantize, WeightMethod
from ...runtime.program import Entry, Program
from ...runtime.qtensor import packed_nbytes, require_finite
from ...runtime.scheme import Scheme
from ...runtime.store import Store
from ..schedule import AT_ONCE, Schedule
from ..selection import selected_by
from .sites import Reading, Use, reading

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
    method: how linear layers' weights are rounded
    activation: None is weight-only; static: calibrate the activation's range instead of taking it on each call, and
        learned_input: train it
    smooth: SmoothQuant's alpha for the activations of linear layers
    section: of a configuration; no two patterns of one section may choose the same module
    answers: only the layers whose result is an output of the model
    optional: what it names may be missing, which is an error otherwise
    """

    modules: tuple[str, ...] = ("*",)
    patterns: tuple[str, ...] = ()
    operators: tuple[str, ...] = ("linear",)
    weight: Scheme | None = None
    adds: bool = False
    groups: int | None = None
    learned: bool = False
    method: WeightMethod = "nearest"
    schedule: Schedule = AT_ONCE
    activation: Scheme | None = None
    static: bool = False
    learned_input: bool = False
    smooth: float | None = None
    activation_schedule: Schedule = AT_ONCE
    section: str = ""
    answers: bool = False
    optional: bool = False

    def selects(self, names: Sequence[str]) -> bool:
        """Whether a module that answers to `names` is meant."""
        return selected_by(names, self.modules, self.patterns)


@dataclass(frozen=True)
class Pace:
    """The schedules of one weight and of the activation that meets it."""

    weight: Schedule = AT_ONCE
    activation: Schedule = AT_ONCE


def decide(program: Program, rules: Sequence[QuantizeRule]) -> dict[Quantize, Pace]:
    """Edits for every site that a rule selects. Raises RecipeError or SchemeError; see the rules' docstring."""
    return decided(reading(program), rules)


def decided(model: Reading, rules: Sequence[QuantizeRule]) -> dict[Quantize, Pace]:
    """`decide` for uses, wherever they were found."""
    _require_matches(model, rules)
    wanted: dict[str, list[tuple[Use, QuantizeRule | None]]] = defaultdict(list)
    for use in model.uses:
        wanted[use.fqn].append((use, _rule_for(model, use, rules)))
    return {edit: pace for fqn, calls in wanted.items() for edit, pace in _edits(model, fqn, calls)}


def names_of(store: Store, fqn: str) -> list[str]:
    """The module paths a weight answers to, under all its names."""
    return [name.rpartition(".")[0] or name for name in store.names_of(fqn)]


def _rule_for(model: Reading, use: Use, rules: Sequence[QuantizeRule]) -> QuantizeRule | None:
    names, added = names_of(model.store, use.fqn), None
    for rule in reversed(rules):
        if use.operator not in rule.operators or (rule.answers and not use.answers) or not rule.selects(names):
            continue
        if rule.adds:
            added = added or rule
            continue
        if rule.weight is None or added is None:
            return rule if rule.weight is not None else None
        taken = ("activation", "static", "learned_input", "smooth", "activation_schedule")
        return replace(rule, **{name: getattr(added, name) for name in taken})
    return None


def _require_matches(model: Reading, rules: Sequence[QuantizeRule]) -> None:
    chosen: dict[tuple[str, str], str] = {}  # by section and module: the pattern that chose it
    for rule in rules:
        uses = [use for use in model.uses if use.operator in rule.operators]
        known = sorted({name for use in uses for name in names_of(model.store, use.fqn)})
        for pattern, of in (*((p, "glob") for p in rule.modules), *((p, "pattern") for p in rule.patterns)):
            matched = fnmatch.filter(known, pattern) if of == "glob" else _searched(pattern, known)
            for name in matched if rule.section else ():
                require_free(chosen, rule.section, name, pattern)
                chosen[rule.section, name] = pattern
            if pattern == "*" or matched or rule.optional:
                continue
            near = nearest(pattern.strip("*."), known)
            raise RecipeError(
                f"the rule for modules {pattern!r} matches nothing",
                required=f"a {of} over the {len(known)} modules with {' or '.join(rule.operators)}",
                found=pattern,
                cure=f"nearest names: {', '.join(near) or 'none, the model has no such operator'}",
            )


def require_free(chosen: dict[tuple[str, str], str], section: str, name: str, pattern: str) -> None:
    """Raise RecipeError where a pattern of a section chose a module: which one counts would depend on their order."""
    if (section, name) in chosen:
        raise RecipeError(
            f"two patterns of {section} choose {name}",
            required="each module chosen once",
            found=f"{chosen[section, name]!r} and {pattern!r}",
            cure="narrow one of them: they are searched for anywhere in a name, so give a longer path or anchor with $",
        )


def require_zero_codes(edits: Iterable[Quantize], zeroed: Collection[str]) -> None:
    """Raise RecipeError where a weight that gets zeros would have codes without one."""
    for edit in edits:
        if edit.weight.kind == "binary" and edit.fqn in zeroed:
            raise RecipeError(
                f"{edit.fqn} is to have zeros, and to be binary",
                required="a kind of weight that has a zero: ternary or symmetric",
                found=edit.weight.spell(),
                cure="leave it out of sparsify, or give it kind 'ternary'",
            )


def _searched(pattern: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if re.search(pattern, name)]


def _edits(model: Reading, fqn: str, calls: Sequence[tuple[Use, QuantizeRule | None]]) -> list[tuple[Quantize, Pace]]:
    chosen = [(use, rule) for use, rule in calls if rule is not None]
    if not chosen:
        return []
    reason = _unfit(model, fqn, calls)
    if reason is not None:
        model.log.append(Entry(stage=STAGE, rule="decide.quantize", where=fqn, applied=False, reason=reason))
        return []
    widest = max((rule for _, rule in chosen), key=lambda rule: rule.weight.bits if rule.weight else 0)
    scheme = _fitted(model, chosen[0][0], widest)
    reason = _no_gain(model, chosen[0][0], scheme)
    if reason is not None:
        model.log.append(Entry(stage=STAGE, rule="decide.quantize", where=fqn, applied=False, reason=reason))
        return []
    edits: dict[str, tuple[Quantize, Pace]] = {}
    method = _method(model, fqn, chosen)
    for use, rule in chosen:
        meets = _meeting(use, rule.activation)
        edit = Quantize(
            fqn=fqn,
            operator=use.operator,
            weight=scheme,
            activation=meets,
            static=rule.static and meets is not None,
            learned=widest.learned,
            learned_input=rule.learned_input and meets is not None,
            method=method,
            smooth=rule.smooth if meets is not None and use.operator == "linear" else None,
        )
        edits[use.operator] = _affordable(model, use, edit), Pace(widest.schedule, rule.activation_schedule)
    return list(edits.values())


def _method(model: Reading, fqn: str, chosen: Sequence[tuple[Use, QuantizeRule]]) -> WeightMethod:
    """How one weight is rounded: to nearest where it is also looked up, since any row may be."""
    by_data: list[WeightMethod] = [rule.method for _, rule in chosen if rule.method != "nearest"]
    method: WeightMethod = by_data[0] if by_data else "nearest"
    others = [use.operator for use, _ in chosen if use.operator != "linear"]
    if method != "nearest" and others:
        reason = f"{others[0]} reads the weight as well; rounded to nearest"
        entry = Entry(stage=STAGE, rule=f"decide.{method}", where=fqn, applied=False, reason=reason)
        model.log.append(entry)
        return "nearest"
    if method == "awq" and any(rule.smooth is not None for _, rule in chosen):
        raise RecipeError(
            f"{fqn} is to be scaled twice",
            required="method 'awq', which finds the scale of inputs itself, or smooth",
            found="both",
            cure="leave out one of the two; method 'gptq' goes with smooth",
        )
    return method


def _meeting(use: Use, activation: Scheme | None) -> Scheme | None:
    """The scheme of a use's activation: what is token-wise for a linear layer is image-wise for a convolution."""
    if activation is None or use.operator == "embedding":
        return None
    if activation.granularity == "tensor":
        return activation
    return replace(activation, granularity="image" if use.operator.startswith("conv") else "token")


def _unfit(model: Reading, fqn: str, calls: Sequence[tuple[Use, QuantizeRule | None]]) -> str | None:
    left_out = [use.label for use, rule in calls if rule is None]
    if left_out:
        return f"the weight is shared with {', '.join(left_out)}, which the recipe leaves in floating point"
    if len({use.transposed for use, _ in calls}) > 1:
        return "the weight is read both as it is and transposed"
    others = model.others(fqn)
    return f"the weight is read by {', '.join(others)} as well" if others else None


def _no_gain(model: Reading, use: Use, scheme: Scheme) -> str | None:
    weight = model.store.get(use.fqn)
    assert isinstance(weight, Tensor)
    shape = tuple(weight.shape[::-1]) if use.transposed else tuple(weight.shape)
    before, after = weight.numel() * weight.element_size(), packed_nbytes(shape, scheme)
    return f"packed it would take {after} bytes, now {before}" if after >= before else None


def _fitted(model: Reading, use: Use, rule: QuantizeRule) -> Scheme:
    """The rule's scheme for one weight. Raises SchemeError where it does not divide."""
    weight, scheme = model.store.get(use.fqn), rule.weight
    assert isinstance(weight, Tensor) and scheme is not None
    require_finite(weight, use.fqn)
    shape = tuple(weight.shape[::-1]) if use.transposed else tuple(weight.shape)
    try:
        if rule.groups is not None and use.operator == "embedding":
            scheme = replace(scheme, granularity="channel", group_size=None)  # a row at a time is what is looked up
        elif rule.groups is not None:
            scheme = scheme.divided(shape, rule.groups)
        scale_shape(shape, scheme)
    except SchemeError as error:
        raise SchemeError(
            f"{use.fqn}: {error.message}", required=error.required, found=error.found, cure=error.cure
        ) from error
    return scheme


def _affordable(model: Reading, use: Use, edit: Quantize) -> Quantize:
    """Convolutions whose integer form would not pay keep int8 storage and compute in floating point."""
    if not use.operator.startswith("conv") or edit.activation is None:
        return edit
    weight = model.store.get(use.fqn)
    assert isinstance(weight, Tensor)
    reason = None
    stored = edit.weight.stored
    if use.operator == "conv1d":
        reason = "no integer convolution in one dimension; stored only"
    elif (stored.bits, stored.kind, stored.granularity) != (8, "symmetric", "channel"):
        reason = f"no integer convolution for weights {edit.weight.spell()}; stored only"
    elif not use.batched:
        reason = "the input has no batch dimension; stored only"
    elif use.groups != 1:
        reason = f"{use.groups} groups: no integer GEMM to gain; stored in {edit.weight.bits} bits, computed in float"
    elif weight.shape[1] < MIN_CONV_CHANNELS:
        reason = f"{weight.shape[1]} input channels: gathering patches costs more than int8 gains; stored only"
    if reason is None:
        return edit
    model.log.append(Entry(stage=STAGE, rule="decide.quantize_activation", where=use.fqn, applied=False, reason=reason))
    return edit.without_activation()
