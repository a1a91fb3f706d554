"""All architectures of the coverage benchmark, by the package that they come from."""

from __future__ import annotations

from architectures import ARCHITECTURES, Architecture
from image_models import TIMM, TORCHVISION, importable

RATIO, LEAST = 0.3, 0.10  # of each group's indices that go; of the parameters, embeddings aside, that have to

FAMILIES: dict[str, tuple[Architecture, ...]] = {
    "transformers": ARCHITECTURES,
    "torchvision": TORCHVISION,
    "timm": TIMM,
}


def present() -> dict[str, tuple[Architecture, ...]]:
    """The families whose package is installed."""
    absent = {family for family in ("torchvision", "timm") if not importable(family)}
    return {family: rows for family, rows in FAMILIES.items() if family not in absent}


def named(name: str) -> Architecture:
    """The architecture of that name."""
    present()  # torchvision has to be imported before transformers looks for it
    return next(row for rows in FAMILIES.values() for row in rows if row.name == name)
