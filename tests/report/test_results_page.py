"""docs/results.md says what the committed JSON says, and nothing is judged without stored test examples."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from builders.documents import ROOT


@pytest.fixture(scope="module")
def page() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import results_page

        yield results_page
        for name in ("results_page", "learned_merges"):
            sys.modules.pop(name, None)


def test_the_page_is_what_the_json_says(page: ModuleType) -> None:
    assert (ROOT / "docs/results.md").read_text(encoding="utf-8") == page.page()


def test_there_is_one_rule(page: ModuleType) -> None:
    text = page.page()
    assert text.count("## The rule") == 1
    judged, other = text.split("## Accuracies of other runs")
    assert "| holds |" in judged
    assert not {"| holds |", "| does not hold |", "| undecided |"} & {f"| {one} |" for one in other.split(" | ")}
