"""One task vector: what fine-tuning changed, τ = θ − θ0 (Ilharco et al. 2023), with arithmetic and a file format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from lit_merge import params
from lit_merge.checkpoints.difference import checkpoint_difference
from lit_merge.checkpoints.pairing.differences import Rules
from lit_merge.checkpoints.pairs import Checkpoint, Names
from lit_merge.errors import ConfigurationError, FileFormatError, StructureMismatchError, first_few
from lit_merge.files.lazy import Computed, LazyMapping, Slicer, Structure, stream, zeros
from lit_merge.files.rounding import Rounded
from lit_merge.files.shards import ShardedTensors, open_tensors
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.params import Params, check_same_structure, dtype_of, shape_of, working_dtype
from lit_merge.vectors.apply import apply_vector

__all__ = ["FORMAT", "TaskVector", "joined_task", "same_base"]

FORMAT = "lit-merge/task-vector/1"
_TASKS = "tasks"  # header entry with the tasks of a merged vector
_SHARED = ("base_fingerprint", "base_model", "activation", "regime")
"""Metadata that survives arithmetic where all inputs agree."""
_Module = TypeVar("_Module", bound=nn.Module)


class TaskVector(LazyMapping):
    """The task vector of one task: a mapping from the model's own parameter names to tensors.

    Arithmetic (``+``, ``-``, ``*`` and ``/`` by a number, unary ``-``, ``sum``) gives a new vector in memory, in
    float32 or, where an operand is float64, in float64; vectors stored in bfloat16 or float16 are brought to float32
    first. Use :class:`~lit_merge.vectors.TaskVectors` to combine many vectors one tensor at a time.

    Args:
        tensors: name -> floating-point tensor. A plain mapping is copied (not its tensors); a lazy one is kept.
        task: name of the task; empty if unknown. Of a merged vector all of its tasks, as a sequence.
        metadata: string entries that go into the file header, such as ``base_fingerprint``, ``base_model``,
            ``regime``, ``classes``.

    Raises:
        ConfigurationError: ``tensors`` is no mapping or is empty, or a metadata entry is not a string.
        StructureMismatchError: an entry is not a floating-point tensor.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        task: str | Sequence[str] = "",
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(tensors, Mapping) or not tensors:
            got = "an empty one" if isinstance(tensors, Mapping) else type(tensors).__name__
            raise ConfigurationError(
                f"task vector: expected a mapping name -> tensor, got {got}. Use dict(model.named_parameters())."
            )
        tasks = (task,) if isinstance(task, str) or not isinstance(task, Sequence) else tuple(task)
        if not all(isinstance(one, str) for one in tasks):
            raise ConfigurationError(f"task: expected a string, got {type(task).__name__}. Pass the task's name.")
        self._metadata = dict(metadata or {})
        if len(tasks) > 1:
            self._metadata[_TASKS] = json.dumps([one for one in tasks if one], ensure_ascii=False)
        for key, value in self._metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ConfigurationError(
                    f"metadata {key!r}: expected strings, got {type(value).__name__}. Use json.dumps for other values."
                )
        if not isinstance(tensors, LazyMapping):
            tensors = {
                name: tensor.detach() if isinstance(tensor, Tensor) else tensor for name, tensor in tensors.items()
            }
        offenders = [f"{name} ({kind})" for name in tensors if (kind := _not_floating(tensors, name))]
        if offenders:
            raise StructureMismatchError(
                f"task vector: expected floating-point tensors, got {len(offenders)} others: {first_few(offenders)}. "
                "Leave integer tensors and buffers out."
            )
        self._tensors = tensors
        self.task = joined_task(tasks)

    @classmethod
    def from_checkpoints(
        cls,
        pretrained: Checkpoint,
        finetuned: Checkpoint,
        task: str = "",
        *,
        base_fingerprint: str | None = None,
        names: Names = "auto",
        rules: Rules | None = None,
    ) -> TaskVector:
        """The difference τ = θ − θ0 of two checkpoints of one architecture (Ilharco et al. 2023).

        Only parameters have a difference: integer tensors, buffers and running statistics have none, a tied tensor has
        one, and it is zero where the fine-tuned checkpoint lacks a parameter. What was done about such differences is
        in the header entry ``differences``, see docs/checkpoints.md. Two files are differenced tensor by tensor
        whenever one is asked for; if a mapping that is not lazy is given, all is differenced now, so that later changes
        to a live model do not reach the vector.

        Args:
            pretrained: θ0, name -> tensor, a module, or the path of a checkpoint: safetensors, sharded or not, a
                PyTorch file of a state dict, of a whole module, of TorchScript or of Lightning, or a model's folder.
            finetuned: θ, in the same way; or the folder of a PEFT adapter, or the file of a linearised encoder, which
                holds θ0 as well, or of a linearised run of our own, which holds τ.
            task: name of the task.
            base_fingerprint: fingerprint of θ0 if it is known; otherwise it is computed (one pass over θ0).
            names: ``image_tower`` for open_clip's names of a CLIP's image tower, without ``visual.``, which other
                layouts are brought to, so that the vector fits those of our own runs; what else a CLIP has, such as its
                text tower, is left out. ``own`` for the checkpoints' own names. ``auto``: the image tower's if they are
                CLIPs, otherwise the base's own, without a prefix such as ``module.`` if the fine-tuned one has
                another; of two mappings with the same names always their own.
            rules: what to leave out of the difference, and what to do about heads and vocabularies.

        Returns:
            The task vector, in float32, or float64 where a checkpoint is float64.

        Raises:
            StructureMismatchError: the two differ in what no rule covers, one has no image tower, or the fine-tuned
                file says that it started from another θ0.
            FileFormatError: a path does not lead to a checkpoint.
            ConfigurationError: ``names`` is unknown, or does not go with a linearised encoder's file, or a pattern of
                ``rules.leave_out`` fits no name.
            NonFiniteError: the difference is NaN or infinite (for files: when that tensor is read).
        """
        difference, fingerprint, pair = checkpoint_difference(pretrained, finetuned, base_fingerprint, names, rules)
        differences = {"differences": json.dumps(pair.notes, ensure_ascii=False)} if pair.notes else {}
        known = {"activation": pair.activation} if pair.activation else {}
        return cls(difference, task, metadata={"base_fingerprint": fingerprint, **known, **differences})

    @classmethod
    def load(cls, path: str | os.PathLike[str], verify: bool = False) -> TaskVector:
        """Open a task vector file; tensors are read when they are asked for, in the dtype in which they are stored.

        Args:
            path: a file that :meth:`save` wrote; or the folder or index of one that is sharded.
            verify: also compare all bytes with the content digest in the header (reads the whole file once).

        Raises:
            FileFormatError: the file is missing, damaged, or holds something else than a task vector.
        """
        tensors = open_tensors(path)
        found = tensors.metadata.get("format")
        if found != FORMAT:
            advice = (
                "Install the version of lit-merge that wrote it, or a newer one."
                if found and found.startswith("lit-merge/task-vector/")
                else "Whole weights are given as weights; TaskVector.from_checkpoints makes a task vector of them."
            )
            raise FileFormatError(f"{path}: expected format {FORMAT}, got {found or 'none'}. {advice}")
        if verify:
            tensors.verify()
        return cls(tensors, tensors.metadata.get("task", ""), metadata=tensors.metadata)

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> float:
        """Write the vector to a safetensors file, atomically, one tensor at a time.

        Args:
            path: the file to write, in an existing folder.
            dtype: floating-point dtype to store, e.g. ``torch.bfloat16`` for half the size. Default: as it is.

        Returns:
            The relative rounding error ‖round(τ) − τ‖₂ / ‖τ‖₂ (0 if nothing was rounded), also in the header entry
            ``storage``.

        Raises:
            NonFiniteError: a value is NaN or infinite, or does not fit into ``dtype``; no file is written.
            ConfigurationError: ``dtype`` is not a floating-point dtype, or the folder is missing.
            OSError: the disk is full or not writable; what was at ``path`` is kept.
        """
        rounded = Rounded(self, dtype, what=f"task vector {self.task!r}")
        metadata = {**self.metadata, "storage": rounded.storage()}
        write_tensors(path, rounded, metadata, late_metadata=lambda: {"storage": rounded.storage()})
        return rounded.relative_error

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks: several for a merged vector, none if unknown.

        They are those of the header entry ``tasks``, a JSON list, where :attr:`task` is their common name. A vector
        without such a list, as version 0.1.0 wrote them, has one task, whatever its name looks like.
        """
        try:
            listed = json.loads(self._metadata.get(_TASKS, "[]"))
        except (ValueError, RecursionError):
            listed = []
        named = isinstance(listed, list) and all(isinstance(one, str) and one for one in listed)
        if named and listed and joined_task(listed) == self.task:
            return tuple(listed)
        return (self.task,) if self.task else ()

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the header entries, ``format`` and ``task`` included."""
        return {**self._metadata, "format": FORMAT, "task": self.task}

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the pre-trained parameters θ0; empty if unknown."""
        return self._metadata.get("base_fingerprint", "")

    @property
    def content_digest(self) -> str | None:
        """The content digest of the file behind the vector; ``None`` for a vector in memory."""
        return self._tensors.content_digest if isinstance(self._tensors, (LazyTensors, ShardedTensors)) else None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        count = sum(self.shape(name).numel() for name in self)
        base = f", base={self.base_fingerprint!r}" if self.base_fingerprint else ""
        content = f", content={self.content_digest[:16]!r}" if self.content_digest else ""
        return f"TaskVector(task={self.task!r}, tensors={len(self)}, parameters={count}{base}{content})"

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it from disk."""
        return shape_of(self._tensors, name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor as it is held or stored, without reading it from disk."""
        return dtype_of(self._tensors, name)

    def device(self, name: str) -> torch.device:
        """Device on which one tensor is, or will be when it is read."""
        return torch.device("cpu") if isinstance(self._tensors, LazyMapping) else self._tensors[name].device

    def slicer(self, name: str) -> Slicer:
        """A function ``(start, stop, out)`` that writes those elements of one flattened tensor into ``out``."""
        return self._tensors.slicer(name) if isinstance(self._tensors, LazyMapping) else super().slicer(name)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The flattened tensors one after the other, in chunks."""
        return stream(self._tensors, names)

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._combined(other, 1.0, (*self.tasks, *getattr(other, "tasks", ())))

    def __radd__(self, other: object) -> TaskVector:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # so that sum(vectors) works

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combined(other, -1.0, f"{self.task}-{getattr(other, 'task', '')}".rstrip("-"))

    def __mul__(self, factor: float) -> TaskVector:
        if not isinstance(factor, Real):
            return NotImplemented
        value = _finite(factor)
        return self._mapped(lambda tensor: tensor * value, self.tasks)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        if not isinstance(divisor, Real):
            return NotImplemented
        value = _finite(divisor)
        if value == 0:
            raise ZeroDivisionError("task vector divided by zero")
        return self._mapped(lambda tensor: tensor / value, self.tasks)

    def __neg__(self) -> TaskVector:
        return self._mapped(torch.neg, f"-{self.task}" if self.task else "")

    def completed(self, structure: Structure) -> TaskVector:
        """The same vector with more parameters, zero there; of a lazy one they cost nothing.

        Args:
            structure: name -> shape and dtype of the parameters to add.
        """
        if isinstance(self._tensors, LazyMapping):
            tensors: Mapping[str, Tensor] = _Completed(self._tensors, structure)
        else:
            device = next(iter(self._tensors.values())).device
            added = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in structure.items()}
            tensors = {**self._tensors, **added}
        return TaskVector(tensors, self.tasks, metadata=self.metadata)

    def dot(self, other: Mapping[str, Tensor]) -> float:
        """Inner product ⟨τ, τ'⟩ over all elements, accumulated in float64.

        Raises:
            StructureMismatchError: names or shapes differ.
        """
        return params.dot(self, other)

    def norm(self) -> float:
        """Euclidean norm ‖τ‖₂ over all elements, accumulated in float64."""
        return params.norm(self)

    def cosine_similarity(self, other: Mapping[str, Tensor]) -> float:
        """⟨τ, τ'⟩ / (‖τ‖ ‖τ'‖), between −1 and 1; 0 if either vector is zero.

        Raises:
            StructureMismatchError: names or shapes differ.
        """
        norms = self.norm() * params.norm(other)
        return max(-1.0, min(1.0, self.dot(other) / norms)) if norms else 0.0

    @overload
    def apply_to(self, target: _Module, coefficient: float = 1.0) -> _Module: ...
    @overload
    def apply_to(self, target: Mapping[str, Tensor], coefficient: float = 1.0) -> Params: ...
    def apply_to(self, target: Mapping[str, Tensor] | nn.Module, coefficient: float = 1.0) -> Params | nn.Module:
        """θ = θ0 + α τ, in the dtypes of the target, computed in float32 or better.

        A mapping is left untouched and a new dict is returned. A module is changed **in place** (its parameters keep
        their identity, so an optimiser goes on working) and returned; nothing is changed if anything is refused.

        Args:
            target: θ0: a mapping name -> tensor, or a module. Integer entries of a mapping and buffers of a module
                that the vector does not have are kept as they are.
            coefficient: α.

        Returns:
            A new dict for a mapping; the module itself for a module.

        Raises:
            StructureMismatchError: the vector has names that the target lacks, parameters of the target are not in
                the vector, or shapes differ.
            ConfigurationError: ``coefficient`` is not finite.
        """
        return apply_vector(self, target, coefficient)

    def _combined(self, other: TaskVector, sign: float, task: str | Sequence[str]) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        check_same_structure(self, other, what=f"task vector {other.task!r}")
        metadata = same_base([self, other])
        tensors = {}
        for name in self:
            dtype = working_dtype(self.dtype(name), other.dtype(name))
            tensors[name] = torch.add(self[name].to(dtype), other[name].to(dtype), alpha=sign)
        return TaskVector(tensors, task, metadata=metadata)

    def _mapped(self, function: Callable[[Tensor], Tensor], task: str | Sequence[str]) -> TaskVector:
        tensors = {name: function(self[name].to(working_dtype(self.dtype(name)))) for name in self}
        return TaskVector(tensors, task, metadata=same_base([self]))


