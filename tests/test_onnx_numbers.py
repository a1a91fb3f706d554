"""What ONNX Runtime answers, beside the compressed torch model and the original: end to end, whatever the export's own
check says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO
from onnx_answers import answers, hold, relative
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.runtime.errors import ExportError
from dwindle.runtime.onnx import check, translations
from dwindle.runtime.onnx.example import batches

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FORMS = "dwindle.runtime.onnx.forms"  # by its name: it imports onnx_ir, so it is loaded by the tests that patch it


def holds(model: nn.Module, recipe: Any, inputs: dict[str, Tensor], folder: Path) -> None:
    hold(dwindle.compress(model, recipe, inputs=inputs, data=[inputs]), model, inputs, folder)


# Static activations


def static(kind: str, weight: dict[str, Any] | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"operators": ["linear", "conv2d"], "activation": {"range": "static", "kind": kind}}
    return {"quantize": [entry | ({"weight": weight} if weight else {})]}


def padded(**options: Any) -> nn.Module:
    return nn.Conv2d(16, 16, 3, padding=1, **options)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 16), (6, 16)),
    "linear-gelu-linear": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8, bias=False)), (6, 16)),
    "conv": (padded, (2, 16, 8, 8)),
    "conv-without-bias": (lambda: padded(bias=False, stride=2), (2, 16, 8, 8)),
    "grouped-conv": (lambda: padded(groups=16), (2, 16, 8, 8)),
    "conv-relu-conv": (lambda: nn.Sequential(padded(), nn.ReLU(), padded()), (2, 16, 8, 8)),
}


def layers(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Inputs around 1: the zero point is far from the middle of the codes."""
    make, shape = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(make()).eval(), {"input": torch.randn(shape) + 1}


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", LAYERS)
def test_static_layers(name: str, kind: str, tmp_path: Path) -> None:
    model, inputs = layers(name)
    holds(model, static(kind), inputs, tmp_path)


def test_static_activations_and_grouped_weights(tmp_path: Path) -> None:
    """MatMulNBits rounds activations once more, to 8 bits by blocks; 4-bit weights hide that."""
    model, inputs = layers("linear")
    holds(model, static("asymmetric", {"bits": 4, "group_size": 16}), inputs, tmp_path)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_static_bert(kind: str, tmp_path: Path) -> None:
    model, inputs = ZOO["bert"]()
    holds(model, static(kind), inputs, tmp_path)


def real_zero(t: Any, codes: Any) -> Any:
    return codes.args[2] if codes.target is translations.traced.static else TAKEN_OFF(t, codes)


TAKEN_OFF = translations._zero_of


