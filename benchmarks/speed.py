"""The goals of speed in one table, and a check that nothing has become slower.

    python benchmarks/speed.py                       # docs/speed.md from the committed JSON
    python benchmarks/speed.py --run                 # measure again what needs no peer, and compare; an idle machine
    python benchmarks/speed.py --against FOLDER      # compare JSON that was measured before

Every row is a ratio of two things that were measured in the same run: ours by the limit, by an ordinary step, or a peer
by ours. Machines, and the hours of one, differ in seconds by a factor of two, in ratios much less. A ratio that is
worse by more than a quarter than the committed one, on the same kind of processor, ends the comparison with code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/speed.md"
BEGIN, END = "<!-- speed: written by benchmarks/speed.py -->", "<!-- end of speed -->"
WORSE = 1.25
SMALL_ARGUMENTS: dict[str, list[str]] = {
    "decompositions": [],
    "linearized": ["--rounds", "5"],
    "text_step": [],
    "merge": ["--shapes", "vit_b_32", "--tools", "limit", "lit_merge"],
    "t5_large": ["--layers", "6", "--rounds", "1", "--tools", "limit", "lines_ties", "ties", "ties_tensor"],
}
"""Script -> the arguments with which ``--run`` measures it, without peers."""
NAMES = {
    **{"task_arithmetic": "task arithmetic", "dare": "DARE", "lines": "LiNeS", "ties": "TIES, trimmed over all"},
    **{"ties_tensor": "TIES, trimmed by tensor", "lines_ties": "LiNeS on TIES, trimmed over all"},
    "tsv_m": "TSV-M, without the embeddings",
}
PEERS = {"task_arithmetic": "mergekit_task_arithmetic", "dare": "mergekit_dare", "ties_tensor": "mergekit_ties"}
"""What of benchmarks/billions.py does the same."""


@dataclass(frozen=True)
class Ratio:
    """One row.

    Args:
        source: the benchmark's name.
        what: what was done.
        ours: its time or size here, in words, with the spread.
        other: to what it is compared, in words.
        value: the ratio.
        goal: the bound; None for none.
        lower: whether less is better.
        processor: of the machine that it was measured on; "" if the file has one for all its rows, or does not say.
    """

    source: str
    what: str
    ours: str
    other: str
    value: float
    goal: float | None = None
    lower: bool = True
    processor: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is compared by."""
        return self.source, self.what, self.other.partition(",")[0]

    @property
    def met(self) -> str:
        """Whether the goal is reached."""
        if self.goal is None:
            return ""
        return "yes" if (self.value <= self.goal if self.lower else self.value >= self.goal) else "no"

    @property
    def wanted(self) -> str:
        """The goal in words."""
        return "" if self.goal is None else f"{'at most' if self.lower else 'at least'} {self.goal:g}"


def seconds(values: list[float], median: float | None = None) -> str:
    """Median and range."""
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2] if median is None else median
    return f"{middle:.3g} s" + (f" ({ordered[0]:.3g} to {ordered[-1]:.3g})" if len(ordered) > 1 else "")


def ratios(folder: Path) -> list[Ratio]:
    """All rows of the JSON files of a folder; of those that are missing none."""
    rows: list[Ratio] = []
    for source, read in READERS.items():
        path = folder / f"{source}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            rows += [row if row.processor else replace(row, processor=processor(found)) for row in read(found)]
    return rows


def _merge(found: dict[str, Any]) -> Iterator[Ratio]:
    by = {(row["shapes"], row["method"], row["tool"]): row for row in found["rows"]}
    plain = [row for row in found["rows"] if row["tool"] == "limit"]
    limits = {(row["shapes"], row["hardware"]["processor"]): row["median"] for row in plain}
    for (shapes, method, tool), row in by.items():
        if tool != "lit_merge" or not row.get("median"):
            continue
        what, ours = f"{NAMES[method]}, {found['tasks']} × {shapes}", seconds(row["seconds"], row["median"])
        ours += f", {row['peak_mib']:.0f} MiB"
        on = row["hardware"]["processor"]
        goal = 1.3 if method in ("task_arithmetic", "dare", "lines") else None
        if (shapes, on) in limits:
            least = limits[shapes, on]
            limit = f"reading and writing the files, {least:.3g} s"
            yield Ratio("merge", what, ours, limit, row["median"] / least, goal, processor=on)
        for peer in ("mergekit", "fusion_bench"):
            other = by.get((shapes, method, peer), {})
            if other.get("median") and other["hardware"]["processor"] == on:
                said = f"{peer}, {other['median']:.3g} s, {other['peak_mib']:,.0f} MiB"
                yield Ratio("merge", what, ours, said, other["median"] / row["median"], 1.0, False, on)


