"""The commands as a user meets them: help, configuration, runs, and what they leave on the disk."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lit_merge import TaskVector
from lit_merge.commands.main import main, run

ROOT = Path(__file__).parents[2]
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]
REQUIRED = {"merge": ["--vectors", "[a, b]", "--output", "c.safetensors"], "suite": ["--output", "d"]}
REQUIRED["data sheet"] = ["--output", "e.png"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def tiny(clip_config: str, clip_weights: str) -> list[str]:
    """The options that choose the tiny CLIP."""
    return ["--model.model", clip_config, "--model.pretrained", clip_weights]


@pytest.fixture
def fit(tiny: list[str]) -> Callable[..., Path]:
    """``fit(output, *options)``: a short fine-tuning run on digits; returns its directory."""

    def call(output: str, *options: str) -> Path:
        short = ["--data.task=digits", "--data.batch_size=8", "--trainer.max_steps=4", "--trainer.limit_val_batches=0"]
        assert main(["fit", *QUIET, *tiny, *short, "--model.learning_rate=1e-3", "--output", output, *options]) == 0
        return Path(output)

    return call


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


# Help and configuration


def test_plain_help_is_immediate_and_names_every_command() -> None:
    program = (
        "import sys\nfrom lit_merge.commands.main import main\ncode = main(['--help'])\n"
        "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    for command in ("fit", "validate", "test", "predict", "merge", "suite", "data"):
        assert f"lit-merge {command}" in done.stdout


NETWORK = ["fit", "--model.network=lit_merge.models.language.TextEncoderNetwork", "--model.network.path=p"]
SOURCE = ["fit", "--data.source=lit_merge.data.TextTask", "--data.source.path=p"]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "merge", "suite", "data sheet"])
def test_every_command_has_all_help_and_prints_its_configuration(command, capsys) -> None:
    started = time.process_time()
    assert main([*command.split(), "--help_all"]) == 0
    text = capsys.readouterr().out
    assert f"lit-merge {'' if command in REQUIRED else '[options] '}{command}" in text
    assert "--print_config" in text
    assert main([*command.split(), *REQUIRED.get(command, []), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert "output" in printed
    if command not in REQUIRED:
        assert printed["model"]["class_path"].endswith(".FineTuneModule")
        assert printed["data"]["class_path"].endswith(".TaskDataModule")
    assert time.process_time() - started < 10  # two parsers; each takes a fraction of a second
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "place", "value"),
    [
        (["fit", "--trainer.max_steps", "7"], "trainer.max_steps", 7),
        (["fit", "--model.learning_rate=0.5"], "model.init_args.learning_rate", 0.5),
        (["fit", "--data.path", "my images"], "data.init_args.path", "my images"),
        (["validate", "--data.task", "signs"], "data.init_args.task", "signs"),
        (["test", "--model", "MultiTaskModule", "--model.weights", "w"], "model.init_args.weights", "w"),
        (["test", "--data", "MultiTaskDataModule", "--data.tasks", "[land]"], "data.init_args.tasks", ["land"]),
        (["predict", "--data.predict_path", "p"], "data.init_args.predict_path", "p"),
        (["fit", "--trainer.callbacks+=ExtractTaskVector", "--trainer.callbacks.dtype=bfloat16"], "output", None),
        (["merge", "--recipe", "negation", "--settings.coefficient", "2"], "settings.coefficient", 2),
        (["merge", "--transform", "Scale", "--transform.coefficient", "2"], "transform.init_args.coefficient", 2.0),
        (["merge", "--search.values", "[0.1]"], "search.values", [0.1]),
        (["suite", "--fit", "{trainer: {max_steps: 3}}"], "fit.trainer.max_steps", 3),
        (["suite", "--paths.mine", "p", "--seeds+=4"], "seeds", [0, 4]),
        (["suite", "--recipes", "{one: {recipe: negation}}"], "recipes.one.recipe", "negation"),
        (["data sheet", "--rows", "3"], "rows", 3),
        ([*NETWORK, "--model.network.max_length", "null"], "model.init_args.network.init_args.max_length", None),
        ([*SOURCE, "--data.source.label_column=null"], "data.init_args.source.init_args.label_column", None),
        ([*SOURCE, "--data.source.prompt=null"], "data.init_args.source.init_args.prompt", None),
    ],
    ids=str,
)
def test_overrides_from_the_shell(arguments, place, value, capsys) -> None:
    command, *rest = arguments
    assert main([*command.split(), *REQUIRED.get(command, []), *rest, "--print_config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    for part in place.split("."):
        found = found[part]
    assert found == value


def test_the_shell_wins_over_the_file_and_later_files_over_earlier_ones(capsys) -> None:
    Path("one.yaml").write_text("trainer: {max_steps: 1, max_epochs: 5}\nmodel: {init_args: {learning_rate: 0.5}}\n")
    Path("two.yaml").write_text("trainer: {max_steps: 2}\n")
    assert main(["fit", "-c", "one.yaml", "-c", "two.yaml", "--model.learning_rate", "0.25", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["trainer"]["max_steps"], config["trainer"]["max_epochs"]) == (2, 5)
    assert config["model"]["init_args"]["learning_rate"] == 0.25


@pytest.mark.parametrize(
    "way", ["--model=ContrastiveModule", "--model ContrastiveModule", "-c model.yaml", "--config=model.yaml"]
)
def test_another_class_has_its_own_defaults(way, capsys) -> None:
    """Those of the class that is the default are not taken over where the names are the same."""
    content = {"model": {"class_path": "ContrastiveModule"}, "data": {"class_path": "MergeDataModule"}}
    Path("model.yaml").write_text(yaml.safe_dump(content))
    data = [] if "yaml" in way else ["--data.class_path=MergeDataModule"]
    assert main(["fit", *way.split(), *data, "--data.adapt_on=val", "--print_config"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["model"]["init_args"]["learning_rate"] == 1e-3
    assert resolved["data"]["init_args"]["labelled"] is False
    assert main(["fit", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["learning_rate"] == 1e-5


def test_version_and_overview(capsys) -> None:
    assert main([]) == main(["--version"]) == main(["help"]) == 0
    assert capsys.readouterr().out.count("lit-merge suite --config") == 2


# A folder of own images, from training to predictions


def test_own_images_from_fit_to_predict(tiny, colour_folder, capsys) -> None:
    images = str(colour_folder())
    config = str(ROOT / "configs/finetune/own_images.yaml")
    small = ["--trainer.max_steps=40", "--model.learning_rate=2e-3", "--data.batch_size=8"]
    assert main(["fit", "--config", config, "--data.path", images, "--output", "R", *tiny, *small, *QUIET]) == 0
    saved = yaml.safe_load(Path("R/fit.yaml").read_text(encoding="utf-8"))
    assert saved["data"]["init_args"]["path"] == images
    assert saved["trainer"]["max_steps"] == 40
    assert saved["model"]["init_args"]["weight_decay"] == 0.1  # a default, resolved
    vector = TaskVector.load("R/task_vector.safetensors", verify=True)
    assert vector.task == "colours"
    assert json.loads(vector.metadata["classes"]) == ["blue", "dark red", "green"]
    tuned = [*tiny, "--model.task_vector", "R/task_vector.safetensors", *QUIET]

    assert main(["test", "--data.path", images, "--output", "R", *tuned]) == 0
    assert main(["validate", "--data.path", images, "--output", "R", *tuned]) == 0
    assert main(["test", "--data.path", images, "--output", "zero", *tiny, *QUIET]) == 0
    accuracy = json.loads(Path("R/test_metrics.json").read_text())["test/accuracy"]
    assert accuracy == 1.0
    assert json.loads(Path("zero/test_metrics.json").read_text())["test/accuracy"] < 1.0
    assert json.loads(Path("R/validate_metrics.json").read_text())["val/accuracy"] == 1.0
    assert yaml.safe_load(Path("R/test.yaml").read_text())["model"]["init_args"]["task_vector"] == tuned[5]

    new = Path("new")
    for number, colour in enumerate(("green", "blue", "dark_red")):
        new.mkdir(exist_ok=True)
        shutil.copy(f"{images}/{colour}/0.png", new / f"{number}.png")
    assert main(["predict", "--data.path", images, "--data.predict_path", "new", "--output", "R", *tuned]) == 0
    rows = table(Path("R/predictions.csv"))
    assert [row["image"] for row in rows] == [str(new / f"{number}.png") for number in range(3)]
    assert [row["class"] for row in rows] == ["green", "blue", "dark red"]
    for row in rows:
        assert float(row["probability"]) == float(row[row["class"]])
        assert sum(float(row[name]) for name in ("blue", "dark red", "green")) == pytest.approx(1, abs=2e-6)

    capsys.readouterr()
    (checkpoint,) = Path("R/checkpoints").glob("*.ckpt")
    predict = ["predict", "--data.path", images, "--data.predict_path", "new/1.png", "--output", "one", *QUIET]
    assert main([*predict, "--ckpt_path", str(checkpoint)]) == 0  # the model's settings come with the checkpoint
    (row,) = table(Path("one/predictions.csv"))
    assert row["class"] == "blue"
    assert float(row["probability"]) == pytest.approx(float(rows[1]["probability"]), abs=1e-5)
    assert not Path("one/checkpoints").exists()
    assert "callbacks used to create" not in capsys.readouterr().err


def test_merging_and_testing_the_merged_weights(fit, tiny, clip_config, clip_weights, capsys) -> None:
    paths = [str(fit(task, f"--data.task={task}") / "task_vector.safetensors") for task in ("digits", "signs")]
    base = ["--model", clip_config, "--pretrained", clip_weights]
    merge = ["merge", "--vectors", str(paths), *base]
    capsys.readouterr()
    assert main([*merge, "--recipe=task_arithmetic", "--settings.coefficient=0.5", "--output=out/m.safetensors"]) == 0
    assert capsys.readouterr().out == "chain(Sum(), Scale(coefficient=0.5)) -> out/m.safetensors\n"
    saved = yaml.safe_load(Path("out/m-merge.yaml").read_text(encoding="utf-8"))
    assert (saved["settings"], saved["vectors"]) == ({"coefficient": 0.5}, paths)
    assert main(["merge", "--config", "out/m-merge.yaml", "--output", "again.safetensors"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("out/m.safetensors").read_bytes()

    mine = Path("mine.yaml")  # a configuration named as the output is the user's, and stays
    mine.write_text(f"vectors: {paths}\nrecipe: weight_average\n", encoding="utf-8")
    before = mine.read_bytes()
    assert main(["merge", "--config", "mine.yaml", *base, "--output", "mine.safetensors"]) == 0
    assert mine.read_bytes() == before
    Path("mine.safetensors").unlink()
    assert main(["merge", "--config", "mine.yaml", *base, "--output", "mine.safetensors"]) == 2
    assert "mine-merge.yaml, which exists" in capsys.readouterr().err
    assert not Path("mine.safetensors").exists()

    several = ["--model", "MultiTaskModule", "--data", "MultiTaskDataModule", "--data.tasks", "[digits, signs]"]
    assert main(["test", *several, *tiny, "--model.weights=out/m.safetensors", "--output=T", *QUIET]) == 0
    metrics = json.loads(Path("T/test_metrics.json").read_text())
    assert {"test/digits/accuracy", "test/signs/accuracy", "test/accuracy"} <= set(metrics)
    mean = (metrics["test/digits/accuracy"] + metrics["test/signs/accuracy"]) / 2
    assert metrics["test/accuracy"] == pytest.approx(mean, abs=1e-6)

    search = ["--recipe=task_arithmetic", "--search.values=[0.0, 1.0]", "--output=s.safetensors", "--kind=task_vector"]
    limited = ["--data=MultiTaskDataModule", "--data.tasks=[digits, signs]"]
    assert main([*merge, *search, *limited]) == 0
    curve = json.loads(Path("s-search.json").read_text())
    assert curve["values"] == [0.0, 1.0]
    assert f"coefficient {curve['best']:g} chosen on validation data" in capsys.readouterr().out


def test_a_contact_sheet(capsys) -> None:
    chosen = ["--tasks", "[digits, land]", "--rows", "1", "--columns", "3"]
    assert main(["data", "sheet", "--output", "sheet.png", *chosen]) == 0
    assert capsys.readouterr().out == "sheet.png\n"
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")


# Run directories


def test_an_existing_run_is_not_overwritten_unasked(fit, tiny, capsys) -> None:
    directory = fit("R", "--trainer.log_every_n_steps=1")
    assert (directory / "metrics.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    again = ["fit", *QUIET, *tiny, "--data.task=digits", "--trainer.max_steps=1", "--output=R"]
    capsys.readouterr()
    assert main(again) == 2
    line = capsys.readouterr().err
    assert "got R, which holds a run already" in line
    assert "go on from it with --ckpt_path R/checkpoints/epoch=0-step=4.ckpt" in line
    assert "--overwrite true" in line
    assert main([*again, "--overwrite=true", "--data.task=null", "--data.path=missing"]) == 1  # it never begins
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    assert main([*again, "--overwrite=true", "--trainer.limit_val_batches=0"]) == 0
    assert yaml.safe_load((directory / "fit.yaml").read_text())["trainer"]["max_steps"] == 1
    assert [path.name for path in directory.glob("checkpoints/*")] == ["epoch=0-step=1.ckpt"]
    assert TaskVector.load(directory / "task_vector.safetensors").metadata["step"] == "1"


class EndedAtTheEnd(Callback):
    """Asks its process to end when there is no next batch, to which Lightning would put it off."""

    def on_train_end(self, trainer, pl_module) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_to_end_is_not_lost_after_the_last_batch(fit) -> None:
    with pytest.raises(AssertionError, match="assert 143 == 0"):  # 128 + SIGTERM
        fit("R", f"--trainer.callbacks+={__name__}.EndedAtTheEnd")
    assert Path("R/task_vector.safetensors").exists()


class EndedInTraining(Callback):
    """Asks its process to end after the first step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_to_end_in_training_is_a_failure(fit) -> None:
    with pytest.raises(AssertionError, match="assert 143 == 0"):
        fit("R", f"--trainer.callbacks+={__name__}.EndedInTraining", "--trainer.max_steps=50")
    assert not Path("R/task_vector.safetensors").exists()


