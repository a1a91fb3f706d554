"""Names that collide, sizes that a model treats apart, and things that are not models: served right or refused."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import pytest
import torch
from models import ZOO
from torch import Tensor, nn

import dwindle
from dwindle.runtime.errors import CalibrationError

STATIC = {"quantize": [{"activation": {"range": "static", "kind": "asymmetric"}}]}


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class _BranchesOnOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 100 if x.shape[0] == 1 else self.layer(x)


def test_a_branch_on_a_batch_of_one_is_not_served_by_the_other() -> None:
    model = _BranchesOnOne().eval()
    small = dwindle.compress(model, {}, inputs=_x(4, 16))
    with pytest.raises(dwindle.DwindleError, match="2 <= batch"):
        small(_x(1, 16))
    alone = dwindle.compress(model, {}, inputs=_x(1, 16))
    with torch.no_grad():
        assert torch.equal(alone(_x(1, 16)), model(_x(1, 16)))


class _TwoBiases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x.flip(0))


def test_one_weight_with_two_biases() -> None:
    model, x = _TwoBiases().eval(), _x(4, 16)
    small = dwindle.compress(model, STATIC, inputs=x, data=[x])
    eager = dwindle.transplant(small, model, inputs=x)
    with torch.no_grad():
        assert (small(x) - model(x)).norm() < 0.02 * model(x).norm()
        assert torch.equal(eager(x), small(x))


class _OwnsABias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16, 3, 3)), nn.Parameter(torch.randn(16))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, self.weight)) + self.bias[:, None, None]


def test_a_folded_norm_takes_no_name_that_is_taken() -> None:
    model, x = _OwnsABias().eval(), _x(2, 16, 8, 8)
    small = dwindle.compress(model, "static-w8a8", inputs=x, data=[x])
    with torch.no_grad():
        assert (small(x) - model(x)).norm() < 0.02 * model(x).norm()


def test_an_image_without_a_batch() -> None:
    model, x = nn.Conv2d(16, 16, 3).eval(), _x(16, 9, 9)
    small = dwindle.compress(model, "static-w8a8", inputs=x, data=[x])
    with torch.no_grad():
        assert (small(x) - model(x)).norm() < 0.02 * model(x).norm()


def test_what_is_made_already_is_refused() -> None:
    model, x = nn.Linear(16, 8).eval(), _x(4, 16)
    small = dwindle.compress(model, inputs=x)
    for made in (small, dwindle.prepare(model, inputs=x)):
        with pytest.raises(dwindle.DwindleError, match=r"(?s)already.*finish"):
            dwindle.compress(made, inputs=x)
    with pytest.raises(dwindle.DwindleError, match="keeps its dtype"):
        small.to(torch.bfloat16)
    with pytest.raises(dwindle.DwindleError, match="pickled"):
        pickle.dumps(small)


def test_data_that_fails_is_said_to_be_the_datas() -> None:
    def broken():
        yield _x(4, 16)
        raise OSError("the disk is gone")

    for data in (broken(), 5):
        with pytest.raises(CalibrationError, match="calibration data cannot be read"):
            dwindle.compress(nn.Linear(16, 4), STATIC, inputs=_x(4, 16), data=data)


def test_inputs_that_give_nothing_finite() -> None:
    with pytest.raises(dwindle.DwindleError, match="nothing finite"):
        dwindle.compress(nn.Linear(16, 4), inputs=_x(4, 16) * float("nan"))


def test_a_recipe_that_quantises_nothing_says_so() -> None:
    with pytest.raises(dwindle.DwindleError, match="quantises nothing"):
        dwindle.compress(nn.Sequential(nn.ReLU()), inputs=_x(4, 16))


def test_inputs_that_the_model_refuses_are_not_called_uncapturable() -> None:
    with pytest.raises(dwindle.DwindleError, match="itself refuses"):
        dwindle.compress(nn.Linear(4, 4), inputs=_x(4, 16))
    with pytest.raises(dwindle.DwindleError, match="dimensions from 0 to 1"):
        dwindle.compress(nn.Linear(16, 4), inputs=_x(4, 16), dynamic_shapes={"input": {5: "batch"}})


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.head(self.cell(x, h[0]))


@pytest.mark.parametrize("make", [dwindle.compress, dwindle.prepare])
def test_a_batch_that_is_not_the_first_dimension(make, monkeypatch) -> None:
    monkeypatch.setattr("dwindle.frontends.measure.SECONDS_EACH", 0.01)
    model = _Recurrent().eval()
    small = make(model, inputs=(_x(4, 16), _x(1, 4, 16)), dynamic_shapes={"x": {0: "batch"}, "h": {1: "batch"}})
    small = small if isinstance(small, dwindle.Compressed) else small.finish()
    with torch.no_grad():
        assert small(_x(7, 16), _x(1, 7, 16)).shape == (7, 8)
    assert [row["batch"] for row in small.report().measured["latency"]] == [1, 8]


def test_a_tied_weight_is_in_a_state_under_all_its_names() -> None:
    model, inputs = ZOO["tied_lm"]()
    student = dwindle.prepare(model, inputs=inputs)
    assert student.state_dict().keys() == model.state_dict().keys()
    changed = {name: value * 2 for name, value in model.state_dict().items()}
    for left_out in (None, "embedding.weight", "head.weight"):  # safetensors keeps one name of a tied weight
        student = dwindle.prepare(model, inputs=inputs)
        student.load_state_dict({name: value for name, value in changed.items() if name != left_out})
        assert all(torch.equal(value, changed[name]) for name, value in student.state_dict().items())
    with pytest.raises(RuntimeError, match=r'Missing key.*"embedding\.weight"'):
        student.load_state_dict({n: v for n, v in changed.items() if n not in ("embedding.weight", "head.weight")})
    other, _ = ZOO["tied_lm"]()
    other.load_state_dict(student.state_dict())
    assert torch.equal(other.head.weight, changed["head.weight"])
    outer = nn.ModuleDict({"student": student, "other": nn.Linear(2, 2)})
    outer.load_state_dict({name: value * 2 for name, value in outer.state_dict().items()})
    assert torch.equal(dict(student.named_parameters())["embedding.weight"], changed["head.weight"] * 2)


def test_a_tied_packed_weight_is_in_a_state_under_all_its_names(tmp_path: Path) -> None:
    model, inputs = ZOO["tied_lm"]()
    small = dwindle.compress(model, inputs=inputs)
    state = small.state_dict()
    assert state["head.weight.codes"].data_ptr() == state["embedding.weight.codes"].data_ptr()
    loaded = dwindle.load(small.save(tmp_path / "small"))
    assert loaded.state_dict().keys() == state.keys()
    expected = small(**inputs)
    loaded.load_state_dict({name: value * 0 for name, value in state.items() if not name.startswith("embedding")})
    assert not loaded(**inputs).any()
    loaded.load_state_dict(state)
    assert torch.equal(loaded(**inputs), expected)


def test_the_line_is_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "frontends" / "torchlike"
    folder.mkdir(parents=True)
    lines = ["from torch import nn", "class Counts(nn.Linear):", "    def forward(self, input):"]
    lines += ["        for _ in range(input.sum().int().item()):", "            input = -input", "        return input"]
    (folder / "counting_model.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(folder)
    model = importlib.import_module("counting_model").Counts(16, 16)
    with pytest.raises(dwindle.DwindleError, match=r"found: .*counting_model\.py:4: for _ in"):
        dwindle.compress(model, inputs=_x(4, 16))


class _ByPosition(nn.Linear):
    def forward(self, x: Tensor, /) -> Tensor:
        return super().forward(x)


def test_arguments_by_position_alone_are_refused_by_name() -> None:
    with pytest.raises(dwindle.DwindleError, match=r"(?s)by position alone.*_ByPosition\.forward\(x.*drop the /"):
        dwindle.compress(_ByPosition(16, 16).eval(), inputs=_x(4, 16))


class _Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(x.shape[0], 16)


def test_the_callers_random_numbers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwindle.frontends.measure.SECONDS_EACH", 0.01)
    model, x = _Noisy(16, 16).eval(), _x(4, 16)
    before = torch.get_rng_state()
    for recipe in ("zeroquant-w8a8", STATIC):
        small = dwindle.compress(model, recipe, inputs=x, data=[x])
        assert small.contracts[0].limits["batch"][0] <= 1  # noise alone does not make a batch of one differ
        dwindle.prepare(model, recipe, inputs=x, data=[x]).finish().report()
        small.report()
        dwindle.transplant(small, model, inputs=x)
    assert torch.equal(torch.get_rng_state(), before)


class _Drops(nn.Linear):
    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y = nn.functional.dropout(super().forward(x), 0.5, self.training)
        return y * 2 if twice else y


def test_a_variant_that_is_captured_on_first_use_draws_as_the_model() -> None:
    model, x = _Drops(16, 16).train(), _x(4, 16)
    student = dwindle.prepare(model, {}, inputs=x)
    for call in ({}, {"twice": True}):
        torch.manual_seed(0)
        expected = model(x, **call)
        torch.manual_seed(0)
        assert torch.equal(student(x, **call), expected)
