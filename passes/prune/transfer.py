"""Which transfer rule serves which call. A new rule is a function in `products.py`, `shapes.py`, `lookup.py`,
`windows.py`, `recurrent.py` or `spectral.py`, and a line here."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import experts, lookup, products, recurrent, shapes, spectral, windows
from .walk import Axes, Rule, Walk

aten = torch.ops.aten


def elementwise(walk: Walk, node: fx.Node, args: Sequence[Any]) -> Any:
    """Operands met element by element; all results have the same axes."""
    made = walk.tie_broadcast(*node.all_input_nodes)
    value = walk.values[node]
    return [made for _ in value] if isinstance(value, list | tuple) else made


def first(walk: Walk, node: fx.Node, args: Sequence[Any]) -> Axes:
    """A result with the axes of the first operand."""
    return walk[args[0]]


TRANSFER: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    # products
    (products.linear, ("linear",)),
    (products.matmul, ("matmul", "mm", "bmm", "mv", "dot", "vdot")),
    (products.addmm, ("addmm", "baddbmm", "addmv")),
    (products.addbmm, ("addbmm",)),
    (products.outer, ("outer",)),
    (products.inner, ("inner",)),
    (products.cosine_similarity, ("cosine_similarity",)),
    (products.cdist, ("cdist",)),
    (products.weight_norm, ("_weight_norm",)),
    (products.einsum, ("einsum",)),
    (windows.convolution(1), ("conv1d", "conv1d.padding")),
    (windows.convolution(2), ("conv2d", "conv2d.padding")),
    (windows.convolution(3), ("conv3d", "conv3d.padding")),
    (windows.convolution_transposed(1), ("conv_transpose1d",)),
    (windows.convolution_transposed(2), ("conv_transpose2d.input",)),
    (windows.convolution_transposed(3), ("conv_transpose3d.input",)),
    (products.embedding, ("embedding",)),
    (products.embedding_bag, ("embedding_bag", "embedding_bag.padding_idx")),
    (products.attention, ("scaled_dot_product_attention",)),
    (products.bilinear, ("bilinear",)),
    (recurrent.lstm, ("lstm.input",)),
    (recurrent.plain(3), ("gru.input",)),
    (recurrent.plain(1), ("rnn_tanh.input", "rnn_relu.input")),
    (products.grouped_mm, ("grouped_mm_fallback", "_grouped_mm")),
    # statistics
    (products.batch_norm, ("batch_norm",)),
    (products.layer_norm, ("layer_norm",)),
    (products.rms_norm, ("rms_norm",)),
    (products.group_norm, ("group_norm",)),
    (products.instance_norm, ("instance_norm",)),
    (products.softmax, ("softmax.int", "_softmax", "special_softmax")),
    (products.prelu, ("prelu",)),
    (products.reduction("mean", 1, 2), ("mean.dim",)),
    (products.reduction("mean", None, None), ("mean",)),
    (products.reduction("zero", 1, 2), ("sum.dim_IntList",)),
    (products.reduction("zero", 1, 2), ("nansum",)),
    (products.vector_norm, ("linalg_vector_norm", "norm.ScalarOpt_dim")),
    (products.reduction("zero", None, None), ("sum",)),
    (products.extremum("largest", 1, 2), ("amax", "logsumexp")),
    (products.extremum("smallest", 1, 2), ("amin", "min.dim")),
    (products.extremum("largest", None, None), ("max",)),
    (products.extremum("smallest", None, None), ("min",)),
    (products.extreme(1, 2), ("argmin", "any.dim", "all.dim", "prod.dim_int", "median.dim")),
    (products.extreme(1, 3), ("var.dim", "std.dim", "var.correction", "std.correction")),
    (products.extreme(1, 3), ("var_mean.dim", "std_mean.dim", "var_mean.correction", "std_mean.correction")),
    (products.extreme(2, 3), ("kthvalue",)),
    (products.extreme(None, None), ("any", "all", "prod", "var", "std")),
    # moves
    (shapes.view, ("view", "reshape", "_unsafe_view")),
    (shapes.flatten, ("flatten.using_ints", "ravel")),
    (shapes.view_as, ("view_as", "reshape_as")),
    (shapes.unflatten, ("unflatten.int",)),
    (shapes.permute, ("permute",)),
    (shapes.transpose, ("transpose.int", "swapaxes", "swapdims")),
    (shapes.movedim, ("movedim.int", "movedim.intlist", "moveaxis.int", "moveaxis.intlist")),
    (shapes.reverse, ("t", "numpy_T")),
    (shapes.transpose_last, ("mT", "adjoint")),
    (shapes.squeeze, ("squeeze", "squeeze.dim", "squeeze.dims")),
    (shapes.unsqueeze, ("unsqueeze",)),
    (shapes.expand, ("expand", "broadcast_to")),
    (shapes.expand_as, ("expand_as",)),
    (shapes.repeat, ("repeat", "tile")),
    (shapes.repeat_interleave, ("repeat_interleave.self_int",)),
    (experts.cat, ("cat", "concat", "concatenate")),
    (shapes.stack, ("stack",)),
    (shapes.select, ("select.int",)),
    (shapes.unbind, ("unbind.int",)),
    (shapes.slice_, ("slice.Tensor",)),
    (shapes.narrow, ("narrow",)),
    (shapes.split, ("split.Tensor", "split_with_sizes", "chunk", "split.sizes")),
    (shapes.split, ("tensor_split.sections", "tensor_split.indices")),
    (shapes.split, ("unsafe_split.Tensor", "unsafe_split_with_sizes", "unsafe_chunk")),
    (shapes.pad, ("pad", "constant_pad_nd")),
    (shapes.spatial(1), ("adaptive_avg_pool1d", "adaptive_max_pool1d", "avg_pool1d", "max_pool1d")),
    (shapes.spatial(1), ("upsample_nearest1d.vec", "upsample_linear1d.vec", "max_pool1d_with_indices")),
    (shapes.spatial(1), ("_upsample_nearest_exact1d.vec",)),
    (shapes.spatial(2), ("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d")),
    (shapes.spatial(2), ("upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_bicubic2d.vec")),
    (shapes.spatial(2), ("max_pool2d_with_indices", "_upsample_bilinear2d_aa.vec")),
    (shapes.spatial(2), ("_upsample_nearest_exact2d.vec", "_upsample_bicubic2d_aa.vec")),
    (shapes.spatial(3), ("adaptive_avg_pool3d", "avg_pool3d", "max_pool3d", "upsample_nearest3d.vec")),
    (shapes.spatial(3), ("upsample_trilinear3d.vec", "max_pool3d_with_indices")),
    (shapes.spatial(3), ("adaptive_max_pool3d", "_upsample_nearest_exact3d.vec")),
    (shapes.along(1), ("flip", "cumprod", "logcumsumexp", "log_softmax.int")),
    (shapes.along(1), ("sort", "argsort", "cummax", "cummin")),
    (shapes.along(2), ("roll", "sort.stable", "argsort.stable")),
    (products.running, ("cumsum",)),
    # choices by number
    (experts.topk, ("topk",)),
    (experts.largest, ("max.dim", "argmax")),
    (experts.histc, ("histc",)),
    (experts.one_hot, ("one_hot",)),
    (experts.index, ("index.Tensor",)),
    (experts.gathered(lookup.gather), ("gather",)),
    (experts.gathered(lookup.take_along_dim), ("take_along_dim",)),
    (experts.scatter, ("scatter.value", "scatter_.value", "scatter.src", "scatter_.src")),
    (lookup.index_select, ("index_select",)),
    (lookup.index_add, ("index_add", "index_add_", "index_copy", "index_copy_")),
    (lookup.scatter, ("scatter_add", "scatter_add_", "scatter_reduce.two", "scatter_reduce_.two")),
    (lookup.index_put, ("index_put", "index_put_")),
    (shapes.created(0), ("zeros", "ones", "empty.memory_format", "full")),
    (shapes.created(1), ("new_zeros", "new_ones", "new_empty", "new_full")),
    (shapes.counted, ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m")),
    (shapes.item, ("getitem",)),
    # channels and space
    (windows.pixel_shuffle, ("pixel_shuffle",)),
    (windows.pixel_unshuffle, ("pixel_unshuffle",)),
    (windows.channel_shuffle, ("channel_shuffle", "native_channel_shuffle")),
    (windows.glu, ("glu",)),
    (windows.im2col, ("im2col",)),
    (windows.col2im, ("col2im",)),
    (windows.unfold, ("unfold",)),
    (windows.grid_sampler, ("grid_sampler",)),
    (windows.unpool, ("max_unpool2d",)),
    (windows.triangle, ("tril", "triu")),
    # complex numbers
    (spectral.as_complex, ("view_as_complex",)),
    (spectral.as_real, ("view_as_real",)),
    (first, ("real", "imag", "_conj", "resolve_conj")),
    (elementwise, ("complex", "polar")),
    (shapes.along(2), ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_fft2", "fft_ifft2")),
    (shapes.along(2), ("fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn")),
    # calls without arithmetic of their own
    (first, ("contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy", "_to_copy", "requires_grad_")),
    (first, ("to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as")),
    (
        first,
        ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "bernoulli", "bernoulli.p", "bernoulli_.float"),
    ),
    (first, ("zero_", "fill_.Scalar", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")),
    (first, ("log_sigmoid", "hardswish", "hardswish_")),
    (elementwise, ("copy_", "where.self", "where.ScalarOther", "where.ScalarSelf", "masked_fill.Scalar")),
    # names of element-wise calls that torch does not tag as such: they are others in disguise
    (elementwise, ("multiply.Tensor", "divide.Tensor", "subtract.Tensor", "true_divide.Tensor", "square", "square_")),
    (elementwise, ("multiply_.Tensor", "divide_.Tensor", "subtract_.Tensor", "negative", "absolute", "where.Scalar")),
    (
        elementwise,
        ("masked_fill.Tensor", "masked_fill_.Scalar", "masked_fill_.Tensor", "rrelu", "gelu_", "broadcast_tensors"),
    ),
)

# Calls whose elements are those of their first operand, indices of experts among them.
MOVED = (
    *("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "permute", "transpose.int"),
    *("squeeze", "squeeze.dim", "unsqueeze", "expand", "repeat_interleave.self_int", "slice.Tensor", "select.int"),
    *("sort", "contiguous", "clone", "alias", "detach", "_to_copy", "to.dtype", "to.dtype_layout", "to.device"),
)

_RULES = {name: rule for rule, names in TRANSFER for name in names}
_RULES |= {name: experts.carried(_RULES[name]) for name in MOVED}


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for a call: its own, or that of all element-wise ones. None where there is none."""
    target = node.target
    if target is operator.getitem:
        return experts.item
    name = _name_of(target)
    if name in _RULES:
        return _RULES[name]
    return elementwise if _is_elementwise(target) else None


def _name_of(target: Any) -> str:
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    return str(target).partition(".")[2].removesuffix(".default")


def _is_elementwise(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise in target.tags:
        return True
    packet = str(target).partition(".")[2].partition(".")[0]
    functional = getattr(aten, packet.removesuffix("_"), None) if packet.endswith("_") else None
    overload = getattr(functional, target._overloadname, None)
    return overload is not None and torch.Tag.pointwise in overload.tags
