"""Which numbers of an eager module count what: attributes, against the axes of the tensors below it.

torch's own layers say what they hold (`fit`). Of other modules nothing is known but values: an attribute that is 12
may count 12 heads, or the layers. So an attribute counts a run of an axis only if it does so in every module of the
class: the index of a layer is 4 in one of them and 5 in the next, with 4 heads in both. What is left open is a Slot,
and `resize` finds out by running the module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..passes.prune.axes import Axis, norm, size
from ..passes.prune.keep import Kept, count
from ..passes.prune.walk import Walk

Place = tuple[Hashable, ...]
"""A run of an axis: (name of the tensor, dimension, way into sums, first atom, end)."""

Runs = dict[Place, tuple[int, int]]
"""How many indices each run had and has."""

# Attributes with these words in their names follow what was cut though nothing in the forward asks for it, the second
# ones unless something of their size stays. All others (windows, buckets, positions) only where the outputs do ask.
ALWAYS = frozenset({"head", "heads", "inner", "intermediate"})
UNAMBIGUOUS = frozenset({"hidden", "embed", "dim", "width", "channels", "features", "filters", "experts", "groups"})

# Dimension of the weight that an attribute counts.
_LAYERS: tuple[tuple[type[nn.Module], dict[str, int]], ...] = (
    (nn.Linear, {"out_features": 0, "in_features": 1}),
    (nn.Embedding, {"num_embeddings": 0, "embedding_dim": 1}),
    (nn.modules.batchnorm._NormBase, {"num_features": 0}),
    (nn.GroupNorm, {"num_channels": 0}),
    (nn.PReLU, {"num_parameters": 0}),
    (nn.LayerNorm, {}),
    (nn.RMSNorm, {}),
    (nn.modules.conv._ConvNd, {}),
)
_CONV1D = {"nx": 0, "nf": 1}  # transformers'


@dataclass(frozen=True)
class Site:
    """An attribute that is a number, or one item of an attribute that is a tuple or list of them."""

    holder: Any
    attribute: str
    index: int | None

    def write(self, value: int) -> None:
        """Set it, where it has another value."""
        old = getattr(self.holder, self.attribute)
        if self.index is None:
            new: Any = value
        else:
            new = type(old)([*old[: self.index], value, *old[self.index + 1 :]])
        if new != old:
            setattr(self.holder, self.attribute, new)


@dataclass(frozen=True)
class Slot:
    """An attribute of all modules of a class. choices: its values in each of them, first those it has."""

    label: str
    sites: tuple[Site, ...]
    choices: tuple[tuple[int, ...], ...]
    default: int

    def write(self, choice: int) -> None:
        """Set it in all of them."""
        for site, value in zip(self.sites, self.choices[choice], strict=True):
            site.write(value)

    def spell(self, choice: int) -> str:
        """What the choice is, in words."""
        pairs = dict.fromkeys(zip(self.choices[0], self.choices[choice], strict=True))
        return f"{self.label} " + ", ".join(f"{old} -> {new}" for old, new in pairs if old != new)


def runs_below(model: nn.Module, walk: Walk, of: Kept) -> dict[str, Runs]:
    """For each module of the original `model` by its path: the runs of the axes of all tensors in it."""
    stored = {
        name: {(dim, *place): sizes for dim, axis in enumerate(axes) for place, sizes in _runs(axis, of)}
        for name, axes in walk.stored.items()
    }
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    found: dict[str, Runs] = {path: {} for path, _ in model.named_modules()}
    for name, tensor in named:
        canonical = first.setdefault(id(tensor), name)
        for path, relative in _owners(name):
            if path in found:
                own = stored.get(canonical, {})
                found[path] |= {(relative, *place): sizes for place, sizes in own.items()}
    return found


def _runs(axis: Axis, of: Kept, way: Place = ()) -> Iterator[tuple[Place, tuple[int, int]]]:
    """All runs of neighbouring atoms, and those within the parts of sums."""
    atoms = norm(axis)
    for i in range(len(atoms)):
        for j in range(i + 1, len(atoms) + 1):
            run = atoms[i:j]
            yield (way, i, j), (size(run), count(run, of))
        for p, part in enumerate(atoms[i].parts or ()):
            yield from _runs(part, of, (*way, i, p))


def _owners(name: str) -> Iterator[tuple[str, str]]:
    """(path of a module, name within it), innermost first."""
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        yield ".".join(parts[:i]), ".".join(parts[i:])


def is_layer(module: nn.Module) -> bool:
    """Whether `fit` knows what the module's numbers are."""
    if type(module).__name__ == "Conv1D":
        return True
    tensors = getattr(module, "weight", None) is not None or getattr(module, "running_mean", None) is not None
    return tensors and any(isinstance(module, kind) for kind, _ in _LAYERS)


def fit(module: nn.Module, runs: Runs) -> None:
    """Set the numbers of a layer that `is_layer` by its tensors as they are now."""
    weight: Any = module.weight if getattr(module, "weight", None) is not None else module.running_mean
    shape = tuple(weight.shape)
    if isinstance(module, nn.GroupNorm):
        module.num_groups = _groups(module.num_groups, runs)
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.groups = _groups(module.groups, runs)
        across = shape[1] * module.groups
        module.in_channels, module.out_channels = (shape[0], across) if module.transposed else (across, shape[0])
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = shape
    known = next((dims for kind, dims in _LAYERS if isinstance(module, kind)), _CONV1D)
    for attribute, dim in known.items():
        setattr(module, attribute, shape[dim])


def _groups(groups: int, runs: Runs) -> int:
    """How many of the groups are left that are outside on the weight's first dimension."""
    for (_, dim, way, first, _), (old, new) in runs.items():
        if (dim, way, first, old) == (0, (), 0, groups):
            return new
    return groups


