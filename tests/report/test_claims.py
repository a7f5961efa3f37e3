"""Claims are judged from collected hits: verdicts are computed again, damage and changed experiments are noticed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from builders.documents import ROOT

from lit_merge.errors import FileFormatError
from lit_merge.report.hits import save_hits
from lit_merge.vectors import Coefficients

SCRIPTS = ("collected", "suites", "verdicts", "claims_page", "results_page", "text_suite", "collect_learned_merges")
TASKS = ["a", "b"]
SIZES = {"a": 400, "b": 300}
COLLECTED = sorted(path.stem for path in (ROOT / "benchmarks/results/claims").glob("*.json"))


@pytest.fixture(scope="module")
def collected() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import collected

        yield collected
        for name in SCRIPTS:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a suite of two seeds leaves of its tests: recipes that are 10 points apart, and a model per task."""
    tmp_path, generator = tmp_path_factory.mktemp("suite"), torch.Generator().manual_seed(0)
    easy = {task: torch.rand(size, generator=generator) for task, size in SIZES.items()}
    levels = {"good": 0.8, "poor": 0.7, "alone_a": 0.6, "alone_b": 0.5}

    def write(folder: Path, level: float, tasks: list[str] = TASKS) -> dict[str, float]:
        folder.mkdir(parents=True)
        noise = {task: 0.02 * torch.randn(SIZES[task], generator=generator) for task in tasks}
        hits = {task: easy[task] + noise[task] < level for task in tasks}
        save_hits(folder / "test_hits.safetensors", hits)
        return {task: float(one.double().mean()) for task, one in hits.items()}

    zero, seeds = write(tmp_path / "zero-shot", 0.4), {}
    for seed in ("0", "1"):
        here = tmp_path / f"seed-{seed}"
        own = {task: write(here / "individual" / task, 0.9, [task])[task] for task in TASKS}
        merged: dict[str, Any] = {}
        for name, level in levels.items():
            curve = {"values": [0.1, 0.2, 0.3], "normalised": [0.5, 0.6, 0.7], "absolute": [0.5, 0.6, 0.7]}
            merged[name] = {"accuracy": write(here / "test" / name, level), "coefficient": 0.3, "search": curve}
        _learned(here / "merge/good")
        cosines = [[1.0, 0.02], [0.02, 1.0]]
        seeds[seed] = {"individual": own, "merged": merged, "cosine_similarity": cosines, "task_vectors": {}}
    described = {"name": "n", "fingerprint": "f", "parameters": 1}
    machine = {"processor": "p", "cores": 1, "accelerator": None}
    results = {"model": described, "tasks": TASKS, "classes": {"a": 2, "b": 2}, "versions": {"torch": "2"}}
    results |= {"hardware": machine, "settings": {}, "zero_shot": zero, "seeds": seeds}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"recipes": {"good": {}}}))
    return tmp_path


def _learned(folder: Path) -> None:
    """Coefficients 0.3 in the first of two blocks and 0.5 in the second, and a correlation."""
    folder.mkdir(parents=True)
    groups = ("blocks.0.w", "blocks.1.w", "head.w")
    values = torch.tensor([[0.3, 0.5, 9.0], [0.2, 0.4, 9.0]])
    Coefficients(values, ("a", "b"), groups, dict(zip(groups, groups, strict=True))).save(
        folder / "coefficients.safetensors"
    )
    measured = [{"step": 100, "spearman": 0.9, "tasks": {"a": 0.9, "b": 0.9}}]
    (folder / "spearman.json").write_text(json.dumps({"measured": measured}))


