"""From an eager model and example arguments to a Program in canonical ATen.

`torch.export` in non-strict mode gives pre-dispatch ATen with the model's own tensors. What is done here:
guards are dropped for the Contract's own checks, constants become entries of the Store, regions under
no_grad are inlined (their results detached), and inputs and outputs are flattened. What export refuses because the
model branches on a value is captured as it goes for the example, with a check (see `branches`).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch._ops import HigherOrderOperator
from torch.export import Dim
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.utils import _pytree as pytree

from ..runtime import compat, tracing
from ..runtime.contract import Contract, Input
from ..runtime.errors import CaptureError
from ..runtime.program import Program, writes
from ..runtime.store import Store
from ..runtime.structure import describe, flatten
from .branches import Branches, user_frame
from .modes import in_mode
from .sizes import eager, proved

DynamicShapes = Mapping[str, Mapping[int, str]]

# Capturing borrows the model's `forward` and training flags and torch.export's global state: one at a time.
_CAPTURING = threading.RLock()


def capture(
    model: nn.Module,
    arguments: Mapping[str, Any],
    store: Store,
    *,
    training: bool = False,
    dynamic_shapes: DynamicShapes | None = None,
) -> Program:
    """Capture one variant of `model` as a Program on `store`.

    arguments: the call by parameter name; tensors of any size, constants as they are.
    dynamic_shapes: names of the dimensions that may vary, by argument name and dimension (arguments that this
        call lacks are passed over); None guesses batch and sequence and falls back to fewer where the model
        fixes them; {} keeps all sizes.
    The model's training flags are put back. Raises CaptureError naming the line that cannot be captured.
    """
    _require_dimensions(arguments, dynamic_shapes or {})
    alone = all(v.shape[0] == 1 for v in arguments.values() if isinstance(v, Tensor) and v.dim() > 0)
    widened = {name: _widen(value, alone) for name, value in arguments.items()}
    structure, tensors = flatten(dict(widened))
    candidates = guess_dynamic(widened)
    if dynamic_shapes is not None:
        candidates = [{name: dims for name, dims in dynamic_shapes.items() if name in widened}]
    branches = Branches()
    with _CAPTURING, _recording(), in_mode(model, training), _taking_tensors(model, widened) as given:
        module, ranges, dims = _export(model, given, {n: arguments[n] for n in given}, candidates, store, branches)
    graph, output = _flat_graph(module, store)
    branches.require_kept(graph)
    inputs, limits = _inputs(graph, structure, tensors, dims, ranges)
    program = Program.of(graph, store, Contract(training, structure, inputs, output, limits))
    _own_what_is_written(program)
    with _CAPTURING, in_mode(model, training):
        _, taken = flatten(dict(widened if dims else arguments))
        program.contract = proved(model, program, taken)
    if alone and program.contract.limits.get("batch", (0, None))[0] > 1:
        # The example is a batch of 1, which this model treats in its own way: then that is what it is captured for.
        return capture(model, arguments, store, training=training, dynamic_shapes={})
    return program


def _own_what_is_written(program: Program) -> None:
    """A parameter that the graph itself writes (an embedding with max_norm) is cloned where it was borrowed."""
    for name in program.written() if program.store.borrows else ():
        value = program.store.get(name)
        if isinstance(value, nn.Parameter):
            program.store.put(name, nn.Parameter(value.detach().clone(), value.requires_grad))


def _require_dimensions(arguments: Mapping[str, Any], dynamic_shapes: DynamicShapes) -> None:
    for name, dims in dynamic_shapes.items():
        value = arguments.get(name)
        for dim, label in dims.items():
            if isinstance(value, Tensor) and not (0 <= dim < value.dim() and label.isidentifier()):
                raise CaptureError(
                    f"dynamic_shapes of {name!r}",
                    required=f"dimensions from 0 to {value.dim() - 1}, each named by an identifier",
                    found=f"{dim}: {label!r}",
                )


def guess_dynamic(arguments: Mapping[str, Any]) -> list[DynamicShapes]:
    """Named dimensions to try, the most general first: batch and sequence, batch alone, none.

    Dimension 0 of every tensor argument is the batch; dimension 1 of integer or boolean matrices, and of
    embeddings beside them, is the sequence.
    """
    tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.dim() > 0}
    batch = {n: {0: "batch"} for n, v in tensors.items() if v.shape[0] != 1}
    both: dict[str, Mapping[int, str]] = {}
    for n, v in tensors.items():
        token_like = v.dim() == 2 and not v.is_floating_point()
        prefix = "decoder_" if n.startswith("decoder_") or (n == "labels" and "decoder_input_ids" in tensors) else ""
        both[n] = {**batch.get(n, {}), **({1: f"{prefix}sequence"} if token_like else {})}
    return [both, batch, {}] if both != batch else [batch, {}]


def _widen(value: Any, alone: bool) -> Any:
    """Export fixes sizes of 1; repeat a batch of 1 so that it stays free. Beside a larger batch a 1 broadcasts."""
    if alone and isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1:
        value = value.repeat(2, *(1 for _ in value.shape[1:]))
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == 1 and not value.is_floating_point():
        value = value.repeat(1, 2)
    return value


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Under a caller's no_grad, export would not see which regions of the model are under one."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        tracing.checkpoints_marked(),
        tracing.functions_seen_through(),
        tracing.masks_as_given(),
        tracing.silent(),
    ):
        yield


@contextlib.contextmanager
def _taking_tensors(model: nn.Module, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`model.forward` for a while as a function of the arguments that hold tensors, the others bound.

    Export cannot give a dynamic shape next to an argument that forward takes in **kwargs (torch 2.13), and
    transformers takes output_hidden_states there.
    """
    given = {n: v for n, v in arguments.items() if flatten(v)[1]}
    constants = {n: v for n, v in arguments.items() if n not in given}
    forward, own = model.forward, model.__dict__.get("forward")

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(**dict(zip(given, args, strict=False)), **kwargs, **constants)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in given])  # type: ignore[attr-defined]
    model.__dict__["forward"] = call
    try:
        yield given
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def _export(
    model: nn.Module,
    widened: Mapping[str, Any],
    fixed: Mapping[str, Any],
    candidates: list[DynamicShapes],
    store: Store,
    branches: Branches,
) -> tuple[fx.GraphModule, Mapping[Any, Any], DynamicShapes]:
    for follow in (contextlib.nullcontext, branches.followed):
        failures: list[Exception] = []
        for names in candidates:
            arguments = widened if names else fixed
            dims = {name: Dim(name) for shapes in names.values() for name in shapes.values()}
            try:
                exported = _export_within_limits(model, arguments, _spec(model, arguments, names, dims), follow)
                return exported.module(), exported.range_constraints, names
            except Exception as error:  # whatever the model's code or export raises is the reason to report
                failures.append(error)
        if not any(isinstance(error, tracing.UNDECIDED) for error in failures):
            break
    failure = failures[0]
    _require_served(model, fixed, store)
    raise CaptureError(
        f"{type(model).__name__} cannot be captured: {_first_line(failure)}",
        required="a forward that torch.export can trace: no sizes or counts that go by values, tensors in and out",
        found=f"{type(failure).__name__} at {_user_line(failure)}",
        cure="make that line independent of tensor values, or compress the submodule that can be captured",
    ) from failure


