"""The tables of docs/adamerging.md that benchmarks/adamerging.py measures, and its goals; runs without the others."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
START, END = "<!-- step: written by benchmarks/adamerging.py -->", "<!-- end of step -->"
NAMES = {"paper": "the papers' scheme", "fusion_bench": "FusionBench", "lit_merge": "lit-merge"}
STORAGES = {"device": 4, "bfloat16": 2, "host": 4, "mapped": 4}  # bytes per entry of a vector
MIB = 2**20


def growth(result: dict[str, Any], device: str, storage: str, key: str) -> float | None:
    """Memory per vector by least squares, in the P · bytes that a vector has in that storage."""
    rows = [row for row in result["memory"] if (row["device"], row["storage"]) == (device, storage) and key in row]
    if len(rows) < 2:
        return None
    counts, peaks = [row["vectors"] for row in rows], [row[key] for row in rows]
    middle, level = sum(counts) / len(counts), sum(peaks) / len(peaks)
    slope = sum((count - middle) * (peak - level) for count, peak in zip(counts, peaks, strict=True))
    slope /= sum((count - middle) ** 2 for count in counts)
    return slope * MIB / (result["parameters"] * STORAGES[storage])


def ratios(result: dict[str, Any], device: str, images: int, tool: str) -> list[float]:
    """A contender's seconds by ours, round by round."""
    found = {row["tool"]: row for row in result["steps"] if (row["device"], row["images_per_task"]) == (device, images)}
    if "seconds" not in found.get(tool, {}) or "seconds" not in found.get("lit_merge", {}):
        return []
    pairs = zip(found[tool]["seconds"], found["lit_merge"]["seconds"], strict=True)
    return [theirs / ours for theirs, ours in pairs]


def shares(result: dict[str, Any], device: str, images: int) -> tuple[list[float], list[float]]:
    """The merge by its limit, and by the step that it is part of, round by round."""
    where = (device, images)
    part = next((row for row in result["parts"] if (row["device"], row["images_per_task"]) == where), {})
    steps = [
        row for row in result["steps"] if (row["device"], row["images_per_task"], row["tool"]) == (*where, "lit_merge")
    ]
    if "merge_seconds" not in part:
        return [], []
    by_limit = [merge / limit for merge, limit in zip(part["merge_seconds"], part["limit_seconds"], strict=True)]
    if not steps or "seconds" not in steps[0]:
        return by_limit, []
    return by_limit, [merge / median(steps[0]["seconds"]) for merge in part["merge_seconds"]]


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals, and whether the rows meet them: ``value`` is at least or at most ``goal``."""
    found = []
    for device in result["machines"]:
        images = sorted({row["images_per_task"] for row in result["steps"] if row["device"] == device})
        if images:
            for tool, least in (("fusion_bench", 2.5), ("paper", 4.0)):
                name = f"times as fast as {NAMES[tool]}, {images[0]} images per task"
                found.append((device, name, ratios(result, device, images[0], tool), "at least", least))
            by_limit, of_step = shares(result, device, images[0])
            found.append((device, "merge by the limit of the bandwidth", by_limit, "at most", 1.5))
            found.append((device, f"merge's share of the step, {images[0]} images per task", of_step, "at most", 0.1))
        for storage in STORAGES:
            streamed = storage == "mapped" or (storage == "host" and device == "cuda")
            key = "cuda_peak_mib" if device == "cuda" else "anonymous_mib" if streamed else "peak_mib"
            value = growth(result, device, storage, key)
            values = [] if value is None else [value]
            name = f"memory per vector in P · bytes, {storage}"
            found.append((device, name, values, "at most", 0.1 if streamed else 1.1))
    return [
        {
            "device": device,
            "what": what,
            "value": round(median(values), 3),
            "goal": f"{direction} {goal}",
            "met": median(values) >= goal if direction == "at least" else median(values) <= goal,
        }
        for device, what, values, direction, goal in found
        if values
    ]


def shown(values: list[float], digits: int = 2) -> str:
    """A median and the range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(result: dict[str, Any]) -> str:
    """The tables of docs/adamerging.md."""
    lines: list[str] = []
    for device, machine in result["machines"].items():
        lines += [*([""] if lines else []), *device_tables(result, device, machine)]
    lines += ["", "From `benchmarks/results/adamerging.json`, written by `benchmarks/adamerging.py`."]
    return "\n".join(lines)


