"""Patterns on graphs, and why they do not match.

    x, w, b = Var("x"), Stored("w"), Var("b")
    Call(aten.add.Tensor, Call(aten.matmul.default, x, w), b, commutative=True)

A Var bound twice must be one node; a literal must be equal; arguments left at their schema default are filled
in before comparing. Inner nodes may have no users outside the match. `match` gives a Match or a Miss with
the reason and the node, never an exception. fx's own matcher is not used: it misses commuted operands and
one node bound to two inputs, and gives no reason (measured, torch 2.13).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..runtime.program import Program


class Pattern:
    """Something that an argument of a call can be."""


@dataclass(frozen=True)
class Var(Pattern):
    """Any node; the same one wherever the name recurs."""

    name: str


@dataclass(frozen=True)
class Stored(Pattern):
    """A node that reads a tensor of the Store."""

    name: str


@dataclass(frozen=True)
class Literal(Pattern):
    """Any argument that is not a node (a number, a list of sizes, None)."""

    name: str


@dataclass(frozen=True)
class Maybe(Pattern):
    """A node or None."""

    name: str


class Call(Pattern):
    """A call of one of `targets`. Plain Python values among `args` are literals to be equal to.

    `args` may be shorter than the operator's: what is left over is unconstrained.
    """

    def __init__(
        self,
        targets: Callable[..., Any] | tuple[Callable[..., Any], ...],
        *args: Any,
        name: str | None = None,
        commutative: bool = False,
        shared: bool = False,
    ) -> None:
        self.targets = targets if isinstance(targets, tuple) else (targets,)
        self.args, self.name, self.commutative, self.shared = args, name, commutative, shared


@dataclass(frozen=True)
class Match:
    """root: the matched node; bindings: what each name stands for; nodes: every call of the pattern."""

    root: fx.Node
    bindings: dict[str, Any]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]


@dataclass(frozen=True)
class Miss:
    """Why a pattern does not match, and at which argument."""

    reason: str
    at: object = None


@dataclass
class _Trail:
    """Bindings so far; copied before a choice so that the other one starts clean."""

    bindings: dict[str, Any] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)

    def copy(self) -> _Trail:
        return _Trail(dict(self.bindings), list(self.nodes))

    def take(self, other: _Trail) -> None:
        self.bindings, self.nodes = other.bindings, other.nodes


def match(pattern: Call, root: fx.Node) -> Match | Miss:
    """Match `pattern` with its outermost call at `root`."""
    trail = _Trail()
    miss = _call(pattern, root, trail)
    if miss is not None:
        return miss
    inside = set(trail.nodes)
    for node in trail.nodes[1:]:
        outside = [u for u in node.users if u not in inside]
        if outside and node not in trail.bindings.get("__shared__", ()):
            return Miss(f"{node.name} is used by {outside[0].name} as well", node)
    trail.bindings.pop("__shared__", None)
    return Match(root, trail.bindings, tuple(trail.nodes))


def full_args(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments of a call, keyword arguments and schema defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return tuple(node.args)
    values = list(node.args)
    for argument in schema.arguments[len(values) :]:
        values.append(node.kwargs.get(argument.name, argument.default_value))
    return tuple(values)


class Index:
    """Nodes of a program by what they call."""

    def __init__(self, program: Program) -> None:
        self._calls: dict[object, list[fx.Node]] = defaultdict(list)
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._calls[node.target].append(node)

    def roots(self, pattern: Call) -> Iterator[fx.Node]:
        """Where `pattern` could match, in graph order for each target."""
        for target in pattern.targets:
            yield from self._calls.get(target, ())


def _call(pattern: Call, node: object, trail: _Trail) -> Miss | None:
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in pattern.targets:
        wanted = " or ".join(str(t) for t in pattern.targets)
        return Miss(f"required {wanted}, found {_describe(node)}", node)
    trail.nodes.append(node)
    if pattern.shared:
        trail.bindings["__shared__"] = (*trail.bindings.get("__shared__", ()), node)
    if pattern.name is not None:
        miss = _bind(pattern.name, node, trail)
        if miss is not None:
            return miss
    found = full_args(node)
    if pattern.commutative and len(pattern.args) >= 2:
        attempt = trail.copy()
        if _arguments(pattern.args, found, attempt) is None:
            trail.take(attempt)
            return None
        found = (found[1], found[0], *found[2:])
    return _arguments(pattern.args, found, trail)


def _arguments(patterns: tuple[Any, ...], found: tuple[Any, ...], trail: _Trail) -> Miss | None:
    if len(patterns) > len(found):
        return Miss(f"required {len(patterns)} arguments, found {len(found)}")
    for pattern, argument in zip(patterns, found, strict=False):
        miss = _argument(pattern, argument, trail)
        if miss is not None:
            return miss
    return None


def _argument(pattern: Any, found: Any, trail: _Trail) -> Miss | None:
    match pattern:
        case Call():
            return _call(pattern, found, trail)
        case Var(name):
            return _bind(name, found, trail) if isinstance(found, fx.Node) else Miss(f"{name} is not a node", found)
        case Maybe(name):
            ok = found is None or isinstance(found, fx.Node)
            return _bind(name, found, trail) if ok else Miss(f"{name} is a literal", found)
        case Stored(name):
            stored = isinstance(found, fx.Node) and found.op == "get_attr"
            return _bind(name, found, trail) if stored else Miss(f"{name} is not a stored tensor", found)
        case Literal(name):
            return Miss(f"{name} is computed", found) if isinstance(found, fx.Node) else _bind(name, found, trail)
    if isinstance(found, fx.Node) or found != pattern:
        return Miss(f"required {pattern!r}, found {_describe(found)}", found)
    return None


def _bind(name: str, value: Any, trail: _Trail) -> Miss | None:
    known = trail.bindings.setdefault(name, value)
    same = known is value if isinstance(value, fx.Node) else known == value
    return None if same else Miss(f"{name} is both {_describe(known)} and {_describe(value)}", value)


def _describe(value: object) -> str:
    return f"{value.name} ({value.target})" if isinstance(value, fx.Node) else repr(value)
