"""Sharded models: the Hub's layout, read lazily and written, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.files import store
from lit_merge.files.lazy import Computed
from lit_merge.files.rounding import Rounded
from lit_merge.files.shards import ShardedTensors, open_tensors, parse_size, plan_shards, write_shards
from lit_merge.vectors import LazyTensors, TaskVector, write_tensors

FILES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (5, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4), "scale": (), "head": (3, 4)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "head": found["head"].bfloat16(), "steps": torch.tensor([1, 2])}


@pytest.fixture
def folder(tensors, tmp_path):
    """Three shards and an index, as other programs write them."""
    parts = [["embed"], ["layers.0.w", "layers.1.w", "steps"], ["scale", "head"]]
    for file, names in zip(FILES, parts, strict=True):
        save_file({name: tensors[name] for name in names}, tmp_path / file, {"format": "pt"})
    places = {name: file for file, names in zip(FILES, parts, strict=True) for name in names}
    index(tmp_path, {"metadata": {"total_size": 1}, "weight_map": places})
    return tmp_path


def index(folder, content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def places(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("by", ["folder", "index"])
def test_reading_what_others_wrote(by, folder, tensors):
    opened = open_tensors(folder if by == "folder" else folder / "model.safetensors.index.json")
    assert isinstance(opened, ShardedTensors)
    assert list(opened) == list(places(folder))
    assert (len(opened), "embed" in opened, "embedding" in opened) == (6, True, False)
    for name, tensor in tensors.items():
        assert (opened.shape(name), opened.dtype(name)) == (tensor.shape, tensor.dtype)
        assert torch.equal(opened[name], tensor)
    with pytest.raises(KeyError):
        opened["embedding"]
    assert (opened.metadata, opened.content_digest) == ({"format": "pt"}, None)
    assert [path.name for path in opened.files] == ["model.safetensors.index.json", *FILES]
    again = pickle.loads(pickle.dumps(opened))
    assert torch.equal(again["head"], tensors["head"])


def test_shapes_are_known_without_reading(folder, monkeypatch):
    def refuse(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(LazyTensors, "__getitem__", refuse)
    opened = open_tensors(folder)
    assert sum(opened.shape(name).numel() for name in opened) == 20 + 16 + 16 + 1 + 12 + 2
    vector = TaskVector.from_checkpoints(folder, folder, base_fingerprint="0")
    assert vector.shape("embed") == (5, 4)  # differences of shards stay on the disk as well
    with pytest.raises(AssertionError, match="embed was read"):
        vector["embed"]


def test_differences_of_shards(folder, tensors, tmp_path):
    tuned = {name: value + 1 if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    vector = TaskVector.from_checkpoints(folder, tmp_path / "tuned.safetensors", "t", base_fingerprint="0")
    assert set(vector) == set(tensors) - {"steps"}
    for name in vector:
        exact = tuned[name].double() - tensors[name].double()
        torch.testing.assert_close(vector[name].double(), exact, rtol=0, atol=1e-6)


def test_one_model_in_a_folder(folder, tensors, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(tensors, alone / "adapted.safetensors")
    assert torch.equal(open_tensors(alone)["embed"], tensors["embed"])
    save_file(tensors, alone / "other.safetensors")
    with pytest.raises(FileFormatError, match=r"expected one model in this folder, got adapted.safetensors, other"):
        open_tensors(alone)
    save_file({"embed": tensors["embed"] * 2}, alone / "model.safetensors")
    assert list(open_tensors(alone)) == ["embed"]  # the name that the Hub uses comes first
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match=r"expected one model in this folder, got none\. Name the file itself"):
        open_tensors(tmp_path / "empty")


def test_links_to_shards_are_followed(folder, tensors, tmp_path):
    """The Hub's own cache keeps files elsewhere and links to them."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.glob("model*"):
        (snapshot / path.name).symlink_to(path)
    assert torch.equal(open_tensors(snapshot)["scale"], tensors["scale"])


def test_missing_shards_and_tensors(folder, tensors):
    listed = places(folder)
    index(folder, {"weight_map": {**listed, "extra": FILES[0]}})
    with pytest.raises(FileFormatError, match=rf"expected its 7 tensors in the shards, got no extra in {FILES[0]}\."):
        open_tensors(folder)
    index(folder, {"weight_map": {**listed, "embed": FILES[1]}})
    unlisted = {name: file for name, file in listed.items() if name != "head"}
    with pytest.raises(FileFormatError, match=rf"got no embed in {FILES[1]}\. Copy the model again"):
        open_tensors(folder)
    index(folder, {"weight_map": unlisted})
    with pytest.raises(FileFormatError, match=rf"got 1 that it does not list \(head in {FILES[2]}\)"):
        open_tensors(folder)
    index(folder, {"weight_map": listed})
    (folder / FILES[1]).unlink()
    with pytest.raises(FileFormatError, match=rf"expected 3 shards in its folder, got none of 1 \({FILES[1]}\)"):
        open_tensors(folder)
    (folder / FILES[1]).write_bytes((folder / FILES[2]).read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=rf"{FILES[1]}: expected [\d,]+ bytes according to the header"):
        open_tensors(folder)


