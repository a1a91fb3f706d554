"""From simulated quantisation to integers: packs weights and picks the operator that really runs.

    linear(fake(x), fake(W), b)    ->  qlinear(quantize(x), packed W, b)
    linear(x, fake(W), b)          ->  qlinear_weight_only(x, packed W, b)
    embedding(fake(W), i)          ->  qembedding(i, packed W)
    conv2d(fake(x), fake(W), b)    ->  qconv2d(quantize(x), packed W, b)
    anything else on fake(W)       ->  the same on dequantize(packed W): smaller, not faster

Weights move into a new store, so the caller's floating-point tensors are read once and never written.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime import compat
from ..runtime.ops.dequantize import DEQUANTIZE
from ..runtime.ops.qconv2d import QCONV2D
from ..runtime.ops.qembedding import QEMBEDDING
from ..runtime.ops.qlinear import QLINEAR, QLINEAR_WEIGHT_ONLY
from ..runtime.ops.quantize import FAKE_QUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from ..runtime.plan import Quantize
from ..runtime.program import Entry, Program, value_of
from ..runtime.qtensor import QTensor
from ..runtime.scheme import A8_TOKEN, Scheme
from ..runtime.store import Store
from .match import Call, Literal, Match, Maybe, Stored, Var, full_args
from .quantize.insert import SITE
from .rewrite import Rule, apply_rules

aten = torch.ops.aten
STAGE = "lower"

# Codes of an asymmetric activation are stored less this, so that they are int8.
ASYMMETRIC_SHIFT = 128

# Where a fake node keeps the integer nodes made for it, for its other readers.
CODES = "dwindle_codes"


def corrected_bias_name(fqn: str) -> str:
    """Where the bias of the call on parameter `fqn` is stored with its activation's zero point folded in."""
    return f"{fqn}_corrected_bias"


def lower(program: Program, edits: tuple[Quantize, ...], target: Store) -> Program:
    """The program on `target` with its weights packed, and every call fused that has an integer form.

    target: the store of the finished model; QTensors that an earlier variant put there are used again.
    """
    packed = _pack(program, {edit.fqn: edit for edit in edits}, target)
    apply_rules(packed, RULES, STAGE)
    packed.tidy()
    return packed


def _pack(program: Program, edits: Mapping[str, Quantize], target: Store) -> Program:
    """Copy the graph onto `target`: fake(W) becomes dequantize(packed W), other tensors move as they are."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        fqn, transposed = _fake_weight(program, node)
        if fqn is not None and fqn in edits:
            values[node] = _read_packed(program, graph, node, fqn, edits[fqn], target, transposed)
        elif node.op == "get_attr" and all(_fake_weight(program, u)[0] for u in _past_transpose(node)):
            continue  # only packed reads are left
        elif node.op == "get_attr":
            values[node] = _get_attr(graph, _moved(program, str(node.target), target), node.meta)
        elif all(n in values for n in node.all_input_nodes):  # else a transposition of a packed weight
            values[node] = graph.node_copy(node, values.__getitem__)
    return Program.of(graph, target, program.contract, program.log)


def _past_transpose(node: fx.Node) -> list[fx.Node]:
    return [u for user in node.users for u in (user.users if user.target is aten.t.default else (user,))]


def _fake_weight(program: Program, node: fx.Node) -> tuple[str | None, bool]:
    """Name of the stored tensor that `node` fake-quantises, and whether through a transposition."""
    if node.op != "call_function" or node.target is not FAKE_QUANTIZE.overload:
        return None, False
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target is aten.t.default:
        return program.tensor_of(source.args[0]), True
    return program.tensor_of(source), False


def _read_packed(
    program: Program, graph: fx.Graph, node: fx.Node, fqn: str, edit: Quantize, target: Store, transposed: bool
) -> fx.Node:
    for_conv = any(user.target is aten.conv2d.default for user in node.users)
    qtensor = target.get(fqn)
    if not isinstance(qtensor, QTensor):
        weight = program.store.get(fqn)
        assert isinstance(weight, Tensor)
        if transposed:
            weight = weight.t()
        if for_conv:
            weight = weight.permute(0, 2, 3, 1)  # (O, kh, kw, C): see runtime.ops.qconv2d
        qtensor = QTensor.quantize(weight.detach(), edit.weight)
        target.put(fqn, qtensor)
        before, after = weight.numel() * weight.element_size(), qtensor.nbytes
        program.log.append(Entry(stage=STAGE, rule="lower.pack", where=fqn, bytes_before=before, bytes_after=after))
    mode = compat.fake_mode_of(program.graph)
    reads = [
        _get_attr(graph, f"{fqn}.{part}", {"val": compat.fake_tensor(mode, tensor)} if mode is not None else {})
        if tensor is not None
        else None
        for part, tensor in (("codes", qtensor.codes), ("scale", qtensor.scale), ("zero_point", qtensor.zero_point))
    ]
    args = (*reads, list(qtensor.shape), qtensor.scheme.spell(), value_of(node).dtype)
    read = graph.call_function(DEQUANTIZE.overload, args)
    read.meta = dict(node.meta)
    if for_conv:
        read = graph.call_function(aten.permute.default, (read, [0, 3, 1, 2]))
        read.meta = dict(node.meta)
    return read


def _get_attr(graph: fx.Graph, name: str, meta: Mapping[str, Any]) -> fx.Node:
    node = graph.get_attr(name)
    node.meta = dict(meta)
    return node


def _moved(program: Program, name: str, target: Store) -> str:
    """Name in `target` of a tensor of the program's store, put there unless an earlier variant did."""
    tensor = program.store.get(name)
    assert isinstance(tensor, Tensor)
    if name.startswith("constants."):
        return target.constant(tensor)
    if target.get(name) is None:
        target.put(name, tensor, persistent=program.store.is_persistent(name))
    return name


