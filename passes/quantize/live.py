"""Fake-quantise nodes whose precision is read from the store, so that training changes it without a new trace.

    W             ->  live(W, qmax, mix, key)           or learned(W, step, qmax, mix)
    embedding(W)  ->  live(embedding(W, i), ...)        one scale a row: only rows that are looked up are quantised
    x             ->  live(x, ...) dynamic              or ranged(x, range, ...) static; training observes the range too
                                                        or learned(x, step, ...)

`floating` takes them out again, so that the Plan as it is in the end can be simulated as for any other model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ...runtime import numerics
from ...runtime.errors import CalibrationError
from ...runtime.numerics import Params
from ...runtime.ops.training import (
    FAKE_QUANTIZE_LEARNED,
    FAKE_QUANTIZE_LIVE,
    FAKE_QUANTIZE_RANGED,
    OBSERVE_RANGE,
    learned_scale,
    range_params,
)
from ...runtime.plan import Plan, Quantize, input_scale_name, input_zero_name, of_call, weight_scale_name
from ...runtime.program import Program
from ...runtime.scheme import Scheme
from ...runtime.store import Store
from ..schedule import FULL, Precision, Schedule
from .calibrate import Static, calibrate, static_sites
from .insert import CALL, SITE, Met
from .observers import MakeObserver
from .sites import Site, readers
from .steps import as_values

LIVE = (FAKE_QUANTIZE_LIVE, FAKE_QUANTIZE_RANGED, FAKE_QUANTIZE_LEARNED)


PARTS = ("qmax", "mix", "key", "step")


@dataclass(frozen=True)
class Gauge:
    """Where the precision of parameter `fqn` lies in the store, or that of the activations that meet it."""

    fqn: str
    of_input: bool = False

    def __call__(self, part: str) -> str:
        """The name of one part: qmax, mix, key or step (a learned scale)."""
        return f"{self.fqn}_input_{part}" if self.of_input else f"{self.fqn}_{part}"

    def tensor(self, store: Store, part: str) -> Tensor:
        """That part's tensor."""
        value = store.get(self(part))
        assert isinstance(value, Tensor), f"{self(part)} is not stored"
        return value

    def levels(self, target: Scheme, now: Precision) -> int:
        """The largest code at a precision; 0 where ternary and binary schemes have codes of their own."""
        own = now.bits == target.bits and target.kind in ("ternary", "binary")
        return target.qmax if now.bits == FULL else 0 if own else target.at(now.bits).qmax

    def place(self, store: Store, device: torch.device) -> None:
        """Put the buffers of a precision into the store, at none; they are no part of a state_dict."""
        for part, value, dtype in (("qmax", 1, torch.int32), ("mix", 1.0, torch.float32), ("key", 0, torch.int64)):
            if store.get(self(part)) is None:
                store.put(self(part), torch.tensor(value, dtype=dtype, device=device), persistent=False)

    @torch.no_grad()
    def set(self, store: Store, target: Scheme, now: Precision) -> None:
        """Write a precision; a learned scale goes by 1 / sqrt(qmax), as where it begins (LSQ, section 2.1).

        Keeping the range instead leaves nearly nothing: from 8 bits to 4 the first step would be 3.2 mean|w|.
        """
        qmax, mix = self.tensor(store, "qmax"), self.tensor(store, "mix")
        levels = self.levels(target, now)
        step = store.get(self("step"))
        if isinstance(step, Tensor) and int(qmax) != levels:
            step.mul_(math.sqrt(int(qmax) / levels))
        qmax.fill_(levels)
        mix.fill_(1.0 if now.bits == FULL else now.mix)


@dataclass(frozen=True)
class Reach:
    """Where the range of one activation lies in the store: that which meets the weight called `name` at a call."""

    name: str
    call: int

    def __call__(self, part: str) -> str:
        """The name of one part: range, or step where it is learned."""
        return of_call(f"{self.name}_input_{part}", self.call)


