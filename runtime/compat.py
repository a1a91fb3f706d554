"""Every private or unstable torch API that dwindle uses, here and in `tracing` (tested on torch 2.11 to 2.13)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch._functorch.config
import torch.export._trace
import torch.utils.checkpoint
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import _get_current_dispatch_mode

MARK = "dwindle_checkpoint"  # in a captured node's meta["custom"]: which call of torch.utils.checkpoint made it


def is_tracing(x: Tensor) -> bool:
    """True when `x` is a stand-in (fake, functional) or a dispatch mode records what is done to it."""
    return type(x) not in (Tensor, torch.nn.Parameter) or _get_current_dispatch_mode() is not None


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, K) @ int8 (K, N) -> int32 (M, N). Fast on CPU when `b` is the transpose of a contiguous (N, K)."""
    return torch._int_mm(_with_rows(a), _with_rows(b))


def _with_rows(x: Tensor) -> Tensor:
    """`x`, copied where a stride is shorter than the row or column it leads to: a dimension of 1 may have any.

    There torch._int_mm on CPU leaves its result unwritten, silently (torch 2.13, pytorch issue 195066).
    """
    (rows, columns), (down, right) = x.shape, x.stride()
    fits = down >= columns if right == 1 else right >= rows
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode of the values recorded on a graph, if any."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, FakeTensor):
            return val.fake_mode
    return None


def fake_value(mode: FakeTensorMode, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `target` would give on the recorded values, without computing it."""
    # Some calls (recurrent layers) are written for symbolic sizes in Python alone.
    with mode, torch.no_grad(), enable_python_dispatcher():
        return target(*args, **kwargs)


def is_composite(target: Any) -> bool:
    """Whether torch runs a call as others, whatever the device."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(str(target._schema).partition("(")[0], key))


def fake_tensor(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A static stand-in for a real tensor."""
    return mode.from_tensor(tensor, static_shapes=True)


def record_values(module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Write `meta["val"]` on every node, as it is for inputs of this shape; nothing is computed."""
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)


# Raised where a graph's sizes go by the values of its tensors.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that a captured node came from; "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(stack.values()):
        return _clean_path(path)
    return ""


def _clean_path(path: str) -> str:
    # export writes "bert.encoder.layer.0"; dynamo writes "L['self'].bert.encoder.layer[0]" or "..._modules['0']"
    for prefix in ("L['self'].", "L['self']"):
        path = path.removeprefix(prefix)
    for old, new in (("_modules['", ""), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    return path.strip(".")


def is_guard(node: fx.Node) -> bool:
    """The node by which an exported module checks its inputs."""
    return node.op == "call_module" and str(node.target).startswith("_guards_fn")


def retrace(module: fx.GraphModule) -> fx.GraphModule:
    """A graph from dynamo as pre-dispatch ATen, placeholders and shapes as they were.

    Traced under the placeholders' own fake mode: the tracing context's raises "Mixing fake modes".
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    values = [n.meta["example_value"] for n in module.graph.nodes if n.op == "placeholder"]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    trace = make_fx(fx.Interpreter(module).run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)
    with mode or contextlib.nullcontext(), fx.traceback.preserve_node_meta():
        return trace(*values)


def parameter_name(placeholder: fx.Node) -> str:
    """The model's name for the tensor that dynamo lifted to a placeholder, as dynamo's source spells it."""
    source = placeholder.meta["grapharg"].source
    return _clean_path(re.sub(r"\.?_(modules|parameters|buffers)(?=\[)", "", source.name))


def inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph of ATen calls for `inputs`, with gradients where they need any."""
    from torch._inductor.compile_fx import compile_fx

    return cast(Callable[..., Any], compile_fx(module, list(inputs)))


def static_inputs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Stand-ins of fixed shape for inputs that dynamo has not seen: it may be compiling all sizes as symbols."""
    mode = torch._guards.detect_fake_mode()
    return [mode.from_tensor(t, static_shapes=True) for t in tensors] if mode is not None else list(tensors)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place; an inference tensor does not count."""
    return 0 if tensor.is_inference() else tensor._version


def checkpoint_mark(node: fx.Node) -> str | None:
    """Which checkpoint a captured node was traced in, if any."""
    mark: str | None = node.meta.get("custom", {}).get(MARK)
    return mark


def module_calls(node: fx.Node) -> Iterator[tuple[str, str, str]]:
    """(call, dotted path, class) of each module that a captured node lies in, outermost first; calls are unique."""
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        if not key.startswith("_empty_nn_module_stack"):  # torch's mark of a node that lies in none
            yield key, _clean_path(path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass, as a checkpointed block does that is computed again."""
    return torch._C._current_graph_task_id() != -1
