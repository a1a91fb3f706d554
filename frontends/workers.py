"""Blocks trained in processes of their own, each with a copy of what it needs; the result is the same bit for bit.

A task travels as bytes of plain data and tensors, so nothing of a model's code is needed where it is done. Every
process computes with as many threads as this one, because sums of another number of threads may round otherwise.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.block_training import Example, Training, learn
from ..passes.blocks import Subgraph
from ..runtime.contract import Contract
from ..runtime.errors import DistillationError, DwindleError
from ..runtime.graph_json import graph_from_json, graph_to_json
from ..runtime.program import Program
from ..runtime.store import Store

Learned = tuple[str, float, float, dict[str, Tensor]]
"""(path, error before, error after, parameters as trained)."""


class Workers:
    """Up to `processes` blocks in training at once, each in a fresh process; no more are held."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pending = set[Future[bytes]]()
        self._running = set[subprocess.Popen[bytes]]()
        self._threads = ThreadPoolExecutor(processes)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self._running):
            process.kill()
        self._threads.shutdown(cancel_futures=True)

    def give(self, task: bytes) -> Iterator[Learned]:
        """Begin another block; yields those that had to be over first."""
        yield from self._done(self.processes - 1)
        self._pending.add(self._threads.submit(self._elsewhere, task))

    def rest(self) -> Iterator[Learned]:
        """All that are still under way."""
        yield from self._done(0)

    def _done(self, most: int) -> Iterator[Learned]:
        while len(self._pending) > most:
            over, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in over:
                found = _loaded(future.result())
                if "error" in found:
                    raise DistillationError(**found["error"])
                yield found["path"], found["before"], found["after"], found["tensors"]

    def _elsewhere(self, task: bytes) -> bytes:
        """`work` in a process of its own, which imports this module and nothing of the caller's."""
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        pipe = subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe) as process:
            self._running.add(process)
            result, said = process.communicate(task)
            self._running.discard(process)
        if process.returncode:
            raise DistillationError(
                "a process that trained a block has died",
                required="room for one more block in memory, for each process",
                found=f"code {process.returncode}: {said.decode(errors='replace').strip().rpartition(chr(10))[2]}",
                cure="processes=1, or fewer batches",
            )
        return result


def serve() -> None:
    """One task from standard input to standard output, on which nothing else may write."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        result = work(sys.stdin.buffer.read())
    except DwindleError as error:
        told = {name: None if value is None else str(value) for name, value in vars(error).items()}
        result = _dumped({"error": {name: told[name] for name in ("message", "required", "found", "cure")}})
    with out:
        out.write(result)


def task_of(part: Subgraph, own: list[str], plain: list[str], examples: list[Example], training: Training) -> bytes:
    """What another process needs to train a block. own: parameters to train; plain: those of them without decay."""
    tensors = part.reads()
    home = next(t.device for t in tensors.values())
    return _dumped(
        {
            "path": part.path,
            "graph": graph_to_json(part.graph(), home),
            "home": str(home),
            "tensors": {name: t.detach() for name, t in tensors.items()},
            "own": own,
            "plain": plain,
            "examples": [(example.given, example.wanted, example.kept) for example in examples],
            "training": vars(training),
            "threads": torch.get_num_threads(),
        }
    )


def work(task: bytes) -> bytes:
    """Train one block, and give what has become of its parameters."""
    given = _loaded(task)
    torch.set_num_threads(given["threads"])
    store = Store()
    for name, tensor in given["tensors"].items():
        store.put(name, nn.Parameter(tensor) if name in given["own"] else tensor)
    graph = graph_from_json(given["graph"], torch.device(given["home"]), tuple(given["tensors"]))
    block = Program.of(graph, store, Contract(False, {}, (), {})).module
    own = {name: store.get(name) for name in given["own"]}
    parameters = {name: p for name, p in own.items() if isinstance(p, nn.Parameter)}
    examples = [Example(*example) for example in given["examples"]]
    before, after = learn(block, parameters, examples, Training(**given["training"]), given["plain"])
    tensors = {name: p.detach() for name, p in parameters.items()}
    return _dumped({"path": given["path"], "before": before, "after": after, "tensors": tensors})


def _dumped(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)
