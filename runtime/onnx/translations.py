"""Our operators as ONNX Runtime's CPU provider wants them: Program -> a graph of ATen and ONNX nodes.

    quantize_dynamic   per token: QuantizeLinear with one scale a row (block_size = K), codes + 128 as uint8
                       per tensor: DynamicQuantizeLinear; per image or with fewer bits: QuantizeLinear
    quantize_asymmetric  QuantizeLinear with a zero point a row, image or tensor
    quantize_static    QuantizeLinear
    qlinear            MatMulIntegerToFloat, uint8 x int8 with weights (K, N); groups: MatMulNBits
                       a static zero point is in the bias already, so 128 is taken off such codes
    qlinear_weight_only  MatMulNBits, accuracy_level 4
    qembedding         Gather of packed rows, unpacked in fp32
    qconv2d            DequantizeLinear, Conv: one QLinearConv where a QuantizeLinear follows, else fp32
                       padding is the real zero, so the zero point is taken off and out of the bias
    dequantize         packed bytes unpacked in fp32; a session does it once, on loading

Codes equal the torch operator's bit for bit, with two exceptions. A row whose largest magnitude is below
127 * 2^-126 keeps codes where torch gives zeros; a symmetric static code may be -128 where torch stops at -127.
Arithmetic follows `numerics` but for the order of the two scales of a product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..ops.catalog import by_overload
from ..program import Program
from ..scheme import Scheme
from . import traced
from .nbits import nbits_weight, onnx_bits
from .traced import SHIFT

aten = torch.ops.aten


def translate(program: Program, precision: str) -> fx.GraphModule:
    """A copy of the program's graph without our operators, on a module that holds only what it reads.

    precision: "accurate" keeps the program's own quantisation; "fast" quantises activations per tensor where
    the per-token form costs time: where a GEMM is at least as wide as its input.
    """
    translation = _Translation(program, precision)
    for node in list(translation.graph.nodes):
        translation.node(node)
    translation.outputs()
    translation.graph.eliminate_dead_code()
    return fx.GraphModule(translation.tensors, translation.graph, "Program")


class _Translation:
    """A graph that is being translated, and its tensors by name: those of the store, and repacked ones."""

    def __init__(self, program: Program, precision: str) -> None:
        self.fast = precision == "fast"
        self.graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(program.graph, values))
        for old, new in values.items():
            new.meta = dict(old.meta)
        names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
        self.tensors: dict[str, Any] = {name: _attribute(program.module, name) for name in names}

    def node(self, node: fx.Node) -> None:
        """Translate one node if it is a call of ours."""
        ours = by_overload(node.target) if node.op == "call_function" else None
        if ours is None:
            return
        form = FORMS.get(ours.name)
        with self.graph.inserting_before(node):
            if form is None:  # no form of its own: what its definition does in ATen
                node.target = ours.reference
                return
            new = form(self, node, *_arguments(node))
        if new is not node:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def outputs(self) -> None:
        """Make every output a tensor of its own: ONNX gives it a name, and inputs and weights have one already."""
        output = self.graph.output_node()
        seen = set[fx.Node]()
        own: list[Any] = []
        with self.graph.inserting_before(output):
            for value in output.args[0]:  # type: ignore[union-attr]  # a flat tuple
                if isinstance(value, fx.Node) and not isinstance(value.meta["val"], Tensor):  # a size
                    value = self.graph.call_function(aten.scalar_tensor.default, (value,), {"dtype": torch.int64})
                elif isinstance(value, fx.Node) and (value in seen or value.op != "call_function"):
                    value = self.graph.call_function(aten.clone.default, (value,))
                elif isinstance(value, fx.Node):
                    seen.add(value)
                own.append(value)
        output.args = (tuple(own),)

    def read(self, node: object) -> Tensor | None:
        """The stored tensor that an argument names, or what is computed from such; None for None."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            return torch.as_tensor(self.tensors[str(node.target)].detach())
        given = fx.node.map_arg((node.args, node.kwargs), self.read)
        return torch.as_tensor(node.target(*given[0], **given[1]))  # type: ignore[operator]  # a call_function

    def constant(self, name: str, value: Tensor | None) -> fx.Node | None:
        """A node that reads `value`, kept under `name`."""
        if value is None:
            return None
        self.tensors[name] = value
        return self.graph.get_attr(name)

    def call(self, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        """A call of a function below, which export traces through."""
        return self.graph.call_function(function, arguments)

    @property
    def middle(self) -> fx.Node | None:
        """The zero point of symmetric codes."""
        return self.constant("dwindle.zero_point", torch.tensor(SHIFT, dtype=torch.uint8))


def _attribute(module: torch.nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), leaf)
    return value


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments in the order of the operator's schema."""
    schema: Any = node.target._schema  # type: ignore[union-attr]  # one of our overloads
    given = list(node.args)
    return given + [node.kwargs.get(a.name, a.default_value) for a in schema.arguments[len(given) :]]


