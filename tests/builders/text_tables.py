"""Tokenizers that know the words of a test, and tables of texts in every format."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tokenization(kind: str, words: str, max_length: int = 32, max_target_length: int = 16, **settings: Any) -> Any:
    """One number a word, from 4 on, in the order given; 0 padding, 1 begin, 2 end, 3 unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from lit_merge.models.language import Tokenization

    numbers = {word: number for number, word in enumerate([*SPECIAL, *dict.fromkeys(words.split())])}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = {"encoder": "<s> $A </s>", "encoder_decoder": "$A </s>", "causal": "<s> $A"}[kind]
    pair = {"encoder": "<s> $A </s> $B </s>", "encoder_decoder": "$A </s> $B </s>", "causal": "<s> $A $B"}[kind]
    made.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    start = {"start_id": 0} if kind == "encoder_decoder" else {}
    return Tokenization(fast, kind, max_length, max_target_length, **start, **settings)


def character_tokenizer() -> Any:
    """One number a character: the tab is 13."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {name: place for place, name in enumerate(SPECIAL)}
    numbers = {**special, **{chr(place): place + 4 for place in range(9, 127)}}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def characters(kind: str, max_length: int = 4000) -> Any:
    """The tokenization of :func:`character_tokenizer`."""
    from lit_merge.models.language import Tokenization

    start = {"start_id": 0} if kind == "encoder_decoder" else {}
    return Tokenization(character_tokenizer(), kind, max_length, 200, **start)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as the format that the path's ending says; a missing ending is what ``save_to_disk`` leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(list(rows)).save_to_disk(str(path))
    return str(path)
