"""Mappings of tensors that know names, shapes and dtypes, and read or compute a tensor when it is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

__all__ = ["Computed", "LazyMapping", "Selected", "Slicer", "Structure", "stream", "zeros"]

Slicer = Callable[[int, int, Tensor], object]
"""``(start, stop, out)``: writes those elements of a flattened tensor into ``out``, 1-D, of any dtype and device."""

Structure = dict[str, tuple[torch.Size, torch.dtype]]
"""Name -> shape and dtype."""


class LazyMapping(Mapping[str, Tensor]):
    """A mapping name -> tensor that tells shape and dtype without reading the tensor.

    Compared and hashed by identity: comparing contents would read everything.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor."""

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)  # Mapping would read the tensor

    def slicer(self, name: str) -> Slicer:
        """A function ``(start, stop, out)`` that writes those elements of one flattened tensor into ``out``.

        By default the tensor is read once, when the slicer is asked for.
        """
        return partial(_copy_slice, self[name].detach().reshape(-1))

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The flattened tensors one after the other, each in one or more consecutive chunks, as ``(name, chunk)``.

        By default a chunk is a whole tensor.
        """
        for name in names:
            yield name, self[name].reshape(-1)


class Computed(LazyMapping):
    """Tensors computed at every access; nothing is stored.

    Args:
        structure: name -> shape and dtype of what ``compute`` returns.
        compute: name -> tensor. A module-level function, or a ``functools.partial`` of one, keeps it picklable.
    """

    def __init__(self, structure: Structure, compute: Callable[[str], Tensor]) -> None:
        self._structure = structure
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._structure:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._structure)

    def __len__(self) -> int:
        return len(self._structure)

    def __contains__(self, name: object) -> bool:
        return name in self._structure

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without computing it."""
        return self._structure[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without computing it."""
        return self._structure[name][1]


class Selected(LazyMapping):
    """Some tensors of another lazy mapping, possibly under other names.

    Args:
        tensors: the other mapping.
        names: name here -> name there.
    """

    def __init__(self, tensors: LazyMapping, names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> torch.Size:
        """Shape of one tensor, without reading it."""
        return self._tensors.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it."""
        return self._tensors.dtype(self._names[name])

    def slicer(self, name: str) -> Slicer:
        """As the other mapping reads parts."""
        return self._tensors.slicer(self._names[name])

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As the other mapping streams them, under the names here."""
        asked = list(names)
        back = {self._names[name]: name for name in asked}
        for name, chunk in self._tensors.stream(self._names[name] for name in asked):
            yield back[name], chunk


def stream(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """:meth:`LazyMapping.stream` of any mapping."""
    if isinstance(tensors, LazyMapping):
        yield from tensors.stream(names)
    else:
        for name in names:
            yield name, tensors[name].reshape(-1)


def zeros(start: int, stop: int, out: Tensor) -> None:
    """The :data:`Slicer` of a tensor of zeros, which is not made first."""
    out.zero_()


def _copy_slice(flat: Tensor, start: int, stop: int, out: Tensor) -> None:
    out.copy_(flat[start:stop])
