"""Zero-shot classification heads: frozen, made of text embeddings, cached on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.cache import Cache

__all__ = ["TextEncoder", "ZeroShotHead", "build_head", "zero_shot_weights"]

# Part of every cache key: raise it when the computation changes.
_CACHE_VERSION = 1
_SAME = 1e-6  # of the elements of rows of length 1


class TextEncoder(Protocol):
    """What a head needs of a model; :class:`lit_merge.models.ClipModel` has it."""

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine similarities."""

    @property
    def text_fingerprint(self) -> str:
        """What tells this text encoder from others."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """N texts -> ``[N, d]``, rows of length 1."""


class ZeroShotHead(nn.Module):
    r"""Classifies image features by their similarity to class embeddings.

    .. math:: \text{logits} = s \, \frac{f}{\lVert f \rVert_2} W^\top

    There is nothing to train: ``weight`` and ``logit_scale`` are buffers.

    Args:
        weight: ``W``, ``[C, d]``, rows of length 1.
        logit_scale: ``s``, positive.
        classes: the C class names, in the order of the rows.

    Raises:
        ConfigurationError: the shapes do not fit, the rows are not of length 1, or the scale is not positive.
    """

    weight: Tensor
    logit_scale: Tensor

    def __init__(self, weight: Tensor, logit_scale: float, classes: Sequence[str]) -> None:
        super().__init__()
        if weight.ndim != 2 or len(weight) != len(classes):
            raise ConfigurationError(
                f"weight: expected one row per class, [{len(classes)}, d], got {list(weight.shape)}. "
                "Use zero_shot_weights()."
            )
        lengths = weight.detach().float().norm(dim=1)
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2):
            worst = int((lengths - 1).abs().nan_to_num(torch.inf).argmax())
            raise ConfigurationError(
                f"weight: expected rows of length 1, got {float(lengths[worst]):.4g} for {classes[worst]!r}. "
                "Normalise the rows, or use zero_shot_weights()."
            )
        if not 0 < logit_scale < float("inf"):
            raise ConfigurationError(f"logit_scale: expected a positive number, got {logit_scale}. CLIP's own is 100.")
        self.classes = tuple(classes)
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("logit_scale", torch.tensor(float(logit_scale), dtype=weight.dtype, device=weight.device))

    def forward(self, features: Tensor) -> Tensor:
        """Raw features ``[B, d]``, of any precision, -> logits ``[B, C]`` in that of the weights."""
        return self.logit_scale * F.normalize(features.to(self.weight.dtype), dim=-1) @ self.weight.T

    def extra_repr(self) -> str:
        """Show the sizes when printed."""
        return (
            f"{len(self.classes)} classes, {self.weight.shape[1]} features, logit_scale={float(self.logit_scale):.4g}"
        )


@torch.no_grad()
def zero_shot_weights(
    clip: TextEncoder, classes: Sequence[str], templates: Sequence[str], batch_size: int = 256
) -> Tensor:
    """Embed class names as CLIP does (Radford et al. 2021, section 3.1.4).

    Every template is filled with every class name and encoded; the unit vectors of a class are averaged over the
    templates, and the average is brought to length 1 again.

    Args:
        clip: encodes the texts.
        classes: C different class names.
        templates: texts with exactly one ``{}`` each.
        batch_size: texts per call of the encoder.

    Returns:
        ``[C, d]``, rows of length 1.

    Raises:
        ConfigurationError: no classes or templates, a class twice, or a template without exactly one ``{}``.
    """
    _check_texts(classes, templates)
    texts = [template.replace("{}", name) for name in classes for template in templates]
    encoded = torch.cat(
        [clip.encode_text(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    )
    per_class = F.normalize(encoded.float(), dim=-1).view(len(classes), len(templates), -1)
    return F.normalize(per_class.mean(dim=1), dim=-1)


def build_head(
    clip: TextEncoder,
    classes: Sequence[str],
    templates: Sequence[str],
    cache_dir: str | Path | None = None,
) -> ZeroShotHead:
    """Build the head of a task, or read it from the cache, in which case the text tower is not needed.

    The key is made of the text encoder's fingerprint, the classes and the templates; see :class:`Cache`.

    Args:
        clip: encodes the texts.
        classes: C different class names, in the order of the labels.
        templates: texts with exactly one ``{}`` each, see :mod:`lit_merge.data.templates`.
        cache_dir: the cache's folder; the user's by default.

    Returns:
        The head, on the CPU.

    Raises:
        ConfigurationError: as :func:`zero_shot_weights`, two classes have the same features, or the cache cannot be
            created.
    """
    _check_texts(classes, templates)
    cache = Cache("heads", cache_dir)
    key = cache.key([_CACHE_VERSION, clip.text_fingerprint, list(classes), list(templates)])
    stored = cache.tensors(key)
    if stored is not None:
        head = ZeroShotHead(stored["weight"], float(stored["logit_scale"]), classes)
    else:
        head = ZeroShotHead(zero_shot_weights(clip, classes, templates).cpu(), clip.logit_scale, classes)
        cache.write_tensors(key, head.state_dict())
    _check_apart(head.weight.detach(), classes)
    return head


def _check_apart(weights: Tensor, classes: Sequence[str]) -> None:
    """Refuse names that a tokenizer takes for the same: none of such classes could ever be told from the other."""
    order = sorted(range(len(classes)), key=lambda place: float(weights[place, 0]))
    for place, one in enumerate(order):
        for other in order[place + 1 :]:
            if float(weights[other, 0] - weights[one, 0]) > _SAME:
                break
            if float((weights[other] - weights[one]).abs().max()) <= _SAME:
                first, second = sorted((one, other))
                raise ConfigurationError(
                    f"classes: expected names that the text encoder tells apart, got {classes[first]!r} and "
                    f"{classes[second]!r}, whose tokens are the same as far as it reads them. Set classes to "
                    "other words for these labels, or train a classifier (head) instead."
                )


def _check_texts(classes: Sequence[str], templates: Sequence[str]) -> None:
    if isinstance(classes, str) or isinstance(templates, str):
        raise ConfigurationError("classes and templates: expected lists of texts, got one text. Put it into a list.")
    if not classes or not templates:
        missing = "classes" if not classes else "templates"
        raise ConfigurationError(f"{missing}: expected at least one, got none. Name the {missing} of the task.")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise ConfigurationError(
            f"classes: expected different names, got {first_few(map(repr, twice))} more than once. "
            "Rename or merge them."
        )
    wrong = [text for text in templates if text.count("{}") != 1 or set("{}") & set(text.replace("{}", ""))]
    if wrong:
        raise ConfigurationError(
            f"templates: expected exactly one {{}} in each, got {first_few(map(repr, wrong))}. "
            "Put {} where the class name belongs."
        )
