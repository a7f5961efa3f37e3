"""Weights that come with no wheel: released beside the source, brought by a command, known by their hash."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lit_merge.errors import ConfigurationError, DataError, one_line
from lit_merge.files.cache_directory import cache_directory
from lit_merge.files.writing import new_file

__all__ = ["RELEASED", "Release", "bring_weights", "released_weights"]

_LARGEST = 64 << 20  # bytes; more is no file of ours
_SECONDS = 60


@dataclass(frozen=True)
class Release:
    """A file of weights.

    Attributes:
        name: of the model.
        url: where it is published.
        sha256: of its content; empty while there is none yet, and then any file counts.
    """

    name: str
    url: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where it is in the cache, there or not."""
        return cache_directory("weights") / f"{self.name}.safetensors"


def _read() -> dict[str, Release]:
    facts = json.loads((Path(__file__).parent / "assets/released.json").read_text(encoding="utf-8"))
    return {name: Release(name, **rest) for name, rest in facts.items()}


RELEASED: Mapping[str, Release] = MappingProxyType(_read())
"""Name of a model -> its weights."""


def released_weights(name: str) -> Path:
    """The file of a model's weights in the cache.

    Raises:
        ConfigurationError: it is not there, or is another file; the error says how to bring it.
    """
    release = RELEASED[name]
    if not release.path.is_file():
        raise ConfigurationError(
            f"{name}: expected its weights at {release.path}, got none. Run: lit-merge data prepare {name} (with "
            f"--file FILE if you have them already), or pre-train some with "
            f"configs/pretrain/{name.replace('-', '_')}.yaml and set pretrained to their file."
        )
    found = hashlib.sha256(release.path.read_bytes()).hexdigest()
    if release.sha256 and found != release.sha256:
        raise ConfigurationError(
            f"{release.path}: expected the weights with the SHA-256 {release.sha256}, got {found}. Remove the file and "
            f"run: lit-merge data prepare {name}."
        )
    return release.path


def bring_weights(name: str, file: str | Path | None = None, say: Callable[[str], object] = print) -> Path:
    """Bring a model's weights into the cache, unless they are there.

    Args:
        name: of :data:`RELEASED`.
        file: a copy of them on this machine; None downloads them.
        say: is given lines to show.

    Returns:
        The file in the cache.

    Raises:
        ConfigurationError: there is no such ``file``.
        DataError: the download failed, or the content has another hash than the release.
        WriteError: the disk is full or not writable.
    """
    release = RELEASED[name]
    if file is None and release.path.is_file():
        say(f"{name}: is there already, in {released_weights(name)}")
        return release.path
    if file is not None and not Path(file).is_file():
        raise ConfigurationError(f"file: expected a copy of the weights of {name}, got {file}, which is no file.")
    content = Path(file).read_bytes() if file is not None else _downloaded(release)
    found = hashlib.sha256(content).hexdigest()
    if release.sha256 and found != release.sha256:
        raise DataError(
            f"{name}: expected weights with the SHA-256 {release.sha256}, got {found} of {file or release.url}. "
            "Weights of your own need not be prepared: set pretrained to the path of their file."
        )
    with new_file(release.path, len(content)) as stored:
        stored.write(content)
    say(f"{name}: {len(content) / 1e6:.3g} MB in {release.path}")
    return release.path


def _downloaded(release: Release) -> bytes:
    try:
        with urllib.request.urlopen(release.url, timeout=_SECONDS) as answer:
            content: bytes = answer.read(_LARGEST + 1)
    except (OSError, ValueError) as error:  # what the network, the server or a proxy's settings lead to
        raise DataError(
            f"{release.name}: expected to download its weights from {release.url}, got {one_line(error, 200)}. Check "
            f"the network, or get the file elsewhere and run: lit-merge data prepare {release.name} --file FILE."
        ) from error
    if len(content) > _LARGEST:
        raise DataError(f"{release.url}: expected at most {_LARGEST:,} bytes, got more. It is not the released file.")
    return content