@pytest.fixture(scope="module")
def stored(collected: ModuleType, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("collected")
    said = collected.collect("embedded", {collected.Regime("embedded", "full"): [suite]}, {}, folder)
    assert said == "embedded: 1 suites collected, 0 not finished"
    return collected.Stored("embedded", folder)


def test_other_seeds_of_the_same_settings_are_put_together(collected: ModuleType, suite: Path, tmp_path: Path) -> None:
    import claims_page

    regime, folder, later = collected.Regime("embedded", "full"), tmp_path / "collected", tmp_path / "later"
    collected.collect("embedded", {regime: [suite]}, {}, folder)
    shutil.copytree(suite, later)
    results = json.loads((later / "results.json").read_text())
    results["seeds"] = {"2": results["seeds"]["1"]}
    results["hardware"]["processor"] = "q"
    (later / "seed-1").rename(later / "seed-2")
    (later / "results.json").write_text(json.dumps(results))
    collected.collect("embedded", {regime: [later]}, {}, folder, widened=True)
    both = collected.Stored("embedded", folder)
    assert both.seeds("full") == ["0", "1", "2"]
    (row,) = collected.judged(both, [claim(first="full/good", second="full/poor")])
    assert len(row["by_seed"]) == 3
    assert row["by_seed"][1] == row["by_seed"][2]
    assert claims_page.machines(both.numbers) == (
        "p and q (products of bfloat16 in float32, rounded: `benchmarks/widened.py`)"
    )
    (later / "suite.yaml").write_text(yaml.safe_dump({"recipes": {"other": {}}}))
    collected.collect("embedded", {regime: [later]}, {}, folder)
    assert collected.Stored("embedded", folder).seeds("full") == ["2"]  # other settings: another experiment


def claim(**given: Any) -> dict[str, Any]:
    return {"claim": "c", "source": "s", "first": None, "second": None, "margin": 0.0, "measure": "accuracy", **given}


@pytest.mark.parametrize(
    ("given", "effect", "verdict"),
    [
        ({"first": "full/good", "second": "full/poor"}, 10, "holds"),
        ({"first": "full/poor", "second": "full/good"}, -10, "does not hold"),
        ({"first": "full/good", "second": "full/poor", "margin": 20.0}, 10, "does not hold"),
        ({"first": "full/poor", "second": "full/good", "margin": -20.0}, -10, "holds"),
        ({"first": "full/individual", "second": "full/zero_shot"}, 50, "holds"),
        ({"first": "full/good", "second": "full/poor", "measure": "normalised"}, 100 * (0.8 - 0.7) / 0.9, "holds"),
        ({"first": "full/good", "measure": "normalised", "margin": 99.0}, 100 * 0.8 / 0.9, "does not hold"),
        ({"first": "full/alone_*", "second": "full/zero_shot", "measure": "own"}, 15, "holds"),
        ({"first": "full/alone_*", "second": "full/zero_shot", "measure": "others"}, 15, "holds"),
        ({"second": "full/cosine", "measure": "cosine", "margin": -10.0}, -2, "holds"),
        ({"first": "full/good", "measure": "depth"}, 20, "holds"),
        ({"first": "full/good", "measure": "spearman", "margin": 80.0}, 90, "holds"),
        ({"first": "full/good", "second": "elsewhere/good"}, None, "not measured"),
        ({"first": "full/good", "second": "full/absent"}, None, "not measured"),
        ({"first": "full/tau_jp", "second": "full/tau_jp", "measure": "tau_jp"}, None, "not measured"),
    ],
)
def test_what_is_compared(collected: ModuleType, stored: Any, given: dict[str, Any], effect: Any, verdict: str) -> None:
    (row,) = collected.judged(stored, [claim(**given)])
    assert row["verdict"] == verdict
    if effect is None:
        assert "effect" not in row
    else:
        assert row["effect"] == pytest.approx(effect, abs=4)
        assert len(row["by_seed"]) == 2


def test_target_and_control_are_of_the_right_models(collected: ModuleType, stored: Any) -> None:
    own, others = (stored.measured("full/alone_*", measure, "0") for measure in ("own", "others"))
    hits = {name: stored.hits("full", name, "0") for name in ("alone_a", "alone_b")}
    assert torch.equal(own["a"], hits["alone_a"]["a"])
    assert torch.equal(others["a"], hits["alone_b"]["a"])
    assert torch.equal(others["b"], hits["alone_a"]["b"])


def test_normalised_accuracy_has_the_mean_and_spread_of_a_ratio(collected: ModuleType, stored: Any) -> None:
    merged, own = (stored.hits("full", name, "0")["a"] for name in ("good", "individual"))
    found = stored.measured("full/good", "normalised", "0")["a"]
    assert found.mean().item() == pytest.approx((merged.mean() / own.mean()).item())
    drawn = torch.randint(len(own), (2000, len(own)), generator=torch.Generator().manual_seed(1))
    spread = (merged[drawn].mean(1) / own[drawn].mean(1)).std().item()
    assert found.std().item() / len(own) ** 0.5 == pytest.approx(spread, rel=0.1)


def test_a_corrupted_file_is_noticed(collected: ModuleType, stored: Any, tmp_path: Path) -> None:
    shutil.copytree(stored.folder, tmp_path / "copy")
    path = tmp_path / "copy/embedded-full.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 16
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="has changed since it was written"):
        collected.judged(
            collected.Stored("embedded", tmp_path / "copy"), [claim(first="full/good", second="full/poor")]
        )


