"""From simulated quantisation to integers: packs weights and picks the operator that really runs.

    linear(fake(x), fake(W), b)    ->  qlinear(quantize(x), packed W, b)
    linear(x, fake(W), b)          ->  qlinear_weight_only(x, packed W, b)
    embedding(fake(W), i)          ->  qembedding(i, packed W)
    conv2d(fake(x), fake(W), b)    ->  qconv2d(quantize(x), packed W, b)
    anything else on fake(W)       ->  the same on dequantize(packed W): smaller, not faster

Asymmetric activations meet (c - z) W = c W - z sum(W). Of static ones the second term is a constant and goes into the
bias; of dynamic ones it is taken off the product:

    linear(fake(x), fake(W), b)    ->  qlinear(codes, packed W, b) - (s_x z) sum(W)
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ..runtime.ops.dequantize import DEQUANTIZE
from ..runtime.ops.qconv2d import QCONV2D
from ..runtime.ops.qembedding import QEMBEDDING
from ..runtime.ops.qlinear import QLINEAR, QLINEAR_WEIGHT_ONLY
from ..runtime.ops.quantize import FAKE_QUANTIZE, QUANTIZE_ASYMMETRIC, QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from ..runtime.plan import Quantize, of_call
from ..runtime.program import Program
from ..runtime.qtensor import QTensor
from ..runtime.scheme import Scheme
from ..runtime.store import Store
from .fold import folded_bias_name
from .match import Call, Literal, Match, Maybe, Stored, Var, full_args
from .pack import pack
from .quantize.insert import CALL, SITE
from .rewrite import Rule, apply_rules

aten = torch.ops.aten
STAGE = "lower"

# Where a fake node keeps the integer nodes made for it, for its other readers.
CODES = "dwindle_codes"


def asymmetric_shift(activation: Scheme) -> int:
    """Codes of an asymmetric activation are stored less this, so that they are int8."""
    return int(2 ** (activation.bits - 1))


def sums_name(fqn: str) -> str:
    """Where the sums of each output channel of parameter `fqn` are stored."""
    return f"{fqn}_sums"


def corrected_bias_name(weight: str, bias: str | None, call: int = 0) -> str:
    """Where `bias`, added to a product with a weight, is stored with the activation's zero point folded in.

    weight, call: the weight's name in the module that calls, and which of that name's inputs it is
    """
    own = bias in (None, f"{weight.rpartition('.')[0]}.bias".lstrip("."), folded_bias_name(weight))
    return of_call(f"{weight}_corrected_bias" if own else f"{weight}_corrected_{str(bias).replace('.', '_')}", call)


def lower(program: Program, edits: tuple[Quantize, ...], target: Store) -> Program:
    """The program on `target` with its weights packed, and every call fused that has an integer form.

    target: the store of the finished model; QTensors that an earlier variant put there are used again.
    """
    packed = pack(program, {edit.fqn: edit for edit in edits}, target)
    apply_rules(packed, RULES, STAGE)
    packed.tidy()
    return packed


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
    scheme = Scheme.parse(found["xscheme"])
    if scheme.granularity not in ("token", "tensor") or scheme.bits > 8:
        return f"no integer form for activations {found['xscheme']}"
    return None


def _codes_of(program: Program, found: Match) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Nodes for an activation's codes, scale and zero point; made once for all that read the same fake node."""
    fake, scheme = found["fx"], Scheme.parse(found["xscheme"])
    if CODES not in fake.meta:
        fewer = () if scheme.bits == 8 else (scheme.bits,)
        if found["xs"] is None:
            asymmetric = scheme.kind == "asymmetric"
            quantise = QUANTIZE_ASYMMETRIC if asymmetric else QUANTIZE_DYNAMIC
            parts = program.emit(quantise.overload, found["x"], scheme.granularity, *fewer, like=fake)
            made = [program.emit(operator.getitem, parts, i, like=fake) for i in range(3 if asymmetric else 2)]
        else:
            zero = _shifted_zero(program, found)
            args = (found["x"], found["xs"], zero, *fewer)
            made = [program.emit(QUANTIZE_STATIC.overload, *args, like=fake), found["xs"]]
            made += [] if zero is None else [zero]
        fake.meta[CODES] = made
    codes, scale, *zeros = fake.meta[CODES]
    return codes, scale, zeros[0] if zeros else None


def _shifted_zero(program: Program, found: Match) -> fx.Node | None:
    if found["xz"] is None:
        return None
    name = f"{found['xz'].target}_int8"
    if program.store.get(name) is None:
        zero = program.store.get(str(found["xz"].target))
        assert isinstance(zero, Tensor)
        program.store.put(name, zero - asymmetric_shift(Scheme.parse(found["xscheme"])))
    return program.get_attr(name, found["fx"])


