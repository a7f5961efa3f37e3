"""Addresses on the Hugging Face Hub: the real library against a stand-in for the Hub, and against a cache offline."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from lit_merge.checkpoints.opening import named_after, open_checkpoint
from lit_merge.commands.main import main
from lit_merge.commands.merge import merge
from lit_merge.commands.pull import pull
from lit_merge.commands.push import push
from lit_merge.errors import ConfigurationError, FileFormatError, HubError, WriteError
from lit_merge.files.hub import Address, local_path, parse_address, pinned
from lit_merge.files.shards import open_tensors, plan_shards, write_shards
from lit_merge.files.store import write_tensors
from lit_merge.models import load_clip
from lit_merge.transforms import FisherMean, LearnedScale
from lit_merge.vectors import Coefficients, LazyTensors, TaskVector, TaskVectors, file_digest
from lit_merge.vectors.statistics import write_statistics

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisIsASecretThatNobodyMaySee"


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.weight": torch.randn(6, 4, generator=generator),
        "head.bias": torch.randn(3, generator=generator),
    }


def vector_file(folder: Path, task: str, seed: int = 0, **header: str) -> Path:
    path = folder / f"{task}.safetensors"
    TaskVector(tensors(seed), task, metadata=header).save(path)
    return path


def equal(first, second) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in second)


@pytest.fixture
def offline(cache, monkeypatch):
    """A cache with one snapshot, as another machine's was copied here, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    folder = cache / "models--me--vectors" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    refs = cache / "models--me--vectors" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return folder


def downloaded(hub) -> list[str]:
    return [
        path.split(f"resolve/{path.split('/')[4]}/")[1]
        for how, path in hub.requests
        if how == "GET" and "/resolve/" in path
    ]


# Addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://me/vectors", Address("me/vectors")),
        ("hf://me/vectors/", Address("me/vectors")),
        ("hf://me/vectors/a/b.safetensors", Address("me/vectors", "a/b.safetensors")),
        ("hf://me/my-vec.v2@v1.0/x", Address("me/my-vec.v2", "x", "v1.0")),
        ("hf://me/vectors@refs/pr/3/x", Address("me/vectors", "x", "refs/pr/3")),
        ("hf://me/vectors@feature%2Fa/x", Address("me/vectors", "x", "feature/a")),
        ("hf://models/me/vectors/x", Address("me/vectors", "x")),
        (Path("hf://me/vectors/x"), Address("me/vectors", "x")),  # pathlib leaves one slash
    ],
)
def test_what_an_address_says(text, expected):
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize("text", ["me/vectors", "/hf/x", "", "a.hf://me/x", "hf", "C:/x", "http/x", "s3"])
def test_other_paths_are_left_alone(text):
    assert parse_address(text) is None
    assert local_path(text) == Path(text)
    assert pinned(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *("hf://", "hf://me", "hf://me/", "hf:///x/y", "hf://me/vectors@/x", "hf://me/x@a@b/y", "hf://me/x\\y/z"),
        *("hf://me/vectors//x", "hf://me/vectors/../x", "hf://me/vectors/./x", "hf://datasets/me/x", "hf://spaces/a/b"),
    ],
)
def test_malformed_addresses_are_refused(text):
    with pytest.raises(ConfigurationError, match=r"expected hf://owner/name.*got something else\. Write it like that"):
        local_path(text)


@pytest.mark.parametrize("url", ["https://huggingface.co/me/x", "http:/host/file", "s3://bucket/x", "HTTP://host/x"])
@pytest.mark.parametrize(
    "opened", [local_path, pinned, open_tensors, open_checkpoint, TaskVector.load, Coefficients.load]
)
def test_a_url_is_no_path(url, opened):
    for path in (url, Path(url)):
        with pytest.raises(
            ConfigurationError, match=r"expected a path, or hf://owner/name/file .*, got a URL, which is"
        ):
            opened(path)


# Reading


def test_a_file_is_downloaded_once_and_the_branch_may_move(hub, tmp_path):
    content = vector_file(tmp_path, "mnist").read_bytes()
    first = hub.repository("me/vectors", {"sub/mnist.safetensors": content, "sub/other.safetensors": b"x"})
    address = "hf://me/vectors/sub/mnist.safetensors"
    place = local_path(address)
    assert place == Path(constants.HF_HUB_CACHE, "models--me--vectors", "snapshots", first, "sub", "mnist.safetensors")
    assert place.read_bytes() == content
    assert downloaded(hub) == ["sub/mnist.safetensors"]
    assert local_path(address) == place
    assert downloaded(hub) == ["sub/mnist.safetensors"]

    assert pinned(address) == f"hf://me/vectors@{first}/sub/mnist.safetensors"
    hub.requests.clear()
    assert local_path(pinned(address)) == place
    second = hub.repositories["me/vectors"].commit(
        {"sub/mnist.safetensors": vector_file(tmp_path, "mnist", 1).read_bytes()}
    )
    assert local_path(address).parents[1].name == second
    assert equal(TaskVector.load(address), tensors(1))
    hub.requests.clear()
    assert equal(TaskVector.load(f"hf://me/vectors@{first}/sub/mnist.safetensors"), tensors(0))
    assert hub.requests == []  # the file of a commit cannot have changed