def _name(node: fx.Node) -> str:
    """Of a packed weight, or a view of one: the parameter's name."""
    while node.op != "get_attr":
        node = node.args[0]  # type: ignore[assignment]  # what a view views
    return str(node.target).removesuffix(".codes")


# Activations


def _quantize_dynamic(t: _Translation, node: fx.Node, x: fx.Node, granularity: str, bits: int) -> fx.Node:
    fast = bits == 8 and (granularity == "tensor" or (t.fast and not _narrows(node)))
    if fast:
        node.target, node.args = traced.per_tensor, (x, node.name)
    elif granularity == "token":
        node.target, node.args = traced.per_token, (x, node.name, bits)
    else:
        node.target, node.args = traced.spread, (x, node.name, granularity, bits)
    node.kwargs = {}
    return node


def _quantize_asymmetric(t: _Translation, node: fx.Node, x: fx.Node, granularity: str, bits: int) -> fx.Node:
    node.target, node.args, node.kwargs = traced.asymmetric, (x, node.name, granularity, bits), {}
    return node


def _narrows(node: fx.Node) -> bool:
    """Every GEMM on these codes has fewer outputs than inputs: only there is a scale per token nearly free."""
    codes = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    readers = [reader for user in codes for reader in user.users]
    shapes = [reader.args[2].meta["val"].shape for reader in readers if _is_ours(reader, "qlinear")]  # type: ignore[union-attr]
    return len(shapes) == len(readers) and all(rows < columns for rows, columns in shapes)


def _is_ours(node: fx.Node, name: str) -> bool:
    ours = by_overload(node.target)
    return ours is not None and ours.name == name


def _quantize_static(
    t: _Translation, node: fx.Node, x: fx.Node, scale: fx.Node, zero: fx.Node | None, bits: int
) -> fx.Node:
    return t.call(traced.static, x, scale, _unsigned_zero(t, zero), node.name, bits, zero is None)


def _unsigned_zero(t: _Translation, zero: fx.Node | None) -> fx.Node | None:
    value = t.read(zero)
    if value is None or zero is None:
        return t.middle
    return t.constant(f"{_name(zero)}_uint8", (value + SHIFT).to(torch.uint8))


# Linear


def _qlinear(
    t: _Translation,
    node: fx.Node,
    codes: fx.Node,
    scale: fx.Node,
    weight: fx.Node,
    weight_scale: fx.Node,
    zero: fx.Node | None,
    bias: fx.Node | None,
    spelled: str,
    dtype: torch.dtype,
) -> fx.Node:
    scheme, stored = Scheme.parse(spelled), t.read(weight)
    assert stored is not None
    if not spelled.startswith("8-symmetric-channel"):
        x = t.call(traced.floating, codes, scale, _zero_of(t, codes))
        columns = int(codes.meta["val"].shape[-1])
        blocks = _nbits(t, weight, weight_scale, zero, scheme, columns)
        return t.call(traced.by_nbits, x, *blocks, bias, dtype, node.name)
    kn = t.constant(f"{_name(weight)}_kn", stored.t().contiguous())
    if _is_scalar(scale, codes):
        return t.call(traced.gemm_per_tensor, codes, scale, _zero_of(t, codes), kn, weight_scale, bias, dtype)
    one = t.constant("dwindle.one", torch.tensor(1.0))
    return t.call(traced.gemm_per_token, codes, scale, one, t.middle, kn, weight_scale, _as_row(t, bias), dtype)


def _is_scalar(scale: fx.Node, codes: fx.Node) -> bool:
    source = codes.args[0] if codes.target is operator.getitem else None
    return (isinstance(source, fx.Node) and source.target is traced.per_tensor) or not scale.meta["val"].dim()


def _zero_of(t: _Translation, codes: fx.Node) -> fx.Node | None:
    """What is taken off codes in a product. Static zero points are not: the bias has them, see `passes.lower`."""
    source = codes.args[0] if codes.target is operator.getitem else None
    if isinstance(source, fx.Node) and source.target is traced.per_tensor:
        return t.call(operator.getitem, source, 2)
    return t.middle


