"""A training loader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lit_merge.data.batch import Batch

__all__ = ["ResumableLoader"]


class ResumableLoader(DataLoader[Batch]):
    """Leaves out the batches that the trainer has had in this epoch, as a resumed run has.

    The sampler needs a ``skip``, as :class:`~lit_merge.data.sampling.TrainingSampler` has it.

    Attributes:
        trainer: whose progress counts; None counts none.
    """

    trainer: L.Trainer | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches of one epoch; nothing happens before the first is asked for, when the progress is known."""
        had = 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        sampler: Any = self.sampler
        if self.trainer is not None:  # Lightning counts an epoch as through that max_steps ended in the middle
            sampler.set_epoch(self.trainer.current_epoch)
        # A task with fewer batches than the others has started again in between.
        sampler.skip = had % len(self) * (self.batch_size or 1)
        yield from super().__iter__()

    # Lightning takes loaders with these two for resumable; the state itself it does not restore where the number of
    # steps was asked for before (Trainer.estimated_stepping_batches), as a schedule does.

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's own progress says it all."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to be done."""
