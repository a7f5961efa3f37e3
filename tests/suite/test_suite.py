"""The suite: its outcome, and that a stage runs again when, and only when, it has to."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_merge import FineTuneModule
from lit_merge.commands.main import main
from lit_merge.data import MultiTaskDataModule, TaskDataModule
from lit_merge.report import Results
from lit_merge.suite import run
from lit_merge.suite.lock import locked
from lit_merge.suite.plan import SuitePlan

STAGES = 1 + 2 * (3 + 3)
FEW = ["--tasks=[digits]", "--paths=null", "--recipes={average: {recipe: weight_average}}"]


CONFIG: dict[str, Any] = {
    "name": "small",
    "tasks": ["digits", "signs"],
    "paths": {"hues": "colours"},
    "seeds": [0],
    "fit": {
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "model": {"init_args": {"learning_rate": 1e-3}},
        "data": {"init_args": {"batch_size": 8}},
    },
    "test": {"trainer": {"accelerator": "cpu"}},
    "recipes": {
        "average": {"recipe": "weight_average"},
        "arithmetic": {"recipe": "task_arithmetic", "search": {"values": [0.1, 0.3]}},
        "scaled": {"transform": {"class_path": "Chain", "init_args": {"steps": [{"class_path": "Sum"}]}}},
    },
}


def suite(output: str = "S", *options: str) -> Path:
    assert main(["suite", "--config", "suite.yaml", "--output", output, *options]) == 0
    return Path(output)


@pytest.fixture(scope="module")
def template(tmp_path_factory, few_images, clip_config, clip_weights, write_colours) -> Path:
    """A folder with a configuration, images and, in ``S``, the finished suite with what it said; not to be changed."""
    folder = tmp_path_factory.mktemp("template")
    config = {**CONFIG, "model": clip_config, "pretrained": clip_weights}
    (folder / "suite.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_colours(folder / "colours")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            suite()
    finally:
        os.chdir(before)
    (folder / "S.json").write_text(json.dumps({"out": out.getvalue(), "err": err.getvalue()}))
    return folder


@pytest.fixture
def place(tmp_path, template, monkeypatch) -> Path:
    """The current folder: configuration and images, no suite."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("S", "S.json"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, handler)  # Lightning ignores it after an interruption


@pytest.fixture
def finished(place, template) -> Path:
    """The directory of a suite that is through."""
    shutil.copytree(template / "S", "S")
    return Path("S")


def times(directory: Path) -> dict[str, int]:
    """Stage -> when its record was written."""
    return {path.stem.replace("--", "/"): path.stat().st_mtime_ns for path in (directory / "stages").iterdir()}


def ran(before: dict[str, int], directory: Path) -> set[str]:
    """The stages whose records are new."""
    return {stage for stage, time in times(directory).items() if before.get(stage) != time}


def of_seed(patterns: Iterable[str], seed: int = 0) -> set[str]:
    """Stages below ``seed-0``; ``merge/*`` stands for all recipes."""
    recipes = ("average", "arithmetic", "scaled")
    named = [pattern.replace("*", recipe) for pattern in patterns for recipe in recipes]
    return {f"seed-{seed}/{name}" for name in named}


# The outcome


