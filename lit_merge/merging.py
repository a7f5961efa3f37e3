"""Task vectors in, merged weights or a merged task vector out: what ``lit-merge merge`` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError
from lit_merge.models.encoder import load_clip
from lit_merge.params import check_finite
from lit_merge.search import CoefficientSearch, SearchResult, search_coefficient
from lit_merge.transforms import Transform, recipe, replace_field
from lit_merge.vectors import TaskVector, TaskVectors, check_base, merged_parameters
from lit_merge.vectors.store import file_digest, write_tensors

__all__ = ["MergeResult", "beside", "merge"]

if TYPE_CHECKING:
    from lightning import LightningDataModule

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote.

    Attributes:
        output: the file.
        transform: the chain that was applied, with the chosen coefficient.
        search: the search's curve, or None.
    """

    output: Path
    transform: Transform
    search: SearchResult | None


def resolve_transform(
    recipe_name: str | None, settings: Mapping[str, Any] | None, transform: Transform | None
) -> Transform:
    """The chain that a recipe's name with settings, or a transform, stands for.

    Raises:
        ConfigurationError: neither or both are given, or the recipe or a setting is unknown.
    """
    if (recipe_name is None) == (transform is None):
        raise ConfigurationError(
            "recipe and transform: expected exactly one of them, got "
            f"{'none' if transform is None else 'both'}. Use e.g. recipe: task_arithmetic."
        )
    if transform is not None:
        if settings:
            raise ConfigurationError(
                f"settings: expected none beside transform, got {dict(settings)}. Put them inside it."
            )
        return transform
    assert recipe_name is not None
    return recipe(recipe_name, **(settings or {}))


def merge(
    vectors: list[str],
    output: str,
    recipe: str | None = None,
    settings: dict[str, Any] | None = None,
    transform: Transform | None = None,
    kind: Literal["weights", "task_vector"] = "weights",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    model: str = "lit-tiny",
    pretrained: str | None = None,
    search: CoefficientSearch | None = None,
    data: LightningDataModule | None = None,
    overwrite: bool = False,
    linearized: bool = False,
) -> MergeResult:
    """Merge task vectors into one model, by a recipe or any chain of transforms.

    Args:
        vectors: task vector files; their order matters for analogy and per-task coefficients only.
        output: file to write, ending in .safetensors; a search's curve is written beside it as <name>-search.json,
            and by the command its configuration as <name>-merge.yaml. Missing folders are created.
        recipe: name of a method, e.g. task_arithmetic, weight_average, negation, analogy.
        settings: of the recipe, e.g. {coefficient: 0.3}.
        transform: instead of a recipe, any transform by class path, or a Chain of them.
        kind: weights writes the whole model, loadable by open_clip; task_vector writes the merged τ.
        dtype: of the stored tensors.
        model: the base model that the vectors start from.
        pretrained: its weights.
        search: choose a coefficient on validation data instead of taking the given one.
        data: the tasks to search on; by default the embedded tasks that the vectors are named after.
        overwrite: replace an existing output and the files beside it.
        linearized: whether the vectors are merged for the encoder's tangent at θ0, as they were trained: a search
            evaluates that instead of the encoder, and the output's header says so.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, or the output exists.
    """
    chosen = resolve_transform(recipe, settings, transform)
    target = _check_paths(vectors, output, overwrite)
    clip = load_clip(model, pretrained)
    stacked = TaskVectors([TaskVector.load(path, verify=True) for path in vectors])
    check_base(stacked, clip.fingerprint, clip.name)
    _create_folder(target.parent)
    found = None
    if search is not None:
        found = search_coefficient(stacked, chosen, search, model, pretrained, data, linearized)
        chosen = replace_field(chosen, search.field, found.best)
    provenance = {
        "base_fingerprint": clip.fingerprint,
        "base_model": clip.name,
        "transform": repr(chosen),
        "transform_config": json.dumps(chosen.to_config()),
        "inputs": json.dumps(
            [{"tasks": task, "sha256": file_digest(path)} for task, path in zip(stacked.tasks, vectors, strict=True)]
        ),
        "lit_merge": __version__,
    }
    if linearized:
        provenance["linearized"] = "true"
    if found is not None:
        provenance["search"] = json.dumps(asdict(found))
    merged = chosen(stacked).single()
    if kind == "task_vector":
        vector = TaskVector(merged, merged.task, metadata={**dict(merged.metadata), **provenance})
        vector.save(target, _DTYPES[dtype])
    else:
        weights = {**clip.text.state(), **{f"visual.{name}": value for name, value in clip.visual.state_dict().items()}}
        base = dict(clip.visual.named_parameters())
        weights |= {f"visual.{name}": value for name, value in merged_parameters(base, merged)}
        stored = {name: _cast(value, _DTYPES[dtype]) for name, value in weights.items()}
        check_finite(stored, f"merged weights in {dtype}")
        write_tensors(target, stored, {"format": "lit-merge/weights/1", **provenance})
    if found is not None:
        found.save(beside(target, "search.json"))
    return MergeResult(target, chosen, found)


def beside(output: Path, ending: str) -> Path:
    """The file that goes with a merge's output, e.g. ``m-search.json`` with ``m.safetensors``."""
    return output.with_name(f"{output.stem}-{ending}")


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype) if value.is_floating_point() and value.ndim else value.detach()


def _check_paths(vectors: Sequence[str], output: str, overwrite: bool) -> Path:
    target = Path(output)
    if not vectors:
        raise ConfigurationError("vectors: expected at least one task vector file, got none. List them.")
    if target.suffix != ".safetensors":
        raise ConfigurationError(f"output: expected a file ending in .safetensors, got {output}. Rename it.")
    if any(Path(path).resolve() == target.resolve() for path in vectors):
        raise ConfigurationError(f"output: expected another file than the inputs, got {output}. Choose another name.")
    existing = [path for path in (target, beside(target, "search.json"), beside(target, "merge.yaml")) if path.exists()]
    if existing and not overwrite:
        raise ConfigurationError(
            f"output: expected a new file, got {existing[0]}, which exists. Set overwrite to replace it."
        )
    return target


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"output: expected a folder that can be created, got {folder} ({error.strerror}). Choose another one."
        ) from error
