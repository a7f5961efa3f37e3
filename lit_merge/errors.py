"""The errors that lit-merge raises on purpose.

Every message says what was expected, what was got and what to do about it, in one line, so that the command line can
show it as it is. Anything else that escapes is a bug.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from difflib import SequenceMatcher

__all__ = [
    "ConfigurationError",
    "DataError",
    "EndRequested",
    "FileFormatError",
    "HubError",
    "LitMergeError",
    "NonFiniteError",
    "StructureMismatchError",
    "WriteError",
    "did_you_mean",
    "first_few",
    "one_line",
]


class LitMergeError(Exception):
    """Base class: catch it to catch everything that lit-merge refuses knowingly."""


class ConfigurationError(LitMergeError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(LitMergeError):
    """A data set is missing, empty, inconsistent or unreadable."""


class FileFormatError(LitMergeError):
    """A file is truncated, malformed or of another kind than expected."""


class HubError(LitMergeError):
    """The Hugging Face Hub, or something on it, cannot be reached, read or written."""


class StructureMismatchError(LitMergeError):
    """Names, shapes, dtypes or the base model of two sets of parameters differ."""


class NonFiniteError(LitMergeError):
    """A value that must be finite is NaN or infinite."""


class WriteError(LitMergeError, OSError):
    """The system refuses to write: the disk or a quota is full, or the path is not writable."""


class EndRequested(SystemExit):
    """The process was asked to end (SIGTERM) while Lightning ran, which puts that off to the next batch.

    Lightning's own exception has no exit code, and would end a process as if all were done.

    Args:
        going_on: how to go on, for the line that is said at the end; empty if nothing is known.

    Attributes:
        status: the exit code, that of a process that a shell saw killed by SIGTERM.
    """

    status = 128 + signal.SIGTERM

    def __init__(self, going_on: str = "") -> None:
        super().__init__(self.status)
        self.going_on = going_on


def first_few(items: Iterable[object], limit: int = 3) -> str:
    """Join the first ``limit`` items for a message and count the rest, e.g. ``"a, b, c and 4 more"``."""
    listed = [str(item) for item in items]
    shown = ", ".join(listed[:limit])
    return f"{shown} and {len(listed) - limit} more" if len(listed) > limit else shown


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", limit: int = 3) -> str:
    """The sentence that ends the message about an unknown name.

    Names are alike as a whole or in what follows the last dot, whatever their capitals and underscores.

    Args:
        name: what was given.
        known: the valid names.
        otherwise: the sentence if none of them is similar.
        limit: the number of names at most.

    Returns:
        ``"Did you mean trainer.max_steps or trainer.max_time?"``, or ``otherwise``.
    """

    def likeness(candidate: str) -> float:
        first, second = (one.lower().replace("_", "") for one in (name, candidate))
        endings = first.rpartition(".")[2], second.rpartition(".")[2]
        return max(SequenceMatcher(None, first, second).ratio(), 0.95 * SequenceMatcher(None, *endings).ratio())

    scores = {candidate: likeness(candidate) for candidate in known}
    enough = max(0.6, max(scores.values(), default=0.0) - 0.1)
    near = sorted((one for one in scores if scores[one] >= enough), key=lambda one: -scores[one])[:limit]
    if not near:
        return otherwise
    return f"Did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}?"


def one_line(error: BaseException | str, limit: int = 1000) -> str:
    """What an error says, as one line without its full stop; its kind if it says nothing.

    Of an error that crossed a process (a data loader's worker) the text is a traceback: its last line is the message.

    Args:
        error: of any library, or a text.
        limit: characters at most.
    """
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text.splitlines()[-1]
    line = " ".join(text.split()).rstrip(".") or type(error).__name__
    return line if len(line) <= limit else f"{line[:limit]} …"
