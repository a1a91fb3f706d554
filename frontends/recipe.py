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
from typing import Any

from pydantic import BaseModel, ValidationError, field_validator

from ..passes.depth import DepthRule
from ..passes.prune.decide import PruneRule
from ..passes.prune.sparsify import SparseRule
from ..passes.quantize.decide import QuantizeRule
from ..runtime.errors import MissingDependencyError, RecipeError, SchemeError
from .cuts import PruneEntry
from .deepspeed.config import DeepSpeedConfig
from .deepspeed.translate import translate
from .depth import DepthEntry
from .distill_settings import DistillSettings, HiddenSettings, ScoreSettings, StageSettings, TapSettings
from .settings import (
    SCHEDULES,
    ActivationSettings,
    AdaptiveSettings,
    CalibrationSettings,
    LayerwiseSettings,
    QuantizeEntry,
    ScheduleSettings,
    SensitivitySettings,
    WeightSettings,
)
from .strict import Strict
from .zeros import SparsifyEntry

# The keys of a DeepSpeed configuration that say how to compress.
DEEPSPEED = ("compression_training", "quantize_training")


class Recipe(Strict):
    """Everything that is to be done to a model. An empty recipe changes nothing.

    schedule, sensitivity: of training, for all entries without a schedule of their own; seed: of stochastic rounding
    distill: what a teacher counts for in `student.loss`; layerwise: how blocks learn from it one by one, which
        `compress` does where it is given, and `student.distill_layers` when it is called
    """

    name: str = ""
    depth: tuple[DepthEntry, ...] = ()
    prune: tuple[PruneEntry, ...] = ()
    sparsify: tuple[SparsifyEntry, ...] = ()
    quantize: tuple[QuantizeEntry, ...] = ()
    calibration: CalibrationSettings = CalibrationSettings()
    schedule: ScheduleSettings | None = None
    sensitivity: SensitivitySettings | None = None
    distill: DistillSettings = DistillSettings()
    layerwise: LayerwiseSettings | None = None
    seed: int = 0

    @staticmethod
    def of(source: RecipeSource) -> Recipe:
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

    @staticmethod
    def of_deepspeed(config: DeepSpeedConfig) -> Recipe:
        """What a DeepSpeed configuration asks for. Raises RecipeError for what cannot be done here."""
        return _validated(config)

    def rules(self) -> tuple[QuantizeRule, ...]:
        """The quantisation rules as the pass takes them."""
        return tuple(entry.rule(self.schedule) for entry in self.quantize)

    def rounds_by_data(self) -> list[str]:
        """What in it needs calibration data for the weights of linear layers."""
        rules = self.rules()
        methods = {f"method {rule.method!r}": None for rule in rules if rule.method != "nearest"}
        return [*methods, *(["smooth"] if any(rule.smooth is not None for rule in rules) else [])]

    def require_nearest(self, where: str) -> None:
        """Raise RecipeError for what is done once to a finished model; `where`: what it is asked of."""
        found = self.rounds_by_data()
        if found:
            raise RecipeError(
                f"{where} cannot round weights by data or move scales between layers",
                required="method 'nearest', and no smooth",
                found=" and ".join(found),
                cure="dwindle.compress(model, recipe, data=[...]), once the model is trained",
            )

    def depths(self) -> tuple[DepthRule, ...]:
        """The rules of depth as the pass takes them."""
        return tuple(entry.rule() for entry in self.depth)

    def prunes(self) -> tuple[PruneRule, ...]:
        """The pruning rules as the pass takes them."""
        return tuple(entry.rule(self.seed) for entry in self.prune)

    def sparsifies(self) -> tuple[SparseRule, ...]:
        """The rules of zeros as the pass takes them."""
        return tuple(entry.rule() for entry in self.sparsify)

    @field_validator("depth", "prune", "sparsify", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, Mapping) else value

    def adaptive(self) -> AdaptiveSettings | None:
        """The adaptive schedule, of which a recipe has at most one."""
        found = [s for s in (self.schedule, *(e.schedule for e in self.quantize)) if isinstance(s, AdaptiveSettings)]
        if len(set(found)) > 1:
            raise RecipeError("a recipe has one budget", required="one adaptive schedule", found=len(set(found)))
        return found[0] if found else None

    def plain(self) -> dict[str, Any]:
        """As plain data, defaults left out: what an artifact keeps and `of` reads."""
        return self.model_dump(mode="json", exclude_defaults=True)


