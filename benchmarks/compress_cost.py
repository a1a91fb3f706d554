"""What compress() costs: CPU seconds and memory for BERT-base with random weights, by number of layers.

    python benchmarks/compress_cost.py [--quick] [--layers 6 12 24] [--recipe zeroquant-w8a8] [--again]

Each point is a fresh process on one thread: a tiny model is compressed first, so that what is paid once per process
(imports, torch's own caches) is kept apart as "first use"; then BERT (hidden 768, vocabulary 30,522) is made, run
once, and compressed. CPU time is the process's. Memory is resident memory above the loaded model, in times the
bytes of the model's tensors:

    peak   most during compress(), from the kernel's own high-water mark, reset at every stage (Linux)
    after  when the result is kept, once free pages were given back (malloc_trim): what it really holds

glibc keeps blocks below its moving threshold (at most 32 MiB) for itself when they are freed, so a peak holds some
memory that nobody uses. --quick: 2 and 4 layers.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timing  # before torch
import torch
from results import Results, command_line
from rich.console import Console
from rich.table import Table
from torch import nn

import dwindle
from dwindle.frontends import assemble, compress
from dwindle.passes.driver import Driver, Pass

LAYERS, QUICK = (6, 12, 24), (2, 4)
BATCH, TOKENS = 2, 32
TARGET_LAYERS, TARGET_SECONDS, TARGET_PEAK = 12, 20.0, 1.0
OTHER = "other"


class Spans:
    """CPU seconds and peak memory by stage; what runs inside a stage's own call counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self._stack, self._since = [OTHER], time.process_time()
        reset_peak()

    def _switch(self) -> None:
        """Charge what passed to the stage on top, and start again."""
        now, name = time.process_time(), self._stack[-1]
        self.seconds[name] += now - self._since
        self.peak[name] = max(self.peak[name], peak_bytes())
        self._since = now
        reset_peak()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A stage."""
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` as a stage."""

        @functools.wraps(call)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return call(*args, **kwargs)

        return inside

    def close(self) -> None:
        """Charge the rest."""
        self._switch()


def reset_peak() -> None:
    """Let the high-water mark start at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The high-water mark of resident memory."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def settled_bytes() -> int:
    """Resident memory after garbage and free pages were given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def make_bert(layers: int, **sizes: int) -> nn.Module:
    """BERT-base, or a smaller one, with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: nn.Module = BertModel(BertConfig(num_hidden_layers=layers, attn_implementation="sdpa", **sizes))
    return model.eval()


def watch_stages(spans: Spans, stack: ExitStack) -> None:
    """Charge every stage of compress() to its name while `stack` is open."""
    apply = Driver.apply

    def watched_apply(driver: Driver, *passes: Pass) -> Any:
        return apply(driver, *(replace(p, run=spans.watched(f"pass {p.name}", p.run)) for p in passes))

    stack.enter_context(patch.object(Driver, "apply", watched_apply))
    stack.enter_context(patch.object(Driver, "_run", spans.watched("verification", Driver._run)))
    for module, function, name in (
        (compress, "capture", "capture"),
        (assemble, "lowering_error", "certificate: lowering"),
        (compress, "certify", "certificate: the rest"),
    ):
        stack.enter_context(patch.object(module, function, spans.watched(name, getattr(module, function))))


def measure_here(layers: int, recipe: str) -> dict[str, Any]:
    """One point, in this process."""
    words = torch.randint(1000, 20000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    before, started = settled_bytes(), time.process_time()
    tiny = make_bert(1, hidden_size=128, num_attention_heads=2, intermediate_size=128)
    dwindle.compress(tiny, recipe, inputs=batch)
    del tiny
    first_use = {"CPU s": time.process_time() - started, "bytes": settled_bytes() - before}
    model = make_bert(layers)
    with torch.no_grad():
        model(**batch)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    loaded = settled_bytes()
    spans = Spans()
    started = time.process_time()
    with ExitStack() as stack:
        watch_stages(spans, stack)
        compressed = dwindle.compress(model, recipe, inputs=batch)
    seconds = time.process_time() - started
    spans.close()
    kept = settled_bytes() - loaded
    held = sum(t.numel() * t.element_size() for t in (*compressed.parameters(), *compressed.buffers()))
    stages = {name: {"CPU s": spans.seconds[name], "peak": (spans.peak[name] - loaded) / size} for name in spans.peak}
    return {
        "model bytes": size,
        "compressed bytes": held,
        "CPU s": seconds,
        "peak": (max(spans.peak.values()) - loaded) / size,
        "after": kept / size,
        "first use": first_use,
        "stages": stages,
    }


def measure(layers: int, recipe: str) -> dict[str, Any]:
    """One point, in a process of its own."""
    command = [sys.executable, __file__, "--here", "--layers", str(layers), "--recipe", recipe]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(points: dict[int, dict[str, Any]], recipe: str) -> None:
    """Totals by layers, then stages by layers."""
    totals = Table(title=f"compress(BERT-base, {recipe!r}), one thread", title_justify="left")
    for name in (
        "layers",
        "model MB",
        "CPU s",
        "s / layer",
        "target",
        "peak / model",
        "target",
        "after",
        "first use s",
    ):
        totals.add_column(name, justify="right")
    known = list(points.items())
    for i, (layers, r) in enumerate(known):
        aimed = layers == TARGET_LAYERS
        (fewer, less) = known[i - 1] if i else (0, None)
        slope = "" if less is None else f"{(r['CPU s'] - less['CPU s']) / (layers - fewer):.2f}"
        seconds_met, peak_met = r["CPU s"] <= TARGET_SECONDS, r["peak"] <= TARGET_PEAK
        totals.add_row(
            *(str(layers), f"{r['model bytes'] / 1e6:.0f}", f"{r['CPU s']:.1f}", slope),
            f"<= {TARGET_SECONDS:.0f} {'met' if seconds_met else 'missed'}" if aimed else "",
            f"{r['peak']:.2f}",
            f"<= {TARGET_PEAK} {'met' if peak_met else 'missed'}" if aimed else "",
            *(f"{r['after']:.2f}", f"{r['first use']['CPU s']:.1f}"),
        )
    stages = Table(title="By stage: CPU s, peak / model", title_justify="left")
    stages.add_column("stage")
    for layers in points:
        stages.add_column(f"{layers} layers", justify="right")
        stages.add_column("peak", justify="right")
    for name in next(iter(points.values()))["stages"]:
        cells = [r["stages"].get(name, {"CPU s": 0.0, "peak": 0.0}) for r in points.values()]
        stages.add_row(name, *(text for c in cells for text in (f"{c['CPU s']:.2f}", f"{c['peak']:.2f}")))
    console = Console(width=110)
    console.print(totals)
    console.print(stages)


def main() -> None:
    """Measure the sizes that are not there yet, and print all."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    parser.add_argument("--recipe", default="zeroquant-w8a8")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    if arguments.here:
        print(json.dumps(measure_here(arguments.layers[0], arguments.recipe)))
        return
    results, points = Results("compress_cost", again=arguments.again), {}
    for layers in QUICK if arguments.quick else arguments.layers:
        configuration = {"recipe": arguments.recipe, "layers": layers, "batch": [BATCH, TOKENS]}
        points[layers] = results.point(configuration, lambda layers=layers: measure(layers, arguments.recipe))
    show(points, arguments.recipe)


if __name__ == "__main__":
    main()
