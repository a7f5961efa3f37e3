"""The whole experiment: fine-tune every task, merge with every recipe, evaluate, report.

A graph of ``fit``, ``statistics``, ``merge`` and ``test`` commands. Every stage has a key, the hash of its resolved
settings and of the contents of its inputs; a stage whose record has the same key and whose outputs still have the
recorded hashes is not run again, so that a killed run goes on where it stopped. Stages that do not depend on each other
may run at the same time, here or on a cluster.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.evaluation.search import CoefficientSearch
from lit_merge.files.text import write_text
from lit_merge.report import accuracy_table, report, results_figure
from lit_merge.report.results import Results
from lit_merge.suite.engines import open_engine
from lit_merge.suite.plan import SuitePlan
from lit_merge.suite.recipe import Recipe
from lit_merge.suite.scheduler import Conductor
from lit_merge.suite.settings import combine

__all__ = ["Recipe", "suite"]


# Parts of other commands' configurations are plain dictionaries: the parser would build the classes in dict[str, Any].
def suite(
    output: str,
    name: str = "suite",
    model: str = "lit-tiny",
    pretrained: str | None = None,
    tasks: list[str] | None = None,
    paths: dict[str, str] | None = None,
    seeds: list[int] = [0],  # noqa: B006 - a configuration default, never changed
    fit: dict | None = None,
    test: dict | None = None,
    recipes: dict[str, Recipe | None] | None = None,
    linearized: bool | None = None,
    joint: dict | None = None,
    data: dict | None = None,
    overwrite: bool = False,
    engine: Literal["local", "ray"] = "local",
    parallel: int | None = None,
    retries: int = 1,
    ray_address: str = "auto",
    ray_cpus: int = 1,
    ray_gpus: float | None = None,
) -> dict[str, Any]:
    """Fine-tune every task, extract, merge with every recipe and evaluate; print a table, write JSON and a figure.

    Args:
        output: directory of everything that is written; the outcome is results.json, results.png and report.html. Run
            again with the same settings, it goes on where it stopped.
        name: of the results.
        model: architecture, as for fit.
        pretrained: its weights.
        tasks: tasks of the embedded suite or published data sets; by default the embedded eight, or none if paths are
            given.
        paths: the user's own image folders, by task name.
        seeds: fine-tuning seeds; every seed gives one set of task vectors.
        fit: configuration of fit (trainer, model, data); task, seed, model and output are filled in.
        test: configuration of test (trainer, data).
        recipes: name -> how to merge, null to leave it out; by default weight averaging, and task arithmetic with a
            searched coefficient.
        linearized: whether models are evaluated and merged on the linearised encoder; by default as fit trains them.
            True with ordinary training is post-hoc linearisation.
        joint: configuration of fit (trainer, model, data) for one model that is fine-tuned on all tasks jointly, as a
            further reference; null for none.
        data: settings of the data modules of all stages, e.g. {root: /data, workers: 8}.
        overwrite: forget what an earlier suite left in output, and start over.
        engine: where stages run: local, on this machine, or ray, on the machines of a Ray cluster, which share a file
            system. The results are the same.
        parallel: how many stages at a time; null for one, and on Ray for as many as the cluster takes.
        retries: how often a stage that was killed or broke off is tried again.
        ray_address: auto for the cluster that this machine belongs to, HOST:PORT, or local to start one here.
        ray_cpus: cores that a stage takes of the cluster.
        ray_gpus: GPUs that a stage takes per device; null for 1 where the cluster has GPUs. 0.5 lets two stages share
            one.

    Returns:
        The content of results.json.

    Raises:
        LitMergeError: stages have failed; what does not depend on them is finished, and kept.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from lit_merge.commands.running import run_command
    from lit_merge.commands.training.lightning_cli import check_configuration

    directory = Path(output)
    _refuse_other_files(directory)
    default = {
        "weight_average": Recipe("weight_average"),
        "task_arithmetic": Recipe("task_arithmetic", search=CoefficientSearch()),
    }
    plan = SuitePlan(
        name=name,
        directory=directory,
        model=model,
        pretrained=pretrained,
        tasks=_task_names(tasks, paths),
        paths=dict(paths or {}),
        seeds=list(seeds),
        fit=_nested(fit or {}),
        test=_nested(test or {}),
        recipes=default if recipes is None else {name: one for name, one in recipes.items() if one is not None},
        linearized=linearized,
        joint=None if joint is None else _nested(joint),
        data=_nested(data or {}),
    )
    if retries < 0:
        raise ConfigurationError(f"retries: expected a number of at least 0, got {retries}. Change it.")
    plan.check(check_configuration)
    stages = plan.stages
    if engine == "ray" or parallel not in (None, 1):
        plan.data_module().prepare_data()  # once, not in every process
    runner = open_engine(engine, run_command, parallel, output, plan.devices, ray_address, ray_cpus, ray_gpus)
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with closing(runner), Progress(*columns, console=console, transient=True) as progress:
        _claim(directory, yaml.safe_dump(plan.description(), sort_keys=False), overwrite)
        bar = progress.add_task("", total=len(stages))

        def ended(line: str) -> None:
            console.print(line, highlight=False, markup=False)
            progress.update(bar, completed=len(conductor.seconds))

        def started(names: str) -> None:
            progress.update(bar, description=escape(names))

        conductor = Conductor(directory, len(stages), ended, runner, started, retries)
        results = plan.run(conductor)
    write_text(directory / "timings.json", json.dumps(conductor.seconds, indent=2) + "\n")
    return _publish(results, directory)


