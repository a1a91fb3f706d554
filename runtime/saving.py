"""Writing an artifact: a folder that `artifact.load` reads, complete or not there at all.

    manifest.json         versions, digests, how each tensor is stored, plan, recipe, certificate, log, graphs
    weights.safetensors   every stored tensor once, a QTensor as <name>.codes, .scale and .zero_point; where zeros are
                          left out, <name>.values and .mask or .places, see `sparse_storage`
    config.json           the model's config, where it has one that gives plain data

Numbers that JSON has no word for are written {"$float": "inf"}. The manifest ends with the digest of its own
contents, against damage; it is no signature.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import ArtifactError
from .files import appearing
from .graph_json import graph_to_json
from .qtensor import QTensor
from .sparse_storage import Form, forms_of, nbytes
from .store import Store

if TYPE_CHECKING:
    from .compressed import Compressed

# Raised by one when an older dwindle could no longer read what is written. 2: zeros are left out, and the certificate
# counts them; 3: the plan says how weights were rounded. A model without is written as 1. What a file has is read by
# what its entries say.
FORMAT = 3
MANIFEST, WEIGHTS, CONFIG = "manifest.json", "weights.safetensors", "config.json"

# Widest line of a manifest: most nodes of a graph fit.
WIDTH = 200


def save(model: Compressed, path: Path) -> Path:
    """Write `model` to the new folder `path`, and missing folders above it; the folder appears whole or not at all.

    Raises ArtifactError if `path` exists, or where a graph, tensor, recipe or config cannot be written.
    """
    tensors = _Tensors(model.store, model.plan.patterns)
    with appearing(path) as draft:
        draft.mkdir()
        manifest = describe(model, tensors.entries)
        config = _config(model)
        _write_weights(tensors.values, draft / WEIGHTS)
        if config is not None:
            (draft / CONFIG).write_text(lay_out(config) + "\n", encoding="utf-8")
        manifest["files"] = {file.name: fingerprint(file) for file in sorted(draft.iterdir())}
        manifest["sha256"] = digest(manifest)
        (draft / MANIFEST).write_text(lay_out(manifest) + "\n", encoding="utf-8")
        # safetensors makes files that only their owner may read.
        (draft / WEIGHTS).chmod((draft / MANIFEST).stat().st_mode)
    return path


def describe(model: Compressed, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of `model` as JSON, without what is only known once the files are written."""
    home = model.device
    names = {"torch": torch.__version__, "class": type(model).__name__}
    parts = {
        "signature": model.signature.to_json(),
        "attributes": {k: v for k, v in model._attributes.items() if isinstance(v, str | int | float)},
        "recipe": model.recipe,
        "plan": model.plan.to_json(),
        "certificate": model.certificate.to_json(),
        "measured": model.measured,
        "log": [entry.to_json() for entry in model.log],
        "aliases": model.store.aliases,
        "tensors": tensors,
        "variants": [
            {"contract": program.contract.to_json(), "graph": graph_to_json(program.graph, home)}
            for program in model.variants.values()
        ],
    }
    own = importlib.metadata.version("dwindle")
    by_data = any(edit.method != "nearest" or edit.smooth is not None for edit in model.plan.quantizations)
    version = 3 if by_data else 2 if model.plan.sparsities else 1
    return {"format": version, "dwindle": own, **names, **{name: plain(part, name) for name, part in parts.items()}}


