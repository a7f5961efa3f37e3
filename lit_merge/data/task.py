"""The data module of one task."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_merge.data.batch import PADDING, Batch
from lit_merge.data.examples import Examples
from lit_merge.data.images.datasets import FileImages
from lit_merge.data.images.folders import find_images
from lit_merge.data.loading import ResumableLoader
from lit_merge.data.other_tasks import (
    ImagePenalty,
    OtherImages,
    OtherLoader,
    OtherSampler,
    images_per_task,
    known_others,
    read_other_images,
    sources_in_use,
)
from lit_merge.data.packaged.task import RealTextTask
from lit_merge.data.paths import named_path
from lit_merge.data.published.task import PublishedSource, named_source
from lit_merge.data.published.texts import PublishedText
from lit_merge.data.sampling import EvaluationSampler, GroupedSampler, TrainingSampler, training_batch_size
from lit_merge.data.sources import Task
from lit_merge.data.text.examples import TextExamples
from lit_merge.data.text.task import TextTask
from lit_merge.errors import ConfigurationError, DataError

__all__ = ["TaskDataModule"]

_FRACTIONS = (0.8, 0.1, 0.1)


class TaskDataModule(L.LightningDataModule):
    """One task: of the embedded suite, a published data set, your own images or texts, or any other.

    Every batch is a :class:`~lit_merge.data.Batch`, of images an :class:`~lit_merge.data.ImageBatch`. With several
    processes each sees its part of every global batch, and the global batches are those that one process with the whole
    batch size would see; in evaluation every image counts once. The last, incomplete training batch of an epoch is left
    out.

    If the trainer's module has a ``penalty`` (see :class:`~lit_merge.data.other_tasks.ImagePenalty`), a training batch
    is ``{"own": ImageBatch, "other": OtherBatch}`` with unlabelled images of other tasks, augmented as the own ones.

    Args:
        task: a task of the embedded suite, or a published data set (``lit-merge data list`` shows them), which is read
            from the disk and never downloaded; either this or ``path``.
        path: a folder with one folder per class, or with ``train``, ``val`` and ``test`` of such folders, see
            :class:`~lit_merge.data.images.folders.FolderSource`; or a file of texts with the columns ``text`` and
            ``label``, or a folder of such files, see :class:`~lit_merge.data.TextTask`, which as ``source`` has more
            settings.
        batch_size: training images per process and batch; fewer where the split has not that many.
        evaluation_batch_size: images per process and batch in validation, test and prediction.
        workers: processes per loader that read the images; 0 is right for the embedded suite.
        seed: of the order and the augmentation.
        augment: whether training images are augmented: lightly, and never flipped.
        class_names: folder name -> class name, of a ``path``; by default the folder's with ``_`` as a space. Of texts
            label -> class name, for all of them.
        templates: prompt templates with one ``{}``, or the name of a data set whose templates to use; None for the
            task's own, or ``"a photo of a {}."``.
        fractions: shares of train, val and test where a folder, also one of ``other_paths``, is divided; they sum to 1.
        split_seed: of that division; leave it as it is, or test images of one run are training images of another.
        skip_corrupt: whether to decode all images of ``path``, ``other_paths`` and ``predict_path`` at the start and
            leave the damaged ones out, with a warning, rather than to stop at the first; of texts, incomplete rows.
        predict_path: an image, a folder searched for images, or a file of texts, to predict; None for the test split.
        labelled: False gives the training images the label -1, as test-time merging wants it.
        preprocessing: what the model expects of images; None takes ``preprocessing`` of the trainer's module.
        name: of the task, with a ``path`` or ``source``; by default the folder's, or its own.
        other_paths: name -> folder of another task's images, for a penalty; laid out as ``path``.
        other_tasks: other tasks of the embedded suite, or published data sets, for a penalty; None for all of the
            embedded suite if ``task`` is one of them, otherwise for none. Without a penalty none costs anything.
        root: the folder of the published data sets; None for ``$LIT_MERGE_DATA``, or ``data``.
        source: instead of task and path, any task of one's own, by class path.
        other_sources: name -> other tasks of one's own, for a penalty.

    Attributes:
        source: the task.
        whole: whether every process trains on all images instead of its share.
        other_sources: name -> other task with its ``classes`` and ``templates``, of those that the penalty is about;
            after ``setup("fit")``.

    Raises:
        ConfigurationError: an argument is unknown, out of range, or contradicts another one.
    """

    trainer: L.Trainer | None

    def __init__(
        self,
        task: str | None = None,
        path: str | None = None,
        batch_size: int = 128,
        evaluation_batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
        augment: bool = True,
        class_names: dict[str, str] | None = None,
        templates: list[str] | str | None = None,
        fractions: tuple[float, float, float] = _FRACTIONS,
        split_seed: int = 0,
        skip_corrupt: bool = False,
        predict_path: str | None = None,
        labelled: bool = True,
        preprocessing: Any = None,
        name: str | None = None,
        other_paths: dict[str, str] | None = None,
        other_tasks: list[str] | None = None,
        root: str | None = None,
        source: Task | None = None,
        other_sources: dict[str, Task] | None = None,
    ) -> None:
        super().__init__()
        named = {"task": task, "path": path, "source": source}
        got = [f"{argument} {str(value)!r}" for argument, value in named.items() if value is not None]
        if len(got) != 1:
            raise ConfigurationError(
                f"task, path and source: expected exactly one of them, got {' and '.join(got) or 'none'}. Set task to "
                "one of the embedded suite or to a published data set, path to a folder of images, or source to a task "
                "of your own."
            )
        _check_numbers(
            batch_size=(batch_size, 1),
            evaluation_batch_size=(evaluation_batch_size, 1),
            workers=(workers, 0),
            seed=(seed, 0),
            split_seed=(split_seed, 0),
        )
        self.source: Task
        if path is None:
            only_with_path = (
                ("class_names", class_names, None, False),
                ("fractions", tuple(fractions), _FRACTIONS, other_paths),
                ("split_seed", split_seed, 0, other_paths),
                ("name", name, None, source is not None),
                ("skip_corrupt", skip_corrupt, False, other_paths or predict_path),
            )
            for argument, given, default, used in only_with_path:
                if given != default and not used:
                    raise ConfigurationError(
                        f"{argument}: expected only with path, got {given!r} with {got[0]}. Remove it, or set path."
                    )
            if source is not None and templates is not None:
                raise ConfigurationError(
                    f"templates: expected none together with source, got {templates!r}. Give them to the source."
                )
            self.source = source if source is not None else named_source(str(task), root, templates)
        else:
            self.source = named_path(path, class_names, templates, fractions, split_seed, skip_corrupt)
        self.source.name = name or self.source.name
        self._known_others = known_others(
            self.source, other_tasks, other_paths or {}, fractions, split_seed, skip_corrupt, root, other_sources
        )
        sources = (self.source, *self._known_others.values())
        prepared = PublishedSource | PublishedText | RealTextTask
        if root is not None and not any(isinstance(one, prepared) for one in sources):
            raise ConfigurationError(
                f"root: expected only with a published data set, got {str(root)!r} without one. Remove it."
            )
        self.other_sources: dict[str, Task] = {}
        self._other_images: OtherImages | None = None
        self.batch_size, self.evaluation_batch_size, self.workers = batch_size, evaluation_batch_size, workers
        self.seed, self.augment, self.labelled = seed, augment, labelled
        self.skip_corrupt, self.predict_path = skip_corrupt, predict_path
        self.preprocessing: Any = preprocessing
        self.datasets: dict[str, Examples] = {}
        self.whole = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task's name, or the folder's."""
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in label order."""
        return self.source.classes

    @property
    def regression(self) -> bool:
        """Whether the targets are numbers instead of classes."""
        return self.source.regression

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates of the zero-shot head, with one ``{}`` each."""
        return self.source.templates

    @property
    def other_task_names(self) -> tuple[str, ...]:
        """The tasks that the penalty is about, by :attr:`OtherBatch.tasks`; after ``setup("fit")``."""
        return tuple(self.other_sources)

    def prepare_data(self) -> None:
        """Draw and cache what is missing of embedded tasks; Lightning calls this on one process per machine."""
        self.source.prepare()
        penalty = self._penalty()
        if penalty is not None and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            for name, source in self._known_others.items():
                if penalty.tasks is None or name in penalty.tasks:
                    source.prepare()

    def setup(self, stage: str) -> None:
        """Read the splits of a stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            ConfigurationError: the preprocessing is not known, or the module's penalty cannot be served.
            DataError: the images are missing or unreadable, or a split is empty; validation while fitting may be.
        """
        preprocessing = self.known_preprocessing()
        if stage == "fit":
            penalty = self._penalty()
            self.other_sources = {} if penalty is None else sources_in_use(penalty, self._known_others, self.trainer)
            self.datasets["train"] = self._split("train", preprocessing, self.seed if self.augment else None)
            self._other_images = None if penalty is None else self._read_others(penalty, preprocessing)
        if stage in ("fit", "validate"):
            self.datasets["val"] = self.source.split("val", preprocessing)
            if stage == "validate" and not len(self.datasets["val"]):
                raise DataError(f"{self.name}: expected validation images, got none. Raise the second of fractions.")
        if stage == "test" or (stage == "predict" and self.predict_path is None):
            self.datasets["test"] = self.source.split("test", preprocessing)
        if stage == "predict":
            self.datasets["predict"] = self._to_predict(preprocessing)

    def train_dataloader(self) -> DataLoader[Batch] | CombinedLoader:
        """Batches in a new order every epoch; with a penalty of the module, images of other tasks beside each."""
        dataset, (processes, rank) = self._dataset("train"), (1, 0) if self.whole else self._place()
        batch_size = training_batch_size(len(dataset), self.batch_size, processes, self.name)
        sampler = TrainingSampler(dataset, processes, rank, self.seed)
        if isinstance(dataset, TextExamples) and dataset.length_groups:
            groups = dataset.length_groups
            sampler = GroupedSampler(dataset, dataset.lengths, groups, batch_size, processes, rank, self.seed)
        own = self._loader(dataset, sampler, batch_size, ResumableLoader, drop_last=True)
        penalty = self._penalty()
        if penalty is None:
            return own
        if self._other_images is None:
            raise ConfigurationError(
                "penalty: expected the module to have it before setup('fit'), got it later. "
                "Set it when the module is made."
            )
        others = OtherSampler(
            self._other_images,
            penalty.schedule,
            images_per_task(penalty, self.batch_size),
            len(own),
            processes,
            rank,
            self.seed,
        )
        beside = self._loader(self._other_images, others, others.entries, OtherLoader, drop_last=True)
        return CombinedLoader({"own": own, "other": beside}, mode="min_size")  # both are equally long

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Batches of the validation images; an empty list if there are none."""
        return self.evaluation_loader("val") if len(self._dataset("val")) else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches of the test images."""
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches of the images of ``predict_path``, or of the test images."""
        return self.evaluation_loader("predict")

    def predict_names(self) -> list[str]:
        """Names of the images to predict, by :attr:`ImageBatch.indices`: file paths, or e.g. ``digits/test/7``.

        Raises:
            ConfigurationError: ``setup("predict")`` has not been called.
        """
        return list(self._dataset("predict").names)

    def evaluation_loader(self, split: str) -> DataLoader[Batch]:
        """Batches of a split in its own order: ``"val"``, ``"test"`` or ``"predict"``.

        Raises:
            ConfigurationError: the split has not been set up.
        """
        dataset = self._dataset(split)
        return self._loader(dataset, EvaluationSampler(dataset, *self._place()), self.evaluation_batch_size)

    def ordered_loader(self, split: str) -> DataLoader[Batch]:
        """All images of a split in its own order, in every process; ``"train"`` too, as it was set up.

        Raises:
            ConfigurationError: the split has not been set up.
        """
        dataset = self._dataset(split)
        return self._loader(dataset, EvaluationSampler(dataset), self.evaluation_batch_size)

    def examples(self, split: str, module: Any) -> Examples:
        """The examples of ``"train"``, ``"val"`` or ``"test"`` as a module wants them, not augmented; sets up nothing.

        Raises:
            ConfigurationError: the preprocessing is not known.
            DataError: the images are missing or unreadable, or there are none.
        """
        found = self._split(split, self.known_preprocessing(module))
        if not len(found):
            raise DataError(f"{self.name}: expected {split} images, got none. Choose another split.")
        return found

    def known_preprocessing(self, module: Any = None) -> Any:
        """What the network needs of its data: as it was given, or as this module, or the trainer's, has it.

        Raises:
            ConfigurationError: neither is there.
        """
        if self.preprocessing is not None:
            return self.preprocessing
        if module is None and self.trainer is not None:
            module = self.trainer.lightning_module
        if not hasattr(module, "preprocessing"):
            source = "no trainer" if module is None else f"{type(module).__name__}, which has none"
            raise ConfigurationError(
                f"preprocessing: expected the trainer's module to have it, got {source}. "
                "Set preprocessing, e.g. that of lit_merge.models.load_clip()."
            )
        return module.preprocessing

    def _split(self, split: str, preprocessing: Any, augmentation_seed: int | None = None) -> Examples:
        found = self.source.split(split, preprocessing, augmentation_seed)
        if split == "train" and not self.labelled:
            found.labels = torch.full_like(found.labels, PADDING)
        return found

    def _penalty(self) -> ImagePenalty | None:
        """That of the trainer's module; in a data module of several tasks all of them are own ones."""
        if self.trainer is None or getattr(self.trainer, "datamodule", None) is not self:
            return None
        penalty = getattr(self.trainer.lightning_module, "penalty", None)
        return penalty if getattr(penalty, "reads_other_tasks", True) else None

    def _read_others(self, penalty: ImagePenalty, preprocessing: Any) -> OtherImages:
        return read_other_images(
            penalty,
            self.other_sources,
            preprocessing,
            self.seed,
            self.augment,
            images_per_task(penalty, self.batch_size),
            self._place()[0],
        )

    def _to_predict(self, preprocessing: Any) -> Examples:
        if self.predict_path is None:
            return self.datasets["test"]
        if isinstance(self.source, TextTask):
            return self.source.examples_of(self.predict_path, preprocessing)
        files = find_images(self.predict_path, self.skip_corrupt)
        return FileImages(files, torch.full((len(files),), PADDING), preprocessing)

    def _dataset(self, split: str) -> Examples:
        if split not in self.datasets:
            stage = {"train": "fit", "val": "validate"}.get(split, split)
            raise ConfigurationError(
                f"{split} images of {self.name}: expected setup({stage!r}) first, got none. Call it, or use a Trainer."
            )
        return self.datasets[split]

    def _place(self) -> tuple[int, int]:
        """Number of processes that share the images, and which of them this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(
        self,
        dataset: Dataset[Any],
        sampler: Sampler[Any],
        batch_size: int,
        kind: type[DataLoader[Any]] = DataLoader,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        loader = kind(
            dataset,
            batch_size=batch_size,  # by its name: Lightning builds the loader anew in prediction
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=_as_it_is,  # the data set gives whole batches
            pin_memory=device.type == "cuda",
            drop_last=drop_last,
            persistent_workers=self.workers > 0,
        )
        if isinstance(loader, ResumableLoader):
            loader.trainer = self.trainer
        return loader


def _check_numbers(**given: tuple[Any, int]) -> None:
    for argument, (value, least) in given.items():
        if not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{argument}: expected an integer of at least {least}, got {value!r}.")


def _as_it_is(batch: Any) -> Any:
    return batch
