"""A model's twins as integer modules, in place: what training simulated becomes what is stored and computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...passes.lower import asymmetric_shift, corrected_bias, subtracted
from ...passes.pack import FILTERS, TRANSPOSED
from ...passes.quantize.live import observed
from ...passes.quantize.twins import Twin, symmetric_padding
from ...runtime.modules import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear, become
from ...runtime.plan import Quantize
from ...runtime.qtensor import QTensor
from .inplace import InPlace

OWN = ("simulates", "steering", "carries")  # attributes of a twin that an integer module has no use for


@torch.no_grad()
def make_integer(steering: InPlace) -> None:
    """Turn every twin into the module of its plan's edit. All are made before the first is changed.

    Raises ScheduleError, CalibrationError or SchemeError.
    """
    steering.course.require_settled("train on, or shorten the schedule in the configuration")
    plan, made = steering.course.plan(), []
    for fqn, twins in steering.twins.items():
        packed: dict[tuple[int, ...], QTensor] = {}
        for twin in twins:
            edit = plan.quantize(fqn, twin.simulates.edit.operator)
            assert edit is not None  # settled, and no target is wider than what can be packed
            dims = _dims(twin, edit)
            if dims not in packed:
                packed[dims] = QTensor.quantize(twin.weight.detach(), edit.weight.nearest, dims=dims)
            made.append((twin, _integer(twin, edit, packed[dims])))
    steering.release()
    for old, new in made:
        become(old, new)
        for name in OWN:
            delattr(old, name)


def _dims(twin: Twin, edit: Quantize) -> tuple[int, ...]:
    if isinstance(twin, nn.Conv2d):
        return FILTERS if edit.weight.granularity != "group" else (0, 1, 2, 3)
    transposed = edit.operator == "linear" and not isinstance(twin, nn.Linear)
    return TRANSPOSED if transposed else (0, 1)


def _integer(twin: Twin, edit: Quantize, weight: QTensor) -> nn.Module:
    dtype = twin.weight.dtype
    if edit.operator == "embedding":
        return QuantizedEmbedding(weight, dtype)
    given = twin._parameters.get("bias")
    bias = None if given is None else given.detach().clone()
    options: dict[str, Any] = {"activation": edit.activation, "dtype": dtype}
    if edit.static and edit.activation is not None:
        params = observed(twin.weight_input_range, edit.activation, edit.fqn)
        options["input_scale"] = params.scale
        if params.zero_point is not None:
            zero = options["input_zero_point"] = params.zero_point - asymmetric_shift(edit.activation)
            bias = corrected_bias(weight, params.scale, zero, bias)
    elif edit.activation is not None and edit.activation.kind == "asymmetric":
        options["weight_sums"] = subtracted(weight, images=isinstance(twin, nn.Conv2d))
    if isinstance(twin, nn.Conv2d):
        options |= {"stride": twin.stride, "dilation": twin.dilation, "groups": twin.groups}
        options |= {"padding": symmetric_padding(twin) or (0, 0), "padding_mode": twin.padding_mode}
        return QuantizedConv2d(weight, bias, **options)
    return QuantizedLinear(weight, bias, **options)
