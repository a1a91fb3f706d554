"""Recipes: what to do to a model, as a value that can be written by hand and is refused when misspelt.

Recipe.of("zeroquant-w8a8")            a preset
Recipe.of("recipe.yaml")               a JSON or YAML file
Recipe.of({"quantize": [{"operators": ["linear"], "weight": {"bits": 4, "group_size": 128}}]})
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..passes.quantize.decide import QuantizeRule
from ..passes.quantize.observers import Method, Observer
from ..runtime.errors import MissingDependencyError, RecipeError, SchemeError
from ..runtime.scheme import Granularity, Kind, Scheme

DEEPSPEED = "compression_training"  # the key of a DeepSpeed configuration that says how to compress


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightSettings(_Strict):
    """How weights are stored: per output channel, or per `group_size` neighbours in a row."""

    bits: int = 8
    kind: Kind = "symmetric"
    granularity: Granularity | None = None
    group_size: int | None = None

    def scheme(self) -> Scheme:
        """As the runtime's value. Raises SchemeError on a contradiction."""
        granularity = self.granularity or ("group" if self.group_size else "channel")
        if self.bits > 8 or granularity == "token":
            raise SchemeError(
                "weights",
                required="at most 8 bits, one scale per tensor, channel or group",
                found=f"{self.bits} bits per {granularity}",
            )
        return Scheme(
            bits=self.bits,
            kind=self.kind,
            granularity=granularity,
            group_size=self.group_size,
        )


class ActivationSettings(_Strict):
    """How activations are quantised: "dynamic" per token on each call, or "static" per tensor from data."""

    bits: int = 8
    kind: Kind = "symmetric"
    range: Literal["dynamic", "static"] = "dynamic"
    granularity: Granularity | None = None

    def scheme(self) -> Scheme:
        """As the runtime's value. Raises SchemeError on a contradiction."""
        granularity = self.granularity or ("token" if self.range == "dynamic" else "tensor")
        if self.range == "static" and granularity != "tensor":
            raise SchemeError(
                "a static activation has one scale", required="granularity 'tensor'", found=repr(granularity)
            )
        if self.bits != 8 or self.kind not in ("symmetric", "asymmetric"):
            raise SchemeError(
                "activations", required="8 bits, symmetric or asymmetric", found=f"{self.bits} {self.kind}"
            )
        if self.range == "dynamic" and self.kind != "symmetric":
            raise SchemeError(
                "a dynamic activation is symmetric",
                required="kind 'symmetric', or range 'static'",
                found=repr(self.kind),
            )
        return Scheme(bits=self.bits, kind=self.kind, granularity=granularity)


class QuantizeEntry(_Strict):
    """One rule. Later rules override earlier ones; a weight of null leaves the modules in floating point."""

    modules: tuple[str, ...] = Field(default=("*",), min_length=1)
    operators: tuple[Literal["linear", "embedding", "conv2d"], ...] = Field(default=("linear",), min_length=1)
    weight: WeightSettings | None = WeightSettings()
    activation: ActivationSettings | None = None

    @field_validator("modules", "operators", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.rule()
        return self

    def rule(self) -> QuantizeRule:
        """As the pass takes it."""
        return QuantizeRule(
            modules=self.modules,
            operators=self.operators,
            weight=None if self.weight is None else self.weight.scheme(),
            activation=None if self.activation is None else self.activation.scheme(),
            static=self.activation is not None and self.activation.range == "static",
        )


class Calibration(_Strict):
    """How the ranges of static activations are taken from data."""

    method: Method = "mse"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    percentile: float = Field(default=99.99, gt=50, le=100)

    def observer(self) -> Observer:
        """A fresh accumulator."""
        return Observer(method=self.method, momentum=self.momentum, percentile=self.percentile)


class Recipe(_Strict):
    """Everything that is to be done to a model. An empty recipe changes nothing."""

    name: str = ""
    quantize: tuple[QuantizeEntry, ...] = ()
    calibration: Calibration = Calibration()

    @staticmethod
    def of(source: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """Read a recipe, a preset's name, a dict, or a JSON or YAML file. Raises RecipeError."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return _validated(dict(source))
        if not isinstance(source, str | Path):
            raise RecipeError(
                "a recipe of an unknown type",
                required="a preset's name, a file's path, a dict or a Recipe",
                found=type(source).__name__,
            )
        text = str(source)
        for preset in PRESETS:
            if preset.name == text:
                return preset
        path = Path(source)
        if path.suffix in (".json", ".yaml", ".yml"):
            return _validated(_read(path))
        names = [preset.name for preset in PRESETS]
        near = difflib.get_close_matches(text, names, n=2, cutoff=0.3)
        raise RecipeError(
            f"no preset {text!r}",
            required=f"one of {', '.join(names)}, or a .json or .yaml file",
            found=text,
            cure=f"did you mean {' or '.join(near)}?" if near else None,
        )

    def rules(self) -> tuple[QuantizeRule, ...]:
        """The quantisation rules as the pass takes them."""
        return tuple(entry.rule() for entry in self.quantize)

    def plain(self) -> dict[str, Any]:
        """As plain data, defaults left out: what an artifact keeps and `of` reads."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise RecipeError(f"no recipe file {path}", required="an existing file", found="none")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text", required="JSON or YAML in UTF-8", found=error) from error
    try:
        if path.suffix == ".json":
            return json.loads(text)
        try:
            import yaml
        except ImportError as error:
            raise MissingDependencyError("pyyaml", "cli", "reading a YAML recipe") from error
        return yaml.safe_load(text)
    except ValueError as error:
        raise RecipeError(f"{path} is not valid JSON", found=str(error)) from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise RecipeError(f"{path} is not valid YAML", found=str(error)) from error
        raise


def _validated(data: Any) -> Recipe:
    if isinstance(data, Mapping) and DEEPSPEED in data:
        raise _of_deepspeed(data[DEEPSPEED])
    try:
        return Recipe.model_validate(data)
    except SchemeError as error:
        raise RecipeError(error.message, required=error.required, found=error.found, cure=error.cure) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        allowed = _fields_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]) if first["loc"] else "", allowed, n=1, cutoff=0.3)
        unknown = first["type"] == "extra_forbidden"
        raise RecipeError(
            f"the recipe's {where or 'top level'} is not right",
            required=f"one of the keys {', '.join(allowed)}" if unknown else first["msg"],
            found=where if unknown else repr(first["input"]),
            cure=f"did you mean {near[0]!r}?" if unknown and near else None,
        ) from error


