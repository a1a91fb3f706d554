"""Modules that simulate their quantisation while they train: what `live` does in a graph, for a model that stays eager.

    module.__class__ = its twin     Linear, Conv2d, Embedding, transformers' Conv1D, and no subclass of these

So the module stays what it is to everything that holds it: parameters, ties, hooks, mode and name are untouched. A
twin calls the operators that `live` puts into graphs; what a schedule changes lies in its buffers, under the names of
`Gauge`, so that a compiled model is not compiled again.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime import compat
from ...runtime.ops.catalog import LIBRARY
from ...runtime.ops.operator import Operator
from ...runtime.ops.qlinear import is_integer
from ...runtime.ops.steps import LINEAR_OF_STEPS, STEPS_LIVE, STEPS_RANGED
from ...runtime.ops.training import FAKE_QUANTIZE_LIVE, FAKE_QUANTIZE_RANGED, OBSERVE_RANGE
from ...runtime.plan import Quantize
from ...runtime.store import Store
from .live import by_row
from .sites import Reading, Use

assert LIBRARY is not None  # importing the catalogue registers the operators

GAUGES = "weight_"  # how the names of a twin's own buffers begin
RANGE = "weight_input_range"


class Steering(Protocol):
    """What moves a model's twins, and has a state that belongs into checkpoints."""

    @property
    def remembers(self) -> bool:
        """Whether there is anything to save."""

    def to_tensor(self) -> Tensor:
        """The state."""

    def load_tensor(self, state: Tensor) -> None:
        """Inverse of `to_tensor`."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What one twin simulates; schemes as operators take them.

    weight: of the weight; drawn: with random rounding, in training; rows: of looked-up rows, in place of the weight's
    activation: of the input, with a range that training observes if static, by a moving average with `momentum`
    on_steps: whether a linear layer multiplies the input's steps, and whole: also those of the weight (`steps`)
    """

    edit: Quantize
    weight: str
    drawn: str | None
    rows: str | None
    activation: str | None
    static: bool
    momentum: float
    on_steps: bool
    whole: bool

    @staticmethod
    def of(edit: Quantize, *, alone: bool, momentum: float) -> Simulation:
        """alone: no other module reads the weight."""
        rows = by_row(edit, alone=alone)
        return Simulation(
            edit=edit,
            weight=edit.weight.nearest.spell(),
            drawn=edit.weight.spell() if edit.weight.rounding == "stochastic" else None,
            rows=None if rows is None else rows.spell(),
            activation=None if edit.activation is None else edit.activation.spell(),
            static=edit.static,
            momentum=momentum,
            on_steps=edit.activation is not None and edit.activation.kind == "symmetric",
            whole=is_integer(edit.weight.stored),
        )


