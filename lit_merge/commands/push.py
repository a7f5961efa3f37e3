"""Put vectors, models or coefficients on the Hugging Face Hub.

Examples:
  lit-merge push task_vector.safetensors hf://owner/name
  lit-merge push runs/merged hf://owner/name --private true
  lit-merge push merged.safetensors hf://owner/name/ties.safetensors --dry_run true
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lit_merge._version import __version__
from lit_merge.commands.repository_card import merged_card, split_card
from lit_merge.errors import ConfigurationError, FileFormatError, first_few
from lit_merge.files.content_digest import CONTENT_KEY
from lit_merge.files.hub import Address, hub_api, needed_address, parse_address, refusals
from lit_merge.files.lazy import LazyMapping
from lit_merge.files.shards import HEAD_ENDING, INDEX_ENDING, ShardedTensors, open_tensors
from lit_merge.models.merging.card import file_card, front_matter
from lit_merge.models.merging.companions import listed_companions
from lit_merge.models.merging.output import card_of
from lit_merge.vectors import Coefficients, file_digest

__all__ = ["PushResult", "push"]

POSITIONAL = ("source", "address")

_CARD = "README.md"
_WITH_A_MERGE = ("merge.yaml", "search.json", "soup.json")  # what merge and soup write with their output
_KINDS = {
    "task-vector": "task vector",
    "coefficients": "coefficients",
    "classifier": "head",
    **dict.fromkeys(("fisher", "gram", "gradients", "kfac"), "statistics"),
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[\w+\-. ()=,]+(/[\w+\-. ()=,]+)*")  # nothing that could end a marker in the card


@dataclass(frozen=True)
class PushResult:
    """What was pushed, or would be.

    Attributes:
        address: the repository, with the branch if one was named.
        uploads: path in the repository -> bytes.
        card: what was done to the repository's ``README.md``; empty after a dry run, which does not look at it.
        url: of the commit; empty after a dry run.
    """

    address: str
    uploads: Mapping[str, int]
    card: str
    url: str

    def describe(self) -> str:
        """The files, and the commit's address last."""
        width = max(map(len, self.uploads))
        lines = [f"{path:<{width}}  {size:>14,} bytes" for path, size in self.uploads.items()]
        card = self.card or "written, or our block in it replaced, if it has no text of its own"
        ending = self.url or f"would go to {self.address}"
        return "\n".join([*lines, f"{_CARD:<{width}}  {card}", ending])


@dataclass(frozen=True)
class _Model:
    """One model or file of numbers that is pushed; its content has been verified."""

    path: Path  # of the file, or of the index of shards
    kind: str
    header: Mapping[str, str]
    files: Sequence[Path]
    tensors: LazyMapping | None  # None for coefficients
    content_key: str
    content_digest: str | None


class _Target:
    """Where the files of a source go: a repository, a folder in it, or another name for a single file."""

    def __init__(self, source: Path, address: Address) -> None:
        self._source, self._address = source, address
        self._folder, self._name = PurePosixPath(address.path), "" if source.is_dir() else source.name
        renames = self._folder.suffix == source.suffix and not source.name.endswith(INDEX_ENDING)
        if self._name and address.path and renames:
            self._folder, self._name = self._folder.parent, self._folder.name

    def path(self, file: Path) -> str:
        """The path of a file in the repository; of the source, if it is the root, an empty one."""
        name = self._name if file == self._source else file.name
        if self._name and name.endswith(HEAD_ENDING):
            name = PurePosixPath(self._name).stem + name.removeprefix(self._source.stem)
        path = self._folder / name
        return "" if path == PurePosixPath() else path.as_posix()

    def inside(self, path: Path) -> str:
        """The path of a file of the source, which is a folder, in the repository."""
        return (self._folder / path).as_posix()

    def companion(self, ending: str) -> str:
        """The path of what goes with the source, e.g. ``m-merge.yaml`` with ``m.safetensors``."""
        return (self._folder / _companion(self._name, ending)).as_posix()

    def address(self, file: Path) -> str:
        """Of a file in the repository."""
        return str(replace(self._address, path=self.path(file)))