def _place_step(store: Store, site: Site, scheme: Scheme) -> None:
    """A learned scale as a parameter, s = 2 mean|w| / sqrt(qmax) (LSQ, section 2.1)."""
    gauge, weight = Gauge(site.fqn), store.get(site.fqn)
    assert isinstance(weight, Tensor)
    if store.get(gauge("step")) is None:
        w = weight.detach().t() if site.transposed else weight.detach()
        mean = numerics.blocks(w.float(), scheme).abs().mean(1)
        step = 2 * mean * torch.rsqrt(gauge.tensor(store, "qmax").float())
        shape = numerics.scale_shape(w.shape, scheme)
        store.put(gauge("step"), nn.Parameter(torch.where(step > 0, step, 1.0).reshape(shape)))


def _place_input_step(store: Store, reach: Reach, scheme: Scheme) -> str:
    """A learned scale as a parameter, from the range that data gave. Raises CalibrationError where none did."""
    name = reach("step")
    if store.get(name) is None:
        span = store.get(reach("range"))
        if not isinstance(span, Tensor):
            raise CalibrationError(
                f"the learned range of an input of {reach.name} has nothing to begin from",
                required="data, of a call of the model that has this input",
                found="none",
                cure="prepare(..., inputs=..., data=batches) of such calls, or choose range 'static'",
            )
        store.put(name, nn.Parameter(range_params(span, scheme).scale))
    return name


class Live:
    """Simulates with what the store says; `momentum` is that of observed ranges.

    schedules: of activations, by the parameter they meet; those that differ are not simulated together
    """

    def __init__(self, momentum: float, schedules: Mapping[str, Schedule]) -> None:
        self.momentum, self.schedules = momentum, schedules
        self._weights: dict[tuple[fx.Node, str], fx.Node] = {}

    def weight(self, program: Program, site: Site, edit: Quantize) -> None:
        """The simulated weight before the call, or the simulated rows after it."""
        rows = by_row(edit, alone=len(list(readers(program, site.fqn))) == 1)
        if rows is not None:
            fake = self._fake(program, site, site.node, edit, rows, site.node.next)
            site.node.replace_all_uses_with(fake, delete_user_cb=lambda user: user is not fake)
            return
        key = (site.weight, edit.weight.spell())
        if key not in self._weights:
            self._weights[key] = self._fake(program, site, site.weight, edit, edit.weight, site.node)
        site.node.replace_input_with(site.weight, self._weights[key])

    def _fake(
        self, program: Program, site: Site, x: fx.Node, edit: Quantize, scheme: Scheme, before: fx.Node
    ) -> fx.Node:
        names = Gauge(edit.fqn)
        qmax, mix = (program.get_attr(names(part), before) for part in ("qmax", "mix"))
        if edit.learned:
            _place_step(program.store, site, scheme)
            step = program.get_attr(names("step"), before)
            args = (step, qmax, mix, False, scheme.spell())
            return program.emit_alike(FAKE_QUANTIZE_LEARNED.overload, x, *args, like=before)
        drawn = scheme.rounding == "stochastic" and program.contract.training
        key = program.get_attr(names("key"), before) if drawn else None
        spelled = (scheme if drawn else scheme.nearest).spell()
        return program.emit_alike(FAKE_QUANTIZE_LIVE.overload, x, qmax, mix, key, spelled, like=before)

    def activation(self, program: Program, x: fx.Node, met: Met, before: fx.Node) -> fx.Node:
        """Quantised by its own range on each call, or by one that training observes."""
        edit = met.edit
        assert edit.activation is not None
        names, reach, spelled = Gauge(edit.fqn, of_input=True), Reach(met.name, met.call), edit.activation.spell()
        canonical = program.store.canonical
        qmax, mix = (program.get_attr(canonical(names(part)), before) for part in ("qmax", "mix"))
        if not edit.static:
            return program.emit_alike(FAKE_QUANTIZE_LIVE.overload, x, qmax, mix, None, spelled, like=before)
        if edit.learned_input:
            step = program.get_attr(_place_input_step(program.store, reach, edit.activation), before)
            args = (step, qmax, mix, True, spelled)
            return program.emit_alike(FAKE_QUANTIZE_LEARNED.overload, x, *args, like=before)
        if program.store.get(reach("range")) is None:
            program.store.put(reach("range"), torch.zeros(2, device=names.tensor(program.store, "mix").device))
        span = program.get_attr(reach("range"), before)
        if program.contract.training:
            program.emit(OBSERVE_RANGE.overload, span, x, self.momentum, like=before)
        return program.emit_alike(FAKE_QUANTIZE_RANGED.overload, x, span, qmax, mix, spelled, like=before)

    def join(self, program: Program, first: Met, second: Met) -> bool:
        """Where scheme and schedule are alike; the second's precision is the first's from then on.

        Its range is not: in another graph of the model it may meet an input of its own.
        """
        one, two = first.edit, second.edit
        if (one.activation, one.static, one.learned_input) != (two.activation, two.static, two.learned_input):
            return False
        if self.schedules[one.fqn] != self.schedules[two.fqn]:
            return False
        own, theirs = Gauge(one.fqn, of_input=True), Gauge(two.fqn, of_input=True)
        for part in ("qmax", "mix", "key"):
            if own(part) != theirs(part):
                program.store.aliases.setdefault(theirs(part), program.store.canonical(own(part)))
        return True


