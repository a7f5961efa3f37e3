"""What a run leaves, and what of an earlier one it may touch: permissions, checkpoints, resuming, full disks."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_merge import FineTuneModule, TaskVector
from lit_merge.commands.main import main
from lit_merge.commands.training import run_files
from lit_merge.commands.training.run_files import EpochBar, WholeCheckpoints
from lit_merge.errors import WriteError

QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]
SHORT = ["--data.task=digits", "--data.batch_size=8", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def fit(clip_config: str, clip_weights: str) -> Callable[..., int]:
    """``fit(output, *options)``: a run of two steps; returns the exit code."""

    def call(output: str, *options: str) -> int:
        tiny = ["--model.model", clip_config, "--model.pretrained", clip_weights]
        return main(["fit", *QUIET, *tiny, *SHORT, "--output", output, *options])

    return call


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line.partition("error: ")[2]


# Permissions


def test_a_permission_is_not_saved_with_a_run(fit, capsys) -> None:
    assert fit("R", "--overwrite=true") == 0
    assert fit("other") == 0
    before = {path: path.read_bytes() for path in Path("other").rglob("*.*") if path.is_file()}
    assert not {"overwrite", "ckpt_path"} & set(yaml.safe_load(Path("R/fit.yaml").read_text()))
    assert main(["fit", "--config", "R/fit.yaml", "--output", "other"]) == 2
    assert "got other, which holds a run already" in error(capsys)
    assert {path: path.read_bytes() for path in Path("other").rglob("*.*") if path.is_file()} == before
    assert main(["fit", "--config", "R/fit.yaml", "--output", "new"]) == 0


@pytest.mark.parametrize("command", ["fit", "test", "merge", "soup", "suite", "import"])
@pytest.mark.parametrize("text", ["overwrite: true\n", '{"overwrite": true}\n', "seeds: [0]\noverwrite:  yes # once\n"])
def test_a_permission_in_a_file_is_refused(command, text, capsys) -> None:
    Path("saved.yaml").write_text(text)
    assert main([command, "--config", "saved.yaml"]) == 2
    assert error(capsys).startswith("overwrite: expected on the command line only, got saved.yaml with overwrite: true")


def test_a_file_of_an_earlier_version_without_permissions_is_taken(fit) -> None:
    assert fit("R") == 0
    Path("old.yaml").write_text(Path("R/fit.yaml").read_text() + "overwrite: false\nckpt_path: null\n")
    assert main(["fit", "--config", "old.yaml", "--output", "new"]) == 0


def test_a_merge_saves_no_permission(fit, clip_config, clip_weights) -> None:
    assert fit("R") == 0
    base = ["--model", clip_config, "--pretrained", clip_weights, "--recipe=weight_average"]
    allowed = ["--overwrite=true", "--progress=false"]
    assert main(["merge", "--vectors=[R/task_vector.safetensors]", *base, "--output=m.safetensors", *allowed]) == 0
    assert not {"overwrite", "progress", "dry_run"} & set(yaml.safe_load(Path("m-merge.yaml").read_text()))


# Going on


def test_an_unfinished_run_names_both_ways_on(fit, capsys) -> None:
    Path("R/checkpoints").mkdir(parents=True)
    Path("R/metrics.csv").write_text("step\n")
    assert fit("R") == 2
    line = error(capsys)
    assert "--overwrite true" in line
    assert "--ckpt_path" not in line  # there is none
    Path("R/checkpoints/epoch=3-step=9.ckpt").write_bytes(b"")
    assert fit("R") == 2
    line = error(capsys)
    assert "go on from it with --ckpt_path R/checkpoints/epoch=3-step=9.ckpt" in line
    assert "--overwrite true" in line


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_ended_says_how_to_go_on(fit, capsys, monkeypatch, how, code) -> None:
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    original, steps = FineTuneModule.training_step, iter(range(10))

    def asked(self: FineTuneModule, *arguments: Any) -> Any:
        if next(steps) == 1:
            os.kill(os.getpid(), how)
        return original(self, *arguments)

    every = "--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1}}"
    try:
        with monkeypatch.context() as patch:
            patch.setattr(FineTuneModule, "training_step", asked)
            assert fit("R", every) == code
    finally:
        for one, handler in handlers.items():  # Lightning ignores SIGINT after an interruption
            signal.signal(one, handler)
    said = capsys.readouterr().err.splitlines()[-1]
    (newest,) = Path("R/checkpoints").glob("*.ckpt")
    assert said.endswith(f"; to go on, add --ckpt_path {newest}")
    assert fit("R", every, "--ckpt_path", str(newest)) == 0
    assert TaskVector.load("R/task_vector.safetensors").task == "digits"


def test_a_checkpoint_of_slurm_that_is_damaged_is_named(fit, capsys) -> None:
    Path("R").mkdir()
    Path("R/hpc_ckpt_9.ckpt").write_bytes(b"nothing")
    Path("R/hpc_ckpt_10.ckpt").write_bytes(b"nothing")
    assert fit("R") == 1
    line = error(capsys)
    assert line.startswith("R/hpc_ckpt_10.ckpt: expected a checkpoint of such a run, got")
    assert line.endswith("Remove it to start anew.")


@pytest.mark.parametrize("directory", ["logs", "."])
def test_checkpoints_are_in_the_output_whatever_the_logger(fit, directory) -> None:
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={directory}"]
    assert fit("R", *logger, "--trainer.log_every_n_steps=1") == 0
    assert [path.name for path in Path("R/checkpoints").iterdir()] == ["epoch=0-step=2.ckpt"]
    assert {path.name for path in Path().iterdir()} == {"R", *([directory] if directory == "logs" else [])}
    saved = yaml.safe_load(Path("R/fit.yaml").read_text())["trainer"]["logger"]
    assert saved["init_args"]["save_dir"] == directory  # what was given, not this run's folder


# Full disks


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "folder" / "one.ckpt"
    WholeCheckpoints().save_checkpoint({"weights": torch.ones(1000)}, target)
    before = target.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as on a disk that is full after that
    try:
        with pytest.raises(WriteError, match=r"one\.ckpt: expected room"):
            WholeCheckpoints().save_checkpoint({"weights": torch.ones(100_000)}, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["one.ckpt"]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_finished_run_whose_checkpoint_cannot_be_written_has_its_vector(fit, monkeypatch, capsys) -> None:
    assert fit("whole") == 0
    monkeypatch.setattr(torch, "save", full)
    assert fit("R") == 1
    assert "R/checkpoints/epoch=0-step=2.ckpt: expected room to write, got No space left" in error(capsys)
    assert [path.name for path in Path("R").rglob("*.ckpt")] == []
    vector, whole = TaskVector.load("R/task_vector.safetensors"), TaskVector.load("whole/task_vector.safetensors")
    assert all(torch.equal(vector[name], whole[name]) for name in whole)
    assert vector.metadata["step"] == "2"


def test_a_vector_that_cannot_be_written_either_is_named(fit, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(TaskVector, "save", full)
    assert fit("R") == 1
    line = error(capsys)
    assert "epoch=0-step=2.ckpt: expected room to write" in line
    assert "; " in line
    assert line.count("No space left on device") == 2


def test_a_run_that_breaks_off_has_no_vector(fit, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "save", full)
    every = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    assert fit("R", *every) == 1
    assert "step=1.ckpt: expected room to write" in error(capsys)
    assert not list(Path().rglob("*.safetensors"))


def test_room_is_looked_for_before_training(fit, monkeypatch, capsys) -> None:
    assert fit("R") == 0
    before = {path: path.read_bytes() for path in Path("R").rglob("*") if path.is_file()}
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(run_files.shutil, "disk_usage", lambda _: usage(1000))
    monkeypatch.setattr(FineTuneModule, "training_step", lambda *_: pytest.fail("trained"))
    assert fit("new") == 1
    assert error(capsys).startswith("new: expected room for about ")
    assert not Path("new").exists()
    monkeypatch.setattr(run_files.shutil, "disk_usage", lambda _: usage(-(10**9)))
    assert fit("R", "--overwrite=true") == 1
    assert {path: path.read_bytes() for path in Path("R").rglob("*") if path.is_file()} == before


# The bar


def test_the_bar_counts_steps_where_epochs_are_not_limited() -> None:
    bar, trainer = EpochBar(), namedtuple("trainer", ["max_epochs", "max_steps"])
    for limits, shown in (((-1, 300), "Epoch 9, to step 300"), ((-1, -1), "Epoch 9   "), ((10, -1), "Epoch 9/9 ")):
        bar._trainer = trainer(*limits)
        assert bar._get_train_description(9).strip() == shown.strip()


def test_a_run_shows_its_own_bar(fit, capsys) -> None:
    shown = [option for option in QUIET if "progress" not in option]
    assert fit("R", *shown, "--trainer.enable_progress_bar=true") == 0
    said = capsys.readouterr()
    assert "-2" not in said.out + said.err
    assert "to step 2" in said.out + said.err
    shutil.rmtree("R")
