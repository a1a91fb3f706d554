"""A model's graph in canonical ATen, with what it takes and gives and the log of what was done to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from . import compat
from .contract import Contract
from .store import Store, view

# What a new node takes over from the one it stands for: where in the model it came from.
_KEPT = ("nn_module_stack", "stack_trace")


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

    def copy(self) -> Program:
        """The same graph once more, on the same store."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, values)
        graph.output(output)
        for old, new in values.items():
            new.meta = dict(old.meta)
        return Program.of(graph, self.store, self.contract, self.log)

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
            if node.op == "call_function" and has_effect(node):
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
        """Drop dead nodes and regenerate the code."""
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or has_effect(n))
        self.module.recompile()


def has_effect(node: fx.Node) -> bool:
    """True for a call that does something besides giving a value: writes an argument, or is random."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def value_of(node: fx.Node) -> Tensor:
    """The recorded (fake) tensor of a node."""
    value: Tensor = node.meta["val"]
    return value


def _is_buffer(module: torch.nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in module.get_submodule(owner)._buffers
