"""A base with the tensors that adapters ask for: a head of its own beside a tied embedding, biases that are zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_merge.checkpoints.adapters.additions import Additions, Extended, model_settings
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.checkpoints.opening import OpenedCheckpoint
from lit_merge.errors import first_few
from lit_merge.models.merging.vocabularies import SameRows
from lit_merge.models.network import FileBase

__all__ = ["extended_base"]


def extended_base(rows: SameRows, inputs: Sequence[OpenedCheckpoint]) -> tuple[SameRows, Additions]:
    """Add what the adapters among the inputs need and the base has not; it computes the same as before.

    Args:
        rows: the base, and what became of its vocabulary.
        inputs: what is merged.

    Returns:
        The same with the larger base, the entries of its configuration and what there is to say; and what was added,
        for the other inputs.
    """
    base, total = rows.base, Additions()
    if not isinstance(base, FileBase):
        return rows, total
    config = model_settings(base.files)
    for one in inputs:
        if one.adapter is not None:
            total |= one.adapter.additions(base.parameters, config)
    if not total:
        return rows, total
    added = [name for name in (*total.copies, *total.zeros) if name not in base.parameters]
    entries = ", ".join(f"{name}: {str(value).lower()}" for name, value in total.settings.items())
    count = f"{len(added)} tensor{'s are' if len(added) != 1 else ' is'} added to the model ({first_few(added)})"
    notes = [f"{count}, whose config.json needs {entries}" if added else f"config.json needs {entries}"]
    larger = base.with_tensors(Extended(as_lazy(base.whole()), total))
    if "tie_word_embeddings" in total.settings:
        vars(larger)["ties"] = {}
    found = replace(
        rows,
        base=larger,
        entries={**rows.entries, **total.settings},
        added=(*total.reasons, *notes),
    )
    return found, total
