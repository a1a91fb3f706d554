"""The eager module of a pruned model: its numbers are set so that it computes what the graph does, or it is refused.

The tensors are cut already. What layers hold is known; every other number that may count what was cut is a Slot of
`counts`, and the module itself says which of them have to follow: it is run beside the graph, first with those that
are sure to, then with one more or one less of them, and again from where it got furthest.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.canonicalize import canonicalize
from ..passes.match import full_args
from ..passes.prune.axes import size
from ..passes.prune.keep import Kept, count, is_cut
from ..passes.prune.slices import leaves_of
from ..passes.prune.transfer import rule_of
from ..passes.prune.walk import Walk
from ..passes.verify import difference
from ..runtime.compressed import Compressed
from ..runtime.contract import Signature, bind_call
from ..runtime.errors import CaptureError, DwindleError
from ..runtime.model import flat_outputs
from ..runtime.qtensor import QTensor
from ..runtime.store import Store
from ..runtime.structure import flatten, rebuild
from .capture import capture
from .counts import Slot, fit, is_layer, runs_below, slots_of

# How many assignments are tried: each is a forward of the example, and most end at the first shape that is wrong.
TRIES = 200

CURE = "call the compressed model itself, or leave these modules out in the recipe"


class TransplantError(DwindleError):
    """A Plan that the eager module cannot express."""


@dataclass(frozen=True)
class Failure:
    """What became of one run. progress: how far it got; where: the module that raised, if one did"""

    progress: float
    what: str
    where: str | None = None


@dataclass
class Beside:
    """The eager module beside the graph. limit: on the relative difference of their outputs."""

    model: nn.Module
    calls: list[dict[str, Any]]
    expected: list[list[Tensor]]
    limit: float

    @staticmethod
    def of(model: nn.Module, small: Compressed, examples: Iterable[Mapping[str, Any]], limit: float) -> Beside:
        """Runs `small` on the examples."""
        names = Signature.of(model).names
        beside = Beside(model, [], [], limit)
        for example in examples:
            beside.calls.append({n: v for n, v in example.items() if n in names})
            with _unwritten(small):
                beside.expected.append(_outputs(small, example))
        return beside

    def failure(self) -> Failure | None:
        """None where the module gives what the graph gives. The model is run, and nothing of it changes."""
        for i, (call, expected) in enumerate(zip(self.calls, self.expected, strict=True)):
            try:
                with _unwritten(self.model):
                    found = _outputs(self.model, call)
                apart = difference(expected, found).relative
            except Exception as error:  # whatever its code raises is how it says that a size is wrong
                done, where = self._place(call)
                return Failure(i + 1 - 1 / (1 + done), f"{type(error).__name__}: {_first_line(error)}", where)
            if not apart <= self.limit:
                return Failure(i + 1, f"a relative difference of {apart:.3g}")
        return None

    def _place(self, call: Mapping[str, Any]) -> tuple[int, str | None]:
        """Run a call that raises once more: (modules that returned, path of the innermost that did not)."""
        running: list[str] = []
        done = [0]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            done[0] += 1

        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: running.append(path)))
            handles.append(module.register_forward_hook(leave))
        try:
            with _unwritten(self.model):
                _outputs(self.model, call)
        except Exception:  # seen before
            return done[0], running[-1] if running else None
        finally:
            for handle in handles:
                handle.remove()
        return done[0], None


def analysed(model: nn.Module, small: Compressed, arguments: Mapping[str, Any]) -> tuple[Walk, Kept]:
    """The axes of the original `model`, and what the cuts of `small` keep of their leaves."""
    # Which index is which does not depend on the sizes of the inputs, and a graph that keeps them is captured sooner.
    program = canonicalize(capture(model, arguments, Store.borrowing(model), dynamic_shapes={}))
    program.tidy()
    walk = Walk.over(program, rule_of)
    return walk, leaves_of(walk, small.plan.slices)


def fit_layers(model: nn.Module, copied: nn.Module, walk: Walk, of: Kept) -> None:
    """Set the numbers of torch's own layers in `copied`, whose tensors are cut."""
    for path, runs in runs_below(model, walk, of).items():
        layer = copied.get_submodule(path)
        if is_layer(layer) and any(old != new for old, new in runs.values()):
            fit(layer, runs)


def resize(model: nn.Module, beside: Beside, walk: Walk, of: Kept) -> None:
    """Set all other numbers of the module of `beside`. Raises TransplantError where no assignment was found.

    model: the original, which `walk` is an analysis of
    """
    slots = slots_of(model, beside.model, runs_below(model, walk, of))
    search = _Search(slots, beside)
    start = tuple(slot.default for slot in slots)
    found = search.first(start)
    if found is None:
        raise _refusal(beside, slots, search, _held_by_none(walk, of, beside.model, slots))
    search.settle(found, start)


Choice = tuple[int, ...]
"""Of each slot."""


