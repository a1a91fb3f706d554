"""Artifacts: what is loaded equals what was saved, and what is not as it was saved is refused by name."""

from __future__ import annotations

import inspect
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import ZOO
from safetensors import safe_open
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import dwindle
from dwindle.frontends.capture import capture
from dwindle.runtime import files, saving
from dwindle.runtime.artifact import load, save
from dwindle.runtime.certificate import Certificate, Layer
from dwindle.runtime.compressed import Compressed
from dwindle.runtime.contract import Contract, Input, Signature
from dwindle.runtime.errors import ArtifactError
from dwindle.runtime.plan import Plan, Quantize
from dwindle.runtime.program import Entry, Program
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import A8_TOKEN, W4_G32, W8_CHANNEL, Scheme
from dwindle.runtime.store import Store

aten, own = torch.ops.aten, torch.ops.dwindle
ERROR = {"sqnr": float("inf"), "relative": 0.0, "cosine": None}
CERTIFICATE = Certificate(
    layers=(), simulated=0, graph_breaks=0, lowering_error=0.0, output_error=ERROR, inputs="x [2, 64]", torch="2"
)


def compressed(name: str, *, training: bool = False) -> tuple[Compressed, dict[str, Any]]:
    """A model of the zoo as captured, and one call."""
    model, inputs = ZOO[name]()
    store = Store.of(model)
    attributes = {"config": model.config, "main_input_name": "input_ids"} if hasattr(model, "config") else {}
    finished = Compressed.named(model, "Compressed")(
        store, Plan(), Signature.of(model), recipe={}, certificate=CERTIFICATE, attributes=attributes
    )
    for mode in (False, True)[: 1 + training]:
        finished.add(capture(model, finished.signature.bind((), inputs), store, training=mode))
    return finished, inputs


SCHEMES = (
    W8_CHANNEL,
    W4_G32,
    Scheme(bits=3, kind="asymmetric"),
    Scheme(bits=1, kind="binary"),
    Scheme(bits=2, kind="ternary", granularity="tensor"),
)


class QuantisedMLP(nn.Module):
    """Five linear layers, each on another scheme; the first on quantised activations."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i, scheme in enumerate(SCHEMES):
            self.add_module(f"w{i}", QTensor.quantize(torch.randn(64, 64, generator=generator), scheme))
        self.bias = nn.Parameter(torch.randn(64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = own.quantize_dynamic(x, "token")
        w = self.w0
        x = own.qlinear(codes, scale, w.codes, w.scale, None, self.bias, w.scheme.spell(), torch.float32)
        for w in (self.w1, self.w2, self.w3, self.w4):
            x = own.qlinear_weight_only(x, w.codes, w.scale, w.zero_point, None, w.scheme.spell())
        return x


class _Parts(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return False


def _overloads(graph: fx.Graph) -> None:
    """Calls of an operator's packet, as eager code writes them, become calls of its one overload."""
    for node in graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "default"):
            node.target = node.target.default


def quantised() -> tuple[Compressed, dict[str, Any]]:
    """QTensors of every layout behind a graph of dwindle's own operators, with a plan, a log and figures."""
    model = QuantisedMLP()
    store = Store()
    for i in range(len(SCHEMES)):
        store.put(f"w{i}", getattr(model, f"w{i}"))
    store.put("bias", nn.Parameter(model.bias.detach(), requires_grad=False))
    graph = _Parts().trace(model)
    _overloads(graph)
    result = graph.output_node().args[0]
    graph.output_node().args = ((result,),)
    arguments = {"kind": "dict", "class": "builtins:dict", "items": {"x": {"kind": "tensor"}}}
    contract = Contract(
        False, arguments, (Input("x", "float32", ("batch", 64)),), {"kind": "tensor"}, {"batch": (1, None)}
    )
    edits = tuple(
        Quantize(fqn=f"w{i}", operator="linear", weight=s, activation=None if i else A8_TOKEN)
        for i, s in enumerate(SCHEMES)
    )
    layer = Layer(name="w0", operator="linear", scheme=W8_CHANNEL.spell(), bytes_before=16384, bytes_after=4352)
    finished = Compressed.called("MLPCompressed", Signature(["x"], {}, False))(
        store,
        Plan(edits),
        Signature(["x"], {}, False),
        recipe={"name": "by hand", "bits": [8, 4]},
        certificate=Certificate(**{**vars(CERTIFICATE), "layers": (layer,)}),
        log=(Entry(stage="lower", rule="lower.pack", where="w0", bytes_before=16384, bytes_after=4352),),
        measured={"latency": [], "machine": "ü"},
    )
    finished.add(Program.of(graph, store, contract))
    return finished, {"x": torch.randn(3, 64, generator=torch.Generator().manual_seed(1))}


