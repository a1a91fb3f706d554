"""`dwindle demo`: a sentence encoder in int8, and what that costs in answers found.

    model   all-MiniLM-L6-v2, 22.7 M parameters, fp32
    task    BBC news: a headline is the query, the bodies are the documents, and each query has one right body
    told    acc@1 and MRR of each form, the paired difference to fp32 with its 95 % bootstrap interval, the mean
            cosine of embeddings to those of fp32, bytes of the files, latency at one text and at eight

Written: artifact/, model.onnx, report.html and figures.json, in a folder that appears when all is done.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor

from ..runtime.certificate import Certificate
from ..runtime.compressed import Compressed
from ..runtime.errors import MissingDependencyError
from ..runtime.files import appearing
from ..runtime.report import differences, size
from .assets import MINILM, fetch, load_bbc, load_minilm
from .bench import Bench, bench
from .compress import compress
from .page import write_page
from .progress import Steps, steps
from .retrieval import embed, paired_difference, retrieval_scores

RECIPE = "zeroquant-w8a8"
FLOAT, OURS, ONNX = "fp32 eager", "int8 dwindle", "int8 ONNX Runtime"
DOCUMENTS, QUICK_DOCUMENTS = 500, 200
TOKENS = 128
SECONDS, QUICK_SECONDS = 3.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How one form retrieves. difference: of MRR to fp32, and its 95 % interval; None for fp32 itself."""

    form: str
    acc_at_1: float
    mrr: float
    difference: tuple[float, tuple[float, float]] | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class DemoFigures:
    """What the demo found. bytes: of files on disk, by form; skipped: what was left out, and why."""

    documents: int
    qualities: tuple[Quality, ...]
    bytes: Mapping[str, int]
    latency: Bench
    certificate: Certificate
    seconds: float
    out: str
    skipped: str = ""

    def of(self, form: str) -> Quality:
        """The quality of one form. Raises StopIteration for one that was not measured."""
        return next(quality for quality in self.qualities if quality.form == form)

    def to_json(self) -> dict[str, Any]:
        """Plain data; the certificate in short, for report and artifact hold it."""
        return {
            "documents": self.documents,
            "qualities": [asdict(quality) for quality in self.qualities],
            "bytes": dict(self.bytes),
            "latency": self.latency.to_json(),
            "output_error": dict(self.certificate.output_error),
            "seconds": self.seconds,
            "out": self.out,
            "skipped": self.skipped,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._quality()
        yield self._bytes()
        yield self.latency
        yield f"Output error: {differences(self.certificate.output_error)}"
        if self.skipped:
            yield f"Left out: {self.skipped}"
        yield f"{self.seconds:.0f} s. Written to {self.out}{os.sep}: " + ", ".join(
            sorted(entry.name + os.sep * entry.is_dir() for entry in Path(self.out).iterdir())
        )

    def _quality(self) -> Table:
        table = _table(f"Headline -> body, {self.documents} BBC articles")
        for name in ("acc@1", "MRR", "less fp32", "95 % interval", "cosine"):
            table.add_column(name, justify="right", no_wrap=True)
        for q in self.qualities:
            cells = ["", "", ""]
            if q.difference is not None:
                mean, (low, high) = q.difference
                cells = [f"{mean:+.4f}", f"{low:+.4f}, {high:+.4f}", f"{q.cosine:.5f}"]
            table.add_row(q.form, f"{q.acc_at_1:.3f}", f"{q.mrr:.4f}", *cells)
        return table

    def _bytes(self) -> Table:
        table = _table("Files")
        table.add_column("bytes", justify="right")
        table.add_column("of fp32", justify="right")
        base = self.bytes[FLOAT]
        for form, count in self.bytes.items():
            table.add_row(form, f"{count:,} ({size(count)})", f"{count / base:.3f}")
        return table


def run_demo(out: Path, *, quick: bool = False, quiet: bool = False) -> DemoFigures:
    """Compress, measure, and write everything to the new folder `out`. Raises ArtifactError if it exists."""
    with appearing(out) as draft, steps(quiet=quiet) as stage:
        draft.mkdir()
        figures = _run(draft, out, quick, stage)
        (draft / "figures.json").write_text(json.dumps(figures.to_json(), indent=1) + "\n", encoding="utf-8")
    return figures


def _run(folder: Path, out: Path, quick: bool, stage: Steps) -> DemoFigures:
    start = time.perf_counter()
    with stage.step("Fetching MiniLM and BBC news"):
        weights = fetch(MINILM, quiet=True) / MINILM.key
        model, tokenizer = load_minilm(quiet=True)
        headlines, bodies = load_bbc(distinct=True, quiet=True)
    count = QUICK_DOCUMENTS if quick else DOCUMENTS
    headlines, bodies = headlines[:count], bodies[:count]
    example = dict(tokenizer(bodies[:2], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"))
    with stage.step(f"Compressing with {RECIPE}"):
        small = compress(model, RECIPE, inputs=example)
    with stage.step("Exporting to ONNX"):
        session, skipped = _onnx(small, folder / "model.onnx")
    forms: dict[str, Callable[..., Any]] = {FLOAT: model, OURS: small} | ({ONNX: session} if session else {})
    with stage.step("Timing") as advance:
        seconds = QUICK_SECONDS if quick else SECONDS
        latency = bench(forms, example, batches=(1, 8), seconds=seconds, progress=advance)
    vectors = {name: _vectors(form, tokenizer, headlines, bodies, name, stage) for name, form in forms.items()}
    with stage.step("Writing the artifact and the report"):
        small.measured = _measured(latency)
        artifact = small.save(folder / "artifact")
        write_page(small.report(), folder / "report.html", title="all-MiniLM-L6-v2")
    sizes = {FLOAT: weights.stat().st_size, OURS: sum(file.stat().st_size for file in artifact.iterdir())}
    if session is not None:
        sizes[ONNX] = (folder / "model.onnx").stat().st_size
    return DemoFigures(
        documents=count,
        qualities=_qualities(vectors),
        bytes=sizes,
        latency=latency,
        certificate=small.certificate,
        seconds=time.perf_counter() - start,
        out=str(out),
        skipped=skipped,
    )


def _onnx(small: Compressed, path: Path) -> tuple[Callable[..., Any] | None, str]:
    """The exported model as a callable; without the extra that exports, None and why."""
    try:
        small.export_onnx(path, provider="cpu")
        import onnxruntime
    except MissingDependencyError as error:
        return None, f"ONNX ({error.message}: {error.cure})"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]

    def call(**arguments: Tensor) -> dict[str, Any]:
        feeds = {name: value.numpy() for name, value in arguments.items() if name in names}
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))

    return call, ""


