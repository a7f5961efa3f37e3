"""Features of a linearised encoder for any coefficients, from ``f0`` and ``J τ_k`` of every image, kept on disk.

A linearised encoder is linear in τ: ``f_lin(x; Σ c_k τ_k) = f0(x) + Σ c_k J τ_k(x)`` (Ortiz-Jimenez et al. 2023,
eq. 4). One pass over the images therefore serves every choice of coefficients, and whoever comes next needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, DataError, first_few
from lit_merge.files.cache import Cache
from lit_merge.functional import linearize
from lit_merge.params import Params, check_same_structure, fingerprint

__all__ = ["LinearFeatureCache", "LinearFeatures", "layout"]

# Part of every cache key: raise it when the computation changes.
_CACHE_VERSION = 2


@dataclass(frozen=True)
class LinearFeatures:
    """``f0`` and ``J τ_k`` of N images, in their split's own order; from a cache they are mapped, not in memory.

    Attributes:
        value: ``f(x; θ0)``, ``[N, d]``.
        tangents: name of a direction -> ``J_θ f(x; θ0) · τ_k``, ``[N, d]``.
        labels: int64, ``[N]``, in [0, C), or -1 where the class is not known.
    """

    value: Tensor
    tangents: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def features(self, coefficients: Mapping[str, float | Tensor]) -> Tensor:
        """The features at ``τ = Σ c_k τ_k``.

        Args:
            coefficients: name of a direction -> ``c_k``, a number or a scalar tensor, which may require a gradient;
                directions that are left out have 0.

        Returns:
            ``f0 + Σ c_k J τ_k``, ``[N, d]``: a new tensor, so take :meth:`batches` of many images.

        Raises:
            ConfigurationError: there is no such direction.
        """
        unknown = [name for name in coefficients if name not in self.tangents]
        if unknown:
            raise ConfigurationError(
                f"coefficients: expected names among {', '.join(self.tangents) or 'none'}, got {first_few(unknown)}."
            )
        return self.value + sum(factor * self.tangents[name] for name, factor in coefficients.items())

    def batches(self, size: int) -> Iterator[LinearFeatures]:
        """The same, ``size`` images at a time, the last ones fewer; nothing is copied."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            tangents = {name: tangent[rows] for name, tangent in self.tangents.items()}
            yield LinearFeatures(self.value[rows], tangents, self.labels[rows])

    def to(self, device: torch.device) -> LinearFeatures:
        """The same on a device, in its memory unless that is the CPU."""
        tangents = {name: tangent.to(device) for name, tangent in self.tangents.items()}
        return LinearFeatures(self.value.to(device), tangents, self.labels.to(device))


