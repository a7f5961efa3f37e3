"""benchmarks/all.py: regimes of the same fine-tuning share it, and the text instrument runs what it names."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from builders.documents import ROOT


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location("all_experiments", ROOT / "benchmarks/all.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "all_experiments", module)
        spec.loader.exec_module(module)
        yield module
        for name in ("collected", "suites", "verdicts", "claims_page", "text_suite"):
            sys.modules.pop(name, None)


@pytest.fixture
def run(script: ModuleType, tmp_path: Path) -> object:
    """Seed 0 of full fine-tuning is done, with the vectors of two tasks."""
    made = script.Run(tmp_path, "data", 1)
    folder = made.folder(script.Regime("embedded", "full")) / "seed-0"
    for part in ("zero-shot", "seed-0/fit/digits", "seed-0/individual/digits", "seed-0/merge/ties", "stages"):
        (folder / part).mkdir(parents=True)
    (folder / "seed-0/fit/digits/task_vector.safetensors").write_bytes(b"vector")
    (folder / "seed-0/merge/ties/merged.safetensors").write_bytes(b"merged")
    for stage in ("zero-shot", "seed-0--fit--digits", "seed-0--individual--digits", "seed-0--merge--ties"):
        (folder / f"stages/{stage}.json").write_text("{}")
    folder.with_suffix(".done").write_text("")
    return made


def test_a_regime_of_the_same_fine_tuning_takes_it_over(script: ModuleType, run: object, tmp_path: Path) -> None:
    own = tmp_path / "embedded/full_spectral/seed-0"
    script.take_over(run, script.Regime("embedded", "full_spectral"), 0, own)
    assert (own / "seed-0/fit/digits/task_vector.safetensors").read_bytes() == b"vector"
    stages = sorted(path.name for path in (own / "stages").iterdir())
    assert stages == ["seed-0--fit--digits.json", "seed-0--individual--digits.json", "zero-shot.json"]
    assert not (own / "seed-0/merge").exists()
    script.take_over(run, script.Regime("embedded", "full_spectral"), 0, own)  # it is there: nothing is done


@pytest.mark.parametrize(("name", "seed"), [("attention_1", 0), ("linearized", 0), ("full_spectral", 1)])
def test_another_fine_tuning_is_not_taken_over(
    script: ModuleType, run: object, tmp_path: Path, name: str, seed: int
) -> None:
    own = tmp_path / f"embedded/{name}/seed-{seed}"
    script.take_over(run, script.Regime("embedded", name), seed, own)
    assert not own.exists()


def test_one_rate_is_not_tried(script: ModuleType, run: object) -> None:
    script.choose(run, [script.Regime("embedded", "full")])
    assert run.choices("embedded") == {"full": {"rate": 4e-4, "tried": {}}}


def test_the_text_instrument_runs_what_it_names(script: ModuleType) -> None:
    found = {regime.name: regime for regime in script.every(["text"])}
    assert list(found)[:5] == ["full", "full_spectral", "full_wudi", "calibrated", "linearized"]
    assert list(found["full_wudi"].suite([0], 1e-4, "data")["recipes"]) == ["aswudi"]
    full = found["full"].suite([0], 1e-4, "data")
    assert list(full["recipes"]) == ["weight_average", "task_arithmetic_1", "task_arithmetic", "ties"]
    assert full["recipes"]["ties"]["search"]["values"] == [0.8, 1.2, 1.6, 2.0]
    assert "joint" not in full
    assert "model" not in found["tak"].suite([0], 1e-4, "data")["test"]
    fit = script.Regime("embedded", "lora").suite([0], 1e-3, "data")["fit"]
    assert (fit["trainer"]["max_steps"], fit["model"]["init_args"]["learning_rate"]) == (60, 1e-3)
