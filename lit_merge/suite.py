"""The whole experiment: fine-tune every task, merge with every recipe, evaluate, report.

A sequence of the ``fit``, ``merge`` and ``test`` commands. Every stage has a key, the hash of its resolved settings and
of the contents of its inputs; a stage whose record has the same key and whose outputs still have the recorded hashes is
not run again, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import yaml

from lit_merge.callbacks.writing import write_text
from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.report import accuracy_table, results_figure
from lit_merge.report.results import Results
from lit_merge.search import CoefficientSearch
from lit_merge.stages import Conductor
from lit_merge.suite_plan import Recipe, SuitePlan, combine

__all__ = ["Recipe", "suite"]


def suite(
    output: str,
    name: str = "suite",
    model: str = "lit-tiny",
    pretrained: str | None = None,
    tasks: list[str] | None = None,
    paths: dict[str, str] | None = None,
    seeds: list[int] = [0],  # noqa: B006 - a configuration default, never changed
    fit: dict[str, Any] | None = None,
    test: dict[str, Any] | None = None,
    recipes: dict[str, Recipe] | None = None,
    linearized: bool | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fine-tune every task, extract, merge with every recipe and evaluate; print a table, write JSON and a figure.

    Args:
        output: directory of everything that is written; results.json and results.png are the outcome. Run again with
            the same settings, it goes on where it stopped.
        name: of the results.
        model: architecture, as for fit.
        pretrained: its weights.
        tasks: tasks of the embedded suite; by default all eight, or none if paths are given.
        paths: the user's own image folders, by task name.
        seeds: fine-tuning seeds; every seed gives one set of task vectors.
        fit: configuration of fit (trainer, model, data); task, seed, model and output are filled in.
        test: configuration of test (trainer, data).
        recipes: name -> how to merge; by default weight averaging, and task arithmetic with a searched coefficient.
        linearized: whether models are evaluated and merged on the linearised encoder; by default as fit trains them.
            True with ordinary training is post-hoc linearisation.
        overwrite: forget what an earlier suite left in output, and start over.

    Returns:
        The content of results.json.

    Raises:
        LitMergeError: a stage refuses its input; finished stages are kept.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

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
        recipes=default if recipes is None else recipes,
        linearized=linearized,
    )
    plan.check()
    _claim(directory, yaml.safe_dump(plan.description(), sort_keys=False), overwrite)
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=plan.stages)

        def ended(line: str) -> None:
            console.print(line, highlight=False, markup=False)
            progress.advance(bar)

        conductor = Conductor(
            directory, plan.stages, ended, lambda stage: progress.update(bar, description=escape(stage))
        )
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
    outcome = ("results.json", "results.png", "timings.json") if overwrite or changed else ()
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
    console = Console()
    console.print(accuracy_table(loaded))
    console.print(accuracy_table(loaded, normalised=True))
    console.print(f"{directory / 'results.json'}\n{directory / 'results.png'}", highlight=False)
    return results


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """``{"trainer.max_steps": 3}``, as single overrides from the shell come, as nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = combine(nested, value)
    return nested
