"""What all parts of a recipe have in common."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Refuses keys it does not know, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def fields(settings: Strict) -> dict[str, Any]:
    """By name, without the type that says which settings they are."""
    return settings.model_dump(exclude={"type"})


def globs(modules: tuple[str, ...] | None, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Of a rule that may have patterns instead."""
    return modules if modules is not None else () if patterns else ("*",)


def regular(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The same, where all are regular expressions. Raises ValueError."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return patterns
