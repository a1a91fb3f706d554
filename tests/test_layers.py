"""Layers of many kinds: quantised where they have an integer form, said and left exact where they have none."""

from __future__ import annotations

import pytest
import torch
from numerics import error
from torch import Tensor, nn

import dwindle
from dwindle.runtime.errors import RecipeError


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(16, 8, 3, padding="same"), (2, 16, 8, 8)),
        (nn.Conv2d(16, 8, 3, padding=1, padding_mode="circular"), (2, 16, 8, 8)),
        (nn.Conv2d(32, 8, 3, padding=2, dilation=2, stride=2, groups=2), (2, 32, 9, 9)),
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (2, 5, 16)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_stay_close(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = _x(*shape)
    small = dwindle.compress(nn.Sequential(layer).eval(), "static-w8a8", inputs=x, data=[x])
    with torch.no_grad():
        assert error(small(x), layer(x)) < 0.05


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(16, 8, 4, padding="same"), (2, 16, 8, 8)),
        (nn.Conv1d(16, 8, 3), (2, 16, 9)),
        (nn.ConvTranspose2d(16, 8, 3), (2, 16, 9, 9)),
        (nn.GRU(16, 8, batch_first=True), (2, 5, 16)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)), (4, 16)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning", "ignore:Using padding=.same.:UserWarning")
def test_layers_without_an_integer_form_are_said_and_served(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x, model = _x(*shape), nn.Sequential(layer).eval()
    with pytest.raises(RecipeError, match="quantises nothing"):
        dwindle.compress(model, "static-w8a8", inputs=x, data=[x])
    small = dwindle.compress(model, {}, inputs=x)
    with torch.no_grad():
        expected, found = layer(x), small(x)
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    assert torch.equal(found, expected)


class _SharedConvolution(nn.Module):
    """One convolution before two batch norms, which therefore cannot be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.second.running_mean = _x(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(nn.functional.relu(self.first(self.conv(x)))))


def test_batch_norms_after_a_shared_convolution() -> None:
    model, x = _SharedConvolution().eval(), _x(2, 16, 8, 8)
    small = dwindle.compress(model, "static-w8a8", inputs=x, data=[x])
    assert [edit.fqn for edit in small.plan] == ["conv.weight"]
    with torch.no_grad():
        assert error(small(x), model(x)) < 0.1
