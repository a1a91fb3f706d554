"""Observers against their definitions, and what calibration leaves in the store."""

from __future__ import annotations

import pytest
import torch
from models import ZOO

import dwindle
from dwindle.passes.quantize.observers import CLIP_RATIOS, METHODS, SAMPLE, Observer, sample
from dwindle.runtime import numerics
from dwindle.runtime.errors import CalibrationError
from dwindle.runtime.plan import input_scale_name
from dwindle.runtime.scheme import A8_TENSOR, Scheme

ASYMMETRIC = Scheme(bits=8, kind="asymmetric", granularity="tensor")


def _batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 32, generator=generator) * (i + 1) for i in range(count)]


def test_minmax_is_the_extremes_of_all_batches() -> None:
    observer = Observer(method="minmax")
    for batch in _batches():
        observer.observe(batch)
    everything = torch.cat(_batches())
    assert torch.equal(observer.params(A8_TENSOR).scale, numerics.parameters(everything, A8_TENSOR).scale)
    found, expected = observer.params(ASYMMETRIC), numerics.parameters(everything, ASYMMETRIC)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero_point, expected.zero_point)


def test_moving_average_follows_its_recurrence() -> None:
    observer = Observer(method="moving-average", momentum=0.75)
    high = None
    for batch in _batches():
        observer.observe(batch)
        high = float(batch.max()) if high is None else 0.75 * high + 0.25 * float(batch.max())
    assert observer.high == pytest.approx(high)


def test_percentile_cuts_both_tails() -> None:
    observer = Observer(method="percentile", percentile=99.0)
    x = torch.linspace(-1, 1, 10_001)
    x[0], x[-1] = -100.0, 100.0
    observer.observe(x)
    assert float(observer.params(A8_TENSOR).scale) * 127 == pytest.approx(0.98, abs=2e-3)


def test_mse_is_the_best_of_its_ratios_and_beats_minmax_on_outliers() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    x[0] = 10.0
    scheme = Scheme(bits=4, granularity="tensor")
    errors, scales = {}, {}
    for method in METHODS:
        observer = Observer(method=method)
        observer.observe(x)
        params = observer.params(scheme)
        scales[method] = float(params.scale)
        errors[method] = float((numerics.fake_quantize(x, scheme, params) - x).square().mean())
    assert errors["mse"] < 0.3 * errors["minmax"]
    assert errors["mse"] == min(errors.values())
    ratios = [10.0 * i / CLIP_RATIOS / 7 for i in range(1, CLIP_RATIOS + 1)]
    assert any(scales["mse"] == pytest.approx(ratio) for ratio in ratios)


@pytest.mark.parametrize("shape", [(32, 128, 384), (4, 512, 1024), (8, 64, 56, 56), (2 * SAMPLE - 1,), (3, 5), (1,)])
def test_a_sample_is_small_and_has_a_part_of_every_index_of_every_dimension(shape: tuple[int, ...]) -> None:
    count = torch.Size(shape).numel()
    picked = sample(torch.arange(count))
    assert min(count, SAMPLE) / 2 < picked.numel() <= SAMPLE
    assert picked.unique().numel() == picked.numel()
    for dim, index in enumerate(torch.unravel_index(picked, shape)):
        parts = index.bincount(minlength=shape[dim])
        assert parts.min() > 0 or len(shape) == 1
        assert parts.max() <= 1.5 * parts.min() + 2


@pytest.mark.parametrize("method", ["mse", "percentile"])
@pytest.mark.parametrize("channel", [0, 1])
def test_a_channel_that_stands_out_is_seen_wherever_it_is(method: str, channel: int) -> None:
    x = torch.randn(32, 128, 384, generator=torch.Generator().manual_seed(2))
    x[..., channel] *= 100
    whole, parts = Observer(method=method), Observer(method=method)
    whole.observe(x)
    for part in x.split(1):
        parts.observe(part)
    assert float(whole.params(A8_TENSOR).scale) == pytest.approx(float(parts.params(A8_TENSOR).scale), rel=0.25)


def test_nothing_observed_and_nothing_finite_are_errors() -> None:
    with pytest.raises(CalibrationError, match="no calibration data"):
        Observer().params(A8_TENSOR)
    with pytest.raises(CalibrationError, match="finite"):
        Observer().observe(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("method", METHODS)
def test_q_k_and_v_share_one_static_scale(method: str) -> None:
    model, inputs = ZOO["bert"]()
    recipe = {
        "quantize": [{"activation": {"range": "static"}}],
        "calibration": {"method": method},
    }
    small = dwindle.compress(model, recipe, inputs=inputs, data=[inputs, inputs])
    scales = [
        small.store.get(input_scale_name(f"encoder.layer.0.attention.self.{name}.weight"))
        for name in ("query", "key", "value")
    ]
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[1], scales[2])
    (program,) = small.variants.values()
    assert len(program.calls(torch.ops.dwindle.quantize_static.default)) == 2 * 4 + 1
    assert small.certificate.lowering_error < 1e-5