def _t5_large(found: dict[str, Any]) -> Iterator[Ratio]:
    tools, shapes = found["tools"], f"{found['tasks']} × T5-large, {found['layers']} + {found['layers']} layers"
    limit = tools["limit"]["median_seconds"]
    for method in ("ties", "lines_ties", "ties_tensor"):
        if method in tools:
            row = tools[method]
            ours = f"{row['median_seconds']:.3g} s, {row['peak_mib']:,} MiB"
            said = f"reading and writing the files, {limit:.3g} s"
            yield Ratio("t5_large", f"{NAMES[method]}, {shapes}", ours, said, row["median_seconds"] / limit)
    if "mergekit" in tools and "ties_tensor" in tools:
        peer, row = tools["mergekit"], tools["ties_tensor"]
        said = f"mergekit, {peer['median_seconds']:.3g} s, {peer['peak_mib']:,} MiB"
        ours = f"{row['median_seconds']:.3g} s, {row['peak_mib']:,} MiB"
        ratio = peer["median_seconds"] / row["median_seconds"]
        yield Ratio("t5_large", f"{NAMES['ties_tensor']}, {shapes}", ours, said, ratio, 1.0, lower=False)


def _decompositions(found: dict[str, Any]) -> Iterator[Ratio]:
    for row in found["rows"]:
        before = seconds(row["seconds"]["before"])
        what = f"{row['recipe']}, a block of ViT-B/32, {found['tasks']} vectors"
        said = f"decompositions by LAPACK's gesdd, {before}"
        ours = seconds(row["seconds"]["now"])
        yield Ratio("decompositions", what, ours, said, row["times_faster"], found["goal"], lower=False)


def _linearized(found: dict[str, Any]) -> Iterator[Ratio]:
    for setting, report in found.items():
        times = report["time"]
        for name, limit in (("linearized", 1.75), ("attention", None)):
            if name not in times:
                continue
            row = times[name]
            said = f"an ordinary step, {times['ordinary']['seconds']:.3g} s"
            ours = seconds(row["spread"], row["seconds"])
            what = {"linearized": "linearised step", "attention": "linearised step, attention only"}[name]
            yield Ratio("linearized", f"{what}, ViT-B/32, {setting}", ours, said, row["ratio_to_ordinary"], limit)

        if "tak" in times:
            row, said = times["tak"], f"a linearised step, {times['linearized']['seconds']:.3g} s"
            ours = seconds(row["spread"], row["seconds"])
            yield Ratio("linearized", f"TAK's step, ViT-B/32, {setting}", ours, said, row["ratio_to_linearized"], 1.1)


def _text_step(found: dict[str, Any]) -> Iterator[Ratio]:
    for network in ("bert", "t5", "gpt2"):
        if network in found:
            row, ordinary = found[network]["linearized"], found[network]["ordinary"]
            what = f"linearised step, {network}, {found[network]['parameters'] / 1e6:.0f} million parameters"
            said = f"an ordinary step, {ordinary['seconds']:.3g} s"
            yield Ratio("text_step", what, f"{row['seconds']:.3g} s", said, row["ratio_to_ordinary"], found["limit"])


def _adamerging(found: dict[str, Any]) -> Iterator[Ratio]:
    for goal in found["goals"]:
        side, _, bound = goal["goal"].rpartition(" ")
        what = f"AdaMerging's step, {found['vectors']} × {found['model']}, {goal['device']}"
        yield Ratio("adamerging", what, "", goal["what"], goal["value"], float(bound), side == "at most")


def _linear_search(found: dict[str, Any]) -> Iterator[Ratio]:
    said = f"evaluating every one of {found['points']} points"
    yield Ratio("linear_search", "coefficient search, linearised", "", said, found["times_faster"], 1.0, lower=False)


