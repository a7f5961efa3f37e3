"""The whole experiment: fine-tune every task, merge with every recipe, evaluate, report.

A conductor of the ``fit``, ``merge`` and ``test`` commands. Every stage has a key, the hash of its resolved settings and
of the contents of its inputs; a stage whose record has the same key and whose outputs still have the recorded hashes is
not run again, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_merge._version import __version__
from lit_merge.callbacks.writing import write_text
from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.search import CoefficientSearch, quiet
from lit_merge.vectors import TaskVector, file_digest

__all__ = ["Recipe", "StageRecord", "suite"]


@dataclass(frozen=True)
class Recipe:
    """A way to merge.

    Args:
        recipe: name of a method of :data:`lit_merge.transforms.RECIPES`.
        settings: its arguments.
        transform: instead, a transform as ``class_path`` and ``init_args``.
        search: the grid of one of its fields, chosen on validation data.
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    transform: dict[str, Any] | None = None
    search: CoefficientSearch | None = None


@dataclass
class StageRecord:
    """What a finished stage left: its key, and the hashes of its outputs by path relative to the suite's directory."""

    key: str
    outputs: dict[str, str]
    seconds: float


class Conductor:
    """Runs stages once: a stage that is recorded, with the same key and intact outputs, is skipped.

    Args:
        directory: the suite's directory.
        report: called with a line for every stage.
    """

    def __init__(self, directory: Path, report: Callable[[str], None]) -> None:
        self.directory = directory
        self.report = report
        self.done = 0
        self.total = 0

    def stage(self, name: str, settings: Any, inputs: list[Path], work: Callable[[Path], list[Path]]) -> list[Path]:
        """Run ``work(folder)``, or skip it; returns its output files.

        Args:
            name: of the stage and of its folder, e.g. ``seed-0/fit/digits``.
            settings: everything that determines the outcome, as plain data.
            inputs: files that it reads; their contents are part of the key.
            work: writes into the folder, which exists and is empty, and returns the files that count.
        """
        self.done += 1
        relevant = {"stage": name, "settings": settings, "inputs": [file_digest(path) for path in inputs], "version": __version__}
        key = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
        record_path = self.directory / "stages" / f"{name.replace('/', '--')}.json"
        record = self._read(record_path)
        if record is not None and record.key == key and self._intact(record):
            self.report(f"[{self.done}/{self.total}] {name}: done before")
            return [self.directory / path for path in record.outputs]
        record_path.unlink(missing_ok=True)
        folder = self.directory / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started = time.perf_counter()
        outputs = work(folder)
        seconds = time.perf_counter() - started
        digests = {str(path.relative_to(self.directory)): file_digest(path) for path in outputs}
        write_text(record_path, json.dumps(asdict(StageRecord(key, digests, round(seconds, 2))), indent=2) + "\n")
        self.report(f"[{self.done}/{self.total}] {name}: {seconds:.1f} s")
        return outputs

    def _intact(self, record: StageRecord) -> bool:
        paths = {self.directory / path: digest for path, digest in record.outputs.items()}
        return all(path.is_file() and file_digest(path) == digest for path, digest in paths.items())

    @staticmethod
    def _read(path: Path) -> StageRecord | None:
        try:
            return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # missing or cut off in the middle: the stage runs again


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
        overwrite: forget what an earlier suite left in output, and start over.

    Returns:
        The content of results.json.

    Raises:
        LitMergeError: a stage refuses its input; finished stages are kept.
    """
    from rich.console import Console

    directory = Path(output)
    if overwrite:
        _clear(directory)
    elif directory.exists() and any(directory.iterdir()) and not (directory / "suite.yaml").exists():
        raise ConfigurationError(
            f"output: expected a new folder or one that a suite wrote, got {output}, which holds other files. "
            "Choose another output."
        )
    default = {"weight_average": Recipe("weight_average"), "task_arithmetic": Recipe("task_arithmetic", search=CoefficientSearch())}
    plan = _Plan(
        name=name,
        directory=directory,
        model=model,
        pretrained=pretrained,
        tasks=_task_names(tasks, paths),
        paths=dict(paths or {}),
        seeds=list(seeds),
        fit=fit or {},
        test=test or {},
        recipes=default if recipes is None else recipes,
    )
    write_text(directory / "suite.yaml", yaml.safe_dump(plan.description(), sort_keys=False))
    console = Console(stderr=True)
    results = plan.run(lambda line: console.print(line, highlight=False))
    return _publish(results, directory)


def _task_names(tasks: list[str] | None, paths: dict[str, str] | None) -> list[str]:
    from lit_merge.data.embedded.tasks import EMBEDDED_TASKS

    chosen = list(tasks) if tasks is not None else ([] if paths else list(EMBEDDED_TASKS))
    twice = [task for task in chosen if task in (paths or {})] + sorted({task for task in chosen if chosen.count(task) > 1})
    if twice:
        raise ConfigurationError(f"tasks: expected every task once, got {twice[0]!r} twice. Rename or remove one.")
    return [*chosen, *(paths or {})]


def _clear(directory: Path) -> None:
    if directory.exists() and not (directory / "suite.yaml").exists() and any(directory.iterdir()):
        raise ConfigurationError(f"output: expected a folder that a suite wrote, got {directory}. Remove it by hand.")
    shutil.rmtree(directory, ignore_errors=True)


@dataclass
class _Plan:
    """The stages of a suite and what they depend on."""

    name: str
    directory: Path
    model: str
    pretrained: str | None
    tasks: list[str]
    paths: dict[str, str]
    seeds: list[int]
    fit: dict[str, Any]
    test: dict[str, Any]
    recipes: dict[str, Recipe]

    def description(self) -> dict[str, Any]:
        """The resolved settings as plain data."""
        values = {key: getattr(self, key) for key in ("name", "model", "pretrained", "tasks", "paths", "seeds", "fit", "test")}
        return json.loads(json.dumps({**values, "recipes": {name: asdict(recipe) for name, recipe in self.recipes.items()}}))

    def run(self, report: Callable[[str], None]) -> dict[str, Any]:
        """All stages in order; returns the results."""
        from lit_merge.models.encoder import load_clip

        clip = load_clip(self.model, self.pretrained)
        base = {"model": self.model, "pretrained": self.pretrained, "fingerprint": clip.fingerprint}
        conductor = Conductor(self.directory, report)
        conductor.total = 1 + len(self.seeds) * (2 * len(self.tasks) + 2 * len(self.recipes))
        results: dict[str, Any] = {
            "schema": 1,
            "name": self.name,
            "model": {
                "name": clip.name,
                "fingerprint": clip.fingerprint,
                "parameters": sum(parameter.numel() for parameter in clip.visual.parameters()),
            },
            "tasks": self.tasks,
            "classes": {task: len(data.classes) for task, data in self._data().tasks.items()},
            "evaluated_on": "test",
            "coefficients_chosen_on": "val",
            "settings": {"fit": self.fit, "recipes": self.description()["recipes"]},
            "versions": versions(),
            "hardware": hardware(),
        }
        results["zero_shot"] = self._test_all(conductor, "zero-shot", base, None)
        results["seeds"] = {str(seed): self._seed(conductor, seed, base) for seed in self.seeds}
        return results

    def _seed(self, conductor: Conductor, seed: int, base: dict[str, Any]) -> dict[str, Any]:
        vectors = {task: self._fit(conductor, seed, task, base) for task in self.tasks}
        individual = {task: self._test_one(conductor, seed, task, vectors[task], base) for task in self.tasks}
        merged = {name: self._merge(conductor, seed, name, list(vectors.values()), base) for name in self.recipes}
        loaded = [TaskVector.load(path) for path in vectors.values()]
        return {
            "individual": individual,
            "task_vectors": {vector.task: _describe(vector) for vector in loaded},
            "cosine_similarity": [[round(one.cosine_similarity(other), 6) for other in loaded] for one in loaded],
            "merged": merged,
        }

    def _fit(self, conductor: Conductor, seed: int, task: str, base: dict[str, Any]) -> Path:
        config = _combine(
            {"trainer": _TRAINER, "model": {"class_path": "lit_merge.modules.FineTuneModule"}, "data": {}},
            self.fit,
            {
                "seed_everything": seed,
                "model": {"init_args": {"model": self.model, "pretrained": self.pretrained}},
                "data": self._task_data(task, seed),
            },
        )

        def work(folder: Path) -> list[Path]:
            self._command("fit", config, folder)
            return [folder / "task_vector.safetensors"]

        return conductor.stage(f"seed-{seed}/fit/{task}", {**base, "config": config}, [], work)[0]

    def _test_one(self, conductor: Conductor, seed: int, task: str, vector: Path, base: dict[str, Any]) -> float:
        init = {"model": self.model, "pretrained": self.pretrained, "task_vector": str(vector)}
        fixed = {
            "trainer": _TRAINER,
            "model": {"class_path": "lit_merge.modules.FineTuneModule", "init_args": init},
            "data": self._task_data(task, seed),
        }
        config = _combine(fixed, self.test)
        metrics = self._test(conductor, f"seed-{seed}/test/individual/{task}", config, base, [vector])
        return metrics["test/accuracy"]

    def _merge(self, conductor: Conductor, seed: int, name: str, vectors: list[Path], base: dict[str, Any]) -> dict[str, Any]:
        recipe = self.recipes[name]
        config = {
            "vectors": [str(path) for path in vectors],
            "model": self.model,
            "pretrained": self.pretrained,
            "kind": "task_vector",
            "recipe": recipe.recipe,
            "settings": recipe.settings or None,
            "transform": recipe.transform,
            "search": asdict(recipe.search) if recipe.search else None,
            "data": {"class_path": "lit_merge.data.MultiTaskDataModule", "init_args": self._all_data()} if recipe.search else None,
        }

        def work(folder: Path) -> list[Path]:
            self._command("merge", {**config, "output": str(folder / "merged.safetensors")}, folder)
            search = [folder / "merged-search.json"] if recipe.search else []
            return [folder / "merged.safetensors", *search]

        merged, *search = conductor.stage(f"seed-{seed}/merge/{name}", {**base, "config": {**config, "vectors": None}}, vectors, work)
        header = TaskVector.load(merged).metadata
        curve = json.loads(search[0].read_text(encoding="utf-8")) if search else None
        return {
            "transform": header["transform"],
            "coefficient": curve["best"] if curve else recipe.settings.get("coefficient"),
            "search": {key: curve[key] for key in ("values", "normalised", "absolute")} if curve else None,
            "accuracy": self._test_all(conductor, f"seed-{seed}/test/{name}", base, merged),
        }

    def _test_all(self, conductor: Conductor, name: str, base: dict[str, Any], vector: Path | None) -> dict[str, float]:
        init = {"model": self.model, "pretrained": self.pretrained, "task_vector": str(vector) if vector else None}
        fixed = {
            "trainer": _TRAINER,
            "model": {"class_path": "lit_merge.modules.MultiTaskModule", "init_args": init},
            "data": {"class_path": "lit_merge.data.MultiTaskDataModule", "init_args": self._all_data()},
        }
        config = _combine(fixed, self.test)
        metrics = self._test(conductor, name, config, base, [vector] if vector else [])
        return {task: metrics[f"test/{task}/accuracy"] for task in self.tasks}

    def _test(
        self, conductor: Conductor, name: str, config: dict[str, Any], base: dict[str, Any], inputs: list[Path]
    ) -> dict[str, float]:
        def work(folder: Path) -> list[Path]:
            self._command("test", config, folder)
            return [folder / "test_metrics.json"]

        settings = json.loads(json.dumps(config))
        settings["model"]["init_args"]["task_vector"] = None  # its content counts, not its place
        path = conductor.stage(name, {**base, "config": settings}, inputs, work)[0]
        return {key: round(value, 6) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}

    def _task_data(self, task: str, seed: int) -> dict[str, Any]:
        place = {"path": self.paths[task]} if task in self.paths else {"task": task}
        return {"class_path": "lit_merge.data.TaskDataModule", "init_args": {**place, "seed": seed}}

    def _all_data(self) -> dict[str, Any]:
        return {"tasks": [task for task in self.tasks if task not in self.paths], "paths": self.paths or None}

    def _data(self) -> Any:
        from lit_merge.data.multitask import MultiTaskDataModule

        data = MultiTaskDataModule(**self._all_data())
        data.prepare_data()
        return data

    def _command(self, command: str, config: dict[str, Any], folder: Path) -> None:
        """Run a command as a user would, from a configuration file, in this process."""
        from lit_merge.cli import run

        path = folder / "stage.yaml"
        write_text(path, yaml.safe_dump(config, sort_keys=False))
        arguments = [command, "--config", str(path)]
        if command != "merge":
            arguments += ["--output", str(folder)]
        devices = str(config.get("trainer", {}).get("devices", 1))
        if devices != "1" and command != "merge":
            self._subprocess(arguments)
            return
        try:
            with quiet(), redirect_stdout(StringIO()):
                run(arguments)
        except SystemExit as error:  # the parser has said on the standard error what is wrong
            raise ConfigurationError(f"{command}: the configuration {path} was refused, see the line above.") from error

    @staticmethod
    def _subprocess(arguments: list[str]) -> None:
        """Several devices: Lightning starts a process for each by repeating the command line."""
        import subprocess

        done = subprocess.run([sys.executable, "-m", "lit_merge", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            last = next((line for line in reversed(lines) if "error:" in line), lines[-1] if lines else "no message")
            raise LitMergeError(f"{arguments[0]} failed with exit code {done.returncode}: {last.removeprefix('lit-merge: error: ')}")


_TRAINER = {
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "check_val_every_n_epoch": None,
    "val_check_interval": None,
    "limit_val_batches": 0,
}


def _combine(*parts: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries, later ones over earlier ones."""
    combined: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            inner = combined.get(key)
            combined[key] = _combine(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return combined


def _describe(vector: TaskVector) -> dict[str, Any]:
    return {
        "norm": round(vector.norm(), 6),
        "relative_norm": float(vector.metadata["relative_norm"]),
        "steps": int(vector.metadata["step"]),
    }


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import lightning
    import open_clip

    return {
        "lit_merge": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "open_clip": open_clip.__version__,
    }


def hardware() -> dict[str, Any]:
    """The machine: processor, cores, accelerator."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"processor": processor, "cores": os.cpu_count(), "accelerator": accelerator}


def _publish(results: dict[str, Any], directory: Path) -> dict[str, Any]:
    from rich.console import Console

    from lit_merge.report import Results, accuracy_table, results_figure

    if any(not math.isfinite(value) for value in results["zero_shot"].values()):
        raise LitMergeError("results: expected finite accuracies, got NaN for the zero-shot model.")
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    loaded = Results.from_dict(results)
    results_figure(loaded, directory / "results.png")
    console = Console()
    console.print(accuracy_table(loaded))
    console.print(accuracy_table(loaded, normalised=True))
    console.print(f"{directory / 'results.json'}\n{directory / 'results.png'}", highlight=False)
    return results