def test_runs_without_a_name_get_folders_of_their_own(fit, tiny) -> None:
    short = ["fit", *QUIET, *tiny, "--data.task=digits", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert main(short) == main(short) == 0
    runs = list(Path("runs/fit").iterdir())
    assert len(runs) == 2
    assert all((folder / "fit.yaml").exists() for folder in runs)


def test_a_run_resumes_in_its_directory(fit, capsys) -> None:
    every = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    every += ["--trainer.callbacks.save_top_k=-1", "--trainer.log_every_n_steps=1", "--trainer.logger=true"]
    whole = TaskVector.load(fit("whole", *every) / "task_vector.safetensors")
    directory = fit("R", *every)
    (directory / "task_vector.safetensors").unlink()
    for path in directory.glob("checkpoints/*step=4*"):
        path.unlink()
    (checkpoint,) = directory.glob("checkpoints/*.ckpt")
    fit("R", *every, "--ckpt_path", str(checkpoint))
    resumed = TaskVector.load(directory / "task_vector.safetensors")
    assert resumed.metadata["step"] == "4"
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0)
    steps = [row["step"] for row in table(directory / "metrics.csv")]
    earlier = [row["step"] for row in table(directory / "metrics-1.csv")]
    assert steps[-1] == earlier[-1]
    assert len(steps) < len(earlier)  # the metrics of the first two steps are kept beside
    assert not list(Path().glob("runs"))