def test_every_place_that_opens_a_file_takes_an_address(hub, tmp_path, clip_config, clip_weights):
    vector_file(tmp_path, "a", 0)
    vector_file(tmp_path, "b", 1)
    values = Coefficients(torch.tensor([[0.25], [0.5]]), ("a", "b"), ("all",), dict.fromkeys(tensors(), "all"), "task")
    values.save(tmp_path / "c.json")
    values.save(tmp_path / "c.safetensors")
    (tmp_path / "published.json").write_text("[0.25, 0.5]")
    for seed, task in enumerate("ab"):
        squares = {name: value.square() + 0.1 for name, value in tensors(seed).items()}
        write_statistics(tmp_path / f"{task}-fisher.safetensors", "fisher", squares, task)
    shutil.copy(clip_weights, tmp_path / "clip.safetensors")
    torch.save(tensors(3), tmp_path / "torch.pt")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    commit = hub.repository("me/all", files)
    at = "hf://me/all/"

    assert equal(TaskVector.load(at + "a.safetensors", verify=True), tensors(0))
    assert equal(LazyTensors(at + "b.safetensors", verify=True), tensors(1))
    assert equal(open_tensors(at + "b.safetensors"), tensors(1))
    assert equal(open_checkpoint(at + "torch.pt"), tensors(3))
    assert file_digest(at + "a.safetensors") == file_digest(tmp_path / "a.safetensors")
    for name in ("c.json", "c.safetensors"):
        assert torch.equal(Coefficients.load(at + name).values, values.values)
    published = Coefficients.from_published(at + "published.json", list(tensors()), ["a", "b"], "task")
    assert torch.equal(
        published.values, Coefficients.from_published([0.25, 0.5], list(tensors()), ["a", "b"], "task").values
    )
    assert (
        load_clip(clip_config, at + "clip.safetensors").fingerprint == load_clip(clip_config, clip_weights).fingerprint
    )

    stacks = TaskVectors([TaskVector.load(f"{at}{task}.safetensors") for task in "ab"])
    scale = LearnedScale(at + "c.json")
    assert scale.path == f"hf://me/all@{commit}/c.json"  # the commit is written down
    assert equal(scale(stacks), LearnedScale(str(tmp_path / "c.json"))(stacks))
    local, remote = (
        FisherMean(statistics={task: f"{place}{task}-fisher.safetensors" for task in "ab"})
        for place in (f"{tmp_path}/", at)
    )
    assert remote.statistics["a"] == f"hf://me/all@{commit}/a-fisher.safetensors"
    assert equal(remote(stacks), local(stacks))


def test_of_a_repository_only_the_model_is_downloaded(hub, tmp_path):
    write_tensors(tmp_path / "model.safetensors", tensors(), {})
    content = (tmp_path / "model.safetensors").read_bytes()
    others = {"pytorch_model.bin": b"x", "tf_model.h5": b"x", "open_clip_model.safetensors": b"x", "config.json": b"{}"}
    commit = hub.repository("me/clip", {"model.safetensors": content, **others, "deep/model.safetensors": b"x"})
    assert equal(open_tensors("hf://me/clip"), tensors())
    assert sorted(downloaded(hub)) == ["config.json", "model.safetensors"]
    assert local_path("hf://me/clip").name == commit
    assert named_after("hf://me/clip") == named_after(f"hf://me/clip@{commit}/model.safetensors") == "clip"


def test_an_index_brings_its_shards(hub, tmp_path):
    shards = plan_shards(tensors(), 50, "model")
    write_shards(tmp_path, tensors(), {}, shards, "model")
    files = {f"big/{name}": (tmp_path / name).read_bytes() for name in (*shards, "model.safetensors.index.json")}
    hub.repository("me/big", {**files, "big/other.safetensors": b"x", "model-00001-of-00002.safetensors": b"x"})
    for address in ("hf://me/big/big", "hf://me/big/big/model.safetensors.index.json"):
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        hub.requests.clear()
        assert equal(open_tensors(address), tensors())
        assert sorted(downloaded(hub)) == sorted(files)
        assert equal(open_tensors(pinned(address)), tensors())
        assert len(downloaded(hub)) == len(files)


