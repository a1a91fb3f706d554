"""Exports: what the file holds, that ONNX Runtime computes in it what the Program computes, and what is refused."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO
from torch import Tensor, nn

import dwindle
from dwindle.frontends.capture import capture
from dwindle.runtime.errors import ExportError, MissingDependencyError
from dwindle.runtime.layout import pack
from dwindle.runtime.onnx import check, export, traced
from dwindle.runtime.onnx.nbits import nbits_weight, onnx_bits
from dwindle.runtime.ops.catalog import QUANTIZE_DYNAMIC
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme
from dwindle.runtime.store import Store

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOKENWISE = "zeroquant-w8a8"


def compressed(name: str, recipe: Any = TOKENWISE) -> tuple[Any, dict[str, Any]]:
    model, inputs = ZOO[name]()
    return dwindle.compress(model, recipe, inputs=inputs, data=[inputs]), inputs


def exported(name: str, folder: Path, recipe: Any = TOKENWISE, **options: Any) -> Path:
    small, inputs = compressed(name, recipe)
    return small.export_onnx(folder / f"{name}.onnx", inputs=inputs, **options)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("bert", tmp_path_factory.mktemp("bert"))


def operators(path: Path, *, optimised: bool = False) -> Counter[str]:
    """How often each operator is in the file, or in what a session makes of it."""
    if optimised:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        path = Path(options.optimized_model_filepath)
    return Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in onnx.load(path).graph.node)


# Numbers


class Quantise(nn.Module):
    """The codes and scales themselves."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = torch.ops.dwindle.quantize_dynamic(x, "token")
        return codes, scale