RecipeSource = Recipe | Mapping[str, Any] | str | Path


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
    try:
        if isinstance(data, DeepSpeedConfig) or (isinstance(data, Mapping) and any(key in data for key in DEEPSPEED)):
            data = translate(data)
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
            required=f"one of the keys {', '.join(allowed)}" if unknown else first["msg"].removeprefix("Value error, "),
            found=where if unknown else repr(first["input"]),
            cure=f"did you mean {near[0]!r}?" if unknown and near else None,
        ) from error


def _fields_at(path: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a place in a recipe."""
    inside: dict[str, type[BaseModel]] = {
        "depth": DepthEntry,
        "prune": PruneEntry,
        "quantize": QuantizeEntry,
        "sparsify": SparsifyEntry,
        "weight": WeightSettings,
        "activation": ActivationSettings,
        "calibration": CalibrationSettings,
        "sensitivity": SensitivitySettings,
        "distill": DistillSettings,
        "hidden": HiddenSettings,
        "scores": ScoreSettings,
        "stages": StageSettings,
        "taps": TapSettings,
        "layerwise": LayerwiseSettings,
        **SCHEDULES,
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
    calibration=CalibrationSettings(method="mse"),
)

# Places and kinds of tokens, as models call these tables: few rows, which every token reads.
_SMALL_TABLES = ("*position*", "*pos_emb*", "*wpe", "*token_type*", "*segment*", "*relative_attention_bias")


def _xtc(name: str, weight: WeightSettings, layers: int | None = None) -> Recipe:
    """Wu et al. 2022 (arXiv 2206.01859), "XTC": extreme weights in linears (a pooler too) and word embeddings.

    Tables of positions have 8 bits (.4 MB in BERT-base), and so has the layer that gives the outputs. XTC leaves that
    in float, which for a classifier is as small; but a language model's head in float would outweigh all the rest
    (50,257 x 768: 154 MB, GPT-2's twelve layers in 1 bit 11). A table that is this layer too (tied) has its 8 bits.
    """
    return Recipe(
        name=name,
        depth=() if layers is None else (DepthEntry(keep=layers),),
        quantize=(
            QuantizeEntry(weight=weight, activation=_A8_TOKEN),
            QuantizeEntry(answers=True, weight=_W8, activation=_A8_TOKEN),
            QuantizeEntry(operators=("embedding",), weight=weight),
            QuantizeEntry(operators=("embedding",), modules=_SMALL_TABLES, weight=_W8, optional=True),
        ),
        distill=DistillSettings(task=0.0, hidden=HiddenSettings(), scores=ScoreSettings()),
    )


_BINARY = WeightSettings(bits=1, kind="binary")
XTC_BINARY = _xtc("xtc-binary", _BINARY)
XTC_TERNARY = _xtc("xtc-ternary", WeightSettings(bits=2, kind="ternary"))
XTC_BINARY_6L = _xtc("xtc-binary-6l", _BINARY, layers=6)
XTC_BINARY_5L = _xtc("xtc-binary-5l", _BINARY, layers=5)

# Feed-forward layers as transformers names them: BERT and its kin; GPT-2, Llama and most others; DistilBERT; T5; OPT
# and BART. Attention's own output.dense is none of them.
FEED_FORWARD = (
    r"(\.intermediate\.dense|(?<!attention)\.output\.dense|\.mlp\.\w+|\.ffn\.\w+|\.DenseReluDense\.\w+|\.fc[12])$"
)

# Yao et al. 2022, section 5: 4 bits where most weights are, 8 in attention; then blocks learn from the model's own.
ZEROQUANT_W4A8_LKD = Recipe(
    name="zeroquant-w4a8-lkd",
    quantize=(
        QuantizeEntry(weight=_W8, activation=_A8_TOKEN),
        QuantizeEntry(patterns=(FEED_FORWARD,), weight=WeightSettings(bits=4, group_size=64), activation=_A8_TOKEN),
        _EMBEDDING_W8,
    ),
    layerwise=LayerwiseSettings(),
)

PRESETS: tuple[Recipe, ...] = (
    *(ZEROQUANT_W8A8, W8A16, W4A16_G128, W4A8_G32, STATIC_W8A8, ZEROQUANT_W4A8_LKD),
    *(XTC_BINARY, XTC_TERNARY, XTC_BINARY_6L, XTC_BINARY_5L),
)