def test_an_index_that_leads_elsewhere_is_refused_as_any(hub):
    index = {"weight_map": {"w": "../../secret.safetensors", "v": "/etc/passwd"}}
    hub.repository("me/bad", {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(FileFormatError, match=r"expected names of safetensors files in its folder"):
        open_tensors("hf://me/bad")
    for content in (b"[]", b"{", b'{"weight_map": 3}'):
        hub.repository("me/bad", {"model.safetensors.index.json": content})
        with pytest.raises(FileFormatError, match=r"expected an index with a weight_map"):
            open_tensors("hf://me/bad")


def test_a_folder_of_several_models_is_refused_before_any_is_downloaded(hub):
    hub.repository("me/many", {f"{task}.safetensors": b"x" for task in "abcde"})
    with pytest.raises(HubError, match=r"one model in this folder, got a\.safetensors, b\.safetensors.* and 2 more"):
        open_tensors("hf://me/many")
    hub.repository("me/text", {"docs/a.md": b"x", "notes.txt": b"x"})
    with pytest.raises(HubError, match=r"expected a model in this folder, got \.gitattributes, notes\.txt\. Name"):
        local_path("hf://me/text")
    with pytest.raises(HubError, match=r"hf://me/text/docs: expected a model in this folder, got a\.md\."):
        local_path("hf://me/text/docs")
    assert downloaded(hub) == []


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "a\\..\\evil.txt"])
def test_a_repository_that_leads_elsewhere_is_refused(hub, tmp_path, name):
    hub.repository("me/x", {name: b"x", "good.txt": b"x"})
    with pytest.raises(HubError, match=r"expected files inside the repository, got '.*evil\.txt'\. Do not trust it\."):
        pull("hf://me/x", "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert downloaded(hub) == []


def test_a_damaged_file_is_noticed_as_any(hub, tmp_path):
    content = vector_file(tmp_path, "mnist").read_bytes()
    hub.repository(
        "me/vectors", {"a.safetensors": content[:-3], "b.safetensors": content[:-1] + bytes([content[-1] ^ 1])}
    )
    with pytest.raises(FileFormatError, match=r"a\.safetensors: expected .* bytes"):
        TaskVector.load("hf://me/vectors/a.safetensors")
    with pytest.raises(FileFormatError, match=r"the file has changed since it was written"):
        TaskVector.load("hf://me/vectors/b.safetensors", verify=True)


# Refusals


ANSWERS = [  # what the Hub answers instead, what is said
    (
        404,
        "RepoNotFound",
        "Repository not found",
        r"404: Repository not found\. Check owner, .*private, run hf auth login",
    ),
    (
        401,
        "RepoNotFound",
        "Repository not found",
        r"401: Repository not found\. Check owner and name; if it is private",
    ),
    (401, "", "Invalid credentials in Authorization header", r"401: Invalid credentials in .*hf auth login"),
    (403, "GatedRepo", "Access is restricted", r"403: Access is restricted\. Ask for access on its page, or"),
    (403, "", "This token is read-only", r"403: This token is read-only\. .*run hf auth login with a token that may"),
    (404, "RevisionNotFound", "Invalid rev id: v2", r"404: Invalid rev id: v2\. Check owner, name, revision"),
    (404, "EntryNotFound", "Entry not found", r"404: Entry not found\. Check owner, name, revision and path"),
    (429, "", "slow down", r"429: slow down\. Wait a few minutes"),
    (418, "", "a teapot", r"418: a teapot\.$"),
]


@pytest.mark.parametrize(("status", "code", "text", "expected"), ANSWERS)
def test_refusals_are_one_line(hub, status, code, text, expected):
    hub.instead["GET", "/api/models/me/x"] = (status, {"X-Error-Code": code} if code else {}, text)
    with pytest.raises(
        HubError, match=f"^hf://me/x/a.safetensors: expected the Hub to read this, got {expected}"
    ) as no:
        TaskVector.load("hf://me/x/a.safetensors")
    assert "\n" not in str(no.value)


def test_a_hub_on_fire(hub):
    hub.instead["GET", "/api/models/me/x"] = (500, {}, "on fire")
    line = r"expected an answer from http://127.*, got on fire, and no a\.safetensors in the cache .*cache\. Connect to"
    with pytest.raises(HubError, match=f"^hf://me/x/a.safetensors: {line}"):
        TaskVector.load("hf://me/x/a.safetensors")


def test_what_a_repository_does_not_have(hub):
    hub.repository("me/x", {"mnist.safetensors": b"", "other.pt": b""})
    with pytest.raises(
        HubError, match=r"^hf://me/x/mnits.safetensors: .*got none of this name\. There is mnist\.safetensors\.$"
    ):
        local_path("hf://me/x/mnits.safetensors")
    with pytest.raises(HubError, match=r"file or folder of me/x, got none .* There are \.gitattributes, mnist"):
        local_path("hf://me/x/zzzzzzzz")
    with pytest.raises(HubError, match=r"expected the Hub to read this, got 404: Invalid rev id: dev\. Check"):
        local_path("hf://me/x@dev/mnist.safetensors")
    with pytest.raises(HubError, match=rf"got 404: Invalid rev id: {COMMIT}\."):
        local_path(f"hf://me/x@{COMMIT}/mnist.safetensors")


def test_a_private_repository_needs_the_library_s_token(hub, tmp_path, monkeypatch):
    content = vector_file(tmp_path, "mnist").read_bytes()
    hub.repository("me/secret", {"mnist.safetensors": content}, private=True)
    hub.readers = {TOKEN}
    with pytest.raises(HubError, match=r"got 401: Repo.*if it is private or gated, run hf auth login"):
        local_path("hf://me/secret/mnist.safetensors")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)  # as hf auth login leaves it
    assert local_path("hf://me/secret/mnist.safetensors").read_bytes() == content


def test_without_an_answer_the_cache_is_used_and_else_the_network_is_named(hub, tmp_path, monkeypatch):
    content = vector_file(tmp_path, "mnist").read_bytes()
    hub.repository("me/vectors", {"mnist.safetensors": content, "svhn.safetensors": content})
    place = local_path("hf://me/vectors/mnist.safetensors")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert local_path("hf://me/vectors/mnist.safetensors") == place
    with pytest.raises(
        HubError, match=r"expected an answer from http://127\.0\.0\.1:9, got .*, and no svhn\.safetensors in"
    ):
        local_path("hf://me/vectors/svhn.safetensors")
    with pytest.raises(HubError, match=r"one model in this folder, got mnist\.safetensors, svhn\.safetensors"):
        local_path("hf://me/vectors")  # that the other one exists is known from the listing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_named(hub, monkeypatch, number):
    hub.repository("me/x", {"a.safetensors": b""})

    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub.HfApi, "snapshot_download", full)
    line = rf"expected to write into the cache .*cache, got {os.strerror(number)}\. Make room there, or set HF_HOME"
    with pytest.raises(HubError, match=line):
        local_path("hf://me/x/a.safetensors")


