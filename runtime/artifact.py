"""Reading an artifact, and refusing one that is damaged, newer, or asks for more than a model needs.

A file is data until it has been checked: format, digests, tensors against their entries, and every call of
every graph against the list in `graph_json`. Nothing is unpickled, and nothing is imported by name, but for the
transformers class of an output, which `structure` looks up when the model is called.
Not handled: `grow`, so a loaded model serves the variants it was saved with; the class of a config, which comes
back as plain data with attribute access (transformers reads the same config.json).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import numerics
from .certificate import Certificate
from .compressed import Compressed
from .contract import Contract, Signature
from .errors import ArtifactError
from .graph_json import dtype_named, graph_from_json
from .layout import pack
from .plan import Plan
from .program import Entry, Program
from .qtensor import QTensor
from .saving import CONFIG, FORMAT, MANIFEST, WEIGHTS, digest, fingerprint, in_order, revive
from .saving import save as save
from .scheme import Scheme
from .sparse_storage import Form, nbytes, read_form
from .store import Store
from .structure import Output, Structure


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Compressed:
    """The model that was saved in the folder `path`, on `device`: same outputs, same state_dict.

    Raises ArtifactError naming the file that is missing, damaged, newer than this version or not allowed.
    """
    folder, home = Path(path), torch.device(device)
    manifest = _read_manifest(folder)
    with _reading(folder / MANIFEST):
        _check_files(folder, manifest["files"])
        stored = {name for name, _ in _parts(manifest["tensors"])}
        graphs = [graph_from_json(variant["graph"], home, stored) for variant in manifest["variants"]]
        contracts = [_contract(variant["contract"]) for variant in manifest["variants"]]
        plan, signature = Plan.from_json(manifest["plan"]), Signature(**manifest["signature"])
        cls = Compressed.called(str(manifest["class"]), signature)
        certificate = Certificate.from_json(manifest["certificate"])
        log = tuple(Entry(**entry) for entry in manifest["log"])
    config = _read_config(folder) if CONFIG in manifest["files"] else {}
    with _reading(folder / WEIGHTS):
        mapped = _read_weights(folder / WEIGHTS, manifest["tensors"])
    tensors = {name: _place(mapped.pop(name), entry, home) for name, entry in _parts(manifest["tensors"])}
    with _reading(folder / MANIFEST):
        store = _store(manifest["tensors"], tensors)
        store.aliases.update(_aliases(manifest["aliases"], store))
        model = cls(
            store,
            plan,
            signature,
            recipe=manifest["recipe"],
            certificate=certificate,
            log=log,
            measured=manifest["measured"],
            attributes={**manifest["attributes"], **config},
        )
        for graph, contract in zip(graphs, contracts, strict=True):
            _check_fit(graph.find_nodes(op="placeholder"), contract.arguments, f"inputs of {contract.describe()}")
            _check_fit(graph.output_node().args[0], contract.output, f"outputs of {contract.describe()}")
            model.add(Program.of(graph, store, contract))
    return model


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ArtifactError(
            f"no artifact at {folder}",
            required=f"a folder with {MANIFEST} and {WEIGHTS}",
            found="no such folder" if not folder.exists() else f"no {MANIFEST}",
            cure="give the folder that save() wrote",
        )
    with _reading(file):
        manifest = json.loads(file.read_bytes())
        version = manifest["format"]
        if not isinstance(version, int) or version > FORMAT:
            raise ArtifactError(
                f"{file} is newer than this version of dwindle",
                required=f"format {FORMAT} or older",
                found=f"format {version!r}, written by dwindle {manifest.get('dwindle', '?')}",
                cure="update dwindle",
            )
        if manifest.get("sha256") != digest(manifest):
            raise _damaged(file, f"contents with sha256 {manifest.get('sha256')}", f"sha256 {digest(manifest)}")
        revived: dict[str, Any] = revive(manifest)
        return revived


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    if not {WEIGHTS} <= set(files) <= {WEIGHTS, CONFIG}:
        raise _damaged(folder / MANIFEST, f"an entry for {WEIGHTS}, perhaps {CONFIG}", f"files {list(files)}")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise _damaged(file, f"a file of {expected['bytes']} bytes", "no such file")
        # The size first: a copy that broke off is told without reading what there is.
        if file.stat().st_size != expected["bytes"]:
            raise _damaged(file, f"{expected['bytes']} bytes", f"{file.stat().st_size} bytes")
        found = fingerprint(file)
        if found != expected:
            raise _damaged(file, f"sha256 {expected['sha256']}", f"sha256 {found['sha256']}")


def _parts(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every plain tensor, by the name a graph reads it under."""
    for name, entry in entries.items():
        if entry["kind"] == "qtensor":
            yield from ((f"{name}.{part}", inner) for part, inner in entry["parts"].items())
        else:
            yield name, entry


def _form(entry: Mapping[str, Any]) -> Form | None:
    """How a tensor lies in the file; None: whole."""
    return read_form(dtype_named(entry["dtype"]), entry["shape"], entry["stored"]) if "stored" in entry else None


