"""What the suites of benchmarks/all.py have left, in two kinds of committed files, and the claims judged by it.

``<instrument>.json``: settings, learning rates, accuracies, chosen coefficients with their curves, cosines and τJp.
``<instrument>-<regime>.safetensors``: which test examples every model got right, a bit each: ``zero_shot`` and, by
seed, ``0/individual`` and ``0/<recipe>``, the examples of all tasks one after the other. Every verdict follows from
these.

A claim (benchmarks/claims) names two methods, ``regime/recipe``, and what of them is compared:

- ``accuracy``: of one model on all tasks;
- ``normalised``: relative to the individual models; of every example its influence on the ratio of the two means, so
  that the mean is the normalised accuracy and the variance that of the ratio (delta method);
- ``own`` and ``others``, of ``regime/name_*``, one model per task: its accuracy on its own task (target), and on the
  others (control), of every example the mean over the models of other tasks; ``own_normalised`` as above;
- ``unseen``, of ``regime/name_without_*``: on the tasks that a model was merged without;
- ``cosine``: the absolute cosines of the task vectors, by pair; ``tau_jp``: the logarithms of the mean norms of τJp, by
  vector and other task; ``depth``: how much larger the learned coefficients of a task are in the second half of the
  blocks than in the first; ``spearman``: of entropy and loss at the end of learning, by task.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from suites import ROOT, Regime, settings_digest
from verdicts import judge

from lit_merge.files.text import write_text
from lit_merge.report.coefficient_depth import depth_means
from lit_merge.report.hits import load_hits, save_hits
from lit_merge.vectors import Coefficients

__all__ = ["CLAIMS", "COLLECTED", "NOT_MEASURED", "Stored", "claims", "collect", "judged", "written"]

COLLECTED = ROOT / "benchmarks/results/claims"
CLAIMS = ROOT / "benchmarks/claims"
NOT_MEASURED = "not measured"
ZERO_SHOT, INDIVIDUAL, JOINT = "zero_shot", "individual", "joint"


class NotMeasuredError(Exception):
    """A method that no suite has been run with."""


def claims() -> list[dict[str, Any]]:
    """All claims, each with its paper.

    Raises:
        ValueError: one has no quotation, place or method.
    """
    found = []
    for path in sorted(CLAIMS.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for one in content["claims"]:
            lacking = [key for key in ("claim", "quote", "where") if not str(one.get(key) or "").strip()]
            lacking += [] if one.get("first") or one.get("second") else ["method"]
            if lacking:
                raise ValueError(f"{path.name}: expected every claim with a {lacking[0]}, got one without: {one}")
            defaults = {"margin": 0.0, "measure": "accuracy", "first": None, "second": None}
            found.append({**defaults, **one, "source": content["paper"]})
    return found


def collect(
    instrument: str,
    folders: Mapping[Regime, Sequence[Path]],
    rates: Mapping[str, Any],
    to: Path,
    widened: bool = False,
) -> str:
    """Put the hits and numbers of finished suites into ``to``.

    What is there of other regimes stays, and of other seeds of the same regime, if it had the same settings.

    Args:
        instrument: whose suites.
        folders: regime -> the outputs of its suites, one or several seeds each; unfinished ones are left out.
        rates: regime -> its learning rate and what was tried.
        to: the folder.
        widened: whether products of bfloat16 were computed in float32 (benchmarks/widened.py).

    Returns:
        What was found, in a line.
    """
    to.mkdir(parents=True, exist_ok=True)
    path = to / f"{instrument}.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    _say_machines(known)
    complete = {
        regime: [one for one in suites if (one / "results.json").exists()] for regime, suites in folders.items()
    }
    for regime, suites in complete.items():
        if not suites:
            continue
        results = [json.loads((suite / "results.json").read_text(encoding="utf-8")) for suite in suites]
        same = {key: results[0][key] for key in ("model", "tasks", "classes", "versions", "hardware", "zero_shot")}
        hits = _hits(suites[0] / "zero-shot", same["tasks"])
        same["examples"] = {task: len(one) for task, one in hits.items()}
        packed = {ZERO_SHOT: _joined(hits, same["tasks"])}
        seeds: dict[str, Any] = {}
        for suite, one in zip(suites, results, strict=True):
            packed |= _packed(suite, one)
            machine = {"processor": one["hardware"]["processor"], "widened": widened}
            for seed, found in one["seeds"].items():
                here = suite / f"seed-{seed}"
                seeds[seed] = {"machine": machine, **_numbers(found, here), **_tau_jp(here, same["tasks"])}
        known |= {"instrument": instrument, **same}
        known.setdefault("rates", {})[regime.rate_of] = rates.get(regime.rate_of)
        new = {"digest": _digest(suites[0], regime), "settings": results[0]["settings"]}
        new |= {"seconds": sum(_seconds(suite) for suite in suites), "seeds": seeds}
        file = to / f"{instrument}-{regime.name}.safetensors"
        before = known.setdefault("regimes", {}).get(regime.name)
        if before and before["digest"] == new["digest"]:
            new, packed = _with_earlier(before, load_hits(file), new, packed)
        save_hits(file, packed)
        known["regimes"][regime.name] = new
    if known:
        known["claims"] = []
        write_text(path, written(known))
        known["claims"] = judged(Stored(instrument, to))
        write_text(path, written(known))
    missing = [one.name for regime, suites in folders.items() for one in suites if one not in complete[regime]]
    return f"{instrument}: {sum(map(len, complete.values()))} suites collected, {len(missing)} not finished"


def _say_machines(known: dict[str, Any]) -> None:
    """What was collected before seeds said what they ran on ran on the machine of the whole file."""
    for regime in known.get("regimes", {}).values():
        for seed, found in {} if "script" in regime else regime["seeds"].items():
            machine = {"processor": known["hardware"]["processor"], "widened": False}
            regime["seeds"][seed] = {"machine": found.get("machine", machine), **found}


def _with_earlier(
    before: Mapping[str, Any], stored: Mapping[str, Tensor], new: dict[str, Any], packed: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A regime with the seeds that were collected before, of the same settings, and are not among the new ones."""
    kept = {seed: found for seed, found in before["seeds"].items() if seed not in new["seeds"]}
    seeds = dict(sorted({**kept, **new["seeds"]}.items(), key=lambda one: int(one[0])))
    share = len(kept) / len(before["seeds"])
    hits = {key: one for key, one in stored.items() if key == ZERO_SHOT or key.partition("/")[0] in kept}
    return {**new, "seconds": round(new["seconds"] + share * before["seconds"], 1), "seeds": seeds}, {**packed, **hits}