def _billions(found: dict[str, Any]) -> Iterator[Ratio]:
    for row in found["rows"]:
        tools = row["tools"]
        on = f"{row['tasks']} × {row['parameters'] / 1e9:.2f} billion parameters, {row['layers']} blocks"
        for name, one in tools.items():
            if name == "limit" or name.startswith("mergekit"):
                continue
            ours = seconds([run["seconds"] for run in one["runs"]], one["median_seconds"])
            ours, what = f"{ours}, {one['peak_mib']:,} MiB", f"{NAMES[name]}, {on}"
            goal = 1.3 if name in ("task_arithmetic", "dare", "lines") else None
            said = f"reading and writing the files, {tools['limit']['median_seconds']:.3g} s"
            yield Ratio("billions", what, ours, said, one["median_seconds"] / tools["limit"]["median_seconds"], goal)
            yield Ratio("billions", f"{what}: memory", ours, "1 GiB", one["peak_mib"] / 1024, 1.0)
            peer = tools.get(PEERS.get(name, ""))
            if peer is not None:
                said = f"mergekit, {peer['median_seconds']:.3g} s, {peer['peak_mib']:,} MiB"
                ratio = peer["median_seconds"] / one["median_seconds"]
                yield Ratio("billions", what, ours, said, ratio, 1.0, lower=False)


def _timings(found: dict[str, Any]) -> Iterator[Ratio]:
    for name, goal in (("quickstart (nothing cached)", 180), ("quickstart, started again", 3)):
        if name in found["seconds"]:
            took = found["seconds"][name]
            yield Ratio("timings", f"the {name}", f"{took:.3g} s", f"{goal} s", took / goal, 1.0)


READERS = {
    "timings": _timings,
    "merge": _merge,
    "billions": _billions,
    "t5_large": _t5_large,
    "decompositions": _decompositions,
    "linearized": _linearized,
    "text_step": _text_step,
    "adamerging": _adamerging,
    "linear_search": _linear_search,
}


def table(rows: list[Ratio]) -> str:
    """The table of docs/speed.md."""
    lines = ["| what | here | against | ratio | goal | met |", "| :-- | :-- | :-- | --: | :-- | :-- |"]
    for row in rows:
        lines.append(f"| {row.what} | {row.ours} | {row.other} | {row.value:.2f} | {row.wanted} | {row.met} |")
    judged = [row.met for row in rows if row.met]
    machines = sorted({row.processor for row in rows} - {""})
    met = f"{judged.count('yes')} of {len(judged)} goals are met."
    lines += ["", f"{met} Measured on {' and '.join(machines)}, 2 cores."]
    return "\n".join(lines)


def processor(found: dict[str, Any]) -> str:
    """Of the machine that a file was measured on; "" if it does not say."""
    parts = [found, *(one for one in found.values() if isinstance(one, dict)), *found.get("machines", {}).values()]
    parts += found.get("rows", [])
    return next((str(one["hardware"]["processor"]) for one in parts if "hardware" in one), "")


def slower(committed: list[Ratio], measured: list[Ratio]) -> list[str]:
    """What is worse by more than a quarter on the same kind of processor, in words."""
    known, found = {row.key: row for row in committed}, []
    for row in measured:
        before = known.get(row.key)
        if before is None or before.processor != row.processor:
            continue
        worse = row.value / before.value if row.lower else before.value / row.value
        if worse > WORSE:
            found.append(f"{row.what}, against {row.key[2]}: {row.value:.2f}, committed {before.value:.2f}")
    return found


def measure(folder: Path) -> None:
    """Run the scripts that need no peer; their JSON goes into a folder."""
    for name, arguments in SMALL_ARGUMENTS.items():
        script = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *arguments]
        subprocess.run([*script, "--output", str(folder / f"{name}.json")], check=True, cwd=ROOT)


def main() -> None:
    """Write the page, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure again, then compare")
    parser.add_argument("--against", type=Path, help="a folder of JSON to compare with the committed one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.against or (Path(scratch) if options.run else None)
        if options.run:
            assert folder is not None
            measure(folder)
        if folder is not None:
            rows = ratios(folder)
            print(table(rows))
            if found := slower(ratios(RESULTS), rows):
                sys.exit("slower than committed:\n" + "\n".join(found))
            return
    place_between(PAGE, BEGIN, END, table(ratios(RESULTS)))


if __name__ == "__main__":
    main()
