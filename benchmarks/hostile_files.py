"""Damaged and hostile files of every format that lit-merge opens: what happens, how long it takes, how much memory.

Small whole files are damaged at random (bits, bytes, length fields, cuts, splices with other files), opened and read,
in a process of its own that may use 1 GiB beyond what it has after its imports, and whose every import, execution and
write an audit hook sees. Beside them the files of tests/builders/damaged_files.py that are made to do harm, and larger
ones.

The run fails if anything but a one-line refusal escapes, anything is executed, imported or written, a file takes over
five seconds, or memory runs out.

    python benchmarks/hostile_files.py
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from builders.damaged_files import (  # noqa: E402
    archive,
    archives,
    bombs,
    headers,
    mutant,
    pickled,
    read,
    state_dict,
    stream,
    text,
    traps,
    write_originals,
)

from lit_merge.errors import LitMergeError  # noqa: E402
from lit_merge.report.environment import hardware, versions  # noqa: E402

SEED = 20250801
LIMIT = 1 << 30  # bytes
SLOW = 5.0  # seconds
OUTCOMES = ("refused", "read equal", "read, other values", "read, other names, shapes or metadata")
WATCHED = (
    *("exec", "compile", "import", "pickle.find_class", "os.system", "os.exec", "os.fork", "os.posix_spawn"),
    *("os.spawn", "os.remove", "os.rename", "os.mkdir", "subprocess.Popen", "ctypes.dlopen", "socket.connect"),
)


def large() -> dict[str, bytes]:
    """Pickles as large as they may be, of what takes the most memory for its bytes."""
    size, weight = 60 << 20, state_dict()[2:-2]  # the dict stays open
    keys = b"".join(b"J" + index.to_bytes(4, "little") + b"N" for index in range(900_000))
    names = b"".join(f"cm{index}\n{'n' * 25}\n".encode() for index in range(1_500_000))
    return {
        "lists": pickled(b"]" * 1_999_990),
        "dicts with one item": pickled(b"}NNs" * 499_990),
        "tuples": pickled(b")\x85" * 999_990),
        "lists in the memo": pickled(b"]\x94" * 999_990),
        "marks": pickled(b"(" * 1_999_990),
        "calls": pickled(b"ca\nb\nq\x00" + b"h\x00)R" * 660_000),
        "calls with state": pickled(b"ca\nb\nq\x00" + b"h\x00)R}NNsb" * 280_000),
        "wide text": pickled(b"X" + (size + 4).to_bytes(4, "little") + b"a" * size + "\U0001f600".encode()),
        "long numbers": pickled(b"\x8b" + size.to_bytes(4, "little") + b"\x7f" * size),
        "names": pickled(names),
        "items": pickled(weight, keys, b"u"),
        "items of one object": pickled(b"ca\nb\n)R(", keys, b"u"),
        "plain values": pickled(weight, text("a"), b"](", b"](K\x01K\x02e" * 300_000, b"eu"),
    }  # fmt: skip


def hostile(canary: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Group, name, how it is opened, and content."""
    for group, pickles in (
        ("pickles that execute", traps(canary)),
        ("pickle bombs", bombs()),
        ("large pickles", large()),
    ):
        for name, content in pickles.items():
            yield group, f"{name}, zip archive", "state dict", archive(content)
            yield group, f"{name}, older container", "state dict", stream(content)
    for name, content in archives().items():
        yield "zip archives", name, "state dict", content
    for name, content in headers().items():
        yield "safetensors headers", name, "safetensors", content


