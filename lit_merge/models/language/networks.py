"""Language models as :class:`~lit_merge.models.network.Network`: sentence encoders, encoder-decoders, causal models.

All of them are read from a folder of transformers, from ``hf://owner/name``, or (causal ones) from a GGUF file. θ0 is
every parameter of the model under the name that transformers gives it, tied ones once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.opening import named_after
from lit_merge.errors import ConfigurationError
from lit_merge.files.text import read_json
from lit_merge.functional.evaluation import evaluating
from lit_merge.models.heads import build_head
from lit_merge.models.language.classifiers import (
    TaskClassifier,
    TaskHead,
    TaskRegressor,
    TwoLayerClassifier,
    TwoLayerRegressor,
    stored_head,
)
from lit_merge.models.language.heads import EncoderTexts, Head, LanguageHead
from lit_merge.models.language.loading import LoadedModel, load_language_model, longest_input
from lit_merge.models.language.modules import (
    CausalModule,
    EncoderDecoderModule,
    LanguageModule,
    PooledEncoder,
    Pooling,
    second_texts,
)
from lit_merge.models.language.tokenization import Kind, Tokenization
from lit_merge.models.network import Network, TaskWords

__all__ = ["CausalNetwork", "LanguageNetwork", "Seq2SeqNetwork", "TextEncoderNetwork"]

_POOLINGS: Mapping[str, Pooling | None] = {
    **{"cls": "cls", "mean": "mean", "lasttoken": "last"},
    **{"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"},
    **{"pooling_mode_max_tokens": None, "pooling_mode_mean_sqrt_len_tokens": None},
    "pooling_mode_weightedmean_tokens": None,
}
"""How sentence-transformers calls a pooling, in newer and older folders; None of those that are not ours."""

DType = Literal["float32", "bfloat16", "float16", "float64"]


class LanguageNetwork(Network):
    """What the three kinds share.

    Attributes:
        folder: with configuration, tokenizer and whatever else belongs to the model.
        vector_features: whether an example's features are one vector, of which those of a whole split can be kept.
        preprocessing: its :class:`~lit_merge.models.language.tokenization.Tokenization`.
    """

    kind: ClassVar[Kind]
    vector_features: ClassVar[bool] = True
    module: LanguageModule
    preprocessing: Tokenization

    def __init__(
        self,
        path: str,
        max_length: int | None,
        max_target_length: int,
        dtype: DType,
        attention: str,
        dropout: float | None,
    ) -> None:
        if dtype not in get_args(DType):
            raise ConfigurationError(f"dtype: expected one of {', '.join(get_args(DType))}, got {dtype!r}.")
        loaded = load_language_model(path, self.kind, getattr(torch, dtype), attention, dropout)
        self.name = named_after(path.removesuffix(".gguf"))
        self.folder, self.files = loaded.folder, loaded.files
        self.repository, self.activations = loaded.repository, loaded.activations
        self.preprocessing = self._tokenization(loaded, path, max_length, max_target_length)
        self.module = self._module(loaded.model)

    def _module(self, model: nn.Module) -> LanguageModule:
        raise NotImplementedError

    def _tokenization(self, loaded: LoadedModel, path: str, length: int | None, target: int) -> Tokenization:
        longest = longest_input(loaded.model, loaded.tokenizer)
        if longest is not None and length is not None and length > longest:
            raise ConfigurationError(
                f"max_length: expected at most {longest}, the positions that {path} has, got {length}. Lower it."
            )
        known = loaded.tokenizer.model_max_length
        usual = min(known if known < 1e9 else 512, longest or 512)
        config: Any = loaded.model.config
        start = getattr(config, "decoder_start_token_id", None)
        return Tokenization(
            loaded.tokenizer, self.kind, usual if length is None else length, min(target, length or usual), start
        )

    @property
    def ties(self) -> Mapping[str, str]:
        """None: :meth:`whole` has tied parameters once."""
        return {}

    def whole(self) -> Mapping[str, Tensor]:
        """Parameters and persistent buffers under transformers' names, tied ones once."""
        parameters = {name: value.detach().cpu() for name, value in self.module.named_parameters()}
        known = set(parameters) | {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        state = self.module.state_dict()
        return {**parameters, **{name: value.detach().cpu() for name, value in state.items() if name not in known}}


class TextEncoderNetwork(LanguageNetwork):
    """A sentence encoder (BERT, RoBERTa, MiniLM, ModernBERT …): texts to pooled features ``[B, d]``.

    A causal model, such as a GPT-2, is one as well: what its last token knows of the text is pooled by ``last``.

    With ``head: class_names`` a task's head is the zero-shot construction of CLIP: every template is filled with every
    class name, the encoder's own unit vectors are averaged per class and brought to length 1, and the logits are
    ``logit_scale`` times the cosine similarities. With ``head: classifier`` it is a linear layer of the task's own,
    which trains with the task, is stored beside its vector and never merged; with ``two_layer`` RoBERTa's two. Of a
    task whose label is a number (``number_column``) it has one output, and is trained on squared errors.

    Args:
        path: a folder of transformers or ``hf://owner/name``.
        pooling: ``mean`` over a text's tokens, ``cls``, the first one's, or ``last``, the last one's; by default what a
            folder of sentence-transformers says, of others ``mean``.
        normalize: whether features have length 1; heads of class names normalise by themselves.
        head: ``class_names``, ``classifier`` or ``two_layer``.
        heads: trained classifiers: a path with ``{task}`` in it, or task -> path, of files that runs wrote or of
            folders of transformers (:func:`~lit_merge.models.language.classifiers.stored_head`); tasks without one get
            a new classifier to train, and where nothing is trained the one that lies beside the task vector.
        logit_scale: factor of the cosine similarities, the inverse of the temperature: at 20, that of sentence
            encoders' training, 0.05.
        max_length: most tokens of a text; by default what model and tokenizer say.
        dtype: of the parameters; what is trained is best in float32.
        attention: transformers' attention, ``sdpa`` or ``eager``.
        dropout: in place of all dropout in the configuration; None to keep it. Without dropout one process sees what
            several do.

    Raises:
        LitMergeError: as for :func:`~lit_merge.models.language.loading.load_language_model`, or a setting is out of
            its range.
    """

    kind: ClassVar[Kind] = "encoder"

    def __init__(
        self,
        path: str,
        pooling: Pooling | None = None,
        normalize: bool = False,
        head: Head = "class_names",
        heads: str | dict[str, str] | None = None,
        logit_scale: float = 20.0,
        max_length: int | None = None,
        dtype: DType = "float32",
        attention: str = "sdpa",
        dropout: float | None = None,
    ) -> None:
        for name, value, valid in (("pooling", pooling or "mean", get_args(Pooling)), ("head", head, get_args(Head))):
            if value not in valid:
                raise ConfigurationError(f"{name}: expected one of {', '.join(valid)}, got {value!r}.")
        if heads is not None and (head == "class_names" or (isinstance(heads, str) and "{task}" not in heads)):
            raise ConfigurationError(
                f"heads: expected a path with {{task}}, or task -> path, with head: classifier, got {heads!r} with "
                f"head: {head}."
            )
        self._pooling, self._normalize, self._head, self._scale = pooling, normalize, head, logit_scale
        self._heads = heads
        super().__init__(path, max_length, 1, dtype, attention, dropout)
        _ = self._texts  # refuses a scale that is none

    @property
    def trains_heads(self) -> bool:  # type: ignore[override]
        """See :attr:`Network.trains_heads`."""
        return self._head != "class_names" and self._heads is None

    def _module(self, model: nn.Module) -> LanguageModule:
        separator = _separator(model, self.preprocessing.tokenizer)
        module = PooledEncoder(model, self._pooling or _pooling_of(self.folder), self._normalize, separator)
        for name, value in module.named_parameters():
            if name.startswith("pooler."):  # no feature depends on it: it stays as it is in the folder
                value.requires_grad_(False)
        return module

    @cached_property
    def _texts(self) -> EncoderTexts:
        assert isinstance(self.module, PooledEncoder)
        return EncoderTexts(self.module, self.preprocessing, self.fingerprint, self._scale)

    def head(self, task: TaskWords) -> nn.Module:
        """The zero-shot head of class names and templates, from the cache if it was built before; or a new classifier.

        Raises:
            ConfigurationError: the task has no classes, or a number and ``class_names``.
            LitMergeError: the file of its classifier is missing, or of other classes.
        """
        regression = getattr(task, "regression", False)
        if regression and self._head == "class_names":
            raise ConfigurationError(
                f"{task.name}: expected a head of the task's own for its number, got class_names. Set head of the "
                "network to classifier or two_layer."
            )
        if not task.classes and not regression:
            raise ConfigurationError(
                f"{task.name}: expected a task with classes for the encoder {self.name}, got one without. Use a "
                "network that predicts tokens."
            )
        if self._head != "class_names":
            return self._own_head(task, regression)
        with evaluating(self.module):
            return build_head(self._texts, list(task.classes), list(task.templates))

    def makes_new_head(self, task: TaskWords) -> bool:
        """Whether the task has a classifier of its own, and ``heads`` names none."""
        return self._head != "class_names" and self._place_of(task) is None

    def _place_of(self, task: TaskWords) -> str | None:
        return self._heads.get(task.name) if isinstance(self._heads, dict) else self._heads

    def _own_head(self, task: TaskWords, regression: bool) -> TaskHead:
        """The task's own, from its file if there is one."""
        place = self._place_of(task)
        if place is not None:
            return stored_head(place.replace("{task}", task.name), task.name, task.classes, regression)
        classifier, regressor = (
            (TaskClassifier, TaskRegressor) if self._head == "classifier" else (TwoLayerClassifier, TwoLayerRegressor)
        )
        return (regressor if regression else classifier)(self.module.config.hidden_size, task.classes)


def _pooling_of(folder: Path) -> Pooling:
    """What the folder of a sentence encoder says; of another model the mean.

    Raises:
        ConfigurationError: it is none of ours.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    settings = read_json(path)
    modes = settings.get("pooling_mode") or [name for name in _POOLINGS if settings.get(name)]
    found = [_POOLINGS.get(name) for name in ([modes] if isinstance(modes, str) else modes)]
    if len(found) != 1 or found[0] is None:
        raise ConfigurationError(f"pooling: expected cls, mean or last in {path}, got {modes}. Set pooling.")
    return found[0]


def _separator(model: Any, tokenizer: Any) -> int | None:
    """The token after which a BERT's second text begins; None of models that do not tell two texts apart."""
    pair, separator = tokenizer("a", "b"), tokenizer.sep_token_id
    types = torch.tensor([pair.get("token_type_ids") or [0]])
    if getattr(model.config, "type_vocab_size", 0) < 2 or separator is None or not types.any():
        return None
    ids = torch.tensor([pair["input_ids"]])
    return separator if torch.equal(second_texts(ids, torch.ones_like(ids), separator), types) else None


class _TokenNetwork(LanguageNetwork):
    vector_features = False
    _length_normalised = False

    def head(self, task: TaskWords) -> nn.Module:
        """Next tokens, and the ranking of answers; it has no parameters."""
        return LanguageHead(self._length_normalised)


class Seq2SeqNetwork(_TokenNetwork):
    """An encoder-decoder (T5, Flan-T5): text to text.

    Args:
        path: a folder of transformers or ``hf://owner/name``.
        length_normalised: whether answers are ranked by the mean of their tokens' log-probabilities instead of the sum.
        max_length: most tokens of a text; by default what the tokenizer says, at most 512.
        max_target_length: most tokens of a target, its end included.
        dtype: of the parameters; what is trained is best in float32.
        attention: transformers' attention, ``sdpa`` or ``eager``.
        dropout: in place of all dropout in the configuration; None to keep it.

    Raises:
        LitMergeError: as for :func:`~lit_merge.models.language.loading.load_language_model`.
    """

    kind: ClassVar[Kind] = "encoder_decoder"

    def __init__(
        self,
        path: str,
        length_normalised: bool = False,
        max_length: int | None = None,
        max_target_length: int = 128,
        dtype: DType = "float32",
        attention: str = "sdpa",
        dropout: float | None = None,
    ) -> None:
        self._length_normalised = length_normalised
        super().__init__(path, max_length, max_target_length, dtype, attention, dropout)

    def _module(self, model: nn.Module) -> LanguageModule:
        return EncoderDecoderModule(model)


class CausalNetwork(_TokenNetwork):
    """A causal language model (GPT-2, Llama, Qwen, SmolLM): texts and what follows them.

    Args:
        path: a folder of transformers, ``hf://owner/name``, or a GGUF file (which needs the package gguf).
        length_normalised: whether answers are ranked by the mean of their tokens' log-probabilities instead of the sum.
        max_length: most tokens of a text and its target together; by default what model and tokenizer say.
        max_target_length: most tokens of a target, its end included.
        dtype: of the parameters; what is trained is best in float32.
        attention: transformers' attention, ``sdpa`` or ``eager``.
        dropout: in place of all dropout in the configuration; None to keep it.

    Raises:
        LitMergeError: as for :func:`~lit_merge.models.language.loading.load_language_model`.
    """

    kind: ClassVar[Kind] = "causal"

    def __init__(
        self,
        path: str,
        length_normalised: bool = False,
        max_length: int | None = None,
        max_target_length: int = 128,
        dtype: DType = "float32",
        attention: str = "sdpa",
        dropout: float | None = None,
    ) -> None:
        self._length_normalised = length_normalised
        super().__init__(path, max_length, max_target_length, dtype, attention, dropout)

    def _module(self, model: nn.Module) -> LanguageModule:
        return CausalModule(model)
