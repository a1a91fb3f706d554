"""Against DeepSpeed 0.19.6 itself: the last release with compression, here only to be compared with.

pip install 'dwindle[oracle]', in an environment of its own if another DeepSpeed is wanted elsewhere.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import warnings
from typing import Any

import pytest
import torch
from deepspeed_configs import JSON, bits, engine, falling, group, layers, technique, weights
from torch import Tensor, nn

import dwindle
import dwindle.deepspeed as ours
from dwindle.passes.prune.groups import kept_count
from dwindle.passes.quantize.twins import Twin
from dwindle.passes.schedule import MoQ
from dwindle.runtime import numerics
from dwindle.runtime.scheme import Scheme

os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # DeepSpeed's own, of torch's deprecated parts
    pytest.importorskip(
        "deepspeed",
        reason="NOT COMPARED WITH DEEPSPEED: it is not installed. pip install deepspeed==0.19.6 (extra 'oracle')",
    )
    theirs = importlib.import_module("deepspeed.compression.compress")
    helper = importlib.import_module("deepspeed.compression.helper")
    quantizers = importlib.import_module("deepspeed.compression.utils")
    runtime = importlib.import_module("deepspeed.runtime.quantize")

SHAPE, GROUPS = (32, 48), 4
SCHEME: dict[str, Any] = {"granularity": "rows", "group_size": SHAPE[0] // GROUPS}


def _weight(seed: int = 0) -> Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed))


def _steps(x: Tensor, scheme: Scheme) -> Tensor:
    """The size of a step for each element."""
    scale = numerics.parameters(x, scheme).scale
    return scale.reshape(-1, 1).expand(SHAPE)


@pytest.mark.parametrize("count", [3, 4, 6, 8])
def test_symmetric_quantisers_agree_within_a_step(count: int) -> None:
    """Ours: max|x| / (2^(B-1) - 1), so the largest stays; theirs: max|x| / 2^(B-1), which clips it by a step."""
    x, scheme = _weight(), Scheme(bits=count, **SCHEME)
    expected = quantizers.SymQuantizer.apply(x, count, None, None, GROUPS)
    found = numerics.simulate(x, scheme)
    steps = (found - expected).abs() / _steps(x, scheme)
    assert 0.5 < float(steps.max()) <= 1 + 1e-5
    assert ((x - found).abs() <= _steps(x, scheme) / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("count", [3, 4, 6, 8])
def test_asymmetric_quantisers_agree_within_two_steps(count: int) -> None:
    """Theirs loses up to one and a half steps at the maximum, ours half a one."""
    x, scheme = _weight() + 0.5, Scheme(bits=count, kind="asymmetric", **SCHEME)
    expected = quantizers.AsymQuantizer.apply(x, count, None, None, GROUPS)
    steps = (numerics.simulate(x, scheme) - expected).abs() / _steps(x, scheme)
    assert float(steps.max()) <= 2  # measured 1.69
    assert float((steps > 1).float().mean()) < 0.005  # only near the maximum: measured .002


def test_ternary_is_theirs_and_binary_but_for_zeros() -> None:
    x = _weight()
    x[3, :7] = 0.0
    ternary = numerics.simulate(x, Scheme(bits=2, kind="ternary", **SCHEME))
    expected = quantizers.TernaryQuantizer.apply(x, 2, None, None, GROUPS)
    assert torch.equal(ternary, expected)
    binary = numerics.simulate(x, Scheme(bits=1, kind="binary", **SCHEME))
    expected = quantizers.BinaryQuantizer.apply(x, 1, None, None, GROUPS)
    assert torch.allclose(binary[x != 0], expected[x != 0], rtol=1e-6)
    assert not expected[x == 0].any()
    assert (binary[x == 0] > 0).all()  # sign(0) = +1


def _moq(start: int, target: int, period: int, factor: int, steps: int, **options: Any) -> list[tuple[int, float]]:
    """Bits and the unquantised share after each step, as DeepSpeed's quantizer has them."""
    quantizer = runtime.Quantizer(q_groups=1, q_type="symmetric", q_rounding="nearest", **options)
    weight = nn.Parameter(_weight())
    weight.start_bits, weight.target_bits, weight.q_period = start, target, period
    found = []
    for _ in range(steps):
        quantizer.step()
        quantizer.update_fp16_ratio()
        quantizer.compute_quantization(weight, 0, factor)
        found.append((weight.start_bits, quantizer.quantize_real_ratio))
    return found


