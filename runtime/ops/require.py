"""The value that a captured graph has been decided by: a model that branches on it has left the other side untraced.

A check computes nothing. On real tensors it reads the value and raises CaptureError; what traces it, such as
torch.compile, gets an assertion that runs with the rest, with the same words.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from ..errors import CaptureError
from .operator import Kernel, Operator

_CHECKED = ContextVar("checked", default=True)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Inside, values may be others: a graph is run on made-up numbers, and its results go to nobody."""
    token = _CHECKED.set(False)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def _refusal(required: bool, what: str) -> CaptureError:
    return CaptureError(
        f"the model goes another way for this input than the one that was captured, at {what}",
        required=f"{required} there, as on the example inputs",
        found=not required,
        cure="call it with inputs that go the same way, or compress the model with inputs= that go this one",
    )


def _check(value: Tensor, required: bool, what: str) -> None:
    if _CHECKED.get() and bool(value) != required:
        raise _refusal(required, what)


def _reference(value: Tensor, required: bool, what: str) -> None:
    torch._assert_async(value.ne(0).eq(required), _plain(str(_refusal(required, what))))


def _plain(text: str) -> str:
    """In one line that may stand between quotes: inductor writes it into C++ as it is (torch 2.13)."""
    return re.sub(r'["\\]|[^ -~]', "'", re.sub(r"\s+", " ", text))


REQUIRE = Operator(
    name="require",
    schema="(Tensor value, bool required, str what) -> ()",
    reference=_reference,
    kernels=(Kernel(name="check", serves=lambda *args: None, run=_check),),
)