def test_the_library_is_asked_for_by_name(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigurationError, match=r"the package huggingface_hub, got none\. Install it: pip install"):
        local_path("hf://me/x/a.safetensors")


# Offline


def test_a_snapshot_folder_is_enough(offline, tmp_path):
    shutil.copy(vector_file(tmp_path, "mnist"), offline)
    assert equal(TaskVector.load("hf://me/vectors/mnist.safetensors", verify=True), tensors())
    assert equal(TaskVector.load("hf://me/vectors"), tensors())
    assert pinned("hf://me/vectors") == f"hf://me/vectors@{COMMIT}"
    assert local_path(f"hf://me/vectors@{COMMIT}/mnist.safetensors") == offline / "mnist.safetensors"
    with pytest.raises(
        HubError,
        match=r"^hf://me/vectors/svhn.safetensors: expected it in the cache .*cache, as HF_HUB_OFFLINE is set, got "
        r"no svhn\.safetensors\. Run hf download me/vectors svhn\.safetensors where there is network, and bring the "
        r"folder models--me--vectors of that cache here; or unset HF_HUB_OFFLINE\.$",
    ):
        TaskVector.load("hf://me/vectors/svhn.safetensors")
    with pytest.raises(HubError, match=r"got no snapshot of me/other\. Run hf download me/other where"):
        local_path("hf://me/other")
    with pytest.raises(HubError, match=r"got no a\.pt\. Run hf download me/vectors a\.pt --revision v2 where"):
        local_path("hf://me/vectors@v2/a.pt")
    with pytest.raises(HubError, match=r"hf://me/vectors: expected an answer from .*got .*offline mode is enabled"):
        push("mnist.safetensors", "hf://me/vectors")


def test_of_an_incomplete_model_the_missing_shards_are_named(offline, tmp_path):
    shards = plan_shards(tensors(), 50, "model")
    write_shards(offline, tensors(), {}, shards, "model")
    assert equal(open_tensors("hf://me/vectors"), tensors())
    (offline / next(iter(shards))).unlink()
    with pytest.raises(FileFormatError, match=r"expected 2 shards in its folder, got none of 1 \(model-00001-of-00002"):
        open_tensors("hf://me/vectors")


# Writing


def front_of(text: str) -> dict:
    return yaml.safe_load(re.fullmatch(r"---\n(.*?)---\n.*", text, re.DOTALL)[1])


def test_what_is_pushed_is_pulled_byte_by_byte(hub, tmp_path):
    source = vector_file(tmp_path, "mnist", base_model="tiny", classes='["0", "1"]')
    done = push(
        str(source), "hf://me/vectors", private=True, license="apache-2.0", base_model="openai/clip", message="First"
    )
    repository = hub.repositories["me/vectors"]
    assert repository.private
    assert repository.messages[-1] == "First"
    assert done.url == f"{hub.url}/me/vectors/commit/{repository.branches['main']}"
    assert done.describe().splitlines()[-1] == done.url
    assert set(repository.files) == {".gitattributes", "mnist.safetensors", "mnist-provenance.json", "README.md"}
    card = repository.files["README.md"].decode()
    assert front_of(card) == {
        "license": "apache-2.0",
        "base_model": "openai/clip",
        "library_name": "lit-merge",
        "tags": ["lit-merge", "task-vector", "model-merging"],
    }
    assert "Task vector θ − θ0 of the task mnist of the base model `tiny`, 2 tensors with 27 entries in float32" in card
    assert '| classes | ["0", "1"] |' in card
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    scope: dict = {}
    exec(program, scope)
    assert equal(scope["vector"], tensors())

    provenance = json.loads(repository.files["mnist-provenance.json"])
    (model,) = provenance["models"]
    assert model["content_blake3"] == LazyTensors(source).content_digest
    assert model["header"]["classes"] == '["0", "1"]'
    assert model["files"] == {"mnist.safetensors": {"bytes": source.stat().st_size, "sha256": file_digest(source)}}

    assert pull("hf://me/vectors/mnist.safetensors", "new/got.safetensors") == Path("new/got.safetensors")
    assert Path("new/got.safetensors").read_bytes() == source.read_bytes()
    assert [path.name for path in Path("new").iterdir()] == ["got.safetensors"]
    assert pull("hf://me/vectors") == Path("vectors")
    assert {path.name: path.read_bytes() for path in Path("vectors").iterdir()} == repository.files

    again = push(str(source), "hf://me/vectors", private=True, base_model="openai/clip")
    assert again.url == done.url  # nothing has changed, so there is no new commit
    assert len(repository.commits) == 2


def test_a_file_may_get_another_name_folder_and_branch(hub, tmp_path):
    source = vector_file(tmp_path, "mnist")
    hub.repository("me/vectors", {})
    hub.repositories["me/vectors"].branches["dev"] = hub.repositories["me/vectors"].branches["main"]
    push(str(source), "hf://me/vectors@dev/b32/best.safetensors")
    push(str(source), "hf://me/vectors@dev/b16")
    repository = hub.repositories["me/vectors"]
    assert set(repository.files) == {".gitattributes"}
    files = repository.commits[repository.branches["dev"]]
    names = ["b16/mnist-provenance.json", "b16/mnist.safetensors", "b32/best-provenance.json", "b32/best.safetensors"]
    assert sorted(files) == [".gitattributes", "README.md", *names]
    assert list(json.loads(files[names[2]])["models"][0]["files"]) == ["b32/best.safetensors"]
    assert "TaskVector.load('hf://me/vectors@dev/b32/best.safetensors')" in files["README.md"].decode()
    assert equal(TaskVector.load("hf://me/vectors@dev/b16/mnist.safetensors"), tensors())


