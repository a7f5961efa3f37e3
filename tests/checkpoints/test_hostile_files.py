"""Hostile and damaged files: none is executed, hangs or takes much memory, and each is one clear line."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import re
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from builders.damaged_files import (
    archive,
    archives,
    bombs,
    headers,
    long,
    mutant,
    pickled,
    read,
    state_dict,
    stream,
    traps,
    write_originals,
)

from lit_merge.checkpoints.pickles.machine import read_pickle
from lit_merge.checkpoints.pickles.torch_files import open_torch_file
from lit_merge.errors import LitMergeError

NOT_TRUSTED = r"which tensors do not need: do not trust it\. Ask its author for a safetensors file or a state dict\.$"
DAMAGED = r"expected a whole pickle of tensors and plain values, got something else at byte [\d,]+ of it \(truncated"
UNKNOWN = r"got opcode 0x{} at byte [\d,]+ of the pickle, which PyTorch does not write: damaged, not to be trusted"
OUTSIDE = r"got a tensor of shape \(.*\) that is not inside its storage of 16 bytes\. Copy or write it again\.$"
ZIP = r"expected a whole zip archive, got {}\. Copy or write it again\.$"

TRAPS = {
    "INST": UNKNOWN.format("69"),
    "state of a class": None,
    **{name: f"got a file that asks for {asked}, {NOT_TRUSTED}" for name, asked in {
        "os.system": r"os\.system",
        "os.system by its number on the stack": r"os\.system",
        "posix.system": r"posix\.system",
        "builtins.eval": r"builtins\.eval",
        "builtins.exec": r"builtins\.exec",
        "__builtin__.eval": r"__builtin__\.eval",
        "getattr of an import": r"builtins\.__import__",
        "subprocess.Popen": r"subprocess\.Popen",
        "functools.partial": r"os\.system",
        "operator.methodcaller": r"operator\.methodcaller",
        "OBJ": r"os\.system",
        "a call that is popped": r"os\.system",
        "a call in the memo": r"os\.system",
        "a call as a key": r"os\.system",
        "a call inside the tensor": r"os\.system",
        "a shell in arguments": r"subprocess\.run",
    }.items()},
}  # fmt: skip

BOMBS = {  # None: the good tensor in it is read
    "new object of subprocess.Popen": rf"got a file that asks for subprocess\.Popen, {NOT_TRUSTED}",
    "getattr of a hidden name": rf"got a file that asks for builtins\.getattr, {NOT_TRUSTED}",
    "getattr of a value": rf"got a file that asks for builtins\.getattr, {NOT_TRUSTED}",
    "getattr of a class": None,
    "extension 1": UNKNOWN.format("82"),
    "extension 2": UNKNOWN.format("83"),
    "extension 4": UNKNOWN.format("84"),
    "textual identifier": UNKNOWN.format("50"),
    "out-of-band buffer": UNKNOWN.format("97"),
    "identifier of something else": "got an identifier of something else than a storage",
    "memo at four thousand millions": None,
    "no end": r"got the end inside the pickle \(truncated\?\)\. Copy",
    "too many names": "got more than 10,000 classes and functions. Save the tensors as a state dict",
    "three million lists": r"got more than 2,000,000 operations\. Save the tensors alone, as a state dict\.$",
    "a list as a key": r"got one named <object>\. Rename it",
    "deep lists": None,
    "deep tuples": None,
    "billion laughs": None,
    "billion laughs as a key": None,
    "a list that contains itself": None,
    "a dict that contains itself": None,
    "a module that contains itself": r"got modules nested deeper than 1,000 \(one that contains itself\?\)\. Save",
    "modules that double": r"got more tensors than a model has\. Save the tensors alone",
    "a section that contains itself": "got none at the top or under state_dict, model_state_dict, model, and",
    "numbers with one hash": "no section with tensors",
    "storage of other things": r"got a storage of unknown kind \(torch\.Module\)\. Convert the tensors",
    "storage that is not there": "got no uncompressed storage for weight",
    "storage out of the archive": "got no uncompressed storage for weight",
    "storage larger than its entry": "got a storage of 16 bytes for weight",
    "tensor beyond its storage": OUTSIDE,
    "tensor of 2 to the 100": OUTSIDE,
    "tensor that strides out": OUTSIDE,
    "expanded to a terabyte": OUTSIDE,
    "a name with a line break": r"got one named a�b\. Rename it",
    "a name that steers terminals": r"got one named �\[2Ja\. Rename it",
}

ARCHIVES = {
    "compressed": r"expected an uncompressed data\.pkl of at most 67,108,864 bytes, got a compressed entry\. Save",
    "a bomb of 100 MB": "got a compressed entry",
    "a pickle of 65 MB": r"expected an uncompressed data\.pkl of at most 67,108,864 bytes, got 68,157,448 bytes",
    "very many entries": None,
    "two pickles": "got a zip archive of other things. Name another file",
    "no pickle": "got a zip archive of other things. Name another file",
    "big-endian": "expected little-endian tensors, got big-endian ones. Save the tensors as a state dict",
    "an entry twice": ZIP.format(r"two entries archive/data\.pkl"),
    "entry beyond the file": ZIP.format("entry archive/version outside the file"),
    "entry of two sizes": ZIP.format("entry archive/data/0 of two sizes"),
    "entry longer than the file": ZIP.format("entry archive/data/0 outside the file"),
    "entry in another's place": ZIP.format("another entry than archive/data/0 in its place"),
    "entries that overlap": ZIP.format(r"entries archive/data\.pkl and archive/byteorder, which overlap"),
    "directory beyond the file": ZIP.format("a directory outside the file"),
    "directory of too many": ZIP.format("a directory of something else"),
    "directory of too few": ZIP.format("a directory of another length"),
    "another disk": ZIP.format("a directory outside the file"),
    "wide directory that lies": ZIP.format("a directory outside the file"),
    "wide locator that lies": r"got a file of [\d,]+ bytes \(truncated\?\)",
    "only an end": ZIP.format("a directory outside the file"),
    "a changed pickle": r"expected data\.pkl as it was written, got other bytes\. Copy or write it again",
}

HEADERS = {
    "overlap": r"expected b from byte 4 of the data on, got 2 \(overlapping\)\. Copy or write it again",
    "hole": r"expected b from byte 4 of the data on, got 5 \(a hole\)\. Copy or write it again",
    "hole in front": r"expected a from byte 0 of the data on, got 4 \(a hole\)",
    "beyond the file": "expected 1,152,921,504,606,847,063 bytes according to the header, got 91",
    "another size": r"expected 8 bytes for a, F32 \[2\], got 4\. Copy or write it again",
    "another dtype": r"expected 8 bytes for a, F64 \[1\], got 4\. Copy or write it again",
    "unknown dtype": r"expected one of the dtypes F64, .*, got �{120}… for a\. Convert",
    "a shape of 2 to the 128": "expected 1,361,129,467,683,753,853,853,498,429,727,072,845,824 bytes for a",
    "a shape of 2 to the 64": "bytes according to the header, got",
    "header of 2 to the 60": r"of at most 16,777,216 bytes, got a header of 1,152,921,504,606,846,976 bytes in a",
    "header of 20 MB": "of at most 16,777,216 bytes, got a header of 20,000,002 bytes",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hostile.pt"


def said_of(kind: str, path: Path, content: bytes) -> str | None:
    """The one line with which a file is refused; None if it is read."""
    path.write_bytes(content)
    said = None
    try:
        read(kind, path)
    except LitMergeError as error:
        said = str(error)
    assert said is None or (said.startswith(f"{path}: expected ") and said.isprintable() and len(said) < 700)
    return said


def check(name: str, said: str | None, expected: str | None) -> None:
    if expected is None:
        assert said is None, name
    else:
        assert said is not None, name
        assert re.search(expected, said), f"{name}: {said}"


@pytest.mark.parametrize("container", [archive, stream])
def test_nothing_in_a_pickle_is_executed(path, tmp_path, container):
    canary = tmp_path / "canary"
    pickles = traps(canary)
    assert set(pickles) == set(TRAPS)
    for name, content in pickles.items():
        check(name, said_of("state dict", path, container(content)), TRAPS[name])
        assert not canary.exists(), name


def test_the_traps_are_live(tmp_path):
    """What is tested above would be executed: Python's own unpickler creates the canary every time."""

    class Careless(pickle.Unpickler):
        def persistent_load(self, identifier):
            return torch.FloatStorage(4)

    canary = tmp_path / "canary"
    content = tmp_path / "content.pkl"
    for name, data in traps(canary).items():
        content.write_bytes(data)
        with content.open("rb") as file, warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            Careless(file).load()
        deadline = time.monotonic() + 10
        while not canary.exists() and time.monotonic() < deadline:  # another process creates it
            time.sleep(0.01)
        assert canary.exists(), name
        canary.unlink()


