"""Fine-tuning regimes side by side on the embedded suite: how their task vectors merge, and what they cost other tasks.

``choose``: every regime has its own learning rate and number of steps, chosen on validation images of three tasks: the
shortest and then slowest setting with which the individual models reach a common mean accuracy, so that regimes are
compared at about the same accuracy and no vector is longer than it needs to be.

``fit``: all eight tasks, three seeds; two fits run side by side, one thread each.

``measure``: individual accuracy, task arithmetic at coefficient 1.0 and at the coefficient that validation images
choose, normalised accuracy, the mean norm of τJp on 64 unlabelled test images of each other task; for the regimes that
are about forgetting, the accuracy on the own task (target) and the mean over the other seven (control, on the first 256
test images of each). Evaluations are in the fits' precision, the search is in float32.

``place``: writes the tables of docs/regimes.md. Goes on where it stopped: what is in runs/regimes or in the JSON is not
done again.

    python benchmarks/regimes.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

from lit_merge import TaskVector, TaskVectors
from lit_merge.callbacks import ExtractTaskVector
from lit_merge.data import EMBEDDED_TASKS, MultiTaskDataModule, TaskDataModule
from lit_merge.evaluation.search import (
    CoefficientSearch,
    normalised_accuracy,
    quiet,
    search_coefficient,
    silent_trainer,
)
from lit_merge.files.text import write_text
from lit_merge.models import Attention, ExpLR, LastBlocks, LinLR, LoRA
from lit_merge.modules import FineTuneModule, MultiTaskModule, TauJpPenalty
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import task_arithmetic

TASKS = list(EMBEDDED_TASKS)
START, END = "<!-- regimes: written by benchmarks/regimes.py -->", "<!-- end of regimes -->"
PRECISION = "bf16-mixed"
LINEAR: dict[str, Any] = {"linearized": True}
MERGED: dict[str, dict[str, Any]] = {
    "full": {},
    "attention_1": {"trainable": Attention(1)},
    "attention_2": {"trainable": Attention(2)},
    "attention_3": {"trainable": Attention(3)},
    "attention_4": {"trainable": Attention(4)},
    "linearized": LINEAR,
    "cyclic": {**LINEAR, "penalty": TauJpPenalty("cyclic")},
    "strict": {**LINEAR, "penalty": TauJpPenalty("strict")},
}
CONTROLLED: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoRA(16)},
    "lin_lr": {"rates": LinLR()},
    "exp_lr": {"rates": ExpLR()},
    "half_ft": {"trainable": LastBlocks(fraction=0.5)},
    "last_ft": {"trainable": LastBlocks(count=1, behind=False)},
}
REGIMES = {**MERGED, **CONTROLLED}
CHOICE_TASKS = ["letters", "textures", "vehicles"]
RATES = {  # candidates of the peak learning rate; regimes that are not named take over another's choice
    "full": [2e-4, 4e-4, 8e-4],
    "attention_1": [4e-4, 8e-4, 1.6e-3],
    "attention_3": [2e-4, 4e-4, 8e-4],
    "linearized": [2e-4, 4e-4, 8e-4],
    "lora": [2e-3, 4e-3, 8e-3],
    "last_ft": [4e-4, 8e-4, 1.6e-3],
}
LONGER = {"linearized": [(120, 4e-4)]}  # tried because none of the others reached the common accuracy
SAME_AS = {
    "attention_2": "attention_1",
    "attention_4": "attention_3",
    "cyclic": "linearized",
    "strict": "linearized",
    "lin_lr": "full",
    "exp_lr": "full",
    "half_ft": "full",
}
GRID = [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0]
STEPS = [30, 60]
TARGET = 0.89  # mean validation accuracy of the individual models of the three tasks
CLAIMS = [  # what a paper orders: claim, source, and the difference that should be positive
    (
        "Linearised models merge better than full ones, relative to their own accuracy",
        "Ortiz-Jimenez et al. 2023",
        ("linearized", "tuned", "normalised"),
        ("full", "tuned", "normalised"),
    ),
    (
        "Linearised fine-tuning merges better than post-hoc linearisation",
        "Ortiz-Jimenez et al. 2023",
        ("linearized", "tuned", "absolute"),
        ("post_hoc", "tuned", "absolute"),
    ),
    (
        "Attention-only (1) merges better than full",
        "Jin et al. 2024",
        ("attention_1", "tuned", "absolute"),
        ("full", "tuned", "absolute"),
    ),
    (
        "… relative to its own accuracy",
        "Jin et al. 2024",
        ("attention_1", "tuned", "normalised"),
        ("full", "tuned", "normalised"),
    ),
    (
        "Without biases merges better than with them: paradigm 1 over 2",
        "Jin et al. 2024",
        ("attention_1", "tuned", "absolute"),
        ("attention_2", "tuned", "absolute"),
    ),
    (
        "… paradigm 4 over 3, with biases",
        "Jin et al. 2024",
        ("attention_4", "tuned", "absolute"),
        ("attention_3", "tuned", "absolute"),
    ),
    (
        "Attention alone merges better than with the feed-forward layers: paradigm 1 over 3",
        "Jin et al. 2024",
        ("attention_1", "tuned", "absolute"),
        ("attention_3", "tuned", "absolute"),
    ),
    (
        "The cyclic penalty helps at coefficient 1",
        "Yoshida et al. 2025",
        ("cyclic", "at_one", "absolute"),
        ("linearized", "at_one", "absolute"),
    ),
    (
        "The strict penalty helps more than the cyclic one at coefficient 1",
        "Yoshida et al. 2025",
        ("strict", "at_one", "absolute"),
        ("cyclic", "at_one", "absolute"),
    ),
    (
        "Cyclic at coefficient 1 beats linearised at its best coefficient",
        "Yoshida et al. 2025",
        ("cyclic", "at_one", "absolute"),
        ("linearized", "tuned", "absolute"),
    ),
    (
        "The cyclic penalty lowers τJp on other tasks",
        "Yoshida et al. 2025",
        ("linearized", "tau_jp"),
        ("cyclic", "tau_jp"),
    ),
    ("The strict penalty lowers it further", "Yoshida et al. 2025", ("cyclic", "tau_jp"), ("strict", "tau_jp")),
    (
        "LinLR forgets less than full fine-tuning (control)",
        "Wang et al. 2025",
        ("lin_lr", "control"),
        ("full", "control"),
    ),
    ("ExpLR forgets less", "Wang et al. 2025", ("exp_lr", "control"), ("full", "control")),
    ("HalfFT forgets less", "Wang et al. 2025", ("half_ft", "control"), ("full", "control")),
    ("LastFT forgets less", "Wang et al. 2025", ("last_ft", "control"), ("full", "control")),
    ("LastFT learns the task less well (target)", "Wang et al. 2025", ("full", "target"), ("last_ft", "target")),
]


def fit(regime: str, task: str, seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
    """Fine-tune one task and keep its vector; measured on validation and, at the end of the run only, on test."""
    folder = Path("runs/regimes") / regime / f"{steps}-{learning_rate:g}" / f"seed-{seed}"
    record = folder / f"{task}.json"
    if record.exists():
        return json.loads(record.read_text())
    with quiet():
        L.seed_everything(seed, workers=True, verbose=False)
        module = FineTuneModule(learning_rate=learning_rate, **REGIMES[regime])
        data, callback = TaskDataModule(task, seed=seed), ExtractTaskVector(f"{task}.safetensors")
        trainer = silent_trainer(
            default_root_dir=folder,
            max_steps=steps,
            precision=PRECISION,
            limit_val_batches=0,
            callbacks=[callback],
        )
        started = time.perf_counter()
        trainer.fit(module, data)
        seconds = time.perf_counter() - started
        evaluator = silent_trainer()
        evaluator.validate(module, data, verbose=False)
    row = {
        "regime": regime,
        "task": task,
        "seed": seed,
        "steps": steps,
        "learning_rate": learning_rate,
        "validation_accuracy": round(float(evaluator.callback_metrics["val/accuracy"]), 4),
        "relative_norm": float(TaskVector.load(folder / f"{task}.safetensors").metadata["relative_norm"]),
        "seconds": round(seconds, 1),
    }
    write_text(record, json.dumps(row) + "\n")
    return row


def vectors(regime: str, seed: int, choice: dict[str, Any]) -> list[TaskVector]:
    """The task vectors of a regime, in the order of the tasks."""
    folder = Path("runs/regimes") / regime / f"{choice['steps']}-{choice['learning_rate']:g}" / f"seed-{seed}"
    return [TaskVector.load(folder / f"{task}.safetensors") for task in TASKS]


def evaluate(
    vector: Any, tasks: list[str], linearized: bool, tau_jp: bool = False, images: int | None = None
) -> dict[str, float]:
    """Test metrics of one vector on some tasks, on all or the first of their images."""
    module = MultiTaskModule(linearized=linearized, tau_jp=tau_jp)
    data = MultiTaskDataModule(tasks=tasks, evaluation_batch_size=images or 256)
    with quiet():
        module.load_task_vector(vector)
        trainer = silent_trainer(precision=PRECISION, limit_test_batches=1 if images else 1.0)
        trainer.test(module, data, verbose=False)
    return {name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items()}


def measure(name: str, seed: int, choices: dict[str, Any]) -> dict[str, Any]:
    """Everything that the table says of one regime and seed."""
    regime = "full" if name == "post_hoc" else name
    linearized = name == "post_hoc" or bool(REGIMES[regime].get("linearized"))
    stack = vectors(regime, seed, choices[regime])
    row: dict[str, Any] = {"regime": name, "seed": seed}
    if name in CONTROLLED or name == "full":
        others = [
            evaluate(vector, [task for task in TASKS if task != vector.task], linearized, images=256)
            for vector in stack
        ]
        row["control"] = statistics.mean(tested["accuracy"] for tested in others)
    individual = {v.task: evaluate(v, [v.task], linearized)[f"{v.task}/accuracy"] for v in stack}
    row["individual"], row["target"] = individual, statistics.mean(individual.values())
    row["relative_norm"] = statistics.mean(float(vector.metadata["relative_norm"]) for vector in stack)
    if name in CONTROLLED:
        return row
    together = TaskVectors(stack)
    cosines = [one.cosine_similarity(other) for one in stack for other in stack if one is not other]
    row["cosine"] = statistics.mean(cosines)
    found = search_coefficient(together, task_arithmetic(), CoefficientSearch(GRID), linearized=linearized)
    row["search"] = {"values": found.values, "normalised": found.normalised, "absolute": found.absolute}
    for label, coefficient in (("at_one", 1.0), ("tuned", found.best)):
        merged = evaluate(task_arithmetic(coefficient=coefficient)(together).single(), TASKS, linearized)
        accuracy = {task: merged[f"{task}/accuracy"] for task in TASKS}
        row[label] = {
            "coefficient": coefficient,
            "accuracy": accuracy,
            "absolute": statistics.mean(accuracy.values()),
            "normalised": normalised_accuracy(accuracy, individual),
        }
    norms = []
    for vector in stack:
        others = [task for task in TASKS if task != vector.task]
        measured = evaluate(vector, others, linearized, tau_jp=True, images=64)
        norms += [measured[f"{task}/tau_jp"] for task in others]
    row["tau_jp"] = statistics.mean(norms)
    return row


def _worker(job: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    function, *arguments = job
    return function(*arguments)


def choose(pool: Any, result: dict[str, Any], save: Any) -> None:
    """Learning rate and steps by mean validation accuracy of the individual models of three tasks, seed 0."""
    for regime, rates in RATES.items():
        candidates = [*((max(STEPS), rate) for rate in rates), (min(STEPS), rates[1]), *LONGER.get(regime, [])]
        jobs = [(fit, regime, task, 0, *candidate) for candidate in candidates for task in CHOICE_TASKS]
        rows = pool.map(_worker, jobs, chunksize=1)
        tried = []
        for steps, rate in candidates:
            own = [row["validation_accuracy"] for row in rows if (row["steps"], row["learning_rate"]) == (steps, rate)]
            tried.append({"steps": steps, "learning_rate": rate, "validation_accuracy": statistics.mean(own)})
        reached = [row for row in tried if row["validation_accuracy"] >= TARGET]
        best = (
            min(reached, key=lambda row: (row["steps"], row["learning_rate"]))
            if reached
            else max(tried, key=lambda row: row["validation_accuracy"])
        )
        result["choices"][regime] = {**best, "tried": tried}
        save()
    for regime, other in SAME_AS.items():
        result["choices"][regime] = {**result["choices"][other], "tried": f"as {other}"}
    save()


def _values(rows: list[dict[str, Any]], regime: str, *path: str) -> list[float]:
    found = []
    for row in sorted((row for row in rows if row["regime"] == regime), key=lambda row: row["seed"]):
        value: Any = row
        for part in path:
            value = value[part]
        found.append(value)
    return found


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every claim with the difference per seed; what follows from it docs/results.md says, by one rule."""
    judged = []
    for claim, source, more, less in CLAIMS:
        scale = 1 if more[-1] == "tau_jp" else 100
        pairs = zip(_values(rows, *more), _values(rows, *less), strict=True)
        differences = [round(scale * (one - other), 3) for one, other in pairs]
        judged.append({"claim": claim, "source": source, "differences": differences})
    return judged


