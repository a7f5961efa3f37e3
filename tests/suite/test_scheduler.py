"""The scheduler by itself: what runs, what is skipped, in which order, and what is said of failures."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_merge.errors import ConfigurationError, DataError, LitMergeError
from lit_merge.files.store import file_digest
from lit_merge.suite.engines import Job, Outcome, SequentialEngine
from lit_merge.suite.scheduler import Scheduler, Stage


class Slots:
    """An engine of ``slots`` places; ``work(job)`` is called when a job is waited for, and may return an error."""

    def __init__(self, work: Callable[[Job], LitMergeError | None] = lambda job: None, slots: int = 1) -> None:
        self.work, self.slots = work, slots
        self.started: list[Job] = []
        self.running: list[Job] = []
        self.most, self.closed = 0, False

    def free(self) -> bool:
        return len(self.running) < self.slots

    def start(self, job: Job) -> None:
        assert self.free()
        self.started.append(job)
        self.running.append(job)
        self.most = max(self.most, len(self.running))

    def wait(self) -> Outcome:
        job = self.running.pop(0)
        error = self.work(job)
        for name in job.outputs if error is None else ():
            if not (Path(job.folder) / name).exists():
                (Path(job.folder) / name).write_text(job.name)
        return Outcome(job.name, 1.234, error, refused=isinstance(error, DataError))

    def close(self) -> None:
        self.closed = True

    @property
    def names(self) -> list[str]:
        return [job.name for job in self.started]


def stage(name: str, *inputs: Path, settings: Any = None, command: str = "merge", **config: Any) -> Stage:
    return Stage(name, command, config, settings, ("out",), inputs)


def schedule(directory: Path, stages: list[Stage], engine: Slots | None = None, retries: int = 1) -> tuple[Slots, list]:
    engine, lines = engine or Slots(), []
    try:
        Scheduler(directory, len(stages), lines.append, engine=engine, retries=retries).run(stages)
    finally:
        assert not engine.closed  # whoever opened it closes it
    return engine, lines


def graph(job: Path) -> list[Stage]:
    """a and b; c of both; d of c; e by itself."""
    first = [stage("a"), stage("b")]
    return [*first, stage("c", job / "a/out", job / "b/out"), stage("d", job / "c/out"), stage("e")]


def test_stages_run_when_their_settings_or_inputs_change(tmp_path) -> None:
    source, job = tmp_path / "source", tmp_path / "job"

    def work(job: Job) -> None:
        assert [path.name for path in Path(job.folder).iterdir()] == ["stage.yaml"]  # it is empty every time
        (Path(job.folder) / "out").write_text(source.read_text())
        (Path(job.folder) / "by the way").write_text("")

    def ran(settings: Any) -> int:
        engine, _ = schedule(job, [stage("a/b", source, settings=settings)], Slots(work))
        assert (job / "a/b/out").read_text() == source.read_text()
        return len(engine.started)

    source.write_text("1")
    assert ran({"x": 1}) == 1
    assert ran({"x": 1}) == 0
    assert ran({"x": 2}) == 1
    source.write_text("2")
    assert ran({"x": 2}) == 1
    assert ran({"x": 2}) == 0
    (job / "a/b/out").write_text("cut off")
    assert ran({"x": 2}) == 1
    (job / "stages/a--b.json").write_text('{"key": ')
    assert ran({"x": 2}) == 1


def test_one_by_one_the_plans_order_is_kept(tmp_path) -> None:
    engine, lines = schedule(tmp_path, graph(tmp_path))
    assert engine.names == ["a", "b", "c", "d", "e"]
    assert engine.most == 1
    assert lines == [f"[{number}/5] {name}: 1.2 s" for number, name in enumerate("abcde", 1)]
    assert schedule(tmp_path, graph(tmp_path))[1] == [
        f"[{n}/5] {name}: done before" for n, name in enumerate("abcde", 1)
    ]


def test_side_by_side_a_stage_waits_for_what_it_needs(tmp_path) -> None:
    engine, _ = schedule(tmp_path, graph(tmp_path), Slots(slots=3))
    assert engine.names == ["a", "b", "e", "c", "d"]
    assert engine.most == 3
    (tmp_path / "c/out").unlink()
    assert schedule(tmp_path, graph(tmp_path), Slots(slots=3))[0].names == ["c"]  # made again as it was: d stays


def test_what_an_engine_is_given(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = {"devices": 2}
    stages = [
        stage("x/fit", command="fit", trainer=trainer, seed_everything=1),
        stage("x/merge", command="merge", output="x/merge/out"),
    ]
    fit, merge = schedule(Path("job"), stages)[0].started
    assert (fit.command, fit.arguments) == ("fit", ("--config", "job/x/fit/stage.yaml", "--output", "job/x/fit"))
    assert (merge.command, merge.arguments) == ("merge", ("--config", "job/x/merge/stage.yaml"))
    assert Path(fit.folder) == tmp_path / "job/x/fit"  # as another machine or folder sees it
    assert (fit.outputs, fit.processes, merge.processes) == (("out",), True, False)
    assert yaml.safe_load(Path("job/x/fit/stage.yaml").read_text()) == {"trainer": trainer, "seed_everything": 1}
    record = json.loads(Path("job/stages/x--fit.json").read_text())
    assert (list(record["outputs"]), record["seconds"]) == (["x/fit/out"], 1.23)
    assert pickle.loads(pickle.dumps((stages[0], fit))) == (stages[0], fit)


def test_a_refusing_stage_leaves_no_record_and_the_rest_is_done(tmp_path) -> None:
    def work(job: Job) -> LitMergeError | None:
        return DataError("images: expected some, got none.") if job.name == "b" else None

    engine = Slots(work)
    with pytest.raises(DataError, match=r"^b: images: expected some, got none\.$"):
        schedule(tmp_path, graph(tmp_path), engine)
    assert engine.names == ["a", "b", "e"]
    assert {path.stem for path in (tmp_path / "stages").iterdir()} == {"a", "e"}
    assert schedule(tmp_path, graph(tmp_path))[0].names == ["b", "c", "d"]


def test_all_failures_are_in_one_line(tmp_path) -> None:
    errors = {"a": DataError("one."), "b": ConfigurationError("two.")}
    with pytest.raises(LitMergeError) as caught:
        schedule(tmp_path, graph(tmp_path), Slots(lambda job: errors.get(job.name)), retries=0)
    assert type(caught.value) is LitMergeError
    assert str(caught.value) == "2 stages failed, and 2 that need them were not run: a: one. | b: two."


@pytest.mark.parametrize(("retries", "works"), [(0, False), (1, False), (2, True), (5, True)])
def test_what_breaks_off_is_tried_again(tmp_path, retries, works) -> None:
    attempts: list[int] = []

    def work(job: Job) -> LitMergeError | None:
        (Path(job.folder) / "half").write_text("")
        attempts.append(len(list(Path(job.folder).iterdir())))
        return LitMergeError("the process was killed.") if len(attempts) < 3 else None

    engine, lines = Slots(work), []
    scheduler = Scheduler(tmp_path, 1, lines.append, engine=engine, retries=retries)
    if works:
        scheduler.run([stage("a")])
    else:
        with pytest.raises(LitMergeError, match=r"^a: the process was killed\.$"):
            scheduler.run([stage("a")])
    assert attempts == [2] * min(retries + 1, 3)  # every time in an empty folder
    assert lines.count("a: the process was killed. Trying again.") == min(retries, 2)
    assert (tmp_path / "stages/a.json").exists() == works


def test_stages_that_wait_for_each_other(tmp_path) -> None:
    stages = [stage("a", tmp_path / "b/out"), stage("b", tmp_path / "a/out"), stage("c")]
    with pytest.raises(ConfigurationError, match=r"^stages: expected none that waits for itself, got a, b\."):
        schedule(tmp_path, stages)
    assert (tmp_path / "stages/c.json").exists()


def test_an_interruption_comes_through(tmp_path) -> None:
    def work(job: Job) -> None:
        raise KeyboardInterrupt

    engine = Slots(work, slots=2)
    with pytest.raises(KeyboardInterrupt):
        schedule(tmp_path, graph(tmp_path), engine)
    assert not list(tmp_path.glob("stages/*"))


def test_a_finished_job_is_not_read_again(tmp_path, monkeypatch) -> None:
    """Neither the outputs nor the inputs; what has changed is read, once, and an output that was cut off noticed."""
    source, job = tmp_path / "source", tmp_path / "job"
    source.write_text("1")
    stages = [stage("a", source), stage("b", job / "a/out"), stage("c", job / "a/out", job / "b/out")]
    read: list[str] = []
    monkeypatch.setattr(
        "lit_merge.suite.ledger.file_digest", lambda path: (read.append(Path(path).name), file_digest(path))[1]
    )
    schedule(job, stages)
    assert sorted(read) == ["out", "out", "out", "source"]
    read.clear()
    assert schedule(job, stages)[0].names == []
    assert read == []
    (job / "b/out").write_text("x")
    assert schedule(job, stages)[0].names == ["b"]
    assert read == ["out", "out"]  # as it was found, and as it was made


def test_in_this_process_as_in_others_what_breaks_off_is_tried_again_and_named(tmp_path) -> None:
    """And what does not depend on it is finished; a refusal is not tried again."""
    asked: list[str] = []

    def run(command: str, arguments: Sequence[str]) -> None:
        folder = Path(arguments[1]).parent
        asked.append(folder.name)
        if folder.name == "a":
            raise RuntimeError("no kernel image")
        if folder.name == "b" and asked.count("b") == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        if folder.name == "f":
            raise ConfigurationError("x: expected y")
        (folder / "out").write_text("")

    stages = [*graph(tmp_path), stage("f")]
    lines: list[str] = []
    expected = r"^2 stages failed, and 2 .*: a: the stage failed with RuntimeError: no kernel image, see .*a/stage.log"
    with pytest.raises(LitMergeError, match=expected):
        Scheduler(tmp_path, len(stages), lines.append, SequentialEngine(run)).run(stages)
    assert asked == ["a", "a", "b", "b", "e", "f"]
    assert {line.split(":")[0].rpartition(" ")[2] for line in lines if line.startswith("[")} == {"b", "e"}
    assert "RuntimeError: no kernel image" in (tmp_path / "a/stage.log").read_text()