@dataclass
class _Search:
    slots: Sequence[Slot]
    beside: Beside
    tried: dict[Choice, Failure | None] = field(default_factory=dict)

    def first(self, start: Choice) -> Choice | None:
        """The first that computes what the graph does: the nearest to `start`, from where it got furthest on."""
        waiting: list[tuple[float, int, int, Choice]] = []

        def look(choice: Choice) -> bool:
            failure = self.tried[choice] = self.attempt(choice)
            if failure is not None:
                flips = sum(a != b for a, b in zip(choice, start, strict=True))
                heapq.heappush(waiting, (-failure.progress, flips, len(self.tried), choice))
            return failure is None

        if look(start):
            return start
        while waiting:
            *_, choice = heapq.heappop(waiting)
            for other in self._neighbours(choice):
                if len(self.tried) >= TRIES:
                    return None
                if other not in self.tried and look(other):
                    return other
        return None

    def _neighbours(self, choice: Choice) -> Iterator[Choice]:
        for i, slot in enumerate(self.slots):
            for other in range(len(slot.choices)):
                if other != choice[i]:
                    yield (*choice[:i], other, *choice[i + 1 :])

    def attempt(self, choice: Choice) -> Failure | None:
        """Set everything, and run."""
        for slot, one in zip(self.slots, choice, strict=True):
            try:
                slot.write(one)
            except Exception as error:  # an object may refuse to be written
                return Failure(0, f"{slot.spell(one)} cannot be set ({type(error).__name__}: {_first_line(error)})")
        return self.beside.failure()

    def settle(self, found: Choice, start: Choice) -> None:
        """Leave the module with as little changed from `start` as its outputs ask for."""
        for i, first in enumerate(start):
            back = (*found[:i], first, *found[i + 1 :])
            if back != found and back not in self.tried and self.attempt(back) is None:
                found = back
        for slot, one in zip(self.slots, found, strict=True):
            slot.write(one)


def _refusal(beside: Beside, slots: Sequence[Slot], search: _Search, unheld: Sequence[tuple[str, str]]) -> DwindleError:
    choice, failure = max(((c, f) for c, f in search.tried.items() if f is not None), key=lambda item: item[1].progress)
    found = failure.what
    if failure.where is not None:
        kind = type(beside.model.get_submodule(failure.where)).__name__
        found = f"{failure.where or 'the model'} ({kind}) raises {found}"
    where = failure.where
    told = [text for path, text in unheld if where is None or path == where or path.startswith(f"{where}.")]
    told = told or [text for _, text in unheld]
    written = [slot.spell(one) for slot, one in zip(slots, choice, strict=True) if one]
    unset = [f.what for f in search.tried.values() if f is not None and f.progress == 0]
    lines = [found, *dict.fromkeys((*told[:3], *unset[:3]))] + ([f"with {', '.join(written[:5])}"] if written else [])
    return TransplantError(
        "the eager module cannot be cut as the graph was",
        required="attributes that hold what the forward counts, in every module on its own",
        found="; ".join(lines) + f" ({len(search.tried)} assignments tried)",
        cure=CURE,
    )


def _held_by_none(walk: Walk, of: Kept, copied: nn.Module, slots: Sequence[Slot]) -> list[tuple[str, str]]:
    """(path, text) of modules whose code has a number that should follow a cut and is no attribute of theirs."""
    paths = {id(module): path for path, module in copied.named_modules()}
    held = {
        (paths.get(id(site.holder)), value)
        for slot in slots
        for site, value in zip(slot.sites, slot.choices[0], strict=True)
    }
    found: dict[tuple[str, str], None] = {}
    for number in walk.sizes:
        literal: Any = full_args(number.node)[number.argument]
        if number.index is not None and isinstance(literal, list | tuple):
            literal = literal[number.index]
        stack = number.node.meta.get("nn_module_stack") or {}
        path, _ = list(stack.values())[-1] if stack else ("", None)
        if type(literal) is not int or literal != size(number.axis) or not is_cut(number.axis, of):
            continue
        module = copied.get_submodule(path)
        if not is_layer(module) and (path, literal) not in held:
            text = (
                f"{path or 'the model'} ({type(module).__name__}) counts {literal}, of which {count(number.axis, of)}"
            )
            found[path, f"{text} are left, in no attribute of its own"] = None
    return list(found)


def examples(small: Compressed, arguments: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The example; then one with other sizes where they may vary, and with a zero in masks of ones.

    The batch is larger by one, other dimensions are shorter. Forwards pass over masks of ones, and then count nothing.
    """
    yield arguments
    structure, tensors = bind_call(small.signature, (), arguments)
    contract = small.program(small.training, structure, lambda: arguments).contract
    sizes: dict[str, int] = {}
    for spec, tensor in zip(contract.inputs, tensors, strict=True):
        for old, name in zip(tensor.shape, spec.shape, strict=True):
            if isinstance(name, str):
                low, high = contract.limits.get(name, (1, None))
                larger = name == "batch" or old - 1 < max(low, 2)
                sizes.setdefault(name, old + 1 if larger and old != high else max(old - 1, low))
    more = [_sized(t, [sizes.get(str(n), n) for n in s.shape]) for s, t in zip(contract.inputs, tensors, strict=True)]
    masks = [i for i, (s, t) in enumerate(zip(contract.inputs, more, strict=True)) if "mask" in s.name and _is_ones(t)]
    for i in masks:
        more[i] = more[i].clone()
        more[i][-1, -1] = 0
    try:
        contract.check(more)
    except CaptureError:
        return  # dimensions depend on each other in a way no name shows
    if sizes or masks:
        yield rebuild(structure, more)


def _is_ones(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[1] > 1 and not tensor.is_floating_point() and bool((tensor == 1).all())


def _sized(tensor: Tensor, shape: Sequence[Any]) -> Tensor:
    """Of that shape: cut, or its first indices once more."""
    for dim, wanted in enumerate(shape):
        more = max(0, wanted - tensor.shape[dim])
        tensor = torch.cat([tensor, tensor.narrow(dim, 0, more)], dim) if more else tensor.narrow(dim, 0, wanted)
    return tensor.contiguous()


@contextlib.contextmanager
def _unwritten(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards as they were before: a forward may count its calls."""
    packed = {id(b) for module in model.modules() if isinstance(module, QTensor) for b in module.buffers()}
    before = [(b, b.clone()) for b in model.buffers() if id(b) not in packed]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _outputs(model: nn.Module, call: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        torch.manual_seed(0)  # a model may draw noise in eval mode too
        return flat_outputs(flatten(model(**call))[1])


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
