"""What ONNX Runtime answers, beside the compressed torch model and the original. Without the extra `onnx` this can be
imported, and `answers` cannot be called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import first
from torch import Tensor, nn

from dwindle.runtime.onnx import check
from dwindle.runtime.onnx.export import output_names

# ORT and torch round the same numbers to the same codes, but for values at the edge of two: so their errors against
# the original are alike, not equal. Largest ratio measured 1.00002; a zero point taken off twice gave 60.
ALIKE = 1.5
# Of the compression's own error: how far such flips take the two apart. Largest measured 4e-4, and .055 where
# MatMulNBits rounds once more.
APART = 0.5


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def answers(small: Any, inputs: dict[str, Tensor], folder: Path) -> tuple[Tensor, Tensor]:
    """The first output of the compressed model, and of its export, which is `model.onnx` in the folder."""
    path = small.export_onnx(folder / "model.onnx")
    found = check.run(check.session(path), list(inputs), list(inputs.values()))
    with torch.no_grad():
        (contract,) = [p.contract for p in small.variants.values()]
        return first(small(**inputs)), found[output_names(contract)[0]]


def hold(small: Any, model: nn.Module, inputs: dict[str, Tensor], folder: Path) -> None:
    """ORT is as near the original as the compressed torch model is, and nearer to that."""
    torch_answer, ort_answer = answers(small, inputs, folder)
    with torch.no_grad():
        original = first(model(**inputs))
    error = relative(torch_answer, original)
    assert relative(ort_answer, original) <= ALIKE * error
    assert (ort_answer - torch_answer).norm() <= APART * error * original.norm()