def _activation_name() -> Call:
    return Call(FAKE_QUANTIZE.overload, Var("x"), Maybe("xs"), Maybe("xz"), Literal("xscheme"), name="fx", shared=True)


def _weight_pattern(*, permuted: bool = False) -> Call:
    read = Call(
        DEQUANTIZE.overload,
        Stored("codes"),
        Stored("scale"),
        Maybe("zero"),
        Literal("shape"),
        Literal("wscheme"),
        Literal("dtype"),
        shared=True,
    )
    return Call(aten.permute.default, read, [0, 3, 1, 2], shared=True) if permuted else read


def _integer_gemm(program: Program, found: Match) -> str | None:
    if found["xscheme"] != A8_TOKEN.spell() and Scheme.parse(found["xscheme"]).granularity != "tensor":
        return f"no integer form for activations {found['xscheme']}"
    return None


def _codes_of(program: Program, found: Match) -> tuple[fx.Node, fx.Node]:
    """Nodes for the activation's codes and scale; made once and shared by all that read the same fake node."""
    fake, scheme = found["fx"], Scheme.parse(found["xscheme"])
    if CODES not in fake.meta:
        if found["xs"] is None:
            pair = program.emit(QUANTIZE_DYNAMIC.overload, found["x"], scheme.granularity, like=fake)
            codes = program.emit(operator.getitem, pair, 0, like=fake)
            scale = program.emit(operator.getitem, pair, 1, like=fake)
        else:
            zero = _shifted_zero(program, found)
            codes = program.emit(QUANTIZE_STATIC.overload, found["x"], found["xs"], zero, like=fake)
            scale = found["xs"]
        fake.meta[CODES] = (codes, scale)
    codes, scale = fake.meta[CODES]
    return codes, scale


def _shifted_zero(program: Program, found: Match) -> fx.Node | None:
    if found["xz"] is None:
        return None
    name = f"{found['xz'].target}_int8"
    if program.store.get(name) is None:
        zero = program.store.get(str(found["xz"].target))
        assert isinstance(zero, Tensor)
        program.store.put(name, zero - ASYMMETRIC_SHIFT)
    return program.get_attr(name, found["fx"])


def _to_qlinear(program: Program, found: Match) -> fx.Node:
    codes, scale = _codes_of(program, found)
    bias = _corrected_bias(program, found)
    args = (codes, scale, found["codes"], found["scale"], found["zero"], bias, found["wscheme"], found["dtype"])
    return _marked(program.emit(QLINEAR.overload, *args, like=found.root), found.root)