def push(
    source: str,
    address: str,
    private: bool = False,
    message: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    dry_run: bool = False,
) -> PushResult:
    """Put task vectors, merged models, coefficients or statistics on the Hugging Face Hub, in one commit.

    With them go a provenance (<name>-provenance.json: digests and headers), what merge wrote with them, and a model
    card in the repository's README.md, of which only the blocks between lit-merge's markers are ever replaced.

    Args:
        source: a file that lit-merge wrote, the index of a sharded model, or a folder of such files.
        address: hf://owner/name, with @branch and /folder or /file.safetensors after it if need be; the repository is
            created if there is none.
        private: create it as a private one; one that exists must be private then.
        message: of the commit.
        license: an identifier of the Hub, e.g. apache-2.0; for a new card, or one that names none.
        base_model: owner/name of the base model on the Hub, for a new card.
        dry_run: check the files, print what would go where, and ask nothing of the Hub.

    Raises:
        ConfigurationError: the address or the source is of another kind than expected.
        FileFormatError: a file is damaged, or was not written by lit-merge.
        HubError: the Hub refuses something or cannot be reached; nothing is written then.
    """
    repository = needed_address(address)
    if _COMMIT.fullmatch(repository.revision or ""):
        raise ConfigurationError(f"address: expected a branch to write to, got the commit of {address}. Leave it out.")
    if base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        raise ConfigurationError(f"base_model: expected owner/name of a model on the Hub, got {base_model!r}.")
    root = Path(source)
    target, models = _Target(root, repository), _models(root)
    files: dict[str, Path | bytes] = {target.path(path): path for model in models for path in model.files}
    if root.is_dir():  # what a merge has put beside the weights for the library that opens them
        beside = listed_companions(root, [model.path for model in models])
        files |= {target.inside(path.relative_to(root)): path for path in beside}
    for ending in _WITH_A_MERGE:
        path = root / ending if root.is_dir() else root.with_name(_companion(root.name, ending))
        files |= {target.companion(ending): path} if path.is_file() else {}
    files[target.companion("provenance.json")] = _provenance(models, target)
    wrong = [name for name in files if not _PLAIN.fullmatch(name)]
    if wrong:
        raise ConfigurationError(
            f"{source}: expected names of letters, digits and - _ + . , = ( ), got {first_few(wrong)}. Rename them."
        )
    sizes = {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in sorted(files.items())}
    repository = replace(repository, path="")
    if dry_run:
        return PushResult(str(repository), sizes, "", "")
    front, blocks = _card(root, target, models, base_model)
    with refusals(repository, "write"):
        head, existing = _repository(repository, private)
        card, note = merged_card(existing, front, repository.repository.partition("/")[2], blocks, license)
        files |= {_CARD: card.encode()} if card != existing else {}
        url = _commit(repository, head, files, message or f"Add {root.name} with lit-merge")
    return PushResult(str(repository), sizes, note, url)


def _models(source: Path) -> list[_Model]:
    """What is in a file, or in all files of a folder that hold models; every byte is verified."""
    if not source.is_dir():
        if source.name.endswith(HEAD_ENDING):
            raise ConfigurationError(
                f"source: expected a model, got the head {source}. Push its vector; it goes along."
            )
        heads = (path for path in source.parent.glob(f"*{HEAD_ENDING}") if path.name.startswith(f"{source.stem}."))
        return [_model(source), *map(_model, sorted(heads))]
    sharded = [_model(index) for index in sorted(source.glob(f"*{INDEX_ENDING}"))]
    taken = {path for model in sharded for path in model.files}
    found = sharded + [_model(path) for path in sorted(source.glob("*.safetensors")) if path not in taken]
    if all(model.kind == "head" for model in found):
        got = "heads alone" if found else "none"
        raise ConfigurationError(f"source: expected a folder with safetensors files, got {got} in {source}.")
    return sorted(found, key=lambda model: model.kind == "head")


