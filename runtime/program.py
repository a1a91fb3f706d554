"""A model's graph in canonical ATen, with what it takes and gives and the log of what was done to it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from . import compat
from .contract import Contract
from .ops.catalog import by_overload
from .ops.require import REQUIRE
from .store import Store, view

aten = torch.ops.aten

# What a new node takes over from the one it stands for: where in the model it came from.
_KEPT = ("nn_module_stack", "stack_trace", "custom")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a log: a rewrite applied or declined, and why."""

    stage: str
    rule: str
    where: str = ""
    applied: bool = True
    reason: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class Program:
    """One variant of a model.

    Invariants, checked by the passes' driver after every pass:
        graph.lint() passes; placeholders are contract.inputs in order; the output node holds a flat tuple
        every get_attr names a tensor of the store; the module is a view of the store
        node.meta["val"] and node.meta["nn_module_stack"] are true, where the graph came from capture
    """

    module: fx.GraphModule
    store: Store
    contract: Contract
    log: list[Entry] = field(default_factory=list)

    @staticmethod
    def of(graph: fx.Graph, store: Store, contract: Contract, log: Iterable[Entry] = ()) -> Program:
        """A graph as a view on `store`."""
        root = torch.nn.Module()
        view(store, root)
        module = fx.GraphModule(root, graph, "Program")
        view(store, module)
        return Program(module, store, contract, list(log))

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        graph: fx.Graph = self.module.graph
        return graph

    def copy(self, store: Store | None = None) -> Program:
        """The same graph once more, on the same store or on one with the same names."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, values)
        graph.output(output)
        for old, new in values.items():
            new.meta = dict(old.meta)
        return Program.of(graph, store or self.store, self.contract, self.log)

    def calls(self, *targets: Callable[..., Any]) -> list[fx.Node]:
        """All calls of `targets`, in graph order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in targets]

    def run(self, tensors: Iterable[Tensor]) -> list[Any]:
        """Call the graph on flat inputs; flat outputs."""
        return list(self.module(*tensors))

    def tensor_of(self, node: object) -> str | None:
        """The stored name a get_attr node reads, None for any other argument."""
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def get_attr(self, name: str, before: fx.Node) -> fx.Node:
        """A node that reads the stored tensor `name`, placed before `before`."""
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        mode = compat.fake_mode_of(self.graph)
        if mode is not None:
            tensor = self.module.get_buffer(name) if _is_buffer(self.module, name) else self.module.get_parameter(name)
            node.meta["val"] = compat.fake_tensor(mode, tensor.detach())
        return node

    def emit(self, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new call before `like`, with its value inferred and its module path taken over."""
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in like.meta.items() if k in _KEPT}
        mode = compat.fake_mode_of(self.graph)
        if mode is not None:
            values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = compat.fake_value(mode, target, *values)
        return node

    def emit_alike(self, target: Callable[..., Any], x: fx.Node, *args: Any, like: fx.Node) -> fx.Node:
        """`emit` of a call on `x` that keeps its shape and dtype: the value is not inferred but taken over."""
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, (x, *args))
        node.meta = {k: v for k, v in like.meta.items() if k in _KEPT} | {k: v for k, v in x.meta.items() if k == "val"}
        return node

    def infer(self) -> None:
        """Record values on a graph that has none (a loaded one), as they are at some sizes that the contract allows."""
        if compat.fake_mode_of(self.graph) is None:
            compat.record_values(self.module, self.contract.example())

    def written(self) -> list[str]:
        """Names of the stored tensors that some call writes in place, itself or through a view."""
        names = dict[str, None]()
        for node in self.graph.nodes:
            if writes(node):
                base = node.args[0]
                while isinstance(base, fx.Node) and base.op == "call_function":
                    base = base.args[0] if base.args else None
                name = self.tensor_of(base)
                if name is not None:
                    names[name] = None
        return list(names)

    @contextlib.contextmanager
    def unwritten(self) -> Iterator[None]:
        """Stored tensors are afterwards as they were before, whatever was run."""
        held = {name: value for name in self.written() if isinstance(value := self.store.get(name), Tensor)}
        before = {name: value.detach().clone() for name, value in held.items()}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in held.items():
                    value.copy_(before[name])

    def tidy(self) -> None:
        """Drop dead nodes and regenerate the code. In training a dead random call stays: it advances the generator."""
        training = self.contract.training
        self.graph.eliminate_dead_code(
            lambda n: n.op in ("placeholder", "output") or writes(n) or checks(n) or (training and is_random(n))
        )
        self.module.recompile()


def writes(node: fx.Node) -> bool:
    """Whether a call writes an argument in place."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def checks(node: fx.Node) -> bool:
    """Whether a call computes nothing, but requires the value that the graph was captured for."""
    return node.op == "call_function" and by_overload(node.target) is REQUIRE


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def escapes(node: fx.Node) -> bool:
    """Whether the memory of a node's value may be written by a later call, or given to the caller."""
    return any(user.op == "output" or writes(user) or (_may_alias(user) and escapes(user)) for user in node.users)


def source_of(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may be a view of."""
    while node.op == "call_function" and _may_alias(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


# Calls that may give back an argument itself, which their schema does not say.
_GIVES_BACK = (operator.getitem, aten.dropout.default, aten.feature_dropout.default, aten.type_as.default)


def _may_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    declared = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return declared or node.target in _GIVES_BACK


def value_of(node: fx.Node) -> Tensor:
    """The recorded (fake) tensor of a node."""
    value: Tensor = node.meta["val"]
    return value


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is one tensor of floating-point numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def same_shape(x: fx.Node, y: fx.Node) -> bool:
    """Whether two values have the same sizes, or sizes that vary by the same name. No size is guarded."""
    return [str(n) for n in value_of(x).shape] == [str(n) for n in value_of(y).shape]


def _is_buffer(module: torch.nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in module.get_submodule(owner)._buffers
