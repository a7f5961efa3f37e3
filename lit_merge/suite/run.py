"""A suite from its plan to its report: the output is locked, stages run, what came out is written and shown."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.files.text import write_text
from lit_merge.files.yaml_text import dump_yaml
from lit_merge.report import accuracy_table, report, results_figure
from lit_merge.report.results import Results
from lit_merge.suite.engines import Engine
from lit_merge.suite.lock import LOCK, locked
from lit_merge.suite.plan import SuitePlan
from lit_merge.suite.scheduler import Scheduler

__all__ = ["refuse_other_files", "run_suite"]

_OUTCOME = ("results.json", "results.png", "report.html")


def run_suite(
    plan: SuitePlan, open_engine: Callable[[], Engine], overwrite: bool = False, retries: int = 1
) -> dict[str, Any]:
    """Run what is not done yet, then write the results, their figure and the report, and print the tables.

    Args:
        plan: a checked one.
        open_engine: makes what runs the stages; it is closed at the end.
        overwrite: forget what an earlier suite left in the output.
        retries: how often a stage that was killed or broke off is tried again.

    Returns:
        The content of results.json.

    Raises:
        LitMergeError: another suite holds the output, or stages have failed; what does not depend on them is finished.
    """
    directory = plan.directory
    with locked(directory):
        stages = plan.stages
        engine = open_engine()
        try:
            _claim(directory, dump_yaml(plan.description()), overwrite)
            with _progress() as progress:
                bar = progress.add_task("", total=len(stages))

                def ended(line: str) -> None:
                    progress.console.print(line, highlight=False, markup=False)
                    progress.update(bar, completed=len(scheduler.seconds))

                def started(names: str) -> None:
                    progress.update(bar, description=escape(names))

                scheduler = Scheduler(directory, len(stages), ended, engine, started, retries)
                results = plan.run(scheduler)
        finally:
            engine.close()
        write_text(directory / "timings.json", json.dumps(scheduler.seconds, indent=2) + "\n")
        return _publish(results, directory)


def refuse_other_files(directory: Path) -> None:
    """Refuse an output that is neither new nor a suite's.

    Raises:
        ConfigurationError: it holds something else.
    """
    if not directory.exists() or (directory / "stages").is_dir():
        return
    if directory.is_file() or any(path.name != LOCK for path in directory.iterdir()):
        raise ConfigurationError(
            f"output: expected a new folder or one that a suite wrote, got {directory}, which holds something else. "
            "Choose another output."
        )


def _claim(directory: Path, config: str, overwrite: bool) -> None:
    """Make the directory a suite's, and remove what does not hold any more."""
    refuse_other_files(directory)
    (directory / "stages").mkdir(parents=True, exist_ok=True)
    path = directory / "suite.yaml"
    changed = not path.exists() or path.read_text(encoding="utf-8") != config
    outcome = (*_OUTCOME, "timings.json") if overwrite or changed else ()
    for name in (*outcome, *(("stages", "zero-shot", "seed-*", "digests.json") if overwrite else ())):
        for found in directory.glob(name):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    write_text(path, config)


def _progress() -> Progress:
    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)  # as it is now: stages in this process write to their logs
    return Progress(*columns, TextColumn("{task.description}"), console=console, transient=True)


def _publish(results: dict[str, Any], directory: Path) -> dict[str, Any]:
    if any(not math.isfinite(value) for value in results["zero_shot"].values()):
        raise LitMergeError("results: expected finite accuracies, got NaN for the zero-shot model.")
    loaded = Results.from_dict(results)
    path, text = directory / "results.json", json.dumps(results, indent=2) + "\n"
    drawn = [directory / name for name in _OUTCOME if name != path.name]
    if not all(one.is_file() for one in (path, *drawn)) or path.read_text(encoding="utf-8") != text:
        for one in drawn:  # which would be taken for those of these results if this is interrupted
            one.unlink(missing_ok=True)
        write_text(path, text)
        results_figure(loaded, directory / "results.png")
        report(str(directory))
    console = Console()
    console.print(accuracy_table(loaded))
    console.print(accuracy_table(loaded, normalised=True))
    for name in _OUTCOME:
        console.print(str(directory / name), highlight=False)
    return results
