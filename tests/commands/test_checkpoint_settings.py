"""A checkpoint's settings never win over given ones without a word."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_merge.commands.main import main

QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]
SHORT = ["--data.task=digits", "--data.batch_size=8", "--trainer.limit_val_batches=0"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def resume(clip_config: str, clip_weights: str) -> Callable[..., int]:
    """``resume(*options)``: go on from a checkpoint with the learning rate 1e-3, into a new folder."""
    first = [*SHORT, "--trainer.max_steps=1", "--model.learning_rate=1e-3", "--model.label_smoothing=0.1"]
    tiny = ["--model.model", clip_config, "--model.pretrained", clip_weights]
    assert main(["fit", *QUIET, *first, *tiny, "--output=one"]) == 0
    (checkpoint,) = Path("one/checkpoints").iterdir()

    def call(*options: str) -> int:
        longer = [*SHORT, "--trainer.max_steps=2", f"--ckpt_path={checkpoint}", "--output=two"]
        return main(["fit", *QUIET, *longer, *options])

    return call


def test_what_is_overridden_is_named(resume, caplog) -> None:
    assert resume("--model.learning_rate=1e-4", "--model.init_args.label_smoothing=0.0") == 0
    (line,) = [line for line in caplog.messages if "its settings are used" in line]
    assert "learning_rate=0.001 (given: 0.0001)" in line
    assert "label_smoothing=0.1 (given: 0.0)" in line  # a default that was given counts as given
    assert yaml.safe_load(Path("two/fit.yaml").read_text())["model"]["init_args"]["learning_rate"] == 1e-3


def test_what_a_file_gives_is_named_as_well(resume, caplog) -> None:
    config = yaml.safe_load(Path("one/fit.yaml").read_text())
    config["model"]["init_args"]["learning_rate"] = 0.5
    Path("changed.yaml").write_text(yaml.safe_dump({"model": config["model"]}))
    assert resume("--config=changed.yaml") == 0
    (line,) = [line for line in caplog.messages if "its settings are used" in line]
    assert "learning_rate=0.001 (given: 0.5)" in line
    assert "label_smoothing" not in line


@pytest.mark.parametrize("options", [[], ["--model.learning_rate=1e-3"], ["--config=one/fit.yaml"]])
def test_nothing_is_said_where_nothing_is_overridden(resume, options, caplog) -> None:
    assert resume(*options) == 0
    assert not [line for line in caplog.messages if "its settings are used" in line]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.model=ViT-B-32"], "model.model: expected '"),
        (["--model.linearized=true"], "model.linearized: expected False"),
        (["--model.lora.rank=2"], "model.lora: expected None"),
        (["--model.trainable=Attention"], "model.trainable: expected None"),
        (["--model=own.Mine"], "model: expected 'lit_merge.FineTuneModule'"),
        (["--model=MultiTaskModule"], "model: expected 'lit_merge.FineTuneModule'"),
    ],
)
def test_a_contradiction_is_refused(resume, options, expected, capsys) -> None:
    Path("own.py").write_text("from lit_merge import FineTuneModule\nclass Mine(FineTuneModule):\n    pass\n")
    capsys.readouterr()
    assert resume(*options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.partition("error: ")[2].startswith(expected)
    assert not Path("two").exists()


def test_the_weights_may_have_moved(resume, clip_weights) -> None:
    moved = Path("moved.safetensors")
    moved.write_bytes(Path(clip_weights).read_bytes())
    assert resume("--model.pretrained=moved.safetensors") == 0
    assert yaml.safe_load(Path("two/fit.yaml").read_text())["model"]["init_args"]["pretrained"] == str(moved)
