"""The images of a task that an analysis looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from lit_merge.data.batch import Batch
from lit_merge.errors import ConfigurationError, DataError
from lit_merge.evaluation.analysis.processes import Processes
from lit_merge.transforms.base import one_of, whole_number

__all__ = ["TaskImages", "task_images"]

_KEPT = 2 << 30  # bytes of one task's images that are kept in the host's memory


class TaskImages:
    """Some images of one task: which ones depends on the seed alone, and every process has its share of them.

    They are read once and kept, unless they are large: then they are read again in every pass.

    Args:
        dataset: a split, such as :class:`lit_merge.data.images.datasets.ImageDataset`.
        name: of the task.
        classes: its class names.
        templates: its prompt templates.
        images: how many at most; None for all.
        seed: of the choice.
        batch_size: images that go through a network at a time.
        workers: processes that read the images.
        processes: who shares the images.

    Attributes:
        total: images of all processes.

    Raises:
        ConfigurationError: the data set cannot give a part of its images.
        DataError: there are fewer images than processes.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        classes: Sequence[str],
        templates: Sequence[str],
        images: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
        workers: int = 0,
        processes: Processes | None = None,
    ) -> None:
        if not hasattr(dataset, "subset"):
            raise ConfigurationError(
                f"data: expected images of which a part can be taken (subset), got {type(dataset).__name__}. "
                "Use MultiTaskDataModule."
            )
        self.name, self.classes, self.templates = name, tuple(classes), tuple(templates)
        self._processes = processes or Processes()
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        chosen = order[:images].sort().values.tolist()
        if len(chosen) < self._processes.count:
            raise DataError(
                f"{name}: expected at least one image per process, got {len(chosen)} for {self._processes.count}. "
                "Choose another split, or fewer devices."
            )
        self.total = len(chosen)
        self._dataset = dataset.subset(self._processes.share(chosen))
        self._batch_size, self._workers = batch_size, workers
        self._batches: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        """This process's images in batches, on its device."""
        device = self._processes.device
        if self._batches is not None:
            for batch in self._batches:
                yield batch.to(device, non_blocking=True)
            return
        kept: list[Batch] = []
        room = _KEPT
        for batch in self.loader():
            room -= sum(one.nbytes for one in batch.inputs)
            if room >= 0:
                kept.append(batch)
            yield batch.to(device)
        if room >= 0:
            self._batches = kept

    def loader(self) -> DataLoader[Any]:
        """Batches of this process's images, in their order."""
        return DataLoader(
            self._dataset, self._batch_size, num_workers=self._workers, collate_fn=_as_it_is, shuffle=False
        )

    def digest(self) -> str:
        """SHA-256 of all processes' inputs, as the network sees them, and labels.

        The same for any number of processes and images at a time: what a batch's texts are padded with does not count.
        """
        own = [
            hashlib.sha256(b"".join(map(_content, batch.select(torch.tensor([row])).unpadded()))).digest()
            for batch in (one.to("cpu") for one in self)
            for row in range(len(batch))
        ]
        parts = self._processes.gathered(own)
        digest = hashlib.sha256()
        for index in range(self.total):
            digest.update(parts[index % len(parts)][index // len(parts)])
        return digest.hexdigest()


def task_images(
    data: Any,
    tasks: Sequence[str],
    split: str,
    module: Any,
    images: int | None,
    seed: int,
    batch_size: int,
    processes: Processes,
) -> dict[str, TaskImages]:
    """Task -> its images, of a data module of several tasks, which is not changed.

    Raises:
        ConfigurationError: the split or the number is another one than there can be.
        DataError: the images are missing or unreadable, or there are none.
    """
    one_of("split", split, ("val", "test"))
    whole_number("images", images, minimum=1, optional=True)
    found: dict[str, TaskImages] = {}
    for task in tasks:
        own = data.tasks[task]
        if processes.is_first:  # one at a time, as what is drawn or downloaded is kept
            own.source.prepare()
        processes.from_first(None)
        examples = own.examples(split, module)
        found[task] = TaskImages(
            examples, task, own.classes, own.templates, images, seed, batch_size, own.workers, processes
        )
    return found


def _content(batch: Batch) -> bytes:
    return b"".join(part.numpy().tobytes() for part in (*batch.inputs, batch.targets))


def _as_it_is(batch: Any) -> Any:
    return batch
