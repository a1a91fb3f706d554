"""dwindle: a PyTorch model comes in, a smaller and faster one goes out, with proof.

Everything public is here and is imported when it is first asked for: `import dwindle` alone loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .frontends.compress import compress
    from .frontends.prepare import prepare
    from .frontends.rank import rank_layers
    from .frontends.recipe import Recipe
    from .frontends.student import Student
    from .frontends.transplant import transplant
    from .runtime.artifact import load
    from .runtime.compressed import Compressed
    from .runtime.errors import DwindleError

__version__ = "0.1.0"

__all__ = [
    "Compressed",
    "DwindleError",
    "Recipe",
    "Student",
    "__version__",
    "compress",
    "load",
    "prepare",
    "rank_layers",
    "transplant",
]

_HOME = {
    "Compressed": ".runtime.compressed",
    "DwindleError": ".runtime.errors",
    "Recipe": ".frontends.recipe",
    "Student": ".frontends.student",
    "compress": ".frontends.compress",
    "load": ".runtime.artifact",
    "prepare": ".frontends.prepare",
    "rank_layers": ".frontends.rank",
    "transplant": ".frontends.transplant",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
