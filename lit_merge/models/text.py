"""The text side of a CLIP: there when a head is built, out of memory otherwise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.models.weights import open_weights
from lit_merge.params import fingerprint

if TYPE_CHECKING:
    from lit_merge.models.encoder import Architecture

__all__ = ["NOT_TEXT", "TextTower", "is_text"]

NOT_TEXT = ("visual", "text_decoder")
"""The parts of a whole model, by the first component of their names, that encoding texts does not need."""


def is_text(name: str) -> bool:
    """Whether a tensor of a whole CLIP belongs to its text side."""
    return name.split(".")[0] not in NOT_TEXT


class TextTower:
    """The text side of a CLIP: loaded from its file when first needed, and droppable.

    Args:
        architecture: the model config.
        path: the file of the whole CLIP's weights, or None if ``module`` is all there is.
        module: the text tower, already built.
    """

    def __init__(self, architecture: Architecture, path: Path | None, module: nn.Module | None = None) -> None:
        self._architecture = architecture
        self._path = path
        self._module = module
        self._tokenizer: Callable[[Sequence[str]], Tensor] | None = None
        self._logit_scale: float | None = None
        self._fingerprint: str | None = None

    @property
    def loaded(self) -> bool:
        """Whether the tower is in memory."""
        return self._module is not None

    @property
    def logit_scale(self) -> float:
        """The learned factor of the cosine similarities, ``exp`` of the stored parameter."""
        if self._logit_scale is None:
            scale = self.tensors().get("logit_scale")
            if scale is None:
                raise FileFormatError(
                    f"{self._path}: expected a whole CLIP with logit_scale, got none. Use a file with the text side."
                )
            self._logit_scale = float(scale.float().exp())
        return self._logit_scale

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the text weights (float32) and of the config that decides what they compute."""
        if self._fingerprint is None:
            state = {name: one.float() for name, one in self.tensors().items() if one.is_floating_point()}
            config = {name: value for name, value in self._architecture.config.items() if name != "vision_cfg"}
            digest = hashlib.sha256(fingerprint(state).encode())
            digest.update(json.dumps(config, sort_keys=True).encode())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts.

        Args:
            texts: N texts.

        Returns:
            float32, ``[N, d]``, rows of length 1.

        Raises:
            ConfigurationError: the tower was dropped and has no file to come back from, or its vocabulary is smaller
                than its tokenizer's.
        """
        if self._module is None:
            self._module = self._load()
        if self._tokenizer is None:
            self._tokenizer = self._architecture.tokenizer()
        tokens = self._tokenizer(list(texts))
        size = self._architecture.config["text_cfg"].get("vocab_size", 49408)
        if (
            "hf_model_name" not in self._architecture.config["text_cfg"]
            and tokens.numel()
            and int(tokens.max()) >= size
        ):
            raise ConfigurationError(
                f"{self._architecture.name}: expected tokens below vocab_size {size}, got {int(tokens.max())}. "
                "Use the vocab_size of the tokenizer, 49408 for CLIP's own."
            )
        device = next(self._module.parameters()).device
        return self._module.encode_text(tokens.to(device), normalize=True)  # type: ignore[operator]

    def drop(self) -> None:
        """Free the tower's memory; the logit scale and the fingerprint stay known."""
        if self._module is not None and self._path is None:
            _ = self.logit_scale, self.fingerprint
        self._module = None

    def tensors(self) -> Mapping[str, Tensor]:
        """The text side under its names in a whole CLIP; from the file, each when it is asked for, if there is one.

        Raises:
            ConfigurationError: the tower was random and has been dropped.
        """
        # The file comes first, so that the fingerprint does not depend on whether the tower is loaded.
        if self._path is not None:
            return open_weights(self._path, is_text)
        if self._module is None:
            raise ConfigurationError(
                f"{self._architecture.name}: the text tower of a randomly initialised model was dropped, and there is "
                "no file to load it from. Build the heads before drop_text()."
            )
        return self._module.state_dict()

    def _load(self) -> nn.Module:
        state = dict(self.tensors())
        if not any(name.startswith(("transformer.", "text.")) for name in state):
            raise FileFormatError(
                f"{self._path}: expected a whole CLIP, whose text tower makes the heads, got one without text "
                "transformer. Set pretrained to the whole CLIP that it was made from."
            )
        return self._architecture.load_text(state, f"text tower of {self._architecture.name} in {self._path}")
