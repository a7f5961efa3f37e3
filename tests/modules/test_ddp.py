"""Two processes do what one does: the same task vector, the same accuracies, the same predictions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.fork_server import ONE_THREAD, ForkServer

from lit_merge import TaskVector
from lit_merge.commands.main import main

ROOT = Path(__file__).parents[2]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
PLAIN = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
EVERYTHING = """
import sys
from lit_merge.commands.main import main
codes = [main(arguments) for arguments in {commands!r}]
sys.exit(max(codes))
"""
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def run_on_two(server: ForkServer, commands: list[list[str]]) -> None:
    server.run_on_two(EVERYTHING.format(commands=[[*arguments, *TWO] for arguments in commands]))


@pytest.fixture(scope="module")
def place(tmp_path_factory, clip_config, clip_weights, write_colours) -> Path:
    """A folder with images; ``one`` and ``two`` hold the task vectors of one process and of two."""
    folder = tmp_path_factory.mktemp("ddp")
    write_colours(folder / "colours", count=15)
    model = ["--model.model", clip_config, "--model.pretrained", clip_weights, "--model.learning_rate=1e-3"]
    fit = ["fit", *PLAIN, *model, "--data.task=digits", "--trainer.max_steps=8", "--trainer.limit_val_batches=0"]
    # The command line itself, whose two processes Lightning starts.
    command = [sys.executable, "-m", "lit_merge", *fit, *TWO, "--data.batch_size=16", f"--output={folder / 'two'}"]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert main([*fit, "--trainer.devices=1", "--data.batch_size=32", f"--output={folder / 'one'}"]) == 0
    return folder


def test_the_same_global_batches_give_the_same_task_vector(place) -> None:
    one, two = (TaskVector.load(place / name / "task_vector.safetensors", verify=True) for name in ("one", "two"))
    assert one.metadata["step"] == two.metadata["step"] == "8"
    assert one[next(iter(one))].dtype == torch.float32
    assert one.norm() > 0.1
    assert (one - two).norm() / one.norm() <= 1e-5
    assert [path.name for path in (place / "two").glob("*.safetensors")] == ["task_vector.safetensors"]


LINEAR = ["--model.linearized=true"]
PENALTY = ["--model.penalty.weight=1", "--model.penalty.batch_size={others}"]
REGIMES = {
    "linearised": LINEAR,
    "linearised, cyclic": [*LINEAR, *PENALTY],
    "direct, strict": [*PENALTY, "--model.penalty.schedule=strict"],
    "linearised, attention": [*LINEAR, "--model.trainable=Attention"],
    "low rank": ["--model.lora.rank=2"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, fork_server, clip_config, clip_weights) -> Path:
    """``one`` and ``two`` hold the task vectors of every regime; the same images, of the own task and of others."""
    folder = tmp_path_factory.mktemp("regimes")
    fit = ["fit", *PLAIN, "--model.model", clip_config, "--model.pretrained", clip_weights]
    fit += ["--model.learning_rate=1e-3", "--data.task=digits", "--data.other_tasks=[signs, letters]"]
    fit += ["--trainer.max_steps=4", "--trainer.limit_val_batches=0"]

    def commands(output: str, processes: int) -> list[list[str]]:
        fits = {name: [option.format(others=4 // processes) for option in options] for name, options in REGIMES.items()}
        own = f"--data.batch_size={32 // processes}"
        return [[*fit, own, *options, f"--output={folder / output / name}"] for name, options in fits.items()]

    run_on_two(fork_server, commands("two", 2))
    assert [main([*arguments, "--trainer.devices=1"]) for arguments in commands("one", 1)] == [0] * len(REGIMES)
    return folder


@pytest.mark.parametrize("name", REGIMES)
def test_of_every_regime_two_processes_give_the_same_task_vector(name, trained) -> None:
    one, two = (
        TaskVector.load(trained / side / name / "task_vector.safetensors", verify=True) for side in ("one", "two")
    )
    assert one.metadata["regime"].replace("batch_size=4", "batch_size=2") == two.metadata["regime"]
    assert one.norm() > 0.01
    assert (one - two).norm() / one.norm() <= 1e-5
    others = [vector for vector in REGIMES if vector != name]
    for other in others:  # the regimes differ by far more
        different = TaskVector.load(trained / "one" / other / "task_vector.safetensors")
        assert (one - different).norm() / one.norm() > 1e-2


def test_evaluation_counts_every_image_once_and_predictions_are_in_order(
    place, fork_server, clip_config, clip_weights, few_images_cache, monkeypatch
) -> None:
    monkeypatch.setenv("LIT_MERGE_CACHE", str(few_images_cache))
    tuned = ["--model.model", clip_config, "--model.pretrained", clip_weights]
    images = [*PLAIN, *tuned, f"--data.path={place / 'colours'}", "--data.fractions=[0.4, 0.3, 0.3]"]
    digits = [*PLAIN, *tuned, "--data.task=digits", f"--model.task_vector={place / 'one/task_vector.safetensors'}"]
    several = [*PLAIN, *tuned, "--model=MultiTaskModule", "--data=MultiTaskDataModule", "--data.tasks=[digits, signs]"]

    def commands(output: str) -> list[list[str]]:
        evaluations = {
            "test": ["test", *images, "--data.evaluation_batch_size=4"],
            "validate": ["validate", *digits],
            "digits": ["test", *digits],
            "several": ["test", *several],
            "predict": ["predict", *images, "--data.evaluation_batch_size=1"],
            "batches": ["predict", *images, "--data.evaluation_batch_size=4"],
        }
        return [[*arguments, f"--output={place / output / name}"] for name, arguments in evaluations.items()]

    assert [main([*arguments, "--trainer.devices=1"]) for arguments in commands("alone")] == [0] * 6
    run_on_two(fork_server, commands("together"))
    for name, file in {"test": "test", "validate": "validate", "digits": "test", "several": "test"}.items():
        alone, together = (
            json.loads((place / side / name / f"{file}_metrics.json").read_text()) for side in ("alone", "together")
        )
        assert set(alone) == set(together)
        accuracies = [key for key in alone if key.endswith("accuracy")]
        assert accuracies
        for key in accuracies:
            assert together[key] == pytest.approx(alone[key], abs=1e-7), (name, key)
    files = [(place / side / "predict/predictions.csv").read_bytes() for side in ("alone", "together")]
    assert files[0] == files[1]
    rows = files[0].decode().splitlines()
    assert len(rows) == 1 + 15  # an odd number: one process has a padding image
    batches = [(place / side / "batches/predictions.csv").read_text().splitlines() for side in ("alone", "together")]
    for one, two, row in zip(*batches, rows, strict=True):  # other batches round otherwise, in the sixth digit at most
        assert one.split(",")[:2] == two.split(",")[:2] == row.split(",")[:2]
        if not one.startswith("image,"):
            numbers = [[float(number) for number in line.split(",")[2:]] for line in (one, two, row)]
            assert numbers[0] == pytest.approx(numbers[1], abs=2e-6)
            assert numbers[0] == pytest.approx(numbers[2], abs=2e-6)