def test_the_outcome(template) -> None:
    directory, shown = template / "S", json.loads((template / "S.json").read_text())
    assert f"[{STAGES}/{STAGES}] seed-0/test/scaled: " in shown["err"]
    assert "zero-shot" in shown["out"]
    assert "S/results.png" in shown["out"]
    assert "S/report.html" in shown["out"]
    assert "<table" in (directory / "report.html").read_text(encoding="utf-8")
    assert (directory / "results.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert results["tasks"] == ["digits", "signs", "hues"]
    assert results["classes"] == {"digits": 10, "signs": 16, "hues": 3}
    seed = results["seeds"]["0"]
    assert set(seed["individual"]) == set(results["zero_shot"]) == set(results["tasks"])
    assert list(seed["merged"]) == ["average", "arithmetic", "scaled"]
    assert seed["merged"]["arithmetic"]["coefficient"] in (0.1, 0.3)
    assert seed["merged"]["scaled"]["transform"] == "chain(Sum())"
    assert [row[index] for index, row in enumerate(seed["cosine_similarity"])] == pytest.approx([1, 1, 1])
    assert {vector["steps"] for vector in seed["task_vectors"].values()} == {2}
    assert Results.load(directory / "results.json").tasks == ("digits", "signs", "hues")
    stored = json.loads((directory / "seed-0/test/average/test_metrics.json").read_text())
    assert seed["merged"]["average"]["accuracy"]["hues"] == round(stored["test/hues/accuracy"], 6)
    assert set(json.loads((directory / "timings.json").read_text())) == set(times(directory))
    for name in ("fit/digits/fit.yaml", "individual/hues/test.yaml", "merge/average/merged-merge.yaml"):
        assert (directory / "seed-0" / name).exists()
    saved = yaml.safe_load((directory / "suite.yaml").read_text(encoding="utf-8"))
    given = {key: value for key, value in CONFIG.items() if key != "recipes"}
    assert {key: saved[key] for key in given} == given


def test_the_saved_configuration_gives_the_same_bytes_elsewhere(finished) -> None:
    assert main(["suite", "--config", "S/suite.yaml", "--output", "elsewhere/T"]) == 0
    assert (finished / "results.json").read_bytes() == Path("elsewhere/T/results.json").read_bytes()
    name = "seed-0/fit/hues/task_vector.safetensors"
    assert (finished / name).read_bytes() == (Path("elsewhere/T") / name).read_bytes()


def test_seeds_differ_but_test_images_never_train(finished) -> None:
    before = times(finished)
    directory = suite("S", "--seeds+=1")
    several = ["fit/hues", "fit/digits", "fit/signs", "individual/hues", "individual/digits", "individual/signs"]
    assert ran(before, directory) == of_seed([*several, "merge/*", "test/*"], 1)
    vectors = [(directory / f"seed-{seed}/fit/hues/task_vector.safetensors").read_bytes() for seed in (0, 1)]
    assert vectors[0] != vectors[1]
    names: dict[str, set[str]] = {"train": set(), "test": set()}
    for place, split in (("seed-0/fit", "train"), ("seed-1/fit", "train"), ("seed-1/individual", "test")):
        stage = yaml.safe_load((directory / place / "hues/stage.yaml").read_text(encoding="utf-8"))
        data = TaskDataModule(**stage["data"]["init_args"])
        names[split] |= {str(path) for path, _ in data.source._divided[split]}
    zero_shot = yaml.safe_load((directory / "zero-shot/stage.yaml").read_text(encoding="utf-8"))
    several = MultiTaskDataModule(**zero_shot["data"]["init_args"])
    assert {str(path) for path, _ in several.tasks["hues"].source._divided["test"]} == names["test"]
    assert len(names["train"]) == 24
    assert names["test"]
    assert not names["train"] & names["test"]


# What runs again


def test_a_second_run_does_nothing_again(finished, capsys) -> None:
    before, outcome = times(finished), (finished / "results.json").read_bytes()
    suite()
    assert capsys.readouterr().err.count("done before") == STAGES
    assert not ran(before, finished)
    assert (finished / "results.json").read_bytes() == outcome


def test_a_second_run_draws_what_is_missing(finished) -> None:
    drawn = [finished / name for name in ("results.png", "report.html")]
    before = [path.stat().st_mtime_ns for path in drawn]
    suite()
    assert [path.stat().st_mtime_ns for path in drawn] == before
    drawn[0].unlink()
    suite()
    assert all(path.stat().st_mtime_ns > earlier for path, earlier in zip(drawn, before, strict=True))


def test_a_second_run_reads_only_what_has_changed(finished, monkeypatch) -> None:
    """Neither task vectors nor the base model nor images are read; a file that was touched is read once."""
    read: list[int] = []

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **settings: Any) -> Any:
            before = characters_read()
            found = function(*arguments, **settings)
            read.append(characters_read() - before)
            return found

        return run

    monkeypatch.setattr("lit_merge.commands.suite.run_suite", measured(run.run_suite))
    monkeypatch.setattr(SuitePlan, "check", measured(SuitePlan.check))
    suite()  # a copied suite's files are new ones
    names = ("fit/hues/task_vector.safetensors", "merge/scaled/merged.safetensors")
    vector, merged = (finished / "seed-0" / name for name in names)
    for changed in ([], [vector], [vector, merged]):
        for path in changed:
            path.touch()
        read.clear()
        suite()
        assert len(read) == 2
        # Beside them records, headers and results: less than two of the twelve files of tensors.
        assert sum(read) - sum(path.stat().st_size for path in changed) < 2 * vector.stat().st_size, changed