@pytest.mark.parametrize(
    ("name", "part", "wrong"),
    [("linear", "_zero_of", real_zero), ("conv", "_plain_bias", lambda *arguments: arguments[-1])],
)
def test_a_zero_point_taken_off_twice_is_refused(
    name: str, part: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = layers(name)
    small = dwindle.compress(model, "static-w8a8", inputs=inputs, data=[inputs])
    monkeypatch.setattr(translations, part, wrong)
    with pytest.raises(ExportError, match="output 'output' of the exported model differs"):
        small.export_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(("part", "wrong"), [("scale", lambda s: s * 2), ("zero", lambda z: z - 20)])
def test_codes_of_another_scale_or_zero_point_are_refused(
    part: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ORT's codes are right for the scale and zero point that it was given: not for the Program's."""
    model, inputs = layers("conv")
    small = dwindle.compress(model, "static-w8a8", inputs=inputs, data=[inputs])
    kept = translations.traced.static

    def static(x: Tensor, scale: Tensor, zero: Tensor, site: str, bits: int, symmetric: bool) -> Tensor:
        given = {"scale": scale, "zero": zero}
        given[part] = wrong(given[part])
        return kept(x, given["scale"], given["zero"], site, bits, symmetric)

    monkeypatch.setattr(translations.traced, "static", static)
    with pytest.raises(ExportError, match="a quantisation of the exported model differs"):
        small.export_onnx(tmp_path / "model.onnx")


# Masks


class Attention(nn.Module):
    """Scores that lie hundreds apart, and a mask over keys alone or over queries and keys."""

    def __init__(self, over_queries: bool) -> None:
        super().__init__()
        self.over_queries = over_queries
        self.q, self.k, self.v = (nn.Linear(16, 32, bias=False) for _ in range(3))
        with torch.no_grad():
            self.q.weight.mul_(10)
            self.k.weight.mul_(10)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, 16), (B, S) -> (B, S, 32)."""
        q, k, v = (linear(x).unflatten(-1, (2, 16)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        visible = mask[:, None, None].bool()  # (B, 1, 1, S)
        if self.over_queries:
            visible = visible.expand(-1, 1, x.shape[1], -1)
        return F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2)


def attention(over_queries: bool) -> tuple[Any, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Attention(over_queries).eval(), torch.randn(4, 7, 16)
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[:, 4:] = 0
    inputs = {"x": x, "mask": mask}
    return dwindle.compress(model, {}, inputs=inputs), inputs


@pytest.mark.parametrize("over_queries", [False, True])
def test_sharp_attention_looks_at_nothing_hidden(over_queries: bool, tmp_path: Path) -> None:
    small, inputs = attention(over_queries)
    expected, found = answers(small, inputs, tmp_path)
    assert relative(found, expected) < 1e-5


def test_made_up_masks_hide_something() -> None:
    small, _ = attention(True)
    (program,) = small.variants.values()
    for _, mask in batches(program):
        assert mask.min() == 0
        assert mask[:, 0].min() == mask[0].min() == 1  # no row sees nothing, and one sees all


def test_a_mask_that_hides_too_little_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = attention(True)
    monkeypatch.setattr(f"{FORMS}.HIDDEN", -50.0)
    with pytest.raises(ExportError, match="output 'output'"):
        small.export_onnx(tmp_path / "model.onnx")


def test_ort_s_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = attention(False)
    monkeypatch.setattr(f"{FORMS}._expanded", lambda graph, node, value: value)
    with pytest.raises(ExportError, match=r"(?s)does not run.*inconsistent q_sequence_length"):
        small.export_onnx(tmp_path / "model.onnx")


# Outputs


class Gives(nn.Module):
    """What `pick` makes of a linear layer, its result and the input."""

    def __init__(self, pick: Callable[[nn.Linear, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.pick = nn.Linear(16, 16), pick

    def forward(self, x: Tensor) -> Any:
        """(B, 16) -> whatever."""
        return self.pick(self.linear, self.linear(x), x)


OUTPUTS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], list[str]]] = {
    "input": (lambda m, y, x: {"x": x, "y": y}, ["x_output", "y"]),
    "input twice": (lambda m, y, x: (x, y, x), ["output.0", "output.1", "output.2"]),
    "result twice": (lambda m, y, x: (y, y), ["output.0", "output.1"]),
    "weight": (lambda m, y, x: (y, m.bias, m.bias), ["output.0", "output.1", "output.2"]),
    "sizes": (lambda m, y, x: (y, x.shape[0], x.shape[0]), ["output.0", "output.1", "output.2"]),
    "names that clash": (lambda m, y, x: {"x": y, "x_output": y + 1}, ["x_output_", "x_output"]),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_any_output_is_one_of_its_own(case: str, tmp_path: Path) -> None:
    pick, names = OUTPUTS[case]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    small = dwindle.compress(Gives(pick).eval(), "zeroquant-w8a8", inputs=x)
    found = check.run(check.session(small.export_onnx(tmp_path / "model.onnx")), ["x"], [x])
    assert list(found) == names
    with torch.no_grad():
        expected = small(x)
    for e, f in zip(expected.values() if isinstance(expected, dict) else expected, found.values(), strict=True):
        torch.testing.assert_close(f, torch.as_tensor(e))


@pytest.mark.parametrize("beside", ["", ".data"])
def test_a_link_that_leads_nowhere_is_not_replaced(beside: str, tmp_path: Path) -> None:
    small = dwindle.compress(Gives(lambda m, y, x: y).eval(), {}, inputs=torch.randn(3, 16))
    link = tmp_path / f"model.onnx{beside}"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="cannot write over something that is there"):
        small.export_onnx(tmp_path / "model.onnx")
    assert link.is_symlink()
