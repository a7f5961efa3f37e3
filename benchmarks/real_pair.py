"""A published sentence encoder, somebody's published fine-tune of it, and a vector of one's own, merged into a folder.

    lit-merge data prepare text8 sre_minilm
    lit-merge fit … (any task of text8; the suite's vectors will do)
    python benchmarks/real_pair.py --own runs/text_full/seed-0/fit/bbc_news/task_vector.safetensors

The merged folders are opened by transformers and by sentence-transformers. In-domain accuracy of the published one
(site reliability engineering) is retrieval on twelve pairs of paraphrases written here: the fraction of incidents whose
paraphrase is the nearest of all. That of the own vector, and general accuracy, are the class-name heads' on test texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between
from text_zero_shot import Encoder

from lit_merge.commands.merge import merge
from lit_merge.data.packaged.registry import PACKAGED, PACKAGED_TASKS
from lit_merge.files.text import write_text
from lit_merge.report.environment import hardware, versions

ROOT = Path(__file__).parents[1]
LONGEST, MOST = 64, 500
BEGIN, END = "<!-- real pair: written by benchmarks/real_pair.py -->", "<!-- end of real pair -->"
PAIRS = (
    ("disk is full on the primary database", "no space left on the main db volume"),
    ("pods keep restarting after the deploy", "containers crash-loop since the new release"),
    ("requests to checkout time out", "the payment page answers too slowly"),
    ("certificate expired on the load balancer", "TLS cert at the edge is out of date"),
    ("memory leak in the worker process", "RSS of the job runner grows without bound"),
    ("dns lookups fail inside the cluster", "name resolution is broken between services"),
    ("replication lag on the read replica", "the follower database is minutes behind"),
    ("error rate of the api above threshold", "too many 5xx responses from the gateway"),
    ("queue backlog is growing", "consumers cannot keep up with the messages"),
    ("node not ready in the cluster", "a kubernetes worker has gone offline"),
    ("cpu throttling on the frontend", "web servers hit their processor limits"),
    ("rollback of the last release", "the previous version was deployed again"),
)
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "task arithmetic, 0.5": ("task_arithmetic", {"coefficient": 0.5}),
    "ties": ("ties", {"density": 0.2}),
    "lines": ("lines", {"alpha": 0.5, "beta": 0.5}),
}


def measured(folder: Path, root: Path) -> dict[str, Any]:
    """Retrieval on the pairs, and accuracy of the class-name heads."""
    encoder = Encoder(folder, LONGEST)
    first, second = (encoder([pair[side] for pair in PAIRS]) for side in (0, 1))
    cosines = first @ second.T
    own = torch.arange(len(PAIRS))
    others = cosines[~torch.eye(len(PAIRS), dtype=torch.bool)]
    accuracy = {}
    for name in ("bbc_news", "newsgroups", "reuters", "plot_or_review", "wordnet_nouns"):
        task = PACKAGED_TASKS[name]
        with (task.folder(root) / "test.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:MOST]
        heads = [encoder([text.format(one) for text in task.templates]).mean(0) for one in task.classes]
        predicted = (encoder([row["text"] for row in rows]) @ F.normalize(torch.stack(heads), dim=-1).T).argmax(-1)
        labels = torch.tensor([list(task.labels).index(row["label"]) for row in rows])
        accuracy[name] = round(100 * (predicted == labels).double().mean().item(), 1)
    return {
        "retrieval": round(100 * (cosines.argmax(1) == own).double().mean().item(), 1),
        "cosine_of_pairs": round(cosines.diagonal().mean().item(), 3),
        "cosine_of_others": round(others.mean().item(), 3),
        "accuracy": accuracy,
    }


def table(content: dict[str, Any]) -> str:
    """What docs/downloaded.md shows."""
    found = content["found"]
    tasks = list(found["base"]["accuracy"])
    lines = [
        f"| model | retrieval | cosine of pairs, others | {' | '.join(tasks)} | mean |",
        "| :-- | --: | --: |" + " --: |" * (len(tasks) + 1),
    ]
    for name, one in found.items():
        values = list(one["accuracy"].values())
        cells = " | ".join(f"{value:.1f}" for value in [*values, sum(values) / len(values)])
        cosines = f"{one['cosine_of_pairs']:.2f}, {one['cosine_of_others']:.2f}"
        lines.append(f"| {name} | {one['retrieval']:.1f} | {cosines} | {cells} |")
    return "\n".join(lines)


def opened_by_sentence_transformers(folder: Path) -> float:
    """Largest difference of its embeddings from those of transformers."""
    from sentence_transformers import SentenceTransformer

    texts = [pair[0] for pair in PAIRS]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(
        texts, convert_to_tensor=True, normalize_embeddings=True
    )
    return float((theirs - Encoder(folder, LONGEST)(texts)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--own", type=Path, required=True, help="a task vector of this base")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/real_pair.json")
    options = parser.parse_args()
    base, tuned = (PACKAGED[name].folder(options.root) for name in ("minilm", "sre_minilm"))
    found = {"base": measured(base, options.root), "published fine-tune": measured(tuned, options.root)}
    said: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (recipe, settings) in RECIPES.items():
            output = Path(folder) / recipe
            result = merge(
                [str(tuned), str(options.own)],
                str(output),
                recipe=recipe,
                settings=settings,
                base=str(base),
                progress=False,
            )
            found[name] = measured(output, options.root)
            found[name]["sentence_transformers_differs_by"] = opened_by_sentence_transformers(output)
            said[name] = list(result.plan.notes)
            print(name, found[name], flush=True)
    content = {"own": options.own.parent.name, "texts": MOST, "found": found, "said": said, "versions": versions()}
    write_text(options.output, json.dumps({**content, "hardware": hardware()}, indent=1) + "\n")
    place_between(ROOT / "docs/downloaded.md", BEGIN, END, table(content))


if __name__ == "__main__":
    main()
