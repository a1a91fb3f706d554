"""What pruning gains on one CPU thread: time against arithmetic, in PyTorch op by op and in ONNX Runtime.

    python benchmarks/pruned_speed.py [--rounds 21] [--models minilm resnet resnet8] [--again]

    minilm   MiniLM-L6, 8 x 128 tokens, heads and FFN rows cut by 30, 50 and 70 %
    resnet   ResNet-20 for Fashion-MNIST, 32 pictures, all channels cut by 30, 50 and 70 %
    resnet8  the same in widths that are multiples of 8: 16 channels stay 16 at 30 %

Time is CPU time of one batch, the least of all rounds, all sides in turn within a round. `flops` are multiplications
and additions as torch's own counter finds them in the calls that are made.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timing  # before torch
import torch
from fashion import make_resnet
from results import Point, Results, command_line
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dwindle
from dwindle.frontends.assets import load_minilm
from dwindle.runtime.onnx.check import session

RATIOS = (0.3, 0.5, 0.7)
TARGET = 1.6  # times less CPU time of MiniLM at .5, op by op


Rule = dict[str, Any]


def minilm() -> tuple[nn.Module, dict[str, Tensor], Rule]:
    """The model, a batch of made-up words, and what is pruned."""
    words = torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))
    return (
        load_minilm(quiet=True)[0],
        {"input_ids": words, "attention_mask": torch.ones_like(words)},
        {"scopes": ["heads", "rows"]},
    )


def resnet(multiple: int = 1) -> tuple[nn.Module, dict[str, Tensor], Rule]:
    """As above; weights say nothing about time."""
    pictures = torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return make_resnet(0).eval(), {"x": pictures}, {"scopes": ["channels", "hidden"], "multiple": multiple}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor], Rule]]] = {
    "minilm": minilm,
    "resnet": resnet,
    "resnet8": functools.partial(resnet, multiple=8),
}


def measure(name: str, rounds: int) -> Point:
    """{ratio: {"flops", "parameters", "eager ms", "ort ms"}}; of ratio 0 the model as it is."""
    model, batch, rule = MODELS[name]()
    sides: dict[float, nn.Module] = {0.0: model}
    for ratio in RATIOS:
        sides[ratio] = dwindle.compress(model, {"prune": {"ratio": ratio, **rule}}, inputs=batch)
    feeds = {key: value.numpy() for key, value in batch.items()}
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], Any]] = {}
        for ratio, side in sides.items():
            calls[f"eager {ratio}"] = functools.partial(side, **batch)
            whole = dwindle.compress(model, {}, inputs=batch) if ratio == 0 else side
            file = whole.export_onnx(Path(folder) / f"{ratio}.onnx", inputs=batch)
            calls[f"ort {ratio}"] = functools.partial(_run, session(file), feeds)
        times = timing.interleaved(calls, rounds)
    found: Point = {}
    for ratio, side in sides.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            side(**batch)
        found[str(ratio)] = {
            "flops": counter.get_total_flops(),
            "parameters": sum(p.numel() for p in side.parameters()),
            **{f"{where} ms": times[f"{where} {ratio}"]["least"] for where in ("eager", "ort")},
        }
    return found


def _run(made: Any, feeds: Mapping[str, Any]) -> Any:
    return made.run([made.get_outputs()[0].name], dict(feeds))


def main() -> None:
    """Measure what is not there yet, and print all."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments = parser.parse_args()
    timing.quiet_on_one_thread()
    results = Results("pruned_speed", again=arguments.again)
    table = Table(title="One thread: a model over what is left of it", title_justify="left")
    for heading in ("model", "cut", "flops", "parameters", "eager ms", "times less", "ORT ms", "times less"):
        table.add_column(heading, justify="right")
    for name in arguments.models:
        configuration = {"model": name, "ratios": RATIOS, "rounds": arguments.rounds}
        with Console(stderr=True).status(f"Measuring {name}"):
            point = results.point(configuration, functools.partial(measure, name, arguments.rounds))
        whole = point["0.0"]
        for ratio, own in point.items():
            less = {where: whole[f"{where} ms"] / own[f"{where} ms"] for where in ("eager", "ort")}
            cells = [f"{whole[what] / own[what]:.2f}" for what in ("flops", "parameters")]
            times = [f"{own['eager ms']:.2f}", f"{less['eager']:.2f}", f"{own['ort ms']:.2f}", f"{less['ort']:.2f}"]
            table.add_row(name, f"{float(ratio):.0%}", *cells, *times)
        table.add_section()
    Console(width=100).print(table)
    print(f"Asked for: {TARGET} times less CPU time of MiniLM at 50 %, op by op.")


if __name__ == "__main__":
    main()