def characters_read() -> int:
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_copied_data_set_is_the_same_data_set(finished) -> None:
    before = times(finished)
    shutil.copytree("colours", "elsewhere", copy_function=shutil.copyfile)
    shutil.rmtree("colours")
    Path("elsewhere").rename("colours")
    suite()
    assert not ran(before, finished)


def test_a_stage_leaves_what_it_said(template) -> None:
    directory = template / "S/seed-0"
    assert "max_steps=2" in (directory / "fit/hues/stage.log").read_text()
    assert "chain(Mean()) -> S/seed-0/merge/average" in (directory / "merge/average/stage.log").read_text()
    assert "test/accuracy" in (directory / "individual/hues/stage.log").read_text()


def test_two_suites_do_not_write_to_one_output(finished, capsys) -> None:
    child = os.fork()
    if child == 0:
        with locked(finished):
            Path("held").touch()
            time.sleep(60)
        os._exit(0)
    until = time.monotonic() + 20
    while not Path("held").exists() and time.monotonic() < until:
        time.sleep(0.01)
    try:
        assert main(["suite", "--config=suite.yaml", "--output=S", "--name=other"]) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    said = capsys.readouterr().err
    assert (
        f"output: expected S to be free, got it held by another suite on {socket.gethostname()} (process {child})"
        in said
    )
    assert Results.load(finished / "results.json").name == "small"  # nothing of it was touched


def test_a_moved_suite_is_the_same_suite(finished) -> None:
    moved = finished.rename("T")
    before = times(moved)
    suite("T")
    assert not ran(before, moved)


