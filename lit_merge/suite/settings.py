"""The configurations of a suite's stages, made of what a user gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_merge.data.published.registry import REGISTRY
from lit_merge.suite.recipe import Recipe

__all__ = ["SuiteSettings", "combine"]

_FINE_TUNE = "lit_merge.modules.FineTuneModule"
_MULTI_TASK = "lit_merge.modules.MultiTaskModule"
_MERGE = "lit_merge.modules.MergeModule"
_ONE_TASK = "lit_merge.data.TaskDataModule"
_TASKS = "lit_merge.data.MultiTaskDataModule"
_MERGE_DATA = "lit_merge.data.MergeDataModule"
_EXTRACT = "lit_merge.callbacks.ExtractTaskVector"
_TRAINER = {
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "check_val_every_n_epoch": None,
    "val_check_interval": None,
    "limit_val_batches": 0,
}


@dataclass
class SuiteSettings:
    """What a suite is about, as :func:`lit_merge.commands.suite.suite` takes it, and the configurations that follow."""

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
    joint: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def trained_linearized(self) -> bool:
        """Whether fine-tuning trains the linearised encoder."""
        return bool(self.fit.get("model", {}).get("init_args", {}).get("linearized", False))

    @property
    def evaluated_linearized(self) -> bool:
        """Whether models are evaluated on the linearised encoder; by default as they are trained."""
        return self.trained_linearized if self.linearized is None else self.linearized

    @property
    def penalised(self) -> bool:
        """Whether fine-tuning on a task sees images of the others."""
        return self.fit.get("model", {}).get("init_args", {}).get("penalty") is not None

    def fit_config(self, seed: int, task: str) -> dict[str, Any]:
        """Of ``fit``, to fine-tune on one task."""
        fixed = {"seed_everything": seed, "model": self._model(), "data": self.task_data(task, seed)}
        others = {"data": {"init_args": self._other_tasks(task)}} if self.penalised else {}
        return combine({"trainer": _TRAINER, "model": {"class_path": _FINE_TUNE}}, others, self.fit, fixed)

    def joint_config(self, seed: int) -> dict[str, Any]:
        """Of ``fit``, to fine-tune on all tasks jointly."""
        given = self.joint or {}
        callbacks = [*(given.get("trainer", {}).get("callbacks") or []), {"class_path": _EXTRACT}]
        fixed = {
            "seed_everything": seed,
            "trainer": {"callbacks": callbacks},
            "model": self._model(),
            "data": combine(self.all_data(), {"init_args": {"seed": seed}}),
        }
        linearized = {"init_args": {"linearized": True}} if self.trained_linearized else {}
        return combine({"trainer": _TRAINER, "model": {"class_path": _MULTI_TASK, **linearized}}, given, fixed)

    def learned_config(self, seed: int, recipe: Recipe, vectors: list[str]) -> dict[str, Any]:
        """Of ``fit``, to learn the coefficients of a merge."""
        model = combine({"init_args": recipe.learned or {}}, self._model(), self._linearized())
        data = combine(self.all_data(), {"class_path": _MERGE_DATA, "init_args": {"seed": seed}})
        return {
            "seed_everything": seed,
            "trainer": combine(_TRAINER, recipe.trainer or {}),
            "model": combine({"class_path": _MERGE}, model, {"init_args": {"vectors": vectors}}),
            "data": combine(data, {"init_args": recipe.data or {}}),
        }

    def test_config(self, data: dict[str, Any], model: Mapping[str, Path | None]) -> dict[str, Any]:
        """Of ``test``.

        Args:
            data: of one task or of all.
            model: argument of the module -> the file that it names: ``task_vector`` or ``weights``.
        """
        files = {"task_vector": None, **{name: str(path) if path else None for name, path in model.items()}}
        module = {"class_path": _MULTI_TASK if data["class_path"] == _TASKS else _FINE_TUNE, "init_args": files}
        own = combine(module, self._model(), self._linearized())
        return combine({"trainer": _TRAINER, "model": own, "data": data}, self.test)

    def task_data(self, task: str, seed: int) -> dict[str, Any]:
        """The data module of one task."""
        place = {"path": self.paths[task], "name": task} if task in self.paths else {"task": task}
        seen = self.tasks if self.penalised else [task]
        published = any(one in REGISTRY and one not in self.paths for one in seen)
        common = {key: value for key, value in self.data.items() if key != "root" or published}
        return {"class_path": _ONE_TASK, "init_args": {**common, **place, "seed": seed}}

    def all_data(self) -> dict[str, Any]:
        """The data module of all tasks."""
        named = [task for task in self.tasks if task not in self.paths]
        return {"class_path": _TASKS, "init_args": {**self.data, "tasks": named, "paths": self.paths or None}}

    def _model(self) -> dict[str, Any]:
        return {"init_args": {"model": self.model, "pretrained": self.pretrained}}

    def _linearized(self) -> dict[str, Any]:
        return {"init_args": {"linearized": True}} if self.evaluated_linearized else {}

    def _other_tasks(self, task: str) -> dict[str, Any]:
        return {
            "other_tasks": [other for other in self.tasks if other != task and other not in self.paths],
            "other_paths": {other: path for other, path in self.paths.items() if other != task} or None,
        }


def combine(*parts: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries, later ones over earlier ones."""
    combined: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            inner = combined.get(key)
            combined[key] = combine(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return combined
