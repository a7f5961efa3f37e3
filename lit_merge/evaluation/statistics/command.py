"""Statistics of one task's fine-tuned encoder on disk: what ``lit-merge statistics`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import DataLoader

from lit_merge._version import __version__
from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.search import quiet, silent_trainer
from lit_merge.evaluation.statistics.fisher import LABELS, collect_fisher
from lit_merge.evaluation.statistics.gradients import collect_gradients
from lit_merge.evaluation.statistics.gram import collect_gram
from lit_merge.evaluation.statistics.kfac import collect_kfac
from lit_merge.files.hub import address_entry, parse_address, pinned
from lit_merge.models.network import Network
from lit_merge.transforms.base import one_of, whole_number
from lit_merge.vectors import LazyTensors, TaskVector, file_digest
from lit_merge.vectors.statistics import FORMATS, Kind, write_statistics

if TYPE_CHECKING:
    from lit_merge.data import TaskDataModule

__all__ = ["statistics"]

_OF_THE_BASE = ("gradients", "kfac")
_WITHOUT_LABELS = ("gram", "kfac")


def statistics(
    kind: Kind,
    task_vector: str | None = None,
    weights: str | None = None,
    output: str | None = None,
    data: TaskDataModule | None = None,
    split: Literal["train", "val", "test"] = "train",
    images: int | None = 256,
    labels: Literal["expected", "sampled", "true"] = "expected",
    convolutions: bool = False,
    seed: int = 0,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    network: Network | None = None,
    linearized: bool = False,
    overwrite: bool = False,
    normalised: bool = True,
    corrected: bool = False,
) -> Path:
    """Collect what Fisher merging, RegMean, a trust region or a curvature penalty needs of one task, in one file.

    It runs in one process, on one device. The images are not augmented; which ones are taken depends on the seed alone.

    Args:
        kind: fisher for the diagonal Fisher information, gram for the Gram matrices of the linear layers' inputs,
            gradients for the mean absolute gradients at θ0, kfac for Kronecker factors of the curvature there.
        task_vector: file of the task's vector; the encoder is θ0 + τ, of gradients θ0. Not for kfac.
        weights: instead of it a file of the task's whole weights; then data has to be given.
        output: file to write, ending in .safetensors; by default <name>-<kind>.safetensors beside the vector or the
            weights, of kfac <task>-kfac.safetensors in the current folder.
        data: the task's images; by default the embedded task that the vector is named after. kfac asks for it.
        split: which of them.
        images: how many, drawn from the split at random; null for all.
        labels: of fisher and gradients: expected (exact over the classes) and sampled (drawn from the model) read no
            labels; true is the empirical Fisher, and for gradients what the paper takes.
        convolutions: of gram and kfac: also of 2-D convolutions, such as the patch embedding.
        seed: of the choice of images, of sampled labels, and of the probes of kfac.
        model: the base model that the vector starts from.
        pretrained: its weights.
        network: instead of both, any network, by class path.
        linearized: of fisher: whether the vector was trained linearised; the Fisher information is that of the tangent.
        overwrite: replace an existing output.
        normalised: of kfac: whether the features are divided by their norm, as a zero-shot head does.
        corrected: of kfac: whether it has corrected eigenvalues (EK-FAC); the images are read twice.

    Returns:
        The file.

    Raises:
        LitMergeError: inputs are missing, damaged or do not fit each other, or the output exists.
    """
    _check_settings(kind, split, images, labels, convolutions, linearized, normalised, corrected)
    _check_model(kind, task_vector, weights, data)
    task_vector, weights = task_vector and pinned(task_vector), weights and pinned(weights)
    source = task_vector or weights
    task = "" if task_vector is None else TaskVector.load(task_vector).task
    target = _check_output(source or f"{data.name if data else task}.safetensors", output, kind, overwrite)
    from lit_merge.modules import FineTuneModule

    files: dict[str, Any] = {} if kind in _OF_THE_BASE else {"task_vector": task_vector, "weights": weights}
    module = FineTuneModule(model, pretrained, network=network, linearized=linearized, **files)
    if task_vector is not None and kind in _OF_THE_BASE:  # of which the head counts, too
        module.look_beside([(task_vector, None)])
    own = _data_of(task, data)
    loader = _loader(own, module, split, images, seed)
    with quiet():
        device = silent_trainer().strategy.root_device
    encoder = module.encoder.to(device)
    if kind == "gram":
        tensors = collect_gram(encoder, loader, convolutions, module.inputs)
    elif kind == "kfac":
        tensors = collect_kfac(encoder, loader, seed, normalised, convolutions, module.inputs, corrected)
    else:
        collect = collect_fisher if kind == "fisher" else collect_gradients
        tensors = collect(encoder, loader, module.make_head(own).to(device), labels, seed, module.inputs)
    read = "none" if kind in _WITHOUT_LABELS else labels
    inputs = {} if source is None else {"inputs": _described(source)}
    header = {
        **module.base_description(),
        "images": str(len(loader.sampler)),  # type: ignore[arg-type]
        "split": split,
        "labels": read,
        "labels_read": "true" if read == "true" else "false",
        "seed": str(seed),
        **inputs,
        "versions": json.dumps({"lit_merge": __version__, "torch": str(torch.__version__)}),
    }
    if kind == "kfac":
        header["normalised"] = "true" if normalised else "false"
        header |= {"corrected": "true"} if corrected else {}
    if linearized:
        header["linearized"] = "true"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_statistics(target, kind, tensors, own.name, module.base_fingerprint, header)
    LazyTensors(target, verify=True)
    return target


def _check_settings(
    kind: str,
    split: str,
    images: int | None,
    labels: str,
    convolutions: bool,
    linearized: bool,
    normalised: bool,
    corrected: bool,
) -> None:
    one_of("kind", kind, FORMATS)
    one_of("split", split, ("train", "val", "test"))
    one_of("labels", labels, LABELS)
    whole_number("images", images, minimum=1, optional=True)
    if kind not in _WITHOUT_LABELS and convolutions:
        raise ConfigurationError(f"convolutions: expected only with kind: gram or kfac, got it with {kind}. Remove it.")
    if kind in _WITHOUT_LABELS and labels != "expected":
        raise ConfigurationError(
            f"labels: expected only with kind: fisher or gradients, got {labels} with {kind}. Remove it."
        )
    if kind != "kfac" and not normalised:
        raise ConfigurationError(f"normalised: expected only with kind: kfac, got false with {kind}. Remove it.")
    if kind != "kfac" and corrected:
        raise ConfigurationError(f"corrected: expected only with kind: kfac, got true with {kind}. Remove it.")
    if kind in _OF_THE_BASE and linearized:
        raise ConfigurationError(
            f"linearized: expected only with kind: fisher, got it with {kind}, which at θ0 are the tangent's too. "
            "Remove it."
        )
    if kind == "gram" and linearized:
        raise ConfigurationError(
            "linearized: expected only with kind: fisher, got it with gram, as the layers of a tangent have inputs of "
            "two kinds. Remove it, or merge by Fisher information."
        )


def _check_model(kind: str, task_vector: str | None, weights: str | None, data: TaskDataModule | None) -> None:
    """Refuse files that the kind is not about, and nothing to go by."""
    if kind == "kfac" and (task_vector is not None or weights is not None):
        raise ConfigurationError(
            "task_vector and weights: expected none with kind: kfac, which is of the base model alone, got "
            f"{task_vector or weights}. Remove it, and name the task by its data."
        )
    if kind == "kfac":
        if data is None:
            raise ConfigurationError("data: expected the task's images, got none. Set data, e.g. --data.task digits.")
        return
    if kind == "gradients" and weights is not None:
        raise ConfigurationError(
            "weights: expected task_vector with kind: gradients, which are those of its base model, got weights. "
            "Name the vector's file."
        )
    if (task_vector is None) == (weights is None):
        raise ConfigurationError(
            f"task_vector and weights: expected exactly one of them, got {'none' if weights is None else 'both'}. "
            "Give the file of the task's fine-tuned model."
        )


def _described(source: str) -> str:
    """The file that the encoder was made of, as a header has it."""
    return json.dumps({"file": Path(source).name, **address_entry(source), "sha256": _digests(source)})


def _digests(source: str) -> str | dict[str, str]:
    """SHA-256 of the file, or of every file of a model that consists of several."""
    files = open_checkpoint(source).files
    return file_digest(files[0]) if len(files) == 1 else {file.name: file_digest(file) for file in files}


def _check_output(given: str, output: str | None, kind: str, overwrite: bool) -> Path:
    """The file to write, for a source file, or one that is called like the task."""
    source = Path(given)
    if output is None:  # beside it, or in the current folder if it lies on the Hub
        name = f"{source.stem}-{kind}.safetensors"
        target = source.with_name(name) if parse_address(given) is None else Path(name)
    else:
        target = Path(output)
    if target.suffix != ".safetensors":
        raise ConfigurationError(f"output: expected a file ending in .safetensors, got {target}.")
    if target.resolve() == source.resolve():
        raise ConfigurationError(f"output: expected another file than the input, got {target}. Choose another name.")
    if target.exists() and not overwrite:
        raise ConfigurationError(
            f"output: expected a new file, got {target}, which exists. Set overwrite to replace it."
        )
    return target


def _data_of(task: str, data: TaskDataModule | None) -> TaskDataModule:
    """The task's data module."""
    from lit_merge.data import TaskDataModule

    if data is None and not task:
        raise ConfigurationError(
            "data: expected the task's images, as the file does not name an embedded task, got none. Set data."
        )
    own = TaskDataModule(task=task) if data is None else data
    if task and own.name != task:
        raise ConfigurationError(
            f"data: expected images of the vector's task {task!r}, got {own.name!r}. "
            "Give that task's data, or name it so (data.name)."
        )
    return own


def _loader(data: TaskDataModule, module: Any, split: str, images: int | None, seed: int) -> DataLoader[Any]:
    """Batches of images drawn from a split, each at most once."""
    data.source.prepare()
    examples = data.examples(split, module)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return DataLoader(
        examples,
        batch_size=min(data.evaluation_batch_size, len(order)),
        sampler=order[:images],
        num_workers=data.workers,
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
