"""Addresses on the Hugging Face Hub wherever a path is given: what they name is downloaded, or taken from the cache.

``hf://owner/name[@revision][/path/in/repository]``: a file, the folder of one model, or a whole repository. Files are
in the Hub's own cache (``HF_HOME``); tokens are known to ``huggingface_hub`` alone and never pass through here.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lit_merge._version import __version__
from lit_merge.errors import ConfigurationError, HubError, LitMergeError, first_few

__all__ = [
    "Address",
    "Contents",
    "Snapshot",
    "address_entry",
    "beside",
    "contents",
    "download",
    "fetch",
    "hub_api",
    "local_path",
    "needed_address",
    "parse_address",
    "pinned",
    "refusals",
    "shards_of",
    "snapshot_folder",
]

_FORM = re.compile(
    r"(?:models/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/pr/\d+|refs/convert/[\w.-]+|[^/@]+))?(?P<path>/.*)?"
)
_URL = re.compile(r"(https?|ftp|s3|gs|az|file)://?", re.IGNORECASE)  # pathlib makes one slash of two
_OTHER_KINDS = ("buckets/", "datasets/", "kernels/", "spaces/")
_MANY = 1000
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What a folder is opened as, the first that is there; the same order as when a folder on the disk is opened.
_ONE_MODEL = (
    r"adapter_model\.safetensors",
    r"adapter_model\.bin",
    r"model\.safetensors\.index\.json",
    r"model\.safetensors",
    r".+\.safetensors\.index\.json",
    r".+(?<!\.head)\.safetensors",  # a trained head goes with a vector
    r"pytorch_model\.bin",
    r".+\.(bin|ckpt|pt|pth|pkl|pickle)",
)
# Tokens, and what follows a link's question mark, which may be a signature.
_SECRETS = re.compile(r"hf_\w{6,}|(?<=\?)\S+|[Bb]earer\s+\S+")
_ADVICE = {
    401: "Check owner and name; if it is private or gated, run hf auth login",
    403: "Ask for access on its page, or run hf auth login with a token that may do this",
    404: "Check owner, name, revision and path; if it is private, run hf auth login",
    409: "Somebody else has committed in between: push again",
    412: "Somebody else has committed in between: push again",
    429: "Wait a few minutes; hf auth login allows more requests",
}


@dataclass(frozen=True)
class Address:
    """What an address on the Hub names.

    Attributes:
        repository: ``owner/name`` of a model repository.
        path: in it, without leading slash; empty for the whole repository.
        revision: branch, tag or commit; None for the main branch.
    """

    repository: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        revision = self.revision or ""
        if not revision.startswith("refs/"):
            revision = revision.replace("/", "%2F")
        return f"hf://{self.repository}{revision and f'@{revision}'}{self.path and f'/{self.path}'}"


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit in the cache.

    Attributes:
        folder: that the repository's paths start from; its name is the commit.
        names: paths of the files in the repository.
    """

    folder: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """What an address stands for, before anything of it is downloaded.

    Attributes:
        commit: that its revision is now.
        names: paths of the files of the one model in the repository; of an index without its shards.
        listing: paths of all files of the repository.
    """

    commit: str
    names: tuple[str, ...]
    listing: tuple[str, ...]


def parse_address(path: str | os.PathLike[str]) -> Address | None:
    """The address that a path is, or None if it is an ordinary path.

    Raises:
        ConfigurationError: it begins with ``hf:/`` and does not go on as an address does, or it is a URL.
    """
    text = os.fspath(path)
    if _URL.match(text):
        raise ConfigurationError(
            f"{text}: expected a path, or hf://owner/name/file on the Hugging Face Hub, got a URL, which is not read. "
            "Download it first."
        )
    begin = next((one for one in ("hf://", "hf:/") if text.startswith(one)), None)
    if begin is None:
        return None
    rest = text.removeprefix(begin)
    found = _FORM.fullmatch(rest)
    parts = (found["path"] or "").rstrip("/").split("/")[1:] if found else []
    wrong = found is None or rest.startswith(_OTHER_KINDS) or not {"", ".", ".."}.isdisjoint(parts)
    if found is None or wrong or "\\" in rest:
        raise ConfigurationError(
            f"{text}: expected hf://owner/name, with @revision and /path/in/repository after it if need be, of a "
            "model repository, got something else. Write it like that, a slash in a revision as %2F."
        )
    revision = found["revision"]
    return Address(found["repository"], "/".join(parts), revision and unquote(revision))


