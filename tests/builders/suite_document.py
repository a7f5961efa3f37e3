"""The results.json of a suite of two tasks and up to three seeds."""

from __future__ import annotations

TASKS = ["digits", "signs"]


TASK_ARITHMETIC = {"0": (0.80, 0.60), "1": (0.70, 0.66), "2": (0.84, 0.63)}


INDIVIDUAL = {"0": (0.96, 0.75), "1": (0.98, 0.80), "2": (1.00, 0.70)}


ZERO_SHOT = (0.60, 0.30)


def document(seeds: int = 3) -> dict:
    def seed(name: str) -> dict:
        return {
            "individual": dict(zip(TASKS, INDIVIDUAL[name], strict=True)),
            "task_vectors": {
                task: {"norm": 1.2 + 0.1 * int(name), "relative_norm": 0.024, "steps": 110} for task in TASKS
            },
            "cosine_similarity": [[1.0, 0.1], [0.1, 1.0]],
            "merged": {
                "weight_average": {
                    "transform": "chain(Mean())",
                    "coefficient": None,
                    "accuracy": {"digits": 0.7, "signs": 0.5},
                    "search": None,
                },
                "task_arithmetic": {
                    "transform": "chain(Sum(), Scale(0.3))",
                    "coefficient": 0.3,
                    "accuracy": dict(zip(TASKS, TASK_ARITHMETIC[name], strict=True)),
                    "search": {"values": [0.0, 0.3, 1.0], "normalised": [0.6, 0.8, 0.4], "absolute": [0.5, 0.7, 0.3]},
                },
            },
        }

    return {
        "schema": 1,
        "name": "embedded",
        "model": {"name": "lit-tiny", "fingerprint": "0123", "parameters": 2734848},
        "tasks": TASKS,
        "classes": {"digits": 10, "signs": 12},
        "evaluated_on": "test",
        "coefficients_chosen_on": "val",
        "versions": {"lit_merge": "0.1.0", "torch": "2.8.0"},
        "hardware": {"processor": "any", "cores": 2, "accelerator": None},
        "zero_shot": dict(zip(TASKS, ZERO_SHOT, strict=True)),
        "seeds": {name: seed(name) for name in list(INDIVIDUAL)[:seeds]},
    }