def by_row(edit: Quantize, *, alone: bool) -> Scheme | None:
    """The scheme of looked-up rows, where quantising them is the same as quantising the whole table first.

    alone: nothing else reads the table
    """
    scheme = edit.weight
    if edit.operator != "embedding" or edit.learned or scheme.granularity not in ("channel", "group"):
        return None
    if scheme.rounding != "nearest" or not alone:
        return None  # an element's random number goes by its place in the table
    return replace(scheme, granularity="token") if scheme.granularity == "channel" else scheme


def place_ranges(
    program: Program,
    sites: Sequence[Static],
    batches: Iterable[Sequence[Tensor]],
    make: MakeObserver,
) -> None:
    """Ranges of static activations from data, for training to go on from."""
    probe = program.copy(program.store.fork())  # whose sites have nodes of their own
    calibrate(probe, static_sites(probe, [edit for _, edit in sites]), batches, make)
    for site, edit in sites:
        scale, zero = (probe.store.get(name(site.name, site.call)) for name in (input_scale_name, input_zero_name))
        assert isinstance(scale, Tensor) and edit.activation is not None
        first = -zero if isinstance(zero, Tensor) else torch.full_like(scale, edit.activation.qmin)
        low, high = first * scale, (first + edit.activation.qmax - edit.activation.qmin) * scale
        span = torch.stack([low, high])
        program.store.put(Reach(site.name, site.call)("range"), span, persistent=not edit.learned_input)


def gauges(plan: Plan, store: Store) -> set[str]:
    """All names under which training may keep tensors of its own."""
    edits = plan.quantizations
    own = {Gauge(edit.fqn, of_input)(part) for edit in edits for of_input in (False, True) for part in PARTS}
    return own | set(ranges_in((name for name, _ in store.entries()), plan, store))


def ranges_in(names: Iterable[str], plan: Plan, store: Store) -> list[str]:
    """Those of `names` that ranges of the plan's static activations have, learned ones too."""
    static = {name for edit in plan.quantizations if edit.static for name in store.names_of(edit.fqn)}
    return [name for name in names if (found := _RANGE.fullmatch(name)) and found["weight"] in static]


_RANGE = re.compile(r"(?P<weight>.+)_input_(range|step)(_\d+)?")