def _read_weights(file: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """By name, the parts of each tensor ("" of one that lies whole) as views of the mapped file, held to its entry."""
    forms = {name: _form(entry) for name, entry in _parts(entries)}
    required = {
        name: {"": (dtype_named(entry["dtype"]), tuple(entry["shape"]))} if form is None else form.parts()
        for (name, entry), form in zip(_parts(entries), forms.values(), strict=True)
    }
    with safe_open(file, framework="pt") as weights:
        expected, found = {_part_name(n, part) for n, parts in required.items() for part in parts}, set(weights.keys())
        if expected != found:
            differing = ", ".join(sorted(expected ^ found)[:5])
            raise _damaged(file, "the tensors that the manifest names", f"a difference in {differing}")
        tensors = {n: {p: weights.get_tensor(_part_name(n, p)) for p in parts} for n, parts in required.items()}
    for name, entry in _parts(entries):
        for part, (dtype, shape) in required[name].items():
            tensor = tensors[name][part]
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                has = f"{tensor.dtype} {list(tensor.shape)}"
                raise _wrong_tensor(_part_name(name, part), f"{dtype} {list(shape)}", has)
        if "order" in entry and sorted(entry["order"]) != list(range(len(entry["shape"]))):
            raise _wrong_tensor(name, f"an order of {len(entry['shape'])} dimensions", entry["order"])
        form = forms[name]
        if form is not None:
            if entry["bytes"] != nbytes(form):
                raise _wrong_tensor(name, f"{nbytes(form)} bytes", entry["bytes"])
            misfit = form.misfit(tensors[name])
            if misfit:
                raise _wrong_tensor(name, f"{entry['stored']}", misfit)
    return tensors


def _part_name(name: str, part: str) -> str:
    """Of one part of a tensor in the file."""
    return f"{name}.{part}" if part else name


def _place(parts: Mapping[str, Tensor], entry: Mapping[str, Any], home: torch.device) -> Tensor:
    """In memory of its own, on the CPU too: a mapped tensor starts anywhere, where an allocated one starts at a
    multiple of 64 bytes and kernels may round accordingly; and it would fail if the file were cut while in use.
    """
    form = _form(entry)
    tensor = parts[""] if form is None else form.unpack(parts)
    return in_order(tensor.to(home), entry["order"]) if "order" in entry else tensor.to(home, copy=form is None)


def _store(entries: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> Store:
    store = Store()
    for name, entry in entries.items():
        match entry["kind"]:
            case "qtensor":
                store.put(name, _qtensor(name, entry, tensors))
            case "parameter":
                store.put(name, nn.Parameter(tensors[name], requires_grad=False))
            case "buffer" | "non-persistent" as kind:
                store.put(name, tensors[name], persistent=kind == "buffer")
            case kind:
                raise ArtifactError(f"tensor {name!r} is of an unknown kind", found=kind, cure="update dwindle")
    return store


def _qtensor(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QTensor:
    """Put together, and held to the invariants of QTensor."""
    scheme, shape = Scheme.parse(entry["scheme"]), tuple(entry["shape"])
    scale_shape = numerics.scale_shape(shape, scheme)
    codes = pack(torch.empty((shape[0], math.prod(shape[1:])), dtype=scheme.code_dtype, device="meta"), scheme)
    required = {"codes": (codes.dtype, tuple(codes.shape)), "scale": (torch.float32, scale_shape)}
    if scheme.kind == "asymmetric":
        required["zero_point"] = (torch.float32, scale_shape)
    parts = {part: tensors[f"{name}.{part}"] for part in entry["parts"]}
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
    if required != found:
        raise _wrong_tensor(name, f"{entry['scheme']} of {list(shape)}: {required}", found)
    return QTensor(parts["codes"], parts["scale"], parts.get("zero_point"), scheme, shape)


def _aliases(aliases: Mapping[str, str], store: Store) -> dict[str, str]:
    stored = dict(store.entries())
    for alias, name in aliases.items():
        if name not in stored or alias in stored:
            raise ArtifactError(f"alias {alias!r} is wrong", required="another name of a stored tensor", found=name)
    return dict(aliases)


def _contract(data: Mapping[str, Any]) -> Contract:
    contract = Contract.from_json(data)
    for spec in contract.inputs:
        dtype_named(spec.dtype)
    if len(contract.inputs) != _count(contract.arguments) or contract.arguments["kind"] != "dict":
        raise ArtifactError("a contract contradicts itself", required="its inputs", found=contract.arguments)
    return contract


def _check_fit(nodes: Any, structure: Structure, what: str) -> None:
    if len(nodes) != _count(structure):
        raise ArtifactError(f"a graph does not fit its contract: {what}", required=_count(structure), found=len(nodes))


def _count(structure: Structure) -> int:
    """Tensors of a structure of known kinds."""
    match structure:
        case {"kind": "tensor"}:
            return 1
        case {"kind": "constant", "value": None | bool() | int() | float() | str()}:
            return 0
        case {"kind": "tuple" | "list", "items": list(items)}:
            return sum(_count(item) for item in items)
        case {"kind": "dict" | "output" | "namedtuple", "class": str(), "items": dict(items)}:
            return sum(_count(item) for item in items.values())
    raise ArtifactError("a contract has an unknown structure", found=f"{structure!r:.100}", cure="update dwindle")


def _read_config(folder: Path) -> dict[str, Any]:
    with _reading(folder / CONFIG):
        return {"config": Output(revive(json.loads((folder / CONFIG).read_bytes())))}


def _damaged(file: Path, required: object, found: object) -> ArtifactError:
    cure = "copy or save the artifact again"
    return ArtifactError(f"{file} is damaged or was changed", required=required, found=found, cure=cure)


def _wrong_tensor(name: str, required: object, found: object) -> ArtifactError:
    return ArtifactError(f"tensor {name!r} is not as the manifest says", required=required, found=found)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever malformed data raises, deep inside json, torch or fx, is told as a damaged file; all errors name it."""
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except ArtifactError as error:
        if str(file.parent) in error.message:
            raise
        message = f"{file}: {error.message}"
        raise ArtifactError(message, required=error.required, found=error.found, cure=error.cure) from error
    except Exception as error:
        raise _damaged(file, "an artifact as save() writes it", f"{type(error).__name__}: {error}") from error
