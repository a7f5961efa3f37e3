"""The stages of a suite as a graph: what each runs, and what each depends on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_merge.data.published.task import PublishedSource
from lit_merge.errors import ConfigurationError
from lit_merge.report.results import INDIVIDUAL, JOINT, ZERO_SHOT
from lit_merge.suite.results import suite_results
from lit_merge.suite.scheduler import Conductor, Stage, folder_digest
from lit_merge.suite.settings import SuiteSettings, combine

__all__ = ["SuitePlan"]


class SuitePlan(SuiteSettings):
    """The stages of a suite and what they depend on."""

    @property
    def devices(self) -> int:
        """The most devices that a stage uses."""
        learned = [{"trainer": recipe.trainer} for recipe in self.recipes.values() if recipe.trainer]
        return max(_devices(config) for config in (self.fit, self.test, self.joint or {}, *learned))

    @cached_property
    def stages(self) -> list[Stage]:
        """All of them; none comes before one that it depends on, unless a recipe names that one's output.

        Raises:
            ConfigurationError: a recipe names a file in the suite's directory that no stage writes.
        """
        self._images = self._digests()
        found = [self._test_all("zero-shot", {})]
        for seed in self.seeds:
            fits = {task: self._fit(seed, task) for task in self.tasks}
            vectors = {task: self._output(stage) for task, stage in fits.items()}
            found += [*fits.values(), *(self._test_one(seed, task, vectors[task]) for task in self.tasks)]
            if self.joint is not None:
                fit = self._fit_joint(seed)
                found += [fit, self._test_all(f"seed-{seed}/joint/test", {"task_vector": self._output(fit)})]
            for name, recipe in self.recipes.items():
                stages = self._learn(seed, name, vectors) if recipe.learned else self._merge(seed, name, vectors)
                kind = "weights" if recipe.learned else "task_vector"
                found += [*stages, self._test_all(f"seed-{seed}/test/{name}", {kind: self._output(stages[-1])})]
        written = {path for stage in found for path in stage.paths(self.directory)}
        for stage in found:
            for path in stage.inputs:
                if path.is_relative_to(self.directory) and path not in written:
                    raise ConfigurationError(
                        f"{stage.name}: expected a file that some stage writes, got {path}. Name one of "
                        f"{self.directory}/seed-*/merge/*/coefficients.safetensors, or a file elsewhere."
                    )
        return found

    def check(self, check_configuration: Callable[[str, dict[str, Any]], None]) -> None:
        """Refuse what some stage would refuse, before the first one runs.

        Args:
            check_configuration: parses the configuration of a command, and does nothing else.

        Raises:
            ConfigurationError: a name, a recipe or a task is unusable.
            DataError: an image folder is.
            SystemExit: a setting of fit, test, joint or a learned recipe is unknown; the parser has said so on the
                standard error.
        """
        from lit_merge.models.encoder import load_clip

        self._check_names()
        for name, recipe in self.recipes.items():
            recipe.check(self.directory)
            if recipe.collected == "gram" and self.evaluated_linearized:
                raise ConfigurationError(
                    "recipes: expected none by Gram matrices of linearised models, whose layers have inputs of two "
                    f"kinds, got {name}. Leave it out: --recipes.{name}=null."
                )
        self._modules = self.data_module().tasks
        clip = load_clip(self.model, self.pretrained)
        self._pretrained = {
            "name": clip.name,
            "fingerprint": clip.fingerprint,
            "parameters": sum(parameter.numel() for parameter in clip.visual.parameters()),
        }
        seed, task = self.seeds[0], self.tasks[0]
        check_configuration("fit", self.fit_config(seed, task))
        check_configuration("test", self.test_config(self.task_data(task, seed), {}))
        if self.joint is not None:
            check_configuration("fit", self.joint_config(seed))
        for recipe in self.recipes.values():
            if recipe.learned:
                check_configuration("fit", self.learned_config(seed, recipe, []))

    def _check_names(self) -> None:
        wrong = [name for name in [*self.tasks, *self.recipes] if not re.fullmatch(r"[\w-]+", name)]
        if wrong:
            raise ConfigurationError(
                f"names of tasks and recipes: expected letters, digits, _ and -, got {wrong[0]!r}. Rename it."
            )
        references = [INDIVIDUAL, ZERO_SHOT, *([JOINT] if self.joint is not None else [])]
        if reserved := set(references) & set(self.recipes):
            raise ConfigurationError(
                f"recipes: expected other names than {' and '.join(references)}, got {reserved.pop()}. Rename it."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigurationError(f"seeds: expected at least one, each once, got {self.seeds}. Use e.g. [0, 1, 2].")

    def data_module(self) -> Any:
        """The data module of all tasks; every folder has been looked into."""
        from lit_merge.data.multitask import MultiTaskDataModule

        data = MultiTaskDataModule(**self.all_data()["init_args"])
        assert all(module.classes for module in data.tasks.values())
        return data

    def description(self) -> dict[str, Any]:
        """The resolved settings as plain data."""
        names = ("name", "model", "pretrained", "tasks", "paths", "seeds", "fit", "test")
        settings = {name: getattr(self, name) for name in names}
        settings["tasks"] = [task for task in self.tasks if task not in self.paths]
        settings["recipes"] = {name: recipe.description() for name, recipe in self.recipes.items()}
        optional = {"linearized": self.linearized, "joint": self.joint, "data": self.data or None}
        settings |= {name: value for name, value in optional.items() if value is not None}
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def run(self, conductor: Conductor) -> dict[str, Any]:
        """Have all stages run; returns the results."""
        conductor.run(self.stages)
        settings = {"fit": self.fit, "recipes": self.description()["recipes"]}
        known = {
            "name": self.name,
            "model": self._pretrained,
            "tasks": self.tasks,
            "classes": {task: len(module.classes) for task, module in self._modules.items()},
            "settings": {**settings, **({"joint": self.joint} if self.joint is not None else {})},
        }
        return suite_results(known, self.directory, self.seeds, self.recipes, self.joint is not None)

    def _output(self, stage: Stage) -> Path:
        return self.directory / stage.name / stage.outputs[-1]

    def _settings(self, config: Mapping[str, Any], images: Any) -> dict[str, Any]:
        base = {"model": self.model, "pretrained": self.pretrained, "fingerprint": self._pretrained["fingerprint"]}
        return {**base, "config": config, "images": images}

    def _digests(self) -> dict[str, str]:
        """Task -> a hash of its files' names, sizes and times; nothing for a task of the embedded suite."""
        sources = {task: module.source for task, module in self._modules.items()}
        published = {task: source for task, source in sources.items() if isinstance(source, PublishedSource)}
        return {
            **{task: folder_digest(path) for task, path in self.paths.items()},
            **{task: folder_digest(*_tops(one.location.paths, one.root)) for task, one in published.items()},
        }

    def _fit(self, seed: int, task: str) -> Stage:
        config = self.fit_config(seed, task)
        settings = self._settings(config, self._images if self.penalised else self._images.get(task))
        outputs = ("task_vector.safetensors",)
        return Stage(f"seed-{seed}/fit/{task}", "fit", config, settings, outputs, devices=_devices(config))

    def _fit_joint(self, seed: int) -> Stage:
        config = self.joint_config(seed)
        outputs = ("task_vector.safetensors",)
        settings = self._settings(config, self._images)
        return Stage(f"seed-{seed}/joint/fit", "fit", config, settings, outputs, devices=_devices(config))

    def _test_one(self, seed: int, task: str, vector: Path) -> Stage:
        data = self.task_data(task, seed)
        return self._test(f"seed-{seed}/individual/{task}", data, {"task_vector": vector}, self._images.get(task))

    def _test_all(self, name: str, model: Mapping[str, Path]) -> Stage:
        return self._test(name, self.all_data(), model, self._images)

    def _test(self, name: str, data: dict[str, Any], model: Mapping[str, Path], images: Any) -> Stage:
        config = self.test_config(data, model)
        placeless = self.test_config(data, dict.fromkeys(model))  # the model's content counts
        settings, inputs = self._settings(placeless, images), tuple(model.values())
        return Stage(name, "test", config, settings, ("test_metrics.json",), inputs, _devices(config))

    def _learn(self, seed: int, name: str, vectors: Mapping[str, Path]) -> list[Stage]:
        recipe, inputs = self.recipes[name], tuple(vectors.values())
        config = self.learned_config(seed, recipe, [str(path) for path in inputs])
        settings = self._settings(self.learned_config(seed, recipe, []), self._images)
        outputs = ("coefficients.safetensors", "merged.safetensors")
        return [Stage(f"seed-{seed}/merge/{name}", "fit", config, settings, outputs, inputs, _devices(config))]

    def _merge(self, seed: int, name: str, vectors: Mapping[str, Path]) -> list[Stage]:
        """The stages of one recipe, the merge last, whose last output is the merged vector."""
        recipe, stage = self.recipes[name], f"seed-{seed}/merge/{name}"
        collected = vectors if recipe.collected else {}
        before = [self._statistics(seed, name, task, vector) for task, vector in collected.items()]
        files = {task: self._output(one) for task, one in zip(collected, before, strict=True)}
        given = recipe.of_seed(seed)
        config = {
            "vectors": None,
            "model": self.model,
            "pretrained": self.pretrained,
            "kind": "task_vector",
            "recipe": recipe.recipe,
            "settings": given["settings"],
            "transform": recipe.transform.to_config() if recipe.transform else None,
            **{key: given[key] for key in ("parts", "overrides") if given[key]},
            "search": recipe.search.to_config() if recipe.search else None,
            "data": self.all_data() if recipe.search else None,
            **({"linearized": True} if self.evaluated_linearized else {}),
        }
        settings = self._settings(config, self._images if recipe.search else None)  # the vectors' content counts
        places = {"vectors": [str(path) for path in vectors.values()], "output": str(self.directory / stage / _MERGED)}
        if files:
            statistics = {task: str(path) for task, path in files.items()}
            config = combine(config, {"settings": {**(given["settings"] or {}), "statistics": statistics}})
        inputs = (*vectors.values(), *files.values(), *map(self._as_output, recipe.files(seed)))
        outputs = (*(["merged-search.json"] if recipe.search else []), _MERGED)
        devices = 1 if recipe.search else 0
        return [*before, Stage(stage, "merge", {**config, **places}, settings, outputs, inputs, devices)]

    def _statistics(self, seed: int, name: str, task: str, vector: Path) -> Stage:
        recipe, stage = self.recipes[name], f"seed-{seed}/statistics/{name}/{task}"
        config = {
            **(recipe.statistics or {}),
            "kind": recipe.collected,
            "model": self.model,
            "pretrained": self.pretrained,
            "data": self.task_data(task, seed),
            **({"linearized": True} if self.evaluated_linearized else {}),
        }
        output = f"{recipe.collected}.safetensors"
        places = {"task_vector": str(vector), "output": str(self.directory / stage / output)}
        settings = self._settings(config, self._images.get(task))
        return Stage(stage, "statistics", {**config, **places}, settings, (output,), (vector,))

    def _as_output(self, path: Path) -> Path:
        """A file that a recipe names, as the stages call it if it lies in the suite's directory."""
        here, there = self.directory.resolve(), path.resolve()
        return self.directory / there.relative_to(here) if there.is_relative_to(here) else path


def _tops(paths: Sequence[Path], root: Path) -> list[Path]:
    """The files and folders right below a root that a data set's files lie in; those elsewhere as they are."""
    found = [path for path in paths if path.exists()]
    return sorted({root / path.relative_to(root).parts[0] if path.is_relative_to(root) else path for path in found})


_MERGED = "merged.safetensors"


def _devices(config: Mapping[str, Any]) -> int:
    """How many devices a configuration's trainer uses where there are some; 1 if it says so in words."""
    trainer = config.get("trainer", {})
    given = trainer.get("devices", 1)
    if trainer.get("accelerator") == "cpu":
        return 0
    return len(given) if isinstance(given, list) else max(1, given) if isinstance(given, int) else 1