def test_every_kind_gets_its_card(hub, tmp_path, clip_weights):
    values = Coefficients(torch.tensor([[0.25], [0.5]]), ("a", "b"), ("all",), dict.fromkeys(tensors(), "all"), "task")
    values.save(tmp_path / "c.json")
    values.save(tmp_path / "c.safetensors")
    write_statistics(tmp_path / "f.safetensors", "fisher", tensors(), "a")
    write_tensors(tmp_path / "w.safetensors", tensors(), {"format": "lit-merge/weights/1"})
    shutil.copy(clip_weights, tmp_path / "clip.safetensors")
    expected = {
        "c.json": ("Merging coefficients", ["lit-merge", "model-merging"]),
        "c.safetensors": ("Merging coefficients", ["lit-merge", "model-merging"]),
        "f.safetensors": ("Statistics for merging of the task a, 2 tensors", ["lit-merge", "model-merging"]),
        "w.safetensors": ("Weights, 2 tensors with 27 entries", ["lit-merge", "model-merging"]),
        "clip.safetensors": ("Weights, ", ["lit-merge", "model-merging"]),
    }
    for number, (name, (text, tags)) in enumerate(expected.items()):
        push(str(tmp_path / name), f"hf://me/kind{number}")
        card = hub.repositories[f"me/kind{number}"].files["README.md"].decode()
        assert f"## {name}\n\n{text}" in card
        front = front_of(card)
        assert front["tags"] == tags
        assert front["library_name"] == ("open_clip" if name.startswith("clip") else "lit-merge")
        assert front.get("pipeline_tag") == ("zero-shot-image-classification" if name.startswith("clip") else None)
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], scope := {})
        found = scope.get("coefficients") or scope.get("statistics") or scope["weights"]
        assert found.values.tolist() == [[0.25], [0.5]] if name.startswith("c.") else len(found) >= 2


def test_what_a_user_wrote_stays(hub, tmp_path):
    mine = "---\nlicense: mit  # mine\ntags: [a]\n---\n# My title\n\nMy words.\n"
    vector_file(tmp_path, "mnist")
    push("mnist.safetensors", "hf://me/vectors")
    repository = hub.repositories["me/vectors"]
    _, _, block = repository.files["README.md"].decode().partition("# vectors\n\n")
    edited = mine + block + "\nMore words.\n"
    repository.commit({"README.md": edited.encode()})

    vector_file(tmp_path, "mnist", 1, step="7")
    vector_file(tmp_path, "svhn", 2)
    note = push("mnist.safetensors", "hf://me/vectors", license="mit").card
    assert note == "mnist.safetensors replaced in it, the rest left as it is"
    push("svhn.safetensors", "hf://me/vectors")
    card = repository.files["README.md"].decode()
    assert card.startswith(mine + "<!-- lit-merge: mnist.safetensors -->\n## mnist.safetensors")
    assert card.endswith("<!-- lit-merge end: svhn.safetensors -->\n\nMore words.\n")
    assert card.count("<!-- lit-merge: ") == card.count("<!-- lit-merge end: ") == 2
    assert card.count("| step | 7 |") == 1
    assert card.count("## mnist.safetensors") == 1

    with pytest.raises(
        HubError, match=r"README\.md: expected the license apache-2\.0, got mit in the card that is there"
    ):
        push("svhn.safetensors", "hf://me/vectors", license="apache-2.0")
    broken = card.replace("<!-- lit-merge end: svhn.safetensors -->", "")
    repository.commit({"README.md": broken.encode()})
    with pytest.raises(
        HubError, match=r"expected <!-- lit-merge: svhn.* and after it .*got one of them or another order"
    ):
        push("svhn.safetensors", "hf://me/vectors")
    assert repository.files["README.md"].decode() == broken


def test_a_text_without_our_block_is_somebody_s_own(hub, tmp_path):
    vector_file(tmp_path, "mnist")
    hub.repository("me/vectors", {"README.md": b"# Mine\n\nNothing of yours.\n"})
    done = push("mnist.safetensors", "hf://me/vectors")
    assert done.card == "left as it is, as it has a text of its own"
    assert hub.repositories["me/vectors"].files["README.md"] == b"# Mine\n\nNothing of yours.\n"
    push("mnist.safetensors", "hf://me/vectors", license="mit")  # which is asked for
    assert hub.repositories["me/vectors"].files["README.md"] == b"---\nlicense: mit\n---\n# Mine\n\nNothing of yours.\n"

    hub.repository(
        "me/new", {"README.md": b"---\nlicense: gpl-3.0\nlibrary_name: mine\n---\n"}
    )  # as the website makes it
    push("mnist.safetensors", "hf://me/new")
    card = hub.repositories["me/new"].files["README.md"].decode()
    assert front_of(card)["license"] == "gpl-3.0"
    assert front_of(card)["library_name"] == "mine"
    assert "<!-- lit-merge: mnist.safetensors -->" in card


def test_a_header_cannot_forge_a_marker(hub, tmp_path):
    vector_file(tmp_path, "mnist", note="<!-- lit-merge end: mnist.safetensors --> text | of mine\nand more")
    push("mnist.safetensors", "hf://me/vectors")
    push("mnist.safetensors", "hf://me/vectors", message="again")
    card = hub.repositories["me/vectors"].files["README.md"].decode()
    assert card.count("<!-- lit-merge end: ") == 1
    assert r"text \| of mine and more |" in card