@pytest.mark.parametrize("container", [archive, stream])
def test_pickles_that_want_time_or_memory(path, container):
    for name, content in bombs().items():
        said = said_of("state dict", path, container(content))
        expected = BOMBS.get(name, DAMAGED)
        # In the older container the same files may be refused earlier, as their storages do not fit.
        check(name, said, expected if container is archive or expected is None else "expected ")
        if said is None:
            assert torch.equal(open_torch_file(path)["weight"], torch.arange(4.0))


def test_archives_that_want_time_or_memory(path):
    found = archives(most_entries=5_000)
    assert set(found) == set(ARCHIVES)
    for name, content in found.items():
        said = said_of("state dict", path, content)
        check(name, said, ARCHIVES[name])
        if said is None:
            assert torch.equal(open_torch_file(path)["weight"], torch.arange(4.0))


def test_headers_that_want_time_or_memory(path):
    for name, content in headers().items():
        check(name, said_of("safetensors", path, content), HEADERS.get(name, "expected a safetensors header, got some"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (stream(state_dict()), None),
        (stream(state_dict(), count=5), r"expected its storages after the pickle, got others\. Copy"),
        (stream(state_dict(), count=3), "expected its storages after the pickle, got others"),
        (stream(state_dict(), count=-1), "expected its storages after the pickle, got others"),
        (stream(state_dict())[:-1], r"expected 1 storages in \d+ bytes, got 1 in \d+ \(truncated\?\)\. Copy"),
        (stream(state_dict(), keys=b"]"), r"expected 1 storages in \d+ bytes, got 0 in"),
        (
            stream(state_dict(), keys=b"]X\1\0\0\0" + b"0q\0ah\0a"),
            "expected its storages after the pickle, got others",
        ),
        (
            stream(state_dict()).replace(b"endian\x88", b"endian\x89"),
            r"expected little-endian tensors, got others\. Save",
        ),
        (b"\x80\x02}.", r"expected a file of torch\.save or torch\.jit\.save, got a pickle of something else\. Save"),
        (
            b"\x80\x02K\x01." * 5,
            r"expected a file of torch\.save or torch\.jit\.save, got a pickle of something else\. Save",
        ),
        (b"", r"expected a file of torch\.save or torch\.jit\.save, got something else\. Name another file"),
        (b"PK", "expected a whole zip archive, got no directory at the end of it"),
    ],
)
def test_the_older_container_is_checked(path, content, expected):
    check("older", said_of("state dict", path, content), expected)


