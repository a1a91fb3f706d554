"""What one captured graph takes and gives: names, dtypes, shapes with named dimensions, and structure.

Export's own guards say "guard failed"; a Contract says which input, what was required and what was found.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import CaptureError
from .structure import Structure, flatten

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Input:
    """One tensor of a call: an int in `shape` is fixed, a name may vary but is one number in one call.

    contiguous: it was so when it was captured, and the graph may count on it
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    contiguous: bool = True


@dataclass(frozen=True)
class Contract:
    """The calls that one variant serves.

    arguments: structure of the bound keyword arguments, tensors taken out (`structure.flatten`)
    inputs: those tensors, in order
    output: structure of the result
    limits: inclusive bounds of each named dimension
    """

    training: bool
    arguments: Structure
    inputs: tuple[Input, ...]
    output: Structure
    limits: dict[str, tuple[int, int | None]] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What a call must have in common with this contract to be served by it."""
        return call_key(self.training, self.arguments)

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise CaptureError unless `tensors` fit: dtype, rank, fixed sizes, named sizes, limits."""
        sizes: dict[str, tuple[int, str]] = {}
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            if tensor.dim() != len(spec.shape) or not _serves(spec.dtype, tensor.dtype):
                raise self._mismatch(spec, tensor)
            for size, required in zip(tensor.shape, spec.shape, strict=True):
                if isinstance(required, int):
                    if size != required:
                        raise self._mismatch(spec, tensor)
                elif required not in sizes:
                    low, high = self.limits.get(required, (0, None))
                    if size < low or (high is not None and size > high):
                        raise self._mismatch(spec, tensor, f"with {low} <= {required} <= {high or 'any'}")
                    sizes[required] = (size, spec.name)
                elif size != sizes[required][0]:
                    raise self._mismatch(
                        spec, tensor, f"with {required} = {sizes[required][0]}, as in {sizes[required][1]}"
                    )

    def laid(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors` in the memory layout that the graph counts on."""
        return [t.contiguous() if spec.contiguous else t for spec, t in zip(self.inputs, tensors, strict=True)]

    def _mismatch(self, spec: Input, tensor: Tensor, more: str = "") -> CaptureError:
        return CaptureError(
            f"input {spec.name!r} does not fit the captured graph",
            required=f"{spec.dtype} {list(spec.shape)} {more}".strip(),
            found=f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}",
            cure="capture with inputs of this shape, or name the dimension in dynamic_shapes",
        )

    def example(self) -> list[Tensor]:
        """Zeros of a size that fits: each named dimension its own, within its limits."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for name in (d for d in spec.shape if isinstance(d, str)):
                low, high = self.limits.get(name, (1, None))
                wanted = max(2 + 3 * len(sizes), low)
                sizes.setdefault(name, wanted if high is None else min(wanted, high))
        shapes = ([sizes[d] if isinstance(d, str) else d for d in spec.shape] for spec in self.inputs)
        return [
            torch.zeros(shape, dtype=getattr(torch, spec.dtype))
            for spec, shape in zip(self.inputs, shapes, strict=True)
        ]

    def describe(self) -> str:
        """One line: mode, and the arguments with their shapes or constants."""
        shapes = iter(self.inputs)
        parts = [f"{name}={_brief(part, shapes)}" for name, part in self.arguments["items"].items()]
        return f"{'train' if self.training else 'eval'}({', '.join(parts)})"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Contract:
        """Inverse of `to_json`."""
        inputs = tuple(Input(i["name"], i["dtype"], tuple(i["shape"]), i["contiguous"]) for i in data["inputs"])
        limits = {name: (low, high) for name, (low, high) in data["limits"].items()}
        return Contract(data["training"], data["arguments"], inputs, data["output"], limits)


class Signature:
    """How a model is called: its parameter names and defaults, in order.

    implied: arguments every call has unless it says otherwise; a transformers model's config may ask for a cache
    where the signature says None, and a cache is not a tensor that a graph could give.
    """

    def __init__(
        self,
        names: Sequence[str],
        defaults: Mapping[str, Any],
        open_ended: bool,
        implied: Mapping[str, Any] | None = None,
    ) -> None:
        self.names, self.defaults, self.open_ended = tuple(names), dict(defaults), open_ended
        self.implied = dict(implied or {})

    @staticmethod
    def of(model: torch.nn.Module) -> Signature:
        """Read from `model.forward`. Defaults that are not constants are left out."""
        names: list[str] = []
        defaults: dict[str, Any] = {}
        open_ended = False
        for name, p in inspect.signature(model.forward).parameters.items():
            if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                open_ended |= p.kind is p.VAR_KEYWORD
                continue
            names.append(name)
            if p.default is None or isinstance(p.default, bool | int | float | str):
                defaults[name] = p.default
        caches = "use_cache" in names and getattr(getattr(model, "config", None), "use_cache", False)
        return Signature(names, defaults, open_ended, {"use_cache": False} if caches else None)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, in signature order, implied ones added and those that have their default left out."""
        if len(args) > len(self.names):
            raise CaptureError("too many positional arguments", required=f"at most {len(self.names)}", found=len(args))
        bound = dict(zip(self.names, args, strict=False))
        for name, value in kwargs.items():
            if name in bound or (name not in self.names and not self.open_ended):
                problem = "given twice" if name in bound else "unknown"
                raise CaptureError(f"argument {name!r} {problem}", required=", ".join(self.names), found=name)
            bound[name] = value
        bound = {**self.implied, **{n: v for n, v in bound.items() if not self._is_default(n, v)}}
        order = [*self.names, *(n for n in bound if n not in self.names)]
        return {n: bound[n] for n in order if n in bound}

    def _is_default(self, name: str, value: Any) -> bool:
        return name in self.defaults and not isinstance(value, Tensor) and self.defaults[name] == value

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "names": list(self.names),
            "defaults": self.defaults,
            "open_ended": self.open_ended,
            "implied": self.implied,
        }

    def as_inspect(self) -> inspect.Signature:
        """For tools that ask a class what its forward takes."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("self", kind)]
        for name in self.names:
            # Python wants defaults last; an argument without a default cannot follow one with.
            late = any(p.default is not p.empty for p in parameters)
            default = self.defaults.get(name, None if late else inspect.Parameter.empty)
            parameters.append(inspect.Parameter(name, kind, default=default))
        return inspect.Signature(parameters)


def bind_call(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Structure, list[Tensor]]:
    """A call as (structure, tensors), the same however its arguments were passed."""
    return flatten(signature.bind(args, kwargs))


def call_key(training: bool, structure: Structure) -> Key:
    """Hashable identity of a call: mode, argument names, constants; not the tensors' shapes."""
    return (training, _key(structure))


def _key(structure: Structure) -> Key:
    kind = structure["kind"]
    if kind == "constant":
        return (kind, type(structure["value"]).__name__, structure["value"])
    items = structure.get("items")
    if items is None:
        return (kind,)
    if isinstance(items, dict):
        return (kind, *((name, _key(part)) for name, part in items.items()))
    return (kind, *(_key(part) for part in items))


# Indices and masks come in either. Any other dtype may take another way through the model than the graph has.
_INDICES = (torch.int32, torch.int64)


def _serves(captured: str, given: torch.dtype) -> bool:
    required = getattr(torch, captured)
    return given == required or (given in _INDICES and required in _INDICES)


def _brief(structure: Structure, shapes: Any) -> str:
    if structure["kind"] == "tensor":
        spec = next(shapes)
        return f"{spec.dtype}{list(spec.shape)}"
    if structure["kind"] == "constant":
        return repr(structure["value"])
    items = structure["items"]
    parts = items.values() if isinstance(items, dict) else items
    return f"{structure['kind']}({', '.join(_brief(p, shapes) for p in parts)})"
