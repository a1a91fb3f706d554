"""The console entry. The commands themselves need typer, an extra; without it, the cure is printed."""

from __future__ import annotations

from ..runtime.errors import MissingDependencyError


def main() -> None:
    """Run `dwindle` on sys.argv."""
    try:
        import typer  # noqa: F401
    except ImportError:
        raise SystemExit(f"dwindle: {MissingDependencyError('typer', 'cli', 'the dwindle command')}") from None
    from .commands import app

    app(prog_name="dwindle")