def same(a: Any, b: Any) -> bool:
    """Every tensor of two results, bit for bit."""
    left, right = (
        pytree.tree_leaves(dict(a) if isinstance(a, dict) else a),
        pytree.tree_leaves(dict(b) if isinstance(b, dict) else b),
    )
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    equal = all(x.dtype == right[name].dtype and torch.equal(x, right[name]) for name, x in left.items())
    return list(left) == list(right) and equal


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved quantised model."""
    model, _ = quantised()
    return model.save(tmp_path_factory.mktemp("saved") / "mlp")


# What comes back


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied_lm", "bert", "t5", "resnet"])
def test_round_trip_of_captured_models(name: str, tmp_path: Path) -> None:
    model, inputs = compressed(name)
    loaded = load(save(model, tmp_path / "saved"))
    with torch.no_grad():
        expected, found = model(**inputs), loaded(**inputs)
    assert type(found) is type(expected)
    assert same(found, expected)
    assert same_state(model, loaded)
    assert loaded.store.aliases == model.store.aliases
    assert type(loaded).__name__ == type(model).__name__
    assert inspect.signature(type(loaded).forward) == inspect.signature(type(model).forward)
    assert [c.to_json() for c in loaded.contracts] == [c.to_json() for c in model.contracts]
    # The zoo's weights are tiny, so what is bounded is the room beside them: a line a node, two a tensor.
    entries, nodes = list(model.store.entries()), sum(len(p.graph.nodes) for p in model.variants.values())
    weights, manifest = ((tmp_path / "saved" / file).stat().st_size for file in (saving.WEIGHTS, saving.MANIFEST))
    assert weights < model.store.nbytes() + 200 * len(entries) + 64
    assert manifest < 200 * nodes + 150 * len(entries) + 4096


@pytest.mark.parametrize(
    ("recipe", "name"), [("zeroquant-w8a8", "tied_lm"), ("w4a8-g32", "gpt2"), ("static-w8a8", "cnn")]
)
def test_round_trip_of_compressed_models(recipe: str, name: str, tmp_path: Path) -> None:
    original, inputs = ZOO[name]()
    model = dwindle.compress(original, recipe, inputs=inputs, data=[inputs])
    with torch.no_grad():
        expected = model(**inputs)
        loaded = load(model.save(tmp_path / "saved"))
        assert same(loaded(**inputs), expected)
    assert same_state(model, loaded)
    assert (loaded.plan, loaded.log, loaded.recipe) == (model.plan, model.log, model.recipe)
    assert loaded.certificate.to_json() == model.certificate.to_json()
    assert any(isinstance(value, QTensor) for _, value in loaded.store.entries())


def test_round_trip_of_qtensors(artifact: Path) -> None:
    model, inputs = quantised()
    loaded = load(artifact)
    with torch.no_grad():
        assert same(loaded(**inputs), model(**inputs))
    assert same_state(model, loaded)
    assert (loaded.plan, loaded.log, loaded.certificate) == (model.plan, model.log, model.certificate)
    assert (loaded.recipe, loaded.measured) == (model.recipe, model.measured)
    assert loaded.report().to_json() == model.report().to_json()
    for i, scheme in enumerate(SCHEMES):
        before, after = model.store.get(f"w{i}"), loaded.store.get(f"w{i}")
        assert isinstance(before, QTensor)
        assert isinstance(after, QTensor)
        assert (after.scheme, after.shape) == (scheme, before.shape)
        assert torch.equal(before.dequantize(), after.dequantize())


def test_saving_what_was_loaded_writes_the_same_files(artifact: Path, tmp_path: Path) -> None:
    again = load(artifact).save(tmp_path / "deep" / "down" / "again")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in artifact.iterdir()
    }


def test_each_variant_comes_back(tmp_path: Path) -> None:
    model, inputs = compressed("cnn", training=True)
    loaded = load(save(model, tmp_path / "saved"))
    assert list(loaded.variants) == list(model.variants)
    assert same(loaded.train()(**inputs), model.train()(**inputs))
    assert same_state(model, loaded)  # both have moved their running statistics, once


def test_the_config_comes_back_as_plain_data(tmp_path: Path) -> None:
    from transformers import AutoConfig, BertConfig

    model, _ = quantised()
    config = BertConfig(hidden_size=32, id2label={0: "no", 1: "yes"})
    model._attributes.update(config=config, main_input_name="input_ids")
    loaded = load(save(model, tmp_path / "saved"))
    assert (loaded.config.hidden_size, loaded.config.model_type, loaded.main_input_name) == (32, "bert", "input_ids")
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert (type(again), again.to_diff_dict()) == (BertConfig, config.to_diff_dict())


def test_the_manifest_reads_as_text(artifact: Path) -> None:
    lines = (artifact / saving.MANIFEST).read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= saving.WIDTH + 100
    assert sum('"op": "call_function"' in line for line in lines) == 8
    assert any('"target": "operator.getitem", "args": ["%quantize_dynamic", 0]' in line for line in lines)


def test_files_are_readable_as_any_new_file(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in artifact.iterdir()} == {expected}


def one_call(tensors: Mapping[str, Tensor], *, persistent: bool = True) -> Compressed:
    """A model that adds its buffers up."""
    store, graph = Store(), fx.Graph()
    node = x = graph.placeholder("x")
    for name, tensor in tensors.items():
        store.put(name, tensor, persistent=persistent)
        node = graph.call_function(aten.add.Tensor, (node, graph.get_attr(name)))
    graph.output((node,))
    arguments = {"kind": "dict", "class": "builtins:dict", "items": {x.name: {"kind": "tensor"}}}
    contract = Contract(False, arguments, (Input("x", "float32", ()),), {"kind": "tensor"})
    model = Compressed(store, Plan(), Signature(["x"], {}, False), recipe={}, certificate=CERTIFICATE)
    model.add(Program.of(graph, store, contract))
    return model


def test_tensors_of_any_layout_are_written_once_each(tmp_path: Path) -> None:
    base = torch.randn(2, 4, 6, 8)
    tensors = {
        "whole": base,
        "part": base[0, 1],
        "part_too": base[1, 1],
        "last": base.contiguous(memory_format=torch.channels_last),
        "turned": torch.randn(8, 6).t(),
        "spread": torch.randn(8).expand(6, 8),
        "every_other": torch.randn(6, 16)[:, ::2],
        "scalar": torch.tensor(1.5),
        "brief": torch.randn(8).bfloat16(),
        "one": torch.tensor(True),
        "odd names/0-x": torch.randn(8),
    }
    model = one_call(tensors)
    loaded = load(save(model, tmp_path / "saved"))
    assert same_state(model, loaded)
    assert same(loaded(torch.tensor(2.0)), model(torch.tensor(2.0)))
    assert loaded.get_buffer("last").stride() == tensors["last"].stride()
    assert loaded.get_buffer("turned").stride() == tensors["turned"].stride()
    with safe_open(tmp_path / "saved" / saving.WEIGHTS, framework="pt") as weights:
        assert set(weights.keys()) == set(tensors)
        assert torch.equal(weights.get_tensor("last"), tensors["last"])
    assert all(t.data_ptr() % 64 == 0 for t in loaded.buffers())


def test_empty_tensors_and_buffers_that_are_not_in_the_state_dict(tmp_path: Path) -> None:
    model = one_call({"table": torch.ones(3), "none": torch.empty(0, 3), "nothing": torch.empty(0)}, persistent=False)
    del model.variants[next(iter(model.variants))]
    loaded = load(save(model, tmp_path / "saved"))
    assert list(loaded.state_dict()) == []
    assert torch.equal(loaded.get_buffer("table"), torch.ones(3))
    assert [tuple(loaded.get_buffer(name).shape) for name in ("none", "nothing")] == [(0, 3), (0,)]


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model, _ = compressed("tied_lm")
    folder = save(model, tmp_path / "saved")
    with safe_open(folder / saving.WEIGHTS, framework="pt") as weights:
        assert "head.weight" not in weights.keys()  # noqa: SIM118  # no mapping
    assert load(folder).store.get("head.weight") is not None


def test_a_loaded_model_needs_neither_passes_nor_frontends(tmp_path: Path) -> None:
    model, inputs = compressed("bert")
    folder = save(model, tmp_path / "saved")
    torch.save(inputs, tmp_path / "inputs")
    code = f"""