def _packed(suite: Path, results: Mapping[str, Any]) -> dict[str, Tensor]:
    tasks, packed = results["tasks"], {}
    for seed, found in results["seeds"].items():
        here = suite / f"seed-{seed}"
        own: dict[str, Tensor] = {}
        for task in tasks:
            own |= load_hits(here / "individual" / task / "test_hits.safetensors")
        packed[f"{seed}/{INDIVIDUAL}"] = _joined(own, tasks)
        if JOINT in found.get("references", {}):
            packed[f"{seed}/{JOINT}"] = _joined(_hits(here / "joint/test", tasks), tasks)
        for name in found["merged"]:
            packed[f"{seed}/{name}"] = _joined(_hits(here / "test" / name, tasks), tasks)
    return packed


def _hits(folder: Path, tasks: Sequence[str]) -> dict[str, Tensor]:
    found = load_hits(folder / "test_hits.safetensors")
    return {task: found[task] for task in tasks}


def _joined(hits: Mapping[str, Tensor], tasks: Sequence[str]) -> Tensor:
    return torch.cat([hits[task] for task in tasks])


def _digest(suite: Path, regime: Regime) -> str:
    """Of the configuration that the suite was run with, which lies beside it; of another suite, of its own."""
    config = suite.with_suffix(".yaml")
    if config.exists():
        return regime.digest
    return settings_digest(yaml.safe_load((suite / "suite.yaml").read_text(encoding="utf-8")))


def _seconds(suite: Path) -> float:
    path = suite.with_suffix(".seconds")
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