def test_a_folder_goes_as_a_whole_with_the_card_of_the_merge(hub, tmp_path, capsys):
    write_tensors(tmp_path / "base.safetensors", tensors(5), {})
    for seed, name in enumerate("ab"):
        write_tensors(tmp_path / f"{name}.safetensors", tensors(seed), {})
    arguments = ["--vectors=[a.safetensors, b.safetensors]", "--base=base.safetensors", "--recipe=weight_average"]
    assert main(["merge", *arguments, "--output=m", "--shard_size=50B", "--progress=false"]) == 0
    (tmp_path / "m" / "notes.txt").write_text("not for others")
    (tmp_path / "m" / "old.ckpt").write_text("not for others")
    assert main(["push", "m", "hf://me/merged", "--license=mit"]) == 0
    repository = hub.repositories["me/merged"]
    assert capsys.readouterr().out.endswith(f"{hub.url}/me/merged/commit/{repository.branches['main']}\n")
    shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    others = {"model.safetensors.index.json", "merge.yaml", "provenance.json", "README.md", ".gitattributes"}
    assert set(repository.files) == shards | others
    card = repository.files["README.md"].decode()
    assert front_of(card) == {
        "license": "mit",
        "library_name": "lit-merge",
        "tags": ["lit-merge", "model-merging", "merge"],
    }
    assert "# m\n" in card
    assert "## The chain" in card
    assert "On the Hub it is `hf://me/merged`, wherever lit-merge takes a path." in card
    assert equal(open_tensors("hf://me/merged"), open_tensors("m"))
    pull("hf://me/merged", "back")
    assert {path.name for path in Path("back").iterdir()} == set(repository.files)
    assert equal(open_tensors("back", verify=True), open_tensors("m"))


