"""Prompts with fields of a row: a small language of its own, of which nothing is ever evaluated.

``{question}`` is a column; ``{choices.text.0}`` a value below it, by keys of mappings and positions of lists alone;
``{fact|strip:.|lower}`` goes through filters, from left to right. ``{{`` and ``}}`` are braces. There are no
attributes, no expressions and no format specifications: whatever names no column, or no filter, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_merge.errors import ConfigurationError, DataError, did_you_mean

__all__ = ["FILTERS", "Prompt", "cell", "is_missing", "shown"]

Row = Mapping[str, Any]


def _blank_or(value: Any, argument: str, row: Row) -> str:
    """The items of another column, joined by " or ", in the place of a blank of five underscores, or at the end."""
    alternatives = " or ".join(shown(one).strip() for one in cell(row, argument))
    text = shown(value)
    return text.replace("_____", alternatives) if "_____" in text else f"{text} {alternatives}"


FILTERS: Mapping[str, Callable[[Any, str, Row], Any]] = {
    "lower": lambda value, _, __: shown(value).lower(),
    "upper": lambda value, _, __: shown(value).upper(),
    "first": lambda value, _, __: shown(value)[:1],
    "rest": lambda value, _, __: shown(value)[1:],
    "strip": lambda value, argument, _: shown(value).strip(argument or None),
    "join": lambda value, argument, _: argument.join(shown(one).strip() for one in value),
    "lettered": lambda value, argument, _: argument.join(
        f"{chr(65 + place)}. {shown(one)}" for place, one in enumerate(value)
    ),
    "decimals": lambda value, argument, _: f"{float(value):.{int(argument or 1)}f}",
    "blank_or": _blank_or,
}
"""Name -> filter of a value, its argument (after the colon) and the row.

``lower``, ``upper``; ``first`` and ``rest`` (the first character, and what follows it); ``strip:CHARACTERS`` from both
ends, white space by default; of a list ``join:BETWEEN`` and ``lettered:BETWEEN`` (A. …, B. …); ``decimals:COUNT`` of a
number; ``blank_or:COLUMN``, the items of another column with " or " between them instead of a blank ``_____``.
"""


@dataclass(frozen=True)
class _Field:
    path: str
    filters: tuple[tuple[str, str], ...]

    @property
    def column(self) -> str:
        return self.path.partition(".")[0]


class Prompt:
    """A text with fields.

    Args:
        text: as the module says.
        setting: where it was given, for messages.

    Attributes:
        columns: the columns that it needs.

    Raises:
        ConfigurationError: a brace is left open, or a filter is unknown.

    Examples:
        >>> Prompt("{title|lower}: {body}")({"title": "News", "body": "Rain."})
        'news: Rain.'
    """

    def __init__(self, text: str, setting: str = "prompt") -> None:
        self.text, self.setting = text, setting
        self._parts = tuple(_parsed(text, setting))
        self.columns = tuple(dict.fromkeys(part.column for part in self._parts if isinstance(part, _Field)))

    @property
    def constant(self) -> str:
        """What does not come from a row."""
        return "".join(part for part in self._parts if isinstance(part, str))

    def check(self, columns: Iterable[str], where: str) -> None:
        """Refuse a prompt that names a column which there is not.

        Raises:
            ConfigurationError: it does; the nearest columns are named.
        """
        known = list(columns)
        for name in self.columns:
            if name not in known:
                hint = did_you_mean(name, known, "Correct it.")
                raise ConfigurationError(
                    f"{self.setting}: expected fields that are columns of {where} ({', '.join(known)}), got "
                    f"{name!r}. {hint}"
                )

    def __call__(self, row: Row) -> str:
        """The text for a row.

        Raises:
            DataError: a value below a column is not there, or a filter does not fit it.
        """
        return "".join(part if isinstance(part, str) else self._filled(part, row) for part in self._parts)

    def _filled(self, field: _Field, row: Row) -> str:
        value = cell(row, field.path)
        for name, argument in field.filters:
            try:
                value = FILTERS[name](value, argument, row)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{self.setting}: expected a value of {field.path} that {name} fits, got {value!r:.60}. "
                    "Remove the filter."
                ) from error
        return shown(value)

    def __repr__(self) -> str:
        return f"Prompt({self.text!r})"


def cell(row: Row, path: str) -> Any:
    """A value of a row: a column's, or one below it.

    Raises:
        DataError: there is none; nothing but keys and positions is looked at.
    """
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(f"field {path}: expected a key or a position in every row, got none for {part!r}.")
    return value


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, or a text of white space."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def shown(value: Any) -> str:
    """A cell as text."""
    return value if isinstance(value, str) else str(value)


def _parsed(text: str, setting: str) -> Iterable[str | _Field]:
    at, plain = 0, ""
    while at < len(text):
        pair, sign = text[at : at + 2], text[at]
        if pair in ("{{", "}}"):
            plain, at = plain + sign, at + 2
        elif sign == "{":
            end = text.find("}", at)
            if end < 0 or "{" in text[at + 1 : end]:
                raise _refused(text, setting, "a brace that is not closed")
            if plain:
                yield plain
            yield _field(text[at + 1 : end], text, setting)
            plain, at = "", end + 1
        elif sign == "}":
            raise _refused(text, setting, "a closing brace alone")
        else:
            plain, at = plain + sign, at + 1
    if plain:
        yield plain


def _field(inner: str, text: str, setting: str) -> _Field:
    path, *filters = inner.split("|")
    if not path:
        raise _refused(text, setting, "a field without a name")
    pairs = tuple((name, argument) for name, _, argument in (one.partition(":") for one in filters))
    for name, _ in pairs:
        if name not in FILTERS:
            raise ConfigurationError(
                f"{setting}: expected filters among {', '.join(FILTERS)}, got {name!r} in {{{inner}}}. Use one of them."
            )
    return _Field(path, pairs)


def _refused(text: str, setting: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{setting}: expected fields such as {{text}}, got {what} in {text!r:.80}. Write {{{{ and }}}} for braces."
    )
