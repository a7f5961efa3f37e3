"""CLIPs under other libraries' names: recognised by their structure, brought to open_clip's names, and back, exactly.

The names of an image tower here are open_clip's without ``visual.``; those of a whole CLIP are open_clip's. Nothing is
read from the checkpoint before a tensor is asked for, but the bias of a timm head, which must be zero. Names and shapes
do not tell the activation function: whether a CLIP computes QuickGELU is up to the architecture it is loaded into.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.checkpoints.layouts.linearised import linearised_pair
from lit_merge.checkpoints.layouts.names import BLOCK_LISTS, Row, check_shapes, count_blocks, rows
from lit_merge.checkpoints.layouts.recognition import NO_PARAMETERS, OPEN_CLIP_TEXT, Recognised, recognise
from lit_merge.checkpoints.layouts.views import Part, Rearranged, Span, as_lazy
from lit_merge.errors import ConfigurationError, StructureMismatchError, did_you_mean, first_few
from lit_merge.files.lazy import LazyMapping, Selected

__all__ = [
    "LAYOUTS",
    "Recognised",
    "check_layout",
    "image_tower",
    "linearised_pair",
    "recognise",
    "rewritten",
    "whole_clip",
    "written_as",
]

LAYOUTS = {"open_clip": "open_clip", "image_tower": "image tower", "transformers": "transformers", "timm": "timm"}
"""What ``write_as`` can be, and the layout that it is."""

_NO_LAYOUTS = {
    "own": "which is what is written without it. Remove it",
    "linearised": "a form that holds θ0 beside θ under numbers, which no library opens. Choose another",
    "pytorch": "a container, not a layout: weights are written as safetensors, which all of them open. Remove it",
    "safetensors": "the container that weights are written in anyway. Remove it",
    "peft": "the layout of adapters, which hold no whole model. Choose another",
}

# What other vision transformers of open_clip have besides: CoCa's pooling, layer scale. Some have no ln_pre.
_VARIANT = re.compile(r"attn_pool(_contrastive)?\..*|.*\.ls_[12]\.gamma")


def image_tower(tensors: Mapping[str, Tensor], recognised: Recognised) -> LazyMapping:
    """The image tower of a CLIP under open_clip's names, without ``visual.``.

    Vision transformers of CLIP's plain kind are checked: every tensor must be there, and shapes must fit together.
    open_clip's other towers (ResNets, timm's trunks, CoCa's pooling) keep the names they have.

    Args:
        tensors: a checkpoint.
        recognised: what :func:`recognise` said about it.

    Returns:
        Lazy, in the dtypes of the checkpoint. ViT: ``conv1.weight`` ``[d, 3, p, p]``, ``class_embedding`` ``[d]``,
        ``positional_embedding`` ``[n, d]``, ``ln_pre``, ``transformer.resblocks.0`` …, ``ln_post``, ``proj``
        ``[d, e]``.

    Raises:
        StructureMismatchError: there is no image tower, its projection or another tensor is missing, there are tensors
            that no rule leaves out, shapes or dtypes do not fit together, or a timm head has a bias.
    """
    layout, what = recognised.layout, f"checkpoint in the layout {recognised.layout!r}"
    if layout not in BLOCK_LISTS:
        advice = "Pair its parameters with names first" if layout == "linearised" else "Keep its own names"
        raise StructureMismatchError(f"{what}: expected a CLIP with an image tower, got none that is known. {advice}.")
    names = _inside(tensors, recognised, leave_out=tuple(recognised.left_out))
    if layout in ("open_clip", "image tower"):
        start = "visual." if layout == "open_clip" else ""
        _refuse_surplus([full for name, full in names.items() if not name.startswith(start)], what)
        tower = {name.removeprefix(start): full for name, full in names.items()}
        if not _is_plain(tower):
            _check_variant(tower, what)
            return Selected(as_lazy(tensors), tower)
    if layout == "timm" and "head.bias" in names:
        bias = names.pop("head.bias")
        if tensors[bias].any():
            raise StructureMismatchError(
                f"{what}: expected a projection without bias, got {bias} with other entries than zero: "
                "a classifier, or a CLIP that was trained on. Keep the checkpoint's own names."
            )
    return _without_visual(_converted(tensors, names, layout, what, text=False))


def whole_clip(tensors: Mapping[str, Tensor], recognised: Recognised) -> LazyMapping:
    """A whole CLIP under open_clip's names: image tower with ``visual.``, text tower, logit scale.

    Args:
        tensors: a checkpoint.
        recognised: what :func:`recognise` said about it: ``"open_clip"`` or ``"transformers"``.

    Returns:
        Lazy, in the dtypes of the checkpoint.

    Raises:
        StructureMismatchError: there is no text tower, tensors are missing or surplus, or shapes or dtypes do not fit
            together.
    """
    what = f"checkpoint in the layout {recognised.layout!r}"
    if recognised.layout not in ("open_clip", "transformers"):
        raise StructureMismatchError(
            f"{what}: expected a whole CLIP with image tower, text tower and logit scale, got no text tower. "
            "Use its image tower alone, or the checkpoint of the whole model."
        )
    names = _inside(tensors, recognised, leave_out=(*NO_PARAMETERS, "head"))
    if recognised.layout == "open_clip":
        _refuse_missing([name for name in ("logit_scale",) if name not in names], what)
        tower = [name.removeprefix("visual.") for name in names if name.startswith("visual.")]
        if any(name.startswith(("text.", "text_decoder.")) for name in names) or not _is_plain(tower):
            known = re.compile(r"visual\..*|logit_(scale|bias)|" + OPEN_CLIP_TEXT.pattern)
            _refuse_surplus([full for name, full in names.items() if not known.fullmatch(name)], what)
            return Selected(as_lazy(tensors), names)
    return _converted(tensors, names, recognised.layout, what, text=True)


def written_as(tensors: Mapping[str, Tensor], layout: str) -> LazyMapping:
    """The inverse of :func:`image_tower` and :func:`whole_clip`: the same entries under another library's names.

    Args:
        tensors: an image tower or a whole CLIP under open_clip's names.
        layout: ``"transformers"`` (an image tower: the names of ``CLIPVisionModelWithProjection``; a whole CLIP: of
            ``CLIPModel``), ``"timm"`` (an image tower alone; the head has a bias of zeros), ``"open_clip"`` (an image
            tower: with ``visual.``) or ``"image tower"``.

    Returns:
        Lazy, in the same dtypes.

    Raises:
        ConfigurationError: the layout is unknown, or has no text tower.
        StructureMismatchError: ``tensors`` are no image tower and no whole CLIP, or of a kind that the other library
            has not.
    """
    if layout not in BLOCK_LISTS:
        raise ConfigurationError(f"layout: expected one of {', '.join(BLOCK_LISTS)}, got {layout!r}. Choose one.")
    recognised = recognise(tensors)
    if recognised.layout not in ("open_clip", "image tower"):
        raise StructureMismatchError(
            f"writing as {layout}: expected open_clip's names, got the layout {recognised.layout!r}. "
            "Bring the checkpoint to them first."
        )
    if layout == "image tower":
        return image_tower(tensors, recognised)
    whole = recognised.layout == "open_clip"
    if layout == "timm" and whole:
        raise ConfigurationError(
            "writing as timm: expected an image tower, got a whole CLIP, whose text tower timm has no names for. "
            "Take the image tower of it first."
        )
    clip = whole_clip(tensors, recognised) if whole else image_tower(tensors, recognised)
    start = "" if whole else "visual."
    if layout == "open_clip":
        return Selected(clip, {start + name: name for name in clip})
    table = rows(
        layout,
        count_blocks(
            clip, "visual.transformer.resblocks" if whole else "transformer.resblocks", f"writing as {layout}"
        ),
        count_blocks(clip, "transformer.resblocks", f"writing as {layout}") if whole else None,
    )
    row_of = {row.name.removeprefix(start): row for row in table}
    _refuse_missing([name for name in row_of if name not in clip], f"writing as {layout}")
    _refuse_surplus([name for name in clip if name not in row_of], f"writing as {layout}")
    parts = dict(part for name, row in row_of.items() for part in _backward(clip, name, row))
    if layout == "timm":
        parts["head.bias"] = Part(parts["head.weight"].shape[:1], parts["head.weight"].dtype, ())
    return Rearranged(clip, parts)


def check_layout(write_as: str) -> str:
    """The layout that a setting ``write_as`` stands for.

    Raises:
        ConfigurationError: there is none of this name, with the reason where a checkpoint can be read in that form.
    """
    if write_as not in LAYOUTS:
        reason = f", {_NO_LAYOUTS[write_as]}." if write_as in _NO_LAYOUTS else ". "
        hint = "" if write_as in _NO_LAYOUTS else did_you_mean(write_as, LAYOUTS, "Use one of them.")
        raise ConfigurationError(f"write_as: expected {', '.join(LAYOUTS)}, got {write_as!r}{reason}{hint}")
    return LAYOUTS[write_as]


def rewritten(tensors: Mapping[str, Tensor], write_as: str) -> tuple[LazyMapping, bool, str]:
    """A CLIP of any layout under the names of another: all of it if there is a place for it, else its image tower.

    Args:
        tensors: a checkpoint.
        write_as: one of :data:`LAYOUTS`.

    Returns:
        The tensors, lazy; whether the text tower is among them; and what is lost, in words.

    Raises:
        ConfigurationError: there is no such layout.
        StructureMismatchError: it is no CLIP, or of a kind that the other library has not.
    """
    layout, recognised = check_layout(write_as), recognise(tensors)
    clip, note = None, ""
    if text := recognised.left_out.get("text tower", ()):
        if layout in ("image tower", "timm"):
            note = f"the text side ({first_few(text)}) has no place in this layout"
        else:
            try:
                clip = whole_clip(tensors, recognised)
            except StructureMismatchError:
                note = f"the text side ({first_few(text)}) is not whole, and is not written"
    whole = clip is not None
    return written_as(image_tower(tensors, recognised) if clip is None else clip, layout), whole, note


def _inside(tensors: Mapping[str, Tensor], recognised: Recognised, leave_out: Iterable[str]) -> dict[str, str]:
    """Name without the prefix -> name in the checkpoint."""
    left_out = {name for rule in leave_out for name in recognised.left_out.get(rule, ())}
    return {name.removeprefix(recognised.prefix): name for name in tensors if name not in left_out}


def _is_plain(tower: Iterable[str]) -> bool:
    """Whether this is the vision transformer that OpenAI's CLIPs have, which the other libraries have too."""
    names = set(tower)
    plain = "class_embedding" in names and not any(map(_VARIANT.fullmatch, names))
    return plain and any(name.startswith("ln_pre.") for name in names)


