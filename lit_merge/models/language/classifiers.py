"""Heads of a task's own, which train with it and are no part of what is merged: classes, or one number.

They are stored beside the task's vector, or come from a folder that transformers' ``…ForSequenceClassification`` wrote,
as fine-tunes are published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.opening import open_model
from lit_merge.errors import ConfigurationError, FileFormatError, StructureMismatchError, first_few
from lit_merge.files.hub import fetch, local_path, parse_address
from lit_merge.files.shards import HEAD_ENDING
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.models.merging.companions import is_companion
from lit_merge.params import working_dtype

__all__ = [
    "TaskClassifier",
    "TaskHead",
    "TaskRegressor",
    "TwoLayerClassifier",
    "TwoLayerRegressor",
    "head_file",
    "stored_head",
]

_FORMAT = "lit-merge/classifier/1"
_TANH_HEADS = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"})
_UNNAMED = "label_"  # what transformers calls classes that nobody named, before a number


class TaskHead(nn.Module):
    """What heads of a task's own have in common.

    Attributes:
        classes: names in the order of the outputs; empty of a head whose only output is a number.
    """

    trains: ClassVar[bool] = True
    classes: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write the weights and classes as safetensors; the file appears when it is complete."""
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        write_tensors(Path(path), tensors, {"format": _FORMAT, "classes": json.dumps(self.classes)})

    @staticmethod
    def load(path: str | Path) -> TaskHead:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: there is no such file, or it holds something else.
        """
        stored = LazyTensors(Path(path))
        if stored.metadata.get("format") != _FORMAT:
            raise FileFormatError(
                f"{path}: expected a task's classifier, got a file of format {stored.metadata.get('format')!r}. Give "
                "the file that a run wrote beside its task vector."
            )
        return TaskHead.of_state({name: stored[name] for name in stored}, json.loads(stored.metadata["classes"]))

    @staticmethod
    def of_state(state: Mapping[str, Tensor], classes: Sequence[str]) -> TaskHead:
        """The head with these weights; without classes, that of a number."""
        made: TaskHead
        if "dense.weight" in state:
            width, features = state["dense.weight"].shape
            kind = TwoLayerClassifier if classes else TwoLayerRegressor
            made = kind(features, classes, width=width)
        else:
            linear = TaskClassifier if classes else TaskRegressor
            made = linear(state["weight"].shape[1], classes, bias="bias" in state)
        made.to(next(iter(state.values())).dtype).load_state_dict(dict(state))
        return made


class TaskClassifier(TaskHead, nn.Linear):
    """A linear layer, features ``[B, d]`` to logits ``[B, C]``; without classes ``[B, 1]``.

    Args:
        features: d.
        classes: C names.
        seed: of the weights.
        bias: whether there is one: GPT-2's published classifiers have none.
    """

    def __init__(self, features: int, classes: Sequence[str], seed: int = 0, bias: bool = True) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(features, len(classes) or 1, bias)
        self.classes = tuple(classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[B, d]``, of any precision, to logits ``[B, C]`` in the weights'."""
        return super().forward(features.to(self.weight.dtype))


