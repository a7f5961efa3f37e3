"""How the fine-tuning settings of the embedded suite were chosen: on validation data alone.

For every candidate (steps, peak learning rate) all eight tasks are fine-tuned with one seed; measured on the validation
split are the individual accuracies, the length of the task vectors, the plain average and task arithmetic over a grid.
The test split is never read.

    python benchmarks/choose_fine_tuning.py --candidates 60:2e-4 120:2e-4
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import lightning as L

from lit_merge.callbacks import ExtractTaskVector
from lit_merge.data import EMBEDDED_TASKS, MultiTaskDataModule, TaskDataModule
from lit_merge.evaluation.search import CoefficientSearch, quiet, search_coefficient, silent_trainer
from lit_merge.files.text import write_text
from lit_merge.modules import FineTuneModule, MultiTaskModule
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import task_arithmetic, weight_average
from lit_merge.vectors import TaskVectors

GRID = [0.0, 0.125, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5]


def fine_tune(task: str, steps: int, learning_rate: float, seed: int, folder: Path) -> tuple[dict, ExtractTaskVector]:
    """Fine-tune one task; returns what was measured and the callback that holds the vector."""
    with quiet():
        L.seed_everything(seed, workers=True, verbose=False)
        callback = ExtractTaskVector(f"{task}.safetensors")
        module, data = FineTuneModule(learning_rate=learning_rate), TaskDataModule(task, seed=seed)
        trainer = silent_trainer(default_root_dir=folder, max_steps=steps, limit_val_batches=0, callbacks=[callback])
        started = time.perf_counter()
        trainer.fit(module, data)
        seconds = time.perf_counter() - started
        evaluator = silent_trainer()
        evaluator.validate(module, data, verbose=False)
    metadata = callback.vector.metadata
    return {
        "validation_accuracy": round(float(evaluator.callback_metrics["val/accuracy"]), 4),
        "relative_norm": float(metadata["relative_norm"]),
        "seconds": round(seconds, 1),
    }, callback


def main() -> None:
    """Measure every candidate and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", nargs="+", default=["120:2e-4"], help="steps:learning_rate")
    parser.add_argument("--tasks", nargs="+", default=list(EMBEDDED_TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fine_tuning_choice.json"))
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["candidates"] if options.output.exists() else []
    for candidate in options.candidates:
        steps, learning_rate = int(candidate.split(":")[0]), float(candidate.split(":")[1])
        folder = Path("runs/choose") / candidate.replace(":", "-")
        measured = {task: fine_tune(task, steps, learning_rate, options.seed, folder) for task in options.tasks}
        vectors = TaskVectors([callback.vector for _, callback in measured.values()])
        data = MultiTaskDataModule(tasks=options.tasks)
        found = search_coefficient(vectors, task_arithmetic(), CoefficientSearch(GRID), data=data)
        module, trainer = MultiTaskModule(), silent_trainer()
        with quiet():
            module.load_task_vector(weight_average()(vectors).single())
            trainer.validate(module, data, verbose=False)
        row = {
            "steps": steps,
            "learning_rate": learning_rate,
            "seed": options.seed,
            "tasks": {task: row for task, (row, _) in measured.items()},
            "individual": round(sum(row["validation_accuracy"] for row, _ in measured.values()) / len(measured), 4),
            "zero_shot": round(found.absolute[0], 4),
            "weight_average": round(float(trainer.callback_metrics["val/accuracy"]), 4),
            "task_arithmetic": {str(value): round(found.absolute[i], 4) for i, value in enumerate(found.values)},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        result = {"split": "val", "candidates": rows, "versions": versions(), "hardware": hardware()}
        write_text(options.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
