"""Work in another process, so that what hangs, dies or keeps memory is counted and does no more harm.

    child = Child(measure, cpu_seconds=100)
    for point in child("bert"): ...

A child is used again until it fails or has done EACH pieces of work. The limit is on its CPU time, which other work on
the machine does not shorten.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[[str], Iterable[Any]]

EACH = 20
_CONTEXT = multiprocessing.get_context("spawn")


class Child:
    """Calls `work(name)` elsewhere and yields what it yields, as it does.

    Raises TimeoutError after `cpu_seconds`, ChildProcessError where the process dies.
    """

    def __init__(self, work: Work, cpu_seconds: int) -> None:
        self.work, self.cpu_seconds, self.left = work, cpu_seconds, 0
        self.process: Any = None
        self.pipe: Any = None

    def __call__(self, name: str) -> Iterator[Any]:
        """What the work on `name` yields."""
        if self.left == 0:
            self._start()
        self.left -= 1
        self.pipe.send(name)
        try:
            while True:
                more, value = self.pipe.recv()
                if not more:
                    return
                yield value
        except EOFError:
            self.left = 0
            self.process.join()
            code = self.process.exitcode
            if code == -signal.SIGXCPU:
                raise TimeoutError(f"no result after {self.cpu_seconds} s of CPU time") from None
            raise ChildProcessError(f"its process ended with code {code}") from None

    def _start(self) -> None:
        if self.process is not None:
            self.process.kill()
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, self.work, self.cpu_seconds), daemon=True)
        self.process.start()
        theirs.close()
        self.left = EACH


def _serve(pipe: Connection, work: Work, cpu_seconds: int) -> None:
    while True:
        name = pipe.recv()
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        for value in work(name):
            pipe.send((True, value))
        pipe.send((False, None))
