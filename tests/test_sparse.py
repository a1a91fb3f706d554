"""Sparse pruning: where zeros may be, how many there are, and that they stay zeros when all is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning import Transformer
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.passes.prune.sparse import MOST, Pattern, as_matrix, as_weight, each, together
from dwindle.runtime.errors import DwindleError, RecipeError, ScheduleError
from dwindle.runtime.qtensor import QTensor

W8A8 = [{"weight": {"bits": 8}, "activation": {"bits": 8}}]
RAMP = {"offset": 1, "length": 4, "every": 2}


def example() -> Tensor:
    return torch.randn(6, 5, 10, generator=torch.Generator().manual_seed(0))


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@given(ratio=st.floats(0, 0.99), rows=st.integers(1, 6), columns=st.integers(1, 9), seed=st.integers(0, 9))
def test_each_matrix_gives_its_share_and_the_largest_stay(ratio: float, rows: int, columns: int, seed: int) -> None:
    units = scores(rows, columns, seed=seed)
    (mask,) = each([units], [Pattern()], ratio)
    stay = int(mask.sum())
    assert stay - 1 < units.numel() * (1 - ratio) + 1e-6
    assert stay >= units.numel() * (1 - ratio) - 1e-6
    if stay < units.numel():
        assert units[mask].min() >= units[~mask].max()


@given(n=st.integers(1, 3), more=st.integers(1, 3), rows=st.integers(1, 4), groups=st.integers(1, 4))
def test_of_every_m_inputs_the_n_largest_stay(n: int, more: int, rows: int, groups: int) -> None:
    m = n + more
    pattern = Pattern.parse(f"{n}:{m}")
    units = scores(rows, groups * m)
    (mask,) = each([units], [pattern], 1 - n / m)
    assert mask.reshape(-1, m).sum(1).tolist() == [n] * (rows * groups)
    kept = units.masked_fill(~mask, -1).reshape(-1, m).topk(n, 1).values
    assert torch.equal(kept, units.reshape(-1, m).topk(n, 1).values)


def test_blocks_go_whole() -> None:
    pattern = Pattern.parse("4x2")
    weight = scores(8, 6)
    (mask,) = each([pattern.units(weight)], [pattern], 0.5)
    spread = pattern.spread(mask).reshape(2, 4, 3, 2).float()
    assert set(spread.mean((1, 3)).flatten().tolist()) == {0.0, 1.0}
    assert spread.mean() == 0.5
    means = weight.reshape(2, 4, 3, 2).mean((1, 3))
    assert torch.equal(mask, means >= means.flatten().sort().values[3])


def test_together_the_least_of_all_go_but_never_nearly_all_of_one() -> None:
    small, large = scores(10, 10) * 0.01, 1 + scores(10, 20, seed=1)
    masks = together([small, large], [Pattern()] * 2, 0.5)
    assert [int((~mask).sum()) for mask in masks] == [round(100 * MOST), 150 - round(100 * MOST)]
    even = together([scores(10, 10), scores(10, 10, seed=1)], [Pattern()] * 2, 0.5)
    assert sum(int(mask.sum()) for mask in even) == 100


@given(st.sampled_from([(6, 4), (6, 4, 3), (6, 4, 3, 2)]), st.booleans())
def test_a_matrix_goes_back_to_its_weight(shape: tuple[int, ...], transposed: bool) -> None:
    weight = scores(*shape)
    matrix = as_matrix(weight, transposed=transposed)
    assert matrix.shape[0] == (shape[1] if transposed and len(shape) == 2 else shape[0])
    assert torch.equal(as_weight(matrix, weight.shape, transposed=transposed), weight)


@pytest.mark.parametrize("text", ["", "2:2", "4:2", "0:4", "4x", "x4", "0x4", "dense"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="a pattern of zeros"):
        Pattern.parse(text)


@pytest.mark.parametrize("rule", [{"ratio": 0.5}, {"pattern": "2:4"}, {"ratio": 0.75, "pattern": "4x1"}], ids=str)
@pytest.mark.parametrize("quantize", [[], W8A8], ids=["float", "w8a8"])
def test_zeros_at_once(rule: dict[str, Any], quantize: list[Any]) -> None:
    model = Transformer().eval()
    small = dwindle.compress(
        model, {"sparsify": {"modules": "blocks.*", **rule}, "quantize": quantize}, inputs=example()
    )
    wanted = rule.get("ratio", 0.5)
    assert {edit.zeros / edit.total for edit in small.plan.sparsities} == {wanted}
    assert len(small.plan.sparsities) == 12
    for edit in small.plan.sparsities:
        stored = small.store.get(edit.fqn)
        value = stored.dequantize() if isinstance(stored, QTensor) else stored
        assert isinstance(value, Tensor)
        assert int((value == 0).sum()) >= edit.zeros
        if rule.get("pattern") == "2:4":
            assert int((value.reshape(-1, 4) != 0).sum(1).max()) <= 2
    zeroed = Transformer().eval()
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            edit = next((e for e in small.plan.sparsities if e.fqn == name), None)
            if edit is not None:
                pattern = Pattern.parse(edit.pattern)
                (mask,) = each([pattern.units(parameter.abs())], [pattern], wanted)
                parameter *= pattern.spread(mask)
    expected = (
        zeroed(example())
        if not quantize
        else dwindle.compress(zeroed, {"quantize": quantize}, inputs=example())(example())
    )
    torch.testing.assert_close(small(example()), expected, rtol=1e-5, atol=1e-6)
    assert model.blocks[0].q.weight.count_nonzero() == 1024  # the caller's is as it was


@pytest.mark.parametrize("score", ["l1", "movement", "snip_momentum"])
@pytest.mark.parametrize("quantize", [[], W8A8], ids=["float", "w8a8"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_zeros_in_training(score: str, quantize: list[Any], pattern: str) -> None:
    rule = {"ratio": 0.5, "pattern": pattern, "score": score, "modules": ["*.up", "*.down"], "schedule": RAMP}
    prune = {"ratio": 0.5, "scopes": "heads", "schedule": RAMP}
    student = dwindle.prepare(Transformer(), {"sparsify": rule, "prune": prune, "quantize": quantize}, inputs=example())
    train(student, 5)
    small = student.eval().finish()
    torch.testing.assert_close(small(example()), student(example()), rtol=1e-4, atol=1e-5)
    up = next(edit for edit in small.plan.sparsities if edit.fqn == "blocks.0.up.weight")
    assert up.zeros * 2 == up.total == 4096
    stored = small.store.get("blocks.0.up.weight")
    value = stored.dequantize() if isinstance(stored, QTensor) else stored
    assert isinstance(value, Tensor)
    assert int((value == 0).sum()) >= up.zeros


def train(student: dwindle.Student, steps: int) -> list[Any]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    student.train()
    found = []
    for _ in range(steps):
        loss = student(example()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += student.step(loss)
    return found


class Convolution(nn.Module):
    """(N, 8, 6, 6) to (N, 4), one convolution with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("score", ["l1", "movement"])
