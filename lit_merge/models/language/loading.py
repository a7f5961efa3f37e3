"""A folder of transformers as a model with its tokenizer: weights read as data, nothing of the folder executed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.activation import activations_of
from lit_merge.checkpoints.opening import open_model
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, first_few, one_line
from lit_merge.files.hub import Address, fetch, local_path, parse_address
from lit_merge.models.language.tokenization import Kind
from lit_merge.models.merging.companions import is_companion
from lit_merge.params import check_finite

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LoadedModel", "load_classifier", "load_language_model", "longest_input"]

_AUTO = {
    **{"encoder": "AutoModel", "encoder_decoder": "AutoModelForSeq2SeqLM", "causal": "AutoModelForCausalLM"},
    "classifier": "AutoModelForSequenceClassification",
}
_CLASSES = {"encoder": "TextEncoderNetwork", "encoder_decoder": "Seq2SeqNetwork", "causal": "CausalNetwork"}
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
_MAY_BE_MISSING = ("pooler.",)
"""Parts that a sentence encoder does without: they are left out of the model where the weights lack them."""


@dataclass(frozen=True)
class LoadedModel:
    """What a folder holds.

    Attributes:
        model: the transformers model, on the CPU, in evaluation mode.
        tokenizer: a fast tokenizer.
        folder: where its files are; of an address on the Hub the snapshot in the cache.
        files: that the weights were read from.
        repository: ``owner/name`` on the Hub, if it came from there.
        activations: the activation functions of its parts, as its configuration says.
    """

    model: nn.Module
    tokenizer: Any
    folder: Path
    files: tuple[Path, ...]
    repository: str | None
    activations: Mapping[str, str] = field(default_factory=dict)


def load_language_model(
    path: str,
    kind: Kind,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    dropout: float | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer from a folder of transformers, or from a GGUF file.

    The weights are read by :func:`lit_merge.checkpoints.opening.open_model`, be they one file or shards, safetensors
    or PyTorch's own format; tied weights are tied as the configuration says. Code in the folder is never run.

    Args:
        path: the folder, ``hf://owner/name``, or a ``.gguf`` file with its tokenizer inside.
        kind: of model that is wanted.
        dtype: of the parameters.
        attention: transformers' ``attn_implementation``; of models that have no ``sdpa``, ``eager`` instead of it.
        dropout: in place of all dropout of the configuration; None to keep it.

    Raises:
        ConfigurationError: there is no such folder, it lacks its configuration or tokenizer, is of another kind, needs
            code of its own, or a package is not installed.
        FileFormatError: weights are missing or damaged.
        HubError: the Hub refuses it, e.g. a gated model without a token.
        NonFiniteError: a weight is NaN or infinite.
    """
    transformers = _transformers()
    address = parse_address(path)
    where, repository = (local_path(path), None) if address is None else (_snapshot(address), address.repository)
    if where.suffix == ".gguf":
        tokenizer, model = _from_gguf(transformers, where, kind, dtype, attention)
        return LoadedModel(_without_dropout(model, dropout), tokenizer, where.parent, (where,), repository)
    loaded = _from_folder(transformers, path, where, repository, kind, dtype, attention)
    _without_dropout(loaded.model, dropout)
    return loaded


def load_classifier(path: str) -> LoadedModel:
    """Load a sequence classifier with its own head, e.g. a reward model, and its tokenizer; in float32.

    Args:
        path: a folder of transformers, or ``hf://owner/name``.

    Raises:
        LitMergeError: as for :func:`load_language_model`, or the folder has no head.
    """
    transformers, address = _transformers(), parse_address(path)
    where, repository = (local_path(path), None) if address is None else (_snapshot(address), address.repository)
    return _from_folder(transformers, path, where, repository, "classifier", torch.float32, None)


def _from_folder(
    transformers: Any,
    path: str,
    where: Path,
    repository: str | None,
    kind: str,
    dtype: torch.dtype,
    attention: str | None,
) -> LoadedModel:
    """A model of transformers in its folder; ``classifier`` is a kind as well."""
    if not (where / "config.json").is_file():
        got = "nothing" if not where.exists() else "no config.json in it" if where.is_dir() else "a file"
        raise ConfigurationError(
            f"{path}: expected the folder of a transformers model, got {got}. Give the folder with config.json, "
            "weights and tokenizer, or hf://owner/name."
        )
    if not any((where / name).is_file() for name in _TOKENIZERS):
        raise ConfigurationError(
            f"{path}: expected a model with its tokenizer, got none of {first_few(_TOKENIZERS, 8)}. Copy the "
            "tokenizer's files of the model that it was made from into the folder."
        )
    with _refusals(path):
        config = transformers.AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, use_fast=True, local_files_only=True, trust_remote_code=False
        )
    if kind != "classifier":
        _check_kind(path, config, kind)
    opened = open_model(where)
    stored = opened if kind == "classifier" else opened.without_prefix()
    model = _built(transformers, path, kind, config, stored, dtype, attention)
    _check_vocabulary(path, model, tokenizer)
    activations = activations_of(opened)
    return LoadedModel(model, tokenizer, where, opened.files, repository, activations)