def device_tables(result: dict[str, Any], device: str, machine: dict[str, Any]) -> list[str]:
    """What was measured on one device."""
    digits = 4 if device == "cuda" else 2
    peak = "cuda_peak_mib" if device == "cuda" else "peak_mib"
    hardware, versions = machine["hardware"], machine["versions"]
    where = hardware["accelerator"] if device == "cuda" else f"{hardware['cores']} cores ({hardware['processor']})"
    lines = [
        f"One step on {where}: {result['vectors']} vectors of {result['model']}, {result['coefficients']:,} "
        f"coefficients, {result['parameters'] / 1e6:.1f} million parameters, float32:",
        "",
        "| images per task | program | seconds (range) | times ours (range) | peak memory, MiB | gradient differs by |",
        "| --: | :-- | --: | --: | --: | --: |",
    ]
    for row in result["steps"]:
        if row["device"] != device:
            continue
        images, tool = row["images_per_task"], row["tool"]
        if "failed" in row:
            lines.append(f"| {images} | {NAMES[tool]} | more than {row['limit_gib']} GiB | | | |")
            continue
        times = ratios(result, device, images, tool)
        differs = f"{row['gradient_difference']:.0e}" if "gradient_difference" in row else ""
        cells = [images, NAMES[tool], shown(row["seconds"], digits), shown(times) if times else "", f"{row[peak]:,.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {differs} |")
    part_rows = [row for row in result["parts"] if row["device"] == device and "failed" not in row]
    if part_rows:
        lines += [
            "",
            "| images per task | merge, seconds (range) | limit at the copy's speed | times the limit "
            "| share of our step | network alone, seconds (range) |",
            "| --: | --: | --: | --: | --: | --: |",
        ]
    for row in part_rows:
        by_limit, of_step = shares(result, device, row["images_per_task"])
        limit, speed = median(row["limit_seconds"]), median(row["copy_gb_per_second"])
        cells = [
            f"{row['images_per_task']}",
            shown(row["merge_seconds"], digits),
            f"{limit:.{digits}f} ({row['moved_gb']:.1f} GB at {speed:,.0f} GB/s)",
            shown(by_limit),
            f"{100 * median(of_step):.1f} %" if of_step else "",
            shown(row["network_seconds"], digits),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    memory = {
        storage: [row for row in result["memory"] if (row["device"], row["storage"]) == (device, storage)]
        for storage in STORAGES
    }
    measured = {name: rows for name, rows in memory.items() if rows and not any("failed" in row for row in rows)}
    if measured:
        counts = ", ".join(str(row["vectors"]) for row in next(iter(measured.values())))
        lines += [
            "",
            f"| vectors are kept | peak memory with {counts} vectors, MiB | growth per vector in P · bytes "
            "| without files' pages |",
            "| :-- | --: | --: | --: |",
        ]
    for storage, rows in measured.items():
        grown, anonymous = (growth(result, device, storage, key) for key in (peak, "anonymous_mib"))
        cells = [
            storage,
            " / ".join(f"{row[peak]:,.0f}" for row in rows),
            "" if grown is None else f"{grown:.2f}",
            "" if anonymous is None or device == "cuda" else f"{anonymous:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for goal in (goal for goal in result["goals"] if goal["device"] == device):
        lines.append(f"- {goal['what']}: {goal['value']:g}, {'met' if goal['met'] else 'not met'} ({goal['goal']})")
    peers = f"fusion-bench {versions['fusion-bench']}"
    measured = [len(row["seconds"]) for row in result["steps"] if row["device"] == device and "seconds" in row]
    rounds = f"Steps side by side in {max(measured, default=0)} rounds"
    lines += ["", f"{rounds}; torch {versions['torch']}, {peers}."]
    return lines


def place(result: dict[str, Any], page: Path = ROOT / "docs/adamerging.md") -> None:
    """Put the tables between this script's marks; what stands between others' is left alone."""
    from placing import place_between  # not in a peer's environment, which has no lit-merge

    place_between(page, START, END, table(result))
