"""From the rows of a table to what a task is about: texts, classes, targets and answers, each checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_merge.data.batch import PADDING
from lit_merge.data.text.prompts import Prompt, is_missing, shown
from lit_merge.data.text.tables import Table
from lit_merge.errors import ConfigurationError, DataError, did_you_mean, first_few

__all__ = ["Labels", "Rows", "Wording", "identity", "kept", "spelled_label"]


@dataclass(frozen=True)
class Wording:
    """How a row becomes texts.

    Attributes:
        columns: one or two columns that are the text, if there is no prompt.
        prompt: makes the text.
        target: makes what is to follow it.
        answers: make what there is to choose from, one of every class.
    """

    columns: tuple[str, ...]
    prompt: Prompt | None = None
    target: Prompt | None = None
    answers: tuple[Prompt, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that make the text."""
        return self.columns if self.prompt is None else self.prompt.columns

    def check(self, table: Table) -> None:
        """Refuse a table without one of the columns.

        Raises:
            DataError: it lacks a column of the text.
            ConfigurationError: a prompt names a column which there is not.
        """
        if self.prompt is None:
            for name in self.columns:
                if name not in table.columns:
                    hint = did_you_mean(name, table.columns, "Set text_column to one of them.")
                    raise DataError(
                        f"{table.where}: expected the column {name} of texts, got {', '.join(table.columns)}. {hint}"
                    )
        for prompt in (self.prompt, self.target, *self.answers):
            if prompt is not None:
                prompt.check(table.columns, table.where)

    def text(self, row: Mapping[str, Any]) -> str | tuple[str, str]:
        """The text of a row, or its two texts."""
        if self.prompt is not None:
            return self.prompt(row)
        texts = tuple(shown(row[name]) for name in self.columns)
        return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def spelled_label(value: Any) -> str:
    """A label as it is compared: without blanks around it; a whole number as such, also where a gap made it 1.0."""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else shown(value).strip()


@dataclass(frozen=True)
class Labels:
    """How the cells of a column become classes.

    Attributes:
        column: of the labels.
        classes: names, in the order of the classes.
        spelled: a label as it is stored -> its class; other spellings of a class are its name and its position.
    """

    column: str
    classes: tuple[str, ...]
    spelled: Mapping[str, int] = field(default_factory=dict)

    def of(self, cells: Mapping[int, Any], where: str) -> list[int]:
        """The classes of some rows' cells; -1 where one is empty.

        Raises:
            DataError: a label is no class.
        """
        known = {name: place for place, name in enumerate(self.classes)} | dict(self.spelled)
        found, wrong = [], []
        for row, value in cells.items():
            place = PADDING if is_missing(value) else self._place(value, known)
            if place is None:
                wrong.append((row + 1, value))
            found.append(PADDING if place is None else place)
        if wrong:
            known_ones = first_few(self.spelled or self.classes, 8)
            unlabelled = all(value == PADDING for _, value in wrong)
            raise DataError(
                f"{where}: expected labels among {known_ones} in the column {self.column}, got "
                f"{first_few(dict.fromkeys(repr(value) for _, value in wrong))} in {len(wrong):,} of {len(found):,} "
                f"rows (row {wrong[0][0]:,} is the first). "
                + ("These labels are not published: set splits." if unlabelled else "Correct them, or set classes.")
            )
        return found

    def _place(self, value: Any, known: Mapping[str, int]) -> int | None:
        if isinstance(value, bool):
            return known.get(str(value), known.get(str(value).lower(), int(value) if len(self.classes) == 2 else None))
        text = spelled_label(value)
        if text in known:
            return known[text]
        position = int(text) if text.isdecimal() and not self.spelled else len(self.classes)
        return position if position < len(self.classes) else None


@dataclass(frozen=True)
class Rows:
    """N rows of a split, as far as no network is needed.

    Attributes:
        texts: N texts, or pairs of them.
        labels: N classes or numbers, 0 where there is neither; -1 of an unlabelled row.
        targets: N texts that are to follow, if there are any.
        answers: N lists of texts to choose from, if there are any.
        names: N names of the rows.
    """

    texts: Sequence[Any]
    labels: Sequence[float]
    targets: Sequence[str] | None
    answers: Sequence[Sequence[str]] | None
    names: Sequence[str]


def kept(
    table: Table,
    fields: Sequence[str],
    required: Sequence[str],
    above: Mapping[str, float],
    skip: bool,
    filled: Callable[[int], bool],
) -> list[int]:
    """Which rows of a table are used.

    Args:
        table: of which.
        fields: columns that make the text: no cell may be None or NaN, though one of several may be an empty text.
        required: other columns, none of whose cells may be empty.
        above: column -> what its cells have to be greater than.
        skip: whether incomplete rows are left out, and counted, rather than refused.
        filled: whether a row's text is one.

    Raises:
        ConfigurationError: ``above`` names a column which there is not, or one without numbers.
        DataError: a row is incomplete, or none is left.
    """
    rows = list(range(len(table)))
    for name, least in above.items():
        if name not in table.columns:
            raise ConfigurationError(
                f"above: expected columns of {table.where} ({', '.join(table.columns)}), got {name!r}. Correct it."
            )
        try:
            rows = [row for row in rows if float(table.columns[name][row]) > least]
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"above: expected numbers in the column {name} of {table.where}, got others."
            ) from error
    checks = [(name, table.columns[name], _is_none) for name in fields]
    checks += [(name, table.columns[name], is_missing) for name in required]
    empty = {row: name for row in rows for name, cells, missing in checks if missing(cells[row])}
    blank = {row: "the text" for row in rows if row not in empty and not filled(row)}
    incomplete = empty | blank
    if incomplete and not skip:
        places = first_few(f"{row + 1:,}" for row in sorted(incomplete))
        raise DataError(
            f"{table.where}: expected a text and a label in every row, got none in {len(incomplete):,} of "
            f"{len(rows):,} (rows {places}; {first_few(dict.fromkeys(incomplete.values()))}). Fill them in, or set "
            "skip_incomplete."
        )
    if incomplete:
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(f"{table.where}: left out {len(incomplete):,} of {len(rows):,} rows without a text or a label.")
        rows = [row for row in rows if row not in incomplete]
    if not rows:
        raise DataError(f"{table.where}: expected rows of texts, got none that is left. Change above.")
    return rows


def _is_none(value: Any) -> bool:
    return is_missing(value) and not isinstance(value, str)


def identity(table: Table, columns: Sequence[str], row: int) -> str:
    """What tells the text of a row from others: its cells, whatever the prompt makes of them."""
    return "\x1f".join(shown(table.columns[name][row]).strip() for name in columns)