def test_a_convolution_is_sparse_along_its_channels(score: str) -> None:
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    rule = {"pattern": "2:4", "score": score, "operators": "conv2d"}
    student = dwindle.prepare(Convolution(), {"sparsify": rule}, inputs=x)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        student(x).square().mean().backward()
        optimizer.step()
        student.step()
    small = student.eval().finish()
    torch.testing.assert_close(small(x), student(x), rtol=1e-4, atol=1e-5)
    weight = small.store.get("conv.weight")
    assert isinstance(weight, Tensor)
    assert (weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1).tolist() == [2] * (weight.numel() // 4)


def test_a_score_of_gradients_wants_some() -> None:
    rule = {"ratio": 0.5, "score": "snip_momentum", "schedule": {"offset": 1}}
    student = dwindle.prepare(Transformer(), {"sparsify": rule}, inputs=example())
    with pytest.raises(ScheduleError, match="goes by gradients"):
        student.step()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"ratio": 0.5, "score": "movement"}, "come about in training"),
        ({"ratio": 0.5, "modules": "nothing.*"}, "finds no weights"),
        ({"pattern": "2:4", "modules": "first"}, "a row of 10 is not made of 4s"),
        ({"ratio": 0.25, "pattern": "2:4"}, "has a ratio of 0.5 and no other"),
        ({}, "zeros need a ratio"),
        ({"ratio": 0.5, "pattern": "dense"}, "a pattern of zeros"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(DwindleError, match=message):
        dwindle.compress(Transformer(), {"sparsify": rule}, inputs=example())


def test_later_rules_override_and_excluded_modules_stay() -> None:
    rules = [{"ratio": 0.5, "exclude": r"\.down$"}, {"ratio": 0.25, "modules": "blocks.1.*"}]
    small = dwindle.compress(Transformer(), {"sparsify": rules}, inputs=example())
    found = {edit.fqn: edit.zeros / edit.total for edit in small.plan.sparsities}
    assert found["blocks.0.up.weight"] == 0.5
    assert "blocks.0.down.weight" not in found
    assert found["blocks.1.down.weight"] == 0.25


@pytest.mark.parametrize("quantize", [[], W8A8], ids=["float", "w8a8"])
def test_zeros_go_back_to_the_eager_module(quantize: list[Any]) -> None:
    model = Transformer().eval()
    small = dwindle.compress(
        model, {"sparsify": {"pattern": "2:4", "modules": "blocks.*"}, "quantize": quantize}, inputs=example()
    )
    eager = dwindle.transplant(small, model, inputs=example())
    torch.testing.assert_close(eager(example()), small(example()), rtol=1e-5, atol=1e-6)
    if not quantize:
        assert int((eager.blocks[0].up.weight == 0).sum()) == 2048


def test_a_mask_is_part_of_the_state() -> None:
    rule = {"ratio": 0.5, "score": "snip_momentum", "schedule": {"offset": 1, "length": 4, "every": 2}}
    first, whole = (dwindle.prepare(Transformer(), {"sparsify": rule}, inputs=example()) for _ in range(2))
    train(whole, 5)
    train(first, 3)
    second = dwindle.prepare(Transformer(), {"sparsify": rule}, inputs=example())
    second.load_state_dict(first.state_dict())
    train(second, 2)
    torch.testing.assert_close(second.eval()(example()), whole.eval()(example()), rtol=0, atol=0)


def test_a_weight_is_cut_or_gets_zeros() -> None:
    recipe = {"sparsify": {"ratio": 0.5}, "prune": {"ratio": 0.5, "scopes": "heads"}}
    with pytest.raises(RecipeError, match="8 weights are to be pruned and to get zeros"):
        dwindle.prepare(Transformer(), recipe, inputs=example())
    small = dwindle.compress(Transformer(), recipe, inputs=example())
    assert {edit.zeros * 2 == edit.total for edit in small.plan.sparsities} == {True}


def test_zeros_stay_since_what_has_them_does_not_train_on() -> None:
    small = dwindle.compress(Transformer(), {"sparsify": {"ratio": 0.5}}, inputs=example())
    with pytest.raises(DwindleError, match="cannot be trained"):
        small.train()


def test_a_pattern_is_learned_in_sixteen_bits() -> None:
    model, x = Transformer().bfloat16(), example().bfloat16()
    rule = {"pattern": "2:4", "score": "movement", "modules": "blocks.*"}
    student = dwindle.prepare(model, {"sparsify": rule}, inputs=x)
    student(x).square().mean().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert torch.equal(student.eval().finish()(x), student(x))
