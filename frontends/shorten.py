"""An eager model without the blocks that a Plan drops, and the Plan and tensors as that model names them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from ..runtime.compressed import Compressed
from ..runtime.plan import DropBlock, Plan
from ..runtime.store import Store
from .resize import TransplantError

# What a block, or a part of it, calls its place in the row: a cache goes by it.
PLACES = ("layer_idx", "layer_id", "layer_index", "block_idx")

# How many blocks there are, as configs call it; an encoder-decoder has two such numbers, and the decoder's says so.
COUNTS = ("num_hidden_layers", "encoder_layers", "num_decoder_layers", "decoder_layers", "decoder_num_hidden_layers")

Rename = Mapping[str, str]
"""Old path of a block -> its new number."""


def shortened(model: nn.Module, small: Compressed) -> tuple[nn.Module, Compressed]:
    """(a copy on the same tensors without the blocks that `small` drops, `small` by the names of that copy).

    Raises TransplantError where they are not in a ModuleList or Sequential, and where others need something of them.
    """
    gone = tuple(f"{edit.path}." for edit in small.plan.drops)
    needed = [name for name, _ in small.store.entries() if all(n.startswith(gone) for n in small.store.names_of(name))]
    if needed:
        raise TransplantError(
            "layers cannot be left out of the eager module",
            required="blocks that hold nothing which others read",
            found=", ".join(needed[:3]),
            cure="keep the block that holds it, with keep_layers, or call the compressed model itself",
        )
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    short, rename = copy.deepcopy(model, same), dict[str, str]()
    numbers: dict[str, set[int]] = {}
    for edit in small.plan.drops:
        row, _, number = edit.path.rpartition(".")
        numbers.setdefault(row, set()).add(int(number))
    rows = {path: _row(short, path, max(of)) for path, of in numbers.items()}  # by their old paths, before any goes
    for path, blocks in rows.items():
        stay = [i for i in range(len(blocks)) if i not in numbers[path]]
        for new, old in enumerate(stay):
            rename[f"{path}.{old}".lstrip(".")] = str(new)
            for module in blocks[old].modules():
                for name in PLACES:
                    if vars(module).get(name) == old:
                        setattr(module, name, new)
        _follow(short, path, len(blocks), stay)
        for i in sorted(numbers[path], reverse=True):
            del blocks[i]
    return short, cast(Compressed, _Renamed(small, rename, gone))


def _row(model: nn.Module, path: str, last: int) -> nn.ModuleList | nn.Sequential:
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or last >= len(blocks):
        raise TransplantError(
            f"layers of {path or 'the model'} cannot be left out of the eager module",
            required=f"a ModuleList or Sequential of more than {last} blocks",
            found=type(blocks).__name__,
            cure="call the compressed model itself",
        )
    return blocks


def _follow(model: nn.Module, row: str, before: int, stay: Sequence[int]) -> None:
    """The number of layers in configs of what holds the row, and their lists of one entry a layer: caches go by them.

    A row within a block of another has an entry of `depths`, if any, as the stages of Swin and ConvNeXt have.
    """
    parts = row.split(".")
    stages = [int(part) for part in parts if part.isdigit()]
    if len(stages) > 1:
        return
    configs: dict[int, tuple[Any, list[str]]] = {}  # with the path of the outermost module that has it
    for n in range(len(parts)):
        config = getattr(model.get_submodule(".".join(parts[:n])), "config", None)
        if config is not None:
            configs.setdefault(id(config), (config, parts[:n]))
    for config, owner in configs.values():
        if stages:
            depths = list(getattr(config, "depths", None) or ())
            if stages[0] < len(depths) and depths[stages[0]] == before:
                depths[stages[0]] = len(stay)
                config.depths = depths
            continue
        # T5's decoder has a config of its own, where the number of layers is its own too.
        alone = _decodes(owner) or not any(hasattr(config, name) for name in COUNTS if _decodes([name]))
        for name, value in list(vars(config).items()):
            listed = isinstance(value, list) and len(value) == before and "layer" in name
            if listed and _meant(name, parts, alone):
                setattr(config, name, [value[i] for i in stay])
                if name == "attention_layers" and hasattr(config, "attention_types"):  # GPT-Neo makes one of the other
                    config.attention_types = [[list(config.attention_layers), 1]]
        for name in COUNTS:
            if getattr(config, name, None) == before and _meant(name, parts, alone):
                setattr(config, name, len(stay))


def _meant(name: str, row: Sequence[str], alone: bool) -> bool:
    """Whether a number of layers, or a list by layers, is that of a row; `alone`: of one in such a config."""
    return _decodes([name]) == _decodes(row) or (alone and _decodes(row))


def _decodes(names: Sequence[str]) -> bool:
    return any("decoder" in name for name in names)


class _Renamed:
    """A compressed model whose plan and store have the names of a shortened one; else it is that model."""

    def __init__(self, small: Compressed, rename: Rename, gone: tuple[str, ...]) -> None:
        self._small, self.store = small, Store()
        new: dict[str, str] = {}
        for name, value in small.store.entries():
            # A tied tensor may have been stored under the name of a block that is gone.
            first, *rest = (_renamed(n, rename) for n in small.store.names_of(name) if not n.startswith(gone))
            new[name] = first
            self.store.put(first, value, persistent=small.store.is_persistent(name))
            self.store.aliases.update(dict.fromkeys(rest, first))
        edits = [edit for edit in small.plan if not isinstance(edit, DropBlock)]
        self.plan = Plan(tuple(replace(edit, fqn=new.get(edit.fqn, edit.fqn)) for edit in edits))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._small(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._small, name)


def _renamed(name: str, rename: Rename) -> str:
    parts = name.split(".")
    return ".".join(rename.get(".".join(parts[: n + 1]), part) for n, part in enumerate(parts))
