"""From a dict or a JSON file to plain data of its own: no duplicate keys, no placeholders, nothing shared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.errors import RecipeError

_PLACEHOLDER = re.compile(r":\s*([A-Za-z_]\w*)")  # where JSON has a value: `"enabled": FP16_ENABLE,`
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_WORDS = {"true", "false", "null", "NaN", "Infinity"}


def read(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The configuration as dicts, tuples and scalars that share nothing with the caller's. Raises RecipeError."""
    data: Any = plain(_load(Path(source)) if isinstance(source, str | Path) else source)
    if not isinstance(data, dict):
        raise RecipeError(
            "a DeepSpeed configuration of the wrong kind",
            required="a mapping, or the path of a JSON file that holds one",
            found=type(data).__name__,
        )
    return data


def plain(value: Any) -> Any:
    """A copy: mappings as dicts, sequences as tuples, anything else as it is."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(
            f"no DeepSpeed configuration {str(path)[:200]!r}",
            required="the path of a JSON file that can be read",
            found=error.strerror,
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text", required="JSON in UTF-8", found=str(error)) from error
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise _not_json(path, text, error) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RecipeError(
            "a JSON object with the same key twice",
            required="each key once, as DeepSpeed demands of files",
            found=", ".join(repr(key) for key in data if keys.count(key) > 1),
            cure=f"it stands beside {', '.join(repr(key) for key in list(data)[:6])}",
        )
    return data


def _not_json(path: Path, text: str, error: json.JSONDecodeError) -> RecipeError:
    found: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = _STRING.sub(lambda s: '"' + " " * (len(s[0]) - 2) + '"', line)
        found += [(number, word) for word in _PLACEHOLDER.findall(bare) if word not in _WORDS]
    if any(number == error.lineno for number, _ in found):
        names = sorted({word for _, word in found})
        return RecipeError(
            f"{path} is a template, not JSON",
            required="a value in place of every placeholder",
            found=f"line {found[0][0]}: {text.splitlines()[found[0][0] - 1].strip()}",
            cure=f"replace {', '.join(names)}",
        )
    line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
    return RecipeError(
        f"{path} is not JSON",
        required=error.msg,
        found=f"line {error.lineno}: {line[:120]}",
        cure="JSON has double quotes only" if "'" in line else None,
    )
