"""Inputs on the Hub that are not in the cache: structure first, then a download, or a stream of ranges."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lit_merge
from lit_merge.commands.main import main
from lit_merge.errors import ConfigurationError, FileFormatError, HubError, StructureMismatchError
from lit_merge.files import remote
from lit_merge.files.hub import parse_address, snapshot_folder
from lit_merge.files.remote import RemoteFile, RemoteSources, located
from lit_merge.files.shards import open_tensors, plan_shards, write_shards
from lit_merge.files.store import LazyTensors, file_digest, write_tensors
from lit_merge.models.merging.opening import remote_sources
from lit_merge.vectors import TaskVector

SETTINGS = ["--progress=false", "--output=out"]


def tensors(seed: int = 0, rows: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.weight": (rows, 30), "layers.1.weight": (30, 50), "norm.weight": (50,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def content(values: dict[str, torch.Tensor], path: Path, **metadata: str) -> bytes:
    write_tensors(path, values, metadata)
    return path.read_bytes()


@pytest.fixture
def models(hub, tmp_path, monkeypatch):
    """A base in shards, two fine-tunes of it, one of which does not fit; and small blocks."""
    shards = plan_shards(tensors(9), 5000, "model")
    write_shards(tmp_path / "base", tensors(9), {}, shards, "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.repository("me/base", {**files, "config.json": b'{"model_type": "x"}'})
    tuned = {f"{name}.safetensors": content(tensors(seed), tmp_path / name) for seed, name in enumerate("ab")}
    tuned["narrow.safetensors"] = content(tensors(2, rows=39), tmp_path / "narrow")
    hub.repository("me/tuned", tuned)
    monkeypatch.setattr(remote, "BLOCK", 3000)
    monkeypatch.setattr(remote, "_SMALL", 256)
    monkeypatch.setattr(remote, "_WAIT", 0.01)
    return hub


def merged(*settings: str, vectors: str = "a b", base: str = "hf://me/base") -> int:
    listed = ", ".join(f"hf://me/tuned/{name}.safetensors" for name in vectors.split())
    return main(["merge", f"--vectors=[{listed}]", f"--base={base}", *SETTINGS, *settings])


def of_tensors(hub) -> int:
    """Bytes after the headers of safetensors files that were sent."""
    files = {name: one for repository in hub.repositories.values() for name, one in repository.files.items()}
    total = 0
    for name, start, stop in hub.sent:
        if name.endswith(".safetensors"):
            total += max(0, stop - max(start, 8 + int.from_bytes(files[name][:8], "little")))
    return total


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*") if path.suffix in (".safetensors", ".pt")}


def output() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out").iterdir() if path.suffix in (".safetensors", ".md")}


def room(monkeypatch, free: dict[str, int]) -> None:
    """Disks by a part of their path, with so many bytes left."""
    usage, whole = namedtuple("usage", "total used free"), shutil.disk_usage

    def disk(path):
        return next((usage(0, 0, left) for part, left in free.items() if part in str(path)), whole(path))

    monkeypatch.setattr(shutil, "disk_usage", disk)


@pytest.mark.parametrize("how", ["download", "stream"])
@pytest.mark.parametrize(
    ("settings", "vectors", "expected"),
    [
        (["--recipe=tise"], "a b", r"recipe: expected the name of a method, got 'tise'"),
        (["--parts=[Trimm]"], "a b", r"Trimm"),
        (["--recipe=ties", "--settings={density: 3}"], "a b", r"density"),
        (["--recipe=ties"], "a narrow", r"layers\.0\.weight.*\(39, 30\)|layers\.0\.weight.*39"),
        (["--recipe=ties", "--leave_out=[nothing.*]"], "a b", r"leave_out: expected patterns that fit"),
        (["--recipe=ties", "--output=taken"], "a b", r"output: expected a new file, got .*, which exists"),
        (["--recipe=ties", "--kind=lora", "--rank=0"], "a b", r"rank"),
        (["--recipe=ties"], "a lost", r"expected a file or folder of me/tuned, got none of this name"),
    ],
)
def test_what_is_refused_asks_for_no_tensor(models, cache, capsys, how, settings, vectors, expected):
    Path("taken").mkdir()
    Path("taken/model.safetensors").write_bytes(b"x")
    assert merged(f"--remote={how}", *settings, vectors=vectors) in (1, 2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"^lit-merge: error: .*({expected})", said), said
    assert of_tensors(models) == 0
    assert cached(cache) == set()
    assert not Path("out").exists()


def test_full_disks_are_noticed_before(models, cache, monkeypatch, capsys):
    for free, expected in (
        ({"": 9_000}, r"output: expected 0\.0 MiB of free space"),
        (
            {"": 30_000},
            r"cache: expected 0\.0 MiB of free space in .* for what is downloaded and 0\.0 MiB for the outp",
        ),
    ):
        with monkeypatch.context() as patched:
            room(patched, free)
            assert merged("--recipe=ties") == 2
            assert re.search(expected, capsys.readouterr().err)
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: path.name != "cache")
        patched.setattr(remote, "_existing", lambda folder: cache)
        cache.mkdir(exist_ok=True)
        assert merged("--recipe=ties") == 2
        assert re.search(r"cache: expected a folder that may be written to, got .*cache\.", capsys.readouterr().err)
    assert of_tensors(models) == 0
    assert cached(cache) == set()
    with monkeypatch.context() as patched:  # a stream needs no room in the cache
        room(patched, {"": 30_000})
        assert merged("--recipe=ties", "--remote=stream") == 0


def test_a_dry_run_downloads_no_tensor(models, cache, capsys):
    for how, expected in (
        ("download", r"on the Hub: \d+ files \(.*\), 0\.0 MiB to download into the cache"),
        (
            "stream",
            r"on the Hub: \d+ files \(.*\) of 0\.0 MiB, read in ranges of 0\.0 MiB in \d passes, without a copy",
        ),
    ):
        assert merged("--recipe=ties", "--dry_run=true", "--verify=true", f"--remote={how}") == 0
        assert re.search(expected, capsys.readouterr().out)
    assert of_tensors(models) == 0
    assert cached(cache) == set()
    assert not Path("out").exists()


@pytest.mark.parametrize("recipe", ["task_arithmetic", "ties", "iso_c"])
def test_a_stream_gives_what_a_download_gives(models, cache, tmp_path, recipe):
    assert merged(f"--recipe={recipe}", "--remote=stream") == 0
    streamed, asked = output(), of_tensors(models)
    assert cached(cache) == set()
    assert asked > 0
    models.sent.clear()
    assert merged(f"--recipe={recipe}", "--overwrite=true") == 0
    assert output() == streamed
    sizes = sum(value.numel() * 4 for value in tensors().values())
    assert of_tensors(models) == 3 * sizes  # every byte once
    assert {"a.safetensors", "b.safetensors"} < cached(cache)
    models.sent.clear()
    assert merged(f"--recipe={recipe}", "--overwrite=true", "--remote=stream") == 0
    assert output() == streamed
    assert not [name for name, _, _ in models.sent if name.endswith("safetensors")]  # it is in the cache


def test_streams_are_verified(models, tmp_path, cache, capsys):
    assert merged("--recipe=ties", "--remote=stream", "--verify=true") == 0
    vector = TaskVector({name: value * 2 for name, value in tensors(3).items()}, "c")
    vector.save(tmp_path / "c.safetensors")
    good = (tmp_path / "c.safetensors").read_bytes()
    models.repositories["me/tuned"].commit({"c.safetensors": good[:-1] + bytes([good[-1] ^ 1])})
    for how in ("stream", "download"):
        assert merged("--recipe=ties", f"--remote={how}", "--verify=true", "--overwrite=true", vectors="a c") == 1
        assert "the file has changed since it was written" in capsys.readouterr().err
    with RemoteSources(stream=True) as sources:
        models.repository("me/vector", {"c.safetensors": good})
        address = "hf://me/vector/c.safetensors"
        found = TaskVector.load(address)
        sources.fetch()
        assert torch.equal(found["layers.0.weight"], vector["layers.0.weight"])
        assert file_digest(address) == file_digest(tmp_path / "c.safetensors")
        stored = pickle.dumps(LazyTensors(address))
    again = pickle.loads(stored)
    assert again.path.is_file()  # another process downloads it
    assert torch.equal(again["norm.weight"], vector["norm.weight"])


def test_answers_that_break_off_and_busy_servers_are_asked_again(models, caplog):
    assert merged("--recipe=ties") == 0
    expected = output()
    shutil.rmtree("out")
    shutil.rmtree(snapshot_folder(parse_address("hf://me/base@x")).parents[2])
    models.breaks[:] = [100_000, 100_000, 4, 5, 0, 0, 700, 100_000, 2999]
    models.statuses[:] = [503, 429]
    assert merged("--recipe=ties", "--remote=stream") == 0
    assert output() == expected
    assert models.breaks == models.statuses == []


def test_what_never_comes_is_refused(models, capsys):
    file = RemoteFile(parse_address(f"hf://me/tuned@{models.repositories['me/tuned'].branches['main']}/a.safetensors"))
    models.breaks[:] = [3, *[0] * 9]
    with pytest.raises(HubError, match=r"a\.safetensors: expected bytes 100 to 150, got 3 of them \(.*\)\. Repeat"):
        file.fill(memoryview(bytearray(50)), 100)
    models.breaks.clear()
    models.ranges = False
    with pytest.raises(HubError, match=r"expected a range of its bytes, got status 200: the server no longer gives"):
        file.fill(memoryview(bytearray(50)), 100)
    models.statuses[:] = [403]
    with pytest.raises(HubError, match=r"expected the Hub to read this, got 403: busy\. Ask for access"):
        file.fill(memoryview(bytearray(50)), 100)


def test_a_server_without_ranges(models, cache, monkeypatch, capsys):
    models.ranges = False
    assert merged("--recipe=ties", "--remote=stream") == 2
    assert re.search(
        r"remote stream: expected safetensors files, and a server that gives ranges of them, got a server that gives "
        r"no ranges \(hf://me/base@\w+/model-.*\)\. Set remote to download\.",
        capsys.readouterr().err,
    )
    with monkeypatch.context() as patched:
        room(patched, {"cache": 9_000})
        cache.mkdir(exist_ok=True)
        assert merged("--recipe=ties") == 2
    assert "cache: expected 0.0 MiB of free space" in capsys.readouterr().err
    assert cached(cache) == set()
    assert merged("--recipe=ties") == 0
    assert {"a.safetensors", "b.safetensors"} < cached(cache)


def test_pytorch_files_are_whole_or_not_at_all(models, cache, tmp_path, monkeypatch, capsys):
    torch.save(tensors(9), tmp_path / "base.pt")
    models.repository("me/torch", {"base.pt": (tmp_path / "base.pt").read_bytes()})
    models.sent.clear()
    assert merged("--recipe=ties", "--remote=stream", base="hf://me/torch/base.pt") == 2
    assert re.search(r"got a file without a header of names and shapes \(hf://.*base\.pt\)", capsys.readouterr().err)
    with monkeypatch.context() as patched:
        room(patched, {"": 9_000})
        assert merged("--recipe=ties", base="hf://me/torch") == 2
    assert "cache: expected 0.0 MiB of free space" in capsys.readouterr().err
    assert sum(stop - start for name, start, stop in models.sent if name == "base.pt") <= 2 * 9
    assert cached(cache) == set()
    assert merged("--recipe=ties", base="hf://me/torch") == 0
    found = dict(open_tensors("out"))
    shutil.rmtree("out")
    assert merged("--recipe=ties") == 0
    assert all(torch.equal(found[name], value) for name, value in open_tensors("out").items())


def test_a_pass_asks_for_little_more_than_it_reads(hub, tmp_path, monkeypatch, capsys):
    """Blocks end with a tensor: what passes ask for is what they read, but for the neighbours of small tensors."""
    monkeypatch.setattr(remote, "BLOCK", 1 << 18)
    monkeypatch.setattr(remote, "_SMALL", 4096)
    shapes = {
        f"{layer}.{part}": shape for layer in range(4) for part, shape in (("bias", (30,)), ("weight", (300, 333)))
    }
    for name in ("base", "a", "b"):
        values = {key: torch.randn(shape) for key, shape in shapes.items()}
        hub.repository(f"me/{name}", {"model.safetensors": content(values, tmp_path / name)})
    size = sum(torch.Size(shape).numel() * 4 for shape in shapes.values())
    arguments = ["merge", "--vectors=[hf://me/a, hf://me/b]", "--base=hf://me/base", *SETTINGS, "--overwrite=true"]
    for recipe in ("task_arithmetic", "ties", "iso_c"):
        hub.sent.clear()
        assert main([*arguments, f"--recipe={recipe}", "--dry_run=true"]) == 0
        passes = int(re.search(r"(\d+) pass(es)? over the inputs", capsys.readouterr().out)[1])
        hub.sent.clear()
        assert main([*arguments, f"--recipe={recipe}", "--remote=stream"]) == 0
        assert of_tensors(hub) <= 1.1 * 3 * size * passes


def test_blocks_are_bounded_and_samples_small(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4096)
    monkeypatch.setattr(remote, "_SMALL", 1024)
    value = torch.arange(100_000, dtype=torch.int32)
    hub.repository("me/long", {"model.safetensors": content({"w": value}, tmp_path / "long")})
    with RemoteSources(stream=True) as sources:
        found = open_tensors("hf://me/long")
        assert sources.memory == 4 * 4096
        sources.fetch()
        part = torch.empty(16, dtype=torch.int32)
        hub.sent.clear()
        found.slicer("w")(50_000, 50_016, part)  # a sample asks for no block
        assert torch.equal(part, value[50_000:50_016])
        assert [stop - start for _, start, stop in hub.sent] == [64]
        hub.sent.clear()
        assert torch.equal(found["w"], value)
        assert sum(stop - start for _, start, stop in hub.sent) <= 400_000 + 2 * 4096
        assert len(sources._blocks._kept) <= 4
        with pytest.raises(FileFormatError, match=r"expected bytes .* got a file of .* bytes \(truncated"):
            found._parts.bytes(400_000, 9_000)


def test_a_block_that_is_waited_for_stays(monkeypatch):
    """Of more threads than there is room for blocks, some wait; none finds its request cancelled."""
    monkeypatch.setattr(remote, "BLOCK", 8)
    blocks, held = remote._Blocks(), []
    blocks.models = 1

    class Slow:
        def fill(self, memory, offset):
            held.append(len(blocks._kept))
            time.sleep(0.002)
            memory[:] = bytes([offset % 251]) * len(memory)

    file = Slow()
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda at: bytes(blocks.get(file, (at, at + 8), [], at, 8)), range(0, 1600, 8)))
    blocks.close()
    assert found == [bytes([at % 251]) * 8 for at in range(0, 1600, 8)]
    assert max(held) <= 4
    assert not blocks._readers


def test_a_damaged_header_is_refused_unseen(hub, tmp_path):
    good = content(tensors(), tmp_path / "good")
    hub.repository("me/bad", {"short.safetensors": good[:-8], "none.safetensors": b"\x05" * 200})
    with RemoteSources():
        with pytest.raises(FileFormatError, match=r"short\.safetensors: expected [\d,]+ bytes according to the header"):
            LazyTensors("hf://me/bad/short.safetensors")
        with pytest.raises(FileFormatError, match=r"none\.safetensors: expected a safetensors file with its header"):
            LazyTensors("hf://me/bad/none.safetensors")
        assert located("here.safetensors") == Path("here.safetensors")
    assert of_tensors(hub) == 0


def test_adapters_are_opened_by_their_headers(models, cache, tmp_path):
    factors = {
        "base_model.model.layers.1.lora_A.weight": torch.ones(2, 50),
        "base_model.model.layers.1.lora_B.weight": torch.full((30, 2), 0.5),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.1"]}
    files = {"adapter_model.safetensors": content(factors, tmp_path / "lora")}
    models.repository("me/lora", {**files, "adapter_config.json": json.dumps(config).encode()})
    arguments = ["merge", "--vectors=[hf://me/lora]", "--base=hf://me/base", "--recipe=task_arithmetic", *SETTINGS]
    assert main([*arguments, "--settings={coefficient: 1.0}", "--dry_run=true"]) == 0
    assert of_tensors(models) == 0
    assert main([*arguments, "--settings={coefficient: 1.0}", "--remote=stream"]) == 0
    assert cached(cache) == set()
    torch.testing.assert_close(open_tensors("out")["layers.1.weight"], tensors(9)["layers.1.weight"] + 1.0)


def test_in_python_the_headers_come_first_too(models, cache):
    paths = [f"hf://me/tuned/{name}.safetensors" for name in ("a", "narrow")]
    with pytest.raises(StructureMismatchError, match=r"layers\.0\.weight"):
        lit_merge.merge("hf://me/base", paths, recipe="task_arithmetic")
    with pytest.raises(ConfigurationError, match=r"density"):
        lit_merge.merge("hf://me/base", paths[:1], recipe="ties", density=3.0)
    assert of_tensors(models) == 0
    assert cached(cache) == set()
    found = lit_merge.merge("hf://me/base", paths[:1], recipe="task_arithmetic", coefficient=0.5)
    expected = {name: value + 0.5 * (tensors(0)[name] - value) for name, value in tensors(9).items()}
    torch.testing.assert_close(found, expected)
    assert of_tensors(models) == 2 * sum(value.numel() * 4 for value in expected.values())


def test_an_output_that_may_not_be_written_to_is_noticed_before(models, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        assert merged("--recipe=ties") == 2
    said = capsys.readouterr().err
    assert re.search(
        r"output: expected a folder that can be created or written to, got out \(Permission denied\)\.", said
    )
    assert of_tensors(models) == 0


def test_another_way_is_refused():
    with pytest.raises(ConfigurationError, match=r"remote: expected download or stream, got 'mount'\. Use one of them"):
        remote_sources("mount")
