"""How a command starts: what is imported for it, and the first screen of its help."""

from __future__ import annotations

import gc
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_merge.commands.main import main, process
from lit_merge.commands.table import commands, groups
from lit_merge.files.store import write_tensors

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"lightning", "torchmetrics", "torchvision", "open_clip"}
PROGRAM = """
import sys
from lit_merge.commands.main import main
code = main(sys.argv[1:])
sys.stderr.write("IMPORTED " + " ".join(sorted(sys.modules)))
sys.exit(code)
"""


def imported(*arguments: str) -> set[str]:
    """The modules that a successful command imports, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stderr.partition("IMPORTED ")[2].split())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``base.safetensors``, and ``tuned.safetensors`` that started from it."""
    monkeypatch.chdir(tmp_path)
    base = {f"blocks.{index}.weight": torch.randn(4, 4) for index in range(2)}
    write_tensors(tmp_path / "base.safetensors", base, {"format": "pt"})
    write_tensors(tmp_path / "tuned.safetensors", {name: value + 1 for name, value in base.items()}, {"format": "pt"})


@pytest.mark.parametrize(("line", "collects"), [("data list", True), ("--version", False)])
def test_garbage_is_collected_when_a_command_is_imported(line, collects, monkeypatch, capsys) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(sys, "argv", ["lit-merge", *line.split()])
    try:
        assert process() == 0
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    # When all is imported, which is before anything is collected, and at the end.
    assert frozen == ([False, True] if collects else [False])


@pytest.mark.parametrize("line", ["--help", "--version", "fit --help", "merge --help", "data --help", "data list"])
def test_what_needs_no_tensor_imports_no_torch(line) -> None:
    assert not {"torch", "numpy", *FRAMEWORKS} & imported(*line.split())


@pytest.mark.parametrize(
    "line",
    [
        "inspect tuned.safetensors",
        "merge --vectors [tuned.safetensors] --base base.safetensors --recipe weight_average --output m.safetensors",
        "import --finetuned tuned.safetensors --pretrained base.safetensors --output vector.safetensors",
        "push tuned.safetensors hf://owner/name --dry_run true",
    ],
)
def test_what_neither_trains_nor_evaluates_imports_torch_at_most(line, files) -> None:
    found = imported(*line.split())
    assert "torch" in found
    assert not FRAMEWORKS & found


def test_every_help_is_a_first_screen_without_an_import(capsys, monkeypatch) -> None:
    monkeypatch.setattr("lit_merge.commands.running.Command.load", lambda self: pytest.fail(f"imported {self.name}"))
    for name, command in commands().items():
        assert main([*name.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: lit-merge {name} ")
        assert command.summary in text
        assert len(re.findall(rf"^  lit-merge {name}", text, re.MULTILINE)) == 3  # examples
        assert "--help_all" in text
        assert len(text.splitlines()) <= 75
        assert max(map(len, text.splitlines())) <= 120


def test_the_table_is_the_folder(capsys) -> None:
    assert set(groups()) == {"data"}
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in commands().items():
        assert callable(getattr(command.load(), command.file.stem))
        assert command.takes_command_line == (name in ("fit", "validate", "test", "predict"))
        assert f"lit-merge {name.partition(' ')[0]} " in text


def test_examples_of_the_help_have_all_that_is_required() -> None:
    lacking = []
    for name, command in commands().items():
        assert command.definition is not None
        arguments = command.definition.args
        required = [one.arg for one in arguments.args[: len(arguments.args) - len(arguments.defaults)]]
        for line in re.findall(r"^  lit-merge (.+)$", command.docstring, re.MULTILINE):
            words = shlex.split(line)[len(name.split()) :]
            files = [words[at + 1] for at, word in enumerate(words) if word == "--config"]
            given = {word.removeprefix("--").partition(".")[0] for word in words if word.startswith("--")}
            given |= {key for file in files for key in yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))}
            lacking += [f"{line}: {one}" for one in required if one not in (*given, *command.positional)]
    assert lacking == []


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict"])
def test_settings_of_the_first_screen_exist(name, capsys) -> None:
    assert main([name, "--help_all"]) == 0
    full = capsys.readouterr().out
    for option in re.findall(r"^  --([\w.]+)", commands()[name].docstring, re.MULTILINE):
        owner, _, setting = option.partition(".")
        if owner not in ("model", "data") or not setting:
            assert re.search(rf"--{re.escape(option)}\b", full), option
    tried = ["--data.batch_size=4", "--model.model=lit-tiny", "--model.pretrained=random", "--data.task=digits"]
    tried += ["--data.path=null", *(["--data.predict_path=x"] if name == "predict" else [])]
    tried += ["--model.linearized=true", "--model.learning_rate=1"] if name == "fit" else []
    tried += ["--model.lora.rank=4"] if name == "fit" else ["--model.task_vector=t", "--model.weights=null"]
    assert main([name, *tried, "--print_config"]) == 0


def test_examples_are_accepted(monkeypatch, capsys) -> None:
    """Every option of the examples is one of the command's; what they name need not be there."""
    monkeypatch.chdir(ROOT)
    for name, command in commands().items():
        if command.takes_command_line:
            continue
        for line in re.findall(rf"^  lit-merge {name} ?(.*)", command.docstring, re.MULTILINE):
            assert main([*name.split(), *shlex.split(line), "--print_config"]) == 0, (line, capsys.readouterr().err)
