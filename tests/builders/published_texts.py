"""Tiny files of the published suites of texts, in the formats and with the columns that people have on the disk."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lit_merge.data.published.text_registry import TextEntry

_LISTS = {"qasc": 8, "quartz": 2}


def row_of(entry: TextEntry, split: str, number: int) -> dict[str, Any]:
    """A row as the Hub has it; words are different in every one, labels go through all classes."""
    task = entry.task
    classes = task.get("classes") or ()
    label_column = task.get("number_column") or task.get("label_column", "label")
    row: dict[str, Any] = {"idx": number}
    for column in entry.columns:
        row[column] = f"{column} {split} {number}."
    kind = entry.name.partition("-")[2]
    if kind in _LISTS:
        letters = list("ABCDEFGH")[: _LISTS[kind]]
        row["choices"] = {"text": [f"{letter} of {number}" for letter in letters], "label": letters}
    if kind == "quail":
        row["answers"] = [f"answer {place} of {number}" for place in range(4)]
    if kind == "ropes":
        row["answers"] = {"text": [f"answer of {number}"]}
    if kind == "quartz" and number % 2:
        row["question"] = f"Is it _____ in {split} {number}?"
    if kind == "civil_comments":
        row["toxicity"] = 0.9 if number % 2 else 0.1
    if kind == "wikitext103" and number % 3 == 0:
        row["text"] = ""
    if "number_column" in task or kind == "stsb":
        row["label"] = (number % 51) / 10
    elif classes and label_column is not None:
        cells = list(classes) if isinstance(classes, dict) or label_column == "answerKey" else range(len(classes))
        cell = cells[number % len(cells)]
        row[label_column] = (
            int(cell) if isinstance(cell, str) and cell.isdecimal() and "answer_" in label_column else cell
        )
        if kind == "snli" and number % 7 == 0:
            row["label"] = -1
    return row


def write_text_task(root: Path, entry: TextEntry, count: int = 40, layout: str = "hub") -> None:
    """Every stored split of a task: as ``hf download`` leaves it, ``save_to_disk``, or in the authors' files."""
    import pyarrow
    from pyarrow import parquet

    for split in entry.counts:
        rows = [row_of(entry, split, number) for number in range(count)]
        folder = root / entry.folder
        if layout == "authors":
            path = folder / entry.files[split]
            path.parent.mkdir(parents=True, exist_ok=True)
            names = {column: name for name, column in entry.renamed.items()}
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["InputStoryid", *names.values()])
                writer.writerows([row["idx"], *(row[column] for column in names)] for row in rows)
        elif layout == "saved":
            import datasets

            datasets.disable_progress_bars()
            datasets.Dataset.from_list(rows).save_to_disk(str(folder / (entry.hub_config or "") / split))
        else:
            below = folder / (entry.hub_config or "data")
            below = below / split if layout == "converted" else below
            below.mkdir(parents=True, exist_ok=True)
            name = "0000.parquet" if layout == "converted" else f"{split}-00000-of-00001.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), below / name)
