"""The tables of the pages in docs are what the committed JSON files say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "name", "source", "written"),
    [
        ("regimes", "regimes", "regimes", "tables"),
        ("regimes", "linearized", "linearized", "table"),
        ("recipes", "recipes", "recipes", "tables"),
        ("recipes", "merge", "merge", "table"),
        ("recipes", "merge_matrices", "merge_matrices", "table"),
        ("recipes", "decompositions", "decompositions", "table"),
        ("recipes", "parity", "parity_table", "table"),
        ("speed", "billions", "billions", "table"),
        ("adamerging", "adamerging", "adamerging_table", "table"),
        ("adamerging", "learned_merges", "learned_merges", "table"),
        ("checkpoints", "checkpoints", "checkpoints", "table"),
        ("checkpoints", "architectures", "architectures", "table"),
        ("downloaded", "real_pair", "real_pair", "table"),
        ("choosing", "text_suite", "choosing", "table"),
        ("language", "text_step", "text_step", "table"),
        ("language", "t5_large", "t5_large", "table"),
        ("language", "language_model", "language_model", "table"),
    ],
)
def test_the_page_says_what_was_measured(page: str, name: str, source: str, written: str) -> None:
    measured = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    assert getattr(script(source), written)(measured) in (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")


def test_methods_are_compared_as_far_as_they_were_measured() -> None:
    def seed(**methods: float) -> dict[str, object]:
        learned = {"learned_on": "train", "examples": {"a": 700, "b": 500}, "step": 1000}
        merged = {name: {"accuracy": {"a": one, "b": 0.5}} for name, one in methods.items()}
        merged |= {"expert": {**merged["expert"], "learned": learned}} if "expert" in merged else {}
        return {"individual": {"a": 0.9, "b": 0.7}, "merged": merged}

    seeds = {"0": seed(task_arithmetic=0.7, expert=0.9, tsv_m=0.8), "1": seed(task_arithmetic=0.7, expert=0.8)}
    found = script("choosing").table({"tasks": ["a", "b"], "seeds": seeds, "zero_shot": {"a": 0.5, "b": 0.1}})
    rows = {line.split(" | ")[1]: line.split(" | ")[3:] for line in found.splitlines() if line.startswith("| ")}
    assert rows["coefficients by `expert`"] == ["67.5 ± 3.5", "+7.5", "train, 1,200 inputs, 1,000 steps |"]
    assert rows["`task_arithmetic`"] == ["60.0 ± 0.0", "", " |"]
    assert rows["`tsv_m`"] == ["", "", " |"]
    assert "2 fine-tuning seeds ± their standard deviation; individual models 80.0 ± 0.0, pre-trained 30.0." in found


def test_the_page_that_chooses_knows_every_recipe_of_the_suite_by_its_name() -> None:
    suite = yaml.safe_load((ROOT / "configs/suite/text_full.yaml").read_text(encoding="utf-8"))
    known = {method.key for _, methods in script("choosing").GROUPS for method in methods}
    assert set(suite["recipes"]) <= known


def test_claims_are_judged_from_the_rows() -> None:
    measured = json.loads((ROOT / "benchmarks/results/regimes.json").read_text(encoding="utf-8"))
    assert script("regimes").judge(measured["rows"]) == measured["claims"]


def test_goals_are_judged_from_the_measurements() -> None:
    measured = json.loads((ROOT / "benchmarks/results/adamerging.json").read_text(encoding="utf-8"))
    assert script("adamerging_table").judge(measured) == measured["goals"]


def test_the_page_on_speed_says_what_was_measured() -> None:
    speed = script("speed")
    assert speed.table(speed.ratios(speed.RESULTS)) in (ROOT / "docs/speed.md").read_text(encoding="utf-8")


def test_a_ratio_that_is_worse_by_more_than_a_quarter_is_noticed(tmp_path: Path) -> None:
    speed = script("speed")
    committed = speed.ratios(speed.RESULTS)
    measured = json.loads((ROOT / "benchmarks/results/text_step.json").read_text(encoding="utf-8"))
    measured["bert"]["linearized"]["ratio_to_ordinary"] *= 1.2
    measured["gpt2"]["linearized"]["ratio_to_ordinary"] *= 1.3
    (tmp_path / "text_step.json").write_text(json.dumps(measured))
    (found,) = speed.slower(committed, speed.ratios(tmp_path))
    assert found.startswith("linearised step, gpt2")
    merge = json.loads((ROOT / "benchmarks/results/merge.json").read_text(encoding="utf-8"))
    for row in merge["rows"]:
        if (row["shapes"], row["method"], row["tool"]) == ("vit_b_32", "dare", "mergekit"):
            row["median"] /= 1.3  # the peer is faster: we have fallen behind
    (tmp_path / "text_step.json").unlink()
    (tmp_path / "merge.json").write_text(json.dumps(merge))
    (found,) = speed.slower(committed, speed.ratios(tmp_path))
    assert found.startswith("DARE, 8 × vit_b_32, against mergekit: ")
