"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import ArtifactError, DwindleError


def require_free(path: Path, kind: type[DwindleError] = ArtifactError) -> None:
    """Refuse to write over something, with an error of `kind`; a link that leads nowhere is something too."""
    if os.path.lexists(path):
        raise kind(
            "cannot write over something that is there",
            required="a path that does not exist",
            found=str(path),
            cure="remove it, or choose another path",
        )


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a free name beside `path` for a new file or folder, and missing folders above it.

    At the end what was written there is brought to disk and renamed to `path`. After an error it is removed, and so
    are the folders made for it. Raises ArtifactError if `path` exists.
    """
    require_free(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        for part in (*draft.rglob("*"), draft):
            _flush(part)
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Ask the system to bring a file or folder to disk; not every file system can for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
