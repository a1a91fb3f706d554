"""What was decided, as frozen values that can be saved and replayed on any variant of a model.

Edits address parameters by name, never graph nodes, so the same Plan edits the graph captured for training,
the one for inference, one captured next week, and the eager module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import ArtifactError
from .scheme import Scheme

# How the codes of a weight are found: each number's nearest, or by data that reaches the layer.
WeightMethod = Literal["nearest", "gptq", "awq"]


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantise parameter `fqn` with `weight`, and the activation that meets it with `activation`.

    operator: the kind of call site, "linear", "embedding" or "conv2d".
    static: the activation's scale and zero point were calibrated and lie in the Store beside the weight
        (`input_scale_name`, `input_zero_name`), one pair for each input that it meets; else they are computed on each
        call.
    learned: the weight's scale was trained and lies in the Store beside it (`weight_scale_name`)
    learned_input: so was the static activation's
    method: how the weight is rounded; where not to nearest, its scale and zero point lie in the Store beside it
        (`weight_scale_name`, `weight_zero_name`)
    smooth: SmoothQuant's alpha, by which the activation's size moves into the weight
    """

    fqn: str
    operator: str
    weight: Scheme
    activation: Scheme | None = None
    static: bool = False
    learned: bool = False
    learned_input: bool = False
    method: WeightMethod = "nearest"
    smooth: float | None = None

    @property
    def has_scale(self) -> bool:
        """Whether the weight's scale lies in the Store, and is not to be computed from the weight."""
        return self.learned or self.method != "nearest"

    @property
    def moves_scale(self) -> bool:
        """Whether some of its input's size moves into the weight."""
        return self.operator == "linear" and (self.method == "awq" or self.smooth is not None)

    def without_activation(self) -> Quantize:
        """The same for the weight alone."""
        return replace(self, activation=None, static=False, learned_input=False, smooth=None)


@dataclass(frozen=True, kw_only=True)
class DropBlock:
    """Leave out the block of module path `path`: what goes in comes out."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Take indices out of dimension `dim` of stored tensor `fqn`, which has `size` of them before."""

    fqn: str
    dim: int
    size: int
    removed: tuple[int, ...]

    @property
    def kept(self) -> Tensor:
        """int64: the indices that stay."""
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[list(self.removed)] = False
        return mask.nonzero().flatten()


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """Parameter `fqn` has `zeros` zeros among its `total` numbers, at places of a pattern: "2:4", "4x1"."""

    fqn: str
    pattern: str
    zeros: int
    total: int


Edit = DropBlock | Slice | Sparsify | Quantize
EDITS: tuple[type[Edit], ...] = (DropBlock, Slice, Sparsify, Quantize)


@dataclass(frozen=True)
class Plan:
    """All edits of one compressed model, in the order in which they apply."""

    edits: tuple[Edit, ...] = ()

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __len__(self) -> int:
        return len(self.edits)

    def quantize(self, fqn: str, operator: str) -> Quantize | None:
        """The quantisation of one parameter at one kind of call site."""
        for edit in self.edits:
            if isinstance(edit, Quantize) and edit.fqn == fqn and edit.operator == operator:
                return edit
        return None

    @property
    def drops(self) -> tuple[DropBlock, ...]:
        """All blocks that go."""
        return tuple(edit for edit in self.edits if isinstance(edit, DropBlock))

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All cuts."""
        return tuple(edit for edit in self.edits if isinstance(edit, Slice))

    @property
    def sparsities(self) -> tuple[Sparsify, ...]:
        """All weights with zeros."""
        return tuple(edit for edit in self.edits if isinstance(edit, Sparsify))

    @property
    def patterns(self) -> dict[str, str]:
        """Where the zeros of each of them are, by name."""
        return {edit.fqn: edit.pattern for edit in self.sparsities}

    @property
    def quantizations(self) -> tuple[Quantize, ...]:
        """All quantisations."""
        return tuple(edit for edit in self.edits if isinstance(edit, Quantize))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, one object an edit."""
        return [{"edit": type(edit).__name__, **_plain(edit)} for edit in self.edits]

    @staticmethod
    def from_json(data: list[dict[str, Any]]) -> Plan:
        """Inverse of `to_json`. Raises ArtifactError on an edit this version does not know."""
        return Plan(tuple(_edit(dict(item)) for item in data))


def weight_scale_name(fqn: str) -> str:
    """Where the scale of parameter `fqn` is stored, if it was learned or found by data."""
    return f"{fqn}_scale"


def weight_zero_name(fqn: str) -> str:
    """Where its zero point is stored."""
    return f"{fqn}_zero_point"


def input_scale_name(name: str, call: int = 0) -> str:
    """Where the calibrated scale of the activation is stored that meets a parameter at one of its calls.

    name: the parameter's in the module that calls, where it has several; call: of those of that module
    """
    return of_call(f"{name}_input_scale", call)


def input_zero_name(name: str, call: int = 0) -> str:
    """Where its zero point is stored."""
    return of_call(f"{name}_input_zero_point", call)


def of_call(name: str, call: int) -> str:
    """A name for what every call has of its own; the first one's is the plain one."""
    return f"{name}_{call}" if call else name


def _plain(edit: Edit) -> dict[str, Any]:
    found = asdict(edit)
    if isinstance(edit, Quantize):  # as plans were written before there were such methods
        found = {k: v for k, v in found.items() if (k, v) not in (("method", "nearest"), ("smooth", None))}
    return found


def _edit(item: dict[str, Any]) -> Edit:
    kind = item.pop("edit", None)
    for cls in EDITS:
        if cls.__name__ == kind:
            schemes = {k: Scheme(**v) for k, v in item.items() if isinstance(v, dict)}
            lists = {k: tuple(v) for k, v in item.items() if isinstance(v, list)}
            return cls(**{**item, **schemes, **lists})
    known = ", ".join(cls.__name__ for cls in EDITS)
    raise ArtifactError("unknown edit in a plan", required=known, found=kind, cure="update dwindle")
