"""Models, inputs and calls at the edge of what is usual: served as eager serves them, or refused by name."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO
from numerics import error
from torch import Tensor, nn

import dwindle
from dwindle.runtime.errors import CalibrationError, CaptureError, DwindleError, RecipeError
from dwindle.runtime.plan import input_scale_name
from dwindle.runtime.qtensor import QTensor

STATIC = {
    "quantize": [{"weight": {"bits": 8}, "activation": {"range": "static"}}],
    "calibration": {"method": "minmax"},
}


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _packed(small: dwindle.Compressed) -> list[str]:
    return sorted(name for name, value in small.store.entries() if isinstance(value, QTensor))


class _Linear(nn.Module):
    """One linear layer and what a subclass does around it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", "w8a16", "static-w8a8"])
def test_models_of_other_dtypes(dtype: torch.dtype, recipe: str) -> None:
    model, x = _mlp().to(dtype), _x(4, 16).to(dtype)
    small = dwindle.compress(model, recipe, inputs=x, data=[x])
    with torch.no_grad():
        assert small(x).dtype is dtype
        assert error(small(x), model(x)) < 0.05  # measured .01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", "w8a16", "static-w8a8"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_is_packed_whole_keeps_its_dtype(
    dtype: torch.dtype, recipe: str, trained: bool, tmp_path: Path
) -> None:
    layers = [nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False)]
    model, x = nn.Sequential(*layers).to(dtype).eval(), _x(3, 64).to(dtype)
    make = dwindle.prepare if trained else dwindle.compress
    small: Any = make(model, recipe, inputs=x, data=[x])
    small = small.finish() if trained else small
    assert not list(small.parameters())
    eager = dwindle.transplant(small, model, inputs=x)
    with torch.no_grad():
        assert torch.equal(eager(x), small(x))
        for form in (small, dwindle.load(small.save(tmp_path / "small"))):
            assert form.dtype is form(x).dtype is dtype
            assert form.to(dtype)(x).dtype is dtype
            with pytest.raises(DwindleError, match="keeps its dtype"):
                form.to(torch.float32)


# What forward does


class _Broadcast(_Linear):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.layer(x + shift)


def test_a_leading_one_broadcasts_beside_a_larger_batch() -> None:
    model = _Broadcast().eval()
    small = dwindle.compress(model, {}, inputs=(_x(4, 16), _x(1, 16)))
    with torch.no_grad():
        assert torch.equal(small(_x(7, 16), _x(1, 16)), model(_x(7, 16), _x(1, 16)))


def test_positions_of_one_row_serve_every_batch() -> None:
    model, inputs = ZOO["bert"]()
    call = {"input_ids": inputs["input_ids"], "position_ids": torch.arange(8)[None]}
    small = dwindle.compress(model, {}, inputs=call)
    longer = {"input_ids": call["input_ids"].repeat(2, 2), "position_ids": torch.arange(16)[None]}
    with torch.no_grad():
        assert torch.equal(small(**longer)[0], model(**longer)[0])


class _OneRow(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(1, 16))


def test_a_model_for_batches_of_one_alone() -> None:
    model = _OneRow().eval()
    small = dwindle.compress(model, {}, inputs=_x(1, 16))
    with torch.no_grad():
        assert torch.equal(small(_x(1, 16)), model(_x(1, 16)))
    with pytest.raises(CaptureError, match="does not fit"):
        small(_x(2, 16))


