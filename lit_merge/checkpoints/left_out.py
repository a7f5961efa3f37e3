"""What a CLIP has besides its image tower, and whether fine-tuning has changed it."""

from __future__ import annotations

from lit_merge.checkpoints.opening import OpenedCheckpoint
from lit_merge.checkpoints.pairing.ties import differing
from lit_merge.errors import StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping, Selected

__all__ = ["changes_left_out", "text_side"]

_RULES = ("text tower", "logit scale")


def text_side(opened: OpenedCheckpoint) -> LazyMapping | None:
    """Text tower and logit scale, under open_clip's names where it is whole, otherwise under the file's; None if none.

    The encoders that the task-arithmetic papers published have all of the text tower but its transformer.
    """
    names = [name for rule in _RULES for name in opened.recognised.left_out.get(rule, ())]
    if not names:
        return None
    try:
        whole = opened.whole_clip()
    except StructureMismatchError:
        return Selected(opened, {name.removeprefix(opened.recognised.prefix): name for name in names})
    return Selected(whole, {name: name for name in whole if not name.startswith("visual.")})


def changes_left_out(pretrained: LazyMapping | None, finetuned: OpenedCheckpoint) -> list[str]:
    """What a task vector of the image tower loses, in words: nothing, if the text side was left as it was.

    Args:
        pretrained: the text side of θ0, or None if that is not known.
        finetuned: θ; what both have of the text side is read, in chunks.
    """
    tuned = None if finetuned.adapter is not None else text_side(finetuned)
    if pretrained is None or tuned is None:
        return []
    both = [name for name in pretrained if name in tuned]
    changed = differing(Selected(pretrained, {name: name for name in both}), tuned)
    if not changed:
        return []
    return [
        f"{len(changed)} of {len(both)} tensors besides the image tower differ from the pre-trained ones "
        f"({first_few(changed)}); the task vector is without this change"
    ]
