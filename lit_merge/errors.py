"""The errors that lit-merge raises on purpose.

Every message says what was expected, what was got and what to do about it, in one line, so that the command line can
show it as it is. Anything else that escapes is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "ConfigurationError",
    "DataError",
    "FileFormatError",
    "HubError",
    "LitMergeError",
    "NonFiniteError",
    "StructureMismatchError",
    "first_few",
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


def first_few(items: Iterable[object], limit: int = 3) -> str:
    """Join the first ``limit`` items for a message and count the rest, e.g. ``"a, b, c and 4 more"``."""
    listed = [str(item) for item in items]
    shown = ", ".join(listed[:limit])
    return f"{shown} and {len(listed) - limit} more" if len(listed) > limit else shown
