"""Fine-tune every task, merge, evaluate, report: the whole experiment.

Examples:
  lit-merge suite --config configs/suite/quickstart.yaml
  lit-merge suite --tasks '[digits, signs]' --output runs/two --fit.trainer.max_steps 300
  lit-merge suite --config configs/suite/clip8_vit_b32.yaml --data.root /data --engine ray

A graph of ``fit``, ``statistics``, ``merge`` and ``test`` commands. Every stage has a key, the hash of its resolved
settings and of the contents of its inputs; a stage whose record has the same key and whose outputs still have the
recorded hashes is not run again, so that a killed run goes on where it stopped. Stages that do not depend on each other
may run at the same time, here or on a cluster.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.search import CoefficientSearch
from lit_merge.suite.engines import open_engine
from lit_merge.suite.overlays import with_parts as arguments
from lit_merge.suite.plan import SuitePlan
from lit_merge.suite.recipe import Recipe
from lit_merge.suite.results import check_expected, deviations
from lit_merge.suite.run import refuse_other_files, run_suite
from lit_merge.suite.settings import combine, task_names

__all__ = ["Recipe", "arguments", "suite"]

_IMPORTED = (
    *("lit_merge.commands.training.lightning_cli", "lit_merge.modules", "lit_merge.data", "lit_merge.callbacks"),
    "lit_merge.evaluation.search",
)


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
    network: dict | None = None,
    sources: dict[str, dict] | None = None,
    control: list[str] | None = None,
    expected: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Fine-tune every task, extract, merge with every recipe and evaluate; print a table, write JSON and a figure.

    Args:
        output: directory of everything that is written; the outcome is results.json, results.png and report.html. Run
            again with the same settings, it goes on where it stopped.
        name: of the results.
        model: architecture, as for fit.
        pretrained: its weights.
        tasks: tasks of the embedded suite or published data sets; by default the embedded eight, or none if there are
            paths or sources.
        paths: the user's own image folders, by task name.
        seeds: fine-tuning seeds; every seed gives one set of task vectors.
        fit: configuration of fit (trainer, model, data); task, seed, model and output are filled in. For a Tak penalty
            without files the suite collects the factors of every task at θ0; statistics then holds their settings:
            images, split, seed, convolutions, normalised, corrected, and tasks, names of other ones instead.
        test: configuration of test (trainer, data; model for the tests on all tasks).
        recipes: name -> how to merge: a method's name, a list of parts, a transform by class path, or a mapping with a
            search and more; null to leave it out. By default weight averaging, and task arithmetic with a
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
        network: instead of model and pretrained, a network of your own: class_path and init_args of a
            lit_merge.models.network.Network, which every stage is given.
        sources: tasks of your own, by name: class_path and init_args of a lit_merge.data.sources.Task each.
        control: those among all tasks that nothing is fine-tuned on: they are what a search with the criterion negation
            or target_control is to keep, and are evaluated with every model.
        expected: task -> accuracy, in percent, that its own fine-tuned model is known to reach. One that is more than a
            point off is warned of; nothing else depends on it.

    Returns:
        The content of results.json.

    Raises:
        LitMergeError: stages have failed; what does not depend on them is finished.
    """
    from lit_merge.commands.running import run_command
    from lit_merge.commands.training.lightning_cli import check_configuration

    if retries < 0:
        raise ConfigurationError(f"retries: expected a number of at least 0, got {retries}. Use 0 for one attempt.")
    refuse_other_files(Path(output))
    if recipes is None:
        searched = Recipe("task_arithmetic", search=CoefficientSearch())
        recipes = {"weight_average": Recipe("weight_average"), "task_arithmetic": searched}
    every = task_names(tasks, paths, sources)
    if unknown := [task for task in control or [] if task not in every]:
        raise ConfigurationError(
            f"control: expected some of the tasks ({', '.join(every)}), got {unknown[0]!r}. Add it to tasks, paths or "
            "sources."
        )
    own = [task for task in every if task not in (control or [])]
    check_expected(expected or {}, own)
    plan = SuitePlan(
        name=name,
        directory=Path(output),
        model=model,
        pretrained=pretrained,
        tasks=own,
        paths=dict(paths or {}),
        seeds=list(seeds),
        fit=_nested(fit or {}),
        test=_nested(test or {}),
        recipes={name: one for name, one in recipes.items() if one is not None},
        linearized=linearized,
        joint=None if joint is None else _nested(joint),
        data=_nested(data or {}),
        network=network,
        sources=dict(sources or {}),
        control=list(dict.fromkeys(control or [])),
    )
    plan.check(check_configuration)
    for line in plan.cautions() if engine == "local" else ():
        warnings.warn(line, stacklevel=2)
    if engine == "ray" or parallel not in (None, 1):
        plan.data_module.prepare_data()  # once, not in every process
    of_ray = (ray_address, ray_cpus, ray_gpus)
    opened = partial(open_engine, engine, run_command, parallel, output, plan.devices, *of_ray, _imports_of(plan))
    results = run_suite(plan, opened, overwrite, retries)
    for line in deviations(results, expected or {}):
        warnings.warn(line, stacklevel=2)
    return results


def _imports_of(plan: SuitePlan) -> tuple[str, ...]:
    """The modules that every stage imports; the user's own may compute something when they are imported."""
    network = str((plan.network or {}).get("class_path", ""))
    return (*_IMPORTED, *([network.rpartition(".")[0]] if network.startswith("lit_merge.") else []))


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """``{"trainer.max_steps": 3}``, as single overrides from the shell come, as nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = combine(nested, value)
    return nested