def _of_deepspeed(settings: Any) -> RecipeError:
    """For a DeepSpeed file: the presets that quantise what it would, weights alone or activations too."""
    sections = [str(name) for name, section in settings.items() if _is_on(section)] if _is_map(settings) else []
    wanted = {"activation_quantization" in sections}
    if not {"activation_quantization", "weight_quantization"} & {*sections}:
        wanted = {True, False}
    near = [p.name for p in PRESETS if any(rule.activation is not None for rule in p.rules()) in wanted]
    return RecipeError(
        "DeepSpeed compression JSON is not read yet",
        required="a preset's name, or a recipe with the key 'quantize'",
        found=f"{DEEPSPEED} with {', '.join(sections) or 'nothing enabled'}",
        cure=f"the presets that come nearest: {', '.join(near)}",
    )


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_on(section: Any) -> bool:
    """Whether a DeepSpeed section asks for anything; files name all sections and enable a few."""
    shared = section.get("shared_parameters", section) if _is_map(section) else {}
    return bool(_is_map(shared) and shared.get("enabled"))


def _fields_at(path: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a place in a recipe."""
    inside: dict[str, type[BaseModel]] = {
        "quantize": QuantizeEntry,
        "weight": WeightSettings,
        "activation": ActivationSettings,
        "calibration": Calibration,
    }
    names = [part for part in path if part in inside]
    return list((inside[names[-1]] if names else Recipe).model_fields)


# Recipes by name. Each is what its source describes, as far as one library can keep to another's words.
_W8 = WeightSettings(bits=8)
_A8_TOKEN = ActivationSettings(bits=8, range="dynamic")
_A8_STATIC = ActivationSettings(bits=8, kind="asymmetric", range="static")
_EMBEDDING_W8 = QuantizeEntry(operators=("embedding",), weight=_W8)

# Yao et al. 2022 (arXiv 2206.01861): weights per channel, activations per token on each call. No data needed.
ZEROQUANT_W8A8 = Recipe(
    name="zeroquant-w8a8",
    quantize=(QuantizeEntry(weight=_W8, activation=_A8_TOKEN), _EMBEDDING_W8),
)

# Weights alone: smaller everywhere, faster where memory is what limits.
W8A16 = Recipe(name="w8a16", quantize=(QuantizeEntry(weight=_W8), _EMBEDDING_W8))

W4A16_G128 = Recipe(
    name="w4a16-g128",
    quantize=(QuantizeEntry(operators=("linear", "embedding"), weight=WeightSettings(bits=4, group_size=128)),),
)

W4A8_G32 = Recipe(
    name="w4a8-g32",
    quantize=(
        QuantizeEntry(weight=WeightSettings(bits=4, group_size=32), activation=_A8_TOKEN),
        _EMBEDDING_W8,
    ),
)

# Ranges from data, one scale a tensor: what convolutions and QDQ runtimes want.
STATIC_W8A8 = Recipe(
    name="static-w8a8",
    quantize=(QuantizeEntry(operators=("linear", "conv2d"), weight=_W8, activation=_A8_STATIC), _EMBEDDING_W8),
    calibration=Calibration(method="mse"),
)

PRESETS: tuple[Recipe, ...] = (ZEROQUANT_W8A8, W8A16, W4A16_G128, W4A8_G32, STATIC_W8A8)
