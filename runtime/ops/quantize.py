"""Quantising activations: dynamic (per token, image or tensor) and static, and fake-quantise for training.

    dynamic      s = amax / q, q = 2^(b-1) - 1; code = rint(x / s)
    asymmetric   s and z of each call's range; code = clamp(rint(x / s) + z, -q - 1, q)
    static       the same with calibrated scalars, or clamp(rint(x / s), -q, q)

All codes are int8, also of fewer bits b. An asymmetric zero point (0 .. 2^b - 1) is stored less 2^(b-1), so that
codes are int8 for `torch._int_mm`; the bits ORT keeps as uint8 with zero point z + 128 differ by that constant alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..errors import DwindleError
from ..numerics import Params
from ..scheme import Granularity, Scheme
from .operator import Kernel, Operator, wants_gradient


def chunk_rows(columns: int) -> int:
    """Rows of `columns` fp32 elements that make about 1 MiB."""
    return max(16, numerics.CHUNK_ELEMENTS // max(columns, 1))


def _require_no_gradient(x: Tensor) -> None:
    """Integer codes would cut the gradient off without a word."""
    if wants_gradient(x):
        raise DwindleError(
            "the codes of an activation carry no gradient",
            required="an activation that needs no gradient",
            found="requires_grad=True",
            cure="call it under torch.no_grad(), or keep gradients with runtime.modules or fake_quantize",
        )


def _dynamic_reference(x: Tensor, granularity: Granularity, bits: int = 8) -> tuple[Tensor, Tensor]:
    _require_no_gradient(x)
    scheme = Scheme(bits=bits, granularity=granularity)
    params = numerics.parameters(x, scheme)
    return numerics.quantize(x, params, scheme), params.scale


def _asymmetric_reference(x: Tensor, granularity: Granularity, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    _require_no_gradient(x)
    scheme, shift = Scheme(bits=bits, kind="asymmetric", granularity=granularity), 2 ** (bits - 1)
    params = numerics.parameters(x, scheme)
    assert params.zero_point is not None
    codes = numerics.quantize(x, params, scheme).to(torch.int16) - shift
    return codes.to(torch.int8), params.scale, params.zero_point - shift


@torch.no_grad()
def _dynamic_token_cpu(x: Tensor, granularity: str, bits: int = 8) -> tuple[Tensor, Tensor]:
    largest = 2 ** (bits - 1) - 1
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scale = torch.empty((rows.shape[0], 1), dtype=torch.float32)
    step = chunk_rows(rows.shape[1])
    for i in range(0, rows.shape[0], step):
        part = rows[i : i + step].float()
        # |x / s| <= 127.00001 with s from amax, which rounds to 127: no clamp is needed.
        s = numerics.symmetric_scale(part.abs().amax(1, keepdim=True), largest)
        scale[i : i + step] = s
        codes[i : i + step] = torch.div(part, s).round_()
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def _token_on_cpu(x: Tensor, granularity: str, bits: int = 8) -> str | None:
    if x.device.type != "cpu":
        return "needs a CPU tensor"
    if wants_gradient(x):
        return "needs no gradient"
    return None if granularity == "token" else "needs granularity 'token'"


def _static_reference(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int = 8) -> Tensor:
    _require_no_gradient(x)
    steps = torch.round(x.float() / scale)
    if zero_point is not None:
        steps = steps + zero_point
    return steps.clamp(*_ends(zero_point, bits)).to(torch.int8)


def in_range(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int = 8) -> Tensor:
    """Where `quantize_static` does not clip, as `numerics.fake_quantize` has it: boolean, in x's shape."""
    steps = x.detach().float() / scale
    if zero_point is not None:
        steps = steps + zero_point
    low, high = _ends(zero_point, bits)
    return (steps >= low - 0.5) & (steps <= high + 0.5)


def _ends(zero_point: Tensor | None, bits: int) -> tuple[int, int]:
    largest = int(2 ** (bits - 1) - 1)
    return -largest if zero_point is None else -largest - 1, largest


@torch.no_grad()
def _static_cpu(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int = 8) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8)
    (low, high), step = _ends(zero_point, bits), chunk_rows(rows.shape[1])
    for i in range(0, rows.shape[0], step):
        steps = torch.div(rows[i : i + step].float(), scale).round_()
        if zero_point is not None:
            steps.add_(zero_point)
        codes[i : i + step] = steps.clamp_(low, high)
    return codes.reshape(x.shape)


def _on_cpu(x: Tensor, *_: object) -> str | None:
    if x.device.type != "cpu" or x.dim() == 0:
        return "needs a CPU tensor"
    return "needs no gradient" if wants_gradient(x) else None


def _fake(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, scheme: str) -> Tensor:
    params = None if scale is None else Params(scale, zero_point)
    return numerics.fake_quantize(x, Scheme.parse(scheme), params)


@torch.no_grad()
def _fake_cpu(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, scheme: str) -> Tensor:
    parsed, out = Scheme.parse(scheme), torch.empty(x.shape, dtype=x.dtype)
    params = None if scale is None else Params(scale, zero_point)
    for part in numerics.chunks(x, parsed):
        out[part] = numerics.simulate(x[part], parsed, params)
    return out


def _without_gradient(x: Tensor, scale: Tensor | None, *_: object) -> str | None:
    if x.device.type != "cpu" or x.dim() == 0:
        return "needs a CPU tensor"
    if scale is not None and scale.dim() > 0:
        return "needs ranges per tensor, or none"
    return "needs no gradient" if wants_gradient(x) else None


QUANTIZE_DYNAMIC = Operator(
    name="quantize_dynamic",
    schema="(Tensor x, str granularity, int bits=8) -> (Tensor, Tensor)",
    reference=_dynamic_reference,
    kernels=(Kernel(name="cpu chunked", serves=_token_on_cpu, run=_dynamic_token_cpu),),
)

QUANTIZE_ASYMMETRIC = Operator(
    name="quantize_asymmetric",
    schema="(Tensor x, str granularity, int bits=8) -> (Tensor, Tensor, Tensor)",
    reference=_asymmetric_reference,
)

QUANTIZE_STATIC = Operator(
    name="quantize_static",
    schema="(Tensor x, Tensor scale, Tensor? zero_point, int bits=8) -> Tensor",
    reference=_static_reference,
    kernels=(Kernel(name="cpu chunked", serves=_on_cpu, run=_static_cpu),),
)

FAKE_QUANTIZE = Operator(
    name="fake_quantize",
    schema="(Tensor x, Tensor? scale, Tensor? zero_point, str scheme) -> Tensor",
    reference=_fake,
    kernels=(Kernel(name="cpu chunked", serves=_without_gradient, run=_fake_cpu),),
)