def awkward(*shape: int) -> Tensor:
    """Rows of very different sizes, an outlier, a row of zeros, ties at half a step."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    rows = x.view(-1, shape[-1])
    rows[0] = 0.0
    rows[1] *= 1e-30
    rows[2] *= 1e30
    rows[3, 0] = 1000.0
    rows[4] = torch.arange(shape[-1]) % 254 / 2 - 63.5  # amax 63.5, so s = 0.5
    return x


@pytest.mark.parametrize("shape", [(5, 33), (37, 384), (3, 7, 64), (2, 3, 5, 16)])
def test_token_codes_are_torch_s_bit_for_bit(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = awkward(*shape)
    program = capture(Quantise(), {"x": x}, Store(), dynamic_shapes={"x": {0: "batch"}})
    with export._quiet():
        built = export._build(program, "accurate", export.OPSET)
        path = export._write(built, tmp_path / "codes.onnx", {})
    codes, scale = check.run(check.session(path), ["x"], [x]).values()
    expected, expected_scale = QUANTIZE_DYNAMIC(x, "token")
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.to(torch.int16) - 128, expected.to(torch.int16))
    real = x.abs().amax(-1, keepdim=True) > 0  # an all-zero row has another scale, and zeros either way
    assert torch.equal(scale[real], expected_scale[real])


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "ternary", "binary"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (96, 32), (40, None), (512, 256)])
def test_nbits_holds_the_same_values(kind: Any, bits: int, columns: int, group: int | None) -> None:
    bits = {"ternary": 2, "binary": 1}.get(kind, bits)
    scheme = Scheme(bits=bits, kind=kind, granularity="group" if group else "channel", group_size=group)
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    q = QTensor.quantize(weight, scheme)
    w = nbits_weight(q.codes, q.scale, q.zero_point, scheme, columns)
    stored = onnx_bits(scheme)
    fields = [(w.blocks >> (stored * i)) & (2**stored - 1) for i in range(8 // stored)]
    codes = torch.stack(fields, -1).reshape(6, -1, w.block).float()
    if w.zeros is None:
        zeros: Any = 2 ** (stored - 1)
    else:
        fields = [(w.zeros >> (stored * i)) & (2**stored - 1) for i in range(8 // stored)]
        zeros = torch.stack(fields, -1).reshape(6, -1)[:, : codes.shape[1], None].float()
    values = ((codes - zeros) * w.scales[..., None]).reshape(6, -1)[:, :columns]
    assert torch.equal(values, q.dequantize())


def test_nbits_refuses_a_group_without_a_kernel() -> None:
    scheme = Scheme(bits=4, granularity="group", group_size=8)
    q = QTensor.quantize(torch.randn(4, 32), scheme)
    with pytest.raises(ExportError, match="groups of 8"):
        nbits_weight(q.codes, q.scale, None, scheme, 32)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "ternary", "binary"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 4, 16])
def test_unpacking_by_arithmetic(kind: Any, bits: int, group: int | None) -> None:
    bits = {"ternary": 2, "binary": 1}.get(kind, bits)
    scheme = Scheme(bits=bits, kind=kind, granularity="group" if group else "channel", group_size=group)
    low = scheme.qmin
    codes = torch.randint(low, scheme.qmax + 1, (5, 48), generator=torch.Generator().manual_seed(1))
    codes = torch.where(codes >= 0, 1, -1) if kind == "binary" else codes
    packed = pack(codes.to(scheme.code_dtype), scheme)
    assert torch.equal(traced.unpacked(packed, 48, scheme), codes.float())


class Mixed(nn.Module):
    """An embedding, two linear layers, one of them wide, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, 32)."""
        hidden: Tensor = self.down(nn.functional.gelu(self.up(self.table(ids))))
        return hidden


def entry(bits: int, kind: str, group: int | None, activation: bool, *operators: str) -> dict[str, Any]:
    weight = {"bits": bits, "kind": kind} | ({"group_size": group} if group else {})
    made: dict[str, Any] = {"operators": list(operators), "weight": weight}
    return made | ({"activation": {"bits": 8, "range": "dynamic"}} if activation else {})


@pytest.mark.parametrize(
    ("bits", "kind", "group", "activation"),
    [
        (8, "symmetric", None, True),
        (4, "symmetric", 32, True),
        (4, "asymmetric", 32, False),
        (4, "symmetric", None, False),
        (8, "asymmetric", 16, False),
        (2, "ternary", None, False),
        (1, "binary", None, False),
    ],
)
def test_every_kind_of_weight(bits: int, kind: str, group: int | None, activation: bool, tmp_path: Path) -> None:
    """The export checks itself; what is left to say is which kernel serves."""
    torch.manual_seed(0)
    recipe = {
        "quantize": [
            entry(bits, kind, group, activation, "linear"),
            entry(bits, kind, group, False, "embedding"),
        ]
    }
    ids = torch.randint(0, 50, (3, 5))
    small = dwindle.compress(Mixed().eval(), recipe, inputs={"ids": ids})
    count = operators(small.export_onnx(tmp_path / "mixed.onnx", inputs={"ids": ids}))
    integer = "MatMulIntegerToFloat" if activation and group is None else "MatMulNBits"
    assert count[f"com.microsoft::{integer}"] == 2
    assert count["MatMul"] == 0


# What the file holds


def test_names_dimensions_and_origin(bert: Path) -> None:
    model = onnx.load(bert)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes == {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask", "token_type_ids")}
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    assert shapes == {"last_hidden_state": ["batch", "sequence", 32], "pooler_output": ["batch", 32]}
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["dwindle.version"] == dwindle.__version__
    assert properties["dwindle.provider"] == "cpu"
    assert TOKENWISE in properties["dwindle.recipe"]
    assert str(Path(__file__).parents[1]).encode() not in bert.read_bytes()


def test_the_fast_forms_are_taken(bert: Path) -> None:
    """2 layers: 12 linears and a pooler; Q, K and V share one quantisation."""
    written, loaded = operators(bert), operators(bert, optimised=True)
    assert written["com.microsoft::MatMulIntegerToFloat"] == 13
    assert written["QuantizeLinear"] == 9
    assert written["Attention"] == written["com.microsoft::Gelu"] == 2
    assert written["Transpose"] == written["IsNaN"] == 0
    assert written["Where"] == 1  # the mask, once
    for slow in ("SkipLayerNormalization", "BiasGelu", "IsNaN"):
        assert loaded[slow] == loaded[f"com.microsoft::{slow}"] == 0, slow


def test_a_float_model_has_no_slow_fusions_either(tmp_path: Path) -> None:
    path = exported("bert", tmp_path, recipe={})
    loaded = operators(path, optimised=True)
    assert loaded["com.microsoft::SkipLayerNormalization"] == loaded["com.microsoft::BiasGelu"] == 0


def test_fast_quantises_per_tensor_but_where_a_gemm_narrows(tmp_path: Path) -> None:
    count = operators(exported("bert", tmp_path, precision="fast"))
    assert count["QuantizeLinear"] == 2  # 64 -> 32 after each Gelu
    assert count["DynamicQuantizeLinear"] == 7


def test_static_convolutions_run_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    batch = {"input": torch.randn(2, 16, 12, 12)}
    small = dwindle.compress(nn.Sequential(*layers).eval(), "static-w8a8", inputs=batch, data=[batch])
    path = small.export_onnx(tmp_path / "cnn.onnx", inputs=batch)
    count = operators(path, optimised=True)
    assert sum(n for name, n in count.items() if name.endswith("::QLinearConv")) == 2
    assert sum(n for name, n in count.items() if name.endswith("Conv")) == 3  # nothing is quantised after the last


def test_large_weights_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "EMBEDDED_BYTES", 0)
    path = exported("mlp", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlp.onnx", "mlp.onnx.data"]
    assert check.run(check.session(path), ["input"], [torch.randn(4, 16)])["output"].shape == (4, 5)


def test_other_shapes_than_those_checked(tmp_path: Path) -> None:
    small, inputs = compressed("bert", {})
    path = small.export_onnx(tmp_path / "bert.onnx", inputs=inputs)
    others = {name: torch.ones(5, 3, dtype=torch.int64) for name in inputs}
    others["input_ids"] = torch.arange(15).reshape(5, 3)
    found = check.run(check.session(path), list(others), list(others.values()))
    with torch.no_grad():
        expected = small(**others).last_hidden_state
    assert check.relative_error(expected, found["last_hidden_state"]) < 1e-5


def test_inputs_are_made_up_where_none_are_given(tmp_path: Path) -> None:
    small, _ = compressed("tied_lm")
    assert small.export_onnx(tmp_path / "lm.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, TOKENWISE, "w8a16", "static-w8a8"], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit", "cnn", "convnext"])
def test_every_model(name: str, recipe: Any, tmp_path: Path) -> None:
    """The export checks itself on the given inputs, at two shapes."""
    assert exported(name, tmp_path, recipe).stat().st_size > 0


# What is refused


@pytest.fixture(scope="module")
def mlp() -> Any:
    return compressed("mlp")[0]


def unchanged(folder: Path, before: set[str]) -> bool:
    return {p.name for p in folder.iterdir()} == before


def test_a_file_is_never_overwritten(mlp: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(ExportError, match="cannot write over something that is there"):
        mlp.export_onnx(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "cuda"}, "required: cpu"),
        ({"precision": "best"}, "no such precision"),
        ({"path": Path("nowhere") / "model.onnx"}, "no folder"),
    ],
)
def test_wrong_arguments(mlp: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = tmp_path / options.pop("path", "model.onnx")
    with pytest.raises(ExportError, match=message):
        mlp.export_onnx(path, **options)
    assert unchanged(tmp_path, set())


@pytest.mark.parametrize("package", export.PACKAGES)
def test_an_absent_package_is_named(mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else known(name))
    with pytest.raises(MissingDependencyError, match=rf"(?s){package}.*dwindle\[onnx\]"):
        mlp.export_onnx(tmp_path / "model.onnx")


def test_which_variant(tmp_path: Path) -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, TOKENWISE, inputs=inputs)
    small(input_ids=inputs["input_ids"])
    with pytest.raises(ExportError, match=r"(?s)which variant.*input_ids.*inputs="):
        small.export_onnx(tmp_path / "model.onnx")


def drop_bias(*arguments: Any) -> Tensor:
    codes, scale, one, zero, weight, weight_scale, _, dtype = arguments
    return (traced._gemm(codes, weight, one, weight_scale, zero, None) * scale).to(dtype)


def round_up(x: Tensor, site: str, bits: int) -> tuple[Tensor, Tensor]:
    return KEPT(x * 1.01, site, bits)


KEPT = traced.per_token


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [("gemm_per_token", drop_bias, "output 'output'|a quantisation"), ("per_token", round_up, "a quantisation")],
)
def test_a_wrong_graph_is_refused(
    mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any, message: str
) -> None:
    """Both mistakes move the outputs by less than quantisation itself does."""
    monkeypatch.setattr(traced, name, wrong)
    with pytest.raises(ExportError, match=message):
        mlp.export_onnx(tmp_path / "model.onnx")
    assert unchanged(tmp_path, set())


def test_a_session_s_complaint_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00not a model")
    with pytest.raises(ExportError, match="does not load"):
        check.session(tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([3.0, 4.0], [3.0, 4.5], 0.1),
        ([float("-inf"), 1.0], [-3.4e38, 1.0], 0.0),
        ([1.0, 1.0], [float("nan"), 1.0], float("inf")),
        ([1, 2], [1, 3], float("inf")),
        ([1.0], [1.0, 1.0], float("inf")),
    ],
)
def test_relative_error(expected: list[Any], actual: list[Any], error: float) -> None:
    assert check.relative_error(torch.tensor(expected), torch.tensor(actual)) == pytest.approx(error)


# Trained weights


@pytest.mark.slow
def test_minilm_is_better_and_no_larger_than_a_quarter(tmp_path: Path) -> None:
    """ORT's own dynamic INT8 has an error of .14 here; see benchmarks/onnx_cpu.py for times."""
    from dwindle.frontends.assets import load_bbc, load_minilm

    model, tokenizer = load_minilm(quiet=True)
    texts = load_bbc(quiet=True)[1][:4]
    made = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
    small = dwindle.compress(model, TOKENWISE, inputs=inputs)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    for precision, limit in (("accurate", 0.085), ("fast", 0.125)):
        path = small.export_onnx(tmp_path / f"{precision}.onnx", precision=precision, inputs=inputs)
        found = check.run(check.session(path), list(inputs), list(inputs.values()))["last_hidden_state"]
        assert check.relative_error(expected, found) < limit
        assert path.stat().st_size < 24e6
