"""What lies beside the weights in a model's folder, so that a merge of it opens in the library that the base is of.

Configuration, tokenizer, preprocessing, templates, the modules of sentence encoders and custom code are copied as data,
bit for bit; nothing of them is run. What is changed is named: the dtype in the configuration, and the entries that a
merge asks for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lit_merge.errors import FileFormatError, LitMergeError, first_few
from lit_merge.files.hub import fetch, parse_address
from lit_merge.files.shards import INDEX_ENDING, open_tensors
from lit_merge.files.text import read_json

__all__ = [
    "LARGEST",
    "OPEN_CLIP_CONFIG",
    "STEMS",
    "Companions",
    "companions_of",
    "earlier_companions",
    "is_companion",
    "listed_companions",
]

LARGEST = 256 << 20
"""Bytes of a file beside the weights, at most; a larger one stays behind, and is named."""

OPEN_CLIP_CONFIG = "open_clip_config.json"
_CONFIG, _MODULES = "config.json", "modules.json"
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|tflite|ot|mlmodel)"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index(\.[\w-]+)?\.json",
    re.IGNORECASE,
)
_OPAQUE = re.compile(r".*\.(np[yz]|pkl|pickle|tar|tgz|zip|gz|xz|bz2)", re.IGNORECASE)
_TRAINING = re.compile(
    r"trainer_state\.json|(all|train|eval|test|predict)_results\.json|events\.out\.tfevents\..*|zero_to_fp32\.py|latest"
    r"|trainer_log\.jsonl"
)
_OURS = re.compile(r"merge\.yaml|(search|soup|provenance)\.json")  # what a merge writes of itself
_CARD = re.compile(r"readme(\..*)?", re.IGNORECASE)
_MODULE_FOLDER = re.compile(r"\d+_\w+")  # as sentence-transformers names them
_TEMPLATES = "additional_chat_templates"
_TOKENIZER = re.compile(
    r"tokenizer(_config)?\.[\w.]+|tokenization_\w+\.py|(special_tokens_map|added_tokens|tekken|normalizer)\.json"
    r"|(vocab|merges|encoder)([_-]\w+)?\.(json|txt|bpe)|(bpe\.codes|dict\.txt)|.+\.(model|spm|tiktoken)"
    r"|chat_template\.\w+"
)
_LICENCE = re.compile(r"(licen[cs]e|notice|copying)([._-].*)?", re.IGNORECASE)
_REMOTE_CODE = re.compile(r"([\w.-]+/[\w.-]+)--.*")  # in auto_map: code of another repository
_STEMS = {"open_clip": "open_clip_model", "peft": "adapter_model"}
STEMS = ("model", *_STEMS.values())
"""What weights are called in the folders of libraries."""

_DTYPE_ENTRIES = ("torch_dtype", "dtype")  # transformers 4, transformers 5


@dataclass(frozen=True)
class Companions:
    """The files of a model's folder beside its weights.

    Attributes:
        library: that opens the folder: ``transformers``, ``sentence-transformers``, ``timm``, ``open_clip``,
            ``diffusers``, or empty if only the files say how it is loaded.
        stem: what the weights' file is called there, without ``.safetensors``.
        files: name in the folder, with ``/`` -> the file that is copied, or what is written instead.
        config: the base's configuration as it is read, open_clip's or the others'.
        code: files and repositories of custom code that the library runs if it is told to.
        notes: what there is to say about them, in words.
    """

    library: str = ""
    stem: str = "model"
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.files)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in self.files.items()}

    @property
    def sources(self) -> list[Path]:
        """The files that are copied."""
        return [one for one in self.files.values() if isinstance(one, Path)]

    def with_entries(self, entries: Mapping[str, Any]) -> Companions:
        """The same with other entries in ``config.json``, or open_clip's own.

        Args:
            entries: name -> value. A name without dot is set wherever the configuration of the model or of its text
                part has it (``text_config``, open_clip's ``text_cfg``); if neither has, in the text part, or else the
                model's. With dots it is exactly that one, e.g. ``vision_config.image_size``.

        Returns:
            These files with that configuration; the others, and this one if nothing differs, are the base's.
        """
        file = OPEN_CLIP_CONFIG if self.library == "open_clip" else _CONFIG
        if file not in self.files or not self.config:
            return self
        config = json.loads(json.dumps(self.config))
        said = []
        for name, value in entries.items():
            for owner, key in _places(config, name):
                if key not in owner or owner[key] != value:
                    said.append(f"{name.removeprefix('.')} {owner.get(key, 'not there')} -> {value}")
                    owner[key] = value
        if not said:
            return self
        content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        notes = (*self.notes, f"{file}: {', '.join(dict.fromkeys(said))}")
        return replace(self, files={**self.files, file: content}, config=config, notes=notes)

    @property
    def tokenizer(self) -> list[str]:
        """The names of those that belong to the tokenizer, chat templates included."""
        return sorted(name for name in self.files if _of_tokenizer(name))

    def with_tokenizer(self, folder: Path, whose: str) -> Companions:
        """The same with the tokenizer of another model, all of its files; none of the base's tokenizer stays.

        Args:
            folder: of the other model.
            whose: what it is called in words.
        """
        found: dict[str, Path | bytes] = {}
        left: dict[str, str] = {}
        for path in sorted([*folder.iterdir(), *(folder / _TEMPLATES).glob("*")]):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and _of_tokenizer(name):
                _sort_in(path, name, found, left)
        before = self.tokenizer
        kept = {name: one for name, one in self.files.items() if name not in before}
        lost = [name for name in before if name not in found]
        notes = [f"{first_few(sorted(found), 8)}: of {whose} instead of the base"]
        notes += [f"not written, as {whose} has none: the base's {first_few(lost, 8)}"] if lost else []
        notes += [f"left in {whose}: {first_few(f'{n} ({why})' for n, why in left.items())}"] if left else []
        code = [name for name in self.code if name not in before] + [name for name in found if name.endswith(".py")]
        return replace(self, files={**kept, **found}, code=tuple(code), notes=(*self.notes, *notes))

    def with_dtype(self, dtype: torch.dtype | None) -> Companions:
        """The same with the dtype that is written in the configuration; None leaves the base's."""
        if dtype is None or self.library not in ("transformers", "sentence-transformers"):
            return self
        places = list(_dtype_entries(self.config))
        name = str(dtype).removeprefix("torch.")
        return self.with_entries(dict.fromkeys(places or [f".{_DTYPE_ENTRIES[0]}"], name))

    def replaced(self, library: str, made: Mapping[str, bytes], keep: bool, notes: Iterable[str] = ()) -> Companions:
        """The folder of another library: its configuration instead of the base's.

        Args:
            library: that is to open it.
            made: its files.
            keep: whether tokenizers and the like stay; otherwise only licences do.
            notes: more to say.
        """
        configs = (_CONFIG, OPEN_CLIP_CONFIG, _MODULES, "preprocessor_config.json", "processor_config.json")
        kept = {
            name: one
            for name, one in self.files.items()
            if "/" not in name and (_LICENCE.fullmatch(name) or (keep and name not in configs))
        }
        return replace(
            self,
            library=library,
            stem=_STEMS.get(library, "model"),
            files={**kept, **made},
            config=json.loads(made.get(OPEN_CLIP_CONFIG) or made.get(_CONFIG) or b"{}"),
            code=tuple(one for one in self.code if one in kept),
            notes=(*self.notes, *notes),
        )

    def write(self, folder: Path) -> dict[str, str]:
        """Copy or write every file.

        Args:
            folder: to put them in, which exists.

        Returns:
            Name -> SHA-256 of what was written.

        Raises:
            OSError: a file cannot be read, or the disk is full or not writable.
        """
        digests = {}
        for name, one in sorted(self.files.items()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with (folder / name).open("xb") as written:
                for chunk in _chunks(one):
                    digest.update(chunk)
                    written.write(chunk)
            digests[name] = digest.hexdigest()
        return digests


def companions_of(path: str | os.PathLike[str], weights: Sequence[str] = ()) -> Companions:
    """What lies beside the weights in the folder of a model.

    Args:
        path: as a base model is given; of ``hf://owner/name`` the files are downloaded.
        weights: names of the files that the weights are read from; the first tells open_clip's folders from others.

    Returns:
        Its files; none if the path is no folder, or a folder without a library's configuration.

    Raises:
        FileFormatError: the configuration is no JSON object.
        HubError: the files cannot be downloaded.
    """
    address = parse_address(path)
    folder = Path(path) if address is None else fetch(address, also=is_companion, weights=False).folder / address.path
    if not folder.is_dir():
        return Companions()
    main = weights[0] if weights else ""
    library, config = _library(folder, main)
    if not config:
        return Companions()
    listed = _listed_modules(folder)
    found: dict[str, Path | bytes] = {}
    left: dict[str, str] = {}
    for one in sorted(folder.iterdir()):
        if one.is_dir() and not one.is_symlink() and (one.name in listed or one.name == _TEMPLATES):
            for inner in sorted(path for path in one.rglob("*") if path.is_file()):
                _sort_in(inner, inner.relative_to(folder).as_posix(), found, left, one.name not in listed)
        elif one.is_dir() and not one.name.startswith("."):
            left[f"{one.name}/"] = "a folder"
        elif one.name == OPEN_CLIP_CONFIG and library != "open_clip":
            left[one.name] = "of other weights"
        elif not one.is_dir() and one.name not in weights:
            _sort_in(one, one.name, found, left)
    code = tuple([name for name in found if name.endswith(".py")] + _remote_code(config))
    notes = [f"{len(found)} files beside the weights as in the base's folder ({first_few(sorted(found))})"]
    notes += [f"custom code is copied and was not run: {first_few(code, 5)}"] if code else []
    notes += [f"left in the base's folder: {first_few(f'{n} ({why})' for n, why in left.items())}"] if left else []
    return Companions(library, _stem(library, main), found, config, code, tuple(notes))


def is_companion(name: str) -> bool:
    """Whether a file of a repository belongs beside the weights, by its path alone.

    Examples:
        >>> [is_companion(name) for name in ("tokenizer.json", "1_Pooling/config.json", "model.safetensors")]
        [True, True, False]
    """
    outer, _, inner = name.rpartition("/")
    if outer:
        return bool(_MODULE_FOLDER.fullmatch(outer) or outer == _TEMPLATES) and not inner.startswith(".")
    return _reason(name) is None


def listed_companions(folder: Path, models: Sequence[Path]) -> dict[Path, str]:
    """What merges have written beside their weights, as the weights' headers say, as far as it is still there.

    Args:
        folder: that the merges were written into.
        models: files of weights, or indexes of shards, that may be theirs.

    Returns:
        Regular files inside the folder -> SHA-256 that each had; none if the headers cannot be read.
    """
    found: dict[Path, str] = {}
    for model in models:
        try:
            known = json.loads(open_tensors(model).metadata.get("companions", "{}"))
        except (LitMergeError, OSError, ValueError, RecursionError):
            continue
        for name, digest in known.items() if isinstance(known, dict) else ():
            path = folder / name
            plain = not {"", ".", ".."} & set(name.split("/"))
            inside = plain and not any(one.is_symlink() for one in _way(path, folder))
            if inside and path.is_file():
                found[path] = str(digest)
    return found


def earlier_companions(folder: Path, models: Sequence[Path]) -> list[Path]:
    """Those of :func:`listed_companions` that nobody has changed since."""
    return [path for path, digest in listed_companions(folder, models).items() if _digest(path) == digest]


def _library(folder: Path, weights: str) -> tuple[str, dict[str, Any]]:
    """Which library opens a folder, and its configuration; an empty one if there is none."""
    plain = _json_object(folder / _CONFIG)
    if (folder / OPEN_CLIP_CONFIG).is_file() and (not plain or weights.startswith("open_clip")):
        return "open_clip", _json_object(folder / OPEN_CLIP_CONFIG)
    if (folder / _MODULES).is_file() and plain:
        return "sentence-transformers", plain
    if "model_type" in plain or "architectures" in plain:
        return "transformers", plain
    if isinstance(plain.get("architecture"), str):
        return "timm", plain
    return ("diffusers" if "_diffusers_version" in plain else ""), plain


def _stem(library: str, weights: str) -> str:
    own = weights.removesuffix(INDEX_ENDING).removesuffix(".safetensors")
    return own if library in ("", "diffusers") and own and own != weights else _STEMS.get(library, "model")


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except ValueError as error:
        raise FileFormatError(f"{path}: expected a model's configuration as JSON, got {error}. Repair it.") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{path}: expected a JSON object, got {type(content).__name__}. Repair it.")
    return content


def _listed_modules(folder: Path) -> set[str]:
    """The folders of a sentence encoder's modules; those alone belong to it, whatever else lies there."""
    if not (folder / _MODULES).is_file():
        return set()
    try:
        content = read_json(folder / _MODULES)
        paths = {str(module["path"]) for module in content}
    except (ValueError, TypeError, KeyError) as error:
        raise FileFormatError(
            f"{folder / _MODULES}: expected a list of modules with a path each, got something else. Repair it."
        ) from error
    return {path for path in paths if path and not {"/", "\\"} & set(path) and not path.startswith(".")}


def _sort_in(path: Path, name: str, found: dict[str, Path | bytes], left: dict[str, str], limited: bool = True) -> None:
    """Put a file among those that are copied, or those that stay, or neither if nobody would miss it."""
    inner = name.rpartition("/")[2]
    if inner.startswith(".") or _CARD.fullmatch(inner) or _OURS.fullmatch(inner):
        return
    reason = None if "/" in name else _reason(name)
    try:
        status = path.stat()  # of what a link points to, as in the Hub's cache
    except OSError:
        reason = "a broken link"
    else:
        if not stat.S_ISREG(status.st_mode):
            reason = "no regular file"
        elif reason is None and limited and status.st_size > LARGEST:
            reason = f"larger than {LARGEST >> 20} MiB"
    if not name.isprintable():
        name, reason = repr(name), reason or "its name"
    if reason is None:
        found[name] = path
    else:
        left[name] = reason


def _of_tokenizer(name: str) -> bool:
    outer, _, inner = name.rpartition("/")
    return outer == _TEMPLATES if outer else _TOKENIZER.fullmatch(inner) is not None


def _reason(name: str) -> str | None:
    """Why a file of a model's folder is no companion of its weights; None if it is one."""
    if name.startswith(".") or _CARD.fullmatch(name) or _OURS.fullmatch(name):
        return "not of the model"
    if _TRAINING.fullmatch(name) or re.fullmatch(r"(optimizer|scheduler|scaler|rng_state.*|training_args)\.\w+", name):
        return "a training's"
    if _OPAQUE.fullmatch(name):
        return "an archive or a pickle"
    return "other weights" if _WEIGHTS.fullmatch(name) else None


def _remote_code(config: Mapping[str, Any]) -> list[str]:
    """Repositories whose code a configuration names."""
    named = config.get("auto_map")
    values = [one for value in named.values() for one in (value if isinstance(value, list) else [value])] if isinstance(
        named, dict
    ) else []  # fmt: skip
    found = [match[1] for one in values if isinstance(one, str) and (match := _REMOTE_CODE.fullmatch(one))]
    return list(dict.fromkeys(found))


def _places(config: dict[str, Any], name: str) -> list[tuple[dict[str, Any], str]]:
    """The objects that an entry is set in, and its name there."""
    if "." in name:
        *outer, key = name.removeprefix(".").split(".")
        owner = config
        for one in outer:
            owner = owner.setdefault(one, {})
        return [(owner, key)]
    whole = config.get("model_cfg")  # of open_clip
    text = whole.get("text_cfg") if isinstance(whole, dict) else config.get("text_config")
    parts = [config, *([text] if isinstance(text, dict) else [])]
    return [(part, name) for part in parts if name in part] or [(parts[-1], name)]


def _dtype_entries(config: Mapping[str, Any], outer: str = "") -> Iterator[str]:
    """Dotted names of the dtypes in a configuration and its parts; that of a quantisation is another matter."""
    for key, value in config.items():
        if key in _DTYPE_ENTRIES and isinstance(value, str):
            yield f"{outer}.{key}"
        elif isinstance(value, dict) and key != "quantization_config" and "." not in key and outer.count(".") < 4:
            yield from _dtype_entries(value, f"{outer}.{key}")


def _chunks(one: Path | bytes) -> Iterator[bytes]:
    if isinstance(one, bytes):
        yield one
        return
    with one.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _way(path: Path, folder: Path) -> list[Path]:
    """A path and the folders above it, below ``folder``."""
    return [path, *(one for one in path.parents if folder in one.parents)]
