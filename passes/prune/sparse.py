"""Zeros in weights that keep their shape: which numbers of a matrix stay, by their scores. Pure functions.

    unstructured     the largest of a matrix, or of all matrices together
    N x M            blocks of N rows and M columns, by the mean of their scores
    N:M              of every M consecutive inputs of a row the N largest

A matrix is (outputs, inputs): a convolution's inputs are its channels times its kernel, channels last, as memory for
2:4 kernels has them. l1 is |w|; snip_momentum is sum_t 0.9^(T-t) |w_t g_t| (Lee et al. 2019, arXiv 1810.02340,
gathered over steps as Neural Compressor does).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...runtime.errors import RecipeError
from ...runtime.ops.keep_top import largest

SparseScore = Literal["l1", "movement", "snip_momentum"]
MOMENTUM = 0.9
MOST = 0.98  # of one matrix that goes where all are chosen from together


@dataclass(frozen=True)
class Pattern:
    """unstructured: n = m = 1; block: n rows, m columns; n:m: n of every m inputs stay."""

    kind: Literal["unstructured", "block", "n:m"] = "unstructured"
    n: int = 1
    m: int = 1

    @staticmethod
    def parse(text: str) -> Pattern:
        """From "unstructured", "4x1" or "2:4". Raises RecipeError."""
        if text == "unstructured":
            return Pattern()
        found = re.fullmatch(r"(\d+)([x:])(\d+)", text)
        if found is not None:
            n, m = int(found[1]), int(found[3])
            if found[2] == "x" and n and m:
                return Pattern("block", n, m)
            if 0 < n < m:
                return Pattern("n:m", n, m)
        raise RecipeError(
            "a pattern of zeros",
            required="'unstructured', blocks of rows x columns such as '4x1', or N of M such as '2:4'",
            found=text,
        )

    def __str__(self) -> str:
        return (
            "unstructured" if self.kind == "unstructured" else f"{self.n}{'x' if self.kind == 'block' else ':'}{self.m}"
        )

    def misfit(self, rows: int, columns: int) -> str:
        """Why a matrix cannot have it; empty where it can."""
        if self.kind == "block" and (rows % self.n or columns % self.m):
            return f"{rows} x {columns} is not made of blocks of {self.n} x {self.m}"
        return f"a row of {columns} is not made of {self.m}s" if self.kind == "n:m" and columns % self.m else ""

    def units(self, elements: Tensor) -> Tensor:
        """Scores of what stays or goes as one: (rows / n, columns / m) of blocks, else (rows, columns) as they are."""
        if self.kind != "block":
            return elements
        rows, columns = elements.shape
        return elements.reshape(rows // self.n, self.n, columns // self.m, self.m).mean((1, 3))

    def spread(self, units: Tensor) -> Tensor:
        """(rows, columns) from (rows / n, columns / m): every element of a block as its block."""
        return units.repeat_interleave(self.n, 0).repeat_interleave(self.m, 1) if self.kind == "block" else units

    def grid(self, units: Tensor) -> Tensor:
        """Units in rows of those that are chosen from together: all in one, or each M inputs."""
        return units.reshape(-1, self.m) if self.kind == "n:m" else units.reshape(1, -1)

    def stay(self, units: int, ratio: float) -> int:
        """How many of a row of the grid stay when `ratio` of its `units` go; of N:M never fewer than N."""
        left = math.ceil(units * (1 - ratio) - 1e-9)
        return max(left, self.n) if self.kind == "n:m" else max(left, 1)


UNSTRUCTURED = Pattern()


def as_matrix(weight: Tensor, *, transposed: bool) -> Tensor:
    """(outputs, inputs), a view where it can be; of a convolution with its channels last."""
    if weight.dim() > 2:
        return weight.movedim(1, -1).reshape(weight.shape[0], -1)
    return weight.t() if transposed else weight


def as_weight(matrix: Tensor, shape: Sequence[int], *, transposed: bool) -> Tensor:
    """Inverse of `as_matrix`; shape: the weight's."""
    if len(shape) > 2:
        return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return matrix.t() if transposed else matrix


def each(scores: Sequence[Tensor], patterns: Sequence[Pattern], ratio: float) -> list[Tensor]:
    """bool masks of units: each matrix gives its own share."""
    masks = []
    for units, pattern in zip(scores, patterns, strict=True):
        grid = pattern.grid(units)
        masks.append(largest(grid, pattern.stay(grid.shape[-1], ratio)).reshape(units.shape))
    return masks


def together(scores: Sequence[Tensor], patterns: Sequence[Pattern], ratio: float) -> list[Tensor]:
    """bool masks of units: those with the least scores of all matrices go, at most MOST of one.

    N:M has a number of zeros of its own in every matrix, so it is `each`.
    """
    if any(p.kind == "n:m" for p in patterns):
        return each(scores, patterns, ratio)
    sizes = [s.numel() * p.n * p.m for s, p in zip(scores, patterns, strict=True)]
    goal, capped = ratio * sum(sizes), dict[int, Tensor]()
    while True:
        free = [i for i in range(len(scores)) if i not in capped]
        gone = sum(int((~mask).sum()) * patterns[i].n * patterns[i].m for i, mask in capped.items())
        left = sum(sizes[i] for i in free)
        share = (goal - gone) / left if left else 0.0
        masks = _least(scores, free, min(max(share, 0.0), 1.0))
        over = {i: mask for i, mask in masks.items() if float((~mask).float().mean()) > MOST}
        if not over:
            return [capped[i] if i in capped else masks[i] for i in range(len(scores))]
        for i in over:
            n = scores[i].numel()
            capped[i] = largest(scores[i].reshape(1, -1), max(1, n - math.floor(n * MOST))).reshape(scores[i].shape)


def _least(scores: Sequence[Tensor], free: Sequence[int], share: float) -> dict[int, Tensor]:
    """Of the matrices `free` together, `share` of all units go, the least first."""
    if not free:
        return {}
    flat = torch.cat([scores[i].flatten() for i in free])
    mask = largest(flat.reshape(1, -1), len(flat) - math.floor(len(flat) * share + 1e-9)).flatten()
    pieces = torch.split(mask, [scores[i].numel() for i in free])
    return {i: piece.reshape(scores[i].shape) for i, piece in zip(free, pieces, strict=True)}
