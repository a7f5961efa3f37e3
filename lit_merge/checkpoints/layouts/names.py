"""How open_clip, transformers and timm name and shape the parameters of one and the same CLIP.

open_clip's names (https://github.com/mlfoundations/open_clip, after OpenAI's) are the reference. transformers keeps the
projections of queries, keys and values apart, which open_clip packs into one matrix in that order, and writes the two
projections into the shared space as linear layers, hence transposed. timm gives the class token and the positions
leading dimensions of one, and calls the projection a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from lit_merge.errors import StructureMismatchError, first_few

__all__ = ["BLOCK_LISTS", "Row", "check_shapes", "count_blocks", "rows"]


@dataclass(frozen=True)
class Row:
    """One tensor of a CLIP in two layouts.

    Attributes:
        name: open_clip's name in the whole model, with ``visual.`` for the image tower.
        others: the other layout's names, whose tensors one below the other are this one.
        transposed: the other is the transpose.
        leading: how many leading dimensions of one the other has.
    """

    name: str
    others: tuple[str, ...]
    transposed: bool = False
    leading: int = 0


# Names and shapes in open_clip: each letter is one length, "3d" three times d; e is shared by both towers.
_IMAGE = {
    "class_embedding": "d",
    "positional_embedding": "n d",
    "proj": "d e",
    "conv1.weight": "d c p q",
    "ln_pre.weight": "d",
    "ln_pre.bias": "d",
    "ln_post.weight": "d",
    "ln_post.bias": "d",
}
_TEXT = {
    "positional_embedding": "n d",
    "text_projection": "d e",
    "token_embedding.weight": "v d",
    "ln_final.weight": "d",
    "ln_final.bias": "d",
}
_BLOCK = {
    "ln_1.weight": "d",
    "ln_1.bias": "d",
    "attn.in_proj_weight": "3d d",
    "attn.in_proj_bias": "3d",
    "attn.out_proj.weight": "d d",
    "attn.out_proj.bias": "d",
    "ln_2.weight": "d",
    "ln_2.bias": "d",
    "mlp.c_fc.weight": "m d",
    "mlp.c_fc.bias": "m",
    "mlp.c_proj.weight": "d m",
    "mlp.c_proj.bias": "d",
}

BLOCK_LISTS = {
    "image tower": "transformer.resblocks",
    "open_clip": "transformer.resblocks",
    "transformers": "encoder.layers",
    "timm": "blocks",
}
"""Layout -> the list that a tower's blocks are in."""

# Parts of open_clip's names -> the other library's, first match.
_RENAMED: dict[str, dict[str, str]] = {
    "transformers": {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1": "embeddings.patch_embedding",
        "token_embedding": "embeddings.token_embedding",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "ln_final": "final_layer_norm",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
    "timm": {
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "proj": "head.weight",
        "conv1": "patch_embed.proj",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj": "attn.proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
}
_LEADING = {"class_embedding": 2, "positional_embedding": 1}  # in timm


def rows(layout: str, image_blocks: int, text_blocks: int | None = None, vision: str = "vision_model.") -> list[Row]:
    """All tensors of a CLIP with vision transformer, in open_clip's own order.

    Args:
        layout: ``"open_clip"``, ``"image tower"``, ``"transformers"`` or ``"timm"``.
        image_blocks: blocks of the image tower.
        text_blocks: blocks of the text tower; None: the image tower alone.
        vision: what transformers' names of the image tower begin with.

    Returns:
        One row per tensor, the image tower's first, each with ``visual.``.
    """
    image = [_row(layout, "visual.", name, vision) for name in _tower(_IMAGE, image_blocks)]
    if text_blocks is None:
        return image
    text = [_row(layout, "", name, "text_model.") for name in _tower(_TEXT, text_blocks)]
    return [*image, *text, Row("logit_scale", ("logit_scale",))]


def count_blocks(names: Iterable[str], start: str, what: str) -> int:
    """The number of blocks ``<start>.0.…`` to ``<start>.<L - 1>.…``.

    Raises:
        StructureMismatchError: numbers are missing, or there is no block.
    """
    pattern = re.compile(re.escape(start) + r"\.(\d{1,9})\.")
    numbers = {int(match[1]) for match in map(pattern.match, names) if match}
    if not numbers or max(numbers) != len(numbers) - 1:
        raise StructureMismatchError(
            f"{what}: expected blocks {start}.0, .1, .2 …, got {first_few(sorted(numbers)) or 'none'}. "
            "Use a complete checkpoint."
        )
    return len(numbers)


def check_shapes(shapes: Mapping[str, torch.Size], shown: Mapping[str, str], what: str) -> None:
    """Refuse a CLIP whose tensors do not fit together.

    Args:
        shapes: open_clip's name in the whole model -> shape.
        shown: the same name -> how the message calls it.
        what: how the message calls the checkpoint.

    Raises:
        StructureMismatchError: naming the first tensor that has another shape than the ones before it ask for.
    """
    lengths: dict[str, int] = {}
    for name, shape in shapes.items():
        if name == "logit_scale":
            continue
        tower = "visual." if name.startswith("visual.") else ""
        inner = re.sub(r"^transformer\.resblocks\.\d+\.", "", name.removeprefix(tower))
        letters = (_BLOCK.get(inner) or (_IMAGE if tower else _TEXT)[inner]).split()
        fits = len(letters) == len(shape)
        for letter, length in zip(letters, shape, strict=False):
            factor, symbol = (3, letter[1:]) if letter[0] == "3" else (1, letter)
            known = lengths.setdefault(symbol if symbol == "e" else tower + symbol, length // factor)
            fits = fits and known * factor == length
        if not fits:
            expected = [
                str(int(letter[0]) * lengths[tower + letter[1:]])
                if letter[0] == "3"
                else str(lengths.get(letter if letter == "e" else tower + letter, "any"))
                for letter in letters
            ]
            raise StructureMismatchError(
                f"{what}: expected {shown[name]} of shape ({', '.join(expected)}) with the tensors before it, "
                f"got {tuple(shape)}. Use a complete checkpoint of one model."
            )


def _tower(outside: Mapping[str, str], blocks: int) -> list[str]:
    inside = [f"transformer.resblocks.{index}.{name}" for index in range(blocks) for name in _BLOCK]
    return [*outside, *inside]


def _row(layout: str, tower: str, name: str, start: str) -> Row:
    if layout in ("open_clip", "image tower"):
        return Row(tower + name, (tower + name if layout == "open_clip" else name,))
    if layout == "transformers" and name in ("proj", "text_projection"):
        other = "visual_projection.weight" if name == "proj" else "text_projection.weight"
        return Row(tower + name, (other,), transposed=True)
    block, inner = "", name
    if match := re.match(r"transformer\.resblocks\.(\d+)\.", name):
        block, inner = f"{BLOCK_LISTS[layout]}.{match[1]}.", name[match.end() :]
    if layout == "transformers":
        if inner.startswith("attn.in_proj_"):
            leaf = inner.removeprefix("attn.in_proj_")
            return Row(tower + name, tuple(f"{start}{block}self_attn.{which}_proj.{leaf}" for which in "qkv"))
        return Row(tower + name, (start + block + _renamed(layout, inner),))
    other = block + _renamed(layout, inner)
    return Row(tower + name, (other,), transposed=name == "proj", leading=_LEADING.get(name, 0))


def _renamed(layout: str, inner: str) -> str:
    part = next(part for part in _RENAMED[layout] if inner == part or inner.startswith(part + "."))
    return _RENAMED[layout][part] + inner.removeprefix(part)
