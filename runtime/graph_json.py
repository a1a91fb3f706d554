"""A graph as plain JSON and back, such that a file can call nothing outside one visible list.

    node      {"op": "call_function", "name": "y", "target": "torch.ops.aten.linear.default", "args": ["%x", "%w"]}
              ops: placeholder, get_attr, call_function, output; empty args and kwargs are left out, so is metadata
    argument  number, true, false, null            itself
              "%x"                                 the node named x
              [a, b]                               a list
              {"tuple": [a, b]} {"slice": [a, b, c]} {"dict": {"k": a}}
              {"str": "x"} {"float": "-inf"} {"complex": [re, im]}
              {"dtype": "float32"} {"layout": "strided"} {"memory_format": "contiguous_format"}
              {"device": "cuda:1"}; {"device": "model"} where the model itself was: it follows the model on loading

fx writes Python source from a graph and executes it, so names that reach that source as they are (inputs,
keywords, attribute paths) are checked here on the way in as well as out.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from .errors import ArtifactError
from .ops.catalog import LIBRARY

# Operator namespaces that a graph may call into. The last two are registered by importing the package so named.
NAMESPACES = ("aten", str(LIBRARY.ns), "torchvision", "transformers")

# What export writes on sizes and on results with several parts.
_OPERATOR = "getitem add sub mul floordiv truediv mod pow neg pos abs eq ne lt le gt ge and_ or_ xor not_ lshift rshift"
_TORCH = "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sum"
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR.split()},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    "builtins.round": round,
}
_SPELLED = {function: name for name, function in FUNCTIONS.items()}

_OVERLOAD = type(torch.ops.aten.add.Tensor)
_PACKET = type(torch.ops.aten.add)
_SPACE = type(torch.ops.aten)
_TORCH_VALUES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}

# fx quotes parts of an attribute path in its source without escaping them.
_PATH = re.compile(r'[^."\\\x00-\x1f\x7f]+(\.[^."\\\x00-\x1f\x7f]+)*')

Node = dict[str, Any]


def graph_to_json(graph: fx.Graph, home: torch.device) -> list[Node]:
    """The nodes of `graph` in order. home: the device of the model.

    Raises ArtifactError naming the node that calls or holds what cannot be saved.
    """
    return [_node_to_json(node, home) for node in graph.nodes]


def graph_from_json(nodes: Iterable[Mapping[str, Any]], home: torch.device, stored: Collection[str]) -> fx.Graph:
    """Inverse of `graph_to_json`. home: the device the model is loaded on; stored: names that a get_attr may read.

    Raises ArtifactError on a target outside the list, a name that nothing defines, or anything malformed.
    """
    graph, known, op = fx.Graph(), dict[str, fx.Node](), ""
    for node in nodes:
        if op == "output":
            raise _malformed("graph", "an output node, last", f"{node!r:.100} after it")
        name, op = node["name"], node["op"]
        if not isinstance(name, str) or name in known:
            raise _malformed("node", "a name of its own", repr(name))
        args = tuple(_from_json(arg, known, home) for arg in node.get("args", []))
        kwargs = {_identifier(key): _from_json(arg, known, home) for key, arg in node.get("kwargs", {}).items()}
        known[name] = graph.create_node(op, _target_from_json(op, node["target"], stored), args, kwargs, name)
    if op != "output":
        raise _malformed("graph", "an output node, last", op or "no nodes")
    return graph


def resolve(target: str) -> Callable[..., Any]:
    """What `target` names: a function of FUNCTIONS, or a registered operator of NAMESPACES without files or messages.

    Raises ArtifactError on anything else.
    """
    if target in FUNCTIONS:
        return FUNCTIONS[target]
    match target.split("."):
        case ["torch", "ops", space, name, overload] if space in NAMESPACES:
            found: Any = torch.ops
            for part, kind in ((space, _SPACE), (name, _PACKET), (overload, _OVERLOAD)):
                found = getattr(found, part, None)
                if not isinstance(found, kind):
                    raise ArtifactError(
                        f"the graph calls {target}, which is not registered here",
                        required=f"torch with the operator {space}::{name}.{overload}",
                        found=f"torch {torch.__version__} without it",
                        cure=f"import the package that registers {space}, in the version it was saved with",
                    )
            texts = [a.name for a in found._schema.arguments if "str" in str(a.type)]
            # inductor writes the message of an assertion into C++ as it is (torch 2.13)
            if not any(word in name for name in texts for word in ("file", "path", "assert")):
                function: Callable[..., Any] = found
                return function
    raise ArtifactError(
        f"a saved graph may not call {target}",
        required=f"an operator of {', '.join(NAMESPACES)} that opens no file and has no message, or one of "
        f"{', '.join(FUNCTIONS)}",
        found=target,
        cure="load only artifacts you trust; a new kind of call is one entry in runtime/graph_json.py",
    )


def spell(target: object) -> str:
    """Inverse of `resolve`. Raises ArtifactError unless `resolve` gives `target` back."""
    if isinstance(target, _OVERLOAD):
        name = f"torch.ops.{target}"
    else:
        name = _SPELLED.get(target) if callable(target) else None  # type: ignore[assignment]  # None is told below
        name = name or f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', target)}"
    if resolve(name) is not target:
        raise _malformed("call", f"what {name} names", repr(target))
    return name


def _node_to_json(node: fx.Node, home: torch.device) -> Node:
    try:
        target = spell(node.target) if node.op == "call_function" else str(node.target)
        _target_from_json(node.op, target, (target,))
        written: Node = {"op": node.op, "name": node.name, "target": target}
        if node.args:
            written["args"] = [_to_json(arg, home) for arg in node.args]
        if node.kwargs:
            written["kwargs"] = {_identifier(key): _to_json(arg, home) for key, arg in node.kwargs.items()}
        return written
    except ArtifactError as error:
        raise ArtifactError(
            f"node {node.name!r} cannot be saved: {error.message}",
            required=error.required,
            found=error.found,
            cure="exclude that part of the model, or write it in operators of the list",
        ) from error


def _target_from_json(op: str, target: str, stored: Collection[str]) -> Any:
    match op:
        case "call_function":
            return resolve(target)
        case "placeholder":
            return _identifier(target)
        case "get_attr":
            if target not in stored or not _PATH.fullmatch(target):
                raise _malformed("attribute", "the name of a stored tensor", repr(target))
            return target
        case "output":
            return "output"
    raise _malformed("node", "placeholder, get_attr, call_function or output", op)


def _identifier(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise _malformed("name", "a Python identifier", repr(name))
    return name


def _to_json(value: Any, home: torch.device) -> Any:
    match value:
        case fx.Node():
            return f"%{value.name}"
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case complex():
            return {"complex": [_to_json(value.real, home), _to_json(value.imag, home)]}
        case str():
            return {"str": value}
        case list():
            return [_to_json(v, home) for v in value]
        case tuple() if not hasattr(value, "_fields"):
            return {"tuple": [_to_json(v, home) for v in value]}
        case dict() if all(isinstance(key, str) for key in value):
            return {"dict": {key: _to_json(v, home) for key, v in value.items()}}
        case slice():
            return {"slice": [_to_json(v, home) for v in (value.start, value.stop, value.step)]}
        case torch.device():
            at_home = value.type == home.type and value.index in (None, home.index)
            return {"device": "model" if at_home else str(value)}
    for kind, cls in _TORCH_VALUES.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    required = (
        "numbers, text, None, dtype, device, layout, memory format, nodes, and lists, tuples, dicts, slices of them"
    )
    raise _malformed("argument", required, f"{type(value).__name__} {value!r:.100}")


def _from_json(value: Any, known: Mapping[str, fx.Node], home: torch.device) -> Any:
    match value:
        case None | bool() | int() | float():
            return value
        case str() if value.startswith("%") and value[1:] in known:
            return known[value[1:]]
        case list():
            return [_from_json(v, known, home) for v in value]
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_from_json(v, known, home) for v in items)
        case {"slice": [start, stop, step], **rest} if not rest:
            return slice(*(_from_json(v, known, home) for v in (start, stop, step)))
        case {"dict": dict(items), **rest} if not rest:
            return {str(key): _from_json(v, known, home) for key, v in items.items()}
        case {"str": str(text), **rest} if not rest:
            return text
        case {"float": "inf" | "-inf" | "nan" as text, **rest} if not rest:
            return float(text)
        case {"complex": [real, imaginary], **rest} if not rest:
            return complex(_from_json(real, known, home), _from_json(imaginary, known, home))
        case {"device": str(text), **rest} if not rest:
            return home if text == "model" else torch.device(text)
        case dict() if len(value) == 1:
            kind, name = next(iter(value.items()))
            return _torch_value(kind, name)
    raise _malformed("argument", "an argument as described in runtime/graph_json.py", f"{value!r:.100}")


def _torch_value(kind: str, name: str) -> Any:
    value = vars(torch).get(name)
    if kind not in _TORCH_VALUES or not isinstance(value, _TORCH_VALUES[kind]):
        raise _malformed("argument", f"a {' or '.join(_TORCH_VALUES)} of torch", f"{kind} {name!r:.100}")
    return value


def dtype_named(name: str) -> torch.dtype:
    """The dtype called `name` ("float32"). Raises ArtifactError on anything else."""
    dtype: torch.dtype = _torch_value("dtype", name)
    return dtype


def _malformed(what: str, required: str, found: object) -> ArtifactError:
    return ArtifactError(f"malformed {what} in a graph", required=required, found=found)