@pytest.mark.parametrize("factor", [1, 2, 5])
@pytest.mark.parametrize(
    ("start", "target", "period"), [(12, 8, 10), (16, 8, 1), (8, 4, 0), (6, 1, 3), (14, 8, 7), (8, 8, 5)]
)
def test_bits_drop_at_the_same_steps(start: int, target: int, period: int, factor: int) -> None:
    steps, schedule = 1000, MoQ(start_bits=start, period=period)
    now, found = schedule.begin(target), []
    for step in range(1, steps + 1):
        now = schedule.advance(now, target, step, factor)
        found.append(now.bits)
    assert found == [count for count, _ in _moq(start, target, period, factor, steps)]


def test_the_unquantised_share_is_the_same() -> None:
    schedule = MoQ(start_bits=8, period=4, change=0.3)
    now, found = schedule.begin(6), []
    for step in range(1, 21):
        now = schedule.advance(now, 6, step)
        found.append(now.mix)
    expected = [share for _, share in _moq(8, 6, 4, 1, 20, q_mixed_fp16=True, q_change_ratio=0.3)]
    assert found == pytest.approx([max(0.0, share) for share in expected])  # theirs is below 0 for one step
    assert min(expected) < 0


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.dense = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dense(torch.tanh(self.query(x))))


class _Model(nn.Module):
    def __init__(self, depth: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, 16)
        self.layer = nn.ModuleList([_Block() for _ in range(depth)])
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layer:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