def test_resuming_without_output_goes_on_in_the_checkpoints_directory(fit, tiny) -> None:
    directory = fit("R")
    (checkpoint,) = directory.glob("checkpoints/*.ckpt")
    longer = ["fit", *QUIET, "--data.task=digits", "--data.batch_size=8", "--trainer.limit_val_batches=0"]
    assert main([*longer, "--trainer.max_steps=6", "--ckpt_path", str(checkpoint)]) == 0
    assert TaskVector.load(directory / "task_vector.safetensors").metadata["step"] == "6"
    assert not Path("runs").exists()


def test_the_last_checkpoint_is_the_newest_of_the_run(fit, tiny, capsys, caplog) -> None:
    every = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    directory = fit("R", *every, "--trainer.callbacks.save_top_k=-1", "--trainer.logger=true")
    assert len(list(directory.glob("checkpoints/*.ckpt"))) == 2
    longer = ["fit", *QUIET, "--data.task=digits", "--data.batch_size=8", "--trainer.limit_val_batches=0"]
    assert main([*longer, "--trainer.max_steps=6", "--output=R", "--ckpt_path=last"]) == 0
    assert "R: goes on from R/checkpoints/epoch=0-step=4.ckpt; what it writes replaces this run's" in caplog.text
    assert "step=4.ckpt" in (directory / "fit.yaml").read_text().splitlines()[0]  # a comment, which resumes nothing
    assert TaskVector.load(directory / "task_vector.safetensors").metadata["step"] == "6"
    assert main([*longer, "--trainer.max_steps=6", "--output=fresh", "--ckpt_path=last"]) == 2
    assert "fresh/checkpoints/*.ckpt, which does not exist" in capsys.readouterr().err


