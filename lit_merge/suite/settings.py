"""The configurations of a suite's stages, made of what a user gave."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_merge.data.embedded.tasks import EMBEDDED_TASKS
from lit_merge.data.published.task import is_published
from lit_merge.errors import ConfigurationError, first_few
from lit_merge.suite.objects import class_of
from lit_merge.suite.recipe import Recipe

__all__ = ["SuiteSettings", "combine", "task_names"]

_FINE_TUNE = "lit_merge.modules.FineTuneModule"
_MULTI_TASK = "lit_merge.modules.MultiTaskModule"
_MERGE = "lit_merge.modules.MergeModule"
_ONE_TASK = "lit_merge.data.TaskDataModule"
_TASKS = "lit_merge.data.MultiTaskDataModule"
_MERGE_DATA = "lit_merge.data.MergeDataModule"
_EXTRACT = "lit_merge.callbacks.ExtractTaskVector"
_OF_FACTORS = ("tasks", "images", "split", "seed", "convolutions", "normalised", "corrected")
_BY_TASK = ("class_names", "templates")  # which the data module of all tasks has by task
_OF_PATHS = ("fractions", "skip_corrupt", "split_seed")
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
    network: dict[str, Any] | None = None
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    control: list[str] = field(default_factory=list)

    @property
    def named_tasks(self) -> list[str]:
        """The tasks that a name says all of: embedded ones and published data sets; control tasks are among them."""
        every = [*self.tasks, *self.control]
        return [task for task in every if task not in self.paths and task not in self.sources]

    @property
    def trained_linearized(self) -> bool:
        """Whether fine-tuning trains the linearised encoder."""
        given = self.fit.get("model", {}).get("init_args", {})
        parametrisation = given.get("parametrisation")
        if isinstance(parametrisation, dict):
            return bool(getattr(class_of("fit.model.init_args.parametrisation", parametrisation), "linearised", False))
        return bool(given.get("linearized", False))

    @property
    def evaluated_linearized(self) -> bool:
        """Whether models are evaluated on the linearised encoder; by default as they are trained."""
        return self.trained_linearized if self.linearized is None else self.linearized

    @property
    def penalised(self) -> bool:
        """Whether fine-tuning on a task sees images of the others."""
        return self._penalty is not None and bool(getattr(self._penalty_class, "reads_other_tasks", True))

    @property
    def factors_of(self) -> list[str]:
        """The tasks whose Kronecker factors are collected for a penalty that reads such files and names none."""
        reads = self._penalty is not None and bool(getattr(self._penalty_class, "reads_factors", False))
        if not reads or (self._penalty or {}).get("init_args", {}).get("files") is not None:
            return []
        return list(self.statistics.get("tasks") or self.tasks)

    @property
    def statistics(self) -> dict[str, Any]:
        """How these factors are collected, ``fit.statistics``."""
        return dict(self.fit.get("statistics") or {})

    @property
    def _penalty(self) -> dict[str, Any] | None:
        return self.fit.get("model", {}).get("init_args", {}).get("penalty")

    @property
    def _penalty_class(self) -> Any:
        path = str((self._penalty or {}).get("class_path", "TauJpPenalty"))
        full = path if "." in path else f"lit_merge.modules.{path}"
        return class_of("fit.model.init_args.penalty", {"class_path": full})

    def check_statistics(self) -> None:
        """Refuse settings of factors that nothing reads, or that there are not.

        Raises:
            ConfigurationError: there are some.
        """
        if self.statistics and not self.factors_of:
            raise ConfigurationError(
                "fit.statistics: expected only with a penalty that reads factors and names no files, e.g. Tak, got "
                "another or none. Remove it."
            )
        if unknown := [name for name in self.statistics if name not in _OF_FACTORS]:
            raise ConfigurationError(
                f"fit.statistics: expected settings among {', '.join(_OF_FACTORS)}, got {first_few(unknown)}. Remove "
                "it."
            )
        if lonely := [task for task in self.tasks if self.factors_of and not set(self.factors_of) - {task}]:
            raise ConfigurationError(
                f"fit.statistics.tasks: expected factors of another task than {lonely[0]!r} for its penalty, got none. "
                "Name a reference task."
            )

    def factors_config(self, task: str) -> dict[str, Any]:
        """Of ``statistics``, to collect the Kronecker factors of a task at θ0, which all seeds share."""
        given = {name: value for name, value in self.statistics.items() if name != "tasks"}
        return {**given, "kind": "kfac", **self.base(), "data": self.task_data(task, self.seeds[0])}

    def fit_config(self, seed: int, task: str, factors: Mapping[str, Path] | None = None) -> dict[str, Any]:
        """Of ``fit``, to fine-tune on one task.

        Args:
            seed: of the run.
            task: what is trained.
            factors: task -> file, for the penalty.
        """
        given = {name: value for name, value in self.fit.items() if name != "statistics"}
        files = {"files": {name: str(path) for name, path in factors.items()}} if factors else {}
        penalty = {"model": {"init_args": {"penalty": {"init_args": files}}}} if files else {}
        fixed = {"seed_everything": seed, "model": self._model(), "data": self.task_data(task, seed)}
        others = {"data": {"init_args": self._other_tasks(task)}} if self.penalised else {}
        read = {"data": {"init_args": self._data_of(self.tasks)}} if self.penalised else {}
        return combine({"trainer": _TRAINER, "model": {"class_path": _FINE_TUNE}}, others, given, penalty, read, fixed)

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

    def learned_config(self, seed: int, recipe: Recipe, vectors: list[str], heads: str | None = None) -> dict[str, Any]:
        """Of ``fit``, to learn the coefficients of a merge; ``heads`` as of :meth:`base`."""
        model = combine({"init_args": recipe.of_seed(seed)["learned"] or {}}, self._model(heads), self._linearized())
        data = combine(self.all_data(), {"class_path": _MERGE_DATA, "init_args": {"seed": seed}})
        return {
            "seed_everything": seed,
            "trainer": combine(_TRAINER, recipe.trainer or {}),
            "model": combine({"class_path": _MERGE}, model, {"init_args": {"vectors": vectors}}),
            "data": combine(data, {"init_args": recipe.data or {}}),
        }

    def test_config(
        self,
        data: dict[str, Any],
        model: Mapping[str, Path | Mapping[str, Path] | None],
        heads: str | None = None,
    ) -> dict[str, Any]:
        """Of ``test``.

        One task is tested by the module that was fine-tuned on it, all tasks by :class:`lit_merge.MultiTaskModule`
        unless ``test.model.class_path`` names another one.

        Args:
            data: of one task or of all.
            model: argument of the module -> the file that it names: ``task_vector`` or ``weights``; or files, by task:
                ``task_outputs``.
            heads: as of :meth:`base`.
        """
        several, given = data["class_path"] == _TASKS, self.test
        module = {"class_path": _MULTI_TASK} if several else self._fine_tuned()
        if not several and "class_path" in given.get("model", {}):
            given = {key: value for key, value in given.items() if key != "model"}
        files = {"task_vector": None, **{name: _as_text(given) for name, given in model.items()}}
        own = combine(module, {"init_args": files}, self._model(heads), self._linearized())
        return combine({"trainer": _TRAINER, "model": own, "data": data}, given)

    def task_data(self, task: str, seed: int) -> dict[str, Any]:
        """The data module of one task."""
        if task in self.sources:
            which: dict[str, Any] = {"source": self.sources[task], "name": task}
        else:
            which = {"path": self.paths[task], "name": task} if task in self.paths else {"task": task}
        words = {name: self.data[name][task] for name in _BY_TASK if task in (self.data.get(name) or {})}
        return {"class_path": _ONE_TASK, "init_args": {**self._data_of([task]), **words, **which, "seed": seed}}

    def _data_of(self, tasks: Sequence[str]) -> dict[str, Any]:
        """``data`` for a data module that reads these tasks, which refuses what is about others alone."""
        named = [task for task in tasks if task not in self.paths and task not in self.sources]
        unused = {*_BY_TASK, *(() if any(map(is_published, named)) else ["root"])}
        unused |= set() if any(task in self.paths for task in tasks) else set(_OF_PATHS)
        return {name: value for name, value in self.data.items() if name not in unused}

    def all_data(self) -> dict[str, Any]:
        """The data module of all tasks."""
        own = {"sources": self.sources} if self.sources else {}
        tasks = {"tasks": self.named_tasks, "paths": self.paths or None, **own}
        return {"class_path": _TASKS, "init_args": {**self.data, **tasks}}

    def base(self, heads: str | None = None) -> dict[str, Any]:
        """The arguments of a command or module that say which network it is about.

        Args:
            heads: where the tasks' trained heads are, a path with ``{task}`` in it; None for the network's own.
        """
        if self.network is not None:
            given = {} if heads is None else {"init_args": {"heads": heads}}
            return {"network": combine(self.network, given)}
        return {"model": self.model, "pretrained": self.pretrained}

    def _model(self, heads: str | None = None) -> dict[str, Any]:
        return {"init_args": self.base(heads)}

    def _linearized(self) -> dict[str, Any]:
        return {"init_args": {"linearized": True}} if self.evaluated_linearized else {}

    def _fine_tuned(self) -> dict[str, Any]:
        """The module that is fine-tuned, without what only says how: its own settings, and those of its network."""
        from lit_merge.modules import FineTuneModule

        model = self.fit.get("model", {})
        known = [one for one in FineTuneModule.__mro__ if one.__module__.startswith("lit_merge.")]
        training = {name for one in known for name in inspect.signature(one).parameters}
        training -= {"encoder", "head", "preprocessing"}
        own = {name: value for name, value in model.get("init_args", {}).items() if name not in training}
        return {"class_path": model.get("class_path", _FINE_TUNE), "init_args": own}

    def _other_tasks(self, task: str) -> dict[str, Any]:
        """Of ``data``, the other tasks that are merged, for a penalty; no control task is one of them."""
        others = {other for other in self.tasks if other != task}
        sources = {other: source for other, source in self.sources.items() if other in others}
        return {
            "other_tasks": [other for other in self.named_tasks if other in others],
            "other_paths": {other: path for other, path in self.paths.items() if other in others} or None,
            **({"other_sources": sources} if sources else {}),
        }


def _as_text(files: Path | Mapping[str, Path] | None) -> str | dict[str, str] | None:
    if isinstance(files, Mapping):
        return {task: str(path) for task, path in files.items()}
    return None if files is None else str(files)


def task_names(
    tasks: Sequence[str] | None, paths: Mapping[str, str] | None, sources: Mapping[str, Any] | None
) -> list[str]:
    """All tasks of a suite: those of names, by default the embedded ones, then folders, then tasks of one's own.

    Raises:
        ConfigurationError: a task is there twice.
    """
    own = [*(paths or {}), *(sources or {})]
    named = list(tasks) if tasks is not None else ([] if own else list(EMBEDDED_TASKS))
    names = [*named, *own]
    if twice := [task for task in names if names.count(task) > 1]:
        raise ConfigurationError(f"tasks: expected every task once, got {twice[0]!r} twice. Rename or remove one.")
    return names


def combine(*parts: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries, later ones over earlier ones."""
    combined: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            inner = combined.get(key)
            combined[key] = combine(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return combined
