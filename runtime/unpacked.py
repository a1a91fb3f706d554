"""Weights of 1 to 7 bits as the int8 that the CPU multiplies, kept from call to call while there is room for them.

Milliseconds of one linear of binary weights, one EPYC core (AVX-512 VNNI), kept / unpacked on each call, by rows of
activations (`benchmarks/few_bits.py`; 2 and 4 bits are unpacked in .5 to .95 of that time):

    N x K           1 row        8            128          1024         unpacking alone
    384 x 384       .026 / .095  .032 / .102  .080 / .150  .446 / .512  .066
    768 x 768       .032 / .143  .055 / .163  .219 / .325  1.52 / 1.63  .105
    3072 x 768      .054 / .345  .137 / .428  .886 / 1.19  6.74 / 7.25  .288
    768 x 3072      .058 / .311  .138 / .399  .712 / .971  5.56 / 5.95  .253

So one token takes four to six times as long where weights are unpacked each time, 128 tokens 1.3 to 1.9 times, and 1024
about 1.1. Kept, weights take as much memory as int8 ones do. The rule: what is called first is kept, up to ROOM bytes
in the process, and the rest is unpacked on each call. So a model of up to a quarter of a billion weights is as fast as
one of 8 bits, and a larger one keeps the memory that it was made small for.

What is kept belongs to one tensor object and its version: a write (refresh, load_state_dict) or another tensor in its
place (`.to()`, a copy) is unpacked anew, and what is kept of a tensor goes with it. It is no part of any module, so
nothing saves or copies it. Written through `.data`, a tensor keeps its version, and this cannot see it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import compat
from .layout import unpack
from .scheme import Scheme

ROOM = 1 << 28


@dataclass(frozen=True)
class _Kept:
    of: weakref.ref[Tensor]
    state: tuple[int, int, int, Scheme]
    codes: Tensor


# By id of the packed tensor. Single reads and writes of a dict are atomic, and threads that meet at an empty place both
# unpack the same.
_KEPT: dict[int, _Kept] = {}


def int8_codes(packed: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """int8 (N, columns) of packed symmetric, ternary or binary codes; not to be written."""
    if scheme.bits == 8:
        return packed
    if packed.is_inference():  # it has no version
        return unpack(packed, columns, scheme)
    state = (compat.version_of(packed), packed.data_ptr(), columns, scheme)
    known = _KEPT.get(id(packed))
    if known is not None and known.of() is packed and known.state == state:
        return known.codes
    codes = unpack(packed, columns, scheme)
    others = sum(kept.codes.numel() for at, kept in list(_KEPT.items()) if at != id(packed))
    if others + codes.numel() <= ROOM:
        _KEPT[id(packed)] = _Kept(weakref.ref(packed, _forgetting(id(packed))), state, codes)
    return codes


def _forgetting(at: int) -> Callable[[object], None]:
    """Called when a tensor is gone, before another can have its id."""

    def forget(_: object) -> None:
        _KEPT.pop(at, None)

    return forget


def forget() -> None:
    """Let go of all that is kept."""
    _KEPT.clear()