@pytest.mark.parametrize(
    ("field", "said"), [("quote", "a quote"), ("where", "a where"), ("first", "a method"), ("claim", "a claim")]
)
def test_a_claim_without_a_quotation_is_refused(
    collected: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, said: str
) -> None:
    whole = {"claim": "c", "quote": "q", "where": "table 1", "first": "full/ties"}
    content = {"paper": "p", "claims": [{**whole, field: ""}]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(collected, "CLAIMS", tmp_path)
    with pytest.raises(ValueError, match=rf"p\.yaml: expected every claim with {said}, got one without"):
        collected.claims()


def test_every_claim_is_about_something_that_is_run(collected: ModuleType) -> None:
    import collect_learned_merges
    from suites import Regime, instruments, regimes

    known: dict[str, set[str]] = {}
    for name in regimes("embedded"):
        recipes = Regime("embedded", name).recipes()
        joint = {"joint"} if Regime("embedded", name).settings.get("joint") else set()
        script = collect_learned_merges.METHODS.get(name, {})
        known[name] = {*recipes, *script, "zero_shot", "individual", "cosine", *joint}
    assert instruments()
    texts = [one["claim"] for one in collected.claims()]
    assert len(set(texts)) == len(texts)
    for one in collected.claims():
        for reference in filter(None, (one["first"], one["second"])):
            regime, _, method = reference.partition("/")
            start = method.removesuffix("*")
            assert any(name == method or (start != method and name.startswith(start)) for name in known[regime]), one


def test_another_grid_is_another_experiment(collected: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import suites

    regime = collected.Regime("embedded", "full")
    before = regime.digest
    recipes = regime.recipes()
    recipes["ties"]["search"]["values"].append(9.0)
    monkeypatch.setattr(suites.Regime, "recipes", lambda self: recipes)
    assert regime.digest != before


def test_a_suite_has_the_instruments_tasks_and_no_embedded_ones(collected: ModuleType) -> None:
    suite = collected.Regime("text", "full_single").suite([0], 1e-4, "/elsewhere")
    assert suite["network"]["init_args"]["path"] == "/elsewhere/models/minilm"
    assert suite["recipes"]["forget_mail"]["search"]["target"] == ["mail"]
    assert "digits" not in json.dumps(suite)


def test_a_page_is_made_of_it(collected: ModuleType, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import claims_page

    monkeypatch.setattr(
        collected, "claims", lambda: [claim(first="full/good", second="full/poor", quote="q", where="w")]
    )
    monkeypatch.setattr(claims_page, "claims", collected.claims)
    monkeypatch.setitem(stored.numbers, "claims", collected.judged(stored))
    text = "\n".join(claims_page.instrument_part(stored))
    assert "| c ‡ | “q”, w | +" in text  # 0.3 is the last value of its grid
    assert "| holds |" in text
    assert "| full | good | 79" in text
    assert "alone_a" not in text.split("## Accuracies")[1]
    assert "1 verdicts at 95 % each" in "\n".join(claims_page.counts([stored]))


def test_a_family_is_marked_if_a_grid_ends_for_one_of_it(
    collected: ModuleType, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import claims_page

    family = claim(first="full/alone_*", measure="own", margin=1.0, quote="q", where="w")
    monkeypatch.setattr(claims_page, "claims", lambda: [family])
    monkeypatch.setitem(stored.numbers, "claims", collected.judged(stored, [family]))
    assert "full/alone_b" in claims_page.at_the_edge(stored)
    assert any(line.startswith("| c ‡ |") for line in claims_page.claim_table(stored))
    monkeypatch.setattr(claims_page, "at_the_edge", lambda stored: {"full/good"})
    assert any(line.startswith("| c |") for line in claims_page.claim_table(stored))


def learned_merges_digest() -> str:
    import collect_learned_merges

    return collect_learned_merges.digest(json.loads(collect_learned_merges.SOURCE.read_text(encoding="utf-8")))


def test_rows_of_a_script_are_taken_over_as_they_are(collected: ModuleType) -> None:
    import collect_learned_merges as script

    measured = json.loads(script.SOURCE.read_text(encoding="utf-8"))
    row = next(one for one in measured["rows"] if (one["seed"], one["method"]) == (2, "layer-wise"))
    packed = script.packed(measured, "learned")["2/layer_wise"].split([len(one) for one in script.hits(row).values()])
    for task, part in zip(script.EMBEDDED_TASKS, packed, strict=True):
        assert part.double().mean().item() == pytest.approx(row["accuracy"][task], abs=1e-6)


def test_models_are_judged_on_the_tasks_they_have_not_seen(
    collected: ModuleType, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "hits", lambda regime, method, seed: {"a": method, "b": method})
    merged = stored.numbers["regimes"]["full"]["seeds"]["0"]["merged"]
    monkeypatch.setitem(merged, "good_without_b", merged["good"])
    assert stored.measured("full/good_without_*", "unseen", "0") == {"b": "good_without_b"}
    with pytest.raises(collected.NotMeasuredError):
        stored.measured("full/poor_without_*", "unseen", "0")


@pytest.mark.parametrize("instrument", COLLECTED)
def test_verdicts_and_experiments_are_those_that_were_collected(collected: ModuleType, instrument: str) -> None:
    stored = collected.Stored(instrument)
    assert stored.numbers["claims"] == collected.judged(stored)
    for name, found in stored.numbers["regimes"].items():
        if "script" in found:
            assert found["digest"] == learned_merges_digest(), f"{name}: run benchmarks/collect_learned_merges.py again"
        else:
            assert found["digest"] == collected.Regime(instrument, name).digest, f"{name}: run benchmarks/all.py again"
        for seed, one in found["seeds"].items():
            for method, merged in one["merged"].items():
                hits = stored.hits(name, method, seed)
                for task, accuracy in merged["accuracy"].items():
                    assert hits[task].mean().item() == pytest.approx(accuracy, abs=2e-5)


def test_the_pages_say_what_was_collected(collected: ModuleType) -> None:
    import claims_page

    assert claims_page.TEXT_PAGE.read_text(encoding="utf-8") == claims_page.text_page()
    known = {one["claim"] for one in collected.claims()}
    assert set(claims_page.explanations()) <= known