def _require_served(model: nn.Module, arguments: Mapping[str, Any], store: Store) -> None:
    """Raise CaptureError when the model itself refuses the arguments: then capture is not what failed."""
    try:
        with torch.no_grad():
            eager(model, arguments, store)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} itself refuses the example inputs: {_first_line(error)}",
            required="inputs that model(**inputs) takes",
            found=f"{type(error).__name__} at {_user_line(error)}",
        ) from error


def _export_within_limits(
    model: nn.Module, arguments: Mapping[str, Any], spec: Any, follow: Callable[[], AbstractContextManager[None]]
) -> torch.export.ExportedProgram:
    """Export; where the model bounds a dimension (a position table), export again within the bound it names."""
    try:
        with follow():
            return torch.export.export(model, (), dict(arguments), dynamic_shapes=spec, strict=False)
    except UserError as error:
        head, found, fixes = str(error).partition("Suggested fixes:")
        if not found:
            raise
        named = "\n".join(line for line in fixes.splitlines() if " = " in line)
        refined = refine_dynamic_shapes_from_suggested_fixes(f"{head}{found}\n{named}", spec)
        with follow():
            return torch.export.export(model, (), dict(arguments), dynamic_shapes=refined, strict=False)


def _spec(model: nn.Module, arguments: Mapping[str, Any], names: DynamicShapes, dims: Mapping[str, Dim]) -> Any:
    """Dynamic dimensions in the nesting that export wants, which depends on where forward takes each argument."""
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for name, by_dim in names.items():
        shapes[arguments[name]] = {dim: dims[label] for dim, label in by_dim.items()}
    return shapes.dynamic_shapes(model, (), dict(arguments))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _user_line(error: BaseException) -> str:
    """The line of the model that export stopped at."""
    frame = user_frame(traceback.extract_tb(error.__traceback__))
    if frame is not None:
        return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "a line inside torch.export (see the chained error)"


