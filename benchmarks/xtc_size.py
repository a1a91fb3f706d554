"""Bytes on disk in the extreme: a BERT-base of 1 and 2 bits, and MiniLM after every preset.

    python benchmarks/xtc_size.py [--again]

BERT-base has its shape alone, with random weights: sizes do not go by values. The float side is the safetensors file of
its 12 layers. An artifact is all files of its folder, as `stat` says, and its parts are counted from the file: packed
linears and tables, scales, what stays float, and the rest, which is safetensors' header, manifest and config. Another
process loads the folder and must give the very numbers. The ONNX file, with 2 bits a weight in linears, is counted
apart, and ONNX Runtime has run it when it is there.
"""

from __future__ import annotations

import collections
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timing  # before torch
import torch
from compress_cost import make_bert
from results import Results, command_line
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import dwindle
from dwindle.frontends.assets import MINILM, fetch, load_minilm
from dwindle.frontends.recipe import PRESETS

SIX_LAYERS = "xtc-binary-6l"  # of MiniLM's six none would go, which is refused
XTC = tuple(preset.name for preset in PRESETS if preset.name.startswith("xtc-"))
TARGETS = {"xtc-binary-5l": 1 / 45}
PARTS = ("linears", "tables", "scales", "float", "rest")

LOADED = """
import sys, torch, dwindle
folder, inputs, outputs = sys.argv[1:]
with torch.no_grad():
    torch.save(dwindle.load(folder)(**torch.load(inputs)).last_hidden_state, outputs)
"""


def example() -> dict[str, Tensor]:
    """A call."""
    words = torch.arange(1000, 1064).reshape(2, 32)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def float_bytes(model: nn.Module) -> int:
    """Size of the model's own safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(dict(model.state_dict()), file)
        return file.stat().st_size


def parts(folder: Path) -> dict[str, int]:
    """Bytes of a saved model by what they are."""
    found: collections.Counter[str] = collections.Counter()
    with safe_open(folder / "weights.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            tensor = file.get_tensor(name)
            table = "embeddings" in name
            kind = {"codes": "tables" if table else "linears", "scale": "scales"}.get(name.rpartition(".")[2], "float")
            found[kind] += tensor.numel() * tensor.element_size()
    found["rest"] = total(folder) - sum(found.values())
    return {part: found[part] for part in PARTS}


def total(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def runs_elsewhere(folder: Path, expected: Tensor) -> bool:
    """Whether another process gives `expected` for the example, from these files alone."""
    with tempfile.TemporaryDirectory() as work:
        inputs, outputs = Path(work) / "inputs", Path(work) / "outputs"
        torch.save(example(), inputs)
        subprocess.run([sys.executable, "-c", LOADED, str(folder), str(inputs), str(outputs)], check=True)
        return torch.equal(torch.load(outputs), expected)


def measure(model: nn.Module, preset: str, onnx: bool) -> dict[str, Any]:
    """{"bytes", "parts": {part: bytes}, "onnx": bytes or None, "identical"}."""
    batch = example()
    small = dwindle.compress(model, preset, inputs=batch, data=[batch])
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        folder = small.save(Path(work) / "saved")
        exported = small.export_onnx(Path(work) / "model.onnx", inputs=batch).stat().st_size if onnx else None
        return {
            "bytes": total(folder),
            "parts": parts(folder),
            "onnx": exported,
            "identical": runs_elsewhere(folder, small(**batch).last_hidden_state),
        }


def show(title: str, points: dict[str, dict[str, Any]], original: int, targets: dict[str, float]) -> None:
    """One row a preset."""
    table = Table(title=f"{title}; fp32 safetensors file {original / 1e6:.2f} MB", title_justify="left")
    for name in ("preset", "folder MB", "of float", *(f"{part} kB" for part in PARTS), "ONNX MB", "loads and runs"):
        table.add_column(name, justify="left" if name == "preset" else "right")
    for name, r in points.items():
        ratio, target = r["bytes"] / original, targets.get(name)
        verdict = "" if target is None else f" (<= 1/{1 / target:.0f} {'met' if ratio <= target else 'missed'})"
        table.add_row(
            *(name, f"{r['bytes'] / 1e6:.2f}", f"1/{1 / ratio:.1f}{verdict}"),
            *(f"{r['parts'][part] / 1e3:.0f}" for part in PARTS),
            "" if r["onnx"] is None else f"{r['onnx'] / 1e6:.2f} (1/{original / r['onnx']:.1f})",
            "the same" if r["identical"] else "NO",
        )
    Console(width=150).print(table)


def main() -> None:
    """Measure what is not there yet, and print both tables."""
    parser = command_line(__doc__)
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    results = Results("xtc_size", again=arguments.again)
    base, (minilm, _) = make_bert(12), load_minilm(quiet=True)
    float_base = results.point({"model": "bert-base", "recipe": None}, lambda: {"bytes": float_bytes(base)})["bytes"]
    shown = {
        preset: results.point(
            {"model": "bert-base", "recipe": preset}, lambda preset=preset: measure(base, preset, onnx=True)
        )
        for preset in XTC
    }
    show("BERT-base, random weights", shown, float_base, TARGETS)
    shown = {
        preset.name: results.point(
            {"model": "minilm", "recipe": preset.name},
            lambda preset=preset: measure(minilm, preset.name, onnx=preset.name in XTC),
        )
        for preset in PRESETS
        if preset.name != SIX_LAYERS
    }
    show("MiniLM-L6", shown, (fetch(MINILM, quiet=True) / MINILM.key).stat().st_size, {})


if __name__ == "__main__":
    main()
