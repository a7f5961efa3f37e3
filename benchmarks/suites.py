"""The suites of benchmarks/experiments.yaml: an instrument, a regime and a fine-tuning seed each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lit_merge.data import EMBEDDED_TASKS
from lit_merge.suite.settings import SuiteSettings, combine, task_names

__all__ = ["ROOT", "Regime", "every", "experiments", "instruments", "regimes", "settings_digest"]

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "benchmarks/experiments.yaml"
PREPARED = "data/"
"""Where the configurations expect prepared texts and networks; ``--data`` says where they are."""


@cache
def experiments() -> dict[str, Any]:
    """benchmarks/experiments.yaml."""
    found: dict[str, Any] = yaml.safe_load(EXPERIMENTS.read_text(encoding="utf-8"))
    return found


def instruments() -> list[str]:
    """The instruments' names."""
    return list(experiments()["instruments"])


def regimes(instrument: str) -> list[str]:
    """The regimes that an instrument names, or for which it has learning rates, its own or another regime's."""
    settings = experiments()["instruments"][instrument]
    if "recipes" in settings:
        return list(settings["recipes"])
    every = experiments()["regimes"].items()
    return [name for name, one in every if one.get("rate", name) in settings["rates"]]


@dataclass(frozen=True)
class Regime:
    """One regime on one instrument.

    Args:
        instrument: of experiments.yaml.
        name: of the regime.
    """

    instrument: str
    name: str

    @property
    def key(self) -> str:
        """``instrument/regime``."""
        return f"{self.instrument}/{self.name}"

    @property
    def of_instrument(self) -> dict[str, Any]:
        """The instrument's settings."""
        found: dict[str, Any] = experiments()["instruments"][self.instrument]
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """The regime's."""
        found: dict[str, Any] = experiments()["regimes"][self.name]
        return found

    @property
    def rate_of(self) -> str:
        """The regime whose learning rate is taken."""
        return str(self.settings.get("rate", self.name))

    @property
    def rates(self) -> list[float]:
        """The learning rates that are tried for it."""
        return list(map(float, self.of_instrument["rates"][self.rate_of]))

    @property
    def base(self) -> dict[str, Any]:
        """The instrument's own suite, without recipes."""
        found = combine(_loaded(ROOT / self.of_instrument["suite"]), self.of_instrument.get("changes", {}))
        for name, value in self.of_instrument.get("changes", {}).items():
            if value == {}:
                found.pop(name, None)
        return {key: value for key, value in found.items() if key not in ("recipes", "seeds", "output", "name")}

    @property
    def tasks(self) -> list[str]:
        """The instrument's tasks."""
        return list(self.base.get("tasks") or EMBEDDED_TASKS)

    def recipes(self) -> dict[str, Any]:
        """Name -> recipe, of the papers' configurations, with the instrument's tasks in place of the embedded ones."""
        found: dict[str, Any] = {}
        for entry in self.settings["papers"]:
            paper, chosen = next(iter(entry.items())) if isinstance(entry, Mapping) else (entry, None)
            every = _loaded(ROOT / f"configs/paper/{paper}.yaml")["recipes"]
            found |= {name: one for name, one in every.items() if _is_chosen(name, chosen)}
        found = _renamed(found, dict(zip(EMBEDDED_TASKS, self.tasks, strict=True)))
        named = self.of_instrument.get("recipes", {}).get(self.name)
        if named is None:
            return found
        return {
            name: combine(found[name], {"search": {"values": values}} if values else {})
            for name, values in named.items()
        }

    def fit(self, rate: float) -> dict[str, Any]:
        """The suite's ``fit``: the regime's file, what the instrument needs, and the learning rate."""
        base = self.base.get("fit", {})
        own = _loaded(ROOT / f"configs/finetune/{self.settings['fit']}.yaml")
        of_model = own["model"]["init_args"]
        if "trainable" in of_model or "lora" in of_model:  # chooses what trains by itself
            base = combine(base, {"model": {"init_args": {"trainable": None}}})
            base["model"]["init_args"].pop("trainable")
        own["data"]["init_args"].pop("task", None)
        steps = self.of_instrument.get("steps", {}).get(self.rate_of)
        chosen: dict[str, Any] = {"model": {"init_args": {"learning_rate": rate}}}
        chosen |= {"trainer": {"max_steps": steps}} if steps else {}
        return combine(own, base, self.settings.get("changes", {}), chosen)

    def suite(self, seeds: list[int], rate: float, data: str) -> dict[str, Any]:
        """The configuration of ``lit-merge suite``.

        Args:
            seeds: of fine-tuning.
            rate: the learning rate.
            data: the folder of prepared texts and networks.
        """
        fit = self.fit(rate)
        found = {**self.base, "name": self.key.replace("/", "_"), "seeds": seeds, "fit": fit, "recipes": self.recipes()}
        if self.settings.get("joint") and "joint_rate" in self.of_instrument:
            rate = float(self.of_instrument["joint_rate"])
            joint = _loaded(ROOT / "configs/paper/yang_2024_table1.yaml")["joint"]
            found["joint"] = combine(
                {"model": self.base.get("fit", {}).get("model", {})},
                joint,
                {"model": {"init_args": {"learning_rate": rate}}},
            )
        if self.settings.get("tau_jp") and any(name.startswith("alone_") for name in found["recipes"]):
            module = {"class_path": "lit_merge.modules.MultiTaskModule", "init_args": {"tau_jp": True}}
            found["test"] = combine(found.get("test", {}), {"model": module})
        if "linearized" in self.settings:
            found["linearized"] = self.settings["linearized"]
        if self.evaluated_linearized(fit):
            found["recipes"].pop("regmean", None)
        return _moved(found, data)

    def evaluated_linearized(self, fit: Mapping[str, Any]) -> bool:
        """Whether models are evaluated on the linearised network."""
        return bool(self.settings.get("linearized", fit["model"]["init_args"].get("linearized", False)))

    def plan(self, suite: Mapping[str, Any]) -> SuiteSettings:
        """What makes the configurations of a suite's stages of its own."""
        names = ("model", "pretrained", "tasks", "paths", "fit", "test", "data", "network", "sources")
        given = {"model": "lit-tiny", "pretrained": None, **{name: suite[name] for name in names if name in suite}}
        given["tasks"] = task_names(given.get("tasks"), given.get("paths"), given.get("sources"))
        plain = {"paths": {}, "test": {}, "data": {}, **given}
        return SuiteSettings(name=suite["name"], directory=Path(), seeds=suite["seeds"], recipes={}, **plain)

    def stages(self, suite: Mapping[str, Any]) -> int:
        """How many stages a suite has per seed, with the test of the pre-trained model."""
        collecting = sum("statistics" in one for one in suite["recipes"].values() if isinstance(one, Mapping))
        joint = 2 if "joint" in suite else 0
        factors = len(self.plan(suite).factors_of)
        return 1 + factors + 2 * len(self.tasks) + joint + 2 * len(suite["recipes"]) + collecting * len(self.tasks)

    @property
    def digest(self) -> str:
        """Of everything but the learning rate, the seeds and the folders: another one means another experiment."""
        return settings_digest(self.suite([], 0.0, PREPARED.rstrip("/")))