def test_a_trial_run_leaves_nothing(tiny) -> None:
    for command in ("fit", "test"):
        trial = [command, *QUIET, *tiny, "--data.task=digits", "--trainer.fast_dev_run=true", "--output=R"]
        assert main(trial) == 0
        assert not Path("R").exists()


def test_a_job_that_slurm_started_again_goes_on_in_its_directory(fit, caplog) -> None:
    directory = fit("R")
    (checkpoint,) = directory.glob("checkpoints/*.ckpt")
    shutil.copy(checkpoint, directory / "hpc_ckpt_1.ckpt")
    fit("R", "--trainer.max_steps=6")
    assert "Restored all states from the checkpoint at" in caplog.text
    assert "R: goes on from R/hpc_ckpt_1.ckpt" in caplog.text
    assert TaskVector.load(directory / "task_vector.safetensors").metadata["step"] == "6"


def test_a_checkpoint_of_another_run_does_not_open_a_directory(fit, capsys) -> None:
    (checkpoint,) = fit("one").glob("checkpoints/*.ckpt")
    fit("two")
    assert main(["fit", *QUIET, "--data.task=digits", "--output=two", "--ckpt_path", str(checkpoint)]) == 2
    assert "got two, which holds a run already" in capsys.readouterr().err


# The user's own classes, and quiet


