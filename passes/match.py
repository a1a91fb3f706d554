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
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class _Trail:
    """What is matched so far. Frozen, so that a choice that fails further on leaves nothing behind."""

    bindings: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()
    shared: tuple[fx.Node, ...] = ()

    @property
    def length(self) -> int:
        return len(self.nodes) + len(self.bindings)


class _Misses:
    """The miss that got furthest: it says best what is in the way."""

    def __init__(self) -> None:
        self.length, self.best = -1, Miss("no order of the operands fits")

    def add(self, trail: _Trail, reason: str, at: object = None) -> None:
        if trail.length > self.length:
            self.length, self.best = trail.length, Miss(reason, at)


def match(pattern: Call, root: fx.Node) -> Match | Miss:
    """Match `pattern` with its outermost call at `root`."""
    misses = _Misses()
    for trail in _call(pattern, root, _Trail(), misses):
        inside = set(trail.nodes)
        leaks = [(n, u) for n in trail.nodes[1:] if n not in trail.shared for u in n.users if u not in inside]
        if not leaks:
            return Match(root, trail.bindings, trail.nodes)
        node, user = leaks[0]
        misses.add(trail, f"{node.name} is used by {user.name} as well", node)
    return misses.best


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


def _call(pattern: Call, node: object, trail: _Trail, misses: _Misses) -> Iterator[_Trail]:
    """Every way in which `pattern` can be `node`."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in pattern.targets:
        wanted = " or ".join(str(t) for t in pattern.targets)
        misses.add(trail, f"required {wanted}, found {_describe(node)}", node)
        return
    shared = (*trail.shared, node) if pattern.shared else trail.shared
    trail = replace(trail, nodes=(*trail.nodes, node), shared=shared)
    found = full_args(node)
    orders = [found]
    if pattern.commutative and len(pattern.args) >= 2:
        orders.append((found[1], found[0], *found[2:]))
    for named in _bind(pattern.name, node, trail, misses) if pattern.name is not None else (trail,):
        for arguments in orders:
            yield from _arguments(pattern.args, arguments, named, misses)


def _arguments(patterns: tuple[Any, ...], found: tuple[Any, ...], trail: _Trail, misses: _Misses) -> Iterator[_Trail]:
    if len(patterns) > len(found):
        misses.add(trail, f"required {len(patterns)} arguments, found {len(found)}")
    elif not patterns:
        yield trail
    else:
        for first in _argument(patterns[0], found[0], trail, misses):
            yield from _arguments(patterns[1:], found[1:], first, misses)


def _argument(pattern: Any, found: Any, trail: _Trail, misses: _Misses) -> Iterator[_Trail]:
    node = isinstance(found, fx.Node)
    match pattern:
        case Call():
            return _call(pattern, found, trail, misses)
        case Var(name):
            wrong = None if node else f"{name} is not a node"
        case Maybe(name):
            wrong = None if node or found is None else f"{name} is a literal"
        case Stored(name):
            wrong = None if node and found.op == "get_attr" else f"{name} is not a stored tensor"
        case Literal(name):
            wrong = f"{name} is computed" if node else None
        case _:
            if not node and found == pattern:
                return iter((trail,))
            wrong = f"required {pattern!r}, found {_describe(found)}"
    if wrong is None:
        return _bind(name, found, trail, misses)
    misses.add(trail, wrong, found)
    return iter(())


def _bind(name: str, value: Any, trail: _Trail, misses: _Misses) -> Iterator[_Trail]:
    if name not in trail.bindings:
        yield replace(trail, bindings={**trail.bindings, name: value})
        return
    known = trail.bindings[name]
    if known is value if isinstance(value, fx.Node) else known == value:
        yield trail
    else:
        misses.add(trail, f"{name} is both {_describe(known)} and {_describe(value)}", value)


def _describe(value: object) -> str:
    return f"{value.name} ({value.target})" if isinstance(value, fx.Node) else repr(value)
