"""The stages of a suite, and what each depends on."""

from __future__ import annotations

import gc
import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from lit_merge.callbacks.writing import write_text
from lit_merge.environment import hardware, versions
from lit_merge.errors import ConfigurationError, LitMergeError
from lit_merge.merging import resolve_transform
from lit_merge.report.results import INDIVIDUAL, ZERO_SHOT
from lit_merge.search import CoefficientSearch, quiet
from lit_merge.stages import Conductor, folder_digest
from lit_merge.transforms import Transform
from lit_merge.vectors import TaskVector

__all__ = ["Recipe", "SuitePlan", "combine"]

_FINE_TUNE = "lit_merge.modules.FineTuneModule"
_MULTI_TASK = "lit_merge.modules.MultiTaskModule"
_TASKS = "lit_merge.data.MultiTaskDataModule"
_TRAINER = {
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "check_val_every_n_epoch": None,
    "val_check_interval": None,
    "limit_val_batches": 0,
}


@dataclass(frozen=True)
class Recipe:
    """A way to merge.

    Args:
        recipe: name of a method of :data:`lit_merge.transforms.RECIPES`.
        settings: its arguments.
        transform: instead, any transform by class path, or a Chain of them.
        parts: instead, a list of names of transforms and recipes, each with its fields if it needs any.
        overrides: other parts for some of the parameters.
        search: what is varied, and chosen on validation data.
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    transform: Transform | None = None
    parts: list[str | dict[str, Any]] | None = None
    overrides: list[dict[str, Any]] | None = None
    search: CoefficientSearch | None = None

    def check(self) -> None:
        """Refuse what no merge could be made of.

        Raises:
            ConfigurationError: the recipe, a setting or the searched field is unknown, or a value is refused.
        """
        transform = resolve_transform(self.recipe, self.settings or None, self.transform, self.parts, self.overrides)
        if self.search:
            self.search.check(transform)

    def description(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return {
            "recipe": self.recipe,
            "settings": self.settings,
            "transform": self.transform.to_config() if self.transform else None,
            **({"parts": self.parts} if self.parts else {}),
            **({"overrides": self.overrides} if self.overrides else {}),
            "search": self.search.to_config() if self.search else None,
        }


@dataclass
class SuitePlan:
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
    linearized: bool | None = None

    @property
    def evaluated_linearized(self) -> bool:
        """Whether models are evaluated on the linearised encoder; by default as they are trained."""
        trained = self.fit.get("model", {}).get("init_args", {}).get("linearized", False)
        return bool(trained) if self.linearized is None else self.linearized

    @property
    def stages(self) -> int:
        """How many there are."""
        return 1 + len(self.seeds) * 2 * (len(self.tasks) + len(self.recipes))

    def check(self) -> None:
        """Refuse what some stage would refuse, before the first one runs.

        Raises:
            ConfigurationError: a name, a recipe or a task is unusable.
            DataError: an image folder is.
            SystemExit: a setting of fit or test is unknown; the parser has said so on the standard error.
        """
        from lit_merge.lightning_cli import check_configuration
        from lit_merge.models.encoder import load_clip

        wrong = [name for name in [*self.tasks, *self.recipes] if not re.fullmatch(r"[\w-]+", name)]
        if wrong:
            raise ConfigurationError(
                f"names of tasks and recipes: expected letters, digits, _ and -, got {wrong[0]!r}. Rename it."
            )
        if reserved := {INDIVIDUAL, ZERO_SHOT} & set(self.recipes):
            raise ConfigurationError(
                f"recipes: expected other names than {INDIVIDUAL} and {ZERO_SHOT}, got {reserved.pop()}. Rename it."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigurationError(f"seeds: expected at least one, each once, got {self.seeds}. Use e.g. [0, 1, 2].")
        for recipe in self.recipes.values():
            recipe.check()
        self._data()
        clip = load_clip(self.model, self.pretrained)
        self._model = {
            "name": clip.name,
            "fingerprint": clip.fingerprint,
            "parameters": sum(parameter.numel() for parameter in clip.visual.parameters()),
        }
        check_configuration("fit", self._fit_config(self.seeds[0], self.tasks[0]))
        check_configuration("test", self._test_config(self._task_data(self.tasks[0], self.seeds[0]), None))

    def description(self) -> dict[str, Any]:
        """The resolved settings as plain data."""
        names = ("name", "model", "pretrained", "tasks", "paths", "seeds", "fit", "test")
        settings = {name: getattr(self, name) for name in names}
        settings["tasks"] = [task for task in self.tasks if task not in self.paths]
        settings["recipes"] = {name: recipe.description() for name, recipe in self.recipes.items()}
        if self.linearized is not None:
            settings["linearized"] = self.linearized
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def run(self, conductor: Conductor) -> dict[str, Any]:
        """All stages in order; returns the results."""
        base = {"model": self.model, "pretrained": self.pretrained, "fingerprint": self._model["fingerprint"]}
        self._images = {task: folder_digest(path) for task, path in self.paths.items()}
        results: dict[str, Any] = {
            "schema": 1,
            "name": self.name,
            "model": self._model,
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

    def _fit_config(self, seed: int, task: str) -> dict[str, Any]:
        fixed = {
            "seed_everything": seed,
            "model": {"init_args": {"model": self.model, "pretrained": self.pretrained}},
            "data": self._task_data(task, seed),
        }
        others = {"data": {"init_args": self._other_tasks(task)}} if self._penalised() else {}
        return combine({"trainer": _TRAINER, "model": {"class_path": _FINE_TUNE}}, others, self.fit, fixed)

    def _penalised(self) -> bool:
        return self.fit.get("model", {}).get("init_args", {}).get("penalty") is not None

    def _other_tasks(self, task: str) -> dict[str, Any]:
        return {
            "other_tasks": [other for other in self.tasks if other != task and other not in self.paths],
            "other_paths": {other: path for other, path in self.paths.items() if other != task} or None,
        }

    def _fit(self, conductor: Conductor, seed: int, task: str, base: dict[str, Any]) -> Path:
        config = self._fit_config(seed, task)

        def work(folder: Path) -> list[Path]:
            self._command("fit", config, folder)
            return [folder / "task_vector.safetensors"]

        images = self._images if self._penalised() else self._images.get(task)
        settings = {**base, "config": config, "images": images}
        return conductor.stage(f"seed-{seed}/fit/{task}", settings, [], work)[0]

    def _test_one(self, conductor: Conductor, seed: int, task: str, vector: Path, base: dict[str, Any]) -> float:
        config = self._test_config(self._task_data(task, seed), vector)
        settings = {**base, "images": self._images.get(task)}
        return self._test(conductor, f"seed-{seed}/individual/{task}", config, settings, [vector])["test/accuracy"]

    def _merge(
        self, conductor: Conductor, seed: int, name: str, vectors: list[Path], base: dict[str, Any]
    ) -> dict[str, Any]:
        recipe = self.recipes[name]
        config = {
            "vectors": [str(path) for path in vectors],
            "model": self.model,
            "pretrained": self.pretrained,
            "kind": "task_vector",
            "recipe": recipe.recipe,
            "settings": recipe.settings or None,
            "transform": recipe.transform.to_config() if recipe.transform else None,
            **({"parts": recipe.parts} if recipe.parts else {}),
            **({"overrides": recipe.overrides} if recipe.overrides else {}),
            "search": recipe.search.to_config() if recipe.search else None,
            "data": self._all_data() if recipe.search else None,
            **({"linearized": True} if self.evaluated_linearized else {}),
        }

        def work(folder: Path) -> list[Path]:
            self._command("merge", {**config, "output": str(folder / "merged.safetensors")}, folder)
            search = [folder / "merged-search.json"] if recipe.search else []
            return [folder / "merged.safetensors", *search]

        settings = {**base, "config": {**config, "vectors": None}, "images": self._images if recipe.search else None}
        merged, *search = conductor.stage(f"seed-{seed}/merge/{name}", settings, vectors, work)
        header = TaskVector.load(merged).metadata
        curve = json.loads(search[0].read_text(encoding="utf-8")) if search else None
        return {
            "transform": header["transform"],
            "coefficient": curve.get("best") if curve else recipe.settings.get("coefficient"),
            "search": _curve(curve) if curve else None,
            "accuracy": self._test_all(conductor, f"seed-{seed}/test/{name}", base, merged),
        }

    def _test_all(self, conductor: Conductor, name: str, base: dict[str, Any], vector: Path | None) -> dict[str, float]:
        config = self._test_config(self._all_data(), vector)
        settings = {**base, "images": self._images}
        metrics = self._test(conductor, name, config, settings, [vector] if vector else [])
        return {task: metrics[f"test/{task}/accuracy"] for task in self.tasks}

    def _test_config(self, data: dict[str, Any], vector: Path | None) -> dict[str, Any]:
        several = data["class_path"] == _TASKS
        init = {
            "model": self.model,
            "pretrained": self.pretrained,
            "task_vector": str(vector) if vector else None,
            **({"linearized": True} if self.evaluated_linearized else {}),
        }
        model = {"class_path": _MULTI_TASK if several else _FINE_TUNE, "init_args": init}
        return combine({"trainer": _TRAINER, "model": model, "data": data}, self.test)

    def _test(
        self, conductor: Conductor, name: str, config: dict[str, Any], settings: dict[str, Any], inputs: list[Path]
    ) -> dict[str, float]:
        def work(folder: Path) -> list[Path]:
            self._command("test", config, folder)
            return [folder / "test_metrics.json"]

        placeless = combine(config, {"model": {"init_args": {"task_vector": None}}})  # its content counts
        path = conductor.stage(name, {**settings, "config": placeless}, inputs, work)[0]
        return {key: round(value, 6) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}

    def _task_data(self, task: str, seed: int) -> dict[str, Any]:
        place = {"path": self.paths[task], "name": task} if task in self.paths else {"task": task}
        return {"class_path": "lit_merge.data.TaskDataModule", "init_args": {**place, "seed": seed}}

    def _all_data(self) -> dict[str, Any]:
        embedded = [task for task in self.tasks if task not in self.paths]
        return {"class_path": _TASKS, "init_args": {"tasks": embedded, "paths": self.paths or None}}

    def _data(self) -> Any:
        """The data module of all tasks; every folder has been looked into."""
        from lit_merge.data.multitask import MultiTaskDataModule

        data = MultiTaskDataModule(**self._all_data()["init_args"])
        assert all(module.classes for module in data.tasks.values())
        return data

    def _command(self, command: str, config: dict[str, Any], folder: Path) -> None:
        """Run a command as a user would, from a configuration file, in this process."""
        from lit_merge.commands import run_command

        path = folder / "stage.yaml"
        write_text(path, yaml.safe_dump(config, sort_keys=False))
        arguments = ["--config", str(path)]
        if command != "merge":
            arguments += ["--output", str(folder)]
        devices = str(config.get("trainer", {}).get("devices", 1))
        if devices != "1" and command != "merge":
            self._subprocess([command, *arguments])
            return
        try:
            with quiet(), redirect_stdout(StringIO()):
                run_command(command, arguments)
            gc.collect()  # a trainer and its model refer to each other, and would stay through the next stages
        except SystemExit as error:  # the parser has said on the standard error what is wrong
            raise ConfigurationError(f"{command}: the configuration {path} was refused, see the line above.") from error

    @staticmethod
    def _subprocess(arguments: list[str]) -> None:
        """Several devices: Lightning starts a process for each by repeating the command line."""
        import subprocess

        done = subprocess.run(
            [sys.executable, "-m", "lit_merge", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            last = next((line.partition("error: ")[2] for line in lines if "error: " in line), lines[-1])
            raise LitMergeError(f"{arguments[0]} failed with exit code {done.returncode}: {last}")


def combine(*parts: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries, later ones over earlier ones."""
    combined: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            inner = combined.get(key)
            combined[key] = combine(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return combined


def _curve(search: dict[str, Any]) -> dict[str, Any] | None:
    """A search's curve, of one field that was judged by normalised accuracy; what else it found is in its own file."""
    return {key: search[key] for key in ("values", "normalised", "absolute")} if search.get("normalised") else None


def _describe(vector: TaskVector) -> dict[str, Any]:
    return {
        "norm": round(vector.norm(), 6),
        "relative_norm": float(vector.metadata["relative_norm"]),
        "steps": int(vector.metadata["step"]),
    }
