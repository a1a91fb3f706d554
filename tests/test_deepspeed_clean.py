"""redundancy_clean, and what DeepSpeed's entry points take and refuse."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_configs import (
    JSON,
    activations,
    bits,
    engine,
    falling,
    group,
    layers,
    static,
    technique,
    weights,
)
from models import ZOO
from numerics import error
from torch import nn

import dwindle
from dwindle.deepspeed import init_compression, redundancy_clean
from dwindle.frontends.deepspeed.inplace import require_steering, steering_of
from dwindle.passes.quantize.twins import TrainingLinear, Twin
from dwindle.runtime.errors import CalibrationError, CaptureError, DwindleError, RecipeError, ScheduleError
from dwindle.runtime.modules import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear
from dwindle.runtime.scheme import Scheme

A8_STATIC = Scheme(kind="asymmetric", granularity="tensor")
FALLS = engine(weight_quantization=falling(8, 4))
AT_ONCE = engine(weight_quantization=falling(8, 4, quantize_weight_in_forward=True))


def _size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def test_clean_leaves_integers_that_are_smaller_and_differentiable() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding="same", padding_mode="reflect"), nn.Conv2d(32, 32, 1, bias=False)
    )
    wq = falling(8, 8, 0, ("0", "1"), quantize_groups=32)
    config = engine(weight_quantization=wq, activation_quantization=static("asymmetric", ("0", "1")))
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    before = _size(model)
    init_compression(model, config)
    with pytest.raises(CalibrationError, match="nothing was seen of"):
        redundancy_clean(model, config)
    assert all(isinstance(m, Twin) for m in model)  # nothing was changed
    model(x)
    expected = model.eval()(x)
    redundancy_clean(model, config)
    assert all(isinstance(m, QuantizedConv2d) and m.activation == A8_STATIC for m in model)
    assert _size(model) < before / 2
    assert error(model(x).detach(), expected.detach()) < 1e-6
    wanted = x.clone().requires_grad_()
    model(wanted).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0


def test_tied_weights_are_packed_once() -> None:
    model, inputs = ZOO["tied_lm"]()
    config = engine(weight_quantization=falling(8, 8, 0, ("embedding", "head")))
    init_compression(model, config)
    redundancy_clean(model, config)
    assert isinstance(model.embedding, QuantizedEmbedding)
    assert isinstance(model.head, QuantizedLinear)
    assert model.embedding.weight is model.head.weight
    assert model(**inputs).shape == (2, 8, 99)


def test_clean_refuses_a_schedule_that_is_not_over() -> None:
    model, _ = ZOO["bert"]()
    init_compression(model, FALLS)
    with pytest.raises(ScheduleError, match=r"(?s)not at the end.*required.*found.*cure: train on"):
        redundancy_clean(model, FALLS)
    assert isinstance(model.pooler.dense, TrainingLinear)
    with pytest.raises(RecipeError, match=r"(?s)not the one of init_compression.*quantize"):
        redundancy_clean(model, AT_ONCE)
    with pytest.raises(ScheduleError, match="no module in training"):
        redundancy_clean(ZOO["bert"]()[0], FALLS)


class _Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


SOURCES: dict[str, Callable[[JSON, Path], Any]] = {
    "dict": lambda config, path: config,
    "path": lambda config, path: str(path),
    "Path": lambda config, path: path,
    "arguments": lambda config, path: Namespace(deepspeed_config=str(path)),
}


@pytest.mark.parametrize("how", SOURCES)
def test_configurations_as_deepspeed_took_them(how: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    config = AT_ONCE
    path.write_text(json.dumps(config))
    wrapped = _Wrapper(ZOO["bert"]()[0])
    assert init_compression(wrapped, SOURCES[how](config, path)) is wrapped
    assert "encoder.layer.0.output.dense.weight" in require_steering(wrapped.module).course.weights


def test_what_cannot_be_done_is_refused() -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(RecipeError, match="wrong kind"):
        init_compression(model, 3)
    with pytest.raises(DwindleError, match="tensor parallelism"):
        init_compression(model, FALLS, mpu=object())
    with pytest.raises(RecipeError, match="matches nothing"):
        init_compression(model, engine(weight_quantization=falling(8, 8, 0, ("nowhere",))))
    with pytest.raises(CaptureError, match="already"):
        init_compression(dwindle.prepare(model, inputs=inputs), FALLS)
    rows = technique({"rp1": group(("intermediate",), dense_ratio=0.5)}, method="topk", schedule_offset=0)
    with pytest.raises(RecipeError, match=r"(?s)not pruned in place.*row_pruning"):
        init_compression(model, engine(row_pruning=rows))
    with pytest.raises(RecipeError, match="there is no teacher"):
        init_compression(model, engine(layer_reduction=layers((0, 1))))
    assert steering_of(model) is None
    init_compression(model, FALLS)
    with pytest.raises(RecipeError, match=r"(?s)initialised already.*once"):
        init_compression(model, FALLS)
    for begin in (dwindle.compress, dwindle.prepare):
        with pytest.raises(CaptureError, match=r"(?s)in training since.*redundancy_clean"):
            begin(model, inputs=inputs)


@pytest.mark.parametrize("groups", [("wq1", "wq2"), ("wq1",)])
def test_two_patterns_of_one_technique_must_not_choose_one_module(groups: tuple[str, ...]) -> None:
    """As DeepSpeed, whose error was a ValueError 'already added'; two techniques may."""
    patterns = ("query", "layer.0.attention.self")
    if len(groups) == 2:
        section = weights({name: bits(8, 8, modules=(p,)) for name, p in zip(groups, patterns, strict=True)})
    else:
        section = weights({"wq1": bits(8, 8, modules=patterns)})
    config = engine(weight_quantization=section, activation_quantization=activations(("query",)))
    model, inputs = ZOO["bert"]()
    for start in (lambda: init_compression(model, config), lambda: dwindle.prepare(model, config, inputs=inputs)):
        with pytest.raises(RecipeError, match=r"(?s)weight_quantization choose .*self\.query.*'query'.*cure"):
            start()
    config["compression_training"]["weight_quantization"]["shared_parameters"]["enabled"] = False
    init_compression(model, config)  # off, it may say anything
