"""Gradients through quantised layers whose weights are frozen: what an adapter below one needs to train.

    linear   dL/dx = (dL/dy) W                    W dequantised, made again in the backward pass
    conv2d   dL/dx = transposed convolution of dL/dy with W
    both     straight through the rounding of x (Bengio et al. 2013, arXiv 1308.3432); 0 where x was clipped

The integer product y is computed as ever, on x detached, because int8 codes carry no gradient; `through_linear` then
hands y on with x behind it. So values do not depend on whether a gradient is wanted, and nothing of W's size is kept.
The scale of a dynamic activation counts as a constant, as in `numerics.fake_quantize`.
Not handled: gradients of packed weights, which are frozen, and second derivatives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from .ops.qconv2d import QCONV2D
from .ops.qlinear import QLINEAR, QLINEAR_WEIGHT_ONLY, dequantize_packed
from .ops.quantize import QUANTIZE_ASYMMETRIC, QUANTIZE_DYNAMIC, QUANTIZE_STATIC, in_range
from .program import Program
from .scheme import Scheme

aten = torch.ops.aten

Ranges = tuple[Any, ...]


class _Linear(torch.autograd.Function):
    """y (..., N) as it is; its gradient goes on to y (for the bias) and, times W (N, K), to x (..., K)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        inside: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: str,
    ) -> Tensor:
        ctx.save_for_backward(inside, weight, scale, zero_point)
        ctx.scheme, ctx.columns, ctx.dtype = scheme, x.shape[-1], x.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, weight, scale, zero_point = ctx.saved_tensors
        w = dequantize_packed(weight, scale, zero_point, Scheme.parse(ctx.scheme), ctx.columns)
        return (_kept(grad @ w.to(grad.dtype), inside, ctx.dtype), grad, *(None,) * 5)


class _Conv2d(torch.autograd.Function):
    """y (B, O, H', W') as it is; its gradient goes on to y and, through the filters, to x (B, C, H, W)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        inside: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(inside, weight, scale)
        ctx.geometry, ctx.shape, ctx.dtype = (stride, padding, dilation, groups), x.shape, x.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, weight, scale = ctx.saved_tensors
        w = (weight.float() * scale.reshape(-1, 1, 1, 1)).permute(0, 3, 1, 2)  # (O, C / groups, kh, kw)
        stride, padding, dilation, groups = ctx.geometry
        back: Tensor = conv2d_input(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            ctx.shape, w.to(grad.dtype), grad, stride, padding, dilation, groups
        )
        return (_kept(back, inside, ctx.dtype), grad, *(None,) * 7)


def _kept(grad: Tensor, inside: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (grad if inside is None else grad * inside).to(dtype)


def through_linear(
    x: Tensor,
    y: Tensor,
    ranges: Ranges,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: str,
) -> Tensor:
    """y, a product of x with the packed weight, differentiable in x.

    ranges: what `quantize_static` took after x; empty for other activations
    """
    inside = in_range(x, *ranges) if ranges else None
    found: Tensor = _Linear.apply(x, y, inside, weight, scale, zero_point, scheme)  # type: ignore[no-untyped-call]
    return found


def through_conv2d(x: Tensor, y: Tensor, ranges: Ranges, *rest: Any) -> Tensor:
    """As `through_linear`; rest: int8 filters (O, kh, kw, C), their scale, stride, padding, dilation, groups."""
    inside = in_range(x, *ranges) if ranges else None
    found: Tensor = _Conv2d.apply(x, y, inside, *rest)  # type: ignore[no-untyped-call]
    return found


def differentiable(program: Program) -> Program:
    """A lowered program once more, on the same store, with gradients that reach its inputs."""
    twin = program.copy()
    sources: dict[Any, tuple[Any, Ranges]] = {}  # by the call that detaches x: x, and its static range
    quantising = (op.overload for op in (QUANTIZE_DYNAMIC, QUANTIZE_ASYMMETRIC, QUANTIZE_STATIC))
    for node in twin.calls(*quantising, QLINEAR_WEIGHT_ONLY.overload):
        x: Any = node.args[0]
        sources[node] = (x, tuple(node.args[1:]) if node.target is QUANTIZE_STATIC.overload else ())
        with twin.graph.inserting_before(node):
            node.update_arg(0, twin.graph.call_function(aten.detach.default, (x,)))
    for node in twin.calls(QLINEAR.overload, QLINEAR_WEIGHT_ONLY.overload, QCONV2D.overload):
        _pass_through(twin, node, sources)
    twin.module.recompile()
    return twin


def _pass_through(twin: Program, node: fx.Node, sources: Mapping[Any, tuple[Any, Ranges]]) -> None:
    args: Any = node.args
    through: Callable[..., Tensor] = through_linear
    if node.target is QLINEAR_WEIGHT_ONLY.overload:
        quantising, weight = node, (*args[1:4], args[5])
    else:
        quantising = args[0].args[0] if args[0].target is operator.getitem else args[0]
        weight = (*args[2:5], args[6])
    if node.target is QCONV2D.overload:
        through, weight = through_conv2d, (*args[3:5], *args[6:10])
    x, ranges = sources[quantising]
    with twin.graph.inserting_after(node):
        new = twin.graph.call_function(through, ())
    node.replace_all_uses_with(new)
    new.args = (x, node, ranges, *weight)