def needed_address(text: str) -> Address:
    """As :func:`parse_address`, of what must be an address.

    Raises:
        ConfigurationError: it is none.
    """
    address = parse_address(text)
    if address is None:
        raise ConfigurationError(f"address: expected hf://owner/name, got {text!r}. Put hf:// in front of it.")
    return address


def local_path(path: str | os.PathLike[str]) -> Path:
    """Where a path leads on this machine: of an address on the Hub the file or folder in the cache, else the path.

    A single file is downloaded alone, an index of shards with its shards, and of a folder or repository the one model
    in it. What is in the cache already is not downloaded again. Without network, or with ``HF_HUB_OFFLINE=1``, the
    cache must have it. What is in the files is checked by whoever opens them, as of any file.

    Args:
        path: an ordinary path, which is returned as it is, or ``hf://owner/name[@revision][/path]``.

    Raises:
        ConfigurationError: it begins as an address and is none, or is a URL.
        HubError: the Hub, the repository, the revision or the file cannot be reached or read.
    """
    address = parse_address(path)
    return Path(path) if address is None else fetch(address).folder / address.path


def pinned(path: str | os.PathLike[str]) -> str:
    """A path as it can be written down: an address on the Hub with the commit that it stands for now.

    Nothing is downloaded, unless the Hub does not answer; then the cache must have it.

    Raises:
        LitMergeError: as for :func:`local_path`.
    """
    address = parse_address(path)
    if address is None:
        return str(path)
    found = contents(address)
    if found is None:
        return str(replace(address, revision=fetch(address).folder.name))
    _remember(address, found.commit)
    return str(replace(address, revision=found.commit))


def address_entry(path: str | None) -> dict[str, str]:
    """What provenance says of where an input is: its address on the Hub, nothing of the machine's own paths."""
    return {} if path is None or parse_address(path) is None else {"address": path}


def contents(address: Address) -> Contents | None:
    """Ask the Hub what an address stands for; None if the cache is to be asked: it knows, or the Hub does not answer.

    Raises:
        HubError: the Hub refuses, or there is not one model in the folder.
    """
    with refusals(address, "read"):
        if _known(address):
            return None
        try:
            commit, listing = _listing(address)
        except Exception as error:
            if _is_answer(error):
                raise
            return None
        return Contents(commit, tuple(_choose(address, listing, False)), tuple(listing))


def snapshot_folder(address: Address) -> Path:
    """The folder in the cache of the commit that an address names; it need not exist."""
    return _repository_folder(address) / "snapshots" / str(address.revision)


def _repository_folder(address: Address) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{address.repository.replace('/', '--')}")


def _remember(address: Address, commit: str) -> None:
    """Write down which commit a branch or tag is, as the library does, so that it is known without network, too."""
    ref = _repository_folder(address) / "refs" / (address.revision or "main")
    with suppress(OSError):  # a cache that cannot be written to is refused where something is downloaded
        if address.revision != commit and not (ref.is_file() and ref.read_text(encoding="utf-8") == commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit, encoding="utf-8")


def download(address: Address, names: Sequence[str]) -> Path:
    """Bring certain files of a repository into the cache.

    Returns:
        The folder that the repository's paths start from.

    Raises:
        HubError: they cannot be reached or read, or there is no room.
    """
    with refusals(address, "read"):
        return _download(address, names, None)


def beside(
    address: Address, name_of: Callable[[str], str], listings: dict[tuple[str, str | None], Sequence[str]]
) -> Address | None:
    """A file that goes with the one that an address stands for; None where the repository has none.

    Args:
        address: of a file, or of a folder or repository with one model.
        name_of: the path of that file in the repository -> the path of the other.
        listings: repository and revision -> its files, of those that were asked for before; this one is added.

    Raises:
        HubError: the repository cannot be reached or read.
    """
    with refusals(address, "read"):
        key = address.repository, address.revision
        try:
            listing = listings[key] if key in listings else _listing(address)[1]
        except Exception as error:
            if _is_answer(error):
                raise
            listing = _cached_listing(address, error)
        listings[key] = listing
        name = name_of(_choose(address, listing, False)[0])
        return replace(address, path=name) if name in listing else None


