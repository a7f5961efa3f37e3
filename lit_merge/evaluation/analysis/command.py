"""Measures and figures of any set of task vectors: what ``lit-merge analyze`` does."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_merge._version import __version__
from lit_merge.checkpoints.pairing.differences import Rules
from lit_merge.evaluation.analysis.checks import (
    check_images,
    check_tasks,
    claim_folder,
    stacked_vectors,
    wanted_analyses,
)
from lit_merge.evaluation.analysis.figures import draw_figures
from lit_merge.evaluation.analysis.images import task_images
from lit_merge.evaluation.analysis.processes import Processes, processes
from lit_merge.evaluation.analysis.record import Record, file_name
from lit_merge.evaluation.analysis.settings import ON_IMAGES, Analysis, Grid, Method, Paths, default_methods
from lit_merge.evaluation.analysis.vectors import cosine, known_coefficients, norms, signs
from lit_merge.files.text import write_text
from lit_merge.models.linear_features import layout
from lit_merge.models.merging.cautions import cautions_of
from lit_merge.models.merging.inputs import open_base, open_inputs
from lit_merge.models.network import Base, Network
from lit_merge.params import fingerprint
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms.base import finite_number, whole_number
from lit_merge.vectors import Coefficients, TaskVectors

if TYPE_CHECKING:
    from lightning import LightningDataModule

    from lit_merge.evaluation.analysis.models import Evaluator

__all__ = ["SCHEMA", "analyze"]

SCHEMA = 1
"""The version of the format of ``analysis.json``."""

_DIGITS = 8  # of a number in the results: what comes after depends on the number of threads and processes


def analyze(
    vectors: list[str],
    output: str,
    analyses: list[Analysis] | None = None,
    data: LightningDataModule | None = None,
    split: Literal["val", "test"] = "test",
    images: int | None = 2048,
    methods: dict[str, Method] | None = None,
    density: float = 0.2,
    grid: Grid | None = None,
    paths: Paths | None = None,
    coefficients: str | None = None,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    network: Network | None = None,
    base: str | None = None,
    tasks: list[str] | None = None,
    leave_out: list[str] | None = None,
    linearized: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    devices: int = 1,
    progress: bool = True,
) -> Path | None:
    """Measure a set of task vectors, alone and merged, and draw what was found.

    The folder gets analysis.json, figures as PNG and SVG, and the parts that are done already, by which an interrupted
    analysis goes on where it was. The same inputs give the same analysis.json.

    Args:
        vectors: task vector files or fine-tuned weights, one per task.
        output: folder to write.
        analyses: of the vectors alone: cosine, norms, signs; of given coefficients: coefficients; on images: accuracy,
            paths, disentanglement, tau_jp, advantage. By default those of the vectors, of coefficients if they are
            given, and accuracy if the model is a CLIP.
        data: the tasks whose images are looked at; by default the embedded tasks that the vectors are named after.
        split: whose images.
        images: how many of each task at most, drawn at random; null for all.
        methods: of accuracy: name -> a way to merge; by default weight_average, task_arithmetic and ties.
        density: of signs: the share of every vector's entries, the largest, that is kept.
        grid: of disentanglement: the coefficients, what is compared, and the pairs of tasks.
        paths: of paths: how many points, and whose vectors.
        coefficients: of coefficients: a file of merging coefficients.
        model: the CLIP that the vectors start from.
        pretrained: its weights.
        network: instead of both, any network, by class path.
        base: instead, weights of any model that the vectors start from; only the vectors can then be analysed.
        tasks: names of the vectors, in order; by default their own.
        leave_out: patterns of names that are not analysed, such as those of heads, e.g. classifier.*.
        linearized: whether the vectors were trained for the encoder's tangent at θ0, and are evaluated as that.
        batch_size: images that go through the network at a time.
        seed: of the choice of images.
        devices: how many to share the work.
        progress: whether to show a bar, if the standard error is a terminal.

    Returns:
        The folder; None in other processes than the first.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, or a setting is refused.
    """
    with processes(devices) as shared:
        folder = Path(output)
        origin = open_base(model, pretrained, base, network=network)
        wanted = wanted_analyses(analyses, origin, coefficients)
        finite_number("density", density, minimum=0.0, maximum=1.0)
        whole_number("batch_size", batch_size, minimum=1)
        inputs, _ = open_inputs(vectors, origin, tasks, False, Rules(tuple(leave_out or ()), offered=("leave_out",)))
        stacked = stacked_vectors([one.vector for one in inputs], origin)
        grid, paths = grid or Grid(), paths or Paths()
        methods = default_methods() if methods is None else methods
        for method in methods.values() if "accuracy" in wanted else ():
            method.resolved()
        given = None if coefficients is None else Coefficients.load(coefficients)
        check_tasks(stacked, wanted, grid, paths)
        claim_folder(folder, shared)
        result = _head(stacked, origin, wanted, seed)
        if (warned := list(cautions_of(inputs, origin).lasting)) and shared.is_first:
            sys.stderr.writelines(f"lit-merge: warning: {line}\n" for line in warned)
        result |= {"warnings": warned} if warned else {}
        evaluator: Evaluator | None = None
        if any(name in ON_IMAGES for name in wanted):
            files = [(one.path, one.vector.tasks) for one in inputs]
            evaluator = _evaluator(stacked, files, origin, linearized, data, split, images, batch_size, seed, shared)
            check_images(stacked, list(evaluator.images), wanted, grid, paths)
            known = {task: {"images": own.total, "sha256": own.digest()} for task, own in evaluator.images.items()}
            result |= {"split": split, "images": known, "linearized": linearized}
        found: dict[str, Any] = {}
        with _progress(progress and shared.is_first) as bar:
            on_vectors: dict[str, Callable[[], Any]] = {
                "cosine": lambda: cosine(stacked, shared),
                "norms": lambda: norms(stacked, shared),
                "signs": lambda: signs(stacked, density, shared),
                "coefficients": lambda: known_coefficients(given) if given is not None else {},
            }
            for name in wanted:
                if name in on_vectors:
                    ended = bar(name, 1)
                    found[name] = on_vectors[name]()
                    ended()
                elif evaluator is not None:
                    found[name] = _on_images(name, evaluator, methods, grid, paths, result, folder, shared, bar)
        result["analyses"] = _plain(found)
        if shared.is_first:
            draw_figures(result, folder, given)
            write_text(folder / "analysis.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        shared.from_first(None)
        return folder if shared.is_first else None


def _head(vectors: TaskVectors, origin: Base, wanted: Sequence[str], seed: int) -> dict[str, Any]:
    """What the results say of their inputs."""
    rows = [vectors.vector(task) for task in vectors.tasks]
    entries = sum(vectors.shape(name)[1:].numel() for name in vectors.names)
    return {
        "schema": SCHEMA,
        "kind": "analysis",
        "asked": list(wanted),
        "model": {"name": origin.name, "fingerprint": origin.fingerprint, "parameters": entries},
        "tasks": list(vectors.tasks),
        "vectors": {row.task: {"digest": row.content_digest or fingerprint(row)} for row in rows},
        "versions": versions(),
        "hardware": hardware(),
        "seeds": {"images": seed},
    }


def _evaluator(
    vectors: TaskVectors,
    files: Sequence[tuple[str, Sequence[str]]],
    origin: Base,
    linearized: bool,
    data: Any,
    split: str,
    images: int | None,
    batch_size: int,
    seed: int,
    shared: Processes,
) -> Evaluator:
    """The model on its device, with the images and heads of the data's tasks."""
    from lit_merge.data.multitask import MultiTaskDataModule, task_names
    from lit_merge.evaluation.analysis.models import Evaluator
    from lit_merge.evaluation.placed_model import PlacedModel
    from lit_merge.modules.multitask import MultiTaskModule

    data = data if data is not None else MultiTaskDataModule(tasks=list(vectors.tasks))
    assert isinstance(origin, Network)
    module = MultiTaskModule(network=origin, linearized=linearized).eval()
    module.look_beside(files)
    chosen = task_images(data, task_names(data), split, module, images, seed, batch_size, shared)
    heads = {task: module.make_head(own).to(shared.device) for task, own in chosen.items()}
    return Evaluator(PlacedModel(module.to(shared.device)), vectors, heads, chosen)


