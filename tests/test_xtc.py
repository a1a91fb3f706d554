"""Ternary and binary weights: what the presets choose, what lies on disk, and that it runs from there."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TOKENS, VOCABULARY, ZOO, bert_classifier, first
from onnx_answers import answers, hold, relative
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.frontends.recipe import PRESETS, Recipe
from dwindle.runtime import saving
from dwindle.runtime.errors import RecipeError
from dwindle.runtime.qtensor import QTensor

XTC = [preset.name for preset in PRESETS if preset.name.startswith("xtc-")]


def bert(layers: int, labels: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return bert_classifier(layers), batch | ({"labels": torch.tensor([0, 1])} if labels else {})


def roberta() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RobertaForSequenceClassification(config).eval()
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bits(small: Any) -> dict[int, set[str]]:
    """The weights of each width, by name."""
    found: dict[int, set[str]] = {}
    for edit in small.plan.quantizations:
        found.setdefault(edit.weight.bits, set()).add(edit.fqn.removesuffix(".weight"))
    return found


# What the presets choose

POSITIONS = {"embeddings.position_embeddings", "embeddings.token_type_embeddings"}
RELATIVE = {f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias" for part in ("encoder", "decoder")}
EIGHT: dict[str, set[str]] = {
    "bert": POSITIONS,  # and the pooler is binary
    "roberta": {f"roberta.{name}" for name in POSITIONS} | {"classifier.out_proj"},
    "gpt2": {"transformer.wte", "transformer.wpe"},  # the table is the head too
    "llama": {"lm_head"},
    "t5": {"shared"} | RELATIVE,
    "vit": {"classifier"},
    "tied_lm": {"embedding"},
    "mlp": {"5"},
}


@pytest.mark.parametrize(
    ("recipe", "width"), [("xtc-binary", 1), pytest.param("xtc-ternary", 2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", EIGHT)
def test_a_preset_fits_every_family(name: str, recipe: str, width: int, tmp_path: Path) -> None:
    model, inputs = roberta() if name == "roberta" else ZOO[name]()
    small = dwindle.compress(model, recipe, inputs=inputs)
    found = bits(small)
    tables = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    convs = {path for path, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    expected = {path for path in tables | convs if small.store.canonical(f"{path}.weight") == f"{path}.weight"}
    assert found == {8: EIGHT[name], width: expected - EIGHT[name]}
    linears = [edit for edit in small.plan.quantizations if edit.operator == "linear"]
    assert all(e.activation is not None and e.activation.spell() == "8-symmetric-token-nearest" for e in linears)
    loaded = dwindle.load(small.save(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(first(loaded(**inputs)), first(small(**inputs)))


class Answers(nn.Module):
    """What a linear layer gives, on its way out of the model."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self.inner, self.last, self.out = nn.Linear(16, 16), nn.Linear(16, 16), out

    def forward(self, x: Tensor) -> Any:
        """(B, 16) -> whatever."""
        return self.out(self.last(torch.relu(self.inner(x))), x)


WAYS: dict[str, tuple[Any, bool]] = {
    "as it is": (lambda y, x: y, True),
    "split, in another dtype": (lambda y, x: y.double().split(8, -1)[0].squeeze(-1), True),
    "scaled": (lambda y, x: {"logits": y / 3.0}, True),
    "probabilities": (lambda y, x: y.softmax(-1), True),
    "with a loss": (lambda y, x: (F.cross_entropy(y, y.argmax(-1)), y), True),
    "a loss alone": (lambda y, x: F.cross_entropy(y, y.argmax(-1)), False),
    "a pooler": (lambda y, x: torch.tanh(y), False),
    "on a stream": (lambda y, x: x + y, False),
    "kept and attended to": (lambda y, x: (y, y @ x.t()), False),
}


@pytest.mark.parametrize("way", WAYS)
def test_which_layers_give_the_answers(way: str) -> None:
    out, answers = WAYS[way]
    recipe = {"quantize": [{"weight": {"bits": 4}}, {"answers": True, "weight": {"bits": 8}}]}
    small = dwindle.compress(Answers(out).eval(), recipe, inputs=torch.randn(3, 16))
    assert bits(small) == ({4: {"inner"}, 8: {"last"}} if answers else {4: {"inner", "last"}})