def fetch(
    address: Address,
    everything: bool = False,
    also: Callable[[str], bool] | None = None,
    weights: bool = True,
) -> Snapshot:
    """Bring what an address stands for into the cache.

    Args:
        address: what to bring.
        everything: of a folder or repository all files, rather than those of the one model in it.
        also: which files of the folder or repository, by their paths in it, besides those of the one model.
        weights: whether the files of the one model's weights are brought; otherwise the configuration alone is.

    Raises:
        HubError: it cannot be reached or read, or (without ``everything``) there is not one model in the folder.
    """
    with refusals(address, "read"):
        if found := _known(address):
            return found
        offline: Exception | None = None
        commit = ""
        try:
            commit, listing = _listing(address)
        except Exception as error:
            if _is_answer(error):
                raise
            offline, listing = error, _cached_listing(address, error)
        names = _choose(address, listing, everything)
        if not weights and address.path not in listing:
            names = [name for name in names if name.endswith("config.json")]
        if also is not None and address.path not in listing:
            start = f"{address.path}/" if address.path else ""
            inside = [name for name in listing if name.startswith(start) and also(name.removeprefix(start))]
            names = list(dict.fromkeys([*names, *inside]))
        if not names and commit:
            return Snapshot(snapshot_folder(replace(address, revision=commit)), ())
        folder = _download(address, names, offline)
        if not everything and (shards := shards_of(folder, names, listing)):
            names += shards
            _download(address, names, offline)
        return Snapshot(folder, tuple(names))


def hub_api() -> Any:
    """The library's client, which finds the user's token by itself.

    Raises:
        ConfigurationError: the library is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigurationError(
            "hf://: expected the package huggingface_hub, got none. Install it: pip install huggingface_hub."
        ) from error
    return HfApi(library_name="lit-merge", library_version=__version__)


@contextmanager
def refusals(address: Address, doing: str) -> Iterator[None]:
    """Turn whatever the library and the network raise into one line.

    Args:
        address: that is read or written.
        doing: ``read`` or ``write``.

    Raises:
        HubError: instead of the library's errors.
    """
    try:
        yield
    except LitMergeError:
        raise
    except Exception as error:  # the network libraries below raise whatever they like
        from huggingface_hub import constants

        status = _status(error)
        if status is not None and status < 500:
            advice = f" {_ADVICE[status]}." if status in _ADVICE else ""
            line = f"expected the Hub to {doing} this, got {status}: {_line(error)}.{advice}"
        elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
            line = (
                f"expected to write into the cache {constants.HF_HUB_CACHE}, got {os.strerror(error.errno)}. "
                "Make room there, or set HF_HOME to another folder."
            )
        else:
            line = (
                f"expected an answer from {constants.ENDPOINT}, got {_line(error)}. Connect to the network, or check "
                "HF_ENDPOINT."
            )
        raise HubError(f"{address}: {line}") from error


def _not_cached(address: Address, missing: Sequence[str], reason: Exception) -> HubError:
    """The refusal of what neither the Hub nor the cache gives: of some files, or of the whole revision."""
    from huggingface_hub import constants

    what = first_few(missing) or f"snapshot of {address.repository}"
    if not constants.HF_HUB_OFFLINE:
        return HubError(
            f"{address}: expected an answer from {constants.ENDPOINT}, got {_line(reason)}, and no {what} in the cache "
            f"{constants.HF_HUB_CACHE}. Connect to the network, or check HF_ENDPOINT."
        )
    command = " ".join(["hf download", address.repository, *missing])
    command += f" --revision {address.revision}" if address.revision else ""
    return HubError(
        f"{address}: expected it in the cache {constants.HF_HUB_CACHE}, as HF_HUB_OFFLINE is set, got no {what}. "
        f"Run {command} where there is network, and bring the folder "
        f"models--{address.repository.replace('/', '--')} of that cache here; or unset HF_HUB_OFFLINE."
    )


def _status(error: BaseException) -> int | None:
    """Of the answer, if there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _line(error: BaseException) -> str:
    """What the server says, or what the error says; without tokens of any form and the signatures of links."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # it is about to be said what is wrong
        token = None
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return _SECRETS.sub("…", " ".join(str(text).split()).replace(token or "\0", "…"))[:200].rstrip(". ")


def _is_answer(error: Exception) -> bool:
    """Whether the Hub, or what checks its answers, has refused; otherwise there was no answer."""
    status = _status(error)
    return isinstance(error, LitMergeError) or (status is not None and status < 500)


def _listing(address: Address) -> tuple[str, list[str]]:
    """Commit and files of a revision; without network it fails at once, as this request is not repeated."""
    info = hub_api().model_info(address.repository, revision=address.revision)
    names = [file.rfilename for file in info.siblings or []]
    if len(names) >= _MANY:  # of which the Hub may not have said all
        names = list(hub_api().list_repo_files(address.repository, revision=address.revision))
    wrong = [name for name in names if name.startswith("/") or "\\" in name or ".." in name.split("/")]
    if wrong:
        raise HubError(
            f"{address}: expected files inside the repository, got {first_few(map(repr, wrong))}. Do not trust it."
        )
    return str(info.sha), names


def _known(address: Address) -> Snapshot | None:
    """A single file of a commit, if it is in the cache: it cannot have changed."""
    hub_api()
    from huggingface_hub import try_to_load_from_cache

    if not address.path or address.path.endswith(".index.json") or not _COMMIT.fullmatch(address.revision or ""):
        return None
    found = try_to_load_from_cache(address.repository, address.path, revision=address.revision)
    if not isinstance(found, str) or not Path(found).is_file():
        return None
    return Snapshot(Path(found).parents[address.path.count("/")], (address.path,))


def _download(address: Address, names: Sequence[str], offline: Exception | None) -> Path:
    """The folder of the commit in the cache, with these files; ``offline``: why the Hub did not answer, if so."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [] if offline else [glob.escape(name) for name in names]
    missing = [address.path] if address.path else []
    try:
        folder = Path(
            hub_api().snapshot_download(
                address.repository,
                revision=address.revision,
                allow_patterns=patterns,
                local_files_only=offline is not None,
            )
        )
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return folder
    except LocalEntryNotFoundError as error:
        offline = offline or error
    raise _not_cached(address, missing, offline or FileNotFoundError(first_few(missing)))