class TwoLayerClassifier(TaskHead):
    """RoBERTa's, features ``[B, d]`` to logits ``[B, C]``: W₂ tanh(W₁ f + b₁) + b₂, of which no dropout is taken.

    A BERT's is the same: W₁ is its pooler's.

    Args:
        features: d.
        classes: C names.
        seed: of the weights.
        width: of the first layer; None for d.
    """

    def __init__(self, features: int, classes: Sequence[str], seed: int = 0, width: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.dense = nn.Linear(features, width or features)
            self.out_proj = nn.Linear(width or features, len(classes) or 1)
        self.classes = tuple(classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[B, d]``, of any precision, to logits ``[B, C]`` in the weights'."""
        logits: Tensor = self.out_proj(torch.tanh(self.dense(features.to(self.dense.weight.dtype))))
        return logits


class _Number:
    """One output, which is a number: squared errors, and Spearman's correlation of all of them.

    Where an accuracy is asked for, an example is right if the number is less than half a unit off.
    """

    def loss(self, logits: Tensor, batch: Any) -> Tensor:
        """Squared errors ``[B]``; 0 where no number is known."""
        predicted, wanted, known = _numbers(logits, batch)
        return torch.where(known, (predicted - wanted).square(), 0)

    def hits(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """1 where the number is less than 0.5 off, and 1 where one is known; both float32 ``[B]``."""
        predicted, wanted, known = _numbers(logits, batch)
        return ((predicted - wanted).abs() < 0.5).float(), known.float()

    def numbers(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """What Spearman's correlation is of: the predicted and the true numbers, where these are known."""
        predicted, wanted, known = _numbers(logits, batch)
        return predicted[known], wanted[known]


class TaskRegressor(_Number, TaskClassifier):
    """A linear layer whose output is one number, ``[B, 1]``; see :class:`TaskClassifier`."""


class TwoLayerRegressor(_Number, TwoLayerClassifier):
    """Two layers whose output is one number, ``[B, 1]``; see :class:`TwoLayerClassifier`."""


def head_file(vector: str | Path, task: str = "") -> str:
    """Where a run writes a head that trained with the task: beside its vector.

    Args:
        vector: the vector's file.
        task: its name, where the vector is of several.

    Examples:
        >>> head_file("runs/joint/task_vector.safetensors", "rte")
        'runs/joint/task_vector.rte.head.safetensors'
    """
    return f"{str(vector).removesuffix('.safetensors')}{f'.{task}' if task else ''}{HEAD_ENDING}"


def stored_head(path: str, task: str, classes: Sequence[str], regression: bool = False) -> TaskHead:
    """The trained head of a task, from what a run wrote or from a folder of transformers.

    A folder's are the last layers of ``GPT2ForSequenceClassification`` and its like (``score``),
    ``RobertaForSequenceClassification`` (two layers) and ``BertForSequenceClassification`` (pooler and classifier).
    Its classes are those of ``id2label``, brought into the task's order; classes without names keep their order.

    Args:
        path: a file of :meth:`TaskHead.save`, a folder of transformers, or ``hf://owner/name``.
        task: its name, for messages.
        classes: of the task.
        regression: whether it is of a number.

    Raises:
        FileFormatError: there is none, or of another kind.
        StructureMismatchError: it is one of other classes.
        ConfigurationError: the folder's model has a head of another form.
    """
    address = parse_address(path)
    place = local_path(path) if address is None else fetch(address, also=is_companion).folder / address.path
    if not place.is_dir():
        head = TaskHead.load(place)
        if head.classes != tuple(classes):
            raise StructureMismatchError(_other_classes(path, classes, head.classes))
        return head
    state, config = _last_layers(path, place)
    last = [name for name in ("weight", "bias", "out_proj.weight", "out_proj.bias") if name in state]
    rows = len(state[last[0]])
    if rows != (1 if regression else len(classes)):
        wanted = "one number" if regression else f"the {len(classes)} classes {first_few(classes)}"
        raise StructureMismatchError(
            f"{path}: expected a head of {wanted} for {task}, got one of {rows} outputs. Give the folder of this task."
        )
    order = None if regression else _order(path, classes, config.get("id2label") or {})
    if order is not None:
        state.update({name: state[name][order] for name in last})
    return TaskHead.of_state(state, classes)


def _last_layers(path: str, place: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Weights of a folder's head under our names, float32, and its configuration."""
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{path}: expected a task's classifier or the folder of a model with one, got no config.json that can be "
            "read. Give the folder with config.json and weights."
        ) from error
    opened, kind = open_model(place), config.get("model_type")
    found = {
        "score.weight": {"weight": "score.weight"},
        "classifier.dense.weight": {
            f"{layer}.{part}": f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in _PARTS
        },
        "bert.pooler.dense.weight": {
            **{f"dense.{part}": f"bert.pooler.dense.{part}" for part in _PARTS},
            **{f"out_proj.{part}": f"classifier.{part}" for part in _PARTS},
        },
    }
    names = next((names for mark, names in found.items() if mark in opened), None)
    known = names is not None and all(name in opened for name in names.values())
    if names is None or not known or ("classifier.dense.weight" in names.values() and kind not in _TANH_HEADS):
        raise ConfigurationError(
            f"{path}: expected the head of a GPT-2, Llama, RoBERTa or BERT for sequence classification, got a "
            f"{kind} without one. Train the task's head instead."
        )
    weights = {own: opened[name] for own, name in names.items()}
    return {own: value.to(working_dtype(value.dtype)) for own, value in weights.items()}, config


_PARTS = ("weight", "bias")


def _order(path: str, classes: Sequence[str], labels: Mapping[str, str]) -> list[int] | None:
    """Where each class is among a folder's outputs; None where these have no names and their order is taken."""
    names = [_plain(labels[key]) for key in sorted(labels, key=int)]
    if all(name.removeprefix(_UNNAMED).isdecimal() for name in names):
        return None
    wanted = [_plain(name) for name in classes]
    if sorted(names) != sorted(wanted):
        raise StructureMismatchError(_other_classes(path, classes, list(labels.values())))
    return [names.index(name) for name in wanted]


def _plain(name: str) -> str:
    return str(name).lower().replace(" ", "_").replace("-", "_")


def _other_classes(path: str, classes: Sequence[str], found: Sequence[str]) -> str:
    return (
        f"{path}: expected a classifier of the classes {first_few(classes) or 'of a number'}, got "
        f"{first_few(found) or 'one of a number'}. Give the file of this task."
    )


def _numbers(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted and true numbers, and where these are known: they are at least 0, unknown ones -1."""
    return logits.squeeze(-1), batch.targets.to(logits.dtype), batch.targets >= 0