class Watch:
    """What is executed, imported or written while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event in WATCHED or (event == "open" and (arguments[1] or "r").strip("rb") != "")):
            self.seen.append(f"{event} {arguments[:1]!r}")


class Trial:
    """Opens files one after the other and keeps the slowest."""

    def __init__(self) -> None:
        self.watch, self.slowest, self.failures = Watch(), (0.0, ""), list[str]()

    def __call__(self, what: str, kind: str, path: Path) -> tuple[str, str] | None:
        """Digests of what was read; None if it was refused."""
        found, begin = None, time.perf_counter()
        self.watch.on = True
        try:
            found = read(kind, path)
        except LitMergeError as error:
            if not str(error).isprintable() or len(str(error)) > 1000:
                self.failures.append(f"{what}: not one line, but {str(error)!r}")
        except Exception as error:
            self.failures.append(f"{what}: {error!r}")
        self.watch.on = False
        took = time.perf_counter() - begin
        self.slowest = max(self.slowest, (took, what))
        if took > SLOW:
            self.failures.append(f"{what}: {took:.1f} s")
        self.failures += [f"{what}: {event}" for event in self.watch.seen]
        self.watch.seen.clear()
        return found


def prepare(folder: Path) -> None:
    """Write the hostile files, in a process of its own, whose memory is not measured."""
    listed = []
    for number, (group, name, kind, content) in enumerate(hostile(folder / "canary")):
        path = folder / f"hostile {number}.pt"
        path.write_bytes(content)
        listed.append([group, name, kind, str(path)])
    (folder / "hostile.json").write_text(json.dumps(listed), encoding="utf-8")


def measure(inputs: int, folder: Path) -> dict[str, Any]:
    """Open everything, in this process, whose memory is limited from here on."""
    originals = write_originals(folder)
    contents = {kind: path.read_bytes() for kind, path in originals.items()}
    whole = {kind: read(kind, path) for kind, path in originals.items()}
    prepared = json.loads((folder / "hostile.json").read_text(encoding="utf-8"))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT,) * 2)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    before = _peak()
    trial, draw = Trial(), random.Random(SEED)
    made: dict[str, dict[str, int]] = {}
    for group, name, kind, path in prepared:
        counts = made.setdefault(group, {"files": 0, "refused": 0, "read": 0})
        counts["files"] += 1
        counts["read" if trial(f"{group}: {name}", kind, Path(path)) else "refused"] += 1
    slowest_made, trial.slowest = trial.slowest, (0.0, "")
    peak_made = _peak() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    damaged = {kind: dict.fromkeys(("files", *OUTCOMES), 0) for kind in originals}
    for number in range(inputs):
        kind = list(originals)[number % len(originals)]
        originals[kind].write_bytes(mutant(draw, contents[kind], list(contents.values())))
        found = trial(f"{kind}, number {number}", kind, originals[kind])
        originals[kind].write_bytes(contents[kind])
        damaged[kind]["files"] += 1
        damaged[kind][OUTCOMES[_outcome(found, whole[kind])]] += 1
    if (folder / "canary").exists():
        trial.failures.append("a file was executed: the canary is there")
    return {
        "failures": trial.failures,
        "damaged": damaged,
        "damaged_total": {key: sum(counts[key] for counts in damaged.values()) for key in ("files", *OUTCOMES)},
        "hostile": made,
        "slowest_damaged": {"seconds": round(trial.slowest[0], 3), "file": trial.slowest[1]},
        "slowest_hostile": {"seconds": round(slowest_made[0], 3), "file": slowest_made[1]},
        "peak_memory_above_start_mb": {"damaged": _peak() - before, "hostile": peak_made},
    }


def _peak() -> int:
    """The largest resident memory of this process since it was last reset, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 // 1_000_000 for line in lines if line.startswith("VmHWM"))


def _outcome(found: tuple[str, str] | None, whole: tuple[str, str]) -> int:
    if found is None:
        return 0
    return 1 if found == whole else 2 if found[0] == whole[0] else 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=30_000, help="how many damaged files")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/hostile_files.json")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside and options.inputs == 0:
        return prepare(options.inside)
    if options.inside:
        return print(json.dumps(measure(options.inputs, options.inside)))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--inside", folder, "--inputs"]
        subprocess.run([*command, "0"], check=True)
        run = subprocess.run([*command, str(options.inputs)], stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"the process that opened the files ended with {run.returncode}")
    found = json.loads(run.stdout.splitlines()[-1])
    failures = found.pop("failures")
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} failures:", *failures[:50]]))
    settings = {"seed": SEED, "memory_limit_mb": LIMIT >> 20, "seconds_limit": SLOW}
    result = {"settings": settings, **found, "versions": versions(), "hardware": hardware()}
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: found[key] for key in found if key != "damaged"}, indent=2))


if __name__ == "__main__":
    main()
