"""torch.compile(model, backend="dwindle"): the same passes on the graphs that dynamo finds.

While gradients are off, the recipe's quantisation is made real; while they are on, nothing is quantised and the
graph is trained as it is. Options, as `torch.compile(..., options={...})`:

    recipe    as for `compress`; default "zeroquant-w8a8"; {} quantises nothing
    inner     what compiles the rewritten graph: "inductor" (default) or "eager"

dynamo guards on shapes and modes, not on the values of weights, so quantised weights are refreshed when a
weight was written in place since the last call. Recipes with static activations need data and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..passes.canonicalize import canonicalize
from ..passes.driver import Driver
from ..passes.pipeline import PIPELINE, Job, run_stages
from ..runtime import compat
from ..runtime.contract import Contract
from ..runtime.errors import RecipeError
from ..runtime.plan import Quantize
from ..runtime.program import Program
from ..runtime.qtensor import QTensor
from ..runtime.store import Store
from .recipe import Recipe

INNER: Mapping[str, Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]] = {
    "inductor": compat.inductor,
    "eager": lambda module, inputs: module,
}
DEFAULTS: Mapping[str, Any] = {"recipe": "zeroquant-w8a8", "inner": "inductor"}


def dwindle_backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one of dynamo's graphs; see the module's docstring. Raises RecipeError for unknown options."""
    recipe, inner = _options(options or {})
    graph = compat.retrace(module)
    if torch.is_grad_enabled() or not recipe.quantize:
        program, _ = _program(module, graph, example_inputs, hold=False)
        return inner(canonicalize(program).module, example_inputs)
    return _quantized(module, graph, example_inputs, recipe, inner)


def _options(
    options: Mapping[str, Any],
) -> tuple[Recipe, Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]]:
    settings = {**DEFAULTS, **options}
    unknown = set(settings) - set(DEFAULTS)
    if unknown or settings["inner"] not in INNER:
        raise RecipeError(
            "options of the dwindle backend",
            required=f"recipe, and inner as one of {', '.join(INNER)}",
            found=", ".join(f"{k}={v!r}" for k, v in options.items()),
        )
    recipe = Recipe.of(settings["recipe"])
    if any(rule.static for rule in recipe.rules()):
        raise RecipeError(
            "static activations need calibration data, which torch.compile does not have",
            required="a recipe with dynamic or floating-point activations",
            found=recipe.name or "static activations",
            cure="dwindle.compress(model, recipe, data=[...])",
        )
    return recipe, INNER[settings["inner"]]


def _quantized(
    module: fx.GraphModule,
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    recipe: Recipe,
    inner: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    program, kept = _program(module, graph, example_inputs, hold=True)
    floats = {name: value for name, value in program.store.entries() if isinstance(value, nn.Parameter)}
    job = Job(rules=recipe.rules())
    program = run_stages(Driver(program, None), PIPELINE, job)
    quantized = [edit.fqn for edit in job.plan or () if isinstance(edit, Quantize)]
    compiled = inner(program.module, [example_inputs[i] for i in kept])
    return _Refreshing(compiled, kept, [(floats[n], job.target.get(n)) for n in dict.fromkeys(quantized)])


def _program(
    module: fx.GraphModule, retraced: fx.GraphModule, example_inputs: Sequence[Any], *, hold: bool
) -> tuple[Program, list[int]]:
    """The retraced graph on a store, and which of dynamo's arguments it still takes, by position.

    hold: placeholders that are parameters become reads of the store, so that passes see them as weights.
    """
    graph, store = fx.Graph(), Store()
    kept, names, values = list[int](), dict[int, str](), dict[fx.Node, fx.Node]()
    sources = [n for n in module.graph.nodes if n.op == "placeholder"]
    placeholders = [n for n in retraced.graph.nodes if n.op == "placeholder"]
    for i, (source, node, value) in enumerate(zip(sources, placeholders, example_inputs, strict=True)):
        if not (hold and isinstance(value, nn.Parameter)):
            kept.append(i)
            continue
        name = names.setdefault(id(value), compat.parameter_name(source))
        store.put(name, value)
        values[node] = _read(graph, name, node)
    for node in retraced.graph.nodes:
        if node.op == "get_attr":
            values[node] = _read(graph, store.constant(retraced.get_buffer(str(node.target))), node)
        elif node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    contract = Contract(torch.is_grad_enabled(), {"kind": "dict", "items": {}}, (), {"kind": "tuple", "items": []})
    return Program.of(graph, store, contract), kept


def _read(graph: fx.Graph, name: str, like: fx.Node) -> fx.Node:
    node = graph.get_attr(name)
    node.meta = dict(like.meta)
    return node


class _Refreshing:
    """The compiled graph, called with dynamo's arguments less the parameters it holds in integers."""

    def __init__(self, compiled: Callable[..., Any], kept: Sequence[int], pairs: Sequence[tuple[Tensor, Any]]) -> None:
        self._compiled, self._kept = compiled, tuple(kept)
        self._pairs = [(p, q) for p, q in pairs if isinstance(q, QTensor)]
        self._versions = [compat.version_of(p) for p, _ in self._pairs]

    def __call__(self, *args: Any) -> Any:
        for i, (parameter, qtensor) in enumerate(self._pairs):
            version = compat.version_of(parameter)
            if version != self._versions[i]:
                self._versions[i] = version
                qtensor.refresh(parameter)
        return self._compiled(*(args[i] for i in self._kept))