def _check_variant(tower: Mapping[str, str], what: str) -> None:
    """Of a vision transformer that only open_clip has: nothing is missing, nothing is surplus."""
    if "class_embedding" in tower:
        plain = {row.others[0] for row in rows("image tower", count_blocks(tower, BLOCK_LISTS["image tower"], what))}
        _refuse_missing([name for name in plain if name not in tower and not name.startswith("ln_pre.")], what)
        _refuse_surplus(
            [full for name, full in tower.items() if name not in plain and not _VARIANT.fullmatch(name)], what
        )


def _converted(tensors: Mapping[str, Tensor], names: dict[str, str], layout: str, what: str, text: bool) -> Rearranged:
    """All rows of a plain CLIP, checked; under open_clip's names in the whole model."""
    vision = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    blocks = BLOCK_LISTS[layout]
    image_start, text_start = {
        "open_clip": ("visual.", ""),
        "transformers": (vision, "text_model."),
    }.get(layout, ("", ""))
    table = rows(
        layout,
        count_blocks(names, image_start + blocks, what),
        count_blocks(names, text_start + blocks, what) if text else None,
        vision,
    )
    projection = next(row.others[0] for row in table if row.name == "visual.proj")
    if projection not in names:
        raise StructureMismatchError(
            f"{what}: expected the image tower's projection ({projection}), got a tower without it. "
            "Use a checkpoint with the projection (CLIPModel, CLIPVisionModelWithProjection), or keep its own names."
        )
    asked = {other for row in table for other in row.others}
    _refuse_missing([other for row in table for other in row.others if other not in names], what)
    _refuse_surplus([full for name, full in names.items() if name not in asked], what)
    lazy = as_lazy(tensors)
    parts = {row.name: _forward(lazy, row, [names[other] for other in row.others], what) for row in table}
    shown = {row.name: names[row.others[0]] for row in table}
    check_shapes({name: part.shape for name, part in parts.items()}, shown, what)
    return Rearranged(lazy, parts)


