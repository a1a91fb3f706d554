"""torch.compile(model, backend="dwindle"): the same passes on the graphs that dynamo finds.

While gradients are off, the recipe's quantisation is made real; while they are on, nothing is quantised and the
graph is trained as it is. Options, as `torch.compile(..., options={...})`:

    recipe    as for `compress`; default "zeroquant-w8a8"; {} quantises nothing
    inner     what compiles the rewritten graph: "inductor" (default) or "eager"

dynamo guards on shapes and modes, not on which parameters a call brings nor on their values, so the graph takes
all tensors as arguments and weights are packed by parameter, again when they were written; see `packed`. One kind of
write can be missed, one through `parameter.data` (or numpy): on CPU where it leaves the 32 bytes in the middle of the
weight as they are, on other devices always. Write the parameter itself under no_grad instead, or call
`torch.compiler.reset()` afterwards.
Recipes with static activations need data and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..passes.canonicalize import canonicalize
from ..passes.driver import Driver
from ..passes.pipeline import PIPELINE, Job, run_stages
from ..runtime import compat
from ..runtime.contract import Contract
from ..runtime.errors import RecipeError
from ..runtime.program import Program
from ..runtime.qtensor import QTensor
from ..runtime.store import Store
from .packed import PackedWeights
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
        program, _ = _program(module, graph, example_inputs, hold=False)  # every tensor stays an argument
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
    recipe.require_nearest("torch.compile, which has no calibration data,")
    if recipe.layerwise is not None:
        raise RecipeError(
            "torch.compile cannot train layers",
            required="a recipe without layerwise",
            found=recipe.name or "layerwise",
            cure="dwindle.compress(model, recipe, data=[...])",
        )
    rules = [name for name in ("depth", "prune", "sparsify") if getattr(recipe, name)]
    if rules:  # torch.compile keeps the model's own tensors
        raise RecipeError(
            "torch.compile cannot prune",
            required="a recipe without depth, prune and sparsify",
            found=", ".join(rules),
            cure="dwindle.compress(model, recipe)",
        )
    return recipe, INNER[settings["inner"]]


def _quantized(
    module: fx.GraphModule,
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    recipe: Recipe,
    inner: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    program, given = _program(module, graph, example_inputs, hold=True)
    # trains: weights come with each call, so none may be rewritten into another, as folding a batch norm does.
    job = Job(rules=recipe.rules(), trains=True)
    program = run_stages(Driver(program, None), PIPELINE, job)
    weights = {name: value for name, value in job.target.entries() if isinstance(value, QTensor)}
    lifted, kept = _lifted(program, given, weights)
    parts = [part for qtensor in weights.values() for part in qtensor.buffers()]
    compiled = inner(lifted, [*(example_inputs[i] for i in kept), *compat.static_inputs(parts)])
    packed = PackedWeights([(example_inputs[given[name]], qtensor) for name, qtensor in weights.items()])
    positions = [given[name] for name in weights]
    return lambda *args: compiled(*(args[i] for i in kept), *packed([args[i] for i in positions]))


def _program(
    module: fx.GraphModule, retraced: fx.GraphModule, example_inputs: Sequence[Any], *, hold: bool
) -> tuple[Program, dict[str, int]]:
    """The retraced graph on a store, and by name the positions of dynamo's arguments.

    hold: placeholders that are parameters become reads of the store, so that passes see them as weights.
    """
    graph, store = fx.Graph(), Store()
    values = dict[fx.Node, fx.Node]()
    sources = [n for n in module.graph.nodes if n.op == "placeholder"]
    placeholders = [n for n in retraced.graph.nodes if n.op == "placeholder"]
    given = {str(node.target): i for i, node in enumerate(placeholders)}
    for source, node, value in zip(sources, placeholders, example_inputs, strict=True):
        if not (hold and isinstance(value, nn.Parameter)):
            continue
        name = compat.parameter_name(source)
        while name in given:  # a[0] and a["0"] read alike
            name += "_"
        given[name] = given[str(node.target)]
        store.put(name, value)
        values[node] = _read(graph, name, node)
    for node in retraced.graph.nodes:
        if node.op == "get_attr":
            values[node] = _read(graph, store.constant(retraced.get_buffer(str(node.target))), node)
        elif node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    contract = Contract(torch.is_grad_enabled(), {"kind": "dict", "items": {}}, (), {"kind": "tuple", "items": []})
    return Program.of(graph, store, contract), given


def _read(graph: fx.Graph, name: str, like: fx.Node) -> fx.Node:
    node = graph.get_attr(name)
    node.meta = dict(like.meta)
    return node


def _lifted(
    program: Program, given: Mapping[str, int], weights: Mapping[str, QTensor]
) -> tuple[fx.GraphModule, list[int]]:
    """The graph with every parameter and packed weight as an argument again; only its own constants stay in it.

    Arguments: dynamo's, by the positions that are returned, then the buffers of each of `weights`.
    """
    reads = ("placeholder", "get_attr")
    parts = [f"{name}.{part}" for name, qtensor in weights.items() for part, _ in qtensor.named_buffers()]
    inputs = {str(n.target): n for n in program.graph.nodes if n.op in reads and str(n.target) in given}
    graph, values, taken = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    for i, name in enumerate([*inputs, *parts]):
        taken[name] = graph.placeholder(f"dwindle_{i}")
    for node in program.graph.nodes:
        if node.op in reads and str(node.target) in taken:
            values[node] = taken[str(node.target)]
            values[node].meta = dict(node.meta)
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    return fx.GraphModule(program.module, graph), [given[name] for name in inputs]
