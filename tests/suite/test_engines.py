"""The suite's engines: the same results whoever runs the stages, and what happens when one of them fails."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders.warm_processes import warm_processes

from lit_merge._version import __version__
from lit_merge.commands.main import main
from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.suite.engines import Job, LocalEngine, Outcome, SequentialEngine, cluster, local, open_engine
from lit_merge.suite.engines.local import devices_of_slots
from lit_merge.suite.engines.process import StageProcess, cores
from lit_merge.suite.engines.template import Template

CONFIG: dict[str, Any] = {
    "tasks": ["digits", "signs"],
    "fit": {
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "model": {"init_args": {"learning_rate": 1e-3}},
        "data": {"init_args": {"batch_size": 8}},
    },
    "test": {"trainer": {"accelerator": "cpu"}},
    "recipes": {"arithmetic": {"recipe": "task_arithmetic", "search": {"values": [0.1, 0.3]}}},
}
STAGES = 7


@pytest.fixture(scope="module")
def warm(tmp_path_factory, fork_server) -> Iterator[None]:
    with warm_processes(tmp_path_factory.mktemp("warm"), fork_server):
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory, few_images, clip_config, clip_weights) -> Path:
    """A folder with ``suite.yaml`` and, in ``S``, what one process made of it; not to be changed."""
    folder = tmp_path_factory.mktemp("engines")
    config = {**CONFIG, "model": clip_config, "pretrained": clip_weights}
    (folder / "suite.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(["suite", "--config=suite.yaml", "--output=S"]) == 0
    return folder


@pytest.fixture
def place(tmp_path, template, few_images, monkeypatch) -> Path:
    (tmp_path / "suite.yaml").write_bytes((template / "suite.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def job(folder: Path, *arguments: str, outputs: tuple[str, ...] = ()) -> Job:
    folder.mkdir(exist_ok=True)
    return Job("a/b", arguments[0], arguments[1:], str(folder), outputs)


@pytest.fixture
def program(monkeypatch) -> Any:
    """``program("print(1)")``: stages are this program instead of lit-merge."""
    return lambda text: monkeypatch.setattr(
        "lit_merge.suite.engines.process._PROGRAM", [sys.executable, "-S", "-c", text]
    )


# The same results


def same_results(template: Path, place: Path) -> bool:
    return (place / "P/results.json").read_bytes() == (template / "S/results.json").read_bytes()


def test_two_processes_give_the_same_bytes(place, template, warm, capsys) -> None:
    assert main(["suite", "--config=suite.yaml", "--output=P", "--parallel=2"]) == 0
    said = capsys.readouterr().err
    assert f"[{STAGES}/{STAGES}] seed-0/test/arithmetic: " in said
    assert same_results(template, place)
    fits = [json.loads((place / f"P/stages/seed-0--fit--{task}.json").read_text()) for task in ("digits", "signs")]
    assert all(list(one["outputs"]) == [f"seed-0/fit/{task}/task_vector.safetensors"]
               for one, task in zip(fits, ("digits", "signs"), strict=True))  # fmt: skip
    assert "max_steps=2" in (place / "P/seed-0/fit/signs/stage.log").read_text()
    assert list(json.loads((place / "P/timings.json").read_text())) == list(
        json.loads((template / "S/timings.json").read_text())
    )
    assert main(["suite", "--config=suite.yaml", "--output=P"]) == 0  # another engine finds everything done
    assert capsys.readouterr().err.count("done before") == STAGES


def test_ray_gives_the_same_bytes(place, template, warm, capsys) -> None:
    pytest.importorskip("ray")
    arguments = ["suite", "--config=suite.yaml", "--output=P", "--engine=ray", "--ray_address=local", "--parallel=2"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert " s on " in capsys.readouterr().err
    assert same_results(template, place)
    assert not list(place.rglob(".marker-*"))


# What fails


def test_what_does_not_depend_on_a_failed_stage_is_finished(place, template, warm, capsys) -> None:
    config = yaml.safe_load((place / "suite.yaml").read_text())
    unfit = {"parts": [{"ScaleBlocks": {"coefficients": [1.0] * 9}}, "Sum"]}  # the network has not so many
    config["recipes"] = {"wrong": unfit, "other": unfit, "right": {"recipe": "weight_average"}}
    (place / "suite.yaml").write_text(yaml.safe_dump(config))
    assert main(["suite", "--config=suite.yaml", "--output=P", "--parallel=2"]) in (1, 2)
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("lit-merge: error: 2 stages failed, and 2 that need them were not run: seed-0/merge/")
    for name in ("wrong", "other"):
        assert f"seed-0/merge/{name}: failed" in said
        assert f"seed-0/merge/{name}: " in said[-1]
    assert not [line for line in said if "Trying again" in line]  # a refusal is final
    assert (place / "P/stages/seed-0--test--right.json").exists()
    assert not (place / "P/results.json").exists()
    config["recipes"] = {"right": config["recipes"]["right"]}
    (place / "suite.yaml").write_text(yaml.safe_dump(config))
    assert main(["suite", "--config=suite.yaml", "--output=P"]) == 0
    assert capsys.readouterr().err.count("done before") == STAGES


def test_a_killed_process_is_tried_again(place, template, warm, capsys, monkeypatch) -> None:
    """The first attempt at one task kills itself in its first step."""
    (place / "dying.py").write_text(
        "import os, signal\nfrom pathlib import Path\nfrom lit_merge import FineTuneModule\n"
        "class Dying(FineTuneModule):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        if self.task == 'signs' and not Path('died').exists():\n"
        "            Path('died').touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    monkeypatch.syspath_prepend(str(place))
    options = ["--fit.model.class_path=dying.Dying", "--tasks=[signs, digits]", "--recipes={}"]
    arguments = ["suite", "--config=suite.yaml", "--output=P", "--parallel=2", *options]
    assert main([*arguments, "--retries=0"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "seed-0/fit/signs: the process was killed by signal 9 (SIGKILL; the machine may be out of memory)" in last
    (place / "died").unlink()
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "seed-0/fit/signs: the process was killed by signal 9" in said
    assert "Trying again." in said
    sys.modules.pop("dying", None)


ENDED = """
import json, os, signal, sys, time
from pathlib import Path
from lit_merge._version import __version__
from lit_merge.commands.main import main

