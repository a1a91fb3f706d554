"""Masks from scores: the largest of each row stay, of equal ones the first, and scores take the mask's gradient."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dwindle.runtime.ops.catalog import LIBRARY
from dwindle.runtime.ops.keep_top import KEEP_TOP

assert LIBRARY is not None


@given(rows=st.integers(1, 3), n=st.integers(1, 9), k=st.integers(-1, 11), seed=st.integers(0, 99))
def test_the_selection_is_the_reference(rows: int, n: int, k: int, seed: int) -> None:
    scores = torch.randint(-2, 3, (rows, n), generator=torch.Generator().manual_seed(seed)).float()  # with equal ones
    stay = torch.tensor(k)
    expected = KEEP_TOP.reference(scores, stay)
    assert KEEP_TOP.explain(scores, stay)[0] == "cpu selection"
    assert torch.equal(KEEP_TOP(scores, stay), expected)
    assert expected.sum(-1).tolist() == [float(min(max(k, 0), n))] * rows


def test_of_equal_scores_the_first_stay() -> None:
    mask = KEEP_TOP.overload(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]), torch.tensor(3))
    assert mask.tolist() == [1, 1, 1, 0, 0]


def test_scores_take_the_gradient_of_their_mask() -> None:
    scores = torch.randn(6, requires_grad=True)
    worth = torch.arange(6.0)

    def gradient(stay: int) -> Tensor:
        (found,) = torch.autograd.grad((KEEP_TOP.overload(scores, torch.tensor(stay)) * worth).sum(), scores)
        return found

    assert torch.equal(gradient(2), worth)
    assert torch.equal(gradient(0), worth)