def _forward(tensors: LazyMapping, row: Row, sources: list[str], what: str) -> Part:
    """One of open_clip's tensors, made of the other library's."""
    shapes, dtypes = [tensors.shape(name) for name in sources], {tensors.dtype(name) for name in sources}
    if len({shape[1:] for shape in shapes}) > 1 or len(dtypes) > 1 or (len(shapes) > 1 and len(set(shapes)) > 1):
        got = [f"{name} {tuple(shape)} {tensors.dtype(name)}" for name, shape in zip(sources, shapes, strict=True)]
        raise StructureMismatchError(
            f"{what}: expected projections of one shape and dtype, got {first_few(got)}. "
            "Use a complete checkpoint of one model."
        )
    shape = shapes[0]
    if row.leading and len(shape) > row.leading and set(shape[: row.leading]) == {1}:
        shape = shape[row.leading :]
    elif row.transposed and len(shape) == 2:
        shape = torch.Size(shape[::-1])
    elif len(sources) > 1 and len(shape):
        shape = torch.Size((len(sources) * shape[0], *shape[1:]))
    spans = tuple(Span(name, 0, tensors.shape(name).numel()) for name in sources)
    return Part(torch.Size(shape), dtypes.pop(), spans, row.transposed)


def _backward(clip: LazyMapping, name: str, row: Row) -> Iterator[tuple[str, Part]]:
    """The other library's tensors, made of one of open_clip's."""
    shape, dtype, count = clip.shape(name), clip.dtype(name), len(row.others)
    if row.transposed:
        shape = torch.Size(shape[::-1])
    elif count > 1:
        shape = torch.Size((shape[0] // count, *shape[1:]))
    shape = torch.Size((*(1,) * row.leading, *shape))
    size = shape.numel()
    for index, other in enumerate(row.others):
        yield other, Part(shape, dtype, (Span(name, index * size, (index + 1) * size),), row.transposed)


def _without_visual(clip: Rearranged) -> LazyMapping:
    return Selected(clip, {name.removeprefix("visual."): name for name in clip})


def _refuse_missing(names: Sequence[str], what: str) -> None:
    if names:
        raise StructureMismatchError(
            f"{what}: expected a complete CLIP, got none of {len(names)} tensors ({first_few(names)}). "
            "Use a complete checkpoint, or keep its own names."
        )


def _refuse_surplus(names: Sequence[str], what: str) -> None:
    if names:
        raise StructureMismatchError(
            f"{what}: expected a CLIP and nothing else, got {len(names)} tensors besides ({first_few(names)}). "
            "Remove them, or keep the checkpoint's own names."
        )
