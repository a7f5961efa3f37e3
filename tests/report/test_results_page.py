"""docs/results.md says what the committed JSON says, and verdicts follow from the differences."""

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


def test_every_claim_has_a_verdict(page: ModuleType) -> None:
    claims = page.claims()
    assert {verdict for *_, verdict in claims} <= set(page.VERDICTS)
    assert len({text for text, *_ in claims if not text.startswith("…")}) == len(
        [text for text, *_ in claims if not text.startswith("…")]
    )
    for text, source, measured, verdict in claims:
        assert source
        assert measured
        numbers = [float(one.split(" ")[0]) for one in measured.split(", ") if one[0] in "+-"]
        ranges = " to " in measured or "at most" in text  # bounds other than zero
        if verdict == "holds" and numbers and not ranges:
            assert min(numbers) > 0
        if verdict == "does not hold" and numbers:
            assert max(numbers) < 0


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([0.1, 2.0], "holds"), ([-0.1, -3.0], "does not hold"), ([0.1, -0.1], "undecided"), ([0.0, 1.0], "undecided")],
)
def test_a_verdict_needs_every_seed(page: ModuleType, values: list[float], verdict: str) -> None:
    assert page.signs(values) == verdict
