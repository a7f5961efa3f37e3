"""Copy vectors, models or coefficients from the Hugging Face Hub.

Examples:
  lit-merge pull hf://owner/name
  lit-merge pull hf://owner/name@main/task_vector.safetensors --output vector.safetensors
  lit-merge pull hf://owner/name/folder --output folder
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.files.hub import fetch, needed_address
from lit_merge.files.writing import writing
from lit_merge.vectors import LazyTensors

__all__ = ["pull"]

POSITIONAL = ("address",)


def pull(address: str, output: str | None = None, overwrite: bool = False) -> Path:
    """Copy a file, a folder or a whole repository from the Hugging Face Hub, and verify what lit-merge wrote.

    Args:
        address: hf://owner/name, with @revision and /path in the repository after it if need be.
        output: the file or folder to write, by default of the same name in the current folder.
        overwrite: replace an existing file.

    Returns:
        The file or folder.

    Raises:
        ConfigurationError: this is no address, or the output exists.
        FileFormatError: a file is damaged; nothing is written then.
        HubError: it cannot be reached or read.
        WriteError: the disk is full or not writable; nothing is left then.
    """
    source = needed_address(address)
    target = Path(output or source.path.rpartition("/")[2] or source.repository.partition("/")[2])
    if target.is_dir() or (target.exists() and not overwrite):
        raise ConfigurationError(
            f"output: expected a new file or folder, got {target}, which exists. Name another one"
            f"{'' if target.is_dir() else ', or set overwrite'}."
        )
    found = fetch(source, everything=True)
    if target.exists() and found.names != (source.path,):
        raise ConfigurationError(f"output: expected a new folder, got the file {target}. Name another one.")
    size = sum((found.folder / name).stat().st_size for name in found.names)
    temporary = target.absolute().with_name(f".{secrets.token_hex(8)}.temporary")
    with writing(target, size):
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            for name in found.names:
                copy = temporary / name[len(source.path) :].lstrip("/") if name != source.path else temporary
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found.folder / name, copy)
                if name.endswith(".safetensors"):
                    _verify(copy, f"{replace(source, path=name)}")
            temporary.replace(target)
        except BaseException:  # an interrupt included
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.unlink(missing_ok=True)
            raise
    return target


def _verify(path: Path, what: str) -> None:
    tensors = LazyTensors(path)
    if tensors.content_digest is not None:
        try:
            tensors.verify()
        except FileFormatError as error:
            raise FileFormatError(f"{what}: {str(error).removeprefix(f'{path}: ')}") from error
