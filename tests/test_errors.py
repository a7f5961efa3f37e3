"""What every refusal shares: the nearest names, and one line."""

from __future__ import annotations

import pytest

from lit_merge.errors import did_you_mean, one_line


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("lit-tinny", ["lit-tiny", "ViT-B-32"], "Did you mean lit-tiny?"),
        ("LINES", ["Sum", "LiNeS", "lines"], "Did you mean LiNeS or lines?"),
        ("elect_sign", ["ElectSign", "Sum"], "Did you mean ElectSign?"),
        ("max_stepz", ["trainer.max_steps", "trainer.devices"], "Did you mean trainer.max_steps?"),
        ("abcz", ["abcd", "abce", "abcf", "abcg"], "Did you mean abcd, abce or abcf?"),
        ("zzz", ["digits"], "See the list."),
        ("zzz", [], "See the list."),
    ],
)
def test_the_nearest_names(name, known, expected) -> None:
    assert did_you_mean(name, known, "See the list.") == expected


def test_an_error_in_one_line() -> None:
    assert one_line(ValueError("expected a,\n  got b.\n")) == "expected a, got b"
    assert one_line(KeyError()) == "KeyError"
    assert one_line("a" * 20, limit=4) == "aaaa …"
    worker = (
        "Caught DataError in worker 0.\nTraceback (most recent call last):\n  …\nlit_merge.errors.DataError: a: b.\n"
    )
    assert one_line(RuntimeError(worker)) == "a: b"
