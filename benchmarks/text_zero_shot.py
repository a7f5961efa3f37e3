"""What the zero-shot head of all-MiniLM-L6-v2 says on validation texts of the packaged tasks, before any training.

Class names and templates are chosen by these numbers, never by test texts. A task counts as informative if accuracy is
at least 1.5 times that of guessing, one in C classes.

    lit-merge data prepare text12 --root data
    python benchmarks/text_zero_shot.py --root data

``--pin`` writes counts and hashes of the splits into the registry instead, after a reader or a rule has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lit_merge.data.packaged.packages import bring
from lit_merge.data.packaged.preparation import built
from lit_merge.data.packaged.registry import PACKAGED, PACKAGED_TASKS, PackagedTexts
from lit_merge.files.text import write_text

ROOT = Path(__file__).parents[1]
INFORMATIVE = 1.5
LONGEST = 128


class Encoder:
    """Normalised mean-pooled features of a network in a folder, without padding's part in the mean."""

    def __init__(self, folder: Path, longest: int = LONGEST) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.longest = longest
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        features = torch.empty(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(texts), 32):
            places = order[start : start + 32]
            batch = self.tokenizer(
                [texts[index] for index in places],
                truncation=True,
                max_length=self.longest,
                padding=True,
                return_tensors="pt",
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            features[places] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return features


def measured(task: PackagedTexts, folder: Path, encoder: Encoder, most: int) -> dict[str, Any]:
    """Accuracy on the first validation texts, which are mixed."""
    with (folder / "val.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:most]
    labels = torch.tensor([list(task.labels).index(row["label"]) for row in rows])
    heads = [encoder([text.format(name) for text in task.templates]).mean(0) for name in task.classes]
    predicted = (encoder([row["text"] for row in rows]) @ F.normalize(torch.stack(heads), dim=-1).T).argmax(-1)
    accuracy = (predicted == labels).double().mean().item()
    majority = torch.bincount(labels).max().item() / len(labels)
    return {
        "classes": len(task.classes),
        "texts": len(rows),
        "accuracy": round(100 * accuracy, 1),
        "most_frequent_class": round(100 * majority, 1),
        "times_chance": round(accuracy * len(task.classes), 2),
        "informative": accuracy * len(task.classes) >= INFORMATIVE,
    }


def pin() -> None:
    """Write counts and hashes of every split into the registry's files."""
    for one in PACKAGED.values():
        if isinstance(one, PackagedTexts):
            contents = built(one, bring(one.package))
            path = ROOT / "lit_merge/data/packaged/data_sets" / f"{one.name}.json"
            facts = json.loads(path.read_text(encoding="utf-8"))
            splits = {name.removesuffix(".jsonl"): content for name, content in contents.items()}
            facts["counts"] = {split: content.count(b"\n") for split, content in splits.items()}
            facts["sha256"] = {split: hashlib.sha256(content).hexdigest() for split, content in splits.items()}
            write_text(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
            print(one.name, facts["counts"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--texts", type=int, default=500, help="validation texts per task at most")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/text_zero_shot.json")
    parser.add_argument("--pin", action="store_true")
    options = parser.parse_args()
    if options.pin:
        return pin()
    torch.set_num_threads(1)
    encoder = Encoder(PACKAGED["minilm"].folder(options.root))
    found = {}
    for name, task in PACKAGED_TASKS.items():
        found[name] = measured(task, task.folder(options.root), encoder, options.texts)
        print(f"{name:16}", found[name], flush=True)
    write_text(options.output, json.dumps({"split": "val", "longest": LONGEST, "tasks": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
