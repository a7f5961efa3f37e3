"""What a merged model has of its own for one task, behind the encoder: a correction of features, and a classifier."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.models.heads import ZeroShotHead

__all__ = ["Surgery", "TaskOutput", "TrainedHead", "output_name"]

_FORMAT = "lit-merge/task-output/1"


def output_name(task: str) -> str:
    """The file of one task, beside the merged weights."""
    return f"{task.replace('/', '%2F')}.output.safetensors"


class Surgery(nn.Module):
    """``f − U relu(D f)``: takes away what merging has added to a task's features.

    Representation surgery (Yang et al. 2024, equation 4, as in the authors' program): D starts as torch's linear layers
    do, U at zero, so that nothing is changed at first.

    Args:
        features: d.
        rank: r, of D ``[r, d]`` and U ``[d, r]``, at least 1; the authors' is 16.
    """

    def __init__(self, features: int, rank: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same in all processes, and in a resumed run
            self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, d]`` to ``[B, d]``."""
        corrected: Tensor = features - self.up(self.down(features).relu())
        return corrected


class TrainedHead(nn.Linear):
    """A classifier that starts as a frozen head and trains: ``W f + b``, f of length 1 where the head has it so.

    Of a zero-shot head W is its weight times its scale, b zero (SyMerge, Jung et al. 2026, as in the authors' program).

    Args:
        features: d.
        classes: C.
        normalised: whether features are brought to length 1 first.
    """

    def __init__(self, features: int, classes: int, normalised: bool) -> None:
        super().__init__(features, classes)
        self.normalised = normalised

    @classmethod
    def starting_from(cls, head: nn.Module) -> TrainedHead:
        """A copy of a zero-shot head or a linear layer.

        Raises:
            ConfigurationError: it is another one.
        """
        if not isinstance(head, ZeroShotHead | nn.Linear):
            raise ConfigurationError(
                f"learn: expected zero-shot or linear heads to train, got {type(head).__name__}. Leave out heads."
            )
        zero_shot = isinstance(head, ZeroShotHead)
        scale: Any = head.logit_scale if zero_shot else 1.0
        weight = (head.weight * scale).detach()
        found = cls(weight.shape[1], weight.shape[0], zero_shot).to(weight)
        with torch.no_grad():
            found.weight.copy_(weight)
            bias = None if zero_shot else head.bias
            found.bias.zero_() if bias is None else found.bias.copy_(bias)  # type: ignore[arg-type]
        return found

    def forward(self, features: Tensor) -> Tensor:
        """``[B, d]`` to logits ``[B, C]``."""
        return super().forward(F.normalize(features, dim=-1) if self.normalised else features)


class TaskOutput(nn.Module):
    """A correction of features, a classifier, or both; a file of its own for every task.

    Args:
        surgery: or None.
        head: in place of the task's frozen one, or None.
    """

    def __init__(self, surgery: Surgery | None = None, head: TrainedHead | None = None) -> None:
        super().__init__()
        self.surgery, self.head = surgery, head

    def represent(self, features: Tensor) -> Tensor:
        """The encoder's features ``[B, d]``, corrected."""
        return features if self.surgery is None else self.surgery(features)

    def classify(self, features: Tensor, frozen: nn.Module) -> Tensor:
        """Corrected features ``[B, d]`` to logits ``[B, C]``, by the own head or the frozen one."""
        logits: Tensor = (frozen if self.head is None else self.head)(features)
        return logits

    def save(self, path: str | Path, metadata: Mapping[str, str]) -> None:
        """Write what there is as safetensors; the file appears when it is complete.

        Args:
            path: the file.
            metadata: more entries of the header, such as ``task`` and ``base_fingerprint``.
        """
        tensors = {name: one.detach().cpu().contiguous() for name, one in self.state_dict().items()}
        normalised = self.head is not None and self.head.normalised
        write_tensors(Path(path), tensors, {**metadata, "format": _FORMAT, "normalised": json.dumps(normalised)})

    @classmethod
    def load(cls, path: str | Path) -> tuple[TaskOutput, dict[str, str]]:
        """Read what :meth:`save` wrote, and its header.

        Raises:
            FileFormatError: there is no such file, or it holds something else.
        """
        stored = LazyTensors(Path(path))
        if stored.metadata.get("format") != _FORMAT:
            raise FileFormatError(
                f"{path}: expected what a learned merge wrote of a task (<task>.output.safetensors), got a file of "
                f"format {stored.metadata.get('format')!r}. Give that file."
            )
        try:
            found = cls.of_state({name: stored[name] for name in stored}, stored.metadata.get("normalised") == "true")
        except (KeyError, RuntimeError, IndexError) as error:
            raise FileFormatError(
                f"{path}: expected surgery.down, surgery.up, head.weight and head.bias that fit, got "
                f"{', '.join(f'{name} {list(stored.shape(name))}' for name in stored)}. Write it again."
            ) from error
        return found.requires_grad_(False), dict(stored.metadata)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], normalised: bool) -> TaskOutput:
        """Of a ``state_dict``, in its dtype."""
        surgery = head = None
        if "surgery.down.weight" in state:
            rank, features = state["surgery.down.weight"].shape
            surgery = Surgery(features, rank).to(state["surgery.down.weight"])
        if "head.weight" in state:
            classes, features = state["head.weight"].shape
            head = TrainedHead(features, classes, normalised).to(state["head.weight"])
        found = cls(surgery, head)
        found.load_state_dict(dict(state))
        return found

    @classmethod
    def starting(cls, frozen: nn.Module, kinds: Sequence[str], rank: int) -> TaskOutput:
        """What changes nothing yet.

        Args:
            frozen: the task's head.
            kinds: ``surgery``, ``heads`` or both.
            rank: of the surgery.

        Raises:
            ConfigurationError: the head has no weight ``[C, d]`` that tells d.
        """
        weight = next((one for one in frozen.state_dict().values() if one.ndim == 2), None)
        if weight is None:
            raise ConfigurationError(
                f"learn: expected heads of features [B, d] with a weight [C, d], got {type(frozen).__name__}. "
                "Learn coefficients alone."
            )
        surgery = Surgery(weight.shape[1], rank).to(weight) if "surgery" in kinds else None
        return cls(surgery, TrainedHead.starting_from(frozen) if "heads" in kinds else None)
