"""DeepSpeed's JSON as a typed value: what is enabled, what was given, what was set aside.

parse("ds_config.json").weight_quantization.groups[0].target_bits

Both spellings of MoQ are read: `compression_training`, and `quantize_training` of 2021. A section that is off may
hold anything; in one that is on, a key that DeepSpeed would ignore is an error that names the key that was meant.
Whether two regular expressions of a technique choose the same module, which is an error as in DeepSpeed, cannot be told
without the model: it is checked when that is prepared.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, NamedTuple

from pydantic import BaseModel

from ...runtime.errors import RecipeError
from .sections import (
    ActivationGroup,
    ActivationQuantization,
    ChannelPruning,
    Eigenvalue,
    Fp16Mixed,
    HeadPruning,
    LayerReduction,
    PruningGroup,
    QuantizeTraining,
    RowPruning,
    SparsePruning,
    WeightGroup,
    WeightQuantization,
)
from .source import read
from .spelling import Path, dotted, mapping, missing, nearest, strays, unknown, validated

ROOT, LEGACY = "compression_training", "quantize_training"
SHARED, GROUPS, LAYERS = "shared_parameters", "different_groups", "layer_reduction"
EIGENVALUE, MIXED = "eigenvalue", "fp16_mixed_quantize"
GROUP_KEYS = ("params", "modules", "related_modules")

TECHNIQUES: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "weight_quantization": (WeightQuantization, WeightGroup),
    "activation_quantization": (ActivationQuantization, ActivationGroup),
    "sparse_pruning": (SparsePruning, PruningGroup),
    "row_pruning": (RowPruning, PruningGroup),
    "head_pruning": (HeadPruning, PruningGroup),
    "channel_pruning": (ChannelPruning, PruningGroup),
}

# Keys that no DeepSpeed reads though its own tutorials and tests have them, and the key that is read.
DEAD: dict[Path, str] = {
    (LEGACY, "quantize-algo", "q_type"): f"{LEGACY}.quantize_algo.q_type",
    (LEGACY, "quantize-algo", "rounding"): f"{LEGACY}.quantize_algo.rounding",
    (LEGACY, "quantize-algo"): f"{LEGACY}.quantize_algo",
    (LEGACY, "quantize_type"): f"{LEGACY}.quantize_algo.q_type",
    (LEGACY, "quantize_eigenvalue"): f"{LEGACY}.{EIGENVALUE}.enabled",
    (EIGENVALUE, "model_name"): f"{LEGACY}.{EIGENVALUE}.layer_name",
    (EIGENVALUE,): f"{LEGACY}.{EIGENVALUE}",
}


class Given(NamedTuple):
    """One key as the user wrote it; a mapping under a key of the engine stays whole."""

    path: Path
    value: Any


class Note(NamedTuple):
    """Something seen while reading that is not wrong."""

    key: str
    text: str


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """A configuration that was read. A section is None where it is absent or off.

    legacy: quantize_training. eigenvalue: its settings, for `legacy` or for weight_quantization without it.
    engine: DeepSpeed's other top-level keys, untouched. given: every key in the file's order. disabled: places of
    the sections that are off.
    """

    weight_quantization: WeightQuantization | None = None
    activation_quantization: ActivationQuantization | None = None
    sparse_pruning: SparsePruning | None = None
    row_pruning: RowPruning | None = None
    head_pruning: HeadPruning | None = None
    channel_pruning: ChannelPruning | None = None
    layer_reduction: LayerReduction | None = None
    legacy: QuantizeTraining | None = None
    eigenvalue: Eigenvalue | None = None
    fp16: bool = False
    bf16: bool = False
    engine: Mapping[str, Any]
    given: tuple[Given, ...]
    disabled: frozenset[Path]
    notes: tuple[Note, ...]

    def section(self, name: str) -> BaseModel | None:
        """An enabled section by its key in the file."""
        found: BaseModel | None = getattr(self, "legacy" if name == LEGACY else name, None)
        return found

    def off(self, path: Path) -> Path | None:
        """The section that is off and holds this place."""
        return next((path[:n] for n in range(1, len(path) + 1) if path[:n] in self.disabled), None)


def parse(source: Mapping[str, Any] | str | File) -> DeepSpeedConfig:
    """Read a dict, which is not changed, or a JSON file. Raises RecipeError before anything runs."""
    return _Reading(read(source)).config()


def keys_of(model: type[BaseModel]) -> tuple[str, ...]:
    """The keys of a section, or of a group's params, as they stand in a file."""
    keys = (info.alias or name for name, info in model.model_fields.items() if name not in ("name", "groups"))
    return tuple(key for key in keys if key not in GROUP_KEYS)