def _numbers(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of one seed: accuracies, coefficients and curves, cosines, sizes of the vectors."""
    merged = {}
    for name, one in found["merged"].items():
        curve = one.get("search")
        merged[name] = {
            "accuracy": {task: round(value, 5) for task, value in one["accuracy"].items()},
            "coefficient": one.get("coefficient"),
            **({"values": curve["values"]} if curve else {}),
            **({"normalised": [round(value, 4) for value in curve["normalised"]]} if curve else {}),
            **_learned(folder / "merge" / name),
        }
    kept = {
        key: found[key] for key in ("individual", "references", "cosine_similarity", "task_vectors") if key in found
    }
    return {**kept, "merged": merged}


def _learned(folder: Path) -> dict[str, Any]:
    """Of learned coefficients: every task's means by depth, and how entropy and loss went together."""
    found: dict[str, Any] = {}
    if (path := folder / "coefficients.safetensors").exists():
        coefficients = Coefficients.load(path)
        means = depth_means(coefficients)
        found["coefficients"] = {
            "tasks": list(coefficients.tasks),
            "means": [round(value, 4) for value in coefficients.values.mean(dim=1).tolist()],
            "blocks": means.blocks if means else 0,
            "places": list(means.places) if means else [],
            "by_depth": [[round(value, 4) for value in row] for row in means.values.tolist()] if means else [],
        }
    if (path := folder / "spearman.json").exists():
        found["spearman"] = json.loads(path.read_text(encoding="utf-8"))["measured"]
    return found


def _tau_jp(folder: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """Vector -> other task -> mean norm of τJp, where the tests of ``alone_*`` have measured it."""
    found: dict[str, dict[str, float]] = {}
    for task in tasks:
        path = folder / f"test/alone_{task}/test_metrics.json"
        measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        norms = {other: measured.get(f"test/{other}/tau_jp") for other in tasks if other != task}
        if all(value is not None for value in norms.values()):
            found[task] = {other: round(float(value), 6) for other, value in norms.items() if value is not None}
    return {"tau_jp": found} if len(found) == len(tasks) else {}


def written(known: Mapping[str, Any]) -> str:
    """JSON with a line for every regime and seed, and for every claim."""
    lines = []
    for key, value in known.items():
        if key == "claims":
            rows = ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in value)
            lines.append(f' "claims": [\n{rows}\n ]' if rows else ' "claims": []')
        elif key == "regimes":
            regimes = []
            for name, one in value.items():
                seeds = ",\n".join(f"    {json.dumps(seed)}: {json.dumps(row)}" for seed, row in one["seeds"].items())
                rest = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in one.items() if k != "seeds")
                regimes.append(f'  {json.dumps(name)}: {{\n{rest},\n   "seeds": {{\n{seeds}\n   }}\n  }}')
            lines.append(' "regimes": {\n' + ",\n".join(regimes) + "\n }")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