class _Tensors:
    """What a store holds, as the manifest's entries and as tensors that safetensors accepts.

    patterns: of the zeros in what has some, by name
    values: contiguous CPU tensors, no two on one storage; those of the store wherever they already are so
    """

    def __init__(self, store: Store, patterns: Mapping[str, str]) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Tensor] = {}
        self._storages: set[int] = set()
        for name, value in store.entries():
            forms = forms_of(value, patterns[name]) if name in patterns else {}
            if isinstance(value, QTensor):
                buffers = value.named_buffers()
                parts = {part: self._add(f"{name}.{part}", tensor, forms.get(part)) for part, tensor in buffers}
                scheme, shape = value.scheme.spell(), list(value.shape)
                self.entries[name] = {"kind": "qtensor", "scheme": scheme, "shape": shape, "parts": parts}
            else:
                self.entries[name] = {"kind": _kind(store, name, value), **self._add(name, value, forms.get(""))}

    def _add(self, name: str, tensor: Tensor, form: Form | None) -> dict[str, Any]:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
            raise ArtifactError(
                f"tensor {name!r} cannot be saved",
                required="a dense tensor that holds values",
                found=f"{type(tensor).__name__}, {tensor.layout}, on {tensor.device}",
                cure="gather or load the model's weights before compressing it",
            )
        tensor = tensor.detach()
        order = memory_order(tensor)
        value = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        entry = {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "bytes": value.numel() * value.element_size() if form is None else nbytes(form),
        }
        if form is None:
            self._hold(name, value)
        else:
            entry["stored"] = form.to_json()
            for part, stored in form.pack(value).items():
                self._hold(f"{name}.{part}", stored)
        return entry if order is None else {**entry, "order": order}

    def _hold(self, name: str, value: Tensor) -> None:
        if value.untyped_storage().data_ptr() in self._storages:
            value = value.clone()
        self._storages.add(value.untyped_storage().data_ptr())
        self.values[name] = value


def memory_order(tensor: Tensor) -> list[int] | None:
    """Dimensions from outer to inner where they lie in memory permuted and without gaps (channels-last), else None."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    return order if tensor.permute(order).is_contiguous() else None


def in_order(tensor: Tensor, order: list[int]) -> Tensor:
    """A copy with the same values whose `memory_order` is `order`."""
    inverse = [order.index(d) for d in range(tensor.dim())]
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def plain(value: Any, where: str) -> Any:
    """`value` as strict JSON; `where` names it in the ArtifactError raised for what is not plain data."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"$float": str(value)}
        case list() | tuple():
            return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: plain(v, f"{where}.{key}") for key, v in value.items()}
    raise ArtifactError(
        f"{where} cannot be saved",
        required="plain data: None, bool, int, float, str, and lists and dicts (with text as keys) of them",
        found=f"{type(value).__name__} {value!r:.80}",
    )


def revive(value: Any) -> Any:
    """Inverse of `plain`, but for tuples, which stay lists."""
    match value:
        case {"$float": str(text)} if len(value) == 1:
            return float(text)
        case dict():
            return {key: revive(v) for key, v in value.items()}
        case list():
            return [revive(v) for v in value]
    return value


def lay_out(value: Any, depth: int = 0) -> str:
    """JSON text in which whatever fits on a line is on one line."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(line) + depth <= WIDTH or not value or not isinstance(value, dict | list):
        return line
    indent = "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {lay_out(v, depth + 1)}" for key, v in value.items()]
        return "{" + indent + f",{indent}".join(parts) + "\n" + " " * depth + "}"
    return "[" + indent + f",{indent}".join(lay_out(v, depth + 1) for v in value) + "\n" + " " * depth + "]"


def digest(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest's contents, without the entry that holds it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def fingerprint(file: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, read once in blocks."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _kind(store: Store, name: str, tensor: Tensor) -> str:
    if isinstance(tensor, nn.Parameter):
        return "parameter"
    owner, _, leaf = name.rpartition(".")
    return "non-persistent" if leaf in store.get_submodule(owner)._non_persistent_buffers_set else "buffer"


def _config(model: Compressed) -> Any:
    to_dict = getattr(model._attributes.get("config"), "to_dict", None)
    if to_dict is None:
        return None
    # transformers' configs number their labels; such keys become text, as in transformers' own files.
    items = {k: {str(i): x for i, x in v.items()} if isinstance(v, dict) else v for k, v in to_dict().items()}
    return plain(items, "config")


def _write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        save_file(dict(tensors), file)
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        required = "dtypes of safetensors, and room on the disk"
        raise ArtifactError("the weights cannot be written", required=required, found=error) from error
