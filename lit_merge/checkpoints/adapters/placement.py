"""Where in a base the parameters of an adapter are: the base's names may begin with more, or with less.

peft saves a classifier's head with its adapter (``modules_to_save``), whether or not the base that it is merged on has
one: such heads do not take part in finding the place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from lit_merge.checkpoints.adapters.additions import is_embedding
from lit_merge.checkpoints.adapters.additions import is_head as is_output_head
from lit_merge.checkpoints.adapters.changes import AdapterParts
from lit_merge.errors import StructureMismatchError, first_few
from lit_merge.files.lazy import LazyMapping
from lit_merge.naming import is_head

__all__ = ["Place", "misfits", "place_of"]

Place = tuple[str, str]
"""What is removed from the start of an adapter's names, and put there, to get the base's."""


def place_of(parts: AdapterParts, base: LazyMapping) -> Place:
    """The only place in the base where all of an adapter's parameters are.

    Raises:
        StructureMismatchError: there is none, or there are several.
    """
    fitting = _fitting(parts, base)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        starts = [repr(added or f"without {removed}") for removed, added in fitting]
        raise StructureMismatchError(
            f"{parts.path}: expected one position in the base where the adapter fits, got {len(fitting)} "
            f"({first_few(starts)}). Use the part of the base that it was trained on."
        )
    missing = [name for name, target in misfits(parts, base).items() if not target] or _missing(parts, base, "", "")
    advice = "Use the base model that it was trained on, with its names."
    if all(is_output_head(name) or is_embedding(name) for name in missing):
        advice = (
            "Where the base has embeddings and head in one tensor, give the folder of a causal model as base, "
            "train with ensure_weight_tying, or save the base untied."
        )
    raise StructureMismatchError(
        f"{parts.path}: expected a base with every parameter that the adapter changes, got none named "
        f"{first_few(missing)}. {advice}"
    )


def misfits(parts: AdapterParts, base: LazyMapping, patterns: Sequence[str] = ()) -> dict[str, str]:
    """What of an adapter the base lacks or has in another shape, where all the rest of the adapter fits.

    Args:
        parts: of the adapter.
        base: the model's tensors; nothing is read.
        patterns: of names that may be missing besides those of heads.

    Returns:
        Parameter -> its name in the base, whose shape is another; ``""`` where the base has none. Nothing if the rest
        has no place in the base, or several.
    """
    asked = {name for name in parts.names() if any(fnmatchcase(name, one) for one in patterns)}
    loose = [name for name in parts.names() if name in asked or (is_head(name) and name in parts.saved)]
    places = _fitting(parts, base) or _fitting(parts.without(loose), base)
    if len(places) != 1:
        return {}
    ((removed, added),) = places
    found = {}
    for name in loose:
        target = added + name.removeprefix(removed)
        saved = parts.saved.get(name)
        if not name.startswith(removed) or target not in base:
            found[name] = ""
        elif saved is not None and parts.tensors.shape(saved) != base.shape(target):
            found[name] = target
    return found


def _fitting(parts: AdapterParts, base: LazyMapping) -> list[Place]:
    """The places where the base has all names; of several, those whose shapes fit."""
    if not _missing(parts, base, "", ""):
        return [("", "")]
    by_name = [one for one in dict.fromkeys(_candidates(parts, base)) if not _missing(parts, base, *one)]
    return [one for one in by_name if _fits(parts, base, *one)] if len(by_name) > 1 else by_name


def _missing(parts: AdapterParts, base: LazyMapping, removed: str, added: str) -> list[str]:
    return [
        name for name in parts.names() if not name.startswith(removed) or added + name.removeprefix(removed) not in base
    ]


def _candidates(parts: AdapterParts, base: LazyMapping) -> Iterator[Place]:
    """Where the first name could be; not checked for the others."""
    first = parts.names()[0]
    for name in base:
        if name.endswith("." + first):
            yield "", name[: -len(first)]
        if first.endswith("." + name):
            yield first[: -len(name)], ""


def _fits(parts: AdapterParts, base: LazyMapping, removed: str, added: str) -> bool:
    try:
        parts.changes(base, removed, added)
    except StructureMismatchError:
        return False
    return True
