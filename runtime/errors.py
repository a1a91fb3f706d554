"""Every error a person can meet: what was required, what was found, and the cure.

An error names all three where they exist, in that order, so that its text alone is enough to act on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DwindleError(Exception):
    """Base of all errors raised by dwindle on purpose."""

    def __init__(
        self,
        message: str,
        *,
        required: object = None,
        found: object = None,
        cure: str | None = None,
    ) -> None:
        self.message, self.required, self.found, self.cure = message, required, found, cure
        parts = [message]
        if required is not None:
            parts.append(f"required: {required}")
        if found is not None:
            parts.append(f"found: {found}")
        if cure is not None:
            parts.append(f"cure: {cure}")
        super().__init__("\n  ".join(parts))


class RecipeError(DwindleError):
    """A recipe that cannot be read, or that asks for what the model does not have."""


class CaptureError(DwindleError):
    """A model that cannot be captured as a graph, or a call its captures do not cover."""


class CalibrationError(DwindleError):
    """Calibration data that is missing, empty, or not finite."""


class SchemeError(DwindleError):
    """A quantisation scheme that contradicts itself or does not fit a tensor."""


class PassError(DwindleError):
    """A pass that broke its promise; the message names the passes that ran before it."""


class ArtifactError(DwindleError):
    """A saved model that is missing, damaged, tampered with, or newer than this version."""


class CertificateError(DwindleError):
    """A finished model that is not what it claims to be."""


class ExportError(DwindleError):
    """A model that cannot be exported, or whose export computes something else."""


class MissingDependencyError(DwindleError, ImportError):
    """An optional dependency is absent; the cure names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}",
            required=f"{package}, which comes with the extra {extra!r}",
            found="not installed",
            cure=f"pip install 'dwindle[{extra}]'",
        )


class ScheduleError(DwindleError):
    """A training schedule that contradicts itself, does not end within the run, or belongs to another model."""


class DistillationError(DwindleError):
    """A student and a teacher whose outputs cannot be compared."""


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of the known names: those like `name`, or else the first."""
    names = list(known)
    return difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
