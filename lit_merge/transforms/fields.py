"""Fields of transforms by their addresses, e.g. to search over a chain's ``coefficient``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from numbers import Real
from typing import Any, TypeVar

from lit_merge.errors import ConfigurationError, did_you_mean
from lit_merge.transforms.base import Chain, Transform

__all__ = ["field_path", "field_value", "parts_of", "replace_field"]

Part = TypeVar("Part")

FieldPath = tuple[str | int, ...]
"""How a field is reached: names of dataclass fields, keys of mappings and positions in sequences."""


def replace_field(transform: Transform, field: str, value: Any, *, step: int | None = None) -> Transform:
    """The same transform with another value of one field.

    Args:
        transform: a transform or a chain.
        field: the field's address: ``coefficient``, if exactly one step has it; ``LiNeS.beta``, of the only step of
            that class; ``1.density``, of the step at a position; and on through what a field holds: transforms
            (``ConsensusMask.merge.Trim.density``), one task's number (``Scale.coefficient.digits``) or an element of a
            sequence (``ScaleBlocks.coefficients.0``).
        value: its new value, a number for a number and per-task values for per-task values. A whole number is brought
            to the field's type, and a field that is None takes any value.
        step: position of the step in the chain, for a field that several steps have; the same as ``{step}.{field}``.

    Returns:
        A new transform of the same kind; ``transform`` is unchanged.

    Raises:
        ConfigurationError: the address leads to no field or to several, or the value is of another kind or refused.
    """
    path = field_path(transform, field, step=step)
    present = _value_at(transform, path)
    is_number = isinstance(present, Real), isinstance(value, Real)
    is_switch = isinstance(present, bool), isinstance(value, bool)
    if present is not None and (len(set(is_number)) > 1 or len(set(is_switch)) > 1):
        owner = _value_at(transform, path[:2]) if isinstance(transform, Chain) else transform
        raise ConfigurationError(
            f"{field}: expected a value of the kind of {present!r} in {owner!r}, got {value!r}. "
            "Build the transform anew instead."
        )
    if type(present) is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    changed = _with_value(transform, path, value)
    assert isinstance(changed, Transform)
    return changed


def parts_of(whole: Any, kinds: type[Part] | tuple[type[Part], ...]) -> Iterator[Part]:
    """What is of some kinds in a transform, in order: itself, steps of chains, overrides, merges within others.

    Args:
        whole: a transform, or what one is made of.
        kinds: classes; what is within one of them is not looked at.
    """
    if isinstance(whole, kinds):
        yield whole
    elif isinstance(whole, list | tuple):
        for one in whole:
            yield from parts_of(one, kinds)
    elif isinstance(whole, Transform) or (is_dataclass(whole) and not isinstance(whole, type)):
        yield from parts_of(list(vars(whole).values()), kinds)


def field_value(transform: Transform, field: str) -> Any:
    """The present value of a field; its address is as for :func:`replace_field`.

    Raises:
        ConfigurationError: the address leads to no field or to several.
    """
    return _value_at(transform, field_path(transform, field))


def field_path(transform: Transform, field: str, *, step: int | None = None) -> FieldPath:
    """How the only field with an address is reached.

    Args:
        transform: a transform or a chain.
        field: the address, as for :func:`replace_field`.
        step: position of the step, for a field that several steps have.

    Returns:
        Of a chain, ``("steps", position, …)``; of another transform, the field's name and what follows.

    Raises:
        ConfigurationError: the address leads to no field or to several.

    Examples:
        >>> from lit_merge.transforms import task_arithmetic
        >>> field_path(task_arithmetic(), "Scale.coefficient")
        ('steps', 1, 'coefficient')
    """
    found = list(_find(transform, field.split(".")))
    if step is not None:
        found = [path for path in found if (path[1] if isinstance(transform, Chain) else 0) == step]
    if len(found) != 1:
        known = _addresses(transform)
        steps = ", ".join(dict.fromkeys(str(path[1]) for path in found)) if isinstance(transform, Chain) else "0"
        got = f"{len(found)} (steps {steps}; choose with step=…)" if found else "none"
        hint = "" if found else did_you_mean(field, known, limit=1)
        raise ConfigurationError(
            f"{field}: expected exactly one step of {transform!r} with this field, got {got}. "
            f"{hint}{' ' if hint else ''}Its fields are {', '.join(known) or 'none'}."
        )
    return found[0]


def _find(part: Any, names: Sequence[str]) -> Iterator[FieldPath]:
    """Every place below ``part`` that the names may mean."""
    if not names:
        yield ()
        return
    head, rest = names[0], names[1:]
    if isinstance(part, Chain):
        for position, step in enumerate(part.steps):
            inside = rest if head == str(position) and rest else names
            yield from (("steps", position, *path) for path in _find(step, inside))
    elif isinstance(part, Transform) and rest and head == type(part).__name__:
        yield from _find_in_field(part, rest)
    else:
        yield from _find_in_field(part, names)


def _find_in_field(part: Any, names: Sequence[str]) -> Iterator[FieldPath]:
    head, rest = names[0], names[1:]
    key = _key(part, head)
    if key is not None:
        yield from ((key, *path) for path in _find(_item(part, key), rest))


def _key(part: Any, name: str) -> str | int | None:
    """What ``name`` stands for in a dataclass, a mapping or a sequence; None if there is no such thing."""
    if is_dataclass(part):
        return name if name in _names(part) else None
    if isinstance(part, Mapping):
        return name if name in part else None
    if isinstance(part, Sequence) and not isinstance(part, str) and name.isdecimal() and int(name) < len(part):
        return int(name)
    return None


def _item(part: Any, key: str | int) -> Any:
    return getattr(part, str(key)) if is_dataclass(part) else part[key]


def _value_at(part: Any, path: FieldPath) -> Any:
    for key in path:
        part = _item(part, key)
    return part


def _with_value(part: Any, path: FieldPath, value: Any) -> Any:
    """A copy of ``part`` in which the path leads to ``value``; every part on the way checks its fields anew."""
    if not path:
        return value
    key = path[0]
    changed = _with_value(_item(part, key), path[1:], value)
    if isinstance(part, Mapping):
        return {**part, key: changed}
    if isinstance(key, int):
        return tuple(changed if index == key else item for index, item in enumerate(part))
    return replace(part, **{key: changed})


def _names(part: Any) -> list[str]:
    return [item.name for item in fields(part) if item.init]


def _addresses(part: Any) -> list[str]:
    """The shortest address of every field, those of nested transforms with their owner's."""
    if isinstance(part, Chain):
        inner = [_addresses(step) for step in part.steps]
        kinds = [type(step).__name__ for step in part.steps]
        flat = [address for addresses in inner for address in addresses]
        return [
            address
            if flat.count(address) == 1
            else f"{kinds[position] if kinds.count(kinds[position]) == 1 else position}.{address}"
            for position, addresses in enumerate(inner)
            for address in addresses
        ]
    listed = []
    for name in _names(part) if is_dataclass(part) else []:
        inside = getattr(part, name)
        items = list(enumerate(inside)) if isinstance(inside, tuple) else []
        nested = [f"{name}.{address}" for address in _addresses(inside)]
        nested += [f"{name}.{index}.{address}" for index, item in items for address in _addresses(item)]
        listed += nested or [name]
    return listed