import sys
import dwindle, torch
model = dwindle.load({str(folder)!r})
loaded = sorted(n for n in sys.modules if n.startswith(("dwindle.passes", "dwindle.frontends", "transformers")))
sys.modules["transformers"] = None  # as where it is not installed
y = model(**torch.load({str(tmp_path / "inputs")!r}))
assert type(y).__module__ == "dwindle.runtime.structure", type(y)
print(loaded, tuple(y.last_hidden_state.shape), [n for n in sys.modules if n.startswith("dwindle.frontends")])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[] (2, 8, 32) []", done.stderr


# What is refused on saving


def test_an_existing_path_is_left_alone(tmp_path: Path) -> None:
    model, _ = compressed("mlp")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArtifactError, match="required: a path that does not exist"):
        model.save(tmp_path / "taken")
    assert list((tmp_path / "taken").iterdir()) == []
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError):
        model.save(tmp_path / "dangling")


@pytest.mark.parametrize(
    ("module", "failing"),
    [(saving, "_write_weights"), (saving, "fingerprint"), (saving, "digest"), (files, "_flush")],
)
def test_a_crash_midway_leaves_nothing(
    module: ModuleType, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = compressed("mlp")

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "new" / "saved")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_plain_data_is_named(tmp_path: Path) -> None:
    model, _ = compressed("mlp")
    model.recipe = {"rules": [{"dtype": torch.float32}]}
    with pytest.raises(ArtifactError, match=r"recipe\.rules\[0\]\.dtype"):
        model.save(tmp_path / "saved")


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse()])
def test_tensors_without_plain_values_are_named(tensor: Tensor, tmp_path: Path) -> None:
    model = one_call({"odd": tensor})
    with pytest.raises(ArtifactError, match="'odd' cannot be saved"):
        model.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_model_exports(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    model, inputs = ZOO["bert"]()
    dwindle.compress(model, inputs=inputs).save(tmp_path / "small")
    loaded = dwindle.load(tmp_path / "small")
    assert loaded.export_onnx(tmp_path / "small.onnx").stat().st_size > 0