@dataclass
class Stored:
    """What is known of one instrument.

    Args:
        instrument: its name.
        folder: where its files are.
    """

    instrument: str
    folder: Path = COLLECTED

    def __post_init__(self) -> None:
        self._read: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """The JSON."""
        found: dict[str, Any] = json.loads((self.folder / f"{self.instrument}.json").read_text(encoding="utf-8"))
        return found

    @property
    def tasks(self) -> list[str]:
        """In order."""
        return list(self.numbers["tasks"])

    def regime(self, name: str) -> dict[str, Any]:
        """Its part of the JSON.

        Raises:
            NotMeasuredError: it has none.
        """
        if name not in self.numbers["regimes"]:
            raise NotMeasuredError(name)
        found: dict[str, Any] = self.numbers["regimes"][name]
        return found

    def seeds(self, regime: str) -> list[str]:
        """Fine-tuning seeds of a regime."""
        return list(self.regime(regime)["seeds"])

    def hits(self, regime: str, method: str, seed: str) -> dict[str, Tensor]:
        """Task -> float64 ``[N]``, 1 where a model was right.

        Raises:
            NotMeasuredError: there is no such method.
            FileFormatError: the file is damaged.
        """
        self.regime(regime)
        if regime not in self._read:
            self._read[regime] = load_hits(self.folder / f"{self.instrument}-{regime}.safetensors")
        key = method if method == ZERO_SHOT else f"{seed}/{method}"
        if key not in self._read[regime]:
            raise NotMeasuredError(f"{regime}/{method}")
        parts = self._read[regime][key].split(list(self.numbers["examples"].values()))
        return {task: one.double() for task, one in zip(self.numbers["examples"], parts, strict=True)}

    def measured(self, reference: str, measure: str, seed: str) -> dict[str, Tensor]:
        """What a claim compares: task (or kind of pair) -> float64 ``[N]``.

        Raises:
            NotMeasuredError: there is no such method.
        """
        regime, _, method = reference.partition("/")
        if measure == "cosine":
            return {"pairs": self._cosines(regime, seed)}
        if measure == "tau_jp":
            return {"pairs": self._tau_jp(regime, seed)}
        if measure in ("depth", "spearman"):
            return {"tasks": self._of_learning(regime, method, measure, seed)}
        if measure in ("own", "own_normalised"):
            found = {task: self._of_task(regime, method, task, seed)[task] for task in self.tasks}
        elif measure == "others":
            found = {task: self._control(regime, method, task, seed) for task in self.tasks}
        elif measure == "unseen":
            found = self._unseen(regime, method, seed)
        else:
            found = self.hits(regime, method, seed)
        if not measure.endswith("normalised"):
            return found
        individual = self.hits(regime, INDIVIDUAL, seed)
        return {task: _ratio(one, individual[task]) for task, one in found.items()}

    def _of_task(self, regime: str, method: str, task: str, seed: str) -> dict[str, Tensor]:
        return self.hits(regime, method.replace("*", task), seed)

    def _control(self, regime: str, method: str, task: str, seed: str) -> Tensor:
        """Of every example of a task, the mean over the models of the others."""
        others = [other for other in self.tasks if other != task]
        return torch.stack([self._of_task(regime, method, other, seed)[task] for other in others]).mean(0)

    def _unseen(self, regime: str, method: str, seed: str) -> dict[str, Tensor]:
        """Of every model whose name says which tasks it was merged without, the hits on these."""
        found: dict[str, Tensor] = {}
        for name in self.regime(regime)["seeds"][seed]["merged"]:
            start, _, left = name.partition(method.removesuffix("*"))
            if not start and left:
                hits = self.hits(regime, name, seed)
                found |= {task: hits[task] for task in self.tasks if f"_{task}_" in f"_{left}_"}
        if not found:
            raise NotMeasuredError(f"{regime}/{method}")
        return found

    def _cosines(self, regime: str, seed: str) -> Tensor:
        found = self.regime(regime)["seeds"][seed].get("cosine_similarity")
        if found is None:
            raise NotMeasuredError(f"{regime}: cosines")
        rows = torch.tensor(found, dtype=torch.float64)
        above = torch.ones_like(rows, dtype=torch.bool).triu(1)
        return rows[above].abs()

    def _tau_jp(self, regime: str, seed: str) -> Tensor:
        found = self.regime(regime)["seeds"][seed].get("tau_jp")
        if not found:
            raise NotMeasuredError(f"{regime}: τJp")
        return torch.tensor([value for row in found.values() for value in row.values()], dtype=torch.float64).log()

    def _of_learning(self, regime: str, method: str, measure: str, seed: str) -> Tensor:
        """One number per task."""
        merged = self.regime(regime)["seeds"][seed]["merged"].get(method, {})
        if measure == "spearman" and merged.get("spearman"):
            return torch.tensor([merged["spearman"][-1]["tasks"][task] for task in self.tasks], dtype=torch.float64)
        found = merged.get("coefficients", {})
        if measure == "depth" and found.get("by_depth"):
            values, places = torch.tensor(found["by_depth"], dtype=torch.float64), torch.tensor(found["places"])
            half = found["blocks"] / 2
            second, first = (places >= half) & (places < found["blocks"]), (places >= 0) & (places < half)
            return values[:, second].mean(1) - values[:, first].mean(1)
        raise NotMeasuredError(f"{regime}/{method}: {measure}")


def _ratio(hits: Tensor, individual: Tensor) -> Tensor:
    """Values whose mean is the ratio of the two means, and whose spread is that of its linearisation."""
    below = individual.mean()
    ratio = hits.mean() / below
    return ratio + (hits - ratio * individual) / below


def judged(stored: Stored, registered: Iterable[Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Every claim by the one rule, from the stored hits.

    Args:
        stored: of one instrument.
        registered: the claims; all of benchmarks/claims by default.
    """
    rows = []
    for claim in claims() if registered is None else registered:
        row: dict[str, Any] = {key: claim[key] for key in ("claim", "source", "first", "second", "margin", "measure")}
        try:
            found = _judged(stored, claim)
        except NotMeasuredError:
            rows.append({**row, "verdict": NOT_MEASURED})
            continue
        rows.append({**row, **found})
    return rows


def _judged(stored: Stored, claim: Mapping[str, Any]) -> dict[str, Any]:
    measure, references = claim["measure"], [claim["first"], claim["second"]]
    regimes = [one.partition("/")[0] for one in references if one is not None]
    seeds = [seed for seed in stored.seeds(regimes[0]) if all(seed in stored.seeds(one) for one in regimes)]
    if not seeds:
        raise NotMeasuredError(str(references))
    sides = [None if one is None else [stored.measured(one, measure, seed) for seed in seeds] for one in references]
    zero = [{key: torch.zeros_like(one) for key, one in found.items()} for found in sides[0] or sides[1] or []]
    found = judge(sides[0] or zero, sides[1] or zero, claim["margin"] / 100)
    return {
        **{"effect": round(100 * found.effect, 3), "error": round(100 * found.error, 3)},
        "interval": [round(100 * found.low, 3), round(100 * found.high, 3)],
        "by_seed": [round(100 * one, 3) for one in found.by_seed],
        "verdict": found.verdict,
    }