def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()

def alive(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"

log = []
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
for how in (signal.SIGINT, signal.SIGKILL):
    suite = os.fork()
    if suite == 0:
        os._exit(main(["suite", "--config=suite.yaml", "--output=P", "--parallel=3", *OPTIONS]))
    began = until(lambda: len(list(Path().glob("pid-*"))) == 2 and Path("P/stages/zero-shot.json").exists())
    children = [int(path.name[4:]) for path in Path().glob("pid-*")]
    os.kill(suite, how)
    code = os.waitstatus_to_exitcode(os.waitpid(suite, 0)[1])
    ended = until(lambda: not any(alive(child) for child in children), 10)
    stages = sorted(path.name for path in Path("P/stages").iterdir())
    log.append({"began": began, "code": code, "ended": ended, "stages": stages})
    for path in Path().glob("pid-*"):
        path.unlink()
print(json.dumps(log))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_no_process_outlives_a_suite_that_is_interrupted_or_killed(place, template, warm, fork_server) -> None:
    (place / "slow.py").write_text(
        "import os, time\nfrom pathlib import Path\nfrom lit_merge import FineTuneModule\n"
        "class Slow(FineTuneModule):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        Path(f'pid-{os.getpid()}').touch()\n"
        "        time.sleep(60)\n"
    )
    options = ["--fit.model.class_path=slow.Slow", "--recipes={}"]
    environment = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    codes, (said,) = fork_server.run([(ENDED.replace("OPTIONS", repr(options)), environment)])
    assert codes == [0], said
    interrupted, killed = json.loads(said.splitlines()[-1])
    assert interrupted == {"began": True, "code": 130, "ended": True, "stages": ["zero-shot.json"]}, said
    assert "lit-merge: interrupted; run the same command again to go on" in said
    assert killed == {**interrupted, "code": -signal.SIGKILL}, said


# A stage's process


@pytest.mark.parametrize(
    ("text", "error", "refused"),
    [
        ("import sys; print('lit-merge: error: a: expected b.'); sys.exit(1)", r"^a: expected b\.$", True),
        ("import sys; print('lit-merge fit: error: no such c.'); sys.exit(2)", r"^no such c\.$", True),
        ("import sys; print('lit-merge: error: [Errno 28] No space left'); sys.exit(1)", "No space left", False),
        ("import sys; print('lit-merge: error: CUDA out of memory. Tried'); sys.exit(1)", "out of memory", False),
        (
            "raise ValueError('odd')",
            r"^the process failed with exit code 1: ValueError: odd, see .*stage\.log\.$",
            False,
        ),
        ("import os; os.kill(os.getpid(), 15)", r"was killed by signal 15 \(SIGTERM", False),
        ("pass", r"^expected the output .*out, got none, see .*stage\.log\. Run it again\.$", False),
    ],
)
def test_how_a_process_ended(tmp_path, program, text, error, refused) -> None:
    program(text)
    outcome = StageProcess(job(tmp_path / "a", "fit", outputs=("out",))).wait()
    assert isinstance(outcome.error, ConfigurationError if "sys.exit(2)" in text else LitMergeError)
    with pytest.raises(LitMergeError, match=error):
        raise outcome.error
    assert outcome.refused == refused
    assert pickle.loads(pickle.dumps(outcome)).name == "a/b"  # so that it travels through a cluster


def test_what_a_process_gets(tmp_path, program) -> None:
    text = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ['X'], sys.stdin.read()]))"
    program(f"{text}; open(sys.argv[-1], 'w').write('12345')")
    (tmp_path / "there").mkdir()
    begun = StageProcess(
        job(tmp_path / "a", "fit", "--config", str(tmp_path / "a/out"), outputs=("out",)),
        {"X": "1"},
        str(tmp_path / "there"),
    )
    assert begun.wait() == Outcome("a/b", pytest.approx(0, abs=60), sizes=(5,))
    said = json.loads((tmp_path / "a/stage.log").read_text())
    assert said == [["fit", "--config", str(tmp_path / "a/out")], str(tmp_path / "there"), "1", ""]


