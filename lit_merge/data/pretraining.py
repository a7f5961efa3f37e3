"""Captioned images for the contrastive pre-training of ``lit-tiny`` and ``lit-small``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_merge.data.embedded.captions import captioned_image
from lit_merge.data.embedded.tasks import GENERATOR_VERSION
from lit_merge.errors import ConfigurationError
from lit_merge.files.cache import Cache

__all__ = ["CaptionDataModule", "augment_strongly"]


class _Drawn(Dataset[tuple[np.ndarray, str]]):
    def __init__(self, count: int, seed: int, fine: float) -> None:
        self.count, self.seed, self.fine = count, seed, fine

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        return captioned_image(index, self.seed, self.fine)


def _keep(samples: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
    return np.stack([image for image, _ in samples]), [caption for _, caption in samples]


class _ShuffledBatches(Sampler[list[int]]):
    """Batches of a permutation that depends on seed and epoch alone; each rank takes every W-th entry of a batch.

    Attributes:
        sampler: itself: of a loader's batches Lightning tells the epoch to the sampler within.
    """

    @property
    def sampler(self) -> _ShuffledBatches:
        return self

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        whole = self.batch_size * self.world_size
        for start in range(0, len(self) * whole, whole):
            yield order[start + self.rank : start + whole : self.world_size].tolist()


def augment_strongly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Distort a batch: affine map, blur, brightness, contrast, colour shift and noise, each image by its own amounts.

    Args:
        images: float in [0, 1], ``[N, 3, S, S]``.
        generator: source of the random amounts, on any device.

    Returns:
        float in [0, 1], ``[N, 3, S, S]``.
    """
    count = len(images)

    def amounts(low: float, high: float, *shape: int) -> Tensor:
        draws = torch.rand(count, *shape, generator=generator, device=generator.device)
        return draws.to(images.device) * (high - low) + low

    angle, inverse_scale, shear = amounts(-0.35, 0.35), 1 / amounts(0.75, 1.15), amounts(-0.2, 0.2)
    cosine, sine = torch.cos(angle) * inverse_scale, torch.sin(angle) * inverse_scale
    shift = amounts(-0.2, 0.2, 2)
    matrix = torch.stack(
        [torch.stack([cosine, shear - sine, shift[:, 0]], -1), torch.stack([sine, cosine, shift[:, 1]], -1)], 1
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    weight = amounts(0.0, 1.0, 1, 1, 1) * (amounts(0, 1, 1, 1, 1) < 0.6)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + weight * (blurred - images)
    contrast, brightness = amounts(0.55, 1.15, 1, 1, 1), amounts(-0.2, 0.2, 1, 1, 1)
    tint = amounts(-0.12, 0.12, 3, 1, 1)
    images = (images - 0.5) * contrast + 0.5 + brightness + tint
    mixing = torch.eye(3, device=images.device) + amounts(-0.25, 0.25, 3, 3) * (amounts(0, 1, 1, 1) < 0.4)
    images = torch.einsum("nij,njhw->nihw", mixing, images)
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images.device)
    return (images + noise * amounts(0.0, 0.07, 1, 1, 1)).clamp_(0, 1)


class CaptionDataModule(L.LightningDataModule):
    """Images with captions, drawn once and cached; a batch is ``(images, tokens, caption_of_image)``.

    All images lie on the module's device, and are augmented there: an accelerator needs no worker that loads.

    ``images`` float ``[B, 3, 32, 32]`` (augmented, normalised as the model asks), ``tokens`` int64 ``[U, context]`` of
    the batch's distinct captions, and ``caption_of_image`` int64 ``[B]`` in [0, U).

    Args:
        count: number of images.
        batch_size: images per batch and process.
        seed: of the images, their order and their augmentation.
        workers: processes that draw the images.
        fine: fraction of the images that show the finer suite's tasks, in [0, 1].
    """

    def __init__(
        self, count: int = 150_000, batch_size: int = 256, seed: int = 0, workers: int = 2, fine: float = 0.0
    ) -> None:
        super().__init__()
        if count < batch_size or batch_size < 2:
            raise ConfigurationError(
                f"count and batch_size: expected count >= batch_size >= 2, got {count} and {batch_size}. Raise count."
            )
        if not 0 <= fine <= 1:
            raise ConfigurationError(f"fine: expected a fraction in [0, 1], got {fine}. Use e.g. 0.5.")
        self.count, self.batch_size, self.seed, self.workers, self.fine = count, batch_size, seed, workers, fine
        self._cache = Cache("pretraining")
        self._key = self._cache.key(["captions", GENERATOR_VERSION, count, seed, *([fine] if fine else [])])

    def prepare_data(self) -> None:
        """Draw the images if the cache lacks them."""
        if self._cache.tensors(self._key) and self._cache.value(self._key):
            return
        loader = DataLoader(_Drawn(self.count, self.seed, self.fine), 500, num_workers=self.workers, collate_fn=_keep)
        images, captions = np.empty((self.count, 3, 32, 32), np.uint8), list[str]()
        for pixels, texts in loader:
            images[len(captions) : len(captions) + len(texts)] = pixels.transpose(0, 3, 1, 2)
            captions.extend(texts)
        distinct = sorted(set(captions))
        number = {caption: index for index, caption in enumerate(distinct)}
        stored = {"images": torch.from_numpy(images), "captions": torch.tensor([number[text] for text in captions])}
        self._cache.write_value(self._key, distinct)
        self._cache.write_tensors(self._key, stored)

    def setup(self, stage: str) -> None:
        """Read the images and tokenise the distinct captions with the model's tokenizer."""
        assert self.trainer is not None
        stored, texts = self._cache.tensors(self._key), self._cache.value(self._key)
        assert stored is not None  # by prepare_data
        self.images, self.captions = stored["images"], stored["captions"]
        model: Any = self.trainer.lightning_module
        self.tokens = model.tokenizer(texts)
        self.preprocessing = model.preprocessing
        self.generator: torch.Generator | None = None

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
        """Batches of all images in a new order every epoch; images are their numbers until they are on the device."""
        assert self.trainer is not None
        batches = _ShuffledBatches(
            self.count, self.batch_size, self.seed, self.trainer.global_rank, self.trainer.world_size
        )
        return DataLoader(list(range(self.count)), batch_sampler=batches, collate_fn=self._chosen)  # type: ignore[arg-type]

    def _chosen(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        distinct, caption_of_image = torch.unique(self.captions[chosen], return_inverse=True)
        return chosen, self.tokens[distinct], caption_of_image

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of images to augmented images, on the device that the batch is on."""
        chosen, tokens, caption_of_image = batch
        if self.generator is None:
            self.images = self.images.to(chosen.device)
            self.generator = torch.Generator(chosen.device).manual_seed(self.seed)
        images = augment_strongly(self.images[chosen].float().div_(255), self.generator)
        mean, std = (
            torch.tensor(one, device=chosen.device) for one in (self.preprocessing.mean, self.preprocessing.std)
        )
        return (images - mean.view(3, 1, 1)) / std.view(3, 1, 1), tokens, caption_of_image
