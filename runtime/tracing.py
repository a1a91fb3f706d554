"""What is changed in torch while a model is traced: private and unstable APIs, as in `compat`, each put back after."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch._functorch.config
import torch.export._trace
import torch.utils.checkpoint
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .compat import MARK, fake_mode_of
from .errors import CaptureError

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


def parts_of(mode: FakeTensorMode, node: fx.Node, inputs: Sequence[fx.Node]) -> fx.GraphModule | None:
    """A composite call as a graph of its parts, one placeholder an input.

    None where it has no graph, or one for the sizes of this example alone.
    """
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