class Twin(nn.Module):
    """What the twins have in common.

    steering: of all twins of a model; carries: whether this one has its state in the state_dict
    A state_dict without what only twins have, such as one of the model before, is loaded too.
    """

    simulates: Simulation
    steering: Steering
    carries: bool
    weight: Tensor
    weight_qmax: Tensor
    weight_mix: Tensor
    weight_key: Tensor
    weight_input_qmax: Tensor
    weight_input_mix: Tensor
    weight_input_range: Tensor

    def _weight(self, weight: Tensor, live: Operator = FAKE_QUANTIZE_LIVE) -> Any:
        """The weight as the product reads it, simulated at its precision of this moment; live: by which operator."""
        s = self.simulates
        drawn = s.drawn if self.training else None
        key = self.weight_key if drawn else None
        return live.overload(weight, self.weight_qmax, self.weight_mix, key, drawn or s.weight)

    def _input(self, x: Tensor, live: Operator = FAKE_QUANTIZE_LIVE, ranged: Operator = FAKE_QUANTIZE_RANGED) -> Any:
        """The input likewise."""
        s = self.simulates
        if s.activation is None:
            return x
        gauges = (self.weight_input_qmax, self.weight_input_mix)
        if not s.static:
            return live.overload(x, *gauges, None, s.activation)
        # A checkpointed block runs again in the backward pass, on a batch that was seen already.
        if self.training and (torch.compiler.is_compiling() or not compat.in_backward()):
            OBSERVE_RANGE.overload(self.weight_input_range, x, s.momentum)
        return ranged.overload(x, self.weight_input_range, *gauges, s.activation)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Q(x) Q(W)^T + b with W (N, K), in the order in which it will be computed on integers."""
        if not self.simulates.on_steps:
            return F.linear(self._input(x), self._weight(weight), bias)
        steps = self._input(x, STEPS_LIVE, STEPS_RANGED)
        own = self._weight(weight, STEPS_LIVE) if self.simulates.whole else (self._weight(weight), None)
        y: Tensor = LINEAR_OF_STEPS.overload(*steps, *own, bias)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with its model, but gauges and ranges stay fp32 in a model cast to half."""
        before = {name: tensor for name, tensor in self._buffers.items() if name.startswith(GAUGES)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def get_extra_state(self) -> Tensor | None:
        """The schedules of the whole model, in the twin that carries them."""
        return self.steering.to_tensor() if self.carries and self.steering.remembers else None

    def set_extra_state(self, state: Tensor | None) -> None:
        """Inverse of `get_extra_state`. Raises ScheduleError for a state of another model, recipe or version."""
        if state is not None:  # of a twin that does not carry it: then it is another configuration's
            self.steering.load_tensor(state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if destination[f"{prefix}_extra_state"] is None:
            del destination[f"{prefix}_extra_state"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        if RANGE in self._buffers:
            state_dict.setdefault(f"{prefix}{RANGE}", self.weight_input_range)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class TrainingLinear(Twin, nn.Linear):
    """y = Q(x) Q(W)^T + b."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self._linear(input, self.weight, self.bias)


class TrainingConv2d(Twin, nn.Conv2d):
    """y = conv2d(Q(x), Q(W)) + b."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W')."""
        x = input if input.dim() == 4 else input[None]  # without a batch it is one image all the same
        y: Tensor = self._conv_forward(self._input(x), self._weight(self.weight), self.bias)
        return y if input.dim() == 4 else y[0]


class TrainingEmbedding(Twin, nn.Embedding):
    """Rows of Q(W); where each row has its own scales, only those that are looked up are quantised."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) integer -> (..., K)."""
        rows = self.simulates.rows
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        if rows is None:
            return F.embedding(input, self._weight(self.weight), *options)
        found = F.embedding(input, self.weight, *options)
        y: Tensor = FAKE_QUANTIZE_LIVE.overload(found, self.weight_qmax, self.weight_mix, None, rows)
        return y


@functools.cache
def _conv1d() -> Any:  # stands for the class that transformers has
    base = importlib.import_module("transformers.pytorch_utils").Conv1D

    class TrainingConv1D(Twin, base):  # type: ignore[misc, valid-type]  # known only now
        """y = Q(x) Q(W^T)^T + b: a linear layer that stores (K, N)."""

        def forward(self, x: Tensor) -> Tensor:
            """(..., K) -> (..., N)."""
            return self._linear(x, self.weight.t(), self._parameters["bias"])

    TrainingConv1D.__qualname__ = "TrainingConv1D"
    return TrainingConv1D


def __getattr__(name: str) -> Any:
    if name == "TrainingConv1D":  # for pickle, which looks a class up by its name
        return _conv1d()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _twin_of(module: nn.Module) -> tuple[str, Any] | None:
    """The operator a module stands for, and its twin's class."""
    kind: type = type(module)
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None  # parametrised: what it multiplies by is computed
    if kind is nn.Linear:
        return "linear", TrainingLinear
    if kind is nn.Embedding:  # with max_norm the table is written when it is read
        return ("embedding", TrainingEmbedding) if vars(module)["max_norm"] is None else None
    if isinstance(module, nn.Conv2d):
        return ("conv2d", TrainingConv2d) if kind is nn.Conv2d and symmetric_padding(module) is not None else None
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return "linear", _conv1d()
    return None


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Rows and columns added at each side; None where "same" pads one side more than the other."""
    if isinstance(conv.padding, tuple):
        rows, columns = conv.padding
        return int(rows), int(columns)
    if conv.padding == "valid":
        return 0, 0
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return (totals[0] // 2, totals[1] // 2) if not any(total % 2 for total in totals) else None


def read_modules(model: nn.Module) -> tuple[Reading, list[nn.Module]]:
    """The weights of a model as its modules read them, with the module of each use.

    That a module's forward is never called, or a weight is read past it, cannot be told without a graph.
    """
    store, uses, modules = Store.of(model), [], []
    for path, module in model.named_modules():
        twin = _twin_of(module)
        if twin is None:
            continue
        transposed = twin[0] == "linear" and not isinstance(module, nn.Linear)
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        fqn = store.canonical(_weight_name(path))
        uses.append(Use(operator=twin[0], fqn=fqn, label=path, transposed=transposed, groups=groups))
        modules.append(module)
    owned = {id(module) for module in modules}
    named = {_weight_name(p): id(m) for p, m in model.named_modules(remove_duplicate=False)}

    def others(fqn: str) -> list[str]:
        return [name for name in store.names_of(fqn) if named.get(name) not in owned]

    return Reading(store, tuple(uses), others, []), modules


def _weight_name(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def become_twin(module: nn.Module, simulation: Simulation, steering: Steering, *, carries: bool) -> None:
    """Make a module its own twin, in place."""
    twin = _twin_of(module)
    assert twin is not None
    if simulation.static:
        module.register_buffer(RANGE, torch.zeros(2, device=module.get_parameter("weight").device))
    module.__class__ = twin[1]
    attributes = {"simulates": simulation, "steering": steering, "carries": carries}
    module.__dict__.update(attributes)


def twins_of(model: nn.Module) -> Iterator[Twin]:
    """All twins in a model, in order."""
    return (module for module in model.modules() if isinstance(module, Twin))
