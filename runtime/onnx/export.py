"""A compressed model as one ONNX file for ONNX Runtime, checked before anybody sees it.

    Program -> our operators translated (`translations`) -> torch.export -> torch.onnx -> fast spellings (`forms`)
            -> written under another name -> run against the Program (`check`) -> renamed

So a file that exists is whole and computes what the Program computes, at two shapes (see `check` for how near).
ORT's 2- to 8-bit weight-only kernel rounds activations to 8 bits by blocks, in either precision.
On CPUs without VNNI (before Cascade Lake and Zen 4), integer products of ORT's AVX2 kernels may saturate.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import Dim

from ..contract import Contract, bind_call
from ..errors import ExportError, MissingDependencyError
from ..files import require_free
from ..model import GraphModel
from ..program import Program, checks
from ..structure import Structure
from .check import PROVIDERS, Probe, check
from .example import batches, smaller

Precision = Literal["accurate", "fast"]

OPSET = 23  # the first with Attention; QuantizeLinear by blocks is of 21
PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
FOLDED_ELEMENTS = 1024  # larger packed weights stay packed in the file; a session unpacks them on loading
EMBEDDED_BYTES = 1 << 30  # above this weights lie in a second file; one protobuf holds at most 2 GiB


def export_onnx(
    model: GraphModel,
    path: str | Path,
    *,
    provider: str = "cpu",
    precision: Precision = "accurate",
    inputs: Mapping[str, Any] | None = None,
    opset: int = OPSET,
) -> Path:
    """Write `model` to `path` for ONNX Runtime, and return the path.

    provider: the execution provider that the graph is spelled for.
    precision: "accurate" keeps the model's own quantisation (per token, if so it was compressed); "fast" takes
        one scale for a whole activation wherever one a token costs time. Without dynamic quantisation they
        are the same.
    inputs: a call's arguments by name, to choose the variant and to check the file on; made up if absent.
    Weights above 1 GiB go to `<path>.data`. Raises ExportError, and then nothing is left at `path`.
    """
    path = Path(path)
    _require(provider, precision, path, model)
    program, given = _variant(model, inputs)
    _require_checked(program)
    program.infer()
    examples = [given, smaller(program.contract, given)] if given else batches(program)
    recipe = getattr(model, "recipe", {})
    with _quiet(), tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        built = _build(program, precision, opset)
        probe = Probe.write(built, Path(folder) / "probe.onnx")
        written = _write(built, Path(folder) / path.name, _properties(provider, precision, recipe))
        check(written, probe, program, output_names(program.contract), examples)
        for part in (_data(written), written):  # the model is last to appear
            if part.exists():
                part.rename(path.parent / part.name)
    return path


def require_packages() -> None:
    """Raise MissingDependencyError unless all that an export needs is installed; nothing is imported."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "onnx", "exporting to ONNX")


def require_dtypes(dtypes: Collection[torch.dtype]) -> None:
    """Raise ExportError where a model has tensors that ONNX Runtime's kernels, and numpy, do not take."""
    if torch.bfloat16 in dtypes:
        raise ExportError(
            "the model has tensors of a dtype that cannot be exported",
            required="float32, float16 or float64",
            found="bfloat16",
            cure="compress model.float()",
        )


def _require(provider: str, precision: str, path: Path, model: GraphModel) -> None:
    if provider not in PROVIDERS:
        raise ExportError("no such provider", required=" or ".join(PROVIDERS), found=repr(provider))
    if precision not in ("accurate", "fast"):
        raise ExportError("no such precision", required="'accurate' or 'fast'", found=repr(precision))
    if model.device.type != "cpu":
        raise ExportError("the model is elsewhere", required="on the CPU", found=model.device, cure="model.cpu()")
    require_packages()
    stored = {tensor.dtype for tensor in [*model.parameters(), *model.buffers()]}
    require_dtypes(stored | {getattr(torch, i.dtype) for p in model.variants.values() for i in p.contract.inputs})
    if not path.parent.is_dir():
        raise ExportError("no folder to write to", required="an existing folder", found=path.parent)
    for taken in (path, _data(path)):
        require_free(taken, ExportError)


def _require_checked(program: Program) -> None:
    """ONNX has no operator that stops: where a value goes another way, the file would give what the model does not."""
    lines = [str(node.args[2]) for node in program.graph.nodes if checks(node)]
    if lines:
        raise ExportError(
            "the graph holds for one side of a branch on a value, which an ONNX file cannot check",
            required="a model that does not branch on values",
            found="\n    ".join(["", *lines]),
            cure="make these lines independent of tensor values, or use the artifact, which checks them",
        )


