"""Everything that docs/results.md and docs/text_results.md say of the papers' claims, from nothing, in one command.

    python benchmarks/all.py --seeds 3                                   # choose rates, run, collect, write the pages
    python benchmarks/all.py --list                                      # what would run: suites, stages
    python benchmarks/all.py --instruments text --data data --seconds 560 --no_page --collect collected

Every regime of benchmarks/experiments.yaml is a suite per fine-tuning seed, run by ``lit-merge suite`` in a process of
its own, some at a time. Before, learning rates are chosen on validation data. Goes on where it stopped: a suite that is
done is not run again, an unfinished one continues. What is large and not needed any more (task vectors, merges) is
deleted when a suite ends, unless ``--keep``; task vectors when all have, so that regimes of the same fine-tuning share
them. A regime with one rate in the file has it from an earlier choice and is not tried.

Time: measured in ``seconds`` of the collected JSON. Disk: the vectors of the suites that run at a time, up to forty of
them, in 32 bits: with lit-tiny 0.5 GB a suite, with MiniLM 4 GB; afterwards some MB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from claims_page import write_pages
from collected import COLLECTED, collect
from suites import ROOT, Regime, every
from suites import regimes as regimes_of
from widened import slow, widen

from lit_merge.files.text import write_text

NEAR = 0.005
"""The smallest rate whose individual models are within this of the best is taken."""
LARGE = ("seed-*/joint/fit/*.safetensors", "seed-*/merge/*/merged.safetensors")
VECTORS = "seed-*/fit/*/*.safetensors"
WIDENED = Path(__file__).parent / "widened.py"


@dataclass
class Run:
    """One call: where things are, how many at a time, and until when.

    Args:
        output: folder of all suites.
        data: folder of prepared texts and networks.
        parallel: processes at a time.
        seconds: nothing is started later than this, and what runs then is ended; None for no limit.
        steps: in place of the suites' numbers of steps, for a trial.
        keep: whether vectors and merged weights stay.
    """

    output: Path
    data: str
    parallel: int
    seconds: float | None = None
    steps: int | None = None
    keep: bool = False
    started: float = field(default_factory=time.monotonic)

    @cached_property
    def widened(self) -> bool:
        """Whether products of bfloat16 are computed in float32, as this processor has no units for them."""
        return slow()

    def left(self) -> float | None:
        """Seconds until the end; None without a limit."""
        return None if self.seconds is None else self.seconds - (time.monotonic() - self.started)

    def over(self) -> bool:
        """Whether nothing more is to be started."""
        left = self.left()
        return left is not None and left <= 0

    def folder(self, regime: Regime) -> Path:
        """Of a regime's suites."""
        return self.output / regime.instrument / regime.name

    def choices(self, instrument: str) -> dict[str, Any]:
        """Regime -> rate and what was tried, as far as it is known."""
        path = self.output / instrument / "rates.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def suite(self, regime: Regime, seeds: list[int], rate: float) -> dict[str, Any]:
        """A suite's configuration; of a trial a short one."""
        found = regime.suite(seeds, rate, self.data)
        if self.steps is not None:
            found["fit"]["trainer"]["max_steps"] = self.steps
            for part in (found.get("joint"), *found["recipes"].values()):
                if isinstance(part, dict) and "trainer" in part:
                    part["trainer"] = {"max_steps": self.steps}
        return found


def prepare(run: Run, regimes: list[Regime]) -> None:
    """Draw the embedded tasks once, before several processes would."""
    from lit_merge.data import MultiTaskDataModule

    for regime in {regime.instrument: regime for regime in regimes}.values():
        arguments = regime.plan(run.suite(regime, [0], 0.0)).all_data()["init_args"]
        MultiTaskDataModule(**{key: value for key, value in arguments.items() if value is not None}).prepare_data()


def fitted(job: tuple[Run, Regime, float, str]) -> dict[str, Any]:
    """Fine-tune one task at one rate, seed 0; its accuracy on validation data."""
    run, regime, rate, task = job
    folder = run.output / regime.instrument / "rates" / regime.name / f"{rate:g}-{task}"
    suite = run.suite(regime, [0], rate)
    if run.widened:
        widen()
    with _said_in(folder):
        from lit_merge.commands.running import run_command
        from lit_merge.evaluation.search import silent_trainer

        config = folder / "fit.yaml"
        write_text(config, yaml.safe_dump(regime.plan(suite).fit_config(0, task)))
        cli = run_command("fit", ["--config", str(config), "--output", str(folder / "run"), "--overwrite", "true"])
        evaluator = silent_trainer()
        evaluator.validate(cli.model, cli.datamodule, verbose=False)
        accuracy = round(float(evaluator.callback_metrics["val/accuracy"]), 5)
        shutil.rmtree(folder / "run")
    return {"regime": regime.key, "rate": rate, "task": task, "accuracy": accuracy}