def load_ranges(store: Store, plan: Plan, state: dict[str, Tensor], prefix: str) -> None:
    """Make the ranges of a saved state and those here the same ones.

    Which there are goes by what was captured so far and by whether data was given.
    """
    saved = (name.removeprefix(prefix) for name in state if name.startswith(prefix))
    for name in ranges_in(saved, plan, store):
        if store.get(name) is None:
            store.put(name, torch.zeros_like(state[prefix + name]))
    for name in ranges_in((n for n, _ in store.entries() if store.is_persistent(n)), plan, store):
        own = store.get(name)
        assert isinstance(own, Tensor)
        state.setdefault(prefix + name, own.detach())


def require_seen(program: Program, plan: Plan) -> None:
    """Raise CalibrationError where a graph reads static ranges that nothing was seen of."""
    reads = [str(node.target) for node in program.graph.nodes if node.op == "get_attr"]
    spans = {name: program.store.get(name) for name in ranges_in(reads, plan, program.store)}
    empty = [name for name, span in spans.items() if isinstance(span, Tensor) and span.dim() and unseen(span)]
    if empty:
        raise CalibrationError(
            f"{len(empty)} static ranges have seen nothing yet",
            required="a call in training mode, or data",
            found=f"eval mode before either, for {empty[0].partition('_input_range')[0]}",
            cure="prepare(..., data=batches), or train first, or choose range 'dynamic'",
        )


def unseen(span: Tensor) -> bool:
    """Whether a range has no width, which it has before the first batch."""
    return bool(span[0] == span[1])


def floating(program: Program, plan: Plan) -> Program:
    """A copy without simulated quantisation, on a store of its own, which shares the program's tensors.

    The scales that were learned or observed are added to it, for the plan's edits to read.
    """
    plain = program.copy(program.store.fork())
    as_values(plain)
    _put_input_scales(plain, {edit.fqn: edit for edit in plan.quantizations if edit.static})
    for node in plain.calls(*(op.overload for op in LIVE)):
        float_value = node.args[0]
        assert isinstance(float_value, fx.Node)
        node.replace_all_uses_with(float_value)
        plain.graph.erase_node(node)
    for node in plain.calls(OBSERVE_RANGE.overload):
        plain.graph.erase_node(node)
    plain.tidy()
    for edit in plan.quantizations:
        if edit.learned:
            step = Gauge(edit.fqn).tensor(plain.store, "step")
            plain.store.put(weight_scale_name(edit.fqn), learned_scale(step.detach()))
    return plain


def _put_input_scales(plain: Program, static: Mapping[str, Quantize]) -> None:
    """For every call the scale of the range that it really reads, which may be that of a call beside it."""
    for node in plain.graph.nodes:
        x = node.args[0] if SITE in node.meta and node.args else None
        edit = static.get(node.meta[SITE][0]) if isinstance(x, fx.Node) else None
        if edit is None or not isinstance(x, fx.Node) or edit.activation is None:
            continue
        if x.target not in (FAKE_QUANTIZE_RANGED.overload, FAKE_QUANTIZE_LEARNED.overload):
            continue
        name, call = node.meta[CALL]
        held = plain.store.get(str(x.args[1].target)) if isinstance(x.args[1], fx.Node) else None
        assert isinstance(held, Tensor)
        if edit.learned_input:
            params = Params(learned_scale(held.detach()))
        else:
            params = observed(held, edit.activation, name)
        plain.store.put(input_scale_name(name, call), params.scale)
        if params.zero_point is not None:
            plain.store.put(input_zero_name(name, call), params.zero_point)


def observed(span: Tensor, scheme: Scheme, fqn: str) -> Params:
    """Parameters of a range that training observed. Raises CalibrationError where it saw nothing."""
    if unseen(span):
        raise CalibrationError(
            f"the input of {fqn} has a static range that nothing was seen of",
            required="at least one training step",
            found="none",
            cure="train, or choose range 'dynamic'",
        )
    return range_params(span, scheme)