def _data(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _variant(model: GraphModel, inputs: Mapping[str, Any] | None) -> tuple[Program, list[Tensor] | None]:
    found = [program for program in model.variants.values() if not program.contract.training]
    if inputs is not None:
        structure, tensors = bind_call(model.signature, (), dict(inputs))
        # A variant with these tensors will do whatever its constants (use_cache, return_dict) are.
        names = list(_leaves(structure, ""))
        alike = [p for p in found if [i.name for i in p.contract.inputs] == names]
        program = alike[0] if alike else model.program(False, structure, lambda: model.signature.bind((), inputs))
        program.contract.check(tensors)
        return program, tensors
    if len(found) != 1:
        raise ExportError(
            "which variant of the model?",
            required="one",
            found="\n    ".join(["", *(p.contract.describe() for p in found)]) if found else "none for inference",
            cure="pass inputs=, the arguments of a call",
        )
    return found[0], None


def output_names(contract: Contract) -> list[str]:
    """Names of the flat outputs, from the structure of the result: "logits", "hidden_states.0", "output"."""
    plain = [name or "output" for name in _leaves(contract.output, "")]
    taken, names = {i.name for i in contract.inputs}, []
    for name in plain:
        if name in taken:
            name = f"{name}_output"
            while name in taken or name in plain:
                name += "_"
        taken.add(name)
        names.append(name)
    return names


def _leaves(structure: Structure, prefix: str) -> Iterator[str]:
    if structure["kind"] == "tensor":
        yield prefix
    items = structure.get("items", {})
    top = "" if isinstance(items, dict) else "output"
    for name, part in items.items() if isinstance(items, dict) else enumerate(items):
        yield from _leaves(part, f"{prefix or top}.{name}".lstrip("."))


def _build(program: Program, precision: str, opset: int) -> Any:
    """The onnx_ir model."""
    from onnxscript import optimizer

    from .forms import rewrite
    from .translations import translate

    contract = program.contract
    names = [i.name for i in contract.inputs]
    outputs = output_names(contract)
    module = translate(program, precision).eval()
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module, tuple(batches(program)[0]), dynamic_shapes=_dynamic(contract), strict=False
            )
            onnx_program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=outputs,
                optimize=False,  # its fusions give a RotaryEmbedding that ORT 1.31 refuses
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds; the first line says what
        raise ExportError(
            "torch cannot export the graph",
            required="operators that torch.onnx knows",
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
            cure="report this with the model's config",
        ) from error
    assert onnx_program is not None
    model = onnx_program.model
    optimizer.optimize(model, input_size_limit=FOLDED_ELEMENTS)
    _name_dimensions(model, contract)
    rewrite(model)
    return model


def _dynamic(contract: Contract) -> tuple[dict[int, Any], ...]:
    dims: dict[str, Any] = {}
    for i in contract.inputs:
        for name in i.shape:
            if isinstance(name, str) and name not in dims:
                high = contract.limits.get(name, (1, None))[1]
                dims[name] = Dim(name, max=high) if name.isidentifier() else Dim.AUTO
    return tuple({d: dims[s] for d, s in enumerate(i.shape) if isinstance(s, str)} for i in contract.inputs)


def _name_dimensions(model: Any, contract: Contract) -> None:
    """torch's symbols (s43) -> the contract's names (batch), everywhere."""
    import onnx_ir as ir

    given = {i.name: i.shape for i in contract.inputs}
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim, name in zip(value.shape, given[value.name], strict=True):
            if isinstance(dim, ir.SymbolicDim) and isinstance(name, str):
                names[str(dim.value)] = name
            elif isinstance(name, str):
                raise ExportError(f"dimension {name!r} of {value.name!r} became fixed", required="any", found=dim)
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [names.get(str(d.value), d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape(dims)


def _properties(provider: str, precision: str, recipe: Mapping[str, Any]) -> dict[str, str]:
    return {
        "dwindle.version": importlib.metadata.version("dwindle"),
        "dwindle.provider": provider,
        "dwindle.precision": precision,
        "dwindle.recipe": json.dumps(dict(recipe), default=str),
    }


def _write(model: Any, path: Path, properties: Mapping[str, str]) -> Path:
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)  # torch notes lines and paths of whoever exported
    model.metadata_props.update(properties)

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    outside = size > EMBEDDED_BYTES
    ir.save(model, path, external_data=_data(path).name if outside else None)
    onnx.checker.check_model(str(path))
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own deprecations and of absent torchvision; levels are put back."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    levels = [(logger, logger.level) for logger in (*loggers, registration)]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