CHOICES: dict[str, JSON] = {
    "some": weights({"wq1": bits(8, 8, 0, ("query",)), "wq2": bits(4, 4, 0, ("layer.1.dense", "head"))}),
    "all": falling(8, 4, 0, (".",), quantize_groups=4),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_same_modules_are_chosen_and_compute_nearly_alike(name: str) -> None:
    section = copy.deepcopy(CHOICES[name])
    section["shared_parameters"]["quantize_weight_in_forward"] = True
    config, tokens = engine(weight_quantization=section), torch.arange(12).reshape(2, 6)
    model, peer = _Model(2), _Model(2)
    with torch.no_grad():
        float_output = model(tokens)
    ours.init_compression(model, copy.deepcopy(config))
    theirs.init_compression(peer, copy.deepcopy(config))
    chosen = {n: m for n, m in peer.named_modules() if getattr(m, "weight_quantization_enabled_in_forward", False)}
    assert {n for n, m in model.named_modules() if isinstance(m, Twin)} == {*chosen}
    for module in chosen.values():
        module.weight_quantization_enabled = True  # as its scheduler does at the offset
    with torch.no_grad():
        outputs = [model(tokens), peer(tokens)]
    distances = [float((output - float_output).norm()) for output in outputs]
    assert float((outputs[0] - outputs[1]).norm()) < 2 * max(distances)
    # Of the output's norm ours is off by .074 and .134, theirs by .068 and .127: their finer step against the maximum.
    assert distances[0] == pytest.approx(distances[1], rel=0.2)


def test_overlaps_are_refused_by_both() -> None:
    section = weights({"wq1": bits(8, 8, 0, ("query", "layer.0"))})
    with pytest.raises(ValueError, match="already added"):
        theirs.init_compression(_Model(2), engine(weight_quantization=section))
    with pytest.raises(Exception, match="two patterns of weight_quantization"):
        ours.init_compression(_Model(2), engine(weight_quantization=section))


def test_students_are_initialised_alike() -> None:
    more = {"module_name_prefix": "layer", "other_module_name": ["embed", "head"]}
    config, teacher = engine(layer_reduction=layers((1, 3), **more)), _Model(4, 1)
    students = [_Model(2), _Model(2)]
    ours.student_initialization(students[0], teacher, copy.deepcopy(config))
    theirs.student_initialization(students[1], teacher, copy.deepcopy(config))
    found, expected = (student.state_dict() for student in students)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


class _Conv1D(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(rows, columns)), nn.Parameter(torch.randn(columns))


def test_conv1d_is_converted_alike() -> None:
    model = nn.Sequential(_Conv1D(16, 8), nn.ReLU(), _Conv1D(8, 4))
    peer, x = copy.deepcopy(model), torch.randn(3, 16)
    ours.convert_conv1d_to_linear(model, _Conv1D)
    helper.convert_conv1d_to_linear(peer, _Conv1D)
    with torch.no_grad():
        assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
        assert torch.equal(model(x), peer(x))


class _Attention(nn.Module):
    """Twelve heads of 2 on (N, L, 24), then a feed-forward of 40."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (12, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        x = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return self.down(self.up(x).relu())


def _structures(ratio: float) -> JSON:
    head = group(("out",), [["query", "key", "value"]], dense_ratio=ratio)
    row = group(("up",), [["down"]], dense_ratio=ratio)
    return engine(
        head_pruning=technique({"a": head}, method="topk", num_heads=12, schedule_offset=0),
        row_pruning=technique({"a": row}, method="l1", schedule_offset=0),
    )


@pytest.mark.parametrize("ratio", [0.1, 0.34, 0.5, 0.6, 0.75, 1.0])
def test_the_same_shapes_are_left(ratio: float) -> None:
    config, model, x = _structures(ratio), _Attention(), torch.randn(2, 5, 24)
    peer = copy.deepcopy(model)
    theirs.init_compression(peer, copy.deepcopy(config))
    theirs.redundancy_clean(peer, copy.deepcopy(config))
    small = dwindle.prepare(model.eval(), config, inputs=x).finish()
    expected = {name: tuple(p.shape) for name, p in peer.named_parameters() if "score" not in name}
    assert {name: tuple(value.shape) for name, value in small.store.entries() if isinstance(value, Tensor)} == expected
    assert small(x).shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("ratio", "n", "fewer"), [(0.6, 12, 0), (0.3, 10, 0), (0.9, 3072, 0), (0.07, 100, 1), (0.55, 100, 1)]
)
def test_as_many_are_kept(ratio: float, n: int, fewer: int) -> None:
    """One less where their product of floats lies just above a whole number, 7.000000000000001 or 55.00000000000001."""
    kept = int(quantizers.TopKBinarizer.apply(torch.randn(n, 1), ratio, False).sum())
    assert kept_count(n, round(1 - ratio, 15)) == kept - fewer


def test_scores_that_fail_there_work_here() -> None:
    config = _structures(0.5)
    config["compression_training"]["head_pruning"]["shared_parameters"]["method"] = "l1"
    with pytest.raises(NotImplementedError):
        theirs.init_compression(_Attention(), copy.deepcopy(config))
    small = dwindle.compress(_Attention(), config, inputs=torch.randn(2, 5, 24))
    assert small.store.get("query.weight").shape == (12, 24)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    channel = group(("0",), [["2"]], dense_ratio=0.5)
    config = engine(channel_pruning=technique({"a": channel}, method="l1", schedule_offset=0))
    with pytest.raises(RuntimeError, match="length 1 or 2"):
        theirs.init_compression(copy.deepcopy(convolutions), copy.deepcopy(config))
    small = dwindle.compress(convolutions, config, inputs=torch.randn(2, 3, 8, 8))
    assert small.store.get("2.weight").shape == (4, 4, 3, 3)


def test_signatures_are_theirs() -> None:
    for name in ("init_compression", "redundancy_clean", "student_initialization"):
        assert [*inspect.signature(getattr(ours, name)).parameters] == [
            *inspect.signature(getattr(theirs, name)).parameters
        ]
    assert [*inspect.signature(ours.convert_conv1d_to_linear).parameters] == [
        *inspect.signature(helper.convert_conv1d_to_linear).parameters
    ]
