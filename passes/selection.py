"""Which modules a rule of a recipe means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence


def selected_by(paths: Iterable[str], globs: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether globs over a module's paths, or regular expressions searched for in them, choose the module."""
    return any(
        any(fnmatch.fnmatchcase(path, glob) for glob in globs) or any(re.search(pattern, path) for pattern in patterns)
        for path in paths
    )
