"""Files to the Hugging Face Hub: what ``lit-merge push`` does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lit_merge._version import __version__
from lit_merge.commands.repository_card import split_card, updated_card
from lit_merge.errors import ConfigurationError, FileFormatError, first_few
from lit_merge.files.hub import Address, hub_api, needed_address, parse_address
from lit_merge.files.hub_refusals import refusals
from lit_merge.files.lazy import LazyMapping
from lit_merge.files.shards import INDEX_ENDING, ShardedTensors, open_tensors
from lit_merge.models.merging.card import file_card, front_matter
from lit_merge.models.merging.output import card_of
from lit_merge.vectors import Coefficients, file_digest

__all__ = ["PushResult", "push"]

_CARD = "README.md"
_BESIDE = ("merge.yaml", "search.json", "soup.json")  # what merge and soup write with their output
_KINDS = {"task-vector": "task vector", "coefficients": "coefficients", "fisher": "statistics", "gram": "statistics"}
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
    content_digest: str | None


@dataclass(frozen=True)
class _Place:
    """Where the files of a source go.

    Attributes:
        source: a file or folder.
        target: what was asked for: a repository, a folder in it, or another name for a single file.
    """

    source: Path
    target: Address

    @property
    def _base(self) -> PurePosixPath:
        path = PurePosixPath(self.target.path)
        if self.source.is_dir():
            return path
        same = path.suffix == self.source.suffix and not self.source.name.endswith(INDEX_ENDING)
        return path if self.target.path and same else path / self.source.name

    def of(self, path: Path) -> str:
        """The path of a file in the repository; of the source itself, if it is the root, an empty one."""
        base = self._base
        if path != self.source:
            base = (base if self.source.is_dir() else base.parent) / path.name
        return "" if base == PurePosixPath() else base.as_posix()

    def beside(self, ending: str) -> str:
        """The path of what goes with the source."""
        base = self._base
        path = base / ending if self.source.is_dir() else base.with_name(_named_beside(base.name, ending))
        return path.as_posix()

    def address(self, path: str) -> str:
        """Of a file in the repository."""
        return str(replace(self.target, path=path))


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

    With them go a provenance (<name>-provenance.json: digests and headers), what merge wrote beside them, and a model
    card in the repository's README.md, of which only the blocks between lit-merge's markers are ever replaced.

    Args:
        source: a file that lit-merge wrote, the index of a sharded model, or a folder of such files.
        address: hf://owner/name, with @branch and /folder or /file.safetensors behind it if need be; the repository is
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
    target = needed_address(address)
    if _COMMIT.fullmatch(target.revision or ""):
        raise ConfigurationError(f"address: expected a branch to write to, got the commit of {address}. Leave it out.")
    if base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        raise ConfigurationError(
            f"base_model: expected owner/name of a model on the Hub, got {base_model!r}. Name it like that."
        )
    place = _Place(Path(source), target)
    models = _models(place.source)
    files: dict[str, Path | bytes] = {place.of(path): path for model in models for path in model.files}
    files |= {place.beside(name): path for name in _BESIDE if (path := _beside(place.source, name)).is_file()}
    files[place.beside("provenance.json")] = _provenance(models, place)
    wrong = [path for path in files if not _PLAIN.fullmatch(path)]
    if wrong:
        raise ConfigurationError(
            f"{source}: expected names of letters, digits and - _ + . , = ( ), got {first_few(wrong)}. Rename them."
        )
    sizes = {path: len(one) if isinstance(one, bytes) else one.stat().st_size for path, one in sorted(files.items())}
    repository = replace(target, path="")
    if dry_run:
        return PushResult(str(repository), sizes, "", "")
    front, blocks = _card(place, models, base_model)
    with refusals(repository, "write"):
        head, existing = _repository(repository, private)
        card = updated_card(existing, front, target.repository.partition("/")[2], blocks, license)
        contents = {**files, **({_CARD: card.text.encode()} if card.text != existing else {})}
        url = _commit(repository, head, contents, message or f"Add {place.source.name} with lit-merge")
    return PushResult(str(repository), sizes, card.note, url)


def _models(source: Path) -> list[_Model]:
    """What is in a file, or in all files of a folder that hold models; every byte is verified."""
    if source.is_dir():
        indices = sorted(source.glob(f"*{INDEX_ENDING}"))
        sharded = [_model(index) for index in indices]
        taken = {path for model in sharded for path in model.files}
        found = sharded + [_model(path) for path in sorted(source.glob("*.safetensors")) if path not in taken]
        if not found:
            raise ConfigurationError(
                f"source: expected a folder with safetensors files, got none in {source}. Name another one."
            )
        return found
    return [_model(source)]


def _model(path: Path) -> _Model:
    if path.suffix == ".json" and not path.name.endswith(INDEX_ENDING):
        found = Coefficients.load(path)
        return _Model(path, "coefficients", {**found.metadata, "tasks": ", ".join(found.tasks)}, [path], None, None)
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
    return _Model(path, kind, tensors.metadata, files, shown, tensors.content_digest)


def _beside(source: Path, ending: str) -> Path:
    return source / ending if source.is_dir() else source.with_name(_named_beside(source.name, ending))


def _named_beside(name: str, ending: str) -> str:
    """What goes with a file, e.g. ``m-merge.yaml`` with ``m.safetensors``."""
    return f"{PurePosixPath(name.removesuffix('.index.json')).stem}-{ending}"


def _provenance(models: Sequence[_Model], place: _Place) -> bytes:
    """The digests and headers of all files; the same files give the same bytes."""
    content = {
        "format": "lit-merge/provenance/1",
        "lit_merge": __version__,
        "models": [
            {
                "path": place.of(model.path),
                "kind": model.kind,
                "content_sha256": model.content_digest,
                "header": dict(model.header),
                "files": {
                    place.of(path): {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in model.files
                },
            }
            for model in models
        ],
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _card(place: _Place, models: Sequence[_Model], base_model: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata of a new card, and a block per model; or one block, the card that merge wrote beside them."""
    first = models[0]
    clip = first.kind == "weights" and first.tensors is not None and "visual.conv1.weight" in first.tensors
    front = front_matter(first.kind, base_model or _base_of(first.header), clip)
    own = card_of(place.source)
    if not own.is_file():
        paths = {place.of(model.path): model for model in models}
        return front, {
            path: file_card(place.address(path), model.kind, model.header, model.tensors)
            for path, model in paths.items()
        }
    known, text = split_card(own.read_text(encoding="utf-8"))
    path = place.of(place.source)
    block = f"{text.strip()}\n\nOn the Hub it is `{place.address(path)}`, wherever lit-merge takes a path."
    return {**known, **({"base_model": base_model} if base_model else {})}, {path or "all files": block}


def _base_of(header: Mapping[str, str]) -> str | None:
    """The base model's repository, if a merge read it from the Hub."""
    try:
        address = parse_address(json.loads(header["base"])["address"])
    except (KeyError, TypeError, ValueError, ConfigurationError, RecursionError):
        return None
    return None if address is None else address.repository


def _repository(address: Address, private: bool) -> tuple[str, str | None]:
    """The commit that this one follows, and the card that is there; the repository is created if it is missing."""
    from huggingface_hub import errors

    hub = hub_api()
    try:
        info = hub.model_info(address.repository)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        hub.create_repo(address.repository, private=private, exist_ok=True)
        info = hub.model_info(address.repository)
    if private and not info.private:
        raise ConfigurationError(
            f"private: expected a private repository, got {address.repository}, which is public. Change it on its "
            "settings page, or push to another one."
        )
    if address.revision is not None:
        info = hub.model_info(address.repository, revision=address.revision)
    try:
        card = hub.hf_hub_download(address.repository, _CARD, revision=info.sha)
    except errors.EntryNotFoundError:
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