def _flat_graph(module: fx.GraphModule, store: Store) -> tuple[fx.Graph, Any]:
    """Copy into a graph with flat placeholders, flat output, and attributes that name the store's tensors."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if compat.is_guard(node):
            continue
        if node.op == "placeholder":
            if isinstance(node.meta.get("val"), Tensor):
                values[node] = graph.node_copy(node)
        elif node.op == "output":
            flat = [values[a] if isinstance(a, fx.Node) else a for a in node.args[0]]
            output = _output_structure(flat, module)
            graph.output(tuple(v for v in flat if isinstance(v, fx.Node)))
        else:
            values[node] = _copy(node, module, graph, values, store)
    return graph, output


def _copy(node: fx.Node, module: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any], store: Store) -> Any:
    if node.op == "get_attr":
        held = _attribute(module, str(node.target))
        if isinstance(held, nn.Module):
            return held  # the body of a region; used by the call below
        new = graph.get_attr(_stored_name(str(node.target), held, store))
        new.meta = dict(node.meta)
        return new
    if node.op == "call_function" and node.target in _REGIONS:
        return _inline(node, graph, values, store)
    return graph.node_copy(node, lambda n: values[n])


# Regions whose body is recorded as a submodule; position of the body among the arguments.
_REGIONS = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}


def _inline(node: fx.Node, graph: fx.Graph, values: dict[fx.Node, Any], store: Store) -> Any:
    if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is True:
        raise CaptureError(
            "the model casts by torch.autocast inside its forward",
            required="casts written out, or autocast around the call",
            found=f"torch.autocast({node.args[0]!r}, {node.args[1]})",
            cure="move autocast out of forward; the compressed model may be called under it",
        )
    position = _REGIONS[cast(HigherOrderOperator, node.target)]
    body = values[node.args[position]]  # type: ignore[index]  # a node by construction
    inner: dict[fx.Node, Any] = {}
    arguments = iter(node.args[position + 1 :])
    ungraded = node.target is torch.ops.higher_order.wrap_with_set_grad_enabled and node.args[0] is False
    apart = ungraded and any(writes(n) for n in body.graph.nodes)  # what is written depends on nothing that is trained
    result: Any = None
    for n in body.graph.nodes:
        if n.op == "placeholder":
            argument = next(arguments)
            value = values[argument] if isinstance(argument, fx.Node) else argument
            inner[n] = _detach(graph, value) if apart and isinstance(value, fx.Node) and _is_tensor(value) else value
        elif n.op == "output":
            result = fx.node.map_arg(n.args[0], lambda a: inner[a])
        else:
            inner[n] = _copy(n, body, graph, inner, store)
    if ungraded:
        result = pytree.tree_map_only(fx.Node, lambda n: _detach(graph, n) if _is_tensor(n) else n, result)
    return _Tuple(result)


class _Tuple(tuple[Any, ...]):
    """Results of an inlined region: getitem on it is resolved while copying."""


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _detach(graph: fx.Graph, node: fx.Node) -> fx.Node:
    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def _attribute(module: nn.Module, target: str) -> Any:
    held: Any = module
    for part in target.split("."):
        held = getattr(held, part)
    return held


def _stored_name(target: str, tensor: Tensor, store: Store) -> str:
    name = store.canonical(target)
    known = store.get(name)
    if known is not None and known.shape == tensor.shape:
        return name
    return store.constant(tensor.detach())


def _output_structure(flat: list[Any], module: fx.GraphModule) -> Any:
    spec = module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]  # export sets this codegen
    return describe(pytree.tree_unflatten(flat, spec), fx.Node)


def _inputs(
    graph: fx.Graph, structure: Any, tensors: list[Tensor], dims: DynamicShapes, ranges: Mapping[Any, Any]
) -> tuple[tuple[Input, ...], dict[str, tuple[int, int | None]]]:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(tensors):
        raise CaptureError("inputs were lost in capture", required=len(tensors), found=len(placeholders))
    inputs: list[Input] = []
    limits: dict[str, tuple[int, int | None]] = {}
    for name, node in zip(_leaf_names(structure), placeholders, strict=True):
        val = node.meta["val"]
        shape: list[int | str] = []
        for dim, size in enumerate(val.shape):
            if isinstance(size, int):
                shape.append(size)
                continue
            label = dims.get(name, {}).get(dim) or str(size)
            shape.append(label)
            span = ranges.get(size.node.expr)
            if span is not None:
                high = int(span.upper) if span.upper.is_Integer and span.upper < 2**31 else None
                limits[label] = (int(span.lower), high)
        inputs.append(Input(name, str(val.dtype).removeprefix("torch."), tuple(shape), val.is_contiguous()))
        node.name, node.target = node.name, node.name
    return tuple(inputs), limits


def _leaf_names(structure: Any, prefix: str = "") -> Iterator[str]:
    if structure["kind"] == "tensor":
        yield prefix
    items = structure.get("items", {})
    pairs = items.items() if isinstance(items, dict) else enumerate(items)
    for name, part in pairs:
        yield from _leaf_names(part, f"{prefix}.{name}" if prefix else str(name))
