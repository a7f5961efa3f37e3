"""What an engine is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lit_merge.errors import LitMergeError

__all__ = ["Engine", "Job", "Outcome"]


@dataclass(frozen=True)
class Job:
    """A stage that is ready to run: one command with its configuration, in a folder of its own. Plain data.

    Attributes:
        name: of the stage.
        command: one of lit-merge's.
        arguments: what follows it.
        folder: where the stage writes; with the configuration in it.
        outputs: the files that it has to leave in its folder.
        devices: how many GPUs or other devices it uses where there are some; 0 for a stage that computes on the CPU.
        processes: whether it starts processes of its own, one per device, by repeating its command line.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    folder: str
    outputs: tuple[str, ...]
    devices: int = 1
    processes: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a job ended. Plain data.

    Attributes:
        name: of the stage.
        seconds: how long it took.
        error: what went wrong, None if nothing did.
        refused: whether its input was refused, so that to try again is no use; otherwise it was killed or broke off.
        machine: the machine that it ran on, if that is not this one.
        sizes: the outputs' sizes, as they were seen where the job ran.
    """

    name: str
    seconds: float
    error: LitMergeError | None = None
    refused: bool = False
    machine: str = ""
    sizes: tuple[int, ...] = ()


class Engine(Protocol):
    """Runs jobs, several at a time if it can. Which job runs when changes nothing in what the jobs write."""

    def free(self) -> bool:
        """Whether one more job can be started now."""

    def start(self, job: Job) -> None:
        """Start a job, or run it at once."""

    def wait(self) -> Outcome:
        """Wait until one of the started jobs ends."""

    def close(self) -> None:
        """End all jobs that still run, their processes included."""
