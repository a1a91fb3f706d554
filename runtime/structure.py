"""The shape of inputs and outputs as plain data: what remains of a call when its tensors are taken out.

`flatten(value)` gives (structure, tensors); `rebuild(structure, tensors)` gives the value back. A structure is
JSON: a dict with a "kind". transformers' ModelOutput comes back as its own class where transformers is
installed, else as `Output`, which has the same attribute, key and index access; a named tuple comes back as one
of the same name and fields.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .errors import CaptureError

Structure = dict[str, Any]


class Output(dict[str, Any]):
    """An ordered mapping whose values are also attributes and, by position, items."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __getitem__(self, key: Any) -> Any:
        return tuple(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


def flatten(value: Any) -> tuple[Structure, list[Any]]:
    """Take the tensors out of nested tuples, lists, dicts, named tuples and ModelOutputs.

    Leaves are whatever is a Tensor; None, bool, int, float and str stay in the structure as constants.
    Raises CaptureError for other types.
    """
    leaves: list[Any] = []
    return _flatten(value, leaves, Tensor), leaves


def describe(value: Any, leaf: type) -> Structure:
    """The structure of `value` where leaves are instances of `leaf`."""
    return _flatten(value, [], leaf)


def _flatten(value: Any, leaves: list[Any], leaf: type) -> Structure:
    if isinstance(value, leaf):
        leaves.append(value)
        return {"kind": "tensor"}
    if value is None or isinstance(value, bool | int | float | str):
        return {"kind": "constant", "value": value}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = dict(zip(value._fields, value, strict=True))
        return {"kind": "namedtuple", "class": _path(value), "items": _items(items, leaves, leaf)}
    if isinstance(value, list | tuple):
        parts = [_flatten(v, leaves, leaf) for v in value]
        return {"kind": type(value).__name__, "items": parts}
    if isinstance(value, dict):  # ModelOutput is a dict too
        kind = "dict" if type(value) is dict else "output"
        return {"kind": kind, "class": _path(value), "items": _items(value, leaves, leaf)}
    raise CaptureError(
        f"{type(value).__name__} in an input or output",
        required="tensors, constants, and tuples, lists, dicts or ModelOutputs of them",
        found=type(value).__qualname__,
        cure="wrap the model in a module whose forward takes and returns tensors (for a cache: use_cache=False)",
    )


def rebuild(structure: Structure, leaves: Sequence[Any]) -> Any:
    """Inverse of `flatten`."""
    return _rebuild(structure, iter(leaves))


def _rebuild(structure: Structure, leaves: Any) -> Any:
    match structure["kind"]:
        case "tensor":
            return next(leaves)
        case "constant":
            return structure["value"]
        case "tuple":
            return tuple(_rebuild(s, leaves) for s in structure["items"])
        case "list":
            return [_rebuild(s, leaves) for s in structure["items"]]
    items = {name: _rebuild(s, leaves) for name, s in structure["items"].items()}
    if structure["kind"] == "namedtuple":
        return _tuple_class(structure["class"], tuple(items))(*items.values())
    if structure["kind"] == "dict":
        return items
    cls = _find(structure["class"])
    return cls(**items) if cls is not None else Output(items)


def _items(value: dict[str, Any], leaves: list[Any], leaf: type) -> dict[str, Structure]:
    for name in value:
        if not isinstance(name, str):
            raise CaptureError(
                "a dict in an input or output has a key that is not text",
                required="keys of type str",
                found=f"{name!r} ({type(name).__name__})",
                cure="wrap the model in a module that renames the keys",
            )
    return {name: _flatten(v, leaves, leaf) for name, v in value.items()}


def _path(value: Any) -> str:
    cls = type(value)
    path = f"{cls.__module__}:{cls.__qualname__}"
    if _is_output(path, cls):
        _CLASSES[path] = cls
    return path


def _tuple_class(path: str, fields: tuple[str, ...]) -> Any:
    """A named tuple like the one at `path`, which is not imported (an artifact must not choose what runs)."""
    return namedtuple(path.rpartition(":")[2].rpartition(".")[2], fields)


# Output classes seen or found so far: looked up once, since torch.compile cannot trace an import.
_CLASSES: dict[str, Any] = {}


def _find(path: str) -> Any:
    """The class an output had; None, for `Output`, where its library is absent."""
    if path not in _CLASSES:
        _CLASSES[path] = _import(path)
    return _CLASSES[path]


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    if not module.startswith(_LIBRARY):
        return None
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return cls if _is_output(path, cls) else None


# An artifact must not choose what runs: only output dataclasses of this library are made again.
_LIBRARY = "transformers."


def _is_output(path: str, cls: Any) -> bool:
    is_output = isinstance(cls, type) and issubclass(cls, dict) and dataclasses.is_dataclass(cls)
    return is_output and path.startswith(_LIBRARY)
