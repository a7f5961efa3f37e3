"""A walk through a JSON document in which every refusal says where it happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lit_merge.errors import FileFormatError, first_few

__all__ = ["Reader"]

Value = TypeVar("Value")


class Reader:
    """One value of a JSON document, with its place in it for messages.

    Args:
        value: what ``json.load`` returned, or a part of it.
        source: what messages call the document, e.g. its path.
        place: keys from the root to the value, joined by dots; empty for the root.
    """

    def __init__(self, value: Any, source: str, place: str = "") -> None:
        self.value = value
        self.source = source
        self.place = place

    def __getitem__(self, key: str) -> Reader:
        entries = self.entries()
        if key not in entries:
            raise self.refusal(f"the key {key!r}", first_few(map(repr, entries)) or "no keys")
        return entries[key]

    def refusal(self, expected: str, got: str, advice: str = "Run the suite again.") -> FileFormatError:
        """The error to raise: expected what, got what, and what to do."""
        at = f" at {self.place}" if self.place else ""
        return FileFormatError(f"{self.source}: expected {expected}{at}, got {got}. {advice}")

    def entries(self, keys: Sequence[str] | None = None) -> dict[str, Reader]:
        """The value as an object.

        Args:
            keys: exactly these keys must be there, and come in this order; by default any.

        Raises:
            FileFormatError: it is no object, or has other keys.
        """
        if not isinstance(self.value, dict):
            raise self.refusal("an object", _shown(self.value))
        if keys is not None and set(keys) != set(self.value):
            missing = [key for key in keys if key not in self.value]
            unexpected = [key for key in self.value if key not in keys]
            counted = [f"{len(some)} {word} ({first_few(some)})" for some, word in _pairs(missing, unexpected) if some]
            raise self.refusal("one entry per task", " and ".join(counted))
        order = self.value if keys is None else keys
        return {key: Reader(self.value[key], self.source, f"{self.place}.{key}".lstrip(".")) for key in order}

    def items(self) -> list[Reader]:
        """The value as an array.

        Raises:
            FileFormatError: it is none.
        """
        if not isinstance(self.value, list):
            raise self.refusal("an array", _shown(self.value))
        return [Reader(item, self.source, f"{self.place}[{index}]") for index, item in enumerate(self.value)]

    def text(self) -> str:
        """The value as text.

        Raises:
            FileFormatError: it is none.
        """
        if not isinstance(self.value, str):
            raise self.refusal("text", _shown(self.value))
        return self.value

    def integer(self) -> int:
        """The value as an integer.

        Raises:
            FileFormatError: it is none.
        """
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            raise self.refusal("an integer", _shown(self.value))
        return self.value

    def number(self) -> float:
        """The value as a finite number.

        Raises:
            FileFormatError: it is none.
        """
        try:
            number = float(self.value) if isinstance(self.value, int | float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or isinstance(self.value, bool):
            raise self.refusal("a finite number", _shown(self.value))
        return number

    def fraction(self) -> float:
        """The value as a number from 0 to 1.

        Raises:
            FileFormatError: it is none.
        """
        number = self.number()
        if not 0.0 <= number <= 1.0:
            raise self.refusal("a fraction from 0 to 1", _shown(self.value), "Divide percentages by 100.")
        return number

    def optional(self, read: Callable[[Reader], Value]) -> Value | None:
        """The value as ``read`` returns it, or None for null."""
        return None if self.value is None else read(self)


def _pairs(missing: list[str], unexpected: list[str]) -> tuple[tuple[list[str], str], ...]:
    return (missing, "missing"), (unexpected, "unexpected")


def _shown(value: Any) -> str:
    """A value in few characters and one line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