def test_what_may_be_missing_is_no_error() -> None:
    model, inputs = ZOO["mlp"]()
    missing = {"modules": ["*positions"], "weight": {"bits": 8}}
    with pytest.raises(RecipeError, match="matches nothing"):
        dwindle.compress(model, {"quantize": [{"weight": {"bits": 4}}, missing]}, inputs=inputs)
    small = dwindle.compress(
        model, {"quantize": [{"weight": {"bits": 4}}, missing | {"optional": True}]}, inputs=inputs
    )
    assert set(bits(small)) == {4}


@pytest.mark.parametrize(("layers", "stay"), [(6, [0, 1, 2, 3, 4, 6]), (5, [0, 1, 3, 4, 6])])
def test_fewer_layers(layers: int, stay: list[int]) -> None:
    model, inputs = bert(7)
    small = dwindle.compress(model, f"xtc-binary-{layers}l", inputs=inputs)
    kept = {int(name.split(".")[3]) for name in bits(small)[1] if ".layer." in name}
    assert sorted(kept) == stay
    assert bits(small)[8] == {f"bert.{name}" for name in POSITIONS} | {"classifier"}
    shallow, inputs = bert(layers - 1)
    with pytest.raises(
        RecipeError, match=rf"(?s)depth of bert.encoder.layer.*1 to {layers - 1} layers.*found: {layers}"
    ):
        dwindle.compress(shallow, f"xtc-binary-{layers}l", inputs=inputs)


@pytest.mark.parametrize("recipe", XTC)
def test_a_preset_is_a_file_too(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(Recipe.of(recipe).plain()))
    assert Recipe.of(tmp_path / "recipe.json") == Recipe.of(recipe)


# Training


@pytest.mark.parametrize(
    ("recipe", "layers"), [("xtc-ternary", 1), pytest.param("xtc-binary-5l", 6, marks=pytest.mark.slow)]
)
def test_what_is_trained_is_what_runs(recipe: str, layers: int, tmp_path: Path) -> None:
    model, inputs = bert(layers, labels=True)
    student = dwindle.prepare(model.train(), recipe, inputs=inputs, teacher=model)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for _ in range(3):
        student.loss(inputs).backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
    small = student.eval().finish()
    with torch.no_grad():
        expected = student(**inputs).logits
        assert torch.equal(small(**inputs).logits, expected)
        loaded = dwindle.load(small.save(tmp_path / "saved"))
        assert torch.equal(loaded(**inputs).logits, expected)


# On disk


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor], Path]:
    """A binary BERT, a call of it, and where it is saved."""
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, "xtc-binary", inputs=inputs)
    return small, inputs, small.save(tmp_path_factory.mktemp("binary") / "saved")


def test_every_byte_of_an_artifact_is_accounted_for(binary: tuple[Any, dict[str, Tensor], Path]) -> None:
    small, _, folder = binary
    manifest = json.loads((folder / saving.MANIFEST).read_text())
    on_disk = {file.name: file.stat().st_size for file in folder.iterdir()}
    declared = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert on_disk == declared | {saving.MANIFEST: on_disk[saving.MANIFEST]}

    def stored(entry: dict[str, Any]) -> int:
        return sum(part["bytes"] for part in entry["parts"].values()) if entry["kind"] == "qtensor" else entry["bytes"]

    in_manifest = sum(stored(entry) for entry in manifest["tensors"].values())
    in_memory = sum(
        value.nbytes if isinstance(value, QTensor) else value.numel() * value.element_size()
        for _, value in small.store.entries()
    )
    with (folder / saving.WEIGHTS).open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    assert in_manifest == in_memory == small.certificate.bytes_stored
    assert 8 + header + in_memory == on_disk[saving.WEIGHTS]


def test_a_weight_takes_a_bit(binary: tuple[Any, dict[str, Tensor], Path]) -> None:
    small, _, folder = binary
    with safe_open(folder / saving.WEIGHTS, framework="pt") as file:
        for edit in small.plan.quantizations:
            codes, weight = file.get_tensor(f"{edit.fqn}.codes"), small.store.get(edit.fqn)
            assert codes.numel() * codes.element_size() == weight.shape[0] * weight.shape[1] * edit.weight.bits // 8
            scale = file.get_tensor(f"{edit.fqn}.scale")
            assert (tuple(scale.shape), scale.dtype) == ((weight.shape[0],), torch.float32)


