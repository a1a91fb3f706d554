"""Running an exported model with ONNX Runtime, and how far it is from the Program it came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..program import Program

PROVIDERS = {"cpu": "CPUExecutionProvider"}

# Largest relative L2 error of an output. Float: sums in another order; measured on tests/models.py and MiniLM.
# Integers: a value at the edge of two codes may take the other when its input moves by rounding.
LIMITS = {"float": 1e-3, "accurate": 0.2, "fast": 0.35}


def session(path: Path, provider: str = "cpu") -> Any:
    """One thread, no spinning. Raises ExportError unless `provider` really serves."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    wanted = PROVIDERS[provider]
    try:
        made = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:  # ORT's errors have no common base
        raise ExportError(
            "ONNX Runtime does not load the exported model",
            required=f"a model that {wanted} runs",
            found=str(error).partition("\n")[0],
            cure=f"onnxruntime {onnxruntime.__version__} may be too old; report this with the model's config",
        ) from error
    if made.get_providers()[0] != wanted:
        raise ExportError("another provider serves", required=wanted, found=made.get_providers())
    return made


def run(made: Any, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Call a session on flat inputs, named in the contract's order."""
    feed = {name: t.detach().contiguous().numpy() for name, t in zip(names, tensors, strict=True)}
    taken = {i.name for i in made.get_inputs()}
    return [torch.from_numpy(a) for a in made.run(None, {n: v for n, v in feed.items() if n in taken})]


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """|a - e|_2 / |e|_2 over finite elements; infinite where shapes, integers or non-finite elements differ."""
    if expected.shape != actual.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual.to(expected.dtype)) else math.inf
    e, a = expected.double(), actual.double()
    finite = e.isfinite()
    # The least float stands for -inf in masked scores; squared it would be infinite.
    finite &= e.abs() < 1e30
    if not a[finite].isfinite().all():
        return math.inf
    norm, distance = float(e[finite].norm()), float((a[finite] - e[finite]).norm())
    return distance / norm if norm else distance


def check(
    path: Path, program: Program, outputs: Sequence[str], batches: Sequence[Sequence[Tensor]], limit: float
) -> float:
    """Largest error of any output over `batches`. Raises ExportError naming the first that is above `limit`."""
    made = session(path)
    names, worst = [i.name for i in program.contract.inputs], 0.0
    for tensors in batches:
        with torch.no_grad():
            expected = program.run(tensors)
        actual = run(made, names, tensors)
        for name, e, a in zip(outputs, expected, actual, strict=True):
            error = relative_error(e, a)
            worst = max(worst, error)
            if not error <= limit:
                shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in zip(names, tensors, strict=True))
                raise ExportError(
                    f"output {name!r} of the exported model differs from the compressed model's",
                    required=f"a relative error of at most {limit:g}",
                    found=f"{error:.3g} on {shapes}",
                    cure="export with precision='accurate', or report this with the model's config",
                )
    return worst
