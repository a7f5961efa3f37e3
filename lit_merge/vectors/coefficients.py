"""Merging coefficients λ: one per task and group of parameters, on disk, and matched with task vectors by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lit_merge.errors import (
    ConfigurationError,
    FileFormatError,
    LitMergeError,
    NonFiniteError,
    StructureMismatchError,
    first_few,
)
from lit_merge.naming import Depth
from lit_merge.params import compare, is_finite
from lit_merge.vectors.coefficient_files import OWN_ENTRIES, read_coefficients, write_coefficients
from lit_merge.vectors.groups import Granularity, group_names
from lit_merge.vectors.published_coefficients import Published, in_rows, read_published
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = ["Coefficients"]


@dataclass(frozen=True, eq=False, repr=False)
class Coefficients:
    """The λ of ``θ = θ0 + Σ_t λ[t, g(p)] τ_t[p]``, one per task t and group g(p) of a parameter p.

    AdaMerging learns them (Yang et al. 2024, equations 6 and 7), but where they come from does not matter here.

    Args:
        values: ``(T, L)``, as they are applied, i.e. after any clamping; kept in float64 on the CPU.
        tasks: the T tasks of the rows.
        groups: the L groups of the columns, in the order in which the parameters first name them.
        members: parameter -> its group, in the order of the parameters.
        granularity: how the parameters were grouped.
        metadata: string entries that are kept with the coefficients, such as ``base_fingerprint``, and
            ``transform_config`` of what was applied to the task vectors before.
        masks: parameter -> bool ``(T, r)``: which singular directions of each task's matrix, the largest first, take
            part (AdaRank); all of what is not named.

    Raises:
        ConfigurationError: the shape, the tasks, the groups and the members do not fit each other, or an entry of the
            metadata is no string or has a name that the file's own header uses, or masks are of another kind.
        NonFiniteError: a coefficient is NaN or infinite.
    """

    values: Tensor
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    members: Mapping[str, str]
    granularity: str = "tensor"
    metadata: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kept in (("tasks", tuple(self.tasks)), ("groups", tuple(self.groups))):
            object.__setattr__(self, name, kept)
        for name in ("members", "metadata", "masks"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        object.__setattr__(self, "values", self.values.detach().to("cpu", torch.float64, copy=True))
        self._check()

    def __repr__(self) -> str:
        return (
            f"Coefficients(tasks={self.tasks!r}, granularity={self.granularity!r}, groups={len(self.groups)}, "
            f"parameters={len(self.members)}{f', masks={len(self.masks)}' if self.masks else ''})"
        )

    def of(self, name: str) -> Tensor:
        """The coefficients ``(T,)`` of one parameter, in the order of the tasks.

        Raises:
            StructureMismatchError: the coefficients have no such parameter.
        """
        if name not in self.members:
            raise StructureMismatchError(
                f"coefficients: expected one of {len(self.members)} parameters ({first_few(self.members)}), got "
                f"{name!r}. Use the coefficients of this network."
            )
        return self.values[:, self.groups.index(self.members[name])]

    def depth(self, group: str) -> float | None:
        """How deep the block of a group is, from 0 (first block) to 1 (last); None if it is not part of one block.

        Raises:
            ConfigurationError: there is no such group.
        """
        if group not in self.groups:
            raise ConfigurationError(f"group: expected one of {first_few(self.groups, 12)}, got {group!r}. Use these.")
        depth = Depth(self.members)
        blocks = {depth.block(name) for name, owner in self.members.items() if owner == group}
        block = blocks.pop() if len(blocks) == 1 else None
        return None if block is None else block / (depth.blocks - 1) if depth.blocks > 1 else 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the coefficients, atomically: what was at ``path`` stays until the new file is complete.

        Args:
            path: the file, in an existing folder; ``.safetensors`` (one tensor ``coefficients`` and one per mask,
                everything else in the header, with a content digest) or ``.json`` (task -> group -> coefficient, to be
                read by people).

        Raises:
            ConfigurationError: the ending is another one, or the folder is missing.
            OSError: the disk is full or not writable.
        """
        write_coefficients(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Coefficients:
        """Read what :meth:`save` wrote, and check it; nothing in the file is executed.

        Args:
            path: a file that ends in ``.safetensors`` or ``.json``.

        Raises:
            ConfigurationError: the ending is another one.
            FileFormatError: the file is missing, damaged, or holds something else than coefficients.
        """
        arguments = read_coefficients(path)
        try:
            return cls(**arguments)
        except LitMergeError as error:
            raise FileFormatError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def from_published(
        cls,
        values: Published | str | os.PathLike[str],
        names: Sequence[str],
        tasks: Sequence[str],
        granularity: Granularity | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> Coefficients:
        """Coefficients as the programs of AdaMerging and FusionBench publish them, bare numbers without names.

        AdaMerging's tables are ``(L, T + 1)`` with a first column of ones, the factor of θ0, and ``(1, T + 1)`` for
        task-wise coefficients, after clamping. Its layer-wise tables have six more rows than a CLIP's image tower has
        parameters, three before them and three after them, of the text side, never trained: leave them out
        (``rows[3:-3]``). FusionBench saves what it learned, ``(T, L)`` or ``(T,)``, before clamping: give ``clamp``.

        Args:
            values: nested lists or a tensor, ``(L, T + 1)`` or ``(T + 1,)`` with a leading 1, ``(L, T)``, ``(T, L)`` or
                ``(T,)``; or a file of them: .json or .txt (nested lists), .npy, .pt, .safetensors (one tensor).
            names: the parameters in the order of the rows, which is that of ``module.named_parameters()`` and not the
                sorted one in which a file's task vectors have them.
            tasks: the tasks in the order of the columns, without the pre-trained model.
            granularity: how ``names`` share coefficients; by default ``tensor`` or ``task``, as the shape says.
            clamp: limits that are applied to the numbers.

        Raises:
            ConfigurationError: the shape fits nothing, or two layouts that differ; or ``names`` are sorted although
                there is one row for each.
            FileFormatError: the file cannot be read.
            NonFiniteError: a number is NaN or infinite.
        """
        names, tasks = tuple(names), tuple(tasks)
        found = read_published(values)
        widths: dict[int, Granularity] = {}
        for one in ("tensor", "task") if granularity is None else (granularity,):
            widths[len(set(group_names(names, one)))] = one
        rows = in_rows(found, len(tasks), tuple(widths))
        chosen = widths[rows.shape[1]]
        if chosen == "tensor" and len(names) > 1 and list(names) == sorted(names):
            raise ConfigurationError(
                f"names: expected them in the order of the model's parameters, got them sorted ({first_few(names)}). "
                "Use [name for name, _ in module.named_parameters()]; the rows carry no names to check them by."
            )
        members = dict(zip(names, group_names(names, chosen), strict=True))
        rows = rows if clamp is None else rows.clamp(*clamp)
        return cls(rows, tasks, tuple(dict.fromkeys(members.values())), members, chosen)

    def for_tasks(self, tasks: Sequence[str]) -> Coefficients:
        """The same coefficients with their rows in the order of ``tasks``, all of them, found by name.

        Raises:
            StructureMismatchError: the tasks are others, or one of them is named twice.
        """
        missing = [task for task in dict.fromkeys(tasks) if task not in self.tasks]
        unknown = [task for task in self.tasks if task not in tasks]
        repeated = [task for index, task in enumerate(tasks) if task in tasks[:index]]
        got = [f"nothing for {first_few(map(repr, missing))}"] if missing else []
        got += [f"unknown {first_few(map(repr, unknown))}"] if unknown else []
        got += [f"two vectors of {first_few(map(repr, repeated))}"] if repeated else []
        if got:
            raise StructureMismatchError(
                f"coefficients: expected one row for each of the tasks {', '.join(tasks)}, got {' and '.join(got)}. "
                f"Name the task vectors as they were when the coefficients were learned: {', '.join(self.tasks)}."
            )
        order = [self.tasks.index(task) for task in tasks]
        masks = {name: mask[order] for name, mask in self.masks.items()}
        return replace(self, values=self.values[order], tasks=tuple(tasks), masks=masks)

    def check_fits(self, vectors: TaskVectors) -> None:
        """Refuse task vectors that these coefficients are not for.

        The tasks may come in another order (:meth:`for_tasks`), and the vectors may be restricted to some of the
        parameters.

        Raises:
            StructureMismatchError: the tasks, the parameters' names, or the base model (if both know it) differ.
        """
        self.for_tasks(vectors.tasks)
        if found := compare(dict.fromkeys(vectors.model_names, ()), dict.fromkeys(self.members, ())):
            raise StructureMismatchError(
                f"coefficients: expected the {len(vectors.model_names)} parameters of the task vectors, got {found}. "
                "Use coefficients that were learned for this network."
            )
        for name, mask in self.masks.items():
            if name in vectors and mask.shape[1] != min((*vectors.shape(name)[1:],), default=0):
                raise StructureMismatchError(
                    f"masks: expected one per singular value of {name}, of shape {tuple(vectors.shape(name)[1:])}, got "
                    f"{mask.shape[1]}. Use coefficients that were learned for this network."
                )
        known = self.metadata.get("base_fingerprint", "")
        if known and vectors.base_fingerprint and known != vectors.base_fingerprint:
            raise StructureMismatchError(
                f"coefficients: expected those of the task vectors' base model (fingerprint "
                f"{vectors.base_fingerprint}), got fingerprint {known}. Learn them on vectors of this base."
            )

    def _check(self) -> None:
        if tuple(self.values.shape) != (len(self.tasks), len(self.groups)) or not self.values.numel():
            raise ConfigurationError(
                f"coefficients: expected at least one task and group, and a row per task and a column per group "
                f"{(len(self.tasks), len(self.groups))}, got {tuple(self.values.shape)}. Transpose them, or name all."
            )
        if not is_finite(self.values):
            raise NonFiniteError(
                "coefficients: expected finite values, got NaN or infinity. Learn them with a lower learning rate."
            )
        repeated = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        if repeated:
            raise ConfigurationError(
                f"coefficients: expected tasks of different names, got {first_few(map(repr, repeated))} more than "
                "once. Rows are found by name."
            )
        named = tuple(dict.fromkeys(self.members.values()))
        if named != self.groups:
            raise ConfigurationError(
                f"coefficients: expected the {len(named)} groups of the members in the order of their first parameters "
                f"({first_few(named)}), got {len(self.groups)} ({first_few(self.groups)}). "
                "Use tuple(dict.fromkeys(members.values()))."
            )
        wrong = [key for key, value in self.metadata.items() if not isinstance(value, str) or key in OWN_ENTRIES]
        if wrong:
            raise ConfigurationError(
                f"metadata: expected strings under other names than {', '.join(sorted(OWN_ENTRIES))}, got "
                f"{first_few(map(repr, wrong))}. Use json.dumps for other values."
            )
        for name, mask in self.masks.items():
            right = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 2
            if name not in self.members or not right or len(mask) != len(self.tasks):
                got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
                raise ConfigurationError(
                    f"masks: expected of some of the parameters a row of booleans for each of {len(self.tasks)} tasks, "
                    f"got {name}: {got}. Give bool tensors (T, r)."
                )
