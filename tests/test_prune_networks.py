"""Networks of unusual make, cut through `compress`: recurrent, spectral, with noise, with filters of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pruning import X, called, pruned, widths
from torch import Tensor, nn

import dwindle


class OfEachImage(nn.Module):
    """A convolution whose filters each image makes for itself: as many groups as there are images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(12, 4, 1)
        self.filters, self.chosen = nn.Parameter(torch.randn(5, 12, 16, 3, 3)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, _, height, width = x.shape
        filters = torch.mm(self.chosen(x.mean((2, 3))).softmax(-1), self.filters.view(5, -1)).view(-1, 16, 3, 3)
        x = nn.functional.conv2d(x.reshape(1, -1, height, width), filters, padding=1, groups=n)
        return self.last(x.view(n, -1, height, width))


def test_a_convolution_with_a_group_for_each_image() -> None:
    torch.manual_seed(0)
    small = pruned(OfEachImage().eval(), torch.randn(3, 3, 8, 8), ratio=0.5)
    assert set(widths(small).values()) >= {8, 6}
    assert called(small, torch.randn(5, 3, 8, 8)).shape == (5, 4, 6, 6)


class Decoder(nn.Module):
    """nn.TransformerDecoder with a causal mask that it is not told to be one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0)
        self.first, self.layers, self.last = nn.Linear(6, 16), nn.TransformerDecoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        out: Tensor = self.last(self.layers(self.first(x), memory, tgt_mask=mask))
        return out


def test_a_decoder_that_looks_whether_its_mask_is_causal() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    inputs = {"x": torch.randn(7, 3, 6), "memory": torch.randn(5, 3, 16)}
    assert widths(pruned(model, inputs, ratio=0.5))["layers.layers.0.linear1.weight", 0] == 16
    whole = pruned(model, inputs, ratio=0.0)
    inputs["x"] = torch.randn(7, 3, 6)
    torch.testing.assert_close(called(whole, inputs), called(model, inputs))


def test_a_model_that_draws_noise_is_cut_where_no_noise_is_drawn() -> None:
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mean, self.scale = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            self.then, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            x = self.mean(x) + torch.randn_like(self.mean(x)) * self.scale(x).exp()
            out: Tensor = self.last(self.then(x).relu())
            return out

    small = pruned(Sampler().eval(), X, ratio=0.5)
    assert widths(small)["first.weight", 0] == widths(small)["then.weight", 0] == 8
    assert ("mean.weight", 0) not in widths(small)
    assert any("masked and sliced differ" in entry.reason for entry in small.log if not entry.applied)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_an_lstm_is_cut_trains_on_and_exports(tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 12), nn.Linear(32, 3)
            self.lstm = nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.lstm(self.first(x))[0])
            return out

    x = torch.randn(3, 5, 6)
    model = Reader().eval()
    small = pruned(model, x, ratio=0.5)
    assert widths(small)["lstm.weight_hh_l1_reverse", 1] == 8
    eager = dwindle.transplant(small, model, inputs=x)
    assert torch.equal(called(eager, x), called(small, x))
    small.export_onnx(tmp_path / "m.onnx")
    small.train()
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


class Spectral(nn.Module):
    """A Fourier layer, whose weights are complex (Li et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 12), nn.Linear(12, 1)
        self.weight = nn.Parameter(torch.randn(12, 16, 5, dtype=torch.cfloat) * 0.1)
        self.then = nn.Conv1d(16, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.rfft(self.first(x).permute(0, 2, 1))[:, :, :5]
        x = torch.fft.irfft(torch.einsum("bix,iox->box", x, self.weight), n=8)
        out: Tensor = self.last(self.then(x).relu().permute(0, 2, 1))
        return out


@pytest.mark.parametrize("score", ["l1", "l2"])
def test_complex_weights_are_cut(score: str) -> None:
    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.randn(3, 8, 2)
    with torch.no_grad():
        model.weight[:, 3] = 0.01  # large in its imaginary part alone
        model.weight[:, 3].imag.fill_(9.0)
        model.weight[:, 5] *= 0.01
        model.then.weight[:, (3, 5)] = 0.1
    small = pruned(model, x, ratio=0.5, score=score)
    assert (widths(small)["weight", 0], widths(small)["weight", 1]) == (6, 8)
    cut = next(edit.removed for edit in small.plan.slices if (edit.fqn, edit.dim) == ("weight", 1))
    assert 5 in cut
    assert 3 not in cut
    small.train()
    small(x).sum().backward()
    assert small.get_parameter("weight").grad is not None