def test_the_folder_of_a_library_goes_and_comes_as_a_whole(hub, tmp_path):
    beside = {"config.json": b'{"model_type": "bert"}', "tokenizer.json": b"{}", "1_Pooling/config.json": b"[]",
              "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}]', "mine.py": b"raise SystemExit"}  # fmt: skip
    others = {"README.md": b"# theirs", "pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "optimizer.pt": b"x"}
    for seed, name in enumerate(("base", "a")):
        write_tensors(tmp_path / f"{name}.safetensors", tensors(seed), {"format": "pt"})
    weights = {"model.safetensors": (tmp_path / "base.safetensors").read_bytes()}
    hub.repository("they/base", {**beside, **others, **weights})
    merge(["a.safetensors"], "m", "weight_average", base="hf://they/base")
    assert set(downloaded(hub)) == {*beside, "model.safetensors"}
    Path("m/notes.txt").write_text("not for others")
    Path("m/tokenizer.json").write_text('{"mine": 1}')
    push("m", "hf://me/merged/deep")
    files = hub.repositories["me/merged"].files
    expected = {*beside, "model.safetensors", "provenance.json"}
    assert set(files) == {f"deep/{name}" for name in expected} | {"README.md", ".gitattributes"}
    assert files["deep/1_Pooling/config.json"] == b"[]"
    assert files["deep/tokenizer.json"] == b'{"mine": 1}'
    assert front_of(files["README.md"].decode())["base_model"] == "they/base"
    assert front_of(files["README.md"].decode())["library_name"] == "sentence-transformers"


def test_a_dry_run_asks_nothing_of_the_hub(hub, tmp_path, capsys):
    size = vector_file(tmp_path, "mnist").stat().st_size
    assert main(["push", "mnist.safetensors", "hf://me/vectors@dev/b32", "--dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^b32/mnist\.safetensors +{size} bytes$", said, re.MULTILINE)
    assert re.search(r"^b32/mnist-provenance\.json +\d+ bytes$", said, re.MULTILINE)
    assert said.endswith("would go to hf://me/vectors@dev\n")
    assert hub.requests == []


def test_what_does_not_verify_is_not_pushed(hub, tmp_path):
    source = vector_file(tmp_path, "mnist")
    content = source.read_bytes()
    source.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileFormatError, match=r"mnist\.safetensors: expected content .* the file has changed since"):
        push("mnist.safetensors", "hf://me/x")
    source.write_bytes(content[:-1])
    with pytest.raises(FileFormatError, match=r"expected .* bytes"):
        push("mnist.safetensors", "hf://me/x", dry_run=True)
    save_file(tensors(), "other.safetensors")
    with pytest.raises(
        FileFormatError, match=r"with a content digest, got one without\. For the files of other programs use hf"
    ):
        push("other.safetensors", "hf://me/x")
    torch.save(tensors(), "model.pt")
    with pytest.raises(
        ConfigurationError, match=r"expected a \.safetensors file, .*, got model\.pt\. For others use hf upload"
    ):
        push("model.pt", "hf://me/x")
    Path("c.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"expected format lit-merge/coefficients/1, got none"):
        push("c.json", "hf://me/x")
    Path("empty").mkdir()
    with pytest.raises(ConfigurationError, match=r"expected a folder with safetensors files, got none in empty\.$"):
        push("empty", "hf://me/x")
    with pytest.raises(FileFormatError, match=r"expected a safetensors file, got No such file"):
        push("missing.safetensors", "hf://me/x")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("address", "settings", "expected"),
    [
        ("me/x", {}, r"address: expected hf://owner/name, got 'me/x'\. Put hf:// in front of it"),
        (f"hf://me/x@{COMMIT}", {}, r"expected a branch to write to, got the commit of .* Leave it out"),
        (
            "hf://me/x",
            {"base_model": "ViT-B-32"},
            r"base_model: expected owner/name of a model on the Hub, got 'ViT-B-32'",
        ),
        ("hf://me/x/a-->b", {}, r"expected names of letters, digits and .*, got a-->b/mnist.* Rename them"),
    ],
)
def test_push_refuses_other_settings(hub, tmp_path, address, settings, expected):
    vector_file(tmp_path, "mnist")
    with pytest.raises(ConfigurationError, match=expected):
        push("mnist.safetensors", address, **settings)
    assert hub.requests == []


def test_a_public_repository_does_not_become_private(hub, tmp_path):
    vector_file(tmp_path, "mnist")
    hub.repository("me/x", {})
    with pytest.raises(ConfigurationError, match=r"private: expected a private repository, got me/x, which is public"):
        push("mnist.safetensors", "hf://me/x", private=True)
    assert set(hub.repositories["me/x"].files) == {".gitattributes"}


@pytest.mark.parametrize(
    ("path", "answer", "expected"),
    [
        ("/api/repos/create", (403, {}, "no rights in me"), r"403: no rights in me\. .*with a token that may do this"),
        ("/commit/", (412, {}, "refresh"), r"412: refresh\. Somebody else has committed in between: push again"),
        ("/commit/", (400, {}, "bad front matter"), r"400: bad front matter\."),
        ("/preupload/", (401, {}, "no"), r"401: no\. .*run hf auth login"),
        ("/commit/", (403, {}, f"for {TOKEN} at http://x/y?sig=abc"), r"403: for … at http://x/y\?…\. Ask"),
    ],
)
def test_refused_pushes_are_one_line(hub, tmp_path, path, answer, expected):
    vector_file(tmp_path, "mnist")
    hub.instead["POST", path] = answer
    with pytest.raises(HubError, match=f"^hf://me/x: expected the Hub to write this, got {expected}") as refusal:
        push("mnist.safetensors", "hf://me/x")
    assert "\n" not in str(refusal.value)
    assert "sig=abc" not in str(refusal.value)


def test_a_commit_in_between_is_noticed(hub, tmp_path, monkeypatch):
    vector_file(tmp_path, "mnist")
    hub.repository("me/x", {})
    real = huggingface_hub.HfApi.create_commit

    def late(*arguments, **keywords):
        hub.repositories["me/x"].commit({"README.md": b"somebody else's"})
        return real(*arguments, **keywords)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    with pytest.raises(HubError, match=r"got 412: .* Somebody else has committed in between: push again"):
        push("mnist.safetensors", "hf://me/x")
    assert hub.repositories["me/x"].files["README.md"] == b"somebody else's"


# Pulling


def test_pull_replaces_nothing_unasked_and_leaves_nothing_behind(hub, tmp_path):
    good = vector_file(tmp_path, "mnist").read_bytes()
    bad = good[:-1] + bytes([good[-1] ^ 1])
    hub.repository("me/x", {"mnist.safetensors": good, "bad/mnist.safetensors": bad, "bad/a.txt": b"x"})
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(
        ConfigurationError, match=r"expected a new file or folder, got out, which exists\. Name another one\.$"
    ):
        pull("hf://me/x", "out", overwrite=True)
    with pytest.raises(ConfigurationError, match=r"got out/mine, which exists\. Name another one, or set overwrite\."):
        pull("hf://me/x/mnist.safetensors", "out/mine")
    with pytest.raises(ConfigurationError, match=r"output: expected a new folder, got the file out/mine"):
        pull("hf://me/x", "out/mine", overwrite=True)
    with pytest.raises(FileFormatError, match=r"^hf://me/x/bad/mnist.safetensors: expected content .* has changed"):
        pull("hf://me/x/bad", "out/new")
    with pytest.raises(FileFormatError, match=r"^hf://me/x/bad/mnist.safetensors: expected content"):
        pull("hf://me/x/bad/mnist.safetensors", "out/mine", overwrite=True)
    with pytest.raises(ConfigurationError, match=r"address: expected hf://owner/name, got 'me/x'"):
        pull("me/x")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"mine": "mine"}
    assert pull("hf://me/x/mnist.safetensors", "out/mine", overwrite=True).read_bytes() == good


def test_pull_to_a_full_disk(hub, tmp_path, full_disk, monkeypatch):
    size = len(content := vector_file(tmp_path, "mnist").read_bytes())
    hub.repository("me/x", {"mnist.safetensors": content})
    copyfile = shutil.copyfile

    def limited(source, target):
        with full_disk():
            copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", limited)
    with pytest.raises(
        WriteError, match=rf"^new/a\.safetensors: expected room for {size:,} bytes, got File too large \("
    ):
        pull("hf://me/x/mnist.safetensors", "new/a.safetensors")
    assert list(Path("new").iterdir()) == []


# The command line


@pytest.mark.parametrize("kind", ["task_vector", "weights"])
def test_a_merge_of_two_addresses_keeps_the_commits(hub, tmp_path, kind, capsys):
    write_tensors(tmp_path / "base.safetensors", tensors(5), {})
    for seed, name in enumerate("ab"):
        write_tensors(tmp_path / f"{name}.safetensors", tensors(seed), {})
    files = {f"{name}.safetensors": (tmp_path / f"{name}.safetensors").read_bytes() for name in "ab"}
    commit = hub.repository("me/models", files)
    base = hub.repository("me/base", {"model.safetensors": (tmp_path / "base.safetensors").read_bytes()})
    settings = ["--recipe=weight_average", f"--kind={kind}", "--progress=false"]
    remote = ["--vectors=[hf://me/models/a.safetensors, hf://me/models@main/b.safetensors]", "--base=hf://me/base"]
    local = ["--vectors=[a.safetensors, b.safetensors]", "--base=base.safetensors"]
    assert main(["merge", *remote, *settings, "--output=remote.safetensors"]) == 0
    assert main(["merge", *local, *settings, "--output=local.safetensors"]) == 0
    merged = LazyTensors("remote.safetensors", verify=True)
    assert equal(merged, LazyTensors("local.safetensors"))
    addresses = [f"hf://me/models@{commit}/{name}.safetensors" for name in "ab"]
    assert [one["address"] for one in json.loads(merged.metadata["inputs"])] == addresses
    assert [one["tasks"] for one in json.loads(merged.metadata["inputs"])] == ["a", "b"]
    assert json.loads(merged.metadata["base"])["address"] == f"hf://me/base@{base}"
    assert merged.metadata["base_model"] == "base"
    card = Path("remote.md").read_text()
    assert all(f"| {address} |" in card for address in addresses)
    assert front_of(card)["base_model"] == "me/base"
    for path in (Path("remote.safetensors"), Path("remote.md"), Path("remote-merge.yaml")):
        assert str(constants.HF_HUB_CACHE).encode() not in path.read_bytes()

    # What the card says writes the same tensors, after the branch has moved too.
    hub.repositories["me/models"].commit({"a.safetensors": files["b.safetensors"]})
    Path("again.yaml").write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert main(["merge", "--config=again.yaml", "--output=again.safetensors"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("remote.safetensors").read_bytes()


def test_the_command_line_in_a_process_of_its_own(hub, tmp_path, fork_server):
    for seed, name in enumerate("ab"):
        vector_file(tmp_path, name, seed)
    write_tensors(tmp_path / "base.safetensors", tensors(5), {})
    hub.repository("me/vectors", {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")})
    # What names the Hub and the cache is read when the library is imported, so that it is imported again here.
    again = (
        "import sys\nfor name in [n for n in sys.modules if n.startswith('huggingface_hub')]: del sys.modules[name]\n"
    )
    command = "from lit_merge.commands.main import main\nsys.exit(main({arguments}))"
    vectors = "--vectors=[hf://me/vectors/a.safetensors, hf://me/vectors/b.safetensors]"
    arguments = ["merge", vectors, "--base=hf://me/vectors/base.safetensors", "--recipe=ties", "--progress=false"]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    online = (again + command.format(arguments=[*arguments, "--output=one.safetensors"]), home)
    codes, said = fork_server.run([online])
    assert codes == [0], said
    hub.requests.clear()
    without = {**home, "HF_HUB_OFFLINE": "1"}
    same = (again + command.format(arguments=[*arguments, "--output=two.safetensors"]), without)
    other = (again + command.format(arguments=["pull", "hf://me/vectors/c.safetensors"]), without)
    codes, said = fork_server.run([same, other])
    assert codes == [0, 1], said
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    assert said[1].startswith(
        "lit-merge: error: hf://me/vectors/c.safetensors: expected a file or folder of me/vectors"
    )
    assert said[1].count("\n") == 1
    assert hub.requests == []


def test_tokens_are_sent_and_nowhere_else(hub, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.readers = {TOKEN}
    vector_file(tmp_path, "a")
    vector_file(tmp_path, "b", 1)
    write_tensors(tmp_path / "base.safetensors", tensors(5), {})
    for name in "ab":
        assert main(["push", f"{name}.safetensors", "hf://me/secret", "--private=true"]) == 0
    assert main(["pull", "hf://me/secret/a.safetensors", "--output=back.safetensors"]) == 0
    vectors = "--vectors=[hf://me/secret/a.safetensors, hf://me/secret/b.safetensors]"
    assert main(["merge", vectors, "--base=base.safetensors", "--recipe=ties", "--output=m.safetensors"]) == 0
    assert main(["push", "m.safetensors", "hf://me/secret", "--private=true"]) == 0
    for status in (400, 401, 403, 404, 500, 503):  # a server that says aloud what it was told in secret
        hub.instead["POST", "/commit/"] = (status, {}, f"Authorization: Bearer {TOKEN} is refused")
        assert main(["push", "a.safetensors", f"hf://me/other{status}"]) == 1
    monkeypatch.setenv("HF_TOKEN", "another-Form-of-Token")
    hub.instead["GET", "/api/models/me/x"] = (403, {}, "another-Form-of-Token may not")
    assert main(["pull", "hf://me/x"]) == 1
    assert hub.tokens == {TOKEN, "another-Form-of-Token"}
    said = "".join(capfd.readouterr()) + caplog.text
    assert "may not" in said
    for secret in (TOKEN, "another-Form-of-Token"):
        assert secret not in said
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) > 10
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        uploaded = [
            content for one in hub.repositories.values() for files in one.commits.values() for content in files.values()
        ]
        assert not [content for content in uploaded if secret.encode() in content]
    for command in ("push", "pull", "merge"):
        assert main([command, "--help"]) == 0
        assert "token" not in capfd.readouterr().out.lower()
