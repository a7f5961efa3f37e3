"""Files on the Hub that are not in the cache: structure first, values later, whole or in ranges.

While :class:`RemoteSources` are active, an ``hf://`` address of safetensors files is opened by requests for ranges of
bytes: headers, the index of shards and the configuration are read, and no tensor. When everything is known to fit, the
files are brought into the Hub's cache, or read in ranges as they are needed, without a copy on the disk.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from bisect import bisect_right
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError, FileFormatError, HubError, first_few, one_line
from lit_merge.files.file_parts import COPY_AGAIN, FileParts, Parts, Slices, bytes_of
from lit_merge.files.hub import (
    Address,
    contents,
    download,
    hub_api,
    local_path,
    parse_address,
    refusals,
    shards_of,
    snapshot_folder,
)
from lit_merge.files.lazy import Slicer

__all__ = [
    "BLOCK",
    "RemoteFile",
    "RemoteParts",
    "RemoteSources",
    "files_in",
    "is_folder",
    "is_remote",
    "located",
    "parts_of",
    "size_of",
]

BLOCK = 8 << 20
"""Bytes of one request while tensors are streamed."""

_AHEAD = 2  # blocks of the same tensor that are fetched while one is used
_KEPT = 4  # times BLOCK, in bytes of one model: those that threads are in, and those ahead
_SMALL = 64 << 10  # bytes of a read that is no part of a stream, such as a sample's; smaller tensors are read together
_TRIES = 4  # without a single byte, before a file is given up
_WAIT = 1.0  # seconds before the first repetition; then twice as long
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_Range = tuple[int, int]  # bytes of a file, up to the second
_TORCH = (b"PK\x03\x04", b"\x80")  # how PyTorch's files begin


class RemoteFile:
    """A file of a commit on the Hub, of which ranges are read; answers that break off are asked for again.

    Args:
        address: of the file, with the commit as its revision.

    Attributes:
        address: of the file.
        size: its length in bytes.
        ranges: whether the server gives parts of it.
        begin: the first nine bytes, if it does.

    Raises:
        HubError: it cannot be read.
    """

    def __init__(self, address: Address) -> None:
        from huggingface_hub import hf_hub_url

        self.address, self.size, self.ranges, self.begin = address, 0, False, b""
        self._url = hf_hub_url(address.repository, address.path, revision=address.revision, endpoint=hub_api().endpoint)
        with refusals(address, "read"), self._response(0, 9) as (response, chunks):
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range") or "")
            self.ranges = response.status_code == 206 and found is not None
            if found is None or not self.ranges:  # what follows is the whole file, which is not read
                self.size = int(response.headers.get("Content-Length") or 0)
                return
            self.size = int(found[3])
            with suppress(Exception):  # it has broken off
                self.begin = b"".join(chunks())[:9]
        if len(self.begin) < min(9, self.size):
            begin = bytearray(min(9, self.size))
            self.fill(memoryview(begin), 0)
            self.begin = bytes(begin)

    def fill(self, memory: memoryview, offset: int) -> None:
        """Read into memory from that byte on; several threads may do so at once.

        Raises:
            HubError: the server does not give it, or not all of it, however often it is asked.
        """
        done, tries = 0, 0
        with refusals(self.address, "read"):
            while done < len(memory):
                count, error = self._some(memory[done:], offset + done)
                done, tries = done + count, 0 if count else tries + 1
                if done == len(memory):
                    return
                if tries > _TRIES:
                    reason = one_line(error, 200) if error is not None else "its end"
                    raise HubError(
                        f"{self.address}: expected bytes {offset:,} to {offset + len(memory):,}, got {done:,} of them "
                        f"({reason}). Repeat the command, or download the file."
                    )
                time.sleep(min(8.0, _WAIT * 2 ** max(0, tries - 1)))

    def _some(self, memory: memoryview, offset: int) -> tuple[int, Exception | None]:
        """As many bytes as one answer has, and why there are no more, if that is known."""
        done = 0
        with self._response(offset, offset + len(memory)) as (response, chunks):
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range") or "")
            if response.status_code != 206 or found is None:
                raise HubError(
                    f"{self.address}: expected a range of its bytes, got status {response.status_code}: the server no "
                    "longer gives ranges. Set remote to download."
                )
            if (int(found[1]), int(found[3])) != (offset, self.size):
                raise HubError(
                    f"{self.address}: expected bytes from {offset:,} on of {self.size:,}, got {found[0]}. "
                    "Set remote to download."
                )
            try:
                for chunk in chunks():
                    part = memory[done : done + len(chunk)]
                    part[:] = chunk[: len(part)]
                    done += len(part)
            except Exception as error:  # network libraries raise whatever they like; inside, as theirs would retry
                return done, error
        return done, None

    @contextmanager
    def _response(self, start: int, stop: int) -> Iterator[tuple[Any, Callable[[], Iterator[bytes]]]]:
        """The answer to a request for a range, and its body in chunks; the library waits and retries on 429 and 5xx."""
        from huggingface_hub import constants, utils

        headers = utils.build_hf_headers(library_name="lit-merge", library_version=__version__)
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        settings: dict[str, Any] = {
            "headers": headers,
            "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
            "base_wait_time": _WAIT,
        }
        if hasattr(utils, "http_stream_backoff"):
            with utils.http_stream_backoff("GET", self._url, **settings) as response:
                utils.hf_raise_for_status(response)
                yield response, response.iter_bytes
        else:  # before version 1.0
            answer: Any = utils.http_backoff("GET", self._url, stream=True, **settings)
            try:
                utils.hf_raise_for_status(answer)
                yield answer, partial(answer.iter_content, 1 << 20)
            finally:
                answer.close()


class RemoteParts:
    """As :class:`~lit_merge.files.file_parts.FileParts`, of a file on the Hub.

    Args:
        file: on the Hub.
        path: where it would be in the cache.
        blocks: through which streams read.

    Attributes:
        path: where it would be in the cache.
        size: its length in bytes.
        address: of the file, with its commit.
    """

    def __init__(self, file: RemoteFile, path: Path, blocks: _Blocks) -> None:
        self.path, self.size, self.address = path, file.size, file.address
        self._file, self._blocks, self._begin = file, blocks, file.begin
        self._bounds = [0, file.size]
        self._ends: deque[int] = deque(maxlen=16)  # of the last reads

    def bytes(self, start: int, length: int) -> bytes:
        """A few bytes of the file; what they are is for the caller to check.

        Raises:
            FileFormatError: they are outside the file.
            HubError: they cannot be read.
        """
        self._check(start, length)
        if start + length > len(self._begin):  # headers are asked for again
            more = bytearray(start + length - len(self._begin))
            self._file.fill(memoryview(more), len(self._begin))
            self._begin += more
        return self._begin[start : start + length]

    def tensor(self, name: str, dtype: torch.dtype, shape: torch.Size, start: int) -> Tensor:
        """A tensor of its own, whose elements are contiguous from byte ``start`` on.

        Raises:
            FileFormatError: the file is shorter than that.
            HubError: it cannot be read.
        """
        found = torch.empty(shape, dtype=dtype)
        if found.numel():
            self.fill(bytes_of(found), start, name)
        return found

    def slicer(self, name: str, dtype: torch.dtype, start: int) -> Slicer:
        """A function that reads parts of one flattened tensor, whose elements start at byte ``start`` on."""
        return Slices(self, name, dtype, start)

    def filling(self, what: str) -> RemoteParts:
        """This one."""
        return self

    def divide(self, starts: Iterable[int]) -> None:
        """Say where tensors start, so that what is fetched ahead ends with the tensor that is read."""
        self._bounds = sorted({0, self.size, *starts})

    def fill(self, memory: memoryview, offset: int, what: str) -> None:
        """Read into memory from that byte on; a stream of reads, in blocks that are fetched ahead."""
        length = len(memory)
        self._check(offset, length)
        streamed = length >= _SMALL or self._follows(offset, length)
        self._ends.append(offset + length)
        if not (self._blocks.active and streamed):
            self._file.fill(memory, offset)
            return
        while memory:
            block, ahead = self._around(offset)
            part = self._blocks.get(self._file, block, ahead, offset, len(memory))
            memory[: len(part)] = part
            memory, offset = memory[len(part) :], offset + len(part)

    def _follows(self, offset: int, length: int) -> bool:
        """Whether a small read is the next one of a tensor, or all of one."""
        after = bisect_right(self._bounds, offset)
        begins = after < len(self._bounds) and self._bounds[after - 1] == offset
        return length >= self._bounds[after] - offset if begins else offset in self._ends

    def _around(self, offset: int) -> tuple[_Range, list[_Range]]:
        """The block that a byte is in, and those that follow it in the same tensor."""
        after = bisect_right(self._bounds, offset)
        start, stop = self._bounds[after - 1], self._bounds[min(after, len(self._bounds) - 1)]
        if stop - start < _SMALL:  # with its neighbours, of which one that is small is likely to follow
            start = offset // _SMALL * _SMALL
            return (start, min(start + _SMALL, self.size)), []
        first = start + (offset - start) // BLOCK * BLOCK
        blocks = [(at, min(at + BLOCK, stop)) for at in range(first, stop, BLOCK)[: 1 + _AHEAD]]
        return blocks[0], blocks[1:]

    @property
    def deferred(self) -> bool:
        """Whether the file is open for its structure alone as yet."""
        return not self._blocks.active

    def _check(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.size:
            raise FileFormatError(
                f"{self.address}: expected bytes {start:,} to {start + length:,}, got a file of {self.size:,} bytes "
                f"(truncated?). {COPY_AGAIN}"
            )


class _Blocks:
    """The last blocks of all files, and the next ones of a tensor, which are fetched while those are used.

    Attributes:
        active: whether reads go through blocks; before, what is asked for is fetched and nothing else.
        models: how many are read side by side.
    """

    def __init__(self) -> None:
        self.active, self.models = False, 0
        self._lock = threading.Condition()
        self._kept: OrderedDict[tuple[RemoteFile, _Range], Future[bytearray]] = OrderedDict()
        self._readers: Counter[tuple[RemoteFile, _Range]] = Counter()  # that wait for a block now: it stays
        self._done: set[tuple[RemoteFile, _Range]] = set()  # read to the end, by one reader at least
        self._threads: ThreadPoolExecutor | None = None

    @property
    def memory(self) -> int:
        """Bytes that are held at most."""
        return _KEPT * BLOCK * self.models

    def get(self, file: RemoteFile, block: _Range, ahead: Sequence[_Range], offset: int, length: int) -> memoryview:
        """Bytes of a block from ``offset`` on, at most ``length``; what is ahead is asked for where there is room."""
        key = file, block
        with self._lock:
            while key not in self._kept and not self._room(block[1] - block[0], of_read=False):
                self._lock.wait()  # for other threads' blocks
            found = self._asked(file, block)
            self._kept.move_to_end(key)
            self._readers[key] += 1
            for one in ahead:
                if (file, one) not in self._kept and self._room(one[1] - one[0], of_read=True):
                    self._asked(file, one)
        failed = True
        try:
            part = memoryview(found.result())[offset - block[0] :][:length]
            failed = False
        finally:
            with self._lock:
                self._readers -= Counter([key])  # drops what nobody waits for
                if failed:
                    self._forget(key)
                elif offset + len(part) == block[1] and key in self._kept:
                    self._done.add(key)
                self._lock.notify_all()
        return part

    def _asked(self, file: RemoteFile, block: _Range) -> Future[bytearray]:
        if (file, block) not in self._kept:
            self._threads = self._threads or ThreadPoolExecutor(max_workers=8)
            self._kept[file, block] = self._threads.submit(self._read, file, block)
        return self._kept[file, block]

    def _room(self, size: int, of_read: bool) -> bool:
        """Make room: of what has been read to its end first; of what has not, if that is allowed, the oldest.

        What a thread waits for stays: its request, if that has not begun, would be cancelled.
        """
        over = sum(stop - start for _, (start, stop) in self._kept) + size - max(1, self.models) * _KEPT * BLOCK
        for key in sorted(self._kept, key=lambda key: key not in self._done):  # stable: the oldest first
            if over <= 0 or (of_read and key not in self._done):
                break
            if self._readers[key]:
                continue
            over -= key[1][1] - key[1][0]
            self._forget(key)
        return over <= 0

    def _forget(self, key: tuple[RemoteFile, _Range]) -> None:
        self._done.discard(key)
        if (future := self._kept.pop(key, None)) is not None:
            future.cancel()

    def _read(self, file: RemoteFile, block: _Range) -> bytearray:
        found = bytearray(block[1] - block[0])
        file.fill(memoryview(found), block[0])
        return found

    def close(self) -> None:
        """Forget everything; what is under way is given up."""
        self.active = False
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
            self._kept.clear()
            self._done.clear()
            self._threads = None
            self._lock.notify_all()


class RemoteSources:
    """What is opened from the Hub in this context without being downloaded.

    Args:
        stream: whether tensors are read in ranges, without a copy in the cache. Otherwise :meth:`fetch` downloads.

    Examples:
        >>> with RemoteSources() as sources:
        ...     sources.pending
        {}
    """

    def __init__(self, stream: bool = False) -> None:
        self.stream = stream
        self._pending: dict[Path, RemoteParts] = {}
        self._places: dict[str, Path] = {}
        self._blocks = _Blocks()
        self._token: Token[RemoteSources | None] | None = None

    def __enter__(self) -> RemoteSources:
        self._token = _ACTIVE.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._token is not None:
            _ACTIVE.reset(self._token)
        self._blocks.close()

    @property
    def pending(self) -> dict[Path, int]:
        """Where files would be in the cache that are not there -> their bytes."""
        return {path: parts.size for path, parts in self._pending.items()}

    @property
    def memory(self) -> int:
        """Bytes of memory that streaming holds at most."""
        return self._blocks.memory if self.stream and self._pending else 0

    def at(self, path: Path) -> RemoteParts | None:
        """The file that is not in the cache, of one that would be there."""
        return self._pending.get(path)

    def locate(self, address: Address) -> Path:
        """As :func:`~lit_merge.files.hub.local_path`, but files of tensors are left where they are.

        What has no header to read (PyTorch files, or anything on a server that gives no ranges) is downloaded, if the
        cache has room for it.

        Raises:
            HubError: the Hub, the repository, the revision or the file cannot be reached or read.
            ConfigurationError: the cache has no room, or what is to be streamed cannot be.
        """
        if (known := self._places.get(str(address))) is not None:
            return known
        found = contents(address)
        if found is None:
            return local_path(str(address))
        at = replace(address, revision=found.commit)
        small = [name for name in found.names if name.endswith(".json")]
        folder = download(at, small) if small else snapshot_folder(at)
        weights = [name for name in found.names if name not in small]
        weights += [name for name in shards_of(folder, small, found.listing) if name not in found.names]
        absent = [name for name in weights if not (folder / name).is_file()]
        with ThreadPoolExecutor(max_workers=8) as threads:
            files = list(threads.map(lambda name: RemoteFile(replace(at, path=name)), absent))
        self._whole(at, [file for file in files if not _has_header(file)])
        for file in files:
            path = folder / file.address.path
            if _has_header(file):
                self._pending.setdefault(path, RemoteParts(file, path, self._blocks))
        self._blocks.models += any(_has_header(file) for file in files)
        self._places[str(address)] = folder / address.path
        return folder / address.path

    def _whole(self, at: Address, files: Sequence[RemoteFile]) -> None:
        """Download what has to be whole before it can be opened."""
        if not files:
            return
        if self.stream:
            why = "a file without a header of names and shapes" if files[0].ranges else "a server that gives no ranges"
            raise ConfigurationError(
                f"remote stream: expected safetensors files, and a server that gives ranges of them, got {why} "
                f"({files[0].address}). Set remote to download."
            )
        self.check_room(sum(file.size for file in files))
        download(at, [file.address.path for file in files])

    def check_room(self, more: int = 0, written: int = 0, output: Path | None = None) -> None:
        """Refuse what the cache has no room for, or may not be written to, before anything is fetched.

        Args:
            more: bytes that are to be downloaded beside the files that are pending.
            written: bytes that are to be written elsewhere.
            output: the folder that they are written to.

        Raises:
            ConfigurationError: less is free than is needed, or the cache is not writable.
        """
        from huggingface_hub import constants

        needed = more + (0 if self.stream else sum(self.pending.values()))
        if not needed:
            return
        cache = Path(constants.HF_HUB_CACHE).absolute()
        existing = _existing(cache)
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigurationError(
                f"cache: expected a folder that may be written to, got {existing}. Set HF_HOME to another folder."
            )
        same = output is not None and _existing(output).stat().st_dev == existing.stat().st_dev
        free = shutil.disk_usage(existing).free
        if free < needed + (written if same else 0):
            also = f" and {_mib(written)} for the output on the same disk" if same and written else ""
            raise ConfigurationError(
                f"cache: expected {_mib(needed)} of free space in {existing} for what is downloaded{also}, got "
                f"{_mib(free)}. Free some, set HF_HOME to another folder, or remote to stream."
            )

    def fetch(self) -> None:
        """Bring what is pending into the cache; where it is streamed, begin to read ahead.

        Raises:
            HubError: it cannot be reached or read, or there is no room.
        """
        if self.stream:
            self._blocks.active = True
            return
        of_commit: dict[tuple[str, str | None], list[str]] = {}
        for parts in self._pending.values():
            of_commit.setdefault((parts.address.repository, parts.address.revision), []).append(parts.address.path)
        for (repository, revision), names in of_commit.items():
            download(Address(repository, revision=revision), names)
        self._pending.clear()
        self._blocks.models = 0

    def describe(self, passes: int) -> str:
        """What is to be fetched, in words.

        Args:
            passes: how often every input is read.
        """
        total, names = sum(self.pending.values()), first_few(path.name for path in self._pending)
        count = f"{len(self._pending)} file{'s' if len(self._pending) != 1 else ''} ({names})"
        if self.stream:
            return (
                f"on the Hub: {count} of {_mib(total)}, read in ranges of {_mib(BLOCK)} in {passes} "
                f"pass{'es' if passes != 1 else ''}, without a copy"
            )
        return f"on the Hub: {count}, {_mib(total)} to download into the cache"


_ACTIVE: ContextVar[RemoteSources | None] = ContextVar("sources on the Hub", default=None)


def located(path: str | os.PathLike[str]) -> Path:
    """Where a path leads on this machine; of what is remote, where it would be in the cache.

    Raises:
        LitMergeError: as for :func:`~lit_merge.files.hub.local_path` and :meth:`RemoteSources.locate`.
    """
    address, sources = parse_address(path), _ACTIVE.get()
    return local_path(path) if address is None or sources is None else sources.locate(address)


def parts_of(path: str | os.PathLike[str], what: str) -> Parts:
    """A file of which tensors and bytes are read, on the disk or on the Hub.

    Args:
        path: the file, or its address on the Hub.
        what: what it is expected to be, see :class:`~lit_merge.files.file_parts.FileParts`.

    Raises:
        FileFormatError: there is no such file, or it is a folder or device.
        HubError: it is on the Hub, and cannot be read.
    """
    found = located(path)
    return _remote(found) or FileParts(found, what)


def is_remote(path: Path) -> bool:
    """Whether a file would be in the cache, and is opened on the Hub instead."""
    return _remote(path) is not None


def is_folder(path: Path) -> bool:
    """Whether a path is a folder, or would be one in the cache, of files that are opened on the Hub instead."""
    sources = _ACTIVE.get()
    return path.is_dir() or (sources is not None and any(one.parent == path for one in sources.pending))


def files_in(folder: Path) -> list[str]:
    """The names of the files in a folder, with those that would be there if they were not on the Hub.

    Raises:
        OSError: there is no such folder, nor would there be.
    """
    sources = _ACTIVE.get()
    remote = [path.name for path in sources.pending if path.parent == folder] if sources is not None else []
    if remote and not folder.exists():
        return sorted(remote)
    here = [path.name for path in folder.iterdir() if path.is_file()]
    return sorted({*here, *remote})


def size_of(path: Path) -> int:
    """Bytes of a file, on the disk or on the Hub.

    Raises:
        OSError: there is none.
    """
    found = _remote(path)
    return path.stat().st_size if found is None else found.size


def _remote(path: Path) -> RemoteParts | None:
    sources = _ACTIVE.get()
    return None if sources is None else sources.at(path)


def _has_header(file: RemoteFile) -> bool:
    """Whether a file can be opened by its header; one that only says so is refused when it is."""
    named = file.address.path.endswith(".safetensors") and not file.begin.startswith(_TORCH)
    return file.ranges and (file.begin[8:] == b"{" or named)


def _existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