def _vectors(
    form: Callable[..., Any], tokenizer: Any, headlines: list[str], bodies: list[str], name: str, stage: Steps
) -> tuple[Tensor, Tensor]:
    """(queries, documents), each (N, D)."""
    with stage.step(f"Embedding: {name}") as advance:
        total = len(headlines) + len(bodies)
        queries = embed(form, tokenizer, headlines, max_length=TOKENS, progress=lambda done, _: advance(done, total))
        documents = embed(
            form, tokenizer, bodies, max_length=TOKENS, progress=lambda done, _: advance(len(headlines) + done, total)
        )
    return queries, documents


def _qualities(vectors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Quality, ...]:
    scores = {name: retrieval_scores(*pair) for name, pair in vectors.items()}
    base, found = scores[FLOAT].reciprocal_ranks, []
    for name, score in scores.items():
        against: dict[str, Any] = {}
        if name != FLOAT:
            pairs = zip(vectors[name], vectors[FLOAT], strict=True)
            cosine = torch.cat([(ours * theirs).sum(dim=-1) for ours, theirs in pairs]).mean().item()
            against = {"difference": paired_difference(score.reciprocal_ranks, base), "cosine": cosine}
        found.append(Quality(form=name, acc_at_1=score.acc_at_1, mrr=score.mrr, **against))
    return tuple(found)


def _measured(latency: Bench) -> dict[str, Any]:
    """As `Compressed.report` measures it, so that it need not be measured twice."""
    rows = []
    for batch in (1, 8):
        eager, ours = latency.of(FLOAT, batch), latency.of(OURS, batch)
        rows.append({"batch": batch, "eager_p50": eager.p50, "eager_p95": eager.p95, "p50": ours.p50, "p95": ours.p95})
    return {"latency": rows, "machine": latency.machine, "tokens": latency.timings[0].sequence}


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    return table