def test_a_module_of_the_users_own(fit) -> None:
    Path("my_modules.py").write_text(
        "import torch\nfrom lit_merge import FineTuneModule\n\n"
        "class Still(FineTuneModule):\n"
        "    def __init__(self, factor: float = 0.0, **settings):\n"
        "        super().__init__(**settings)\n        self.factor = factor\n\n"
        "    def compute_loss(self, logits, batch):\n        return self.factor * logits.sum()\n"
    )
    directory = fit("R", "--model=my_modules.Still", "--model.factor=0.0", "--model.weight_decay=0")
    assert TaskVector.load(directory / "task_vector.safetensors").norm() == 0
    assert yaml.safe_load((directory / "fit.yaml").read_text())["model"]["class_path"] == "my_modules.Still"


def test_the_output_is_quiet(tiny, capsys, caplog, recwarn) -> None:
    several = ["--model=MultiTaskModule", "--data=MultiTaskDataModule", "--data.tasks=[digits, signs]"]
    short = ["--trainer.max_steps=2", "--data.batch_size=4", "--trainer.limit_val_batches=1", "--output=R"]
    assert main(["fit", *QUIET, *several, *tiny, *short]) == 0
    shown = capsys.readouterr()
    said = caplog.text + shown.out + shown.err + " ".join(str(warning.message) for warning in recwarn)
    assert "stopped: `max_steps=2` reached" in said  # what matters is still said
    for noise in ("Tip", "litlogger", "litmodels", "LeafSpec"):
        assert noise not in said


def test_run_returns_what_the_command_returns(fit, tiny) -> None:
    directory = fit("R")
    cli = run(["test", *QUIET, *tiny, "--data.task=digits", "--output", str(directory)])
    stored = json.loads((directory / "test_metrics.json").read_text())
    assert float(cli.trainer.callback_metrics["test/accuracy"]) == stored["test/accuracy"]


# Ctrl-C


def _listen_to_interrupts() -> None:
    """A job that a script starts in the background ignores SIGINT, and so would every process below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_a_fit_with_one_line(tiny, tmp_path) -> None:
    endless = ["fit", *QUIET, *tiny, "--data.task=digits", "--data.batch_size=8", "--trainer.max_steps=1000000"]
    logger = ["class_path=CSVLogger", "save_dir=R", "name=", "version=", "flush_logs_every_n_steps=1"]
    endless += ["--trainer.log_every_n_steps=1", *(f"--trainer.logger.{setting}" for setting in logger), "--output=R"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_merge", *endless],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=_listen_to_interrupts,
    )
    try:
        patience = time.monotonic() + 120
        while not Path("R/metrics.csv").exists() and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert [line for line in said.splitlines() if line.startswith("lit-merge")] == ["lit-merge: interrupted"]
    assert "Traceback" not in said
    assert Path("R/metrics.csv").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
