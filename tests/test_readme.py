"""The README's commands and programs run as written; only the configurations and the embedded tasks are smaller."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from builders.documents import ROOT, arguments_of, blocks, commands, draw_images, shrink

from lit_merge.commands.main import main
from lit_merge.report import Results, markdown_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def programs() -> list[str]:
    return [content for language, _, content in blocks(README) if language == "python"]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_images: None) -> Path:
    """A working directory as after cloning, with a folder of images and the README's subclass."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shrink(tmp_path / "configs")
    draw_images(tmp_path / "my_images")
    draw_images(tmp_path / "new_images", ("unknown",), 1)
    (tmp_path / "focal_loss.py").write_text(next(text for text in programs() if "FocalLoss" in text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("focal_loss", None)


def test_every_command_and_program_runs_as_written(fresh: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran = []
    for command in commands(README):
        arguments = arguments_of(command)
        if arguments is None:
            continue  # making the environment and calling pytest is what runs this test
        if "focal_loss.FocalLoss" in arguments:
            arguments[arguments.index("--trainer.max_steps") + 1] = "2"
        assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
        ran.append(arguments[0])
    assert {"fit", "merge", "test", "predict", "suite"} <= set(ran)
    assert (fresh / "runs/quickstart/results.png").stat().st_size > 10_000
    lines = (fresh / "runs/mine/predictions.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "image,class,probability,green pear,red apple"
    assert len(lines) == 2
    assert lines[1].split(",")[1] in ("green pear", "red apple")
    for program in programs():
        if "FocalLoss" not in program:
            exec(compile(program, "README.md", "exec"), {})


def test_every_file_that_the_readme_names_exists() -> None:
    names = set(re.findall(r"\]\(([\w./-]+)\)", README)) | set(re.findall(r"configs/[\w/]+\.yaml", README))
    names |= set(re.findall(r"`((?:lit_merge|benchmarks|docs)/[\w./-]+)`", README))
    missing = sorted(name for name in names if not (ROOT / name).exists())
    assert not missing


def test_the_table_is_the_committed_json() -> None:
    stored = json.loads((ROOT / "benchmarks/results/embedded_suite.json").read_text(encoding="utf-8"))
    assert markdown_table(Results.from_dict(stored)).strip() in README
    assert len(stored["seeds"]) >= 3
