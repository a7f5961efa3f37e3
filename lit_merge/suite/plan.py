"""The stages of a suite as a graph: what each runs, and what each depends on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lit_merge._version import __version__
from lit_merge.data.corrupted import CorruptedTask
from lit_merge.data.images.folders import FolderSource
from lit_merge.data.published.task import PublishedSource
from lit_merge.data.sources import Task
from lit_merge.data.text.task import TextTask
from lit_merge.errors import ConfigurationError, LitMergeError, first_few
from lit_merge.evaluation.search import CoefficientSearch, Precision
from lit_merge.evaluation.search.settings import CONTROLLED
from lit_merge.files.cache import Cache
from lit_merge.files.lazy import Computed
from lit_merge.functional.products import slow_precision
from lit_merge.models.encoder import weights_path
from lit_merge.models.network import ClipNetwork, Network
from lit_merge.models.task_output import output_name
from lit_merge.report.results import INDIVIDUAL, JOINT, ZERO_SHOT
from lit_merge.suite.ledger import FileLedger
from lit_merge.suite.objects import build
from lit_merge.suite.recipe import Recipe, named_files
from lit_merge.suite.results import suite_results
from lit_merge.suite.scheduler import Scheduler, Stage
from lit_merge.suite.settings import SuiteSettings, combine
from lit_merge.transforms import ScaleBlocks, Transform
from lit_merge.transforms.fields import parts_of
from lit_merge.vectors import TaskVector, TaskVectors

__all__ = ["SuitePlan"]


_Model = Mapping[str, Path | Mapping[str, Path]]
"""Argument of a tested module -> its file, or its files by task."""


class SuitePlan(SuiteSettings):
    """The stages of a suite and what they depend on."""

    @property
    def devices(self) -> int:
        """The most devices that a stage uses."""
        learned = [{"trainer": recipe.trainer} for recipe in self.recipes.values() if recipe.trainer]
        return max(_devices(config) for config in (self.fit, self.test, self.joint or {}, *learned))

    def cautions(self) -> list[str]:
        """What is said before the stages run, whose own warnings go to their logs: a precision that is slow here."""
        learned = {f"recipes.{name}": recipe.trainer for name, recipe in self.recipes.items() if recipe.trainer}
        parts = {"fit": self.fit, "test": self.test, "joint": self.joint or {}}
        trainers = {**{name: part.get("trainer") or {} for name, part in parts.items()}, **learned}
        lines: dict[str, str] = {}
        for place, trainer in trainers.items():
            on_cpu = trainer.get("accelerator") == "cpu" or not torch.accelerator.is_available()
            line = slow_precision(str(trainer.get("precision", "")), "cpu") if on_cpu else None
            if line is not None:
                lines.setdefault(line, f"{place}.trainer.{line}")
        return list(lines.values())

    @cached_property
    def stages(self) -> list[Stage]:
        """All of them; none comes before one that it depends on, unless a recipe names that one's output.

        Raises:
            LitMergeError: the model or a task cannot be opened, or a recipe names a file in the suite's directory that
                no stage writes.
        """
        # Without fine-tuned heads there is nothing to test the pre-trained encoder with: those of the first seed.
        own = self._heads(f"seed-{self.seeds[0]}/fit/{{task}}/task_vector.head.safetensors")
        zero_shot = self._test_all("zero-shot", {}, own)
        found = [] if self._trains_heads else [zero_shot]
        collected = {task: self._factors(task) for task in self.factors_of}
        found += collected.values()
        factors = {task: self._output(stage) for task, stage in collected.items()}
        for seed in self.seeds:
            fits = {task: self._fit(seed, task, factors) for task in self.tasks}
            vectors = {task: self._output(stage) for task, stage in fits.items()}
            heads = self._heads(f"seed-{seed}/fit/{{task}}/task_vector.head.safetensors")
            found += [*fits.values(), *(self._test_one(seed, task, vectors[task], heads) for task in self.tasks)]
            if self._trains_heads and seed == self.seeds[0]:
                found.append(zero_shot)
            if self.joint is not None:
                fit, own = self._fit_joint(seed), self._heads(f"seed-{seed}/joint/fit/{_JOINT_HEAD}")
                found += [fit, self._test_all(f"seed-{seed}/joint/test", {"task_vector": self._output(fit)}, own)]
            for name, recipe in self.recipes.items():
                make = self._learn if recipe.learned else self._merge
                stages = make(seed, name, vectors, heads)
                found += [*stages, self._test_all(f"seed-{seed}/test/{name}", self._merged(recipe, stages[-1]), heads)]
        found = [self._with_named_files(stage) for stage in found]
        written = {path for stage in found for path in stage.paths(self.directory)}
        for stage in found:
            for path in stage.inputs:
                if path.is_relative_to(self.directory) and path not in written:
                    raise ConfigurationError(
                        f"{stage.name}: expected a file that some stage writes, got {path}. Name one of "
                        f"{self.directory}/seed-*/merge/*/coefficients.safetensors, or a file elsewhere."
                    )
        return found

    @cached_property
    def ledger(self) -> FileLedger:
        """The hashes of the tasks' files and the base model's, which a later run finds in ``data-digests.json``."""
        return FileLedger(self.directory / "data-digests.json", self.directory)

    @cached_property
    def data_module(self) -> Any:
        """The data module of all tasks; every folder has been looked into."""
        from lit_merge.data.multitask import MultiTaskDataModule

        arguments = self.all_data()["init_args"]
        if self.sources:
            sources = {name: build(f"sources.{name}", Task, source) for name, source in self.sources.items()}
            arguments = {**arguments, "sources": sources}
        data = MultiTaskDataModule(**arguments)
        for module in data.tasks.values():
            _ = module.classes  # found in a folder or file; there are none of texts that are only continued
        return data

    _opened_with_heads = False

    @property
    def _trains_heads(self) -> bool:
        """Whether every task's head trains with it, so that later stages need the trained ones."""
        assert self.model_description  # has opened the network
        return self._opened_with_heads

    def _heads(self, place: str) -> str | None:
        """Where trained heads are, a path with ``{task}`` in it; None if none train."""
        return str(self.directory / place) if self._trains_heads else None

    @cached_property
    def model_description(self) -> dict[str, Any]:
        """Name, fingerprint and number of parameters of the network."""
        return {name: value for name, value in self._opened.items() if name != "shapes"}

    @cached_property
    def _opened(self) -> dict[str, Any]:
        """What is known of the network once it was open; of known weights it is found in the cache."""
        cache, key = Cache("models"), None
        if self.network is None and (weights := weights_path(self.model, self.pretrained)) is not None:
            config = self.ledger.digest(self.model) if Path(self.model).is_file() else self.model
            key = cache.key(["with shapes", __version__, config, self.pretrained, self.ledger.tree_digest(weights)])
            if (known := cache.value(key)) is not None:
                return dict(known)
        network: Network = ClipNetwork(self.model, self.pretrained) if self.network is None else self._network()
        self._opened_with_heads = network.trains_heads
        described = {
            "name": network.name,
            "fingerprint": network.fingerprint,
            "parameters": sum(parameter.numel() for parameter in network.module.parameters()),
            "shapes": {name: list(parameter.shape) for name, parameter in network.module.named_parameters()},
        }
        if key is not None:
            cache.write_value(key, described)
        return described

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
        self._check_names()
        self._check_control()
        self._check_penalty()
        self.check_statistics()
        transforms = {}
        for name, recipe in self.recipes.items():
            with _naming(name):
                transforms[name] = recipe.check(self.directory, self.seeds[0])
                if recipe.search:
                    self._check_search(recipe.search)
            if (recipe.collected == "gram" or recipe.calibrate) and self.evaluated_linearized:
                raise ConfigurationError(
                    "recipes: expected none by Gram matrices or calibration of linearised models, whose layers have "
                    f"inputs of two kinds, got {name}. Leave it out: --recipes.{name}=null."
                )
        check_configuration("test", self.test_config(self.all_data(), {}))  # before its data are opened from it
        assert self.data_module
        assert self.model_description
        for name, transform in transforms.items():
            if transform is not None:
                with _naming(name):
                    self._check_transform(self.recipes[name], transform)
        seed, task = self.seeds[0], self.tasks[0]
        check_configuration("fit", self.fit_config(seed, task))
        check_configuration("test", self.test_config(self.task_data(task, seed), {}))
        if self.joint is not None:
            check_configuration("fit", self.joint_config(seed))
        for recipe in self.recipes.values():
            if recipe.learned:
                check_configuration("fit", self.learned_config(seed, recipe, []))

    def _check_transform(self, recipe: Recipe, transform: Transform) -> None:
        """Refuse what these tasks' vectors cannot go through, or leaves another number of vectors than is needed."""
        # Files of statistics are verified byte by byte; how many blocks vectors have depends on what trains.
        if named_files(transform.to_config()) or any(parts_of(transform, ScaleBlocks)):
            return
        structure = {name: (torch.Size(shape), torch.float32) for name, shape in self._opened["shapes"].items()}
        unread = Computed(structure, _unread)
        vectors = TaskVectors([TaskVector(unread, task) for task in self.tasks], base=unread)
        learned = recipe.learned is not None
        try:
            left = transform(vectors).tasks
            if recipe.search:
                recipe.search.check(transform, vectors)
        except _ReadTooEarly:  # by a transform of the user's own
            return
        if len(left) != (len(self.tasks) if learned else 1):
            raise ConfigurationError(
                f"expected a method that leaves {'a vector for each task' if learned else 'one vector for all tasks'}, "
                f"got {transform!r}, which leaves {len(left)}. "
                f"{'Leave out what' if learned else 'Add a part that'} reduces them, e.g. Sum."
            )

    def _check_search(self, search: CoefficientSearch) -> None:
        """Refuse a search about tasks that are not there, which the merge would after all fine-tuning."""
        every = [*self.tasks, *self.control]
        target = search.target or self.tasks
        control = [task for task in every if task not in target] if search.control is None else search.control
        named = [*target, *control, *(search.perplexity or []), *(search.rewards or {})]
        if unknown := [task for task in named if task not in every]:
            raise ConfigurationError(
                f"search: expected tasks of the suite ({first_few(every, 30)}), got {unknown[0]!r}. Correct it, or add "
                "the task."
            )
        if search.criterion in CONTROLLED and not control:
            raise ConfigurationError(
                f"search.criterion: expected control tasks for {search.criterion}, got none. Give target, or control."
            )

    def _check_names(self) -> None:
        given = [
            name for name, value in (("model", self.model != "lit-tiny"), ("pretrained", self.pretrained)) if value
        ]
        if self.network is not None and given:
            raise ConfigurationError(
                f"network: expected no {given[0]} together with it, got {getattr(self, given[0])!r}. Put it into the "
                "network's init_args."
            )
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

    def _check_control(self) -> None:
        if not self.control:
            return
        trained = [name for name, recipe in self.recipes.items() if recipe.learned]
        if not self.tasks or self.joint is not None or trained:
            got = "no other task" if not self.tasks else "joint" if self.joint is not None else f"learned {trained[0]}"
            raise ConfigurationError(
                f"control: expected tasks to be kept, that nothing is trained on, beside others, got {got}. Remove one."
            )

    def _check_penalty(self) -> None:
        if self.penalised and len(self.tasks) == 1:
            kept = " and control tasks, which no training reads" if self.control else ""
            raise ConfigurationError(
                f"fit.model.init_args.penalty: expected several tasks, as it reads the others' data, got "
                f"{self.tasks[0]!r} alone{kept}. Add a task, or remove the penalty."
            )

    def description(self) -> dict[str, Any]:
        """The resolved settings as plain data."""
        names = ("paths", "seeds", "fit", "test")
        settings = {"name": self.name, **self.base(), "tasks": self.named_tasks}
        settings |= {name: getattr(self, name) for name in names}
        settings["recipes"] = {name: recipe.description() for name, recipe in self.recipes.items()}
        optional: dict[str, Any] = {"linearized": self.linearized, "joint": self.joint}
        optional |= {"data": self.data or None, "sources": self.sources or None, "control": self.control or None}
        settings |= {name: value for name, value in optional.items() if value is not None}
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def run(self, scheduler: Scheduler) -> dict[str, Any]:
        """Have all stages run; returns the results."""
        self.ledger.save()
        scheduler.run(self.stages)
        settings = {"fit": self.fit, "recipes": self.description()["recipes"]}
        known = {
            "name": self.name,
            "model": self.model_description,
            "tasks": self.tasks,
            "classes": {task: len(self.data_module.tasks[task].classes) for task in self.tasks},
            **({"control": self.control} if self.control else {}),
            "settings": {**settings, **({"joint": self.joint} if self.joint is not None else {})},
        }
        joint = self.joint is not None
        return suite_results(known, self.directory, self.seeds, self.recipes, joint, scheduler.ledger)

    def _output(self, stage: Stage) -> Path:
        return self.directory / stage.name / stage.outputs[-1]

    def _merged(self, recipe: Recipe, stage: Stage) -> _Model:
        """What a recipe's merge is tested with."""
        if not recipe.learned:
            return {"task_vector": self._output(stage)}
        own = {task: self.directory / stage.name / output_name(task) for task in self._own_outputs(recipe)}
        return {"weights": self._output(stage), **({"task_outputs": own} if own else {})}

    def _own_outputs(self, recipe: Recipe) -> list[str]:
        """The tasks for which a learned merge leaves something behind the encoder."""
        return list((recipe.data or {}).get("adapted") or self.tasks) if recipe.has_outputs else []

    def _network(self) -> Network:
        network: Network = build("network", Network, self.network or {})
        return network

    def _settings(self, config: Mapping[str, Any], images: Any) -> dict[str, Any]:
        base = {**self.base(), "fingerprint": self.model_description["fingerprint"]}
        return {**base, "config": _deciding(config), "images": images}

    @cached_property
    def _images(self) -> dict[str, Any]:
        """Task -> a hash of its files' names and contents; nothing for a task of the embedded suite."""
        contents = {task: self._content(task, module.source) for task, module in self.data_module.tasks.items()}
        return {task: content for task, content in contents.items() if content is not None}

    def _content(self, task: str, source: Any) -> Any:
        """A task's own digest, else a hash of the files that its examples come from; None if it has neither."""
        if hasattr(source, "digest"):
            return source.digest()
        if isinstance(source, CorruptedTask):
            return self._content(task, source.source)
        if isinstance(source, PublishedSource):
            return self.ledger.tree_digest(*_tops(source.location.paths, source.root))
        if isinstance(source, FolderSource):
            return self.ledger.tree_digest(source.path)
        if isinstance(source, TextTask) and source.files:
            return self.ledger.tree_digest(*source.files)
        return self.sources.get(task)

    def _factors(self, task: str) -> Stage:
        """The Kronecker factors of a task at θ0, for the penalty of the others."""
        from lit_merge.data.task import TaskDataModule

        config, stage = self.factors_config(task), f"statistics/{task}"
        if task in self.tasks:
            images = self._images.get(task)
        else:
            images = self._content(task, TaskDataModule(**config["data"]["init_args"]).source)
        output = {"output": str(self.directory / stage / _FACTORS)}
        return Stage(stage, "statistics", {**config, **output}, self._settings(config, images), (_FACTORS,))

    def _fit(self, seed: int, task: str, factors: Mapping[str, Path]) -> Stage:
        others = {other: path for other, path in factors.items() if other != task}
        config = self.fit_config(seed, task, others)
        images = self._images if self.penalised else self._images.get(task)
        settings = self._settings(self.fit_config(seed, task), images)  # the factors' content counts
        heads = ["task_vector.head.safetensors"] if self._trains_heads else []
        outputs, inputs = (*heads, "task_vector.safetensors"), tuple(others.values())
        return Stage(f"seed-{seed}/fit/{task}", "fit", config, settings, outputs, inputs, _devices(config))

    def _fit_joint(self, seed: int) -> Stage:
        config = self.joint_config(seed)
        heads = [_JOINT_HEAD.replace("{task}", task) for task in self.tasks] if self._trains_heads else []
        outputs = (*heads, "task_vector.safetensors")
        settings = self._settings(config, self._images)
        return Stage(f"seed-{seed}/joint/fit", "fit", config, settings, outputs, devices=_devices(config))

    def _test_one(self, seed: int, task: str, vector: Path, heads: str | None) -> Stage:
        data, images = self.task_data(task, seed), self._images.get(task)
        return self._test(f"seed-{seed}/individual/{task}", data, {"task_vector": vector}, images, heads, [task])

    def _test_all(self, name: str, model: _Model, heads: str | None = None) -> Stage:
        return self._test(name, self.all_data(), model, self._images, heads, self.tasks)

    def _test(
        self, name: str, data: dict[str, Any], model: _Model, images: Any, heads: str | None, tasks: Sequence[str]
    ) -> Stage:
        config = self.test_config(data, model, heads)
        settings = self._settings(self.test_config(data, dict.fromkeys(model)), images)  # the model's content counts
        files = (
            path for files in model.values() for path in (files.values() if isinstance(files, Mapping) else [files])
        )
        inputs = (*files, *_files_of(heads, tasks))
        return Stage(
            name, "test", config, settings, ("test_metrics.json", "test_hits.safetensors"), inputs, _devices(config)
        )

    def _learn(self, seed: int, name: str, vectors: Mapping[str, Path], heads: str | None) -> list[Stage]:
        recipe = self.recipes[name]
        config = self.learned_config(seed, recipe, [str(path) for path in vectors.values()], heads)
        named = map(self._as_output, recipe.files(seed))
        inputs = (*vectors.values(), *named, *_files_of(heads, self.tasks))
        settings = self._settings(self.learned_config(seed, recipe, []), self._images)
        own = map(output_name, self._own_outputs(recipe))
        outputs = ("coefficients.safetensors", *own, "merged.safetensors")
        return [Stage(f"seed-{seed}/merge/{name}", "fit", config, settings, outputs, inputs, _devices(config))]

    def _merge(self, seed: int, name: str, vectors: Mapping[str, Path], heads: str | None) -> list[Stage]:
        """The stages of one recipe, the merge last, whose last output is the merged vector."""
        recipe, stage = self.recipes[name], f"seed-{seed}/merge/{name}"
        collected = vectors if recipe.collected else {}
        before = [self._statistics(seed, name, task, vector, heads) for task, vector in collected.items()]
        files = {task: self._output(one) for task, one in zip(collected, before, strict=True)}
        given, seen = recipe.of_seed(seed), bool(recipe.search or recipe.calibrate)
        config = {
            "vectors": None,
            **self.base(),
            "kind": "task_vector",
            "recipe": recipe.recipe,
            "settings": given["settings"],
            "transform": recipe.transform.to_config() if recipe.transform else None,
            **{key: given[key] for key in ("parts", "overrides") if given[key]},
            "search": self._search(recipe.search),
            **({"calibrate": recipe.calibrate.to_config()} if recipe.calibrate else {}),
            "data": self.all_data() if seen else None,
            **({"linearized": True} if self.evaluated_linearized else {}),
        }
        settings = self._settings(config, self._images if seen else None)  # the vectors' content counts
        paths = {"vectors": [str(path) for path in vectors.values()], "output": str(self.directory / stage / _MERGED)}
        if files:
            statistics = {task: str(path) for task, path in files.items()}
            config = combine(config, {"settings": {**(given["settings"] or {}), "statistics": statistics}})
        own = _files_of(heads, self.tasks) if recipe.search else ()
        inputs = (*vectors.values(), *files.values(), *map(self._as_output, recipe.files(seed)), *own)
        config = combine(config, self.base(heads) if own else {})
        outputs = (*(["merged-search.json"] if recipe.search else []), _MERGED)
        devices = 1 if seen else 0
        return [*before, Stage(stage, "merge", {**config, **paths}, settings, outputs, inputs, devices)]

    def _search(self, search: CoefficientSearch | None) -> dict[str, Any] | None:
        """A coefficient is chosen in the precision that the merged model is tested in."""
        tested = self.test.get("trainer", {}).get("precision")
        precision = {"precision": tested} if tested in get_args(Precision) else {}
        return None if search is None else {**precision, **search.to_config()}

    def _statistics(self, seed: int, name: str, task: str, vector: Path, heads: str | None) -> Stage:
        recipe, stage = self.recipes[name], f"seed-{seed}/statistics/{name}/{task}"
        config = {
            **(recipe.statistics or {}),
            "kind": recipe.collected,
            **self.base(),
            "data": self.task_data(task, seed),
            **({"linearized": True} if self.evaluated_linearized else {}),
        }
        output = f"{recipe.collected}.safetensors"
        paths = {"task_vector": str(vector), "output": str(self.directory / stage / output)}
        settings = self._settings(config, self._images.get(task))
        config = combine(config, self.base(heads) if heads else {}, paths)
        return Stage(stage, "statistics", config, settings, (output,), (vector, *_files_of(heads, [task])))

    def _as_output(self, path: Path) -> Path:
        """A file that a recipe names, as the stages call it if it is in the suite's directory."""
        here, there = self.directory.resolve(), path.resolve()
        return self.directory / there.relative_to(here) if there.is_relative_to(here) else path

    def _with_named_files(self, stage: Stage) -> Stage:
        """With files from elsewhere that its configuration names, such as a penalty's: their content counts, too."""
        known = {*stage.inputs, *named_files(self.base())}
        named = map(self._as_output, named_files({name: one for name, one in stage.config.items() if name != "data"}))
        own = [path for path in dict.fromkeys(named) if path.is_file() and not path.is_relative_to(self.directory)]
        return replace(stage, inputs=(*stage.inputs, *(path for path in own if path not in known)))


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without how many processes read the data, and without their places: their content counts."""
    if not config.get("data"):
        return dict(config)
    given = config["data"]["init_args"]
    arguments = {name: value for name, value in given.items() if name not in ("path", "root", "workers")}
    arguments |= {name: list(given[name]) for name in ("paths", "other_paths") if given.get(name)}
    return {**config, "data": {**config["data"], "init_args": arguments}}


def _tops(paths: Sequence[Path], root: Path) -> list[Path]:
    """The files and folders right below a root that hold a data set's files; those elsewhere as they are."""
    found = [path for path in paths if path.exists()]
    return sorted({root / path.relative_to(root).parts[0] if path.is_relative_to(root) else path for path in found})


def _files_of(heads: str | None, tasks: Sequence[str]) -> tuple[Path, ...]:
    """The heads' files of some tasks."""
    return () if heads is None else tuple(Path(heads.replace("{task}", task)) for task in tasks)


@contextmanager
def _naming(recipe: str) -> Iterator[None]:
    """Within it, what is refused is said of this recipe."""
    try:
        yield
    except LitMergeError as error:
        raise type(error)(f"recipes.{recipe}: {error}") from error


class _ReadTooEarly(Exception):  # noqa: N818 - a request, not an error
    """A transform has read a tensor where it was only planned."""


def _unread(name: str) -> Tensor:
    raise _ReadTooEarly


_MERGED = "merged.safetensors"
_FACTORS = "kfac.safetensors"
_JOINT_HEAD = "task_vector.{task}.head.safetensors"


def _devices(config: Mapping[str, Any]) -> int:
    """How many devices a configuration's trainer uses where there are some; 1 if it says so in words."""
    trainer = config.get("trainer", {})
    given = trainer.get("devices", 1)
    if trainer.get("accelerator") == "cpu":
        return 0
    return len(given) if isinstance(given, list) else max(1, given) if isinstance(given, int) else 1
