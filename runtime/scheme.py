"""How a tensor is quantised, as one frozen value, and the presets everything shares.

    symmetric    codes in [-(2^(b-1)-1), 2^(b-1)-1], zero at 0
    asymmetric   codes in [0, 2^b - 1], integer zero point, 0.0 always representable
    ternary      codes in {-1, 0, 1}   (2 bits; Li et al. 2016, "Ternary Weight Networks")
    binary       codes in {-1, +1}     (1 bit; Rastegari et al. 2016, "XNOR-Net"), sign(0) = +1

Granularity says which elements share one scale: the whole tensor; one index of dim 0 ("channel" for weights,
"image" for activations of a convolution); one row of the last dim ("token", for activations); `group_size`
neighbours in a row ("group"); or `group_size` neighbouring channels ("rows", as DeepSpeed's quantize_groups).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch

from .errors import SchemeError

Kind = Literal["symmetric", "asymmetric", "ternary", "binary"]
Granularity = Literal["tensor", "channel", "image", "token", "group", "rows"]
SIZED: tuple[Granularity, ...] = ("group", "rows")
Rounding = Literal["nearest", "stochastic"]

_BITS: dict[Kind, range] = {
    "symmetric": range(2, 17),
    "asymmetric": range(2, 17),
    "ternary": range(2, 3),
    "binary": range(1, 2),
}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way of quantising one tensor.

    Invariants, checked on construction:
        bits fits kind (binary: 1, ternary: 2, uniform: 2 to 16)
        group_size is set  <=>  granularity is "group" or "rows"
    """

    bits: int = 8
    kind: Kind = "symmetric"
    granularity: Granularity = "channel"
    group_size: int | None = None
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        for field, allowed in (("kind", Kind), ("granularity", Granularity), ("rounding", Rounding)):
            if getattr(self, field) not in get_args(allowed):
                raise SchemeError(
                    f"unknown {field}", required=" | ".join(get_args(allowed)), found=repr(getattr(self, field))
                )
        if self.bits not in _BITS[self.kind]:
            span = _BITS[self.kind]
            raise SchemeError(
                f"{self.kind} quantisation with {self.bits} bits",
                required=f"{span.start} to {span.stop - 1} bits",
                found=self.bits,
                cure="1 bit is kind='binary'; 2 bits may be kind='ternary' or uniform",
            )
        if (self.group_size is not None) != (self.granularity in SIZED):
            raise SchemeError(
                "group_size goes with granularity 'group' or 'rows'",
                required="both or neither",
                found=f"granularity={self.granularity!r}, group_size={self.group_size}",
            )
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError("group_size must be positive", required=">= 1", found=self.group_size)

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return 0 if self.kind == "asymmetric" else -self.qmax

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.kind in ("ternary", "binary"):
            return 1
        return int(2**self.bits - 1) if self.kind == "asymmetric" else int(2 ** (self.bits - 1) - 1)

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of unpacked codes."""
        if self.bits > 8:
            return torch.int32
        return torch.uint8 if self.kind == "asymmetric" else torch.int8

    @property
    def stored(self) -> Scheme:
        """As a packed tensor is read: a scale of several channels is written beside each of them."""
        return replace(self, granularity="channel", group_size=None) if self.granularity == "rows" else self

    @property
    def nearest(self) -> Scheme:
        """As a finished tensor is rounded."""
        return replace(self, rounding="nearest")

    def at(self, bits: int) -> Scheme:
        """On the way to this scheme, `bits` wide: uniform until its own bits are reached."""
        if bits == self.bits:
            return self
        return replace(self, bits=bits, kind="asymmetric" if self.kind == "asymmetric" else "symmetric")

    def divided(self, shape: tuple[int, ...], groups: int) -> Scheme:
        """With `groups` scales for a weight of `shape`, each for neighbours in memory (DeepSpeed's quantize_groups).

        Raises SchemeError unless a scale belongs to whole channels, or to an even part of one.
        """
        channels, row = shape[0], math.prod(shape[1:])
        if groups == 1:
            return replace(self, granularity="tensor", group_size=None)
        if groups == channels:
            return replace(self, granularity="channel", group_size=None)
        if channels % groups == 0:
            return replace(self, granularity="rows", group_size=channels // groups)
        if groups % channels == 0 and row % (groups // channels) == 0:
            return replace(self, granularity="group", group_size=row * channels // groups)
        fits = [n for n in range(1, channels + 1) if channels % n == 0]
        fits += [channels * n for n in range(2, row + 1) if row % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - groups))[:3])
        raise SchemeError(
            f"{channels} channels of {row} do not divide into {groups} groups",
            required="whole channels in a group, or whole groups in a channel",
            found=groups,
            cure=f"nearest: {', '.join(map(str, near))}; or exclude this layer in the recipe",
        )

    def spell(self) -> str:
        """A short text that `parse` reads back: `8-symmetric-group128-nearest`."""
        size = "" if self.group_size is None else str(self.group_size)
        return f"{self.bits}-{self.kind}-{self.granularity}{size}-{self.rounding}"

    @staticmethod
    def parse(text: str) -> Scheme:
        """Inverse of `spell`. Raises SchemeError on anything else."""
        try:
            bits, kind, span, rounding = text.split("-")
            granularity = span.rstrip("0123456789") if span.startswith(SIZED) else span
            size = int(span.removeprefix(granularity)) if granularity != span else None
            return Scheme(
                bits=int(bits),
                kind=cast(Kind, kind),
                granularity=cast(Granularity, granularity),
                group_size=size,
                rounding=cast(Rounding, rounding),
            )
        except ValueError as error:
            raise SchemeError("not a scheme", required="bits-kind-granularity-rounding", found=repr(text)) from error


W8_CHANNEL = Scheme(bits=8, granularity="channel")
W4_CHANNEL = Scheme(bits=4, granularity="channel")
W4_G128 = Scheme(bits=4, granularity="group", group_size=128)
W4_G32 = Scheme(bits=4, granularity="group", group_size=32)
A8_TOKEN = Scheme(bits=8, granularity="token")
A8_TENSOR = Scheme(bits=8, granularity="tensor")
