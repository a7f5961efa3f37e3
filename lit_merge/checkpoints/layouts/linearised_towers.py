"""The image tower inside a linearised encoder's file, whose parameters have numbers instead of names."""

from __future__ import annotations

import torch

from lit_merge.checkpoints.layouts.names import rows
from lit_merge.checkpoints.layouts.towers import linearised_pair, recognise
from lit_merge.errors import StructureMismatchError
from lit_merge.files.lazy import LazyMapping, Selected
from lit_merge.naming import number_of_blocks

__all__ = ["linearised_towers"]


def linearised_towers(tensors: LazyMapping, tower: LazyMapping) -> tuple[LazyMapping, LazyMapping]:
    """θ0 and θ of a linearised encoder, under the names of an image tower.

    The encoder is the image tower alone, or an open_clip model without its text transformer, as the published ones are;
    what that has besides the image tower is left out. The numbers follow ``named_parameters()``.

    Args:
        tensors: the state dict of the linearised encoder.
        tower: an image tower of that architecture under open_clip's names, of which names and shapes are taken.

    Raises:
        StructureMismatchError: the tower is no vision transformer of CLIP's plain kind, or the numbered parameters are
            those of another architecture.
    """
    names = [row.others[0] for row in rows("image tower", max(1, number_of_blocks(tower)))]
    if set(names) != set(tower):
        raise StructureMismatchError(
            "linearised encoder: expected the vision transformer of a CLIP as pretrained, got another kind of image "
            "tower, the order of whose parameters is not known. Import the model that was not linearised."
        )
    names = sorted(names, key=lambda name: name.startswith("ln_post."))  # which is registered last
    order = [(name, tower.shape(name)) for name in names]
    recognised = recognise(tensors)
    if f"{recognised.prefix}params0.{len(order)}" in tensors:
        order = _beside_text(order, tensors, f"{recognised.prefix}params0.")
    start = "visual." if len(order) > len(names) else ""
    initial, final = linearised_pair(tensors, order)
    chosen = {name: start + name for name in tower}
    return Selected(initial, chosen), Selected(final, chosen)


def _beside_text(tower: list[tuple[str, torch.Size]], tensors: LazyMapping, start: str) -> list[tuple[str, torch.Size]]:
    """The order with what an open_clip model has besides; the lengths of texts and vocabulary are the file's."""

    def length(number: int) -> tuple[int, ...]:
        name = f"{start}{number}"
        return tuple(tensors.shape(name)) if name in tensors else ()

    width = length(0)[-1:]
    projected = dict(tower)["proj"][1:]
    before = {"positional_embedding": length(0)[:1] + width, "text_projection": width + projected, "logit_scale": ()}
    vocabulary = length(len(before) + len(tower))[:1]
    after = {"token_embedding.weight": vocabulary + width, "ln_final.weight": width, "ln_final.bias": width}
    text = {name: torch.Size(shape) for name, shape in {**before, **after}.items()}
    image = [(f"visual.{name}", shape) for name, shape in tower]
    return [*((name, text[name]) for name in before), *image, *((name, text[name]) for name in after)]
