"""Latency of several forms of one model: their calls take turns, so that what the machine does hits all alike.

    p50, p95    percentiles of wall time a call, in seconds, after one call that is timed apart as `first`
                (compilation, where there is any)
    speedup     p50 of the first contender / p50

Inputs are the example's, repeated or cut to the batch and sequence asked for; what they hold does not matter.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from ..passes.progress import Advance
from ..runtime.errors import DwindleError
from .capture import guess_dynamic
from .timing import in_turns, machine, quantile, resized

MOST_RUNS = 500
SECONDS = 1.5  # for each contender at each shape

Contenders = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contender at one shape. sequence: None for models without one; failure: why there are no figures."""

    contender: str
    batch: int
    sequence: int | None
    first: float
    p50: float | None = None
    p95: float | None = None
    runs: int = 0
    failure: str = ""


@dataclass(frozen=True)
class Bench:
    """Timings of all contenders at all shapes; print it with rich, or take `to_json()`."""

    timings: tuple[Timing, ...]
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        return {"machine": self.machine, "timings": [asdict(t) for t in self.timings]}

    def of(self, contender: str, batch: int, sequence: int | None = None) -> Timing:
        """One timing. Raises KeyError."""
        for t in self.timings:
            if (t.contender, t.batch) == (contender, batch) and sequence in (None, t.sequence):
                return t
        raise KeyError((contender, batch, sequence))

    def speedup(self, timing: Timing) -> float | None:
        """How many times faster than the first contender at the same shape."""
        base = next(t for t in self.timings if (t.batch, t.sequence) == (timing.batch, timing.sequence))
        return base.p50 / timing.p50 if base.p50 and timing.p50 else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sequences = any(t.sequence is not None for t in self.timings)
        table = Table(box=box.SIMPLE_HEAD, title="Latency, ms", title_justify="left", title_style="bold")
        table.add_column("batch", justify="right")
        if sequences:
            table.add_column("tokens", justify="right")
        table.add_column("", overflow="fold")
        for name in ("p50", "p95", "speedup", "first, s"):
            table.add_column(name, justify="right", no_wrap=True)
        for i, t in enumerate(self.timings):
            last = i + 1 == len(self.timings) or _shape(self.timings[i + 1]) != _shape(t)
            where = [str(t.batch), *([str(t.sequence)] if sequences else [])]
            times = ["" if x is None else f"{x * 1e3:.2f}" for x in (t.p50, t.p95)]
            gain = self.speedup(t)
            name = f"{t.contender}: {t.failure}" if t.failure else t.contender
            table.add_row(*where, name, *times, "" if gain is None else f"{gain:.2f}x", f"{t.first:.1f}")
            if last:
                table.add_section()
        yield table
        yield f"[dim]{self.machine}[/dim]"


def bench(
    contenders: Contenders,
    arguments: Mapping[str, Any],
    *,
    batches: Sequence[int] = (1, 8),
    sequences: Sequence[int | None] = (None,),
    seconds: float = SECONDS,
    may_fail: Sequence[str] = (),
    progress: Advance | None = None,
) -> Bench:
    """Time the contenders, each called with keyword arguments, at every batch and sequence.

    arguments: an example call; sequences are left out where it has no token-like input
    may_fail: contenders whose failure is a figure too, such as a compiler that is not installed
    """
    named = guess_dynamic(arguments)[0]
    if not any("sequence" in name for dims in named.values() for name in dims.values()):
        sequences = (None,)
    shapes = [(batch, sequence) for batch in batches for sequence in sequences]
    timings: list[Timing] = []
    where = machine()  # before the timing, which is load too
    for done, (batch, sequence) in enumerate(shapes):
        if progress is not None:
            progress(done, len(shapes))
        call = shaped(arguments, batch, sequence)
        timings += _at(contenders, call, batch, sequence or _tokens(named, call), seconds, may_fail)
    return Bench(tuple(timings), where)


def shaped(arguments: Mapping[str, Any], batch: int, sequence: int | None) -> dict[str, Any]:
    """The arguments with other sizes: tensors are repeated, then cut. None keeps the sequence as it is."""
    named = guess_dynamic(arguments)[0]
    result = dict(arguments)
    for argument, dims in named.items():
        for dim, name in dims.items():
            size = batch if name == "batch" else sequence
            if size is not None:
                result[argument] = resized(result[argument], dim, size)
    return result


def _at(
    contenders: Contenders,
    call: Mapping[str, Any],
    batch: int,
    sequence: int | None,
    seconds: float,
    may_fail: Sequence[str],
) -> list[Timing]:
    first: dict[str, float] = {}
    failures: dict[str, str] = {}
    with torch.no_grad():
        for name, contender in contenders.items():
            start = time.perf_counter()
            try:
                contender(**call)
            except Exception as error:
                if name not in may_fail and isinstance(error, DwindleError):
                    raise
                text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
                if name not in may_fail:
                    shape = f"batch {batch}" + ("" if sequence is None else f", {sequence} tokens")
                    raise DwindleError(f"{name} cannot be run at {shape}", found=text) from error
                failures[name] = text
            first[name] = time.perf_counter() - start
    sound = {n: functools.partial(c, **call) for n, c in contenders.items() if n not in failures}
    times = in_turns(sound, seconds, MOST_RUNS)
    shape_of: dict[str, Any] = {"batch": batch, "sequence": sequence}
    return [
        Timing(contender=name, **shape_of, first=first[name], failure=failures[name])
        if name in failures
        else Timing(
            contender=name,
            **shape_of,
            first=first[name],
            p50=quantile(times[name], 0.5),
            p95=quantile(times[name], 0.95),
            runs=len(times[name]),
        )
        for name in contenders
    ]


def _tokens(named: Mapping[str, Mapping[int, str]], call: Mapping[str, Any]) -> int | None:
    for argument, dims in named.items():
        for dim, name in dims.items():
            if name == "sequence":
                return int(call[argument].shape[dim])
    return None


def _shape(timing: Timing) -> tuple[int, int | None]:
    return timing.batch, timing.sequence