class _Reading:
    """One configuration while it is read: what is off, and what was seen on the way."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.notes: list[Note] = []
        self.disabled: set[Path] = set()

    def config(self) -> DeepSpeedConfig:
        root = mapping((ROOT,), self.data.get(ROOT, {}))
        self._top_level()
        self._unknown_techniques(root)
        found: dict[str, Any] = {name: self._technique(name, root[name]) for name in TECHNIQUES if name in root}
        if LAYERS in root:
            found[LAYERS] = self._layers(mapping((ROOT, LAYERS), root[LAYERS]))
        if LEGACY in self.data:
            trains = found.get("weight_quantization") is not None
            found |= self._legacy(mapping((LEGACY,), self.data[LEGACY]), trains)
        own = (ROOT, LEGACY, EIGENVALUE)
        given = (_leaves((str(k),), v) if k in own else (Given((str(k),), v),) for k, v in self.data.items())
        return DeepSpeedConfig(
            **found,
            fp16=self._precision("fp16"),
            bf16=self._precision("bf16"),
            engine={key: value for key, value in self.data.items() if key not in own},
            given=tuple(item for items in given for item in items),
            disabled=frozenset(self.disabled),
            notes=tuple(self.notes),
        )

    def _note(self, path: Path, text: str) -> None:
        self.notes.append(Note(dotted(path), text))

    def _is_on(self, place: Path, settings: Any, section: Path) -> bool:
        """Whether a section is on; remembers it where it is off."""
        enabled = settings.get("enabled", False) if isinstance(settings, Mapping) else False
        if isinstance(enabled, int) and enabled == 1:
            return True
        if not enabled:
            self.disabled.add(section)
            return False
        raise RecipeError(f"{dotted(place)}.enabled is not right", required="true or false", found=repr(enabled)[:120])

    def _check(
        self, on: bool, path: Path, given: Any, allowed: Collection[str], homes: Mapping[str, str] | None = None
    ) -> None:
        """Unknown keys are an error in a section that is on, a note in one that is off. homes: key -> its place."""
        for stray in strays(path, given, allowed):
            if on:
                raise unknown(stray, allowed, (homes or {}).get(stray[-1]))
            near = nearest(stray[-1], allowed)
            self._note(stray, f"DeepSpeed has no such key; {near!r} comes nearest" if near else "no key of DeepSpeed")

    def _top_level(self) -> None:
        for key, value in self.data.items():
            if difflib.get_close_matches(str(key), (ROOT, LEGACY), n=1, cutoff=0.8) and key not in (ROOT, LEGACY):
                raise unknown((str(key),), (ROOT, LEGACY))
            if key in (*TECHNIQUES, LAYERS) and isinstance(value, Mapping) and ({SHARED, "teacher_layer"} & {*value}):
                raise unknown((str(key),), (ROOT, LEGACY), f"{ROOT}.{key}")
        if EIGENVALUE in self.data:
            self._is_on((EIGENVALUE,), self.data[EIGENVALUE], (EIGENVALUE,))

    def _precision(self, name: str) -> bool:
        section = self.data.get(name)
        enabled = section.get("enabled", False) if isinstance(section, Mapping) else False
        if enabled == "auto":
            self._note((name, "enabled"), "'auto' is settled by transformers' Trainer; taken as off")
        return enabled is True

    def _unknown_techniques(self, root: Mapping[str, Any]) -> None:
        allowed = (*TECHNIQUES, LAYERS)
        for path in strays((ROOT,), root, allowed):
            value = next(item for key, item in root.items() if str(key) == path[-1])
            shared = value.get(SHARED, value) if isinstance(value, Mapping) else None
            if not isinstance(shared, Mapping) or shared.get("enabled"):
                raise unknown(path, allowed)
            self.disabled.add(path)
        self._check(False, (ROOT,), root, allowed)

    def _technique(self, name: str, value: Any) -> BaseModel | None:
        path: Path = (ROOT, name)
        model, group_model = TECHNIQUES[name]
        section = mapping(path, value)
        shared, groups = section.get(SHARED), section.get(GROUPS)
        on = self._is_on((*path, SHARED), shared, path)
        if on and GROUPS not in section:
            raise missing((*path, GROUPS), 'write "different_groups": {} where nothing is chosen')
        if on:
            mapping((*path, GROUPS), groups)
        ours, theirs = keys_of(model), keys_of(group_model)
        self._check(on, path, section, (SHARED, GROUPS), dict.fromkeys(("enabled", *ours), f"{name}.{SHARED}"))
        in_params = dict.fromkeys(theirs, f"{name}.{GROUPS}.<group>.params")
        self._check(on, (*path, SHARED), shared, ("enabled", *ours), in_params)
        built = []
        for key, group in groups.items() if isinstance(groups, Mapping) else ():
            here: Path = (*path, GROUPS, str(key))
            if on:
                mapping((*here, "params"), mapping(here, group).get("params"))
            params = group.get("params") if isinstance(group, Mapping) else None
            self._check(on, here, group, GROUP_KEYS, dict.fromkeys((*ours, *theirs), f"{dotted(here)}.params"))
            homes = dict.fromkeys(ours, f"{name}.{SHARED}")
            self._check(on, (*here, "params"), params, (*theirs, *_overruling(model)), homes)
            if on:
                built.append(self._group(here, model, mapping((*path, SHARED), shared), group))
        if not on:
            return None
        if not built and not (isinstance(shared, Mapping) and shared.get("method") == "snip_momentum"):
            self._note((*path, GROUPS), "no group, so the section is on and chooses no module")
        data = {**self._nested((*path, SHARED), shared), "groups": tuple(built)}
        return validated(path, model, data, tuple(group["name"] for group in built))

    def _group(
        self, path: Path, model: type[BaseModel], shared: Mapping[str, Any], group: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A group's data without what the shared parameters overrule: DeepSpeed merges {**params, **shared}."""
        params = dict(group["params"])
        for key in _overruling(model):
            if key in params:
                used = shared[key] if key in shared else model.model_fields[key].get_default()
                wins = f"{SHARED} wins over a group's params, defaults too, as in DeepSpeed"
                self._note((*path, "params", key), f"{wins}: {used!r}, not {params.pop(key)!r}")
        return {"name": path[-1], **params, **{key: group[key] for key in GROUP_KEYS[1:] if key in group}}

    def _nested(self, path: Path, settings: Any) -> dict[str, Any]:
        """A copy without `enabled` and without the parts that have a switch of their own and are off."""
        data = {key: value for key, value in settings.items() if key != "enabled"}
        for key, model in ((MIXED, Fp16Mixed), (EIGENVALUE, Eigenvalue)):
            if key in data:
                place = (*path, key)
                on = self._is_on(place, mapping(place, data[key]), place)
                self._check(on, place, data[key], keys_of(model))
                if not on:
                    del data[key]
        return data

    def _layers(self, section: Mapping[str, Any]) -> LayerReduction | None:
        path: Path = (ROOT, LAYERS)
        on = self._is_on(path, section, path)
        self._check(on, path, section, ("enabled", *keys_of(LayerReduction)))
        return validated(path, LayerReduction, self._nested(path, section)) if on else None

    def _legacy(self, section: Mapping[str, Any], trains: bool) -> dict[str, Any]:
        """quantize_training, or its eigenvalue alone for a weight_quantization that is on."""
        path: Path = (LEGACY,)
        if trains and "enabled" not in section and isinstance(section.get(EIGENVALUE), Mapping):
            self.disabled |= {(*path, str(key)) for key in section if key != EIGENVALUE}
            data = self._nested(path, section)
            return (
                {EIGENVALUE: validated((*path, EIGENVALUE), Eigenvalue, data[EIGENVALUE])} if EIGENVALUE in data else {}
            )
        on = self._is_on(path, section, path)
        dead = [place[1] for place in DEAD if place[0] == LEGACY]
        allowed = ("enabled", *keys_of(QuantizeTraining))
        self._check(on, path, {key: value for key, value in section.items() if key not in dead}, allowed)
        for name, info in QuantizeTraining.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel) and name != MIXED:
                self._check(on, (*path, name), section.get(name), keys_of(info.annotation))
        if not on:
            return {}
        if trains:
            self._note(path, f"both {LEGACY} and {ROOT}.weight_quantization are on; DeepSpeed 0.19.6 reads the latter")
        data = {key: value for key, value in self._nested(path, section).items() if key not in dead}
        legacy = validated(path, QuantizeTraining, data)
        return {"legacy": legacy, EIGENVALUE: legacy.eigenvalue}


def _overruling(model: type[BaseModel]) -> tuple[str, ...]:
    """The shared parameters that DeepSpeed copies over each group's params; of sparse pruning two for all methods."""
    keys = ("method", "schedule_offset") if model is SparsePruning else keys_of(model)
    return ("enabled", *keys)


def _leaves(path: Path, value: Any) -> Iterator[Given]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves((*path, str(key)), item)
    else:
        yield Given(path, value)
