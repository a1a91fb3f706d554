"""Packed weights for a compiled graph whose parameters are arguments: of one module, or of many in turn.

dynamo compiles one graph for all modules that look alike (regional compilation) and guards on neither identity nor
value of their parameters. So a weight is looked up by the parameter that a call brings: packed when it is new,
packed again when it was written, which shows in

    its version counter         writes in place: copy_, load_state_dict, optimizers
    its address                 parameter.data = tensor
    PEEK bytes in its middle    parameter.data.copy_(...) and parameter.data += ..., which move neither of these

Only memory of the CPU is peeked at: elsewhere each call would wait for the device.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..runtime import compat
from ..runtime.qtensor import QTensor

# Half a cache line. To check MiniLM's 36 weights takes 70 us of a call, beside 1.5 ms for 1x16 tokens (one EPYC core).
PEEK = 32

State = tuple[int, int, bytes]
"""What tells that a parameter was written: its version, its address, what lies in its middle."""


@dataclass(eq=False, slots=True)
class _Known:
    """A parameter that was met, and its packed form as it was at `state`; parts are the form's own buffers."""

    parameter: weakref.ref[Tensor]
    packed: QTensor
    parts: tuple[Tensor, ...]
    state: State


class PackedWeights:
    """The packed form of each weight of one graph, for every parameter that the graph was called with and that lives.

    Invariant: `self(parameters)` are the buffers of QTensor.quantize(parameter) of each, in order, made only where
    the parameter is new or was written since.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, QTensor]]) -> None:
        self._slots = [_Slot(parameter, packed) for parameter, packed in weights]

    def __call__(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Codes, scale and, where the scheme has one, zero point of each parameter as it is now."""
        parts: list[Tensor] = []
        for slot, parameter in zip(self._slots, parameters, strict=True):
            parts += slot.parts(parameter)
        return parts


class _Slot:
    """One weight of the graph, by parameter: dynamo guards dtype, device, shape and strides, which so are the same."""

    def __init__(self, parameter: Tensor, packed: QTensor) -> None:
        self._scheme, self._dims = packed.scheme, packed.dims
        self._middle, self._bytes = _middle(parameter) if parameter.device.type == "cpu" else (0, 0)
        self._known: dict[int, _Known] = {}
        self._learn(parameter, packed, self._state(parameter))

    def parts(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """Buffers of the parameter's packed form."""
        state = self._state(parameter)
        known = self._known.get(id(parameter))
        if known is None or known.parameter() is not parameter:
            packed = QTensor.quantize(parameter.detach(), self._scheme, dims=self._dims)
            return self._learn(parameter, packed, state).parts
        if known.state != state:
            known.packed.refresh(parameter.detach())
            known.state = state  # only now: a weight that cannot be packed fails again on the next call
        return known.parts

    def _state(self, parameter: Tensor) -> State:
        address = parameter.data_ptr()
        return compat.version_of(parameter), address, ctypes.string_at(address + self._middle, self._bytes)

    def _learn(self, parameter: Tensor, packed: QTensor, state: State) -> _Known:
        key = id(parameter)
        ref = weakref.ref(parameter, lambda _: self._known.pop(key, None))
        self._known[key] = known = _Known(ref, packed, tuple(packed.buffers()), state)
        return known


def _middle(weight: Tensor) -> tuple[int, int]:
    """Offset and number of bytes to read in the middle of a weight; of one element where its memory has gaps."""
    if not weight.numel():
        return 0, 0
    size = weight.element_size()
    if weight.is_contiguous():
        return weight.numel() // 2 * size, min(PEEK, (weight.numel() + 1) // 2 * size)
    return sum(n // 2 * stride for n, stride in zip(weight.shape, weight.stride(), strict=True)) * size, size
