"""An eager model without the blocks that a Plan drops, and the Plan and tensors as that model names them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..runtime.compressed import Compressed
from ..runtime.plan import DropBlock, Plan
from ..runtime.store import Store
from .resize import TransplantError

# What a block, or a part of it, calls its place in the row: a cache goes by it.
PLACES = ("layer_idx", "layer_id", "layer_index", "block_idx")

Rename = Mapping[str, str]
"""Old path of a block -> new path."""


def shortened(model: nn.Module, small: Compressed) -> tuple[nn.Module, Rename]:
    """(a copy on the same tensors without the blocks that `small` drops, how the others are called now).

    Raises TransplantError where they are not in a ModuleList or Sequential, and where others need something of them.
    """
    drops = small.plan.drops
    inside = tuple(f"{edit.path}." for edit in drops)
    needed = [name for name, _ in small.store.entries() if name.startswith(inside)]
    if needed:
        raise TransplantError(
            "layers cannot be left out of the eager module",
            required="blocks that hold nothing which others read",
            found=", ".join(needed[:3]),
            cure="keep the block that holds it, with keep_layers, or call the compressed model itself",
        )
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    short, rename = copy.deepcopy(model, same), dict[str, str]()
    rows: dict[str, set[int]] = {}
    for edit in drops:
        row, _, number = edit.path.rpartition(".")
        rows.setdefault(row, set()).add(int(number))
    for path, gone in rows.items():
        blocks = short.get_submodule(path)
        if not isinstance(blocks, nn.ModuleList | nn.Sequential) or max(gone) >= len(blocks):
            raise TransplantError(
                f"layers of {path} cannot be left out of the eager module",
                required=f"a ModuleList or Sequential of more than {max(gone)} blocks",
                found=type(blocks).__name__,
                cure="call the compressed model itself",
            )
        stay = [i for i in range(len(blocks)) if i not in gone]
        for new, old in enumerate(stay):
            rename[f"{path}.{old}"] = f"{path}.{new}"
            for module in blocks[old].modules():
                for name in PLACES:
                    if vars(module).get(name) == old:
                        setattr(module, name, new)
        _follow(short, len(blocks), stay)
        for i in sorted(gone, reverse=True):
            del blocks[i]
    return short, rename


def _follow(model: nn.Module, before: int, stay: Sequence[int]) -> None:
    """The config's number of layers, and its lists of one entry a layer: forwards and caches go by them."""
    config = getattr(model, "config", None)
    if config is None:
        return
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before and "layer" in name:
            setattr(config, name, [value[i] for i in stay])
    if getattr(config, "num_hidden_layers", None) == before:
        config.num_hidden_layers = len(stay)


class Renamed:
    """A compressed model whose plan and store have the names of a shortened one; else it is that model."""

    def __init__(self, small: Compressed, rename: Rename) -> None:
        self._small = small
        rest = [edit for edit in small.plan if not isinstance(edit, DropBlock)]
        self.plan = Plan(tuple(replace(edit, fqn=_renamed(edit.fqn, rename)) for edit in rest))
        self.store = Store()
        for name, value in small.store.entries():
            self.store.put(_renamed(name, rename), value, persistent=small.store.is_persistent(name))
        self.store.aliases.update({_renamed(a, rename): _renamed(b, rename) for a, b in small.store.aliases.items()})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._small(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._small, name)


def _renamed(name: str, rename: Rename) -> str:
    for prefix in _prefixes(name):
        if prefix in rename:
            return rename[prefix] + name[len(prefix) :]
    return name


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:n]) for n in range(len(parts), 0, -1))
