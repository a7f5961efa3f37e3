"""The table of docs/recipes.md that says where libraries differ, from what benchmarks/parity.py measured.

python benchmarks/parity_table.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

START, END = "<!-- parity: written by benchmarks/parity.py -->", "<!-- end of parity -->"
ROOT = Path(__file__).parents[1]


def table(result: dict[str, Any]) -> str:
    """What agrees in one line per library, and a row for what does not."""
    rows = result["rows"]
    lines = [
        f"Largest differences relative to the library's largest entry; up to {result['tolerance']:.0e} is agreement."
    ]
    for library in dict.fromkeys(row["library"] for row in rows):
        agreeing = [
            f"{row['method']} ({row['float32']:.0e})" for row in rows if row["library"] == library and row["agrees"]
        ]
        lines += ["", f"- **{library}** agrees on: {', '.join(agreeing)}."]
    lines += [
        "",
        "| library | method | float32 | float64 | why | as published |",
        "| :-- | :-- | --: | --: | :-- | :-- |",
    ]
    for row in rows:
        if not row["agrees"]:
            numbers = [f"{row[name]:.1e}" for name in ("float32", "float64")]
            cells = [row["library"], row["method"], *numbers, row["reason"], row["as_published"]]
            lines.append(f"| {' | '.join(cells)} |")
    peers = ", ".join(f"{name} {result['versions'][name]}" for name in ("peft", "mergekit", "fusion-bench", "torch"))
    lines += ["", f"{peers}. From `benchmarks/results/parity.json`, written by `benchmarks/parity.py`."]
    return "\n".join(lines)


def place(result: dict[str, Any]) -> None:
    """Put the table into docs/recipes.md."""
    place_between(ROOT / "docs/recipes.md", START, END, table(result))


if __name__ == "__main__":
    place(json.loads((ROOT / "benchmarks/results/parity.json").read_text(encoding="utf-8")))