class _WritesInput(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.layer(x)


class _Counts(_Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (self.calls * 2)


def test_an_input_written_in_place() -> None:
    model, x = _WritesInput().eval(), _x(4, 16)
    small = dwindle.compress(model, {}, inputs=x)
    with torch.no_grad():
        assert torch.equal(small(_x(4, 16)), model(_x(4, 16)))


def test_a_buffer_written_in_place_is_the_copys_own() -> None:
    model = _Counts().eval()
    small = dwindle.compress(model, {}, inputs=_x(4, 16))
    assert model.calls.item() == 0
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(small(_x(4, 16)), model(_x(4, 16)))


def test_running_statistics_are_those_of_the_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    small = dwindle.compress(model, {}, inputs=_x(2, 3, 8, 8)).train()
    small(_x(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model.train()(_x(2, 3, 8, 8))
    found = dict(small.named_buffers())
    assert all(torch.equal(found[name], value) for name, value in model.named_buffers())


class _Structured(_Linear):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        return {"y": self.layer(x) * scale, "none": None, "nested": (x.sum(), [x, 3])}


def test_outputs_keep_their_structure() -> None:
    small = dwindle.compress(_Structured().eval(), inputs={"x": _x(4, 16), "scale": 2.0})
    output = small(_x(4, 16))
    assert list(output) == ["y", "none", "nested"]
    assert output["none"] is None
    assert isinstance(output["nested"], tuple)
    assert output["nested"][1][1] == 3


class _NoParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def test_a_model_without_parameters_has_a_report() -> None:
    small = dwindle.compress(_NoParameters().eval(), {}, inputs=_x(4, 16))
    assert torch.equal(small(_x(3, 16)), _x(3, 16).relu())
    assert "0 B" in str(small.report())


# Shared weights


class _Twice(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x * 8)))


@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", STATIC])
def test_a_module_called_twice_is_packed_once(recipe: Any) -> None:
    model, x = _Twice().eval(), _x(64, 16)
    small = dwindle.compress(model, recipe, inputs=x, data=[x])
    assert _packed(small) == ["layer.weight"]


def test_the_range_of_a_shared_weight_covers_all_that_it_meets() -> None:
    model, x = _Twice().eval(), _x(64, 16)
    small = dwindle.compress(model, STATIC, inputs=x, data=[x])
    scale = small.store.get(input_scale_name("layer.weight"))
    assert isinstance(scale, Tensor)
    torch.testing.assert_close(scale * 127, (x * 8).abs().max())


# Names


@pytest.mark.parametrize(
    "name", ["plan", "store", "signature", "variants", "log", "recipe", "measured", "aliases", "get", "config"]
)
def test_a_child_may_be_called_like_an_attribute_of_ours(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(16, 16))
    model.add_module("last", nn.Linear(16, 4))
    small = dwindle.compress(model.eval(), inputs=_x(4, 16))
    assert _packed(small) == ["last.weight", f"{name}.weight"] or _packed(small) == [f"{name}.weight", "last.weight"]
    with torch.no_grad():
        assert error(small(_x(4, 16)), model(_x(4, 16))) < 0.05


def test_a_name_that_export_cannot_take_is_a_named_error() -> None:
    model = nn.Sequential()
    model.add_module("graph", nn.Linear(16, 16))
    with pytest.raises(CaptureError, match="graph"):
        dwindle.compress(model.eval(), inputs=_x(4, 16))


# The caller's model


def _facts(model: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {name: module.training for name, module in model.named_modules()}
    facts |= {f"{n}.__dict__": sorted(m.__dict__) for n, m in model.named_modules()}
    facts |= {f"{n}.hooks": len(m._forward_hooks) for n, m in model.named_modules()}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        facts[name] = (id(tensor), tensor._version, tensor.requires_grad)
    return facts


def test_the_callers_model_is_not_changed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(288, 4)).train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(lambda *_: None)
    own = model.__dict__["forward"] = model.forward
    before = _facts(model)
    small = dwindle.compress(model, "w8a16", inputs=_x(2, 3, 8, 8))
    small(_x(4, 3, 8, 8))
    assert _facts(model) == before
    assert model.__dict__["forward"] is own


def test_a_second_compress_gives_the_same() -> None:
    model = _mlp()
    first, second = (dwindle.compress(model, inputs=_x(4, 16)) for _ in range(2))
    assert torch.equal(first(_x(5, 16)), second(_x(5, 16)))


def test_variants_captured_by_several_threads() -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, {}, inputs={"input_ids": inputs["input_ids"]})
    calls: list[Mapping[str, Any]] = [
        {"input_ids": inputs["input_ids"], "output_hidden_states": True},
        {"input_ids": inputs["input_ids"], "token_type_ids": inputs["token_type_ids"]},
        {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]},
    ]
    found: dict[int, Tensor] = {}

    def call(i: int) -> None:
        with torch.no_grad():
            found[i] = small(**calls[i])[0]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(small.variants) == 4
    assert "forward" not in model.__dict__
    for i, kwargs in enumerate(calls):
        with torch.no_grad():
            assert error(found[i], model(**kwargs)[0]) < 1e-5  # a new thread may round otherwise


# States


def test_a_students_state_is_the_models() -> None:
    model = _mlp()
    student = dwindle.prepare(model, inputs=_x(4, 16))
    assert list(student.state_dict()) == list(model.state_dict())
    changed = {name: value * 2 for name, value in model.state_dict().items()}
    student.load_state_dict(changed)
    model.load_state_dict(changed)
    assert torch.equal(student(_x(4, 16)), dwindle.prepare(model, inputs=_x(4, 16))(_x(4, 16)))


def test_the_state_of_a_compressed_model_is_what_is_stored() -> None:
    small = dwindle.compress(_mlp(), inputs=_x(4, 16))
    expected = small(_x(4, 16))
    state = {name: value.clone() for name, value in small.state_dict().items()}
    assert sorted(state) == ["0.bias", "0.weight.codes", "0.weight.scale", "2.bias", "2.weight.codes", "2.weight.scale"]
    small.load_state_dict({name: value * 0 for name, value in state.items()})
    assert not small(_x(4, 16)).any()
    small.load_state_dict(state)
    assert torch.equal(small(_x(4, 16)), expected)


def test_training_a_compressed_model_is_refused() -> None:
    with pytest.raises(DwindleError, match="prepare"):
        dwindle.compress(_mlp(), inputs=_x(4, 16)).train()


# What is refused


@pytest.mark.parametrize("inputs", ["text", 3.0, {1: 2}.items()])
def test_example_inputs_of_an_unknown_type(inputs: Any) -> None:
    with pytest.raises(CaptureError, match="unknown type"):
        dwindle.compress(_mlp(), inputs=inputs)


def test_what_is_no_model() -> None:
    with pytest.raises(CaptureError, match="no model"):
        dwindle.compress(lambda x: x, inputs=_x(4, 16))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [5, None, [], {"quantize": [{"operators": ["lineer"]}]}])
def test_recipes_that_are_none(recipe: Any) -> None:
    with pytest.raises(RecipeError):
        dwindle.compress(_mlp(), recipe, inputs=_x(4, 16))


@pytest.mark.parametrize("data", [[], [_x(0, 16)], [None], ["text"], {"input": _x(4, 16)}, [_x(4, 16) * float("nan")]])
def test_calibration_data_that_is_none(data: Any) -> None:
    with pytest.raises(CalibrationError):
        dwindle.compress(_mlp(), "static-w8a8", inputs=_x(4, 16), data=data)


def test_calibration_data_may_hold_more_than_the_model_takes() -> None:
    batch = {"input": _x(4, 16), "labels": torch.zeros(4)}
    small = dwindle.compress(_mlp(), "static-w8a8", inputs=_x(4, 16), data=[batch])
    assert len(small.plan) == 2


class _Branches(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if torch.equal(y, y.abs()) else -y


def test_a_branch_that_cannot_be_followed_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"y if torch\.equal\(y, y\.abs\(\)\) else -y"):
        dwindle.compress(_Branches().eval(), inputs=_x(4, 16))