def _as_row(t: _Translation, bias: fx.Node | None) -> fx.Node | None:
    """A bias of shape (1, N): with (N,) ORT would fuse Add and Gelu into its slow BiasGelu."""
    value = t.read(bias)
    return None if value is None or bias is None else t.constant(f"{_name(bias)}_row", value.reshape(1, -1))


def _weight_only(
    t: _Translation,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    scale: fx.Node,
    zero: fx.Node | None,
    bias: fx.Node | None,
    spelled: str,
) -> fx.Node:
    columns = int(x.meta["val"].shape[-1])
    blocks = _nbits(t, weight, scale, zero, Scheme.parse(spelled), columns)
    return t.call(traced.by_nbits, x, *blocks, bias, x.meta["val"].dtype, node.name)


def _nbits(
    t: _Translation, weight: fx.Node, scale: fx.Node, zero: fx.Node | None, scheme: Scheme, columns: int
) -> tuple[Any, ...]:
    """Nodes for MatMulNBits: weight, scales, zero points, and its attributes."""
    packed, scales = t.read(weight), t.read(scale)
    assert packed is not None
    assert scales is not None
    w = nbits_weight(packed, scales, t.read(zero), scheme, columns)
    name, bits = _name(weight), onnx_bits(scheme)
    attributes = {"K": columns, "N": packed.shape[0], "bits": bits, "block_size": w.block, "accuracy_level": 4}
    tensors = (("blocks", w.blocks), ("scales", w.scales), ("zeros", w.zeros))
    return *(t.constant(f"{name}_{suffix}", value) for suffix, value in tensors), attributes


# Tables and other packed tensors


def _qembedding(
    t: _Translation,
    node: fx.Node,
    indices: fx.Node,
    weight: fx.Node,
    scale: fx.Node,
    zero: fx.Node | None,
    columns: int,
    spelled: str,
    dtype: torch.dtype,
) -> fx.Node:
    return t.call(traced.lookup, indices, weight, scale, zero, columns, spelled, dtype)


def _dequantize(
    t: _Translation,
    node: fx.Node,
    codes: fx.Node,
    scale: fx.Node,
    zero: fx.Node | None,
    shape: list[int],
    spelled: str,
    dtype: torch.dtype,
) -> fx.Node:
    return t.call(traced.whole, codes, scale, zero, shape, spelled, dtype)


# Convolution


def _qconv2d(
    t: _Translation,
    node: fx.Node,
    codes: fx.Node,
    scale: fx.Node,
    zero: fx.Node | None,
    weight: fx.Node,
    weight_scale: fx.Node,
    bias: fx.Node | None,
    *rest: Any,
) -> fx.Node:
    stored = t.read(weight)
    assert stored is not None
    oihw = t.constant(f"{_name(weight)}_oihw", stored.permute(0, 3, 1, 2).contiguous())
    off = _zero_of(t, codes)
    if zero is not None and zero.op == "call_function":
        return t.call(traced.asymmetric_convolution, codes, scale, zero, oihw, weight_scale, bias, *rest)
    if zero is not None:
        off, bias = _unsigned_zero(t, zero), _plain_bias(t, scale, zero, stored, weight_scale, bias)
    return t.call(traced.convolution, codes, scale, off, oihw, weight_scale, bias, *rest, _requantised(node))


def _plain_bias(
    t: _Translation, scale: fx.Node, zero: fx.Node, stored: Tensor, weight_scale: fx.Node, bias: fx.Node | None
) -> fx.Node | None:
    """The bias without the zero point's share, -z s_x s_w sum(W), which `passes.lower` folded into it."""
    corrected, z, s, w = t.read(bias), t.read(zero), t.read(scale), t.read(weight_scale)
    if bias is None or corrected is None or z is None or s is None or w is None:
        return bias
    share = z.double() * s.double() * w.double() * stored.double().sum((1, 2, 3))
    return t.constant(f"{_name(bias)}_plain", (corrected.double() + share).float())


_ACTIVATIONS = {aten.relu.default, aten.relu_.default, aten.hardtanh.default}


def _requantised(node: fx.Node) -> bool:
    """What follows is an activation at most, and then QuantizeLinear: ORT makes one QLinearConv of all."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _ACTIVATIONS:
        return _requantised(users[0])
    return bool(users) and all(_is_ours(user, "quantize_static") for user in users)


FORMS: dict[str, Callable[..., fx.Node]] = {
    "quantize_dynamic": _quantize_dynamic,
    "quantize_asymmetric": _quantize_asymmetric,
    "quantize_static": _quantize_static,
    "qlinear": _qlinear,
    "qlinear_weight_only": _weight_only,
    "qembedding": _qembedding,
    "dequantize": _dequantize,
    "qconv2d": _qconv2d,
}
