"""Where what was measured is kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$TIGHTROPE_CACHE`, or `~/.cache/tightrope`."""
    return Path(os.environ.get("TIGHTROPE_CACHE") or Path.home() / ".cache" / "tightrope")


def store() -> Path:
    """The tables of devices that are elsewhere, a folder each."""
    return cache_folder() / "devices"
