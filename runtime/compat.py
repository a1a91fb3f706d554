"""Every private or unstable torch API that dwindle uses, in this one file (tested on torch 2.11 to 2.13)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch._functorch.config
import torch.export._trace
import torch.utils.checkpoint
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from .errors import CaptureError

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


def parts_of(mode: FakeTensorMode, node: fx.Node, inputs: Sequence[fx.Node]) -> fx.GraphModule | None:
    """A composite call as a graph of its parts, one placeholder an input.

    None where it has no graph, or one for the sizes of this example alone.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    values = [n.meta["val"] for n in inputs]
    target = cast(torch._ops.OpOverload, node.target)

    def call(*given: Any) -> Any:
        at = dict(zip(inputs, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: at[n])
        return target(*args, **kwargs)

    guards = mode.shape_env
    if guards is not None and not hasattr(guards, "error_on_new_guards"):  # torch 2.11 has no such thing
        return None
    any_size = guards.error_on_new_guards() if guards is not None else contextlib.nullcontext()
    try:
        # With autograd on, since the parts may differ where there is a gradient to give, and there may be.
        with mode, silent(), any_size, enable_python_dispatcher():
            traced = make_fx(call, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    except Exception:  # of any kind: a trace may fail in its own way at each line of the kernel
        return None
    parts = {n.op for n in traced.graph.nodes} - {"placeholder", "output"}
    same = any(n.target is target for n in traced.graph.nodes)
    return None if same or parts != {"call_function"} else traced


def fake_tensor(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A static stand-in for a real tensor."""
    return mode.from_tensor(tensor, static_shapes=True)


def record_values(module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Write `meta["val"]` on every node, as it is for inputs of this shape; nothing is computed."""
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)


# Raised where a graph's sizes go by the values of its tensors.
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)

# Raised where a trace cannot go on without the value of a tensor.
UNDECIDED = (GuardOnDataDependentSymNode, DataDependentOutputException)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without torch's logs: export prints each attempt that fails, where the caller reports the last one."""
    before, names = logging.root.manager.disable, vars(torch.export._trace)
    logging.disable(logging.ERROR)
    names["print"] = lambda *args, **kwargs: None  # of the graph up to where it failed
    try:
        yield
    finally:
        logging.disable(before)
        del names["print"]


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """nn.Transformer uses the masks that it is given, and does not look whether one is causal: no graph could."""
    layers = torch.nn.modules.transformer
    before = layers._detect_is_causal_mask
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        layers._detect_is_causal_mask = before


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


@contextlib.contextmanager
def checkpoints_marked() -> Iterator[None]:
    """Inside, torch.utils.checkpoint calls its function as it is, and what is traced in there is marked.

    Otherwise export would leave out a reentrant checkpoint's gradients and forget any other. What
    torch.utils.checkpoint.checkpoint reads from its module is replaced, for models hold the function itself.
    """
    module, count, hooks = (
        torch.utils.checkpoint,
        itertools.count(),
        torch._C._autograd._top_saved_tensors_default_hooks,
    )
    ambient = hooks(True)

    @contextlib.contextmanager
    def mark() -> Iterator[None]:
        if hooks(True) != ambient:
            raise CaptureError(
                "activations that the model saves in its own way",
                required="torch.utils.checkpoint without saved-tensor hooks around it",
                found=hooks(True),
                cure="switch offloading off, or train without checkpointing",
            )
        outer = fx.traceback.current_meta.get("custom", {}).get(MARK)
        name = f"checkpoint {next(count)}" if outer is None else outer
        with fx.traceback.preserve_node_meta(), fx.traceback.annotate({MARK: name}):
            yield

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            with mark():
                return function(*args)

    def other(function: object, preserve: bool, context_fn: object, *rest: Any, **kwargs: Any) -> Iterator[None]:
        if context_fn is not module.noop_context_fn:
            raise CaptureError(
                "selective activation checkpointing is not kept",
                required="torch.utils.checkpoint without context_fn",
                found=context_fn,
            )
        with mark():
            yield

    before = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
    module.CheckpointFunction, module._checkpoint_without_reentrant_generator = Reentrant, other  # type: ignore[assignment, misc]  # replaced for a while
    try:
        yield
    finally:
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = before  # type: ignore[misc]  # as above


def checkpoint_mark(node: fx.Node) -> str | None:
    """Which checkpoint a captured node was traced in, if any."""
    mark: str | None = node.meta.get("custom", {}).get(MARK)
    return mark


def module_calls(node: fx.Node) -> Iterator[tuple[str, str, str]]:
    """(call, dotted path, class) of each module that a captured node lies in, outermost first; calls are unique."""
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        yield key, _clean_path(path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass, as a checkpointed block does that is computed again."""
    return torch._C._current_graph_task_id() != -1


class _GradModePastTracer(TorchFunctionMode):
    """Grad modes are switched, and the tracer does not see it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            with torch._C.DisableTorchFunction():
                return func(*args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def functions_seen_through() -> Iterator[None]:
    """Inside, what an autograd.Function's forward computes is traced as any other code is, with its gradient.

    torch runs that forward without gradients, so a no_grad in it says nothing; and where it ends it would leave
    gradients off, as it found them, in all that is traced after it.
    """
    function, before = torch.autograd.Function, torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        with _GradModePastTracer():
            return before.__func__(cls, *args, **kwargs)

    function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]  # replaced for a while
    try:
        yield
    finally:
        function.apply = before  # type: ignore[method-assign]  # as above


Decide = Callable[[Tensor, bool], None]


class _Truths(TorchFunctionMode):
    """Answers Python's question whether a fake tensor is true by the real one that goes with it."""

    ASKED = (Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero)

    def __init__(self, decide: Decide) -> None:
        super().__init__()
        self.decide = decide

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        asked = func in self.ASKED or (func is Tensor.item and isinstance(x, Tensor) and x.dtype is torch.bool)
        # The value of a constant is known to the trace; within an operator nothing is traced.
        if not (asked and isinstance(x, FakeTensor) and x.constant is None) or get_proxy_mode() is None:
            return func(*args, **(kwargs or {}))
        if x.real_tensor is None:
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            value = bool(x.real_tensor)
        self.decide(x, value)
        return value


@contextlib.contextmanager
def values_followed(decide: Decide) -> Iterator[None]:
    """Inside, where a trace would stop at the truth of a tensor, or of a number read from one, it is the example's.

    For that torch computes with copies of the real tensors beside the fake ones. `decide(tensor, value)` is called
    for each such truth while the trace goes on, with one element: what it calls is traced. torch itself would settle
    more (sizes, and what operators ask) and leave its checks to others; those questions stay without an answer.
    """
    known: dict[Any, Any] = {}
    decided: set[Any] = set()
    told = next(n for n in ("set_real_tensor_prop_unbacked_vals", "set_unbacked_var_to_val") if hasattr(ShapeEnv, n))
    tell, truth = getattr(ShapeEnv, told), torch.SymBool.__bool__

    def ask(self: torch.SymBool) -> bool:
        try:
            return truth(self)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves it untyped
        except GuardOnDataDependentSymNode:
            node = self.node
            sizes = getattr(node.shape_env, "backed_var_to_val", None) or node.shape_env.var_to_val
            value = node.expr.xreplace({**known, **sizes})
            if get_proxy_mode() is None or value not in (True, False):
                raise
            if node.expr not in decided:
                decided.add(node.expr)
                number = torch.sym_ite(self, 1, 0)  # type: ignore[no-untyped-call]  # as above
                decide(torch.scalar_tensor(number), bool(value))
            return bool(value)

    def copy(dst: Tensor, src: Tensor | None) -> None:
        if src is not None and type(src) in (Tensor, torch.nn.Parameter):  # torch 2.13 leaves out the latter
            dst.copy_(src)

    plain = meta_utils._safe_copy
    meta_utils._safe_copy = copy
    setattr(ShapeEnv, told, lambda env, symbol, value: known.__setitem__(symbol, value))
    torch.SymBool.__bool__ = ask  # type: ignore[method-assign]  # replaced for a while
    try:
        with torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True), _Truths(decide):
            yield
    finally:
        meta_utils._safe_copy = plain
        setattr(ShapeEnv, told, tell)
        torch.SymBool.__bool__ = truth  # type: ignore[method-assign]  # as above


def forget_values(graph: fx.Graph) -> None:
    """Let go of the real tensors that `values_followed` left beside a graph's fake ones, and make no more."""
    mode = fake_mode_of(graph)
    if mode is not None:
        made = mode.fake_tensor_converter.meta_converter
        mode.propagate_real_tensors = made.copy_data = made.describer.copy_data = False
    for node in graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                value.real_tensor = None
                vars(value.untyped_storage()).pop("real_storage", None)
