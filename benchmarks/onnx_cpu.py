"""ONNX Runtime on one CPU thread: our INT8 export of trained MiniLM beside ORT's own dynamic INT8.

    python benchmarks/onnx_cpu.py [--rounds 15] [--points full padded ...]

Sides, all files for the same CPU provider:
    fp32           torch.onnx.export(dynamo=True)
    peer           quantize_dynamic(op_types_to_quantize=["MatMul"], per_channel=True) on fp32
    peer_ts        the same on the older TorchScript export with eager attention: the fastest peer known
    fast, accurate dwindle.compress(model, "zeroquant-w8a8") exported with either precision

Time is CPU time of one batch, the least of all rounds, sides taken in turn within a round. Error is relative L2
of last_hidden_state over real tokens against PyTorch fp32.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import timing  # before torch

# isort: split
import onnx
import torch
from onnxruntime.quantization import quantize_dynamic
from results import Results, command_line
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dwindle
from dwindle.frontends.assets import load_bbc, load_minilm
from dwindle.runtime.onnx.check import session

RECIPE = "zeroquant-w8a8"
# texts, tokens they are cut or padded to
POINTS = {"full": (8, 128), "padded": (8, 128), "one": (1, 128), "short": (1, 16)}
SIDES = ("fp32", "peer", "peer_ts", "fast", "accurate")
BATCHES = 3  # for the error; the first is timed


class Hidden(nn.Module):
    """The model as (ids, mask) -> last_hidden_state, with written-out or fused attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) int64 twice -> (B, S, H)."""
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def texts(point: str) -> list[list[str]]:
    """Batches of BBC news; `padded` takes headlines, which fill about a tenth of their places."""
    headlines, bodies = load_bbc(quiet=True)
    source, count = headlines if point == "padded" else bodies, POINTS[point][0]
    return [source[i * count : (i + 1) * count] for i in range(BATCHES)]


def encode(tokenizer: Any, batch: list[str], tokens: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, (B, tokens)."""
    made = tokenizer(batch, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def build(folder: Path, model: nn.Module, example: dict[str, Tensor]) -> dict[str, Path]:
    """Write every side's file."""
    files = {side: folder / f"{side}.onnx" for side in SIDES}
    arguments, names = tuple(example.values()), list(example)
    dims = {name: {0: "batch", 1: "sequence"} for name in names}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=512)
    shapes = {name: {0: batch, 1: sequence} for name in names}
    hidden = Hidden(model).eval()
    options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": shapes, "external_data": False, "verbose": False}
    torch.onnx.export(hidden, arguments, files["fp32"], input_names=names, **options)
    _quantize(files["fp32"], files["peer"])
    model.set_attn_implementation("eager")
    script = folder / "script.onnx"
    options = {"dynamo": False, "opset_version": 17, "dynamic_axes": dims}
    torch.onnx.export(hidden, arguments, script, input_names=names, **options)
    model.set_attn_implementation("sdpa")
    _quantize(script, files["peer_ts"])
    compressed = dwindle.compress(model, RECIPE, inputs=example)
    for precision in ("fast", "accurate"):
        compressed.export_onnx(files[precision], precision=precision, inputs=example)
    return files


def _quantize(source: Path, target: Path) -> None:
    graph = onnx.load(source)
    del graph.graph.value_info[:]  # the quantiser's shape inference disagrees with the exporter's records
    quantize_dynamic(graph, target, op_types_to_quantize=["MatMul"], per_channel=True)


def measure(files: dict[str, Path], model: nn.Module, batches: list[dict[str, Tensor]], rounds: int) -> dict[str, Any]:
    """{side: {"ms", "error"}} over the same inputs in one run."""
    sessions = {side: session(path) for side, path in files.items()}
    feeds = [{name: t.numpy() for name, t in batch.items()} for batch in batches]
    calls = {side: lambda s=made: s.run([s.get_outputs()[0].name], feeds[0]) for side, made in sessions.items()}
    times = timing.interleaved(calls, rounds)
    with torch.no_grad():
        expected = [model(**batch).last_hidden_state for batch in batches]
    results = {}
    for side, made in sessions.items():
        wrong = norm = 0.0
        for feed, batch, hidden in zip(feeds, batches, expected, strict=True):
            real = batch["attention_mask"].bool()
            actual = torch.from_numpy(made.run([made.get_outputs()[0].name], feed)[0])
            wrong += float((actual - hidden)[real].double().square().sum())
            norm += float(hidden[real].double().square().sum())
        size = files[side].stat().st_size / 1e6
        results[side] = {"ms": times[side]["least"], "error": (wrong / norm) ** 0.5, "mb": size}
    return results


def show(results: dict[str, Any]) -> None:
    """One row a point and side."""
    table = Table(title="MiniLM-L6, one thread: CPU ms a batch, and error against PyTorch fp32", title_justify="left")
    for name in ("point", "side", "ms", "/ peer", "/ peer_ts", "error", "/ peer", "MB"):
        table.add_column(name, justify="left" if name in ("point", "side") else "right")
    for point, sides in results.items():
        peer, script = sides["peer"], sides["peer_ts"]
        for side, r in sides.items():
            ratios = [f"{r['ms'] / p['ms']:.2f}" for p in (peer, script)]
            table.add_row(
                *(point, side, f"{r['ms']:.2f}", *ratios),
                *(f"{r['error']:.2g}", f"{r['error'] / peer['error']:.2f}", f"{r['mb']:.1f}"),
            )
        table.add_section()
    Console(width=100).print(table)


class Files:
    """Every side's file, written when the first point needs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.tokenizer = load_minilm(quiet=True)
        self._files: dict[str, Path] = {}

    def measured(self, point: str, rounds: int) -> dict[str, Any]:
        """One point."""
        if not self._files:
            self._files = build(self.folder, self.model, encode(self.tokenizer, texts("full")[0], 128))
        batches = [encode(self.tokenizer, batch, POINTS[point][1]) for batch in texts(point)]
        return measure(self._files, self.model, batches, rounds)


def main() -> None:
    """Measure the points that are not there yet, and print all."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--points", nargs="+", choices=list(POINTS), default=list(POINTS))
    arguments = parser.parse_args()
    timing.one_thread()
    logging.getLogger().setLevel(logging.ERROR)
    results = Results("onnx_cpu", again=arguments.again)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        files = Files(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        points = {
            point: results.point(
                {"point": point, "recipe": RECIPE, "rounds": arguments.rounds},
                lambda point=point: files.measured(point, arguments.rounds),
            )
            for point in arguments.points
        }
    show(points)


if __name__ == "__main__":
    main()