def test_all_that_a_process_started_ends_with_it(tmp_path, program) -> None:
    """Its child ignores the request to end, as does the process itself."""
    program(
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork();"
        "open(f'pid-{os.getpid()}', 'w').close(); time.sleep(60)"
    )
    begun = StageProcess(job(tmp_path / "a", "fit"), directory=str(tmp_path))
    until = time.monotonic() + 20
    while len(found := list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(found) == 2
    begun.end(patience=0.1)
    until = time.monotonic() + 20
    while any(running(int(path.name[4:])) for path in found) and time.monotonic() < until:
        time.sleep(0.02)
    assert not [path for path in found if running(int(path.name[4:]))]


@pytest.fixture
def forks(warm) -> Iterator[Template]:
    template = Template({"OMP_NUM_THREADS": "1"})
    yield template
    template.close()


def test_how_a_forked_stage_ended(tmp_path, forks) -> None:
    """As one that has an interpreter of its own."""
    good, refused = job(tmp_path / "a", "--version"), job(tmp_path / "b", "fit", "--config", "missing.yaml")
    both = [StageProcess(one, {}, str(tmp_path), forks) for one in (good, refused)]
    assert both[0].wait().error is None
    assert (tmp_path / "a/stage.log").read_text().split()[-1:] == [__version__]
    outcome = both[1].wait()
    assert outcome.refused
    with pytest.raises(ConfigurationError, match=r"missing\.yaml"):
        raise outcome.error
    alone = StageProcess(job(tmp_path / "c", "fit", "--config", "missing.yaml"), {}, str(tmp_path)).wait()
    assert str(alone.error) == str(outcome.error)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_without_what_stages_are_forked_from(tmp_path, forks) -> None:
    """What is known of a stage whose parent was killed is that nothing more will be heard of it."""
    begun = StageProcess(job(tmp_path / "a", "fit"), {}, str(tmp_path), forks)
    until = time.monotonic() + 20
    while os.getsid(begun._process.pid) != begun._process.pid and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(begun._process.pid, signal.SIGSTOP)
    parent = Path(f"/proc/{begun._process.pid}/stat").read_text().rpartition(")")[2].split()[1]
    assert begun.poll() is None
    os.kill(int(parent), signal.SIGKILL)
    with pytest.raises(LitMergeError, match="was killed by signal 9"):
        raise begun.wait().error
    begun.end(patience=0.1)
    until = time.monotonic() + 20
    while running(begun._process.pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not running(begun._process.pid)
    with pytest.raises(LitMergeError, match=r"stages are forked was killed\. Run the suite again\."):
        StageProcess(job(tmp_path / "b", "fit"), {}, None, forks)


def test_which_jobs_are_forked_and_from_what(tmp_path, program, monkeypatch) -> None:
    """None that repeats its command line; of a template that has ended there is another one."""
    made: list[Any] = []

    class Fake:
        is_possible = staticmethod(lambda: True)

        def __init__(self, *_: object) -> None:
            self.ended = False
            made.append(self)

        def is_alive(self) -> bool:
            return not self.ended

        def close(self) -> None:
            self.ended = True

    given: list[Any] = []
    real = local.StageProcess
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(local, "Template", Fake)
    monkeypatch.setattr(local, "StageProcess", lambda job, env, template: given.append(template) or real(job, env))
    program("pass")
    engine = LocalEngine(2)
    for number, several in enumerate((True, False, False, False)):
        one = job(tmp_path / str(number), "fit")
        engine.start(Job(one.name, one.command, one.arguments, one.folder, (), processes=several))
        assert engine.wait().error is None
        if number == 2:
            made[0].ended = True
    assert given[0] is None
    assert given[1:] == [made[0], made[0], made[1]]
    engine.close()
    assert made[1].ended


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Machines and their devices


@pytest.mark.parametrize(
    ("devices", "slots", "expected"),
    [
        ("", 2, [[], []]),
        ("0", 3, [["0"], ["0"], ["0"]]),
        ("01", 3, [["0"], ["1"], ["0"]]),
        ("0123", 2, [["0", "1"], ["2", "3"]]),
        ("01234", 2, [["0", "1"], ["2", "3", "4"]]),
        ("0123", 4, [["0"], ["1"], ["2"], ["3"]]),
    ],
)
def test_devices_are_divided(devices, slots, expected) -> None:
    assert devices_of_slots(list(devices), slots) == expected


def test_processes_divide_threads_and_devices(tmp_path, program, monkeypatch) -> None:
    program(
        "import os, sys; open(sys.argv[-1], 'w').write(' '.join(os.environ[name] for name in "
        "('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS')))"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-b,6")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    engine = LocalEngine(2)
    for name in ("a", "b"):
        assert engine.free()
        engine.start(Job(name, "fit", (str(tmp_path / name / "out"),), str(job(tmp_path / name, "fit").folder), ()))
    assert not engine.free()
    assert {engine.wait().name, engine.wait().name} == {"a", "b"}
    assert engine.free()
    assert (tmp_path / "a/out").read_text() == "4 3 3"
    assert (tmp_path / "b/out").read_text() == "GPU-b,6 3 3"
    with pytest.raises(ConfigurationError, match=r"expected 2 GPUs for each stage, as fit.trainer.devices says, got 1"):
        LocalEngine(2, devices=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    LocalEngine(2, devices=2).close()  # on processors


def test_the_number_of_cores(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "none")
    assert cores() == len(os.sched_getaffinity(0))


def test_which_engine(tmp_path) -> None:
    assert isinstance(open_engine("local", print), SequentialEngine)
    assert isinstance(open_engine("local", print, 1), SequentialEngine)
    assert isinstance(open_engine("local", print, 2), LocalEngine)
    with pytest.raises(ConfigurationError, match="parallel: expected a positive number, got 0"):
        open_engine("local", print, 0)
    with pytest.raises(ConfigurationError, match="engine: expected local or ray, got 'dask'"):
        open_engine("dask", print)
    with pytest.raises(ConfigurationError, match="ray_cpus and ray_gpus: expected a positive number"):
        open_engine("ray", print, ray_cpus=0)


def test_without_ray_or_a_cluster(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(ConfigurationError, match=r"expected the package ray, .* Run pip install lit-merge\[ray\]"):
            open_engine("ray", print)
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigurationError, match=r"expected a Ray cluster at 'auto', got none .* ray start --head"):
        open_engine("ray", print, directory=str(tmp_path))


# A cluster's machines


def test_what_a_machine_sees(tmp_path) -> None:
    (tmp_path / "marker").write_text("token")
    assert cluster._look(str(tmp_path / "marker"), str(tmp_path)) == ("token", True, __version__)
    assert cluster._look(str(tmp_path / "none"), str(tmp_path / "none")) == ("", False, __version__)


@pytest.mark.parametrize(
    ("seen", "entered", "version", "error"),
    [
        (False, True, __version__, "far, that does not see /shared/S. Work in, and write to, a shared folder"),
        (True, False, __version__, "got a machine, far, that does not see /work/here. Work in"),
        (True, True, "0.0.1", f"expected lit-merge {__version__} on every machine of the cluster, got 0.0.1 on far"),
    ],
)  # fmt: skip
def test_a_machine_that_does_not_fit_is_refused(seen, entered, version, error) -> None:
    engine = object.__new__(cluster.RayEngine)
    engine._directory = "/work/here"
    with pytest.raises(LitMergeError, match=re.escape(error)):
        engine._check_machine("far", Path("/shared/S"), seen, entered, version)
    engine._check_machine("far", Path("/shared/S"), True, True, __version__)


def test_outputs_that_are_not_seen_here(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cluster, "_UNSEEN", 0.0)
    made = job(tmp_path / "a", "fit", outputs=("out",))
    (tmp_path / "a/out").write_text("12345")
    assert cluster._all_seen(made, Outcome("a/b", 1.0, sizes=(5,)))
    assert not cluster._all_seen(made, Outcome("a/b", 1.0, sizes=(6,)))
    assert cluster._all_seen(made, Outcome("a/b", 1.0, LitMergeError("killed")))
    with pytest.raises(LitMergeError, match=r"expected the outputs in .* as they are on far, got others after 0 s"):
        raise cluster._unseen(made, Outcome("a/b", 1.0, machine="far")).error
