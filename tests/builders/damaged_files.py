"""Files that mean harm, files that are whole, and damage done to them: for the tests and for the benchmark."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.checkpoints.adapters.reading import open_adapter
from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.checkpoints.pickles.torch_files import open_torch_file
from lit_merge.files.shards import open_tensors, plan_shards, write_shards
from lit_merge.files.store import write_tensors
from lit_merge.vectors import Coefficients

# Pickles by hand


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def pickled(*operations: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(operations) + b"."


WEIGHT = call(
    "torch._utils",
    "_rebuild_tensor_v2",
    b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ",
    b"K\x00(K\x04t(K\x01t\x89" + named("collections", "OrderedDict") + b")R",
)
"""A tensor of four entries in storage 0."""


def state_dict(*more: bytes) -> bytes:
    """A dict with the tensor ``weight``, and keys and values given as operations."""
    return pickled(b"}(" + text("weight") + WEIGHT + b"".join(more) + b"u")


def tensor(count: int, offset: int, shape: bytes, stride: bytes, kind: str = "FloatStorage", key: str = "0") -> bytes:
    """A state dict with one tensor that lies as given in a storage of so many entries."""
    identifier = b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + long(count) + b"tQ"
    rest = long(offset) + b"(" + shape + b"t(" + stride + b"t\x89" + named("collections", "OrderedDict") + b")R"
    return pickled(b"}" + text("weight") + call("torch._utils", "_rebuild_tensor_v2", identifier, rest) + b"s")


def long(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def archive(pickle: bytes, more: Mapping[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive as torch.save writes it, with a storage 0 of four numbers."""
    file = io.BytesIO()
    entries = {
        "data.pkl": pickle,
        "byteorder": b"little",
        "data/0": np.arange(4, dtype="<f4").tobytes(),
        "version": b"3",
    }
    with zipfile.ZipFile(file, "w", method) as content:
        for name, data in {**entries, **(more or {})}.items():
            content.writestr(f"archive/{name}", data)
    return file.getvalue()


def stream(pickle: bytes, keys: bytes = b"]" + text("0") + b"a", count: int = 4) -> bytes:
    """The older container around a pickle, with a storage 0 of four numbers."""
    magic = pickled(long(0x1950A86A20F9469CFC6C)) + pickled(b"M\xe9\x03")
    system = pickled(b"}(" + text("protocol_version") + b"M\xe9\x03" + text("little_endian") + b"\x88u")
    return magic + system + pickle + pickled(keys) + struct.pack("<q", count) + np.arange(4, dtype="<f4").tobytes()


class Gadget:
    """A class whose own unpickling writes a file, if anyone imports and calls it."""

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["path"]).write_text("executed")


def traps(canary: Path) -> dict[str, bytes]:
    """Pickles that create the canary when Python's own unpickler reads them; each holds a good tensor too."""
    command = f"touch {canary}"
    program = f"open({str(canary)!r}, 'w').close()"
    system = named("os", "system") + b"(" + text(command) + b"t"
    shell = b"(" + text("sh") + text("-c") + text(command) + b"l"
    imported = call("builtins", "__import__", text("os"))
    kept = text("other")
    return {
        "os.system": state_dict(kept, system + b"R"),
        "os.system by its number on the stack": state_dict(
            kept, text("os") + text("system") + b"\x93(" + text(command) + b"tR"
        ),
        "posix.system": state_dict(kept, call("posix", "system", text(command))),
        "builtins.eval": state_dict(kept, call("builtins", "eval", text(program))),
        "builtins.exec": state_dict(kept, call("builtins", "exec", text(program))),
        "__builtin__.eval": state_dict(kept, call("__builtin__", "eval", text(program))),
        "getattr of an import": state_dict(
            kept, named("builtins", "getattr") + b"(" + imported + text("system") + b"tR" + b"0" + system + b"R"
        ),
        "subprocess.Popen": state_dict(
            kept, call("subprocess", "Popen", b"](" + text("touch") + text(str(canary)) + b"e")
        ),
        "functools.partial": state_dict(
            kept, named("functools", "partial") + b"(" + named("os", "system") + text(command) + b"tR)R"
        ),
        "operator.methodcaller": state_dict(
            kept,
            call("operator", "methodcaller", text("touch")) + b"(" + call("pathlib", "Path", text(str(canary))) + b"tR",
        ),
        "INST": state_dict(kept, b"(" + text(command) + b"ios\nsystem\n"),
        "OBJ": state_dict(kept, b"(" + named("os", "system") + text(command) + b"o"),
        "state of a class": state_dict(
            kept,
            named(Gadget.__module__, "Gadget") + b")\x81}" + text("path") + text(str(canary)) + b"sb",
        ),
        "a call that is popped": pickled(system + b"R0}" + text("weight") + WEIGHT + b"s"),
        "a call in the memo": pickled(system + b"Rq\x000}" + text("weight") + WEIGHT + b"s"),
        "a call as a key": pickled(b"}" + system + b"R" + WEIGHT + b"s"),
        "a call inside the tensor": pickled(
            b"}" + text("weight") + named("torch._utils", "_rebuild_parameter") + b"(" + system + b"R\x88Nt" + b"Rs"
        ),
        "a shell in arguments": state_dict(kept, named("subprocess", "run") + b"(" + shell + b"tR"),
    }