def settings_digest(suite: Mapping[str, Any]) -> str:
    """Of what a suite's configuration says of fine-tuning, tests and recipes: 16 hexadecimal digits.

    A network without dropout counts as one of which nothing is said: as long as networks trained in evaluation mode,
    none had any, and the same was measured.
    """
    counted = {key: value for key, value in suite.items() if key not in ("seeds", "output", "name")}
    if network := counted.get("network"):
        own = {name: value for name, value in network["init_args"].items() if (name, value) != ("dropout", 0.0)}
        counted["network"] = {**network, "init_args": own}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def _loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_as_json(path))
    return found


@cache
def _as_json(path: Path) -> str:
    return json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")))


def _is_chosen(name: str, chosen: list[str] | str | None) -> bool:
    if chosen is None:
        return True
    return name.startswith(chosen) if isinstance(chosen, str) else name in chosen


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """With a task's name, alone or at the end of a recipe's, in place of another's."""
    if isinstance(value, dict):
        return {_renamed(key, names): _renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, names) for inner in value]
    if not isinstance(value, str):
        return value
    for old, new in names.items():
        if value == old or value.endswith(f"_{old}"):
            return value.removesuffix(old) + new
    return value


def _moved(value: Any, data: str) -> Any:
    """With the folder of prepared texts where it is."""
    if isinstance(value, dict):
        return {key: _moved(inner, data) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, data) for inner in value]
    if isinstance(value, str) and value.startswith(PREPARED):
        return f"{data}/{value.removeprefix(PREPARED)}"
    return value


def every(chosen: list[str] | None = None, only: list[str] | None = None) -> Iterator[Regime]:
    """The regimes of all instruments, or of some."""
    for instrument in chosen or instruments():
        for name in regimes(instrument):
            if only is None or name in only:
                yield Regime(instrument, name)
