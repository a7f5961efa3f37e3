"""docs/text_results.md says what the committed JSON says, and every verdict follows from the committed hits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from builders.documents import ROOT

from lit_merge.errors import FileFormatError


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import text_suite

    yield text_suite
    for name in ("text_suite", "verdicts"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_json_says(script: ModuleType) -> None:
    measured = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert script.tables(measured) in script.PAGE.read_text(encoding="utf-8")


def test_every_verdict_follows_from_the_hits(script: ModuleType) -> None:
    measured = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    seeds = list(measured["seeds"])
    assert measured["claims"] == script.judged(seeds)
    assert all(one["source"] and one["claim"] for one in measured["claims"])
    for method in ("task_arithmetic", "tsv_m"):
        for seed, hits in zip(seeds, script.hits_of(method, seeds), strict=True):
            for task, accuracy in measured["seeds"][seed]["merged"][method]["accuracy"].items():
                assert hits[task].double().mean().item() == pytest.approx(accuracy, abs=1e-5)


def test_corrupted_hits_are_noticed(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(script.HITS, tmp_path / "hits")
    monkeypatch.setattr(script, "HITS", tmp_path / "hits")
    path = next((tmp_path / "hits").glob("tsv_m-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 16
    path.write_bytes(content)
    seeds = list(json.loads(script.RESULTS.read_text(encoding="utf-8"))["seeds"])
    with pytest.raises(FileFormatError, match="has changed since it was written"):
        script.judged(seeds)
