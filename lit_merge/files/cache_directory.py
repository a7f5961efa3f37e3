"""Where what can be made again is stored."""

from __future__ import annotations

import os
from pathlib import Path

from lit_merge.errors import ConfigurationError

__all__ = ["cache_directory"]


def cache_directory(*parts: str) -> Path:
    """A folder of the cache, created if it does not exist.

    It is in ``$LIT_MERGE_CACHE`` if that is set, else in ``$XDG_CACHE_HOME/lit-merge``, else in
    ``~/.cache/lit-merge``. Everything in it may be deleted at any time.

    Args:
        *parts: folders below the cache's root, e.g. ``"heads"``.

    Raises:
        ConfigurationError: the folder cannot be created.
    """
    own, shared = os.environ.get("LIT_MERGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        root = Path(own).expanduser()
    else:
        root = (Path(shared).expanduser() if shared else Path.home() / ".cache") / "lit-merge"
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cache: expected a folder that can be created at {folder}, got {error.strerror or error}. "
            "Set LIT_MERGE_CACHE to a writable folder."
        ) from error
    return folder