def choose(run: Run, regimes: list[Regime]) -> None:
    """The learning rates of all regimes that are not known yet."""
    fits = []
    for instrument in dict.fromkeys(regime.instrument for regime in regimes):
        known = run.choices(instrument)
        own = [regime for regime in regimes if regime.instrument == instrument]
        given = {one.rate_of: {"rate": one.rates[0], "tried": {}} for one in own if len(one.rates) == 1}
        if given:
            write_text(run.output / instrument / "rates.json", json.dumps({**known, **given}, indent=1) + "\n")
        asked = dict.fromkeys(regime.rate_of for regime in own if regime.rate_of not in given)
        for name in [name for name in asked if name not in known]:
            regime = _with_rates(instrument, name, regimes)
            tasks = regime.of_instrument["choice_tasks"]
            fits += [(run, regime, rate, task) for rate in regime.rates for task in tasks]
    rows = list(_mapped(run, fitted, fits))
    for regime in dict.fromkeys(regime for _, regime, *_ in fits):
        own = [row for row in rows if row["regime"] == regime.key]
        found = {**run.choices(regime.instrument), regime.rate_of: _chosen(regime, own)}
        write_text(run.output / regime.instrument / "rates.json", json.dumps(found, indent=1) + "\n")


def _with_rates(instrument: str, name: str, regimes: list[Regime]) -> Regime:
    """A regime whose learning rate is chosen under that name: the one itself, or the first that takes it over."""
    taking = [one for one in regimes if one.instrument == instrument and one.rate_of == name]
    return next((one for one in taking if one.name == name), taking[0])


def _chosen(regime: Regime, rows: list[dict[str, Any]]) -> dict[str, Any]:
    tried = {rate: mean(row["accuracy"] for row in rows if row["rate"] == rate) for rate in regime.rates}
    best = max(tried.values())
    rate = min(rate for rate, accuracy in tried.items() if accuracy >= best - NEAR)
    return {"rate": rate, "tried": {f"{rate:g}": round(accuracy, 4) for rate, accuracy in tried.items()}}


def run_suites(run: Run, regimes: list[Regime], seeds: list[int]) -> list[str]:
    """Run what is not done yet, the first regimes first; returns the names of those that failed."""
    jobs = [(regime, seed) for regime in regimes for seed in seeds]
    failed: list[str] = []
    lock = threading.Lock()

    def one(job: tuple[Regime, int]) -> None:
        regime, seed = job
        folder = run.folder(regime) / f"seed-{seed}"
        rate = run.choices(regime.instrument)[regime.rate_of]["rate"]
        suite = run.suite(regime, [seed], rate)
        text = yaml.safe_dump(suite, sort_keys=False)
        done = folder.with_suffix(".done")
        take_over(run, regime, seed, folder)
        if run.over() or (done.exists() and done.read_text(encoding="utf-8") == text):
            return
        config = folder.with_suffix(".yaml")
        write_text(config, text)
        started = time.monotonic()
        ended = _suite_process(run, config, folder)
        with lock:
            print(f"{regime.key} seed {seed}: {ended}, {time.monotonic() - started:.0f} s", flush=True)
            if ended != "done":
                failed.append(f"{regime.key} seed {seed}")
        if ended == "done":
            seconds = json.loads((folder / "timings.json").read_text(encoding="utf-8"))
            write_text(folder.with_suffix(".seconds"), json.dumps(round(sum(seconds.values()), 1)))
            for pattern in () if run.keep else LARGE:
                for path in folder.glob(pattern):
                    path.unlink()
            write_text(done, text)

    for regime, _ in jobs:
        run.folder(regime).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(run.parallel) as pool:
        list(pool.map(one, jobs))
    for regime, seed in () if run.keep or failed or run.over() else jobs:
        for path in (run.folder(regime) / f"seed-{seed}").glob(VECTORS):
            path.unlink()
    return failed