class _Completed(Computed):
    """Another mapping's tensors, and zeros."""

    def __init__(self, tensors: LazyMapping, structure: Structure) -> None:
        own = {name: (tensors.shape(name), tensors.dtype(name)) for name in tensors}
        super().__init__({**own, **structure}, self._value)
        self._tensors = tensors

    def _value(self, name: str) -> Tensor:
        shape, dtype = self._structure[name]
        return self._tensors[name] if name in self._tensors else torch.zeros(shape, dtype=dtype)

    def slicer(self, name: str) -> Slicer:
        """Zeros are not made first."""
        return self._tensors.slicer(name) if name in self._tensors else zeros


def joined_task(tasks: Iterable[str]) -> str:
    """The name of several tasks' common vector, e.g. ``"digits+letters"``; unknown (empty) names are left out."""
    return "+".join(task for task in tasks if task)


def same_base(vectors: Iterable[TaskVector]) -> dict[str, str]:
    """The metadata on which all vectors agree, after checking that they started from the same base model.

    Raises:
        StructureMismatchError: two known base fingerprints differ, or the activation functions of their models.
    """
    vectors = list(vectors)
    tasks_of: dict[str, list[str]] = {}
    for index, vector in enumerate(vectors):
        if vector.base_fingerprint:
            tasks_of.setdefault(vector.base_fingerprint, []).append(vector.task or f"number {index}")
    if len(tasks_of) > 1:
        listed = "; ".join(f"{first_few(tasks)} from {base}" for base, tasks in tasks_of.items())
        raise StructureMismatchError(
            f"task vectors: expected one base model, got {len(tasks_of)}: {listed}. "
            "Merge only vectors that were fine-tuned from the same pre-trained parameters."
        )
    activations: dict[str, list[str]] = {}
    for index, vector in enumerate(vectors):
        if known := vector.metadata.get("activation"):
            activations.setdefault(known, []).append(vector.task or f"number {index}")
    if len(activations) > 1:
        listed = " and ".join(f"{known} ({first_few(tasks)})" for known, tasks in activations.items())
        raise StructureMismatchError(
            f"task vectors: expected one activation function, got {listed}. Merge only vectors that were fine-tuned "
            "from the same model, e.g. all from ViT-B-32-quickgelu, or all from ViT-B-32."
        )
    shared = {}
    for key in _SHARED:
        values = {vector.metadata[key] for vector in vectors if vector.metadata.get(key)}
        if len(values) == 1:
            shared[key] = values.pop()
    return shared


def _not_floating(tensors: Mapping[str, Tensor], name: str) -> str:
    """What a tensor is instead of floating point; empty if it is floating point."""
    if not isinstance(tensors, LazyMapping) and not isinstance(tensors[name], Tensor):
        return type(tensors[name]).__name__
    dtype = dtype_of(tensors, name)
    return "" if dtype.is_floating_point else str(dtype)


def _finite(factor: Real) -> float:
    value = float(factor)
    if not isfinite(value):
        raise ConfigurationError(f"factor of a task vector: expected a finite number, got {value}. Use another one.")
    return value
