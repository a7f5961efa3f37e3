"""Names of one checkpoint found in another: prefixes, compiled modules and old spellings, for each input by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = ["Alignment", "align"]

# What torch.compile and data-parallel wrappers put between the components of a name, wherever a module was wrapped.
_WRAPPERS = re.compile(r"(?:\A|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Spellings of the same network by older and newer versions of transformers.
_SPELLINGS = (
    (re.compile(r"(LayerNorm|layer_norm|layernorm)\.gamma\Z"), r"\1.weight"),
    (re.compile(r"(LayerNorm|layer_norm|layernorm)\.beta\Z"), r"\1.bias"),
    (re.compile(r"\Alanguage_model\.model\."), "model.language_model."),
    (re.compile(r"\Alanguage_model\.lm_head\."), "lm_head."),
    (re.compile(r"\A(vision_tower|multi_modal_projector)\."), r"model.\1."),
    (re.compile(r"\bparametrizations\.weight\.original0\Z"), "weight_g"),
    (re.compile(r"\bparametrizations\.weight\.original1\Z"), "weight_v"),
)
_ANCHORS = 12  # names whose counterparts say which prefixes there could be
_FEWEST = 0.5  # of the smaller set: fewer names in common are no network's


@dataclass(frozen=True)
class Alignment:
    """Where the parameters of a base are in another checkpoint.

    Attributes:
        names: name in the base -> name in the other one, for all that both have.
        removed: what the other's names begin with instead.
        added: what the base's names begin with there.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    removed: str = ""
    added: str = ""

    def describe(self) -> str:
        """What was done to the names, in words; empty if nothing was."""
        if self.removed and self.added:
            return f"its names begin with {self.removed} where the base's begin with {self.added}"
        if self.removed or self.added:
            whose = "its" if self.removed else "the base's"
            return f"without the prefix {self.removed or self.added} of {whose} names"
        respelled = [(mine, its) for mine, its in self.names.items() if mine != its]
        return (
            f"{len(respelled)} names in another spelling ({respelled[0][1]} is {respelled[0][0]})" if respelled else ""
        )


def align(base: Iterable[str], other: Iterable[str]) -> Alignment:
    """Find the names of a base in another checkpoint.

    Names are compared component by component after what ``torch.compile`` and wrappers put into them is taken out and
    old spellings are made new. If that does not bring the two together, one beginning of the other's names is replaced
    by one of the base's (``model.``, ``bert.``, ``module.``, ``base_model.model.`` …): the pair that the most names
    agree on.

    Args:
        base: all names of θ0.
        other: all names of the checkpoint.

    Returns:
        The names that both have; without any replacement if none brings at least half of the smaller set together.

    Examples:
        >>> align(["layer.0.w", "layer.0.b"], ["model.layer.0.w", "model.layer.0.b", "head.w"]).names
        {'layer.0.w': 'model.layer.0.w', 'layer.0.b': 'model.layer.0.b'}
        >>> align(["bert.layer.0.w", "cls.w"], ["layer.0.w"]).names
        {'bert.layer.0.w': 'layer.0.w'}
        >>> align(["a.w"], ["net._orig_mod.a.w"]).names
        {'a.w': 'net._orig_mod.a.w'}
    """
    mine, its = _plain(base), _plain(other)
    best = Alignment(_joined(mine, its, "", ""))
    if len(best.names) == min(len(mine), len(its)):
        return best
    needed = max(_FEWEST * min(len(mine), len(its)), len(best.names) + 1)
    for removed, added in _candidates(list(mine), list(its)):
        found = _joined(mine, its, removed, added)
        if len(found) >= needed and len(found) > len(best.names):
            best = Alignment(found, removed, added)
    # What is outside the prefix on both sides, such as a projection or a head, has one name.
    taken = set(best.names.values())
    same = {name: its[plain] for plain, name in mine.items() if name not in best.names and plain in its}
    rest = {name: other for name, other in same.items() if other not in taken}
    return Alignment({**best.names, **rest}, best.removed, best.added)


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Plain name -> name as it is; of two that would be the same the first."""
    found: dict[str, str] = {}
    for name in names:
        plain = _WRAPPERS.sub("", name)
        for pattern, spelling in _SPELLINGS:
            plain = pattern.sub(spelling, plain)
        found.setdefault(plain, name)
    return found


def _joined(mine: Mapping[str, str], its: Mapping[str, str], removed: str, added: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for plain, name in mine.items():
        if not plain.startswith(added):
            continue
        other = removed + plain[len(added) :]
        if other in its:
            found[name] = its[other]
    return found


def _candidates(mine: list[str], its: list[str]) -> Iterator[tuple[str, str]]:
    """(what the other's names begin with, what the base's do), from names that end in the same components."""
    endings: dict[str, list[str]] = {}
    for name in its:
        endings.setdefault(_ending(name), []).append(name)
    # The longest names say the most: the insides of blocks.
    anchors = sorted(mine, key=lambda name: (-name.count("."), name))[:: max(len(mine) // _ANCHORS, 1)]
    seen: set[tuple[str, str]] = set()
    for name in anchors:
        for other in endings.get(_ending(name), ()):
            common = _common_end(name, other)
            pair = other[: len(other) - common], name[: len(name) - common]
            if pair != ("", "") and pair not in seen:
                seen.add(pair)
                yield pair


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _common_end(first: str, second: str) -> int:
    """Length of the whole components that two names end in."""
    common: list[str] = []
    for one, other in zip(reversed(first.split(".")), reversed(second.split(".")), strict=False):
        if one != other:
            break
        common.append(one)
    return len(".".join(common))