class LinearFeatureCache:
    """Computes :class:`LinearFeatures` once per network, direction and images, and stores them on disk.

    A file holds ``f0`` and the labels, and one more per direction its tangents, so that a further direction costs its
    own pass alone. They depend on the network's layout, parameters and buffers, the direction's values, the images with
    their preprocessing and labels, device type and precision; see :class:`lit_merge.files.cache.Cache`.

    Args:
        network: ``f``, images ``[B, 3, S, S]`` -> features ``[B, d]``, with θ0 as its parameters, on the device to
            compute on; not to be changed while this object is used.
        directions: name -> τ_k, under the network's names, zero where one lacks a parameter; may be lazy, and are not
            to be changed either.
        folder: the cache's folder; the user's by default.
        inputs: the network's arguments of a batch; by default its ``inputs``.

    Raises:
        StructureMismatchError: a direction has other names or shapes than the network.
    """

    def __init__(
        self,
        network: nn.Module,
        directions: Mapping[str, Mapping[str, Tensor]],
        folder: str | Path | None = None,
        inputs: Callable[[Any], tuple[Any, ...]] | None = None,
    ) -> None:
        parameters = dict(network.named_parameters())
        for name, vector in directions.items():
            check_same_structure(parameters, vector, f"direction {name}", required=())
        self._network, self._directions = network, dict(directions)
        self._inputs = inputs or (lambda batch: batch.inputs)
        self._cache = Cache("linear_features", folder)
        self._identity = [layout(network), fingerprint({**parameters, **dict(network.named_buffers())})]
        self._digest = cache(lambda name: fingerprint(self._directions[name]))

    def of(self, loader: Any, names: Iterable[str] | None = None) -> LinearFeatures:
        """Features of all images of a loader; the network runs only for what is not in the cache.

        The directions that are missing are computed in one pass over the images. Their vectors are on the network's
        device together; of the features, one batch is in memory at a time.

        Args:
            loader: gives :class:`lit_merge.data.Batch` in the split's own order; its ``dataset``
                has a length and a ``digest()``, see :class:`lit_merge.data.images.datasets.ImageDataset`.
            names: of the directions that are wanted; all by default.

        Raises:
            ConfigurationError: a name is unknown, or the images are augmented or do not tell what they are.
            DataError: the loader does not give every image once and in order, or there are none.
            LitMergeError: the network has an operator without a forward-mode derivative.
            OSError: the disk is full or not writable.
        """
        chosen = list(self._directions if names is None else names)
        unknown = [name for name in chosen if name not in self._directions]
        if unknown:
            raise ConfigurationError(
                f"directions: expected names among {', '.join(self._directions) or 'none'}, got {first_few(unknown)}."
            )
        _check_images(loader.dataset)
        device = next(self._network.parameters()).device
        content = [_CACHE_VERSION, *self._identity, *_precision(device), loader.dataset.digest()]
        base = self._cache.key(content)
        keys = {name: self._cache.key([*content, self._digest(name)]) for name in chosen}
        found = {key: self._cache.tensors(key) or {} for key in (base, *keys.values())}
        # Without f0 all is missing: it is to be, to the last bit, that of a pass which gives tangents.
        missing = [key for key, tensors in found.items() if not (tensors and found[base])]
        if missing:
            directions = {key: self._directions[name] for name, key in keys.items() if key in missing}
            computed = self._compute(loader, base, directions, device)
            for key in missing:
                found[key] = computed[key]
                self._cache.write_tensors(key, found[key])
        tangents = {name: found[key]["tangent"] for name, key in keys.items()}
        return LinearFeatures(found[base]["value"], tangents, found[base]["labels"])

    @torch.no_grad()
    def _compute(
        self, loader: Any, base: str, directions: Mapping[str, Mapping[str, Tensor]], device: torch.device
    ) -> dict[str, Params]:
        """The tensors of the files, by key."""
        parameters = dict(self._network.named_parameters())
        vectors = {
            key: {name: vector[name].to(own.device, own.dtype) for name, own in parameters.items() if name in vector}
            for key, vector in directions.items()
        }
        labels: list[Tensor] = []
        count = 0
        with ExitStack() as files:
            rows = {key: _Rows(files.enter_context(TemporaryFile(dir=self._cache.folder))) for key in (base, *vectors)}
            for batch in loader:
                present = batch.indices >= 0
                part = batch.select(present)
                inputs, indices = self._inputs(part.to(device)), part.indices
                if not torch.equal(indices, torch.arange(count, count + len(indices))):
                    got = first_few(indices.tolist())
                    raise DataError(
                        f"images: expected those from {count} on in the split's order, got {got}. "
                        "Use the loader of an evaluation split, in one process."
                    )
                if not len(part):
                    continue
                count += len(part)
                labels.append(part.targets)
                value = None
                for key, vector in vectors.items():
                    value, tangent = linearize(self._network, {}, vector, *inputs)
                    rows[key].append(tangent)
                rows[base].append(linearize(self._network, {}, {}, *inputs)[0] if value is None else value)
            if count != len(loader.dataset) or not count:
                raise DataError(
                    f"images: expected all {len(loader.dataset)} of the split and at least one, got {count}. "
                    "Use the loader of a whole evaluation split, in one process."
                )
            return {
                base: {"value": rows[base].mapped(), "labels": torch.cat(labels)},
                **{key: {"tangent": rows[key].mapped()} for key in vectors},
            }


class _Rows:
    """Rows that are appended to a file and mapped in the end, so that they never have to fit into memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def append(self, rows: Tensor) -> None:
        self._shape, self._dtype = rows.shape[1:], rows.dtype
        self._file.write(rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def mapped(self) -> Tensor:
        self._file.flush()
        content = np.memmap(self._file, np.uint8, mode="c")  # outlives the file, which has no name any more
        return torch.from_numpy(content).view(self._dtype).view(-1, *self._shape)


def _check_images(images: Any) -> None:
    if not hasattr(images, "digest"):
        raise ConfigurationError(
            f"images: expected a data set with a digest(), got {type(images).__name__}. "
            "Use one of lit-merge's, or add a method that tells its content from others."
        )
    if getattr(images, "augmentation_seed", None) is not None:
        raise ConfigurationError("images: expected an evaluation split, got augmented images. Turn augment off.")


def layout(network: nn.Module) -> list[Any]:
    """Kinds and plain settings of all modules: two networks of the same parameters may differ by the activation."""
    return [
        [name, f"{type(part).__module__}.{type(part).__qualname__}", sorted(map(str, _settings(part)))]
        for name, part in network.named_modules()
    ]


def _settings(part: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in vars(part).items():
        if _is_plain(value) and name != "training":
            yield name, value
        elif callable(value):
            yield name, getattr(value, "__qualname__", type(value).__qualname__)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _precision(device: torch.device) -> list[str | None]:
    """What, beside the dtypes, decides how exactly a network is evaluated."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    kernels = (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None))
    products = [getattr(kernel, "fp32_precision", None) for kernel in kernels]
    return [device.type, str(autocast), torch.get_float32_matmul_precision(), *products]