def longest_input(model: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens that a model has positions for; None where it has no limit.

    Learned positions of RoBERTa and its like begin after the padding, so that two of them are none.
    """
    config: Any = model.config
    embeddings: Any = getattr(getattr(model, "base_model", model), "embeddings", None)
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if (
        config.model_type == "t5" or "t5" in config.model_type
    ):  # relative positions: n_positions is what it was trained on
        return None
    if positions and (padding := getattr(embeddings, "padding_idx", None)) is not None:
        positions -= padding + 1
    return positions if positions and positions > 0 else None  # XLNet says -1


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(
            "language models: expected the package transformers, got none. Install it: pip install 'lit-merge[text]'."
        ) from error
    return transformers


def _snapshot(address: Address) -> Path:
    """The folder, or the GGUF file, of an address in the cache, with all that a model needs."""
    return fetch(address, also=is_companion).folder / address.path


def _from_gguf(transformers: Any, file: Path, kind: Kind, dtype: torch.dtype, attention: str) -> tuple[Any, Any]:
    """Tokenizer and model of a GGUF file."""
    if kind != "causal":
        raise ConfigurationError(f"{file}: expected a folder for {_CLASSES[kind]}, got a GGUF file. Use CausalNetwork.")
    if not file.is_file():
        raise ConfigurationError(f"{file}: expected a GGUF file, got nothing. Check the path.")
    if find_spec("gguf") is None:
        raise ConfigurationError(f"{file}: expected the package gguf, got none. Install it: pip install gguf.")
    settings = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with _refusals(str(file)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **settings)
        config = transformers.AutoConfig.from_pretrained(file.parent, **settings)
        with torch.device("meta"):
            of_kind = type(transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=dtype, attn_implementation=_available(of_kind, attention), **settings
        )
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)  # its weights are floating-point now, and may be trained
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return tokenizer, model.eval()


def _check_kind(path: str, config: Any, kind: str) -> None:
    if getattr(config, "quantization_config", None):
        raise ConfigurationError(
            f"{path}: expected floating-point weights, got quantised ones (quantization_config). Use the model "
            "that they were made from."
        )
    if bool(config.is_encoder_decoder) == (kind == "encoder_decoder"):
        return
    got = "an encoder-decoder" if config.is_encoder_decoder else "no encoder-decoder"
    other = "encoder_decoder" if config.is_encoder_decoder else "encoder"
    advice = f"Use {_CLASSES[other]}" + ("" if config.is_encoder_decoder else " or CausalNetwork")
    raise ConfigurationError(
        f"{path}: expected a model for {_CLASSES[kind]}, got {got} ({config.model_type}). {advice}."
    )


def _built(
    transformers: Any,
    path: str,
    kind: str,
    config: Any,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype,
    attention: str | None,
) -> Any:
    """The model with these weights; nothing in it is left as it was drawn."""
    check_finite(stored, path)
    auto = getattr(transformers, _AUTO[kind])
    with _refusals(path), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            of_kind = type(auto.from_config(config, trust_remote_code=False))
        attention = _available(of_kind, attention)
        model, found = of_kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(stored),
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )
    missing = [name for name in found["missing_keys"] if not name.startswith(_MAY_BE_MISSING)]
    if missing or found["mismatched_keys"]:
        wrong = missing or [str(one[0]) if isinstance(one, tuple) else str(one) for one in found["mismatched_keys"]]
        what = "none of" if missing else "another shape of"
        raise FileFormatError(
            f"{path}: expected the weights of {type(model).__name__} as config.json describes it, got {what} "
            f"{first_few(sorted(wrong))}. Use the folder of a whole model."
        )
    if found["missing_keys"]:
        model.pooler = None
    return model.eval()


def _available(model: Any, attention: str | None) -> str | None:
    """The attention, or the one with the same results that the kind of model has (DeBERTa, MPNet, Gemma 2, BLOOM)."""
    return "eager" if attention == "sdpa" and not model._supports_sdpa else attention


def _check_vocabulary(path: str, model: Any, tokenizer: Any) -> None:
    rows, largest = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise ConfigurationError(
            f"{path}: expected a tokenizer of at most {rows} tokens, the rows of the embedding, got one with number "
            f"{largest}. Use the tokenizer that the model was trained with."
        )


def _without_dropout(model: Any, dropout: float | None) -> Any:
    if dropout is None:
        return model
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"dropout: expected a number in [0, 1), got {dropout!r}.")
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = float(dropout)
        own = [part, part.config] if hasattr(part, "config") else [part]  # from which a Falcon's blocks read it
        for owner in own:
            for name, value in [*vars(owner).items()]:
                if type(value) not in (int, float):
                    continue
                if "dropout" in name:
                    setattr(owner, name, float(dropout))
                elif "layerdrop" in name:  # whole layers are left out no more often than before
                    setattr(owner, name, min(value, float(dropout)))
    return model


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """What transformers and the libraries below it raise, as one line."""
    from transformers.utils import logging

    before, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except LitMergeError:
        raise
    except Exception as error:  # the libraries raise whatever they like
        line = one_line(error, 200)
        code = "trust_remote_code" in line or "custom code" in line
        raise ConfigurationError(
            f"{path}: expected a model that transformers knows, got one that needs code of its own, which is not run. "
            "Use a model of transformers itself."
            if code
            else f"{path}: expected a model that transformers can load, got {line}."
        ) from error
    finally:
        logging.set_verbosity(before)
        if progress:
            logging.enable_progress_bar()
