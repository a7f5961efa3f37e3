"""The file format: atomic, deterministic, lazy, and every damage found."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import pickle
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, WriteError
from lit_merge.files import store
from lit_merge.files.content_digest import new_digest
from lit_merge.files.lazy import Computed, Selected
from lit_merge.files.shards import open_tensors
from lit_merge.vectors import LazyTensors, file_digest, verify, write_tensors

TENSORS = {
    "z.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.bias": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.25, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "count": torch.tensor([7], dtype=torch.int64),
    "mask": torch.tensor([True, False, True]),
    "größe": torch.tensor([0.1], dtype=torch.float16),
}
METADATA = {"task": "Ziffern äöü", "format": "test", "note": ""}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tensors.safetensors"
    write_tensors(file, TENSORS, METADATA)
    return file


class Failing(Mapping):
    """Two tensors, of which the second cannot be read."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "second":
            raise self.error
        return torch.zeros(1000)

    def __iter__(self):
        return iter(["first", "second"])

    def __len__(self) -> int:
        return 2

    def shape(self, name: str) -> torch.Size:
        return torch.Size([1000])

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


def assert_holds(tensors: Mapping[str, torch.Tensor]) -> None:
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_round_trip(path):
    lazy = LazyTensors(path, verify=True)
    assert_holds(lazy)
    assert lazy.metadata == METADATA
    assert len(lazy) == len(TENSORS)
    assert lazy.path == path
    assert "nothing" not in lazy
    with pytest.raises(KeyError):
        lazy["nothing"]
    assert repr(lazy) == f"LazyTensors({str(path)!r})"
    verify(path)


def test_any_safetensors_reader_opens_it(path):
    assert_holds(load_file(path))


