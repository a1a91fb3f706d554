"""Errors about keys: what is allowed at a place, what was found there, and the key that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from ...runtime.errors import RecipeError

Path = tuple[str, ...]  # the keys down to a place in the file
Model = TypeVar("Model", bound=BaseModel)

# Names that tutorials and people use and that are far from the names of the code.
MEANT = {"frequency": "schedule_offset_stride", "num_bits": "bits", "quantize_period": "quantization_period"}
_PYDANTIC = re.compile(r"^(Input|Value|String|Tuple) should (be |have )?")
_WORDS = {"tuple_type": "a list", "model_type": "a mapping"}


def dotted(path: Path) -> str:
    """As people write it."""
    return ".".join(path)


def nearest(key: str, allowed: Collection[str]) -> str | None:
    """The allowed key that was probably meant."""
    meant = MEANT.get(key)
    if meant in allowed:
        return meant
    near = difflib.get_close_matches(key, list(allowed), n=1, cutoff=0.3)
    return near[0] if near else None


def strays(path: Path, given: Any, allowed: Collection[str]) -> Iterator[Path]:
    """Places of the keys of a mapping that are not allowed there."""
    if isinstance(given, Mapping):
        yield from ((*path, str(key)) for key in given if key not in allowed)


def unknown(path: Path, allowed: Collection[str], belongs: str | None = None) -> RecipeError:
    """An unknown key. belongs: where a key of this name is read."""
    near = nearest(path[-1], allowed)
    return RecipeError(
        f"{dotted(path)} is not read by DeepSpeed",
        required=f"one of the keys {', '.join(allowed)}",
        found=path[-1],
        cure=f"it belongs to {belongs}" if belongs else f"did you mean {near!r}?" if near else None,
    )


def missing(path: Path, cure: str | None = None) -> RecipeError:
    """A key that has no default."""
    return RecipeError(f"{dotted(path)} is missing", required=f"the key {path[-1]!r}", found="none", cure=cure)


def mapping(path: Path, value: Any) -> Mapping[str, Any]:
    """`value`, which must be a mapping."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{dotted(path)} is not right", required="a mapping", found=repr(value)[:120])
    return value


def validated(path: Path, model: type[Model], data: Mapping[str, Any], groups: tuple[str, ...] | None = None) -> Model:
    """A section as a typed value. groups: names, for a section whose keys lie under shared_parameters and groups."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        _refuse(path, error, groups)


def _refuse(path: Path, error: ValidationError, groups: tuple[str, ...] | None) -> NoReturn:
    first = error.errors(include_url=False)[0]
    about: Mapping[str, Any] = first.get("ctx", {}) if first["type"] == "contradiction" else {}
    loc = tuple(map(str, first["loc"])) + ((about["key"],) if about.get("key") else ())
    where = (*path, *loc)
    if groups is not None:
        where = (*path, "shared_parameters", *loc)
        if loc[:1] == ("groups",):
            inside = loc[2:] if loc[2:3] in (("modules",), ("related_modules",)) else ("params", *loc[2:])
            where = (*path, "different_groups", groups[int(loc[1])], *inside)
    if first["type"] == "missing":
        raise missing(where) from error
    raise RecipeError(
        f"{dotted(where)} is not right",
        required=about.get("required") or _WORDS.get(first["type"]) or _PYDANTIC.sub("", first["msg"]),
        found=about.get("found") or repr(first["input"])[:120],
        cure=about.get("cure") or None,
    ) from error
