"""The conductor by itself: what runs, what is skipped, in which order, and what is said of failures."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_merge.errors import ConfigurationError, DataError, LitMergeError
from lit_merge.suite.engines import Job, Outcome
from lit_merge.suite.scheduler import Conductor, Stage, folder_digest


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


def conduct(directory: Path, stages: list[Stage], engine: Slots | None = None, retries: int = 1) -> tuple[Slots, list]:
    engine, lines = engine or Slots(), []
    try:
        Conductor(directory, len(stages), lines.append, engine=engine, retries=retries).run(stages)
    finally:
        assert engine.closed
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
        engine, _ = conduct(job, [stage("a/b", source, settings=settings)], Slots(work))
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
    engine, lines = conduct(tmp_path, graph(tmp_path))
    assert engine.names == ["a", "b", "c", "d", "e"]
    assert engine.most == 1
    assert lines == [f"[{number}/5] {name}: 1.2 s" for number, name in enumerate("abcde", 1)]
    assert conduct(tmp_path, graph(tmp_path))[1] == [
        f"[{n}/5] {name}: done before" for n, name in enumerate("abcde", 1)
    ]


def test_side_by_side_a_stage_waits_for_what_it_needs(tmp_path) -> None:
    engine, _ = conduct(tmp_path, graph(tmp_path), Slots(slots=3))
    assert engine.names == ["a", "b", "e", "c", "d"]
    assert engine.most == 3
    (tmp_path / "c/out").unlink()
    assert conduct(tmp_path, graph(tmp_path), Slots(slots=3))[0].names == ["c"]  # made again as it was: d stays


def test_what_an_engine_is_given(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = {"devices": 2}
    stages = [
        stage("x/fit", command="fit", trainer=trainer, seed_everything=1),
        stage("x/merge", command="merge", output="x/merge/out"),
    ]
    fit, merge = conduct(Path("job"), stages)[0].started
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
        conduct(tmp_path, graph(tmp_path), engine)
    assert engine.names == ["a", "b", "e"]
    assert {path.stem for path in (tmp_path / "stages").iterdir()} == {"a", "e"}
    assert conduct(tmp_path, graph(tmp_path))[0].names == ["b", "c", "d"]


def test_all_failures_are_in_one_line(tmp_path) -> None:
    errors = {"a": DataError("one."), "b": ConfigurationError("two.")}
    with pytest.raises(LitMergeError) as caught:
        conduct(tmp_path, graph(tmp_path), Slots(lambda job: errors.get(job.name)), retries=0)
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
    conductor = Conductor(tmp_path, 1, lines.append, engine=engine, retries=retries)
    if works:
        conductor.run([stage("a")])
    else:
        with pytest.raises(LitMergeError, match=r"^a: the process was killed\.$"):
            conductor.run([stage("a")])
    assert attempts == [2] * min(retries + 1, 3)  # every time in an empty folder
    assert lines.count("a: the process was killed. Trying again.") == min(retries, 2)
    assert (tmp_path / "stages/a.json").exists() == works


def test_stages_that_wait_for_each_other(tmp_path) -> None:
    stages = [stage("a", tmp_path / "b/out"), stage("b", tmp_path / "a/out"), stage("c")]
    with pytest.raises(ConfigurationError, match=r"^stages: expected none that waits for itself, got a, b\."):
        conduct(tmp_path, stages)
    assert (tmp_path / "stages/c.json").exists()


def test_an_interruption_closes_the_engine(tmp_path) -> None:
    def work(job: Job) -> None:
        raise KeyboardInterrupt

    engine = Slots(work, slots=2)
    with pytest.raises(KeyboardInterrupt):
        conduct(tmp_path, graph(tmp_path), engine)
    assert engine.closed
    assert not list(tmp_path.glob("stages/*"))


def test_a_folders_digest_sees_names_sizes_and_times(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1").write_text("one")
    digests = [folder_digest(tmp_path), folder_digest(tmp_path)]
    assert digests[0] == digests[1]
    os.utime(tmp_path / "a/1", ns=(1, 1))
    digests.append(folder_digest(tmp_path))
    (tmp_path / "a/1").rename(tmp_path / "a/2")
    digests.append(folder_digest(tmp_path))
    (tmp_path / "dangling").symlink_to("nowhere")
    assert folder_digest(tmp_path) == digests[-1]
    assert len(set(digests)) == 3
    assert folder_digest(tmp_path / "a/2") != folder_digest()
    assert folder_digest(tmp_path / "a/2", tmp_path) != folder_digest(tmp_path / "a/2")