def nested(levels: int) -> bytes:
    """A tuple in a tuple …: two names for each level, so that it means two to the power of the levels."""
    return b")q\x00" + b"".join(
        b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) for level in range(levels)
    )


def _module(inner: bytes) -> bytes:
    parameters = text("_parameters") + b"}" + text("weight") + WEIGHT + b"s"
    made = named("torch.nn.modules.container", "Sequential") + b")\x81q\x01"
    return made + b"}(" + parameters + text("_modules") + b"}(" + inner + b"uub"


def _cascade(levels: int) -> bytes:
    """A module that holds the one below it twice, and so on."""
    inner = _module(b"")
    parts = [b"".join([inner.replace(b"q\x01", b""), b"r" + struct.pack("<I", 100)])]
    for level in range(levels):
        below = b"j" + struct.pack("<I", 100 + level)
        module = _module(text("a") + below + text("b") + below).replace(b"q\x01", b"")
        parts.append(b"0" + module + b"r" + struct.pack("<I", 101 + level))
    return pickled(b"".join(parts))


def bombs() -> dict[str, bytes]:
    """Pickles that only want time, memory or confusion."""
    other = text("other")
    return {
        "new object of subprocess.Popen": state_dict(other, named("subprocess", "Popen") + b"(]t\x81"),
        "getattr of a hidden name": state_dict(
            other, call("builtins", "getattr", named("torch.nn", "Linear"), text("__init__"))
        ),
        "getattr of a value": state_dict(other, call("builtins", "getattr", b"]", text("append"))),
        "getattr of a class": state_dict(other, call("builtins", "getattr", named("colours", "Colour"), text("RED"))),
        "extension 1": state_dict(other, b"\x82\x01"),
        "extension 2": state_dict(other, b"\x83\x01\x00"),
        "extension 4": state_dict(other, b"\x84\x01\x00\x00\x00"),
        "textual identifier": state_dict(other, b"Pstorage\n"),
        "out-of-band buffer": state_dict(other, b"\x97"),
        "identifier of something else": state_dict(other, text("storage") + b"Q"),
        "memo at four thousand millions": state_dict(other, b"Kr" + b"r\xff\xff\xff\xff"),
        "memo that was never filled": state_dict(other, b"j\xff\xff\xff\x7f"),
        "long of 2 GB": state_dict(other, b"\x8b\xff\xff\xff\x7f"),
        "negative long": state_dict(other, b"\x8b\xff\xff\xff\xff"),
        "bytes of 8 EB": state_dict(other, b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"),
        "text of 8 EB": state_dict(other, b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f"),
        "bytearray of 16 EB": state_dict(other, b"\x96" + b"\xff" * 8),
        "bytes of 4 GB": state_dict(other, b"B\xff\xff\xff\xff"),
        "negative string": state_dict(other, b"T\xff\xff\xff\xff"),
        "frame beyond the end": pickled(b"\x95" + struct.pack("<Q", 1 << 40) + state_dict()[2:-1], protocol=4),
        "endless frame": pickled(b"\x95" + b"\xff" * 8 + state_dict()[2:-1], protocol=4),
        "protocol 9": b"\x80\x09" + state_dict()[2:],
        "nothing on the stack": pickled(b"R"),
        "only marks": pickled(b"(" * 100_000),
        "no end": state_dict()[:-1],
        "no value": pickled(),
        "tuple of a missing mark": pickled(b"t"),
        "items of a number": pickled(b"K\x01" + text("a") + text("b") + b"s"),
        "state of a number": pickled(b"K\x01}b"),
        "call of a number": pickled(b"K\x01)R"),
        "call of a call": pickled(call("some", "thing") + b")R"),
        "not UTF-8": state_dict(other, b"X\x02\x00\x00\x00\xff\xfe"),
        "a name without an end": pickled(b"c" + b"a" * 100_000),
        "a long name": pickled(named("a" * 600, "b")),
        "too many names": pickled(b"".join(named("m", f"n{index}") for index in range(10_001))),
        "three million lists": pickled(b"]" * 3_000_000),
        "a list as a key": pickled(b"}](K\x01e" + WEIGHT + b"s"),
        "deep lists": state_dict(other, b"]" * 200_000 + b"a" * 199_999),
        "deep tuples": state_dict(other, b")" + b"\x85" * 200_000),
        "billion laughs": state_dict(other, nested(250)),
        "billion laughs as a key": pickled(b"}(" + text("weight") + WEIGHT + nested(250) + text("x") + b"u"),
        "a list that contains itself": state_dict(other, b"]q\x00h\x00a"),
        "a dict that contains itself": state_dict(other, b"}q\x00" + text("a") + b"h\x00s"),
        "a module that contains itself": pickled(_module(text("0") + b"h\x01")),
        "modules that double": _cascade(60),
        "a section that contains itself": pickled(b"}q\x00" + text("state_dict") + b"h\x00s"),
        "numbers with one hash": pickled(
            b"}(" + b"".join(long(index * ((1 << 61) - 1)) + b"N" for index in range(100_000)) + b"u"
        ),
        "storage of other things": tensor(4, 0, b"K\x04", b"K\x01", kind="Module"),
        "storage that is not there": tensor(4, 0, b"K\x04", b"K\x01", key="7"),
        "storage out of the archive": tensor(4, 0, b"K\x04", b"K\x01", key="../data.pkl"),
        "storage larger than its entry": tensor(1 << 40, 0, b"K\x04", b"K\x01"),
        "tensor beyond its storage": tensor(4, 1, b"K\x04", b"K\x01"),
        "tensor of 2 to the 100": tensor(4, 0, long(1 << 50) * 2, b"K\x00K\x00"),
        "tensor that strides out": tensor(4, 0, b"K\x02", long(1 << 40)),
        "tensor of negative shape": tensor(4, 0, long(-4), b"K\x01"),
        "tensor of negative stride": tensor(4, 3, b"K\x04", long(-1)),
        "tensor of negative offset": tensor(4, -1, b"K\x04", b"K\x01"),
        "tensor of true entries": tensor(4, 0, b"\x88", b"K\x01"),
        "tensor without strides": tensor(4, 0, b"K\x04", b""),
        "tensor of a thousand dimensions": tensor(4, 0, b"K\x01" * 1000, b"K\x01" * 1000),
        "tensor of real shape": tensor(4, 0, b"G\x40\x10\x00\x00\x00\x00\x00\x00", b"K\x01"),
        "expanded to a terabyte": tensor(4, 0, long(1 << 38), b"K\x00"),
        "a name with a line break": pickled(b"}" + text("a\nb") + WEIGHT + b"s"),
        "a name that steers terminals": pickled(b"}" + text("\x1b[2Ja") + WEIGHT + b"s"),
    }


def archives(most_entries: int = 100_000) -> dict[str, bytes]:
    """Zip archives that only want time, memory or confusion."""
    good = archive(state_dict())
    directory = good.rindex(b"PK\x01\x02")
    begin = good.index(b"PK\x01\x02")
    end = good.rindex(b"PK\x05\x06")
    many = {f"data/{index + 1}": b"" for index in range(most_entries)}

    def patched(where: int, value: bytes, data: bytes = good) -> bytes:
        return data[:where] + value + data[where + len(value) :]

    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 60, 1 << 60)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    storage = good.index(b"PK\x01\x02", good.index(b"PK\x01\x02", begin + 4) + 4)  # the third entry of the directory
    return {
        "compressed": archive(state_dict(), method=zipfile.ZIP_DEFLATED),
        "a bomb of 100 MB": archive(pickled(bytes(100_000_000)), method=zipfile.ZIP_DEFLATED),
        "a pickle of 65 MB": archive(pickled(text("a" * (65 << 20)))),
        "very many entries": archive(state_dict(), many),
        "two pickles": archive(state_dict(), {"data/data.pkl": b""}).replace(b"archive/data/d", b"archive_data/d"),
        "no pickle": archive(state_dict()).replace(b"archive/data.pkl", b"archive/data.pkx"),
        "big-endian": archive(state_dict(), {"byteorder": b"big"}),
        "an entry twice": archive(state_dict(), {"data.pkx": state_dict()}).replace(b"data.pkx", b"data.pkl"),
        "entry beyond the file": patched(directory + 42, b"\xff\xff\xff\x7f"),
        "entry of two sizes": patched(storage + 24, b"\xff\xff\xff\x7f"),
        "entry longer than the file": patched(storage + 20, b"\xf0\xff\xff\x7f" * 2),
        "entry in another's place": patched(storage + 42, good[begin + 42 : begin + 46]),
        "entries that overlap": patched(begin + 20, struct.pack("<2I", 200, 200)),
        "directory beyond the file": patched(end + 16, b"\xff\xff\xff\x7f"),
        "directory of too many": patched(end + 8, b"\xff\x7f\xff\x7f"),
        "directory of too few": patched(end + 8, b"\x01\x00\x01\x00"),
        "another disk": patched(end + 4, b"\x01\x00"),
        "wide directory that lies": good[:end] + wide + locator + good[end:],
        "wide locator that lies": good[:end] + locator[:8] + b"\xff" * 8 + locator[16:] + good[end:],
        "only an end": good[end:],
        "a changed pickle": good.replace(b"weight", b"weighs", 1),
    }


def headers() -> dict[str, bytes]:
    """safetensors files that only want time, memory or confusion."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

    def framed(header: Any, data: bytes = bytes(4)) -> bytes:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(raw).to_bytes(8, "little") + raw + data

    twice = json.dumps({"a": entry})[1:-1]
    return {
        "overlap": framed({"a": entry, "b": {**entry, "data_offsets": [2, 6]}}, bytes(6)),
        "hole": framed({"a": entry, "b": {**entry, "data_offsets": [5, 9]}}, bytes(9)),
        "hole in front": framed({"a": {**entry, "data_offsets": [4, 8]}}, bytes(8)),
        "beyond the file": framed({"a": {**entry, "data_offsets": [0, 1 << 60]}}),
        "backwards": framed({"a": {**entry, "data_offsets": [4, 0]}}),
        "negative": framed({"a": {**entry, "data_offsets": [-4, 0]}}, b""),
        "three offsets": framed({"a": {**entry, "data_offsets": [0, 2, 4]}}),
        "another size": framed({"a": {**entry, "shape": [2]}}),
        "another dtype": framed({"a": {**entry, "dtype": "F64"}}),
        "unknown dtype": framed({"a": {**entry, "dtype": "\n" * 1000}}),
        "a shape of 2 to the 128": framed({"a": {**entry, "shape": [1 << 32] * 4}}),
        "a shape of 2 to the 64": framed({"a": {**entry, "shape": [1 << 32, 1 << 32]}}, b""),
        "negative shape": framed({"a": {**entry, "shape": [-1, -1]}}),
        "a shape of true": framed({"a": {**entry, "shape": [True]}}),
        "a shape of reals": framed({"a": {**entry, "shape": [1.0]}}),
        "a thousand dimensions": framed({"a": {**entry, "shape": [1] * 1000}}),
        "a number of 5,000 digits": framed(json.dumps({"a": entry}).replace("[1]", "[" + "9" * 5000 + "]").encode()),
        "header of 2 to the 60": (1 << 60).to_bytes(8, "little") + b"{}",
        "header of 20 MB": framed(b"{" + b" " * 20_000_000 + b"}"),
        "header of 16 MB of dicts": framed(b'{"a":[' + b"{}," * 5_500_000 + b"{}]}"),
        "header of 16 MB of lists": framed(b'{"a":[' + b"[]," * 5_500_000 + b"[]]}"),
        "a key twice": framed(f"{{{twice},{twice}}}".encode()),
        "offsets twice": framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8],"data_offsets":[0,4]}}'),
        "deep lists": framed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "deep dicts": framed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "metadata of numbers": framed({"__metadata__": {"step": 3}, "a": entry}),
        "metadata of NaN": framed(
            b'{"__metadata__":{"loss":NaN},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        ),
        "no metadata": framed({"__metadata__": None, "a": entry}),
        "a name with a line break": framed({"a\nb": entry}),
        "white space first": framed(b"  " + json.dumps({"a": entry}).encode()),
    }


# Whole files, and damage


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.register_buffer("positions", torch.arange(4), persistent=False)
        self.activation = torch.tanh

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def write_originals(folder: Path) -> dict[str, Path]:
    """One small file of every format, by the programs they belong to; format -> the file to damage."""
    torch.manual_seed(0)
    model = Encoder().eval()
    tensors = model.state_dict()
    numbers = {
        "half": torch.ones(3, dtype=torch.float16),
        "shared": tensors["layers.0.weight"],
        "steps": torch.tensor(7),
    }
    for name in ("sharded", "coefficients", "adapter"):
        (folder / name).mkdir()
    places = {
        "state dict": folder / "state_dict.pt",
        "state dict, older container": folder / "older.pt",
        "whole module": folder / "module.pt",
        "whole module, older container": folder / "older_module.pt",
        "TorchScript archive": folder / "script.pt",
        "checkpoint with sections": folder / "checkpoint.ckpt",
        "safetensors": folder / "tensors.safetensors",
        "safetensors of another writer": folder / "foreign.safetensors",
        "index of shards": folder / "sharded" / "model.safetensors.index.json",
        "checkpoint of any kind, PyTorch": folder / "any.bin",
        "checkpoint of any kind, safetensors": folder / "any.model",
        "adapter, configuration": folder / "adapter" / "adapter_config.json",
        "adapter, tensors": folder / "adapter" / "adapter_model.safetensors",
        "coefficients, JSON": folder / "coefficients" / "coefficients.json",
        "coefficients, safetensors": folder / "coefficients" / "coefficients.safetensors",
    }
    torch.save({**tensors, **numbers}, places["state dict"])
    torch.save({**tensors, **numbers}, places["state dict, older container"], _use_new_zipfile_serialization=False)
    torch.save(model, places["whole module"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, places["whole module, older container"], _use_new_zipfile_serialization=False)
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3)), places["TorchScript archive"])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": tensors,
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"lr": np.float64(1e-5), "path": Path("data"), "layers": [1, 2], "function": torch.tanh},
    }
    torch.save(checkpoint, places["checkpoint with sections"], pickle_protocol=4)
    write_tensors(places["safetensors"], tensors, {"task": "digits"})
    save_file({name: value.clone() for name, value in tensors.items()}, places["safetensors of another writer"])
    write_shards(folder / "sharded", tensors, {}, plan_shards(tensors, 60, "model"), "model")
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, folder / "any.bin")
    write_tensors(folder / "any.model", tensors, {})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"], "rank_pattern": {"layers.0": 2}}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, "bias": "none"}), encoding="utf-8")
    factors = {f"base_model.model.layers.0.lora_{one}.weight": torch.ones(shape) for one, shape in _FACTORS.items()}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    members = {name: name for name in ("a.weight", "b.weight")}
    coefficients = Coefficients(
        torch.tensor([[0.25, 0.5], [1.0, 2.0]]), ("digits", "signs"), tuple(members), members, "tensor", {"steps": "3"}
    )
    coefficients.save(places["coefficients, JSON"])
    coefficients.save(places["coefficients, safetensors"])
    return places


def read(kind: str, path: Path) -> tuple[str, str]:
    """Open a file as what it should be and read all of it; digests of names and metadata, and of values."""
    return READERS.get(kind, _read_torch)(path)


def _read_torch(path: Path) -> tuple[str, str]:
    file = open_torch_file(path)
    return _digest(file, [file.kind, file.section, file.other])


def _read_tensors(path: Path) -> tuple[str, str]:
    stored = open_tensors(path)
    return _digest(stored, stored.metadata)


def _read_coefficients(path: Path) -> tuple[str, str]:
    found = Coefficients.load(path)
    return _digest({"values": found.values}, [found.tasks, found.members, found.granularity, found.metadata])


def _digest(tensors: Mapping[str, Tensor], other: Any) -> tuple[str, str]:
    structure = [(name, str(tensors[name].dtype), tuple(tensors[name].shape)) for name in sorted(tensors)]
    values = hashlib.sha256()
    for name in sorted(tensors):
        if tensors[name].numel():
            values.update(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashlib.sha256(repr([structure, other]).encode()).hexdigest(), values.hexdigest()


def _read_adapter(path: Path) -> tuple[str, str]:
    return _digest(open_adapter(path.parent).difference({"layers.0.weight": torch.zeros(4, 3)}), "")


def _read_any(path: Path) -> tuple[str, str]:
    opened = open_checkpoint(path)
    return _digest(opened, opened.describe())


_FACTORS = {"A": (2, 3), "B": (4, 2)}
READERS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "safetensors": _read_tensors,
    "safetensors of another writer": _read_tensors,
    "index of shards": _read_tensors,
    "adapter, configuration": _read_adapter,
    "adapter, tensors": _read_adapter,
    "checkpoint of any kind, PyTorch": _read_any,
    "checkpoint of any kind, safetensors": _read_any,
    "coefficients, JSON": _read_coefficients,
    "coefficients, safetensors": _read_coefficients,
}


def mutant(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A file after one to three damages: bits, bytes, lengths, cuts, and pieces of itself or of other files."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _DAMAGES[draw.randrange(len(_DAMAGES))](draw, changed, others)
    return bytes(changed)


def _flip(draw: random.Random, data: bytearray, others: list[bytes]) -> None:
    for _ in range(draw.choice((1, 1, 2, 8))):
        if data:
            data[_place(draw, data)] ^= 1 << draw.randrange(8)


def _byte(draw: random.Random, data: bytearray, others: list[bytes]) -> None:
    if data:
        data[_place(draw, data)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, *b"(.0RQbcioPtu}]\x81\x82\x93\x94\x95"))


def _cut(draw: random.Random, data: bytearray, others: list[bytes]) -> None:
    if draw.random() < 0.7:
        del data[_place(draw, data) if data else 0 :]
    else:
        del data[: draw.randrange(1, 20)]


def _length(draw: random.Random, data: bytearray, others: list[bytes]) -> None:
    """A number of 2, 4 or 8 bytes becomes one that is wrong in an interesting way."""
    size = draw.choice((2, 4, 8))
    if len(data) < size:
        return
    where = _place(draw, data[: len(data) - size + 1])
    value = int.from_bytes(data[where : where + size], "little")
    most = (1 << 8 * size) - 1
    data[where : where + size] = draw.choice(
        (
            0,
            1,
            most,
            most >> 1,
            (most >> 1) + 1,
            max(value - 1, 0),
            min(value + 1, most),
            value * 2 & most,
            len(data) & most,
        )
    ).to_bytes(size, "little")


def _splice(draw: random.Random, data: bytearray, others: list[bytes]) -> None:
    source = draw.choice((bytes(data), *others))
    if not source:
        return
    start = draw.randrange(len(source))
    piece = source[start : start + draw.choice((1, 4, 16, 64, 512))]
    where = _place(draw, data) if data else 0
    data[where : where + (len(piece) if draw.random() < 0.5 else 0)] = piece


def _remove(draw: random.Random, data: bytearray, others: list[bytes]) -> None:
    where = _place(draw, data) if data else 0
    del data[where : where + draw.choice((1, 2, 4, 8, 64))]


def _digits(draw: random.Random, data: bytearray, others: list[bytes]) -> None:
    """A digit in text becomes another value of JSON."""
    places = [index for index, byte in enumerate(data) if 48 <= byte < 58]
    if places:
        where = draw.choice(places)
        data[where : where + 1] = draw.choice(
            (b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"a"', b"9" * 30, b"true", b"0.5", b"\xff")
        )


def _place(draw: random.Random, data: bytes | bytearray) -> int:
    """Mostly where structure is: at the beginning and at the end."""
    size = len(data)
    if size > 400 and draw.random() < 0.5:
        return draw.choice((draw.randrange(200), size - 1 - draw.randrange(200)))
    return draw.randrange(size)


_DAMAGES = (_flip, _flip, _byte, _cut, _length, _length, _splice, _remove, _digits)