def _to_qlinear(program: Program, found: Match) -> fx.Node:
    codes, scale, zero = _codes_of(program, found)
    bias, dtype = _corrected_bias(program, found), found["dtype"]
    moving = zero if found["xs"] is None else None
    args = (codes, scale, found["codes"], found["scale"], found["zero"], bias, found["wscheme"])
    y = program.emit(QLINEAR.overload, *args, dtype if moving is None else torch.float32, like=found.root)
    return _marked(y if moving is None else _without_zero(program, found, y, scale, moving, dtype), found.root)


def _without_zero(
    program: Program, found: Match, y: fx.Node, scale: fx.Node, zero: fx.Node, dtype: torch.dtype
) -> fx.Node:
    """y - (s_x z) sum(W), in fp32, then in the layer's dtype; y (..., N), or (B, N, H, W) of images."""
    name, like = sums_name(_weight_name(found)), found.root
    if program.store.get(name) is None:
        qtensor = program.store.get(_weight_name(found))
        assert isinstance(qtensor, QTensor)
        program.store.put(name, subtracted(qtensor, images=like.target is aten.conv2d.default))
    share = program.emit(aten.mul.Tensor, scale, zero, like=like)
    share = program.emit(aten.mul.Tensor, share, program.get_attr(name, like), like=like)
    y = program.emit(aten.sub.Tensor, y, share, like=like)
    return y if dtype == torch.float32 else program.emit(aten.to.dtype, y, dtype, like=like)


def _weight_name(found: Match) -> str:
    return str(found["codes"].target).removesuffix(".codes")


def subtracted(weight: QTensor, *, images: bool) -> Tensor:
    """fp32 sums of channels as they meet a product (..., N), or (B, N, H, W) of images."""
    sums = channel_sums(weight).float()
    return sums.reshape(1, -1, 1, 1) if images else sums


def channel_sums(weight: QTensor) -> Tensor:
    """fp64 (N,): what each output channel's weights add up to."""
    return weight.dequantize().reshape(weight.shape[0], -1).double().sum(1)


def _corrected_bias(program: Program, found: Match) -> fx.Node | None:
    """(c - z) W = c W - z sum(W): with a static zero point the second term is a constant, folded into the bias."""
    bias: fx.Node | None = found["b"]
    if found["xz"] is None:
        return bias
    weight, call = found.root.meta[CALL]
    name = corrected_bias_name(weight, program.tensor_of(bias), call)
    if program.store.get(name) is None:
        qtensor = program.store.get(_weight_name(found))
        scale, zero = (program.store.get(str(found[n].target)) for n in ("xs", "xz"))
        assert isinstance(qtensor, QTensor) and isinstance(scale, Tensor) and isinstance(zero, Tensor)
        old = program.store.get(str(bias.target)) if bias is not None else None
        bias_tensor = old if isinstance(old, Tensor) else None
        shift = asymmetric_shift(Scheme.parse(found["xscheme"]))
        program.store.put(name, corrected_bias(qtensor, scale, zero - shift, bias_tensor))
    return program.get_attr(name, found.root)


def corrected_bias(weight: QTensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Tensor:
    """b - z s_x sum_k W[n, k], fp32 (N,); zero_point in int8 terms."""
    shift = -zero_point.double() * scale.double() * channel_sums(weight)
    return (shift if bias is None else shift + bias.double()).float().detach()


def _marked(new: fx.Node, old: fx.Node) -> fx.Node:
    """Keep the name of the site, by which layers are compared before and after."""
    if SITE in old.meta:
        new.meta[SITE] = old.meta[SITE]
    return new


def _stored_bias(program: Program, found: Match) -> str | None:
    if found["xz"] is not None and found["b"] is not None and program.tensor_of(found["b"]) is None:
        return "the bias is computed, so the zero point cannot be folded into it"
    return None


LINEAR_W8A8 = Rule(
    name="lower.qlinear",
    pattern=Call(aten.linear.default, _activation_name(), _weight_pattern(), Maybe("b")),
    check=lambda program, found: _integer_gemm(program, found) or _stored_bias(program, found),
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
    codes, scale, zero = _codes_of(program, found)
    _, _, _, stride, padding, dilation, groups = full_args(found.root)
    o, kh, kw, c = found["shape"]
    weight = program.emit(aten.view.default, found["codes"], [o, kh, kw, c], like=found.root)
    bias, dtype = _corrected_bias(program, found), found["dtype"]
    moving = zero if found["xs"] is None else None
    args = (codes, scale, zero, weight, found["scale"], bias, _pair(stride), _pair(padding), _pair(dilation), groups)
    y = program.emit(QCONV2D.overload, *args, dtype if moving is None else torch.float32, like=found.root)
    return _marked(y if moving is None else _without_zero(program, found, y, scale, moving, dtype), found.root)


def _pair(value: list[int]) -> list[int]:
    return list(value) if len(value) == 2 else list(value) * 2


def _int8_filters(program: Program, found: Match) -> str | None:
    if not found["wscheme"].startswith("8-symmetric-channel"):
        return f"no integer convolution for weights {found['wscheme']}"
    if Scheme.parse(found["xscheme"]).granularity not in ("image", "tensor"):
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
