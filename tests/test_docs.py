"""The commands and programs of the documentation run as written; configurations and embedded tasks are smaller."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from builders.documents import ROOT, arguments_of, blocks, commands, draw_images, shrink, write_texts
from builders.downloads import make_downloads
from huggingface_hub import constants

from lit_merge.commands.main import main

DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
# What a page's commands find in the working directory: what the pages before it made.
FINE_TUNED = ("digits", "signs")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as after cloning, in which two tasks were fine-tuned."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shrink(folder / "configs")
    draw_images(folder / "my_images")
    draw_images(folder / "new_images", ("unknown",), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for task in FINE_TUNED:
            arguments = ["--config", "configs/finetune/full.yaml", "--data.task", task, "--output", f"runs/{task}"]
            assert main(["fit", *arguments]) == 0
    return folder


@pytest.fixture
def fresh(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_images: None) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(begun, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if (folder / f"{name}.py").exists():
            sys.modules.pop(name)


@pytest.fixture
def snapshot(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's cache with the repository that the pages speak of, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fresh / "hub"))
    folder = fresh / "hub/models--me--vectors"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(fresh / "runs/digits/task_vector.safetensors", folder / "snapshots" / commit / "mnist.safetensors")


@pytest.fixture
def downloads(request: pytest.FixtureRequest, fresh: Path) -> None:
    """What the page on downloaded models speaks of."""
    if request.node.callspec.params["page"] == "downloaded.md":
        make_downloads(fresh / "downloads")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_what_it_says(
    page: str, fresh: Path, snapshot: None, downloads: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page: programs run (those with a file name are also written to it), then commands do."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if "reviews.csv" in text:
        write_texts(fresh)
    for language, title, content in blocks(text):
        if language == "python":
            if title:
                (fresh / title).write_text(content, encoding="utf-8")
                importlib.import_module(Path(title).stem)
                continue
            if "runs/" in content:
                continue  # these read what the commands write
            exec(compile(content, page, "exec"), {"__name__": page})
        elif language == "yaml":
            assert yaml.safe_load(content) is not None
            if title:
                (fresh / title).write_text(content, encoding="utf-8")
        elif language == "json":
            json.loads(content)
        else:
            assert language in ("bash", "slurm", "text"), f"{page}: a block of {language}, which no test runs"
    written = {
        words[at + 1]
        for command in commands(text)
        for words in [command.split()]
        for at, word in enumerate(words)
        if word == "--output" and at + 1 < len(words)
    }
    for task in FINE_TUNED:
        if f"runs/{task}" in written:
            shutil.rmtree(fresh / "runs" / task)
    for command in commands(text):
        arguments = arguments_of(command)
        if arguments is not None:
            assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
    for language, _, content in blocks(text):
        if language == "python" and "runs/" in content:
            exec(compile(content, page, "exec"), {"__name__": page})


def test_new_ideas_take_few_lines() -> None:
    found = blocks((DOCS / "extending.md").read_text())
    programs = {title: len(content.strip().splitlines()) for language, title, content in found if language == "python"}
    assert len(programs) >= 7
    assert programs.pop("words.py") <= 60  # a network and a task
    assert programs.pop("dora.py") <= 45  # a parametrisation of torch's kind and what applies it
    assert max(programs.values()) < 30


def test_every_file_that_a_page_names_exists() -> None:
    missing = []
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        names = re.findall(r"`((?:lit_merge|benchmarks|docs|configs|tests)/[\w./-]+\.\w+)`", text)
        missing += [f"{page}: {name}" for name in names if not (ROOT / name).exists()]
    assert not missing


def test_every_test_that_a_page_names_exists() -> None:
    text = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) >= 40
    found = {path: (ROOT / "tests" / path).read_text(encoding="utf-8") for path, _ in named}
    assert [f"{path}::{name}" for path, name in named if f"def {name}(" not in found[path]] == []


def test_the_picture_of_the_rooms_is_of_this_package() -> None:
    specification = importlib.util.spec_from_file_location("rooms", DOCS / "rooms.py")
    assert specification is not None
    assert specification.loader is not None
    rooms = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(rooms)
    drawn = rooms.picture(rooms.room_imports(rooms.module_imports()))
    assert (DOCS / "rooms.svg").read_text(encoding="utf-8") == drawn, "run python docs/rooms.py"
    room = next(iter(rooms.ROOMS))
    assert rooms.picture({**rooms.room_imports(rooms.module_imports()), room: {"commands": []}}) != drawn


def test_every_room_is_on_the_page_of_the_architecture() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = [path.name for path in (ROOT / "lit_merge").iterdir() if (path / "__init__.py").exists()]
    assert rooms
    assert [room for room in rooms if f"| `{room}` |" not in text] == []
    named = re.findall(r"`((?:%s)/[\w/]+(?:\.py|/)?)`" % "|".join(rooms), text)  # noqa: UP031
    there = [ROOT / "lit_merge" / name for name in named]
    assert [str(path) for path in there if not path.exists() and not path.with_suffix(".py").exists()] == []


def test_navigation_has_every_page() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(listed) == there
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", sorted(path.stem for path in (DOCS / "api").glob("*.md")))
def test_the_reference_has_every_class_and_function(page: str) -> None:
    package = importlib.import_module(f"lit_merge.{page}")
    text = (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8")
    listed = re.findall(rf"^::: lit_merge\.{page}\.(\w+)$", text, re.MULTILINE)
    public = {name: getattr(package, name) for name in package.__all__}
    assert {name for name, one in public.items() if inspect.isclass(one) or inspect.isfunction(one)} - set(
        listed
    ) == set()
    assert set(listed) <= set(public)
    assert len(listed) == len(set(listed))