def _refuse_other_files(directory: Path) -> None:
    if directory.exists() and not (directory / "stages").is_dir() and (directory.is_file() or any(directory.iterdir())):
        raise ConfigurationError(
            f"output: expected a new folder or one that a suite wrote, got {directory}, which holds something else. "
            "Choose another output."
        )


def _claim(directory: Path, config: str, overwrite: bool) -> None:
    """Make the directory a suite's, and remove what does not hold any more."""
    try:
        (directory / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"output: expected a folder that can be created, got {directory} ({error.strerror}). Choose another."
        ) from error
    path = directory / "suite.yaml"
    changed = not path.exists() or path.read_text(encoding="utf-8") != config
    outcome = ("results.json", "results.png", "report.html", "timings.json") if overwrite or changed else ()
    for name in (*outcome, *(("stages", "zero-shot", "seed-*") if overwrite else ())):
        for found in directory.glob(name):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    write_text(path, config)


def _task_names(tasks: list[str] | None, paths: dict[str, str] | None) -> list[str]:
    from lit_merge.data.embedded.tasks import EMBEDDED_TASKS

    chosen = list(tasks) if tasks is not None else ([] if paths else list(EMBEDDED_TASKS))
    twice = [task for task in chosen if task in (paths or {})] + sorted(
        {task for task in chosen if chosen.count(task) > 1}
    )
    if twice:
        raise ConfigurationError(f"tasks: expected every task once, got {twice[0]!r} twice. Rename or remove one.")
    return [*chosen, *(paths or {})]


def _publish(results: dict[str, Any], directory: Path) -> dict[str, Any]:
    from rich.console import Console

    if any(not math.isfinite(value) for value in results["zero_shot"].values()):
        raise LitMergeError("results: expected finite accuracies, got NaN for the zero-shot model.")
    loaded = Results.from_dict(results)
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    results_figure(loaded, directory / "results.png")
    report(str(directory))
    console = Console()
    console.print(accuracy_table(loaded))
    console.print(accuracy_table(loaded, normalised=True))
    for name in ("results.json", "results.png", "report.html"):
        console.print(str(directory / name), highlight=False)
    return results


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """``{"trainer.max_steps": 3}``, as single overrides from the shell come, as nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = combine(nested, value)
    return nested