def test_damaged_outputs_are_made_again_and_nothing_else(finished) -> None:
    directory = finished
    before, outcome = times(directory), (directory / "results.json").read_bytes()
    vector = directory / "seed-0/fit/signs/task_vector.safetensors"
    vector.write_bytes(vector.read_bytes()[:-100])
    metrics = directory / "zero-shot/test_metrics.json"
    metrics.write_text(metrics.read_text().replace("0.", "1.", 1))
    (directory / "seed-0/merge/average/merged.safetensors").unlink()
    record = directory / "stages/seed-0--test--scaled.json"
    record.write_bytes(record.read_bytes()[:20])
    (directory / "results.json").unlink()
    (directory / "results.png").write_bytes(b"")
    suite()
    # Made again, the vector is the same, bit for bit: what depends on it stays.
    assert ran(before, directory) == of_seed(["fit/signs", "merge/average", "test/scaled"]) | {"zero-shot"}
    assert (directory / "results.json").read_bytes() == outcome
    assert (directory / "results.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--recipes.arithmetic.search.values=[0.2]"], of_seed(["merge/arithmetic", "test/arithmetic"])),
        (["--recipes.scaled.transform.init_args.steps=[{class_path: Mean}]"], of_seed(["merge/scaled", "test/scaled"])),
        (["--name=other"], set()),
        (["--test.data.init_args.evaluation_batch_size=50"], of_seed(["individual/hues", "individual/digits"])
            | of_seed(["individual/signs", "test/*"]) | {"zero-shot"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_changed_setting_reruns_what_depends_on_it(finished, options, expected) -> None:
    before = times(finished)
    suite("S", *options)
    assert ran(before, finished) == expected


def test_other_images_rerun_their_task_and_the_merges(finished) -> None:
    before = times(finished)
    shutil.copy("colours/blue/0.png", "colours/blue/another.png")
    suite()
    expected = of_seed(["fit/hues", "individual/hues", "merge/*", "test/*"]) | {"zero-shot"}
    assert ran(before, finished) == expected


def test_overwrite_starts_over_and_leaves_other_files(place) -> None:
    directory = suite("S", *FEW)
    before = times(directory)
    (directory / "notes.txt").write_text("mine")
    suite("S", *FEW, "--overwrite=true")
    assert ran(before, directory) == set(before)
    assert (directory / "notes.txt").read_text() == "mine"


def test_results_of_other_settings_do_not_linger(finished, monkeypatch) -> None:
    monkeypatch.setattr(FineTuneModule, "compute_loss", lambda self, logits, batch: logits.sum() * float("nan"))
    assert main(["suite", "--config=suite.yaml", "--output=S", "--fit.trainer.max_steps=3"]) == 1
    assert not (finished / "results.json").exists()


def test_one_coefficient_per_task_has_no_number_in_the_results(finished) -> None:
    suite("S", "--recipes={each: {recipe: task_arithmetic, settings: {coefficient: [0.3, 0.2, 0.1]}}}")
    each = Results.load(finished / "results.json").merged("each")[0]
    assert (each.coefficient, each.transform) == (None, "chain(Scale(coefficient=(0.3, 0.2, 0.1)), Sum())")
    assert Results.load(finished / "results.json").protocol() == "test accuracy"  # nothing was chosen on other data


# What ends it


KILLED = """
import json, os, signal
from pathlib import Path
from lit_merge.commands.main import main
from lit_merge.modules import FineTuneModule, MultiTaskModule

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def in_the_second_fit():
    step, count = FineTuneModule.training_step, [0]
    def patched(self, *arguments):
        count[0] += 1
        if count[0] == 4:  # two steps of the first task, one of the second
            die()
        return step(self, *arguments)
    FineTuneModule.training_step = patched

def in_a_merge():
    synchronise = os.fsync
    def patched(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "/merge/" in path and path.endswith(".temporary"):
            die()
        synchronise(descriptor)
    os.fsync = patched

def in_the_last_test():
    step = MultiTaskModule.test_step
    def patched(self, batch, batch_idx, dataloader_idx=0):
        if "scaled" in self.trainer.default_root_dir and dataloader_idx:
            die()
        return step(self, batch, batch_idx, dataloader_idx)
    MultiTaskModule.test_step = patched

def times():
    return {path.name: path.stat().st_mtime_ns for path in Path("K/stages").glob("*.json")}

def attempt(arrange, output="K"):
    child = os.fork()
    if child == 0:
        arrange()
        os._exit(main(["suite", "--config", "suite.yaml", "--output", output]))
    return os.waitpid(child, 0)[1]

log = []
for arrange in (in_the_second_fit, in_a_merge, in_the_last_test, lambda: None):
    status = attempt(arrange)
    left = [path.name for path in Path("K").rglob(".*")]
    log.append({"status": status, "times": times(), "left": left, "done": Path("K/results.json").exists()})
print(json.dumps(log))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files in /proc")
def test_a_suite_killed_at_three_points_ends_as_one_that_was_not(place, template, fork_server) -> None:
    codes, (said,) = fork_server.run([(KILLED, {})])
    assert codes == [0], said
    attempts = json.loads(said.splitlines()[-1])
    assert [os.WTERMSIG(attempt["status"]) for attempt in attempts[:3]] == [signal.SIGKILL] * 3
    assert attempts[3]["status"] == 0
    assert [attempt["done"] for attempt in attempts] == [False, False, False, True]
    assert [len(attempt["times"]) for attempt in attempts] == [2, 7, 12, 13]
    assert attempts[1]["left"], "the second one was to be killed while a file was half written"
    assert not attempts[3]["left"]
    for earlier, later in itertools.pairwise(attempts):  # finished stages are not done again
        assert earlier["times"].items() <= later["times"].items()
    assert Path("K/results.json").read_bytes() == (template / "S/results.json").read_bytes()


def test_an_interrupted_suite_goes_on(place, capsys, monkeypatch) -> None:
    def interrupt(self: FineTuneModule, *_: Any) -> None:
        raise KeyboardInterrupt

    step = FineTuneModule.test_step
    monkeypatch.setattr(FineTuneModule, "test_step", interrupt)
    assert main(["suite", "--config=suite.yaml", "--output=S", *FEW]) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "lit-merge: interrupted; run the same command again to go on"
    assert not [line for line in said if "error" in line]
    monkeypatch.setattr(FineTuneModule, "test_step", step)
    before = times(Path("S"))
    assert set(before) == {"zero-shot", "seed-0/fit/digits"}
    suite("S", *FEW)
    assert before.items() <= times(Path("S")).items()


@pytest.mark.parametrize(
    ("step", "done"), [("training_step", {"zero-shot"}), ("test_step", {"zero-shot", "seed-0/fit/digits"})]
)
def test_a_suite_that_was_asked_to_end_goes_on(step, done, place, capsys, monkeypatch) -> None:
    """In Lightning's hands a process is not ended by SIGTERM at once: neither its stage nor the suite may go on."""
    original = getattr(FineTuneModule, step)

    def asked(self: FineTuneModule, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuneModule, step, asked)
        assert main(["suite", "--config=suite.yaml", "--output=S", *FEW]) == 143
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "lit-merge: asked to end (SIGTERM); run the same command again to go on"
    assert not [line for line in said if "error" in line or "failed" in line]
    before = times(Path("S"))
    assert set(before) == done
    suite("S", *FEW)
    assert before.items() <= times(Path("S")).items()


def test_a_refusing_stage_is_named_and_the_rest_is_kept(place, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FineTuneModule, "compute_loss", lambda self, logits, batch: logits.sum() * float("inf"))
        assert main(["suite", "--config=suite.yaml", "--output=S", *FEW]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lit-merge: error: seed-0/fit/digits: loss: expected a finite value")
    before = times(Path("S"))
    assert set(before) == {"zero-shot"}
    suite("S", *FEW)
    assert times(Path("S"))["zero-shot"] == before["zero-shot"]


@pytest.mark.parametrize(
    ("options", "expected", "code"),
    [
        (["--paths.hues=missing"], "missing: expected the folder of a task", 1),
        (["--tasks=[digits, digits]"], "tasks: expected every task once, got 'digits' twice", 2),
        (["--tasks=[hues]"], "hues", 2),
        (["--paths={a.b: colours}"], "expected letters, digits, _ and -, got 'a.b'", 2),
        (["--recipes={a/b: {recipe: weight_average}}"], "expected letters, digits, _ and -, got 'a/b'", 2),
        (["--recipes={individual: {recipe: weight_average}}"], "expected other names than individual and zero-shot", 2),
        (["--recipes={one: {}}"], "recipe, transform and parts: expected exactly one of them, got none", 2),
        (["--recipes.arithmetic.search.field=alpha"], "alpha: expected exactly one step", 2),
        (["--recipes.arithmetic.search.values=[]"], "search.values: expected at least one value", 2),
        (["--seeds=[]"], "seeds: expected at least one", 2),
        (["--data.wrokers=2"], "wrokers", 2),
        (
            ["--recipes.arithmetic.search.target=[land]"],
            "recipes.arithmetic: search: expected tasks of the suite (digits, ",
            2,
        ),
        (["--recipes.arithmetic.search.criterion=target_control"], "expected control tasks for target_control, got", 2),
        (
            ["--recipes={a: {recipe: task_arithmetic, settings: {coefficient: [1, 0]}}}"],
            "recipes.a: Scale.coefficient: expected one per task (3: digits, signs, hues), got 2",
            2,
        ),
        (["--model=missing.json"], "missing.json", 2),
        (["--pretrained=missing.safetensors"], "missing.safetensors", 2),
    ],
    ids=str,
)
def test_what_no_stage_could_use_is_refused_before_the_first(place, options, expected, code, capsys) -> None:
    assert main(["suite", "--config=suite.yaml", "--output=S", *options]) == code
    assert expected in capsys.readouterr().err
    assert not Path("S").exists()


def test_a_folder_of_other_things_is_no_suites(place, capsys) -> None:
    before = Path("suite.yaml").read_bytes()
    for options in ([], ["--overwrite=true"]):
        assert main(["suite", "--config=suite.yaml", "--output=.", *options]) == 2  # its own suite.yaml lies here
        assert "which holds something else" in capsys.readouterr().err
    assert Path("suite.yaml").read_bytes() == before