def _on_images(
    name: str,
    evaluator: Evaluator,
    methods: Mapping[str, Method],
    grid: Grid,
    paths: Paths,
    head: Mapping[str, Any],
    folder: Path,
    shared: Processes,
    bar: Callable[[str, int], Callable[[], object]],
) -> Any:
    from lit_merge.evaluation.analysis import models

    depends = {
        **{key: head[key] for key in ("model", "vectors", "images", "linearized", "versions")},
        "precision": [shared.device.type, torch.get_float32_matmul_precision(), __version__],
        "network": layout(evaluator.network),
        "heads": {task: [fingerprint(one.state_dict()), layout(one)] for task, one in evaluator.heads.items()},
    }

    def record(what: str, settings: Any) -> Record:
        return Record(folder / "parts" / f"{file_name(what)}.json", [depends, settings], shared)

    if name == "accuracy":
        return models.accuracy(evaluator, methods, record(name, None), bar(name, len(methods) + 2))
    if name == "paths":
        points = 2 * paths.points * len(paths.tasks or evaluator.vectors.tasks)
        return models.paths(evaluator, paths, record(name, None), bar(name, points))
    if name == "disentanglement":
        ended = bar(name, grid.steps * len(grid.pairs or [()]))
        settings = {key: value for key, value in asdict(grid).items() if key != "pairs"}
        return models.disentanglement(evaluator, grid, lambda pair: record(f"{name}-{pair}", [settings, pair]), ended)
    if name == "tau_jp":
        return models.tau_jp(evaluator, bar(name, len(evaluator.images)))
    return models.advantage(evaluator, bar(name, len(evaluator.vectors.tasks)))


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str, int], Callable[[], object]]]:
    """``bar(name, total)`` starts one and gives what is to be called after every part."""
    import sys

    if not shown or not sys.stderr.isatty():
        yield lambda name, total: lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def start(name: str, total: int) -> Callable[[], object]:
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        yield start


def _plain(value: Any) -> Any:
    """As JSON has it: numbers of so many digits, null for what is none."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
