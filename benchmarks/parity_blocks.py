"""What goes forward through the blocks of a network: FusionBench's RegMean++ beside ours, on a tiny vision tower.

Rows of benchmarks/parity.py. The tower has the parts that FusionBench and the authors of FeatCal look for by name, and
is written out here because their releases call the blocks of another version of transformers than today's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from fusion_bench.method.regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.evaluation.calibration import Calibration, RegMeanPlusPlus
from lit_merge.transforms import Transform, weight_average
from lit_merge.vectors import TaskVector, TaskVectors

SEED = 20250731
WIDTH, TOKENS, INPUTS, BLOCKS, HEADS = 12, 5, 6, 3, 2
IMAGES, BATCH_SIZE = 24, 8
OUTSIDE = "post_layernorm"


class Block(nn.Module):
    """Attention and a feed-forward part, each after its normalisation, as in a CLIP of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.self_attn.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(WIDTH, 2 * WIDTH))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor, **masks: Any) -> tuple[Tensor]:
        """``[B, L, d]`` to ``[B, L, d]``."""
        attention, normal = self.self_attn, self.layer_norm1(hidden)
        parts = [getattr(attention, name)(normal) for name in ("q_proj", "k_proj", "v_proj")]
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + attention.out_proj(attended)
        return (hidden + self.mlp(self.layer_norm2(hidden)),)


class Embeddings(nn.Module):
    """Images as rows of numbers to a class token and patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(INPUTS, WIDTH)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        """``[B, L - 1, n]`` to ``[B, L, d]``."""
        first = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([first, self.patch(images)], 1)


class Tower(nn.Module):
    """``vision_model`` with embeddings, a normalisation, blocks, and a normalisation of the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.embeddings, self.vision_model.pre_layrnorm = Embeddings(), nn.LayerNorm(WIDTH)
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.vision_model.post_layernorm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, L - 1, n]`` to the features of the class token, ``[B, d]``."""
        vision = self.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(images))
        for layer in vision.encoder.layers:
            (hidden,) = layer(hidden)
        features: Tensor = vision.post_layernorm(hidden[:, 0])
        return features


@dataclass(frozen=True)
class Towers:
    """θ0, T towers θ_t, and images of every task."""

    base: Tower
    models: dict[str, Tower]
    images: dict[str, Tensor]

    @property
    def vectors(self) -> TaskVectors:
        """τ_t."""
        own = dict(self.base.named_parameters())
        rows = [
            TaskVector({name: value.detach() - own[name].detach() for name, value in model.named_parameters()}, task)
            for task, model in self.models.items()
        ]
        return TaskVectors(rows)

    def calibrated(self, rule: Calibration, start: Transform) -> Tensor:
        """τ of our calibration of a merge, all parameters but the last normalisation in a row."""
        vectors = self.vectors
        merged = start(vectors)
        given = {task: [(batch,) for batch in images.split(BATCH_SIZE)] for task, images in self.images.items()}
        found = {name: merged[name][0] for name in merged} | rule.calibrate(self.base, vectors, merged, given)
        return torch.cat([found[name].flatten() for name in sorted(found) if OUTSIDE not in name])

    def departure(self, merged: nn.Module) -> Tensor:
        """τ of another program's model."""
        own = dict(self.base.named_parameters())
        moved = {name: (value - own[name]).detach() for name, value in merged.named_parameters()}
        return torch.cat([moved[name].flatten() for name in sorted(moved) if OUTSIDE not in name])


def towers(tasks: int, dtype: torch.dtype) -> Towers:
    """The same for every row."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = Tower().to(dtype)
    with torch.no_grad():
        for name, value in base.named_parameters():
            value.copy_(0.3 * drawn(*value.shape) + ("norm" in name and name.endswith("weight")))
    models = {}
    for index in range(tasks):
        models[f"task{index}"] = model = copy.deepcopy(base)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.1 * drawn(*value.shape).to(dtype))
    images = {task: (drawn(1, TOKENS - 1, INPUTS) + drawn(IMAGES, TOKENS - 1, INPUTS)).to(dtype) for task in models}
    return Towers(base, models, images)


class TheirRegMeanPlusPlus(RegMeanAlgorithmForCLIPPlusPlus):
    """FusionBench's on a tower without heads, with images in order."""

    def __init__(self, off_diagonal: float) -> None:
        self.num_regmean_examples, self.exclude_param_names_regex = IMAGES, []
        self.reduce_non_diagonal_ratio, self.weight_transpose = off_diagonal, True

    @property
    def config(self) -> dict[str, Any]:
        """The rest by default."""
        return {}

    def on_regmean_start(self) -> None:
        """No heads are needed."""

    @property
    def fabric(self) -> Any:
        """No accelerator."""
        return SimpleNamespace(setup=lambda module: module, setup_dataloaders=lambda loader: loader)

    def get_input_for_first_layer(self, model: Any, train_dataset: Tensor) -> list[Tensor]:
        """Batches in order: theirs are shuffled, and carry the network's device."""
        vision = model.vision_model
        return [vision.pre_layrnorm(vision.embeddings(batch)).detach() for batch in train_dataset.split(BATCH_SIZE)]


class Pool(BaseModelPool):
    """Stands in for FusionBench's pool of models."""

    def __init__(self, given: Towers) -> None:
        super().__init__({})
        self._given = given

    def named_models(self) -> Iterator[tuple[str, nn.Module]]:
        """θ_t."""
        return iter({task: copy.deepcopy(model) for task, model in self._given.models.items()}.items())

    def load_pretrained_model(self) -> nn.Module:
        """θ0."""
        return copy.deepcopy(self._given.base)

    def load_train_dataset(self, name: str) -> Tensor:
        """A task's images."""
        return self._given.images[name]


@dataclass(frozen=True)
class BlockRow:
    """As ``Row`` of benchmarks/parity.py."""

    method: str
    off_diagonal: float
    reason: str = ""
    paper: str = ""

    @property
    def lit_merge(self) -> str:
        """Ours."""
        return f"weight_average(), RegMeanPlusPlus(off_diagonal={self.off_diagonal})"

    def results(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """What FusionBench makes of two, three and four tasks, and what we do."""
        for tasks in (2, 3, 4):
            given = towers(tasks, dtype)
            yield (
                self.theirs(given),
                given.calibrated(RegMeanPlusPlus(off_diagonal=self.off_diagonal), weight_average()),
            )

    def theirs(self, given: Towers) -> Tensor:
        """FusionBench's merge."""
        return given.departure(TheirRegMeanPlusPlus(self.off_diagonal).run(Pool(given)))


INVERTED = "it solves in the models' dtype, we in float64: in float32 it inverts Σ G_t with an error of its own"


def block_rows() -> list[BlockRow]:
    """RegMean++ with the authors' damping, and without."""
    given = {"reason": INVERTED, "paper": "both"}
    return [BlockRow(f"regmean_plusplus, α = {alpha:g}", alpha, **given) for alpha in (0.95, 1.0)]
