"""Tiny packages in the registries' formats: a wheel, an npm tarball, a Debian package."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["tar_of", "write_package"]


def tar_of(files: Mapping[str, bytes], mode: str = "w:gz", links: Mapping[str, str] | None = None) -> bytes:
    """A tar archive of files, and of symbolic links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


def write_package(path: Path, files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> Path:
    """A package with these files; its ending says of which kind."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif path.suffix == ".tgz":
        path.write_bytes(tar_of(files, links=links))
    else:
        data = tar_of({f"./{name}": content for name, content in files.items()}, "w:xz", links)
        parts = {"debian-binary": b"2.0\n", "control.tar.xz": tar_of({"./control": b"x"}, "w:xz"), "data.tar.xz": data}
        path.write_bytes(b"!<arch>\n" + b"".join(_ar(name, content) for name, content in parts.items()))
    return path


def _ar(name: str, content: bytes) -> bytes:
    return (
        f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    )