def _shown(values: list[float], scale: float = 100, digits: int = 1) -> str:
    values = [scale * value for value in values]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def tables(result: dict[str, Any]) -> str:
    """The tables of docs/regimes.md."""
    rows, chosen = result["rows"], result["choices"]
    present = {row["regime"] for row in rows}
    lines = [
        "| regime | steps, rate | individual | α = 1 | normalised | tuned (α) | normalised | τJp | ‖τ‖/‖θ0‖ | cosine |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name in [*MERGED, "post_hoc"]:
        if name not in present:
            continue
        choice = chosen["full" if name == "post_hoc" else name]
        coefficients = sorted(set(_values(rows, name, "tuned", "coefficient")))
        cells = [
            name,
            f"{choice['steps']}, {choice['learning_rate']:g}",
            _shown(_values(rows, name, "target")),
            _shown(_values(rows, name, "at_one", "absolute")),
            _shown(_values(rows, name, "at_one", "normalised")),
            f"{_shown(_values(rows, name, 'tuned', 'absolute'))} ({', '.join(f'{value:g}' for value in coefficients)})",
            _shown(_values(rows, name, "tuned", "normalised")),
            _shown(_values(rows, name, "tau_jp"), 1, 2),
            _shown(_values(rows, name, "relative_norm"), 100, 2),
            _shown(_values(rows, name, "cosine"), 1, 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| regime | steps, rate | target | control |", "| :-- | :-- | --: | --: |"]
    for name in ["full", *CONTROLLED]:
        if name in present:
            choice = chosen[name]
            cells = [
                name,
                f"{choice['steps']}, {choice['learning_rate']:g}",
                _shown(_values(rows, name, "target")),
                _shown(_values(rows, name, "control")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| claim | source | difference per seed |", "| :-- | :-- | --: |"]
    for row in result["claims"]:
        differences = ", ".join(f"{value:+.2f}" for value in row["differences"])
        lines.append(f"| {row['claim']} | {row['source']} | {differences} |")
    seeds = sorted({row["seed"] for row in rows})
    lines += [
        "",
        f"Accuracies on test and ‖τ‖/‖θ0‖ in percent, {len(seeds)} fine-tuning seeds (± their standard deviation); "
        f"settings and α chosen on validation data; {result['precision']}, torch {result['versions']['torch']}. From "
        "`benchmarks/results/regimes.json`, written by `benchmarks/regimes.py`.",
    ]
    return "\n".join(lines)


def place(result: dict[str, Any]) -> None:
    """Put the tables into docs/regimes.md."""
    place_between(Path(__file__).parents[1] / "docs/regimes.md", START, END, tables(result))


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=["choose", "fit", "measure", "place"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/regimes.json"))
    options = parser.parse_args()
    result = {"choices": {}, "rows": [], "split_of_choices": "val", "precision": PRECISION}
    if options.output.exists():
        result |= json.loads(options.output.read_text())
    if options.stages != ["place"]:
        result |= {"versions": versions(), "hardware": hardware()}

    def save() -> None:
        write_text(options.output, json.dumps(result, indent=1) + "\n")

    if options.stages == ["place"]:
        place(result)
        return
    MultiTaskDataModule(tasks=TASKS).prepare_data()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        if "choose" in options.stages:
            choose(pool, result, save)
        settings = {
            name: (result["choices"][name]["steps"], result["choices"][name]["learning_rate"]) for name in REGIMES
        }
        for seed in options.seeds:
            if "fit" in options.stages:
                jobs = [(fit, name, task, seed, *settings[name]) for name in options.regimes for task in TASKS]
                for row in pool.imap_unordered(_worker, jobs, chunksize=1):
                    print(json.dumps(row), flush=True)
            if "measure" in options.stages:
                done = {(row["regime"], row["seed"]) for row in result["rows"]}
                names = [*options.regimes, *(["post_hoc"] if "full" in options.regimes else [])]
                jobs = [(measure, name, seed, result["choices"]) for name in names if (name, seed) not in done]
                for row in pool.imap_unordered(_worker, jobs, chunksize=1):
                    result["rows"].append(row)
                    print(json.dumps({key: row[key] for key in row if key != "search"}), flush=True)
                    save()
    if "place" in options.stages:
        result["claims"] = judge(result["rows"])
        save()
        place(result)


if __name__ == "__main__":
    main()
