"""The files that hold a CLIP's weights: read without executing anything, written atomically."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoints.activation import IMAGE_TOWER, activations_of, check_activation
from lit_merge.checkpoints.layouts.recognition import NO_PARAMETERS
from lit_merge.checkpoints.opening import open_model
from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.lazy import LazyMapping, Selected
from lit_merge.files.store import write_tensors
from lit_merge.params import check_finite

__all__ = ["open_weights", "save_clip"]


def save_clip(
    path: str | Path,
    clip_state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a whole CLIP (image tower, text tower, logit scale) as safetensors that open_clip can load.

    The file appears under its name only when complete. Floating tensors are stored as ``dtype``, except scalars such as
    the logit scale, which stay in float32; on loading everything is float32 again.

    Args:
        path: the file to write; its suffix must be ``.safetensors``. Missing folders are created.
        clip_state: ``state_dict()`` of an open_clip model, e.g. of :func:`lit_merge.models.full_clip_model`; its names
            start with ``visual.`` for the image tower.
        metadata: free text for the header, name -> value.
        dtype: floating type of the stored tensors.

    Returns:
        The path written.

    Raises:
        ConfigurationError: the suffix is another one, ``dtype`` is not floating, or ``clip_state`` lacks a tower.
        NonFiniteError: a value is NaN or infinite, or becomes so in ``dtype``.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigurationError(f"{path}: expected a path that ends in .safetensors, got {path.suffix!r}. Rename it.")
    if not dtype.is_floating_point:
        raise ConfigurationError(f"{path}: expected a floating dtype, got {dtype}. Use torch.float16 or torch.float32.")
    visual = [name for name in clip_state if name.startswith("visual.")]
    if not visual or len(visual) == len(clip_state) or "logit_scale" not in clip_state:
        raise ConfigurationError(
            f"{path}: expected the state of a whole CLIP (visual.*, the text tower, logit_scale), "
            f"got {len(clip_state)} names ({first_few(clip_state)}). Use model.state_dict() of the whole model."
        )
    tensors = {
        name: tensor.detach()
        .to("cpu", (torch.float32 if tensor.ndim == 0 else dtype) if tensor.is_floating_point() else tensor.dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in clip_state.items()
    }
    check_finite(tensors, f"{path}: weights in {dtype}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"format": "pt", **(metadata or {})})
    return path


def open_weights(
    path: str | Path, keep: Callable[[str], bool] | None = None, activation: str = "", name: str = ""
) -> LazyMapping:
    """Open a CLIP's weights under open_clip's names, never executing what the file contains.

    Args:
        path: any checkpoint of a CLIP that :func:`~lit_merge.checkpoints.opening.open_checkpoint` opens.
        keep: which names to have; all by default.
        activation: what the image tower that they are loaded into computes; empty if anything will do.
        name: how a message calls that tower.

    Returns:
        Name -> tensor, read when it is asked for, in the file's own dtypes; the image tower's begin with ``visual.``.
        Of a model whose names are of no known layout, its own names.

    Raises:
        FileFormatError: there is no such file, or it is damaged, or something else than weights.
        StructureMismatchError: the names are those of another library, and do not make up a CLIP of open_clip's kind;
            or the weights were trained with another activation function.
    """
    opened = open_model(path)
    if activation:
        check_activation(activation, activations_of(opened).get(IMAGE_TOWER, ""), str(path), name)
    found = opened.recognised
    if found.layout in ("open_clip", "own"):
        tensors = opened.without_prefix()
    elif found.left_out.get("text tower"):
        tensors = opened.whole_clip()
    else:
        tower = opened.image_tower()
        tensors = Selected(tower, {f"visual.{name}": name for name in tower})
    left_out = {name.removeprefix(found.prefix) for rule in NO_PARAMETERS for name in found.left_out.get(rule, ())}
    kept = [name for name in tensors if name not in left_out and (keep is None or keep(name))]
    return Selected(tensors, {name: name for name in kept})