def slots_of(model: nn.Module, copied: nn.Module, runs: Mapping[str, Runs]) -> list[Slot]:
    """What may have to change in `copied`, nearest to the tensors first, objects that modules share last."""
    classes: dict[Hashable, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if runs[path] and not is_layer(module):
            alone = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)  # each holds something else
            classes[type(module), path if alone else None].append(path)
    found: list[tuple[tuple[bool, bool, int], Slot]] = []
    for paths in classes.values():
        inner = {name for path in paths for name in _without_tensors(model.get_submodule(path), path, runs)}
        for name in ("", *sorted(inner)):
            holders = {p: m for p in paths if (m := _submodule(copied, p, name)) is not None}
            for slot in _slots(type(model.get_submodule(paths[0])).__name__, name, holders, runs):
                found.append(((False, bool(name), -paths[0].count(".") if paths[0] else 1), slot))
    found += [((True, False, 0), slot) for slot in _shared_slots(model, copied, runs)]
    return [slot for _, slot in sorted(found, key=lambda item: item[0])]


def _without_tensors(module: nn.Module, path: str, runs: Mapping[str, Runs]) -> Iterator[str]:
    """Names within `module` of modules that hold nothing, and are in no nearer module that holds something."""
    for name, child in module.named_children():
        if next(child.parameters(), None) is None and next(child.buffers(), None) is None:
            yield from (f"{name}.{inner}" if inner else name for inner, _ in child.named_modules())


def _submodule(model: nn.Module, path: str, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(f"{path}.{name}".strip("."))
    except AttributeError:
        return None


def numbers_of(holder: Any) -> Iterator[tuple[str, int | None, int]]:
    """(attribute, index, value) of all whole numbers that an object holds itself."""
    for attribute, value in vars(holder).items():
        if type(value) is int:
            yield attribute, None, value
        elif isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            yield from ((attribute, i, item) for i, item in enumerate(value) if type(item) is int)


def _slots(kind: str, inner: str, holders: Mapping[str, nn.Module], runs: Mapping[str, Runs]) -> Iterator[Slot]:
    """The slots of one class. holders: its modules, or modules without tensors inside them, by its path."""
    values: dict[tuple[str, int | None], dict[str, int]] = defaultdict(dict)
    for path, module in holders.items():
        for attribute, index, value in numbers_of(module):
            values[attribute, index][path] = value
    for (attribute, index), own in values.items():
        changed, stays = _options(own, runs)
        if changed:
            words = frozenset(attribute.lower().split("_"))
            follows = bool(words & ALWAYS) or (bool(words & UNAMBIGUOUS) and not stays)
            label = ".".join(filter(None, (kind, inner, attribute))) + ("" if index is None else f"[{index}]")
            sites = tuple(Site(holders[path], attribute, index) for path in own)
            choices = (tuple(own.values()), *changed)
            yield Slot(label, sites, choices, int(follows and len(changed) == 1))


def _options(own: Mapping[str, int], runs: Mapping[str, Runs]) -> tuple[list[tuple[int, ...]], bool]:
    """What an attribute may become in each module, and whether it may count something that stays.

    own: its value in each module of a class. Runs that fewer of them have than others are a part of the story.
    """
    seen: dict[tuple[int, ...], int] = {}
    stays = False
    for place in {place: None for path in own for place in runs[path]}:
        having = [path for path in own if place in runs[path]]
        if any(runs[path][place][0] != own[path] for path in having):
            continue
        new = tuple(runs[path][place][1] if path in having else value for path, value in own.items())
        if new == tuple(own.values()):
            stays = stays or not place[2]  # parts of a sum, such as the halves of a rotary embedding, have no names
        else:
            seen[new] = max(seen.get(new, 0), len(having))
    most = max(seen.values(), default=0)
    return [new for new, times in seen.items() if times == most], stays


def _shared_slots(model: nn.Module, copied: nn.Module, runs: Mapping[str, Runs]) -> Iterator[Slot]:
    """Numbers of plain objects that modules hold, such as a config: one value for all of them."""
    originals = {id(value) for module in model.modules() for value in vars(module).values()}
    objects: dict[int, Any] = {}
    held: dict[int, list[str]] = defaultdict(list)
    for path, module in copied.named_modules():
        for value in vars(module).values():
            plain = hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | Tensor) and path in runs
            if plain and not callable(value) and id(value) not in originals:
                objects[id(value)] = value
                held[id(value)].append(path)
    for key, paths in held.items():
        by_class = _nearest(model, paths, runs)
        for attribute, index, value in numbers_of(objects[key]):
            changed: dict[int, None] = {}
            for own in by_class:
                options, _ = _options(dict.fromkeys(own, value), own)
                changed.update(dict.fromkeys(option[0] for option in options if len(set(option)) == 1))
            if changed:
                label = f"{type(objects[key]).__name__}.{attribute}" + ("" if index is None else f"[{index}]")
                choices = ((value,), *((new,) for new in changed))
                yield Slot(label, (Site(objects[key], attribute, index),), choices, 0)


def _nearest(model: nn.Module, paths: Sequence[str], runs: Mapping[str, Runs]) -> list[dict[str, Runs]]:
    """By class of the modules at `paths`: of each its runs, without those of others of them inside it."""
    found: dict[type, dict[str, Runs]] = defaultdict(dict)
    for path in paths:
        prefix = f"{path}." if path else ""
        inside = tuple(f"{p.removeprefix(prefix)}." for p in paths if p != path and p.startswith(prefix))
        own = {place: sizes for place, sizes in runs[path].items() if not str(place[0]).startswith(inside)}
        if own:
            found[type(model.get_submodule(path))][path] = own
    return list(found.values())