def take_over(run: Run, regime: Regime, seed: int, folder: Path) -> None:
    """Link the vectors of another regime of the same fine-tuning, if one is done: a suite finds its own stages done."""
    if (folder / "stages").exists():
        return
    for name in regimes_of(regime.instrument):
        other = Regime(regime.instrument, name)
        source = run.folder(other) / f"seed-{seed}"
        same = name != regime.name and (other.rate_of, other.fit(0.0)) == (regime.rate_of, regime.fit(0.0))
        if not same or not source.with_suffix(".done").exists() or not any(source.glob(VECTORS)):
            continue
        for part in ("zero-shot", f"seed-{seed}/fit", f"seed-{seed}/individual"):
            shutil.copytree(source / part, folder / part, copy_function=os.link)
        for stage in (source / "stages").glob("*.json"):
            if stage.name.startswith(("zero-shot", f"seed-{seed}--fit--", f"seed-{seed}--individual--")):
                (folder / "stages").mkdir(exist_ok=True)
                shutil.copy(stage, folder / "stages" / stage.name)
        return


def _suite_process(run: Run, config: Path, folder: Path) -> str:
    """How ``lit-merge suite`` ended: done, failed, or stopped at the limit."""
    program = [str(WIDENED)] if run.widened else ["-m", "lit_merge"]
    command = [sys.executable, *program, "suite", "--config", str(config), "--output", str(folder)]
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "160"})
        while process.poll() is None:
            if run.over():
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return "stopped at the limit"
            time.sleep(0.2)
    return "done" if process.returncode == 0 else f"failed, see {folder.with_suffix('.log')}"


def _mapped(run: Run, function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
    """The results of jobs in processes of their own."""
    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(min(run.parallel, len(jobs))) as pool:
        yield from pool.imap_unordered(function, jobs, chunksize=1)


@contextmanager
def _said_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


def listed(regimes: Iterable[Regime], seeds: list[int], run: Run) -> str:
    """Suites and stages, by instrument and regime."""
    lines, total = [], 0
    for regime in regimes:
        count = regime.stages(run.suite(regime, seeds, 0.0)) * len(seeds)
        total += count
        lines.append(f"{regime.key}: {len(seeds)} suites, {count} stages")
    return "\n".join([*lines, f"{total} stages"])


def main() -> None:
    """Choose, run, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many fine-tuning seeds")
    parser.add_argument("--first_seed", type=int, default=0, help="leave out the seeds before it, collected earlier")
    parser.add_argument("--instruments", nargs="+", help="all of experiments.yaml by default")
    parser.add_argument("--regimes", nargs="+", help="all by default")
    parser.add_argument("--output", type=Path, default=Path("runs/all"))
    parser.add_argument("--data", default="data", help="the folder of prepared texts and networks")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="suites at a time")
    parser.add_argument("--seconds", type=float, help="stop after so many, to go on in another call")
    parser.add_argument("--steps", type=int, help="of every training, for a trial")
    parser.add_argument("--keep", action="store_true", help="keep task vectors and merged weights")
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--collect", type=Path, default=COLLECTED, help="folder of the hits and the JSON")
    parser.add_argument("--no_page", action="store_true", help="do not write the pages of docs")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["LIT_MERGE_DATA"] = data = str(Path(options.data).resolve())
    run = Run(options.output, data, options.parallel, options.seconds, options.steps, options.keep)
    regimes, seeds = list(every(options.instruments, options.regimes)), list(range(options.first_seed, options.seeds))
    if options.list:
        print(listed(regimes, seeds, run))
        return
    prepare(run, regimes)
    choose(run, regimes)
    failed = run_suites(run, regimes, seeds)
    for instrument in dict.fromkeys(regime.instrument for regime in regimes):
        own = [regime for regime in regimes if regime.instrument == instrument]
        folders = {regime: [run.folder(regime) / f"seed-{seed}" for seed in seeds] for regime in own}
        print(collect(instrument, folders, run.choices(instrument), options.collect, run.widened), flush=True)
    if not options.no_page:
        write_pages()
    print(f"{time.monotonic() - run.started:.0f} s; output in {ROOT.joinpath(options.collect)}")
    if failed:
        sys.exit(f"not done: {', '.join(failed)}. Run the same command again.")


if __name__ == "__main__":
    main()
