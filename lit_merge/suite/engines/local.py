"""Several stages at a time on this machine, each in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import pairwise

from lit_merge.errors import ConfigurationError
from lit_merge.suite.engines.job import Job, Outcome
from lit_merge.suite.engines.process import StageProcess, cores, with_threads
from lit_merge.suite.engines.template import Template

__all__ = ["LocalEngine", "devices_of_slots", "visible_devices"]


class LocalEngine:
    """Runs up to N jobs at a time; they divide the machine's threads, and its GPUs if it has any.

    With at least N GPUs every job has its own, ``⌊G / N⌋`` or one more of them; with fewer, jobs share them in turn.
    Without GPUs jobs are forked from one process that has imported what they need, where a system allows it.

    Args:
        parallel: N.
        devices: the most devices that a job uses.
        modules: what jobs are going to import.

    Raises:
        ConfigurationError: the machine has GPUs, but not so many for each of N jobs.
    """

    def __init__(self, parallel: int, devices: int = 1, modules: Sequence[str] = ()) -> None:
        self._slots = devices_of_slots(visible_devices(), parallel)
        fewest = min(len(slot) for slot in self._slots)
        if fewest and devices > fewest:
            raise ConfigurationError(
                f"parallel: expected {devices} GPUs for each stage, as fit.trainer.devices says, got {fewest} with "
                f"{parallel} stages at a time. Lower parallel."
            )
        self._environment = with_threads(cores() // parallel)
        self._running: dict[int, StageProcess] = {}
        self._forks = Template.is_possible() and not any(self._slots)
        self._modules = modules
        self._template: Template | None = None

    def free(self) -> bool:
        """Whether fewer than N jobs run."""
        return len(self._running) < len(self._slots)

    def start(self, job: Job) -> None:
        """Start a job's process."""
        slot = next(slot for slot in range(len(self._slots)) if slot not in self._running)
        given = {"CUDA_VISIBLE_DEVICES": ",".join(self._slots[slot])} if self._slots[slot] else {}
        # Processes that a job starts by repeating its command line need one to repeat.
        template = self._living_template() if self._forks and not job.processes else None
        self._running[slot] = StageProcess(job, {**self._environment, **given}, template=template)

    def _living_template(self) -> Template:
        """What jobs are forked from; another one if that was killed."""
        if self._template is None or not self._template.is_alive():
            self._template = Template(self._environment, self._modules)
        return self._template

    def wait(self) -> Outcome:
        """Wait until one of the processes ends."""
        while True:
            for slot, process in self._running.items():
                outcome = process.poll()
                if outcome is not None:
                    process.end()  # what it may have left behind
                    del self._running[slot]
                    return outcome
            time.sleep(0.05)

    def close(self) -> None:
        """End all processes."""
        while self._running:
            self._running.popitem()[1].end()
        if self._template is not None:
            self._template.close()
            self._template = None


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` calls them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]  # which does not initialise CUDA


def devices_of_slots(devices: Sequence[str], slots: int) -> list[list[str]]:
    """Divide devices among slots: equally many each, or where they are too few one each in turn."""
    if len(devices) < slots:
        return [[devices[slot % len(devices)]] if devices else [] for slot in range(slots)]
    bounds = [slot * len(devices) // slots for slot in range(slots + 1)]
    return [list(devices[start:end]) for start, end in pairwise(bounds)]