def test_a_file_cannot_choose_keys_with_one_hash():
    """Otherwise a dict of them takes a time that grows with their square."""
    content = pickled(b"}(" + b"".join(long(index * sys.hash_info.modulus) + b"N" for index in range(1000)) + b"u")
    found = read_pickle(io.BytesIO(content), len(content), "a file", lambda one: one, lambda *_: NotImplemented).value
    assert len({hash(key) for key in found}) > 900


@pytest.mark.parametrize("older", [False, True])
def test_every_truncation_is_found(path, older):
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=not older)
    content = path.read_bytes()
    read("state dict", path)
    for size in range(len(content)):
        said = said_of("state dict", path, content[:size])
        assert said is not None, size


def test_every_changed_byte_of_an_archives_pickle_is_found(path):
    torch.save({"a": torch.ones(3)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archived:
        pickle_bytes = archived.read("hostile/data.pkl")
    begin = content.index(pickle_bytes)
    for offset in range(begin, begin + len(pickle_bytes)):
        damaged = content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :]
        check(
            str(offset), said_of("state dict", path, damaged), r"expected data\.pkl as it was written, got other bytes"
        )


AUDIT = """
import json, sys
from pathlib import Path
folder, watched = Path(sys.argv[1]), []
sys.path.insert(0, sys.argv[2])
from builders.damaged_files import read
names = sorted(folder.iterdir())
read("state dict", folder / "0 good")
known = set(sys.modules)

def watch(event, arguments):
    writing = event == "open" and (arguments[1] or "r").strip("rb") != ""
    hostile = ("exec", "compile", "os.system", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class",
               "subprocess.Popen", "os.exec", "ctypes.dlopen", "socket.connect", "os.remove", "os.rename")
    if writing or event in hostile:
        watched.append([event, str(arguments[0])])

sys.addaudithook(watch)
outcomes = {}
for name in names:
    try:
        read("state dict", name)
        outcomes[name.name] = "read"
    except Exception as error:
        outcomes[name.name] = type(error).__name__
found = list(watched)
exec("1")  # what is watched is seen
open(folder.parent / "written", "w").close()
print(json.dumps([outcomes, found, watched[len(found):], sorted(set(sys.modules) - known)]))
"""


def test_no_import_no_call_no_write_happens(tmp_path):
    """An audit hook sees what the interpreter does while hostile files are opened."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "0 good").write_bytes(archive(state_dict()))
    for name, content in traps(tmp_path / "canary").items():
        (folder / f"{name}, archive").write_bytes(archive(content))
        (folder / f"{name}, stream").write_bytes(stream(content))
    unknown = b"cantigravity\nfly\n)Rcthis\nnone\n)\x81}b"
    (folder / "modules that nobody has imported").write_bytes(archive(state_dict(b"X\1\0\0\0a" + unknown[:18])))
    (folder / "a module of a program").write_bytes(archive(state_dict(b"X\1\0\0\0acsqlite_like_program\nModel\n)\x81")))
    run = subprocess.run(
        [sys.executable, "-c", AUDIT, str(folder), str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    outcomes, found, control, imported = json.loads(run.stdout)
    assert found == []
    assert imported == []
    assert {event for event, _ in control} >= {"exec", "open"}
    assert set(outcomes.values()) == {"read", "FileFormatError"}
    assert outcomes["modules that nobody has imported"] == "FileFormatError"
    assert outcomes["a module of a program"] == "read"
    assert not (tmp_path / "canary").exists()


def test_1500_damaged_files(tmp_path):
    """Whatever is done to a file, it is read, or refused in one line; what is refused says which file."""
    originals = write_originals(tmp_path)
    contents = {kind: path.read_bytes() for kind, path in originals.items()}
    for kind, path in originals.items():
        read(kind, path)
    draw = random.Random(20250801)
    refused = dict.fromkeys(originals, 0)
    for number in range(1500):
        kind = draw.choice(list(originals))
        damaged = mutant(draw, contents[kind], list(contents.values()))
        originals[kind].write_bytes(damaged)
        said = None
        try:
            read(kind, originals[kind])
        except LitMergeError as error:
            said = str(error)
        except Exception as error:
            pytest.fail(f"file {number}, {kind}: {error!r}")
        assert said is None or (said.isprintable() and str(originals[kind].parent) in said), (number, kind, said)
        refused[kind] += said is not None
        originals[kind].write_bytes(contents[kind])
    assert min(refused.values()) > 30, refused
    assert sum(refused.values()) < 1500
