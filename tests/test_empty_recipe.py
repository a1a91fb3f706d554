"""An empty recipe is the model: outputs, losses and gradients equal eager exactly, in train and eval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ZOO
from torch import Tensor, nn

import dwindle


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [t for v in values for t in _flat(v)]


def _loss(outputs: list[Tensor]) -> Tensor:
    return sum((t.float().sin().sum() for t in outputs if t.is_floating_point() and t.requires_grad), torch.zeros(()))


def _step(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs and gradients by name, under one seed (dropout)."""
    model.zero_grad()
    torch.manual_seed(0)
    outputs = _flat(model(**inputs))
    _loss(outputs).backward()
    return [t.detach() for t in outputs], {n: p.grad for n, p in model.named_parameters()}


def _assert_equal(a: nn.Module, b: nn.Module, inputs: dict[str, Any]) -> None:
    out_a, grad_a = _step(a, inputs)
    out_b, grad_b = _step(b, inputs)
    assert len(out_a) == len(out_b) > 0
    for x, y in zip(out_a, out_b, strict=True):
        assert torch.equal(x, y)
    assert any(g is not None and g.abs().sum() > 0 for g in grad_a.values())
    for name, g in grad_b.items():
        expected = grad_a[name]
        assert (g is None) == (expected is None), name
        assert g is None or torch.equal(g, expected), name


def _larger(inputs: dict[str, Any]) -> dict[str, Any]:
    """Another batch size and, for token inputs, another length."""
    larger = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = torch.cat([value, value[:1]])
            if value.dim() == 2 and not value.is_floating_point():
                value = torch.cat([value, value[:, :3]], 1)
        larger[name] = value
    return larger


@pytest.mark.parametrize("name", list(ZOO))
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_empty_recipe_equals_eager(name: str, training: bool) -> None:
    model, inputs = ZOO[name]()
    model.train(training)
    student = dwindle.prepare(model, {}, inputs=inputs)
    assert student.training == training
    _assert_equal(model, student, inputs)
    _assert_equal(model, student, _larger(inputs))
    for key, value in model.state_dict().items():
        assert torch.equal(student.state_dict()[student.store.canonical(key)], value), key


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_what_a_forward_writes_without_gradients(norm: Any) -> None:
    """Spectral norms iterate under no_grad, into their buffers."""
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(8, 16)), nn.ReLU(), norm(nn.Linear(16, 4))).train()
    inputs = {"input": torch.randn(5, 8)}
    student = dwindle.prepare(model, {}, inputs=inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):
        _assert_equal(model, student, inputs)
    for key, value in model.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


class _Writing(nn.Module):
    """x times what is written without gradients: to 6 of so many columns, or to a tensor that is resized."""

    def __init__(self, columns: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.columns, self.dtype = nn.Linear(8, 6), columns, dtype

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        with torch.no_grad():
            whole = torch.zeros(0 if self.columns is None else (x.shape[0], self.columns), dtype=self.dtype)
            torch.sigmoid(x, out=whole if self.columns is None else whole[:, :6])
        return x * whole[:, :6] + whole.sum(1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [None, 6, 9])
def test_what_is_written_to_an_out(columns: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = _Writing(columns, dtype).train(), {"x": torch.randn(5, 8)}
    _assert_equal(model, dwindle.prepare(model, {}, inputs=inputs), inputs)


@pytest.mark.parametrize("name", list(ZOO))
def test_static_shapes_and_compress(name: str) -> None:
    model, inputs = ZOO[name]()
    compressed = dwindle.compress(model, {}, inputs=inputs, dynamic_shapes={})
    _assert_equal(model, compressed, inputs)
    with pytest.raises(dwindle.DwindleError, match="required"):
        compressed(**_larger(inputs))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(("batch", "length"), [(1, 8), (1, 1), (2, 1)])
def test_sizes_of_one_are_served(name: str, batch: int, length: int) -> None:
    model, inputs = ZOO[name]()
    compressed = dwindle.compress(model, {}, inputs=inputs)
    small = {k: v[:batch, :length] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        for x, y in zip(_flat(model(**small)), _flat(compressed(**small)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_callers_model_is_untouched() -> None:
    model, inputs = ZOO["cnn"]()
    model.train()
    model[0].requires_grad_(False) if isinstance(model, nn.Sequential) else next(model.parameters()).requires_grad_(
        False
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    dwindle.compress(model, "static-w8a8", inputs=inputs, data=[inputs])
    student = dwindle.prepare(model, "static-w8a8", inputs=inputs, data=[inputs])
    _step(student, inputs)
    torch.optim.SGD(student.parameters(), 0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert flags == [(m.training, len(m._forward_hooks)) for m in model.modules()]
    assert wants == [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in student.parameters()]
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert not set(pointers) & {p.data_ptr() for p in student.parameters()}


def test_a_trained_student_serves_a_batch_of_one_in_a_new_variant() -> None:
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model, {}, inputs=inputs)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        one = {name: value[:1] for name, value in inputs.items()}
        assert len(student(**one, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("name", ["mlp", "bert", "tied_lm", "gpt2", "cnn"])
def test_a_student_trains_and_finishes(name: str) -> None:
    model, inputs = ZOO[name]()
    recipe = "static-w8a8" if name == "cnn" else "zeroquant-w8a8"
    student = dwindle.prepare(model.train(), recipe, inputs=inputs, data=[inputs])
    optimizer = torch.optim.SGD(student.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        _loss(_flat(student(**inputs))).backward()
        optimizer.step()
    student.eval()
    finished = student.finish()
    with torch.no_grad():
        trained, real = _flat(student(**inputs)), _flat(finished(**inputs))
    assert finished.certificate.simulated == 0
    assert finished.certificate.bytes_after < finished.certificate.bytes_before
    for x, y in zip(trained, real, strict=True):
        assert (x - y).norm() <= 0.02 * x.norm()  # codes on an edge may flip from layer to layer
    pointers = {t.data_ptr() for t in student.state_dict().values() if t.numel()}
    assert not pointers & {t.data_ptr() for t in finished.state_dict().values() if t.numel()}