def _corrected_bias(program: Program, found: Match) -> fx.Node | None:
    """(c - z) W = c W - z sum(W): with a static zero point the second term is a constant, folded into the bias."""
    bias: fx.Node | None = found["b"]
    if found["xz"] is None:
        return bias
    fqn = str(found["codes"].target).removesuffix(".codes")
    name = corrected_bias_name(fqn)
    if program.store.get(name) is None:
        qtensor, scale = program.store.get(fqn), program.store.get(str(found["xs"].target))
        zero = program.store.get(str(found["xz"].target))
        assert isinstance(qtensor, QTensor) and isinstance(scale, Tensor) and isinstance(zero, Tensor)
        columns = qtensor.dequantize().reshape(qtensor.shape[0], -1).double().sum(1)
        shift = -(zero - ASYMMETRIC_SHIFT).double() * scale.double() * columns
        old = program.store.get(str(bias.target)) if bias is not None else None
        program.store.put(name, (shift + old.double() if isinstance(old, Tensor) else shift).float().detach())
    return program.get_attr(name, found.root)


def _marked(new: fx.Node, old: fx.Node) -> fx.Node:
    """Keep the name of the site, by which layers are compared before and after."""
    if SITE in old.meta:
        new.meta[SITE] = old.meta[SITE]
    return new


def _stored_bias(program: Program, found: Match) -> str | None:
    if found["xz"] is not None and found["b"] is not None and program.tensor_of(found["b"]) is None:
        return "the bias is computed, so the zero point cannot be folded into it"
    return _integer_gemm(program, found)


LINEAR_W8A8 = Rule(
    name="lower.qlinear",
    pattern=Call(aten.linear.default, _activation_name(), _weight_pattern(), Maybe("b")),
    check=_stored_bias,
    replace=_to_qlinear,
    approximate=True,
)

LINEAR_WEIGHT_ONLY = Rule(
    name="lower.qlinear_weight_only",
    pattern=Call(aten.linear.default, Var("x"), _weight_pattern(), Maybe("b")),
    check=lambda program, found: "the activation is quantised" if _is_fake(found["x"]) else None,
    replace=lambda program, found: _marked(
        program.emit(
            QLINEAR_WEIGHT_ONLY.overload,
            *(found[n] for n in ("x", "codes", "scale", "zero", "b", "wscheme")),
            like=found.root,
        ),
        found.root,
    ),
    approximate=True,
)


def _is_fake(node: fx.Node) -> bool:
    return node.target is FAKE_QUANTIZE.overload


EMBEDDING = Rule(
    name="lower.qembedding",
    pattern=Call(aten.embedding.default, _weight_pattern(), Var("i")),
    replace=lambda program, found: _marked(
        program.emit(
            QEMBEDDING.overload,
            *(found[n] for n in ("i", "codes", "scale", "zero")),
            found["shape"][1],
            found["wscheme"],
            found["dtype"],
            like=found.root,
        ),
        found.root,
    ),
)


def _to_qconv2d(program: Program, found: Match) -> fx.Node:
    codes, scale = _codes_of(program, found)
    _, _, _, stride, padding, dilation, groups = full_args(found.root)
    o, kh, kw, c = found["shape"]
    weight = program.emit(aten.view.default, found["codes"], [o, kh, kw, c], like=found.root)
    pad_code = _shifted_zero(program, found)
    bias = _corrected_bias(program, found)
    args = (codes, scale, pad_code, weight, found["scale"], bias, _pair(stride), _pair(padding), _pair(dilation))
    return _marked(program.emit(QCONV2D.overload, *args, groups, found["dtype"], like=found.root), found.root)


def _pair(value: list[int]) -> list[int]:
    return list(value) if len(value) == 2 else list(value) * 2


def _int8_filters(program: Program, found: Match) -> str | None:
    if not found["wscheme"].startswith("8-symmetric-channel"):
        return f"no integer convolution for weights {found['wscheme']}"
    if Scheme.parse(found["xscheme"]).granularity != "tensor":
        return f"no integer convolution for activations {found['xscheme']}"
    return _stored_bias(program, found)


CONV2D_W8A8 = Rule(
    name="lower.qconv2d",
    pattern=Call(aten.conv2d.default, _activation_name(), _weight_pattern(permuted=True), Maybe("b")),
    check=_int8_filters,
    replace=_to_qconv2d,
    approximate=True,
)

RULES = (LINEAR_W8A8, LINEAR_WEIGHT_ONLY, EMBEDDING, CONV2D_W8A8)