def _cached_listing(address: Address, reason: Exception) -> list[str]:
    """The files of a commit as they were on the Hub if that is stored, otherwise those that are in the cache."""
    import huggingface_hub

    folder = _download(address, [], reason)
    try:
        tree = huggingface_hub.get_cached_repo_tree(address.repository, revision=folder.name)
        return [file.path for file in tree]
    except Exception:  # older versions of the library store no listing, nor does a snapshot that was copied
        if not (folder / address.path).exists():
            raise _not_cached(address, [address.path], reason) from None
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _choose(address: Address, listing: Sequence[str], everything: bool) -> list[str]:
    if address.path in listing:
        return [address.path]
    within = [name for name in listing if not address.path or name.startswith(f"{address.path}/")]
    if not within:
        near = difflib.get_close_matches(address.path, listing, 3, 0.5) or listing
        raise HubError(
            f"{address}: expected a file or folder of {address.repository}, got none of this name. "
            f"There {'is' if len(near) == 1 else 'are'} {first_few(near) or 'no files'}."
        )
    if everything:
        return within
    names = {posixpath.basename(name): name for name in within if posixpath.dirname(name) == address.path}
    for pattern in _ONE_MODEL:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if len(found) > 1:
            raise HubError(
                f"{address}: expected one model in this folder, got {first_few(found)}. Name the file itself."
            )
        if found:
            return [names[found[0]], *(path for name, path in names.items() if name.endswith("config.json"))]
    raise HubError(
        f"{address}: expected a model in this folder, got {first_few(names or within)}. Name the file itself."
    )


def shards_of(folder: Path, names: Sequence[str], listing: Sequence[str]) -> list[str]:
    """The files that an index names; what else is wrong with it is said when it is opened."""
    shards: list[str] = []
    for index in (name for name in names if name.endswith(".index.json")):
        try:
            files = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            named = {posixpath.join(posixpath.dirname(index), str(file)) for file in files}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        shards += [name for name in listing if name in named]
    return shards
