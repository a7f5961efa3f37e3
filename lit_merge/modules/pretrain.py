"""Contrastive pre-training: how the shipped ``lit-tiny`` was made."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_merge.errors import ConfigurationError, NonFiniteError
from lit_merge.functional.attention import fast_attention
from lit_merge.models.encoder import Preprocessing, full_clip_model
from lit_merge.models.weights import save_clip
from lit_merge.modules.protocol import total_steps, warm_up_cosine

__all__ = ["ContrastiveModule", "multi_positive_contrastive_loss"]


def multi_positive_contrastive_loss(logits: Tensor, caption_of_image: Tensor) -> Tensor:
    """CLIP's loss when several images of a batch share a caption.

    The mean of two cross-entropies: each image against the batch's distinct captions, and each distinct caption
    against the images, its target spread evenly over the images that have it. With all captions distinct this is the
    symmetric loss of Radford et al. (2021), figure 3.

    Args:
        logits: scaled similarities of images and distinct captions, ``[B, U]``.
        caption_of_image: index of each image's caption, int64 ``[B]``, every value of 0 … U-1 present.

    Returns:
        A scalar >= 0.
    """
    captions = logits.shape[1]
    to_caption = F.cross_entropy(logits, caption_of_image)
    positive = F.one_hot(caption_of_image, captions).to(logits.dtype).T
    to_image = F.cross_entropy(logits.T, positive / positive.sum(dim=1, keepdim=True))
    return 0.5 * (to_caption + to_image)


class ContrastiveModule(L.LightningModule):
    """Trains a whole CLIP from random weights and writes it as open_clip-loadable safetensors when fit ends.

    Args:
        model: architecture, as for :func:`lit_merge.models.load_clip`.
        learning_rate: peak of AdamW's learning rate.
        weight_decay: of the matrices of both towers; embeddings, biases and norms have none.
        warmup_steps: linear warm-up.
        max_logit_scale: upper bound of the learned scale, as a factor.
        output: file for the weights; None writes nothing.

    Raises:
        ConfigurationError: a number is out of range, or the architecture is unknown.
    """

    def __init__(
        self,
        model: str = "lit-tiny",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 300,
        max_logit_scale: float = 50.0,
        output: str | None = None,
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or max_logit_scale <= 1:
            raise ConfigurationError(
                "learning_rate and max_logit_scale: expected a positive rate and a scale above 1, got "
                f"{learning_rate} and {max_logit_scale}. Use e.g. 1e-3 and 50."
            )
        self.save_hyperparameters()
        clip: Any
        clip, self.tokenizer = full_clip_model(model)
        self.clip: Any = clip  # open_clip's CLIP has more than nn.Module
        size = clip.visual.image_size
        self.preprocessing = Preprocessing(size[0] if isinstance(size, tuple) else size)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """One batch of the contrastive loss."""
        images, tokens, caption_of_image = batch
        with fast_attention(self.device):
            image_features = self.clip.encode_image(images, normalize=True)
            text_features = self.clip.encode_text(tokens, normalize=True)
        scale = self.clip.logit_scale.exp().clamp(max=self.hparams["max_logit_scale"])
        logits = scale * image_features.float() @ text_features.float().T
        loss = multi_positive_contrastive_loss(logits, caption_of_image)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"loss: expected a finite value, got {loss.item()} at step {self.global_step}. Lower learning_rate."
            )
        accuracy = (logits.argmax(1) == caption_of_image).float().mean()
        self.log_dict({"train/loss": loss, "train/accuracy": accuracy, "train/logit_scale": scale}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and a cosine down to 0 at the trainer's last step."""
        settings = self.hparams
        decayed: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.named_parameters():
            (decayed if parameter.ndim >= 2 and "embedding" not in name else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": settings["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=(0.9, 0.98), eps=1e-6)
        total = total_steps(self.trainer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_cosine(settings["warmup_steps"], total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Write the weights in half precision, with how they came about in the header."""
        path = self.hparams["output"]
        if path is None or not self.trainer.is_global_zero:
            return
        state = {name: tensor.detach().cpu() for name, tensor in self.clip.state_dict().items()}
        limit = math.log(self.hparams["max_logit_scale"])
        state["logit_scale"] = state["logit_scale"].clamp(max=limit)
        data = getattr(self.trainer, "datamodule", None)
        save_clip(
            Path(path),
            state,
            {
                "format": "lit-merge/clip/1",
                "model": str(self.hparams["model"]),
                "steps": str(self.trainer.global_step),
                "settings": json.dumps({key: value for key, value in self.hparams.items() if not key.startswith("_")}),
                "images": str(getattr(data, "count", "")),
                "batch_size": str(getattr(data, "batch_size", "")),
                "data": "captioned drawings of lit_merge.data.embedded.captions; no photographs, no handwriting",
                "versions": json.dumps({"torch": str(torch.__version__), "lightning": L.__version__}),
            },
        )