def test_the_bytes_are_the_format(tmp_path):
    file = tmp_path / "one.safetensors"
    digest = write_tensors(file, {"b": torch.tensor([1.0]), "a": torch.tensor([2.0])}, {"y": "2", "x": "1"})
    header = (
        f'{{"__metadata__":{{"content_blake3":"{digest}","x":"1","y":"2"}},'
        '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    ).encode()
    padded = header.ljust(-(-len(header) // 8) * 8)
    assert file.read_bytes() == len(padded).to_bytes(8, "little") + padded + bytes.fromhex("000000400000803f")


@pytest.mark.parametrize(("key", "digest"), [("content_blake3", blake3), ("content_sha256", hashlib.sha256)])
def test_what_the_digest_is_of_and_that_of_earlier_versions(tmp_path, key, digest):
    content = digest(b'["a", "F32", [1]]' + bytes(4) + b'{"x": "1"}').hexdigest()
    path = tmp_path / "one.safetensors"
    path.write_bytes(framed({"__metadata__": {key: content, "x": "1"}, "a": ENTRY}, bytes(4)))
    opened = LazyTensors(path, verify=True)
    assert (opened.content_key, opened.content_digest, opened.metadata) == (key, content, {"x": "1"})
    assert key != "content_blake3" or write_tensors(tmp_path / "b", {"a": torch.zeros(1)}, {"x": "1"}) == content
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(FileFormatError, match=rf"expected content {content[:16]}…?, got [0-9a-f]{{16}}…: the file"):
        verify(path)


def test_shards_of_different_versions(tmp_path):
    files = {"a": "content_blake3", "b": "content_sha256"}
    for name, key in files.items():
        content = new_digest(key)
        content.update(f'["{name}", "F32", [1]]'.encode() + bytes(4) + b"{}")
        header = {"__metadata__": {key: content.hexdigest()}, name: ENTRY}
        (tmp_path / f"{name}.safetensors").write_bytes(framed(header, bytes(4)))
    index = {"weight_map": {name: f"{name}.safetensors" for name in files}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = open_tensors(tmp_path, verify=True)
    lines = "".join(
        f"{name}.safetensors {LazyTensors(tmp_path / f'{name}.safetensors').content_digest}\n" for name in "ab"
    )
    assert (opened.content_key, opened.content_digest) == ("content_sha256", hashlib.sha256(lines.encode()).hexdigest())


def test_same_input_gives_the_same_bytes(path, tmp_path):
    other = tmp_path / "other.safetensors"
    write_tensors(other, dict(reversed(TENSORS.items())), dict(reversed(METADATA.items())))
    assert other.read_bytes() == path.read_bytes()
    write_tensors(other, LazyTensors(path), LazyTensors(path).metadata)
    assert other.read_bytes() == path.read_bytes()


def test_non_contiguous_and_shared_tensors(tmp_path):
    file = tmp_path / "views.safetensors"
    whole = torch.arange(12.0).view(3, 4).requires_grad_()
    write_tensors(file, {"t": whole.t(), "column": whole[:, 1], "whole": whole}, {})
    lazy = LazyTensors(file, verify=True)
    assert torch.equal(lazy["t"], whole.detach().t())
    assert torch.equal(lazy["column"], whole.detach()[:, 1])


def test_shapes_and_dtypes_are_known_without_reading(path, monkeypatch):
    lazy = LazyTensors(path)
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda *_: pytest.fail("read"))
    for name, tensor in TENSORS.items():
        assert lazy.shape(name) == tensor.shape
        assert lazy.dtype(name) == tensor.dtype


def test_every_read_is_independent(path):
    lazy = LazyTensors(path)
    before = path.read_bytes()
    lazy["z.weight"].zero_()
    assert torch.equal(lazy["z.weight"], TENSORS["z.weight"])
    assert path.read_bytes() == before


def test_pickles_by_path(path):
    data = pickle.dumps(LazyTensors(path))
    assert len(data) < 500
    assert_holds(pickle.loads(data))


def test_file_digest(path, tmp_path):
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(FileFormatError, match=r"none\.bin: expected a safetensors file, got No such file"):
        file_digest(tmp_path / "none.bin")


def test_files_of_other_programs_are_read_but_not_verified(tmp_path):
    file = tmp_path / "foreign.safetensors"
    save_file(TENSORS, file)
    assert_holds(LazyTensors(file))
    with pytest.raises(FileFormatError, match="expected a content digest in the header, got none"):
        verify(file)


def test_late_metadata_replaces_its_placeholder(tmp_path):
    file = tmp_path / "late.safetensors"
    read = []
    tensors = Computed({"a": (torch.Size([1]), torch.float32)}, lambda name: read.append(name) or torch.ones(1))
    write_tensors(file, tensors, {"read": "....."}, late_metadata=lambda: {"read": str(len(read))})
    assert LazyTensors(file, verify=True).metadata == {"read": "1"}
    with pytest.raises(ConfigurationError, match="late metadata: expected at most"):
        write_tensors(file, tensors, {"read": ""}, late_metadata=lambda: {"read": "long" * 9})
    assert LazyTensors(file, verify=True).metadata == {"read": "1"}


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_in_the_middle_changes_nothing(tmp_path, error, existing):
    file = tmp_path / "target.safetensors"
    if existing:
        write_tensors(file, TENSORS, METADATA)
    before = file.read_bytes() if existing else None
    with pytest.raises(type(error)):
        write_tensors(file, Failing(error), {})
    assert [item.name for item in tmp_path.iterdir()] == ([file.name] if existing else [])
    assert not existing or file.read_bytes() == before


@pytest.mark.parametrize("where", ["_write", "os.fsync"])
def test_a_full_disk_changes_nothing(path, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = path.read_bytes()
    monkeypatch.setattr(store._Background if where == "_write" else os, where.removeprefix("os."), full)
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(path, {"a": torch.zeros(100)}, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="the system has no fdatasync")
@pytest.mark.parametrize("call", [0, 1])
def test_what_fails_on_the_way_to_the_disk_is_not_lost(path, monkeypatch, call):
    """The system says once that a page could not be written: the owner's fsync would succeed after that."""
    calls = []

    def refuse(descriptor):
        calls.append(descriptor)
        if len(calls) == call + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = path.read_bytes()
    monkeypatch.setattr(store, "_TO_DISK", 4000)
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(WriteError, match="Input/output error"):
        write_tensors(path, {name: torch.zeros(1000) for name in "abcdef"}, {})
    assert len(calls) > call
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_process_leaves_the_old_file(path):
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        kill = Computed(
            {name: (torch.Size([1000]), torch.float32) for name in "ab"},
            lambda name: torch.zeros(1000) if name == "a" else os.kill(os.getpid(), signal.SIGKILL),
        )
        write_tensors(path, kill, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == before
    verify(path)


def test_permissions_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(previous)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_truncation_is_found_on_opening_at_every_offset(path):
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(FileFormatError, match=r"tensors\.safetensors: expected .* bytes") as caught:
            LazyTensors(path)
        assert f"{size:,}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_size_is_reported(path):
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match=f"expected {size:,} bytes according to the header, got {size - 3:,}"):
        LazyTensors(path)
    path.write_bytes(path.read_bytes() + bytes(10))
    with pytest.raises(FileFormatError, match=f"expected {size:,} bytes according to the header, got {size + 7:,}"):
        LazyTensors(path)


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
def test_a_flipped_bit_is_found_by_verify_at_every_offset(path, bit):
    data = path.read_bytes()
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            verify(path)
    path.write_bytes(data)
    verify(path)


def test_a_flipped_bit_in_the_data_is_described(path):
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    LazyTensors(path)  # what is cheap to check is right
    with pytest.raises(
        FileFormatError, match=r"tensors\.safetensors: expected content .*…, got .*…: the file has chang"
    ):
        verify(path)


def framed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GARBAGE = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "text": b"this is not a safetensors file at all",
    "pickle": b"\x80\x02}q\x00(X\x05\x00\x00\x00" + bytes(100),
    "zip": b"PK\x03\x04" + bytes(200),
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "no json": framed(b"{" * 40),
    "deep json": framed(b"[" * 100_000),
    "list": framed([1, 2]),
    "number": framed(b"17"),
    "not utf-8": framed(b'{"\xff\xfe": 1}'),
    "entry is a number": framed({"a": 3}),
    "entry without dtype": framed({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "entry without offsets": framed({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "infinite offset": framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}'),
    "metadata is a list": framed({"__metadata__": [], "a": ENTRY}, bytes(4)),
    "metadata is no string": framed({"__metadata__": {"content_blake3": 3}, "a": ENTRY}, bytes(4)),
    "negative shape": framed({"a": {**ENTRY, "shape": [-1]}}, bytes(4)),
    "text shape": framed({"a": {**ENTRY, "shape": ["1"]}}, bytes(4)),
    "huge shape": framed({"a": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(4)),
    "shape and size differ": framed({"a": {**ENTRY, "shape": [3]}}, bytes(4)),
    "unknown dtype": framed({"a": {**ENTRY, "dtype": "F17"}}, bytes(4)),
    "overlap": framed({"a": ENTRY, "b": ENTRY}, bytes(4)),
    "hole": framed({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 12]}}, bytes(12)),
    "text offsets": framed({"a": {**ENTRY, "data_offsets": ["0", "4"]}}, bytes(4)),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_hostile_and_foreign_files_are_refused(tmp_path, content):
    file = tmp_path / "garbage.safetensors"
    file.write_bytes(content)
    with pytest.raises(
        FileFormatError, match=r"garbage\.safetensors: expected .*(Copy or write it again|Convert that|Check the path)"
    ):
        LazyTensors(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            r"got a pointer of Git LFS\. Run git lfs pull\.$",
        ),
        ("data: 1\nmodel: 2\n", r"got text\. Check the path\.$"),
    ],
)
def test_text_is_no_tensors(content, message, tmp_path):
    (tmp_path / "a.safetensors").write_text(content)
    with pytest.raises(FileFormatError, match=message):
        LazyTensors(tmp_path / "a.safetensors")


def test_a_torch_checkpoint_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(FileFormatError, match="truncated, or another format"):
        LazyTensors(tmp_path / "trap.pt")
    assert not (tmp_path / "executed").exists()


def test_unusual_dtypes_are_refused_by_name(tmp_path):
    file = tmp_path / "complex.safetensors"
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, file)
    with pytest.raises(FileFormatError, match=r"expected one of the dtypes F64, .*, got C64 for a"):
        LazyTensors(file)
    with pytest.raises(ConfigurationError, match=r"a: expected a dtype that can be stored, got torch\.complex64"):
        write_tensors(file, {"a": torch.zeros(2, dtype=torch.complex64)}, {})


def test_missing_paths(tmp_path):
    with pytest.raises(
        FileFormatError, match=r"none\.safetensors: expected a safetensors file, got No such file.*Check"
    ):
        LazyTensors(tmp_path / "none.safetensors")
    with pytest.raises(FileFormatError, match=r"got a folder or device\. Name the file in it"):
        LazyTensors(tmp_path)
    with pytest.raises(ConfigurationError, match=r"expected an existing folder to write into, got none\. Create it"):
        write_tensors(tmp_path / "no" / "folder.safetensors", TENSORS, {})


def test_a_file_that_changed_is_not_read_on(path):
    lazy = LazyTensors(path)
    write_tensors(path, {name: tensor[:0] if tensor.dim() else tensor for name, tensor in TENSORS.items()}, {})
    with pytest.raises(
        FileFormatError, match=r"expected the file as it was opened, but it has changed\. Load it again"
    ):
        lazy["z.weight"]
    path.unlink()
    with pytest.raises(LitMergeError, match="No such file"):
        lazy["z.weight"]


def test_a_file_can_be_written_over_itself(path):
    write_tensors(path, LazyTensors(path), METADATA)
    assert_holds(LazyTensors(path, verify=True))


def test_what_cannot_be_a_header_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(ConfigurationError, match=r"metadata 'step': expected strings, got int\. Use json\.dumps"):
        write_tensors(file, TENSORS, {"step": 3})
    with pytest.raises(ConfigurationError, match="tensor name '__metadata__': expected a string other than"):
        write_tensors(file, {"__metadata__": torch.zeros(1)}, {})
    lying = Computed({"a": (torch.Size([2]), torch.float32)}, lambda name: torch.zeros(3))
    with pytest.raises(ConfigurationError, match=r"a: expected torch.float32 \(2,\) as announced, got 3 elements"):
        write_tensors(file, lying, {})
    assert list(tmp_path.iterdir()) == []


def test_parts_are_read_from_the_file_without_mapping_it(path, tmp_path):
    stored = LazyTensors(path)
    for name, tensor in stored.items():
        flat, read = tensor.reshape(-1), stored.slicer(name)
        for start, stop in ((0, len(flat)), (len(flat) // 3, len(flat) - len(flat) // 3), (len(flat), len(flat))):
            same = torch.empty(stop - start, dtype=tensor.dtype)
            read(start, stop, same)
            assert torch.equal(same, flat[start:stop])
            other = torch.empty(stop - start, dtype=torch.float64)
            read(start, stop, other)
            assert torch.equal(other, flat[start:stop].double())
    with pytest.raises(KeyError):
        stored.slicer("none")


def test_parts_of_a_file_that_changed_are_refused(path):
    stored = LazyTensors(path)
    name, tensor = next((name, tensor) for name, tensor in stored.items() if tensor.numel() > 1)
    read = stored.slicer(name)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(FileFormatError, match=r"expected the file as it was opened, but it has changed\. Load it"):
        stored.slicer(name)
    path.write_bytes(b"")
    with pytest.raises(FileFormatError, match=rf"expected the file as it was opened, got its end inside {name}\."):
        read(0, tensor.numel(), torch.empty(tensor.numel(), dtype=tensor.dtype))


def test_files_are_closed_when_their_parts_are_no_longer_read(path):
    stored = LazyTensors(path)
    gc.collect()
    opened = len(list(Path("/proc/self/fd").iterdir()))
    readers = [stored.slicer(name) for name in stored]
    assert len(list(Path("/proc/self/fd").iterdir())) == opened + 1
    del readers
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_pieces_of_a_stream_are_written_as_whole_tensors_are(tmp_path):
    class InPieces(Computed):
        def stream(self, names):
            for name in names:
                yield from ((name, piece) for piece in self[name].reshape(-1).split(3))

    structure = {name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}
    whole = write_tensors(tmp_path / "whole.safetensors", TENSORS, METADATA)
    pieces = InPieces(structure, TENSORS.__getitem__)
    assert write_tensors(tmp_path / "pieces.safetensors", pieces, METADATA) == whole
    selected = Selected(pieces, {name: name for name in TENSORS})
    assert write_tensors(tmp_path / "selected.safetensors", selected, METADATA) == whole


def test_the_last_tensors_may_be_empty_and_the_disk_slow(tmp_path, monkeypatch):
    whole = store._Background._write

    def slow(self, entry, data):
        time.sleep(0.05)
        whole(self, entry, data)

    monkeypatch.setattr(store._Background, "_write", slow)
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(3), "y": torch.empty(0), "z": torch.empty(0, 3)}, {})
    assert LazyTensors(path, verify=True)["z"].shape == (0, 3)