def test_a_new_process_runs_the_file(binary: tuple[Any, dict[str, Tensor], Path], tmp_path: Path) -> None:
    small, inputs, folder = binary
    torch.save(inputs, tmp_path / "inputs")
    code = f"""
import dwindle, torch
model = dwindle.load({str(folder)!r})
with torch.no_grad():
    torch.save(model(**torch.load({str(tmp_path / "inputs")!r})).last_hidden_state, {str(tmp_path / "outputs")!r})
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "outputs"), small(**inputs).last_hidden_state)


# In ONNX Runtime


class Words(nn.Module):
    """A table and two layers of a width that takes several blocks of a MatMulNBits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(500, 384), nn.LayerNorm(384)
        self.up, self.down = nn.Linear(384, 1536), nn.Linear(1536, 384, bias=False)
        self.score = nn.Linear(384, 64)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, 64)."""
        x = self.table(ids)
        return self.score(self.norm(x + self.down(F.gelu(self.up(self.norm(x))))))


@pytest.mark.parametrize(("recipe", "width"), [("xtc-binary", 1), ("xtc-ternary", 2)])
def test_onnx_holds_two_bits_a_weight_and_the_table_packed(recipe: str, width: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Words().eval()
    inputs = {"ids": torch.randint(0, 500, (2, 7), generator=torch.Generator().manual_seed(1))}
    small = dwindle.compress(model, recipe, inputs=inputs)
    hold(small, model, inputs, tmp_path)

    file = onnx.load(tmp_path / "model.onnx")
    sizes = {tensor.name: len(tensor.raw_data) for tensor in file.graph.initializer}
    products = [node for node in file.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2
    for node in products:
        found = {attribute.name: attribute.i for attribute in node.attribute}
        assert (found["bits"], found["block_size"], found["accuracy_level"]) == (2, 128, 4)
        assert sizes[node.input[1]] == found["N"] * found["K"] // 4
        assert sizes[node.input[2]] == found["N"] * found["K"] // 128 * 4
        assert len([name for name in node.input if name]) == 3  # no zero points: ORT's own, 2, is an integer
    table = [size for name, size in sizes.items() if name.startswith("table.weight") and "scale" not in name]
    assert table == [500 * 384 * width // 8]
    assert 500 * 4 in sizes.values()  # its scales


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["xtc-binary", "xtc-ternary"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_onnx_of_every_family(name: str, recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, inputs = ZOO[name]()
    small = dwindle.compress(model, recipe, inputs=inputs)
    torch_answer, ort_answer = answers(small, inputs, tmp_path)
    # One block a row: nothing is rounded once more. Largest measured 2.8e-7.
    assert relative(ort_answer, torch_answer) < 1e-5


# With everything else


def test_a_recipe_of_everything_binary_is_one_artifact(tmp_path: Path) -> None:
    model, inputs = bert(4)
    prune = {"scopes": ["heads", "rows"], "ratio": 0.5}
    recipe = {"depth": {"keep": 2}, "prune": prune, "quantize": Recipe.of("xtc-binary").plain()["quantize"]}
    small = dwindle.compress(model, recipe, inputs=inputs)
    up = small.store.get("bert.encoder.layer.1.intermediate.dense.weight")
    assert isinstance(up, QTensor)
    assert (up.shape, up.scheme.kind) == ((32, 32), "binary")
    # What is quantised is what is left: the scale is the mean of the rows and columns that stay.
    down = small.store.get("bert.encoder.layer.1.output.dense.weight")
    rows = [edit for edit in small.plan.slices if edit.fqn == "bert.encoder.layer.1.output.dense.weight"]
    left = model.bert.encoder.layer[1].output.dense.weight.detach()
    for cut in rows:
        left = left.index_select(cut.dim, cut.kept)
    assert torch.equal(down.scale, left.abs().mean(1))
    loaded = dwindle.load(small.save(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)


def test_binary_weights_have_no_zeros() -> None:
    model, inputs = bert(1)
    binary = {"weight": {"bits": 1, "kind": "binary"}}
    recipe = {"sparsify": {"ratio": 0.5, "modules": ["*.query"]}, "quantize": [binary]}
    for start in (dwindle.compress, dwindle.prepare):
        with pytest.raises(RecipeError, match=r"(?s)query.weight is to have zeros, and to be binary.*ternary"):
            start(model, recipe, inputs=inputs)