def _model(path: Path) -> _Model:
    if path.suffix == ".json" and not path.name.endswith(INDEX_ENDING):
        found = Coefficients.load(path)
        return _Model(
            path, "coefficients", {**found.metadata, "tasks": ", ".join(found.tasks)}, [path], None, CONTENT_KEY, None
        )
    if path.suffix not in (".json", ".safetensors"):
        raise ConfigurationError(
            f"source: expected a .safetensors file, a file of coefficients, or a folder, got {path}. For others use "
            "hf upload."
        )
    tensors = open_tensors(path)
    if tensors.content_digest is None:
        raise FileFormatError(
            f"{path}: expected a file that lit-merge wrote, with a content digest, got one without. For the files of "
            "other programs use hf upload."
        )
    tensors.verify()
    form = tensors.metadata.get("format", "").removeprefix("lit-merge/").partition("/")[0]
    kind = _KINDS.get(form, "weights")
    files = tensors.files if isinstance(tensors, ShardedTensors) else (path,)
    shown = None if kind == "coefficients" else tensors
    return _Model(path, kind, tensors.metadata, files, shown, tensors.content_key, tensors.content_digest)


def _companion(name: str, ending: str) -> str:
    """What goes with a file, e.g. ``m-merge.yaml`` with ``m.safetensors``; with a folder, the ending itself."""
    return f"{PurePosixPath(name.removesuffix('.index.json')).stem}-{ending}" if name else ending


def _provenance(models: Sequence[_Model], target: _Target) -> bytes:
    """The digests and headers of all files; the same files give the same bytes."""
    content = {
        "format": "lit-merge/provenance/1",
        "lit_merge": __version__,
        "models": [
            {
                "path": target.path(model.path),
                "kind": model.kind,
                model.content_key: model.content_digest,
                "header": dict(model.header),
                "files": {
                    target.path(path): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
                    for path in model.files
                },
            }
            for model in models
        ],
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _card(
    source: Path, target: _Target, models: Sequence[_Model], base_model: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata of a new card, and a block per model; or one block, the card that merge wrote with them."""
    own = card_of(source)
    if own.is_file():
        known, text = split_card(own.read_text(encoding="utf-8"))
        block = f"{text.strip()}\n\nOn the Hub it is `{target.address(source)}`, wherever lit-merge takes a path."
        return {**known, **({"base_model": base_model} if base_model else {})}, {
            target.path(source) or "all files": block
        }
    first = models[0]
    clip = first.kind == "weights" and first.tensors is not None and "visual.conv1.weight" in first.tensors
    blocks = {
        target.path(model.path): file_card(target.address(model.path), model.kind, model.header, model.tensors)
        for model in models
        if model.kind != "head"  # which goes with a vector
    }
    return front_matter(first.kind, base_model or _base_of(first.header), "open_clip" if clip else ""), blocks


def _base_of(header: Mapping[str, str]) -> str | None:
    """The base model's repository, if a merge read it from the Hub."""
    try:
        address = parse_address(json.loads(header["base"])["address"])
    except (KeyError, TypeError, ValueError, ConfigurationError, RecursionError):
        return None
    return None if address is None else address.repository


def _repository(address: Address, private: bool) -> tuple[str, str | None]:
    """The commit that this one follows, and the card that is there; the repository is created if it is missing."""
    from huggingface_hub.errors import EntryNotFoundError

    hub = hub_api()
    hub.create_repo(address.repository, private=private, exist_ok=True)
    info = hub.model_info(address.repository, revision=address.revision)
    if private and not info.private:
        raise ConfigurationError(
            f"private: expected a private repository, got {address.repository}, which is public. Change it on its "
            "settings page, or push to another one."
        )
    try:
        card = hub.hf_hub_download(address.repository, _CARD, revision=info.sha)
    except EntryNotFoundError:
        return info.sha, None
    return info.sha, Path(card).read_bytes().decode("utf-8")


def _commit(address: Address, head: str, contents: Mapping[str, Path | bytes], message: str) -> str:
    """One commit with all files, refused if there has been another one since ``head``; the commit's URL."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path, one) for path, one in sorted(contents.items())]
    made = hub_api().create_commit(
        address.repository, operations, commit_message=message, revision=address.revision, parent_commit=head
    )
    return str(made.commit_url)
