"""The files that hold a CLIP's weights: read without executing anything, written atomically."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, FileFormatError, first_few
from lit_merge.params import check_finite
from lit_merge.vectors.lazy import Computed
from lit_merge.vectors.store import LazyTensors, write_tensors

__all__ = ["open_weights", "read_weights", "save_clip"]

# Three integers that OpenAI's published files carry beside the weights.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


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


def read_weights(path: str | Path, keep: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read a file of named tensors, on the CPU, never executing what it contains.

    Args:
        path: a ``.safetensors`` file, or a PyTorch file of a state dict. A dictionary that holds the state dict under
            ``state_dict`` is opened, and a ``module.`` prefix common to all names is removed.
        keep: which names to return; all by default. Only these are read from a safetensors file.

    Returns:
        Name -> tensor, in the file's own dtypes.

    Raises:
        ConfigurationError: there is no such file.
        FileFormatError: the file is damaged, or holds anything but named tensors.
    """
    return dict(open_weights(path, keep))


def open_weights(path: str | Path, keep: Callable[[str], bool] | None = None) -> Mapping[str, Tensor]:
    """As :func:`read_weights`, but of a safetensors file each tensor is read when it is asked for."""
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"weights: expected a file, got {path}, which is not one. Check the path.")
    if path.suffix != ".safetensors":
        state = _read_torch(path)
        return {name: tensor for name, tensor in state.items() if keep is None or keep(name)}
    stored = LazyTensors(path)
    prefix = _common_prefix(stored)
    names = {name.removeprefix(prefix): name for name in stored}
    kept = {name: (stored.shape(key), stored.dtype(key)) for name, key in names.items() if keep is None or keep(name)}
    return Computed(kept, partial(_named, stored, prefix))


def _named(stored: LazyTensors, prefix: str, name: str) -> Tensor:
    return stored[prefix + name]


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{path}: expected a PyTorch file with nothing but tensors, got one that is damaged or wants to run code. "
            "Save model.state_dict() of it with torch.save, or use safetensors."
        ) from error
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise FileFormatError(
            f"{path}: expected a PyTorch file of a state dict, got {first_line(error)} "
            "Download it again; of a TorchScript archive save the state_dict() first."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise FileFormatError(
            f"{path}: expected a state dict (name -> tensor), got {type(content).__name__}. Save model.state_dict()."
        )
    content = {name: value for name, value in content.items() if name not in _NOT_WEIGHTS}
    others = [f"{name} ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise FileFormatError(
            f"{path}: expected a state dict (name -> tensor), got other values: {first_few(others)}. "
            "Save model.state_dict()."
        )
    prefix = _common_prefix(content)
    return {str(name).removeprefix(prefix): value for name, value in content.items()}


def _common_prefix(names: Iterable[object]) -> str:
    return "module." if all(str(name).startswith("module.") for name in names) else ""


def first_line(error: Exception) -> str:
    """The kind and the first line of another library's error, as one sentence for a message."""
    text = (str(error).strip().splitlines() or ["no reason given"])[0][:200].rstrip(". ")
    return f"{type(error).__name__}: {text}."