@pytest.mark.parametrize(
    "file", ["../{}", "/etc/{}", "sub/{}", "..\\{}", "C:{}", "..", "", ".", "{}\x00", "model.bin", "{}.txt"]
)
def test_an_index_cannot_lead_out_of_its_folder(file, folder):
    inner = folder / "inner"
    inner.mkdir()
    name = file.format(FILES[0])
    index(inner, {"weight_map": {"embed": name}})
    with pytest.raises(FileFormatError, match="expected names of safetensors files in its folder, got ") as error:
        open_tensors(inner)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\udcff"],
)
def test_what_is_no_index(content, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(FileFormatError, match="expected an index with a weight_map from tensors to files, got someth"):
        open_tensors(tmp_path)


def test_no_index_at_all(tmp_path):
    with pytest.raises(FileFormatError, match=r"expected the index of a sharded model, got No such file"):
        open_tensors(tmp_path / "model.safetensors.index.json")
    with pytest.raises(FileFormatError, match=r"expected a safetensors file, got No such file"):
        open_tensors(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("10 kb", 10_000), ("7", 7), ("1TB", 10**12)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0MB", "2 gigabytes", "1e9", "nan", "2GB2"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigurationError, match="shard_size: expected a size such as 2GB or 500MB, got "):
        parse_size(text)


def test_shards_are_as_large_as_allowed(tensors):
    """Bytes: 80, 64, 64, 4, 24, 16."""
    names = list(tensors)
    alone = {f"m-0000{i + 1}-of-00006.safetensors": [name] for i, name in enumerate(names)}
    assert plan_shards(tensors, 1, "m") == alone
    assert list(plan_shards(tensors, 80, "m").values()) == [["embed"], names[1:2], names[2:4], names[4:]]
    assert plan_shards(tensors, 143, "m")["m-00001-of-00003.safetensors"] == ["embed"]
    assert plan_shards(tensors, 144, "m")["m-00001-of-00002.safetensors"] == ["embed", "layers.0.w"]
    assert plan_shards(tensors, 252, "m") == {"m.safetensors": names}
    assert len(plan_shards(tensors, 251, "m")) == 2


def test_writing_and_reading_again(tensors, tmp_path):
    order = []

    def read(name):
        order.append(name)
        return tensors[name]

    lazy = Computed({name: (value.shape, value.dtype) for name, value in tensors.items()}, read)
    shards = plan_shards(tensors, 100, "model")
    write_shards(tmp_path, lazy, {"task": "t"}, shards, "model")
    assert sorted(order) == sorted(tensors)  # each once
    opened = open_tensors(tmp_path, verify=True)
    assert set(opened) == set(tensors)
    assert all(torch.equal(opened[name], tensors[name]) for name in tensors)
    assert opened.metadata == {"task": "t"}
    content = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert content["metadata"] == {"total_size": 252}
    for file, names in shards.items():  # other readers agree
        assert set(load_file(tmp_path / file)) == set(names)
    digests = [f"{file} {LazyTensors(tmp_path / file).content_digest}\n" for file in sorted(shards)]
    assert opened.content_digest == blake3("".join(digests).encode()).hexdigest()

    damaged = tmp_path / next(iter(shards))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    open_tensors(tmp_path)
    with pytest.raises(FileFormatError, match="the file has changed since it was written"):
        open_tensors(tmp_path, verify=True)


def test_only_what_all_shards_agree_on_is_metadata(tensors, tmp_path):
    for file, task in zip(FILES[:2], ("a", "b"), strict=True):
        write_tensors(tmp_path / file, {task: torch.ones(1)}, {"format": "x", "task": task})
    index(tmp_path, {"weight_map": {"a": FILES[0], "b": FILES[1]}})
    assert open_tensors(tmp_path).metadata == {"format": "x"}


def test_a_sharded_task_vector(tensors, tmp_path):
    vector = TaskVector({name: value for name, value in tensors.items() if name != "steps"}, "digits")
    shards = plan_shards(vector, 100, "task_vector")
    write_shards(tmp_path, vector, vector.metadata, shards, "task_vector")
    loaded = TaskVector.load(tmp_path, verify=True)
    assert (loaded.task, set(loaded)) == ("digits", set(vector))
    assert loaded.content_digest == open_tensors(tmp_path).content_digest
    assert loaded.norm() == vector.norm()


def test_every_shard_says_how_the_whole_was_rounded(tensors, tmp_path):
    vector = TaskVector({name: value / 3 for name, value in tensors.items() if name != "steps"}, "digits")
    vector.save(tmp_path / "one.safetensors", dtype=torch.bfloat16)
    expected = LazyTensors(tmp_path / "one.safetensors").metadata["storage"]
    rounded = Rounded(vector, torch.bfloat16, "task vector")
    shards = plan_shards(rounded, 60, "task_vector")
    assert len(shards) > 2
    metadata = {**vector.metadata, "storage": rounded.storage()}
    write_shards(tmp_path / "m", rounded, metadata, shards, "task_vector", lambda: {"storage": rounded.storage()})
    assert open_tensors(tmp_path / "m", verify=True).metadata["storage"] == expected
    assert json.loads(expected)["relative_error"] > 1e-4
    assert all(LazyTensors(tmp_path / "m" / file, verify=True).metadata["storage"] == expected for file in shards)


@pytest.mark.parametrize("failing", ["_write", "fsync"])
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "stop"])
def test_shards_appear_together(tensors, tmp_path, monkeypatch, failing, number, error):
    """Whichever write or synchronisation fails, the index's included."""
    shards = plan_shards(tensors, 100, "model")
    assert len(shards) == 4
    old, new = tmp_path / "old", tmp_path / "new"
    write_shards(old, tensors, {"task": "old"}, shards, "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    owner = store._Background if failing == "_write" else os
    real, calls = getattr(owner, failing), []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == number + 1:
            raise error
        return real(*arguments)

    monkeypatch.setattr(owner, failing, fail)
    for folder in (old, new):
        calls.clear()
        with pytest.raises(type(error)):
            write_shards(folder, tensors, {"task": "new"}, shards, "model")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert not new.exists()
