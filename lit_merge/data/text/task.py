"""A task from texts of any kind."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from lit_merge.data.batch import PADDING
from lit_merge.data.fractions import checked_fractions
from lit_merge.data.sources import Task, chosen_templates
from lit_merge.data.text.encoding import answer_tokens, checked_preprocessing, encoded, encoded_answers, packed
from lit_merge.data.text.examples import TextExamples, TextPreprocessing
from lit_merge.data.text.prompts import Prompt, is_missing
from lit_merge.data.text.rows import Labels, Rows, Wording, identity, kept, spelled_label
from lit_merge.data.text.splits import SPLITS, divided, part_of
from lit_merge.data.text.stores import STORED_NAMES, FileStore, FolderStore, HubStore, RowStore, Store
from lit_merge.data.text.tables import Table, read_table
from lit_merge.errors import ConfigurationError, DataError, first_few

__all__ = ["TextTask"]


class TextTask(Task):
    """Texts with their classes, targets or numbers; or texts alone, for language modelling.

    What a network is given depends on its kind. An encoder has the text and predicts its class. An encoder-decoder or a
    causal language model has the prompt, and predicts the target: the answer of the right class, or one of the row's
    own. In validation and test the answers are ranked instead, if there are classes (``answers_as``). Without classes
    and target, a causal language model predicts every next token.

    One table is divided: class by class, in the order of the SHA-256 of ``"seed/text"``, and equal texts go to the
    same split. With a table per split, ``val`` is taken from ``train`` in the same way where it is missing.

    Args:
        path: a file (.csv, .tsv, .jsonl, .json, .parquet); a folder with a file per split (train, val or validation,
            test); or a folder of the ``datasets`` library or of the Hub.
        files: instead, split -> file.
        hub: instead, a data set on the Hub, ``owner/name``; from its cache where there is no network. Needs
            ``datasets``.
        rows: instead, rows as mappings from column to cell; or split -> rows.
        config: the configuration of a data set of the Hub.
        splits: split -> stored split, or the arguments of a :class:`~lit_merge.data.text.splits.Part`.
        text_column: the column of the texts; or two, which make a pair.
        label_column: the column of the labels; None for none.
        number_column: instead, a column of numbers of at least 0, for a network that predicts one.
        classes: names in the order of the labels; or label as it is stored -> name. By default those that a file of the
            Hub names, or the labels of ``train``, sorted.
        prompt: the text instead of ``text_column``, with ``{column}`` for its fields; see
            :mod:`lit_merge.data.text.prompts`.
        answers: what stands for the classes in a target: one for each, or class -> answer; with fields, if they differ
            from row to row. By default the classes' names.
        target: what is to follow, a column or a text with fields, for tasks without classes.
        answers_as: whether a language model sees the right answer as its ``target``, or all of them to be ``ranked``;
            ``auto`` takes the target in training and ranks in validation and test.
        templates: texts with one ``{}`` for a class name, for the head of an encoder; ``"{}"`` by default.
        fractions: of train, val and test, where they are not divided beforehand.
        seed: of that division.
        encoding: of text files.
        skip_incomplete: whether rows without a text or label are left out, and counted, rather than refused.
        repeated: what is done with texts that are in two splits which were divided beforehand: ``refuse``, ``remove``
            (from train, and from val those in test), or ``keep``.
        above: column -> number that its cells have to exceed for a row to be used.
        pack: whether texts without target are put one after the other into blocks of the network's ``max_length``.
        length_groups: among how many batches of training those of similar length are put together; 0 for none.
        max_length: most tokens of a text; None for the network's, which it cannot exceed.

    Attributes:
        name: of the file, folder or data set.

    Raises:
        ConfigurationError: a setting contradicts another one, or is out of its range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        files: dict[str, str] | None = None,
        hub: str | None = None,
        rows: list[dict[str, Any]] | dict[str, list[dict[str, Any]]] | None = None,
        config: str | None = None,
        splits: dict[str, Any] | None = None,
        text_column: str | list[str] = "text",
        label_column: str | None = "label",
        number_column: str | None = None,
        classes: list[str] | dict[str, str] | None = None,
        prompt: str | None = None,
        answers: list[str] | dict[str, str] | None = None,
        target: str | None = None,
        answers_as: Literal["auto", "target", "ranked"] = "auto",
        templates: list[str] | str | None = None,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        encoding: str = "utf-8",
        skip_incomplete: bool = False,
        repeated: Literal["refuse", "remove", "keep"] = "refuse",
        above: dict[str, float] | None = None,
        pack: bool = False,
        length_groups: int = 0,
        max_length: int | None = None,
    ) -> None:
        given = {"path": path, "files": files, "hub": hub, "rows": rows}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ConfigurationError(
                f"path, files, hub and rows: expected exactly one of them, got {' and '.join(named) or 'none'}. Set "
                "path to a file of texts."
            )
        _check(answers_as=(answers_as, ("auto", "target", "ranked")), repeated=(repeated, ("refuse", "remove", "keep")))
        for name, value, least in (("length_groups", length_groups, 0), ("max_length", max_length, 1)):
            if value is not None and (type(value) is not int or value < least):
                raise ConfigurationError(f"{name}: expected an integer of at least {least}, got {value!r}.")
        self._store = _store_of(path, files, hub, rows, config, encoding)
        place = Path(str(path)).expanduser().resolve() if path is not None else Path(hub or "texts")
        self.name = place.stem
        self.templates = chosen_templates(templates, ("{}",))
        columns = (text_column,) if isinstance(text_column, str) else tuple(text_column)
        if prompt is None and len(columns) not in (1, 2):
            raise ConfigurationError(f"text_column: expected one or two columns, got {len(columns)}. Set prompt.")
        self._label_column = None if number_column is not None or target is not None else label_column
        self._number_column, self._given_classes, self._given_answers = number_column, classes, answers
        self.regression = number_column is not None
        self._wording = Wording(columns, None if prompt is None else Prompt(prompt), _target(target))
        self._splits = {split: part_of(setting, split) for split, setting in (splits or {}).items()}
        if surplus := sorted(set(self._splits) - set(SPLITS)):
            raise ConfigurationError(f"splits: expected those of {', '.join(SPLITS)}, got {first_few(surplus)}.")
        if answers is not None and self._label_column is None:
            raise ConfigurationError("answers: expected a label_column and no target beside them. Remove either.")
        if pack and (self._label_column or number_column or target):
            raise ConfigurationError(
                "pack: expected texts alone, got labels or targets. Set label_column to null, or remove pack."
            )
        self._answers_as, self._pack, self._length_groups = answers_as, pack, length_groups
        self._max_length = max_length
        self._fractions, self._seed, self._encoding = checked_fractions(fractions), seed, encoding
        self._skip, self._repeated, self._above = skip_incomplete, repeated, dict(above or {})
        self._read: dict[str, Rows | None] = {}
        self._tables: dict[str, Table | None] = {}
        self._tokens: dict[tuple[str, str], TextExamples] = {}

    @property
    def files(self) -> list[Path]:
        """The files or folders that hold the texts; empty of rows in memory, and of the Hub."""
        return self._store.files

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Class names, in label order; empty for a task without classes.

        Raises:
            DataError: they are to be found in ``train``, which is missing, or has one class only.
        """
        return () if self._labels is None else self._labels.classes

    def split(self, split: str, preprocessing: Any, augmentation_seed: int | None = None) -> TextExamples:
        """The texts of ``"train"``, ``"val"`` (perhaps none) or ``"test"`` as a network wants them.

        Raises:
            DataError: the texts are missing, damaged or incomplete, a label is no class, there is no such split, or the
                tokenizer does not know the words.
            ConfigurationError: the network is not one for such a task, or a setting does not fit the texts.
        """
        checked = checked_preprocessing(preprocessing, self.name, self._max_length)
        key = (split, repr(checked))
        if key not in self._tokens:
            rows = self._rows(split)
            if rows is None and split != "val":
                raise DataError(
                    f"{self.name}: expected the split {split} in {self._store.where}, got none. Add it, name it in "
                    "splits, or do not ask for it."
                )
            self._tokens[key] = self._examples(rows or _NONE, f"{self.name}/{split}", split, checked)
        return copy.copy(self._tokens[key])

    def examples_of(self, path: str | os.PathLike[str], preprocessing: Any) -> TextExamples:
        """The texts of a file as those of ``test``, with the label -1.

        Raises:
            DataError: the file is missing, damaged, or lacks a column.
        """
        table = read_table(Path(path).expanduser(), self._encoding)
        wording = self._whole_wording
        for prompt in wording.answers:
            prompt.check(table.columns, table.where)
        Wording(wording.columns, wording.prompt).check(table)
        chosen = kept(table, wording.read, (), {}, self._skip, lambda row: _filled(wording, table, row))
        texts = [wording.text(table.row(row)) for row in chosen]
        answers = [[answer(table.row(row)) for answer in wording.answers] for row in chosen] or None
        unknown = [""] * len(texts) if wording.target is not None else None
        names = [f"{Path(path).name}/{row + 1}" for row in chosen]
        found = Rows(texts, [PADDING] * len(texts), unknown, answers if wording.answers else None, names)
        checked = checked_preprocessing(preprocessing, self.name, self._max_length)
        return self._examples(found, str(path), "test", checked)

    @cached_property
    def _labels(self) -> Labels | None:
        column, given = self._label_column, self._given_classes
        if column is None:
            return None
        if given is not None:
            spelled = given if isinstance(given, Mapping) else {}
            names = tuple(dict.fromkeys(given.values())) if isinstance(given, Mapping) else tuple(given)
            places = {text: names.index(name) for label, name in spelled.items() for text in _spellings(label)}
            return _several(Labels(column, names, places), "classes")
        table = self._stored("train")
        if table is None:
            raise DataError(
                f"{self.name}: expected train in {self._store.where} to find the classes in, got none. Set classes."
            )
        if column not in table.columns:
            raise DataError(
                f"{table.where}: expected the column {column} of labels, got {', '.join(table.columns)}. Set "
                "label_column, or target, or label_column to null for texts alone."
            )
        if column in table.label_names:
            return Labels(column, table.label_names[column])
        found = {spelled_label(cell) for cell in table.columns[column] if not is_missing(cell)}
        numeric = all(re.fullmatch(r"-?[0-9]+", label) for label in found)
        names = tuple(sorted(found, key=lambda label: (int(label), label)) if numeric else sorted(found))
        return _several(Labels(column, names, {name: place for place, name in enumerate(names)}), table.where)

    @cached_property
    def _whole_wording(self) -> Wording:
        """With the answers."""
        wording, classes, given = self._wording, self.classes, self._given_answers
        if not classes:
            return wording
        chosen = list(classes) if given is None else given
        if isinstance(chosen, Mapping):
            wrong = [name for name in chosen if name not in classes]
            missing = [name for name in classes if name not in chosen]
            if wrong or missing:
                got = f"{wrong[0]!r}, which is none" if wrong else f"none for {missing[0]!r}"
                raise ConfigurationError(
                    f"answers: expected one of each class ({first_few(classes, 8)}), got {got}. Correct it."
                )
            chosen = [chosen[name] for name in classes]
        if len(chosen) != len(classes):
            raise ConfigurationError(
                f"answers: expected one for each of the {len(classes)} classes ({first_few(classes, 8)}), got "
                f"{len(chosen)}. Give as many."
            )
        prompts = tuple(Prompt(_escaped(text) if given is None else text, "answers") for text in chosen)
        return Wording(wording.columns, wording.prompt, wording.target, prompts)

    def _stored(self, split: str) -> Table | None:
        """The table of a split that was divided beforehand, or the one table that there is; None if there is none."""
        key = split if self._store.divided or self._splits else ""
        if key not in self._tables:
            self._tables[key] = self._find(split)
        return self._tables[key]

    def _find(self, split: str) -> Table | None:
        if not self._store.divided and not self._splits:
            return self._store.table("")
        part = self._splits.get(split)
        if part is not None:
            table = self._store.table(part.of)
            if table is None:
                raise DataError(f"{self._store.where}: expected the split {part.of}, got none. Correct splits.{split}.")
            rows = part.rows(len(table))
            return table if rows == list(range(len(table))) else table.take(rows)
        if self._splits:
            return None
        if isinstance(self._store, HubStore):
            return self._store.table({"val": "validation"}.get(split, split))
        tables = (self._store.table(name) for name in STORED_NAMES[split])
        return next((table for table in tables if table is not None), None)

    def _rows(self, split: str) -> Rows | None:
        if split not in self._read:
            if self._store.divided or self._splits:
                self._read.update(self._of_divided(split))
            else:
                whole = self._stored("")
                assert whole is not None
                chosen = self._kept(whole)
                self._read.update(self._parts(whole, chosen, self._fractions, SPLITS))
        return self._read[split]

    def _of_divided(self, split: str) -> dict[str, Rows | None]:
        """What is known of a split, and of what is read with it."""
        carved = split in ("train", "val") and self._carves
        table = self._stored("train" if carved else split)
        if table is None:
            return {split: None}
        chosen = self._without_repeated(table, self._kept(table), split)
        if not carved:
            return {split: self._of(table, chosen)}
        first, second, _ = self._fractions
        fractions = (first / (first + second), second / (first + second), 0.0)
        return self._parts(table, chosen, fractions, ("train", "val"))

    @cached_property
    def _carves(self) -> bool:
        """Whether validation texts are taken from those to train on."""
        return self._fractions[1] > 0 and not self._splits and self._stored("val") is None

    def _parts(
        self, table: Table, chosen: list[int], fractions: Sequence[float], splits: Sequence[str]
    ) -> dict[str, Rows | None]:
        columns = self._wording.read
        texts = [identity(table, columns, row) for row in chosen]
        column = table.columns[self._label_column] if self._label_column else None
        labels = ["" if column is None else spelled_label(column[row]) for row in chosen]
        _say_repeated(table.where, texts, labels)
        parts = divided(texts, labels, fractions, self._seed, table.where)
        found = {split: [chosen[place] for place in parts[split]] for split in splits}
        return {split: self._of(table, rows) if rows else None for split, rows in found.items()}

    def _kept(self, table: Table) -> list[int]:
        self._whole_wording.check(table)
        wanted = [name for name in (self._label_column, self._number_column) if name is not None]
        for name in wanted:
            if name not in table.columns:
                raise DataError(
                    f"{table.where}: expected the column {name}, got {', '.join(table.columns)}. Set label_column."
                )
        wording = self._wording
        wanted += list(wording.target.columns if wording.target is not None else ())
        return kept(table, wording.read, wanted, self._above, self._skip, lambda row: _filled(wording, table, row))

    def _without_repeated(self, table: Table, chosen: list[int], split: str) -> list[int]:
        """Without the texts that are in another split as well, as ``repeated`` says."""
        if self._repeated == "keep":
            return chosen
        columns = self._wording.read
        own = [identity(table, columns, row) for row in chosen]
        later = SPLITS[SPLITS.index(split) + 1 :]
        for other in later if self._repeated == "remove" else [one for one in SPLITS if one != split]:
            theirs = None if other == "val" and self._carves else self._stored(other)
            if theirs is None or (split == "val" and other == "train" and self._carves):
                continue
            known = {identity(theirs, columns, row) for row in range(len(theirs))}
            both = sum(text in known for text in own)
            if both and self._repeated == "refuse":
                raise DataError(
                    f"{self.name}: expected no text in two splits, got {both:,} of {len(own):,} of {split} in {other} "
                    "as well. Set repeated to remove or keep."
                )
            if both:
                from lightning.pytorch.utilities import rank_zero_warn

                rank_zero_warn(f"{self.name}: left out {both:,} of {len(own):,} texts of {split} that are in {other}.")
                left = [(row, text) for row, text in zip(chosen, own, strict=True) if text not in known]
                chosen, own = [row for row, _ in left], [text for _, text in left]
        return chosen

    def _of(self, table: Table, chosen: Sequence[int]) -> Rows:
        wording = self._whole_wording
        rows = [table.row(row) for row in chosen]
        names = [f"{Path(table.where).name}/{row + 1}" for row in chosen]
        labels: Sequence[float] = [0] * len(rows)
        if self._labels is not None:
            column = table.columns[self._labels.column]
            labels = self._labels.of({row: column[row] for row in chosen}, table.where)
        elif self._number_column is not None:
            labels = _numbers([row[self._number_column] for row in rows], self._number_column, table.where)
        answers = [[answer(row) for answer in wording.answers] for row in rows] if wording.answers else None
        targets = None if wording.target is None else [wording.target(row) for row in rows]
        return Rows([wording.text(row) for row in rows], labels, targets, answers, names)

    def _examples(self, rows: Rows, name: str, split: str, preprocessing: TextPreprocessing) -> TextExamples:
        kind = torch.float32 if self._number_column is not None else torch.int64
        labels = torch.tensor(rows.labels, dtype=kind)
        if preprocessing.kind != "encoder" and self._number_column is not None:
            raise ConfigurationError(
                f"{self.name}: expected an encoder for number_column, got a language model. Set target."
            )
        if preprocessing.kind == "encoder" and self._wording.target is not None:
            raise ConfigurationError(
                f"{self.name}: expected a language model for target, got an encoder. Set label_column."
            )
        if self._pack:
            blocks = packed(preprocessing, name, rows.texts) if rows.texts else []
            places = [f"{name}/{place}" for place in range(len(blocks))]
            known = torch.zeros(len(blocks), dtype=torch.int64)
            content = [" ".join(map(str, block.tolist())) for block in blocks]
            return TextExamples(blocks, known, places, preprocessing, content=content)
        written = (self._wording.target, self._label_column, self._number_column)
        if preprocessing.kind == "encoder_decoder" and written == (None, None, None):
            raise ConfigurationError(
                f"{self.name}: expected answers or a target, which an encoder-decoder writes, got texts alone. Set "
                "label_column or target, or use a causal network."
            )
        self._check_room(preprocessing)
        ranked = self._answers_as == "ranked" or (self._answers_as == "auto" and split != "train")
        targets, tokens, choices = rows.targets, None, None
        if preprocessing.kind == "encoder" or not rows.texts:
            texts = encoded(preprocessing, name, rows.texts)[0] if rows.texts else []
        elif rows.answers is not None and ranked:
            texts, choices = encoded_answers(preprocessing, name, rows.texts, rows.answers)
        else:
            if rows.answers is not None:
                answer_tokens(
                    preprocessing, name, rows.texts[:1], rows.answers[:1]
                )  # of all rows where they are ranked
                targets = [own[max(0, int(label))] for own, label in zip(rows.answers, rows.labels, strict=True)]
            unknown = targets is not None and not any(targets)
            texts, tokens = encoded(preprocessing, name, rows.texts, None if unknown else targets)
            if unknown:
                tokens = [texts[0][:0]] * len(texts)
        content = [repr((text, *(own or ()))) for text, own in zip(rows.texts, _told(rows, targets), strict=True)]
        return TextExamples(
            texts, labels, rows.names, preprocessing, tokens, choices, content, self._length_groups,
            rows.texts, targets or (), rows.answers or (),
        )  # fmt: skip

    def _check_room(self, preprocessing: TextPreprocessing) -> None:
        """Refuse a prompt whose own words fill the network's longest text."""
        prompt = self._wording.prompt
        if prompt is None or not prompt.constant.strip():
            return
        count = len(preprocessing.tokenizer([prompt.constant], verbose=False)["input_ids"][0])
        if count >= preprocessing.max_length:
            raise ConfigurationError(
                f"prompt: expected room for a row's fields within max_length {preprocessing.max_length:,} of the "
                f"network, got {count:,} tokens without them. Shorten it, or raise max_length."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: another process reads it itself."""
        return {**self.__dict__, "_read": {}, "_tables": {}, "_tokens": {}}


_NONE = Rows((), (), None, None, ())


def _store_of(path: Any, files: Any, hub: str | None, rows: Any, config: str | None, encoding: str) -> Store:
    if hub is not None:
        return HubStore(hub, config)
    if rows is not None:
        return RowStore(rows)
    if files is not None:
        return FileStore(files, encoding)
    place = Path(path).expanduser()
    return FolderStore(place, config, encoding) if place.is_dir() else FileStore(place, encoding)


def _check(**given: tuple[str, Sequence[str]]) -> None:
    for name, (value, known) in given.items():
        if value not in known:
            raise ConfigurationError(f"{name}: expected one of {', '.join(known)}, got {value!r}. Use one of them.")


def _target(target: str | None) -> Prompt | None:
    if target is None:
        return None
    return Prompt(target if "{" in target else f"{{{target}}}", "target")


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _filled(wording: Wording, table: Table, row: int) -> bool:
    return any(not is_missing(table.columns[name][row]) for name in wording.read)


def _spellings(label: Any) -> tuple[str, ...]:
    """How a key of ``classes`` may stand in a column: YAML reads ``true`` as a truth value."""
    return (str(label), str(label).lower()) if isinstance(label, bool) else (spelled_label(label),)


def _several(labels: Labels, where: str) -> Labels:
    names = labels.classes
    if len(names) < 2 or len(set(names)) < len(names):
        got = "a name twice" if len(set(names)) < len(names) else (f"{names[0]!r} alone" if names else "none")
        raise DataError(f"{where}: expected two or more different classes, got {got}. Check {labels.column}.")
    return labels


def _numbers(cells: Sequence[Any], column: str, where: str) -> list[float]:
    try:
        found = [float(cell) for cell in cells]
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: expected numbers in the column {column}, got others. Correct them.") from error
    if wrong := [number for number in found if not 0 <= number < float("inf")]:
        raise DataError(f"{where}: expected numbers of at least 0 in {column}, got {wrong[0]:g}. Shift them.")
    return found


def _say_repeated(where: str, texts: Sequence[str], labels: Sequence[str]) -> None:
    labels_of: dict[str, set[str]] = {}
    for text, label in zip(texts, labels, strict=True):
        labels_of.setdefault(text, set()).add(label)
    more = len(texts) - len(labels_of)
    if more:
        from lightning.pytorch.utilities import rank_zero_warn

        torn = sum(len(own) > 1 for own in labels_of.values())
        other = f"; {torn:,} texts have several labels" if torn else ""
        rank_zero_warn(
            f"{where}: {more:,} of {len(texts):,} rows repeat the text of another one, and go to the same split{other}."
        )


def _told(rows: Rows, targets: Sequence[str] | None) -> Sequence[Sequence[str]]:
    """What tells texts that are equal from each other."""
    if rows.answers is not None:
        return rows.answers
    return [(one,) for one in targets] if targets is not None else [()] * len(rows.texts)
