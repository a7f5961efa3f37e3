"""Transforms written as plain data: names with settings, as they stand in a short YAML list.

``[{Trim: {density: 0.2}}, ElectSign, DisjointMean, {LiNeS: {alpha: norm_ratio}}]`` is a chain of four. A name is
that of a transform of :mod:`lit_merge.transforms`, of a recipe, or the import path of a transform of one's own; where
a field is a transform itself, its value is written the same way: a name, a name with settings, or a list of them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from lit_merge.errors import ConfigurationError, did_you_mean, first_few
from lit_merge.transforms.base import OWN, Chain, Transform, chain
from lit_merge.transforms.override import Override, WithOverrides
from lit_merge.transforms.recipes import RECIPES, check_call, check_fields, recipe

__all__ = ["from_parts", "known_parts", "resolve_transform", "with_overrides"]

_OVERRIDE_FIELDS = ("names", "blocks", "parts")


def from_parts(parts: Sequence[str | Mapping[str, Any]]) -> Chain:
    """The chain that a list of parts stands for.

    Args:
        parts: at least one; each the name of a transform or recipe, the import path of another transform, e.g.
            ``my_module.MyTransform``, or a mapping from one of these to its fields.

    Raises:
        ConfigurationError: there is no part, one is of another form, or a name, a field or a value is refused; what is
            misspelt gets the nearest valid name.

    Examples:
        >>> from_parts([{"Trim": {"density": 0.2}}, "Sum"])
        chain(Trim(density=0.2, scope='global'), Sum())
    """
    if isinstance(parts, (str, Mapping)) or not isinstance(parts, Sequence) or not parts:
        raise ConfigurationError(
            f"parts: expected a list of at least one part, got {parts!r}. Use e.g. [{{Trim: {{density: 0.2}}}}, Sum]."
        )
    return chain(*(_part(part) for part in parts))


def with_overrides(transform: Transform, overrides: Sequence[Mapping[str, Any]]) -> WithOverrides:
    """A transform with other parts for some of the parameters.

    Args:
        transform: for all other parameters.
        overrides: in order of precedence, each a mapping with ``parts`` and ``names`` (a regular expression that is
            searched for), ``blocks`` (a list of indices), or both.

    Raises:
        ConfigurationError: there is none, or one has another form, or something in it is refused.
    """
    if isinstance(overrides, (str, Mapping)) or not overrides:
        raise ConfigurationError(
            f"overrides: expected a list of at least one, got {overrides!r}. Leave them out, or list them."
        )
    built = []
    for override in overrides:
        if not isinstance(override, Mapping) or "parts" not in override:
            raise ConfigurationError(
                f"overrides: expected mappings with parts, and names or blocks, got {override!r}. Add what is missing."
            )
        check_fields("overrides", override, _OVERRIDE_FIELDS)
        built.append(Override(from_parts(override["parts"]), override.get("names"), override.get("blocks")))
    return WithOverrides(transform, built)


def known_parts() -> dict[str, Callable[..., Transform]]:
    """Every name that a part can have, and what builds it: the transforms of this package, then the recipes."""
    classes: dict[str, Callable[..., Transform]] = {
        name: OWN[name] for name in sorted(OWN) if OWN[name] not in (Chain, WithOverrides)
    }
    return classes | RECIPES


def _part(part: Any) -> Transform:
    if isinstance(part, str):
        return _build(part, {})
    if isinstance(part, Mapping) and len(part) == 1:
        ((name, fields),) = part.items()
        if fields is None:  # YAML's "- ElectSign:"
            fields = {}
        if not isinstance(fields, Mapping):
            raise ConfigurationError(
                f"part {name}: expected its fields by name, got {fields!r}. Use e.g. {{Trim: {{density: 0.2}}}}."
            )
        return _build(name, fields)
    raise ConfigurationError(
        f"parts: expected a name, or one name with its fields, got {part!r}. Make every part an entry of its own."
    )


def _build(name: Any, fields: Mapping[str, Any]) -> Transform:
    known = known_parts()
    if isinstance(name, str) and "." in name:
        known[name] = _imported(name)
    if name not in known:
        advice = did_you_mean(str(name), known, f"Use one of {first_few(known, 12)}.")
        raise ConfigurationError(f"part: expected a transform or recipe, got {name!r}. {advice}")
    check_call(f"part {name}", known[name], fields)
    return known[name](**_with_transforms(known[name], fields))


def _with_transforms(function: Callable[..., Transform], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a transform or recipe, those that are transforms themselves built from how they are written."""
    hints = get_type_hints(function)
    return {name: _transform(value) if _is_transform(hints.get(name)) else value for name, value in fields.items()}


def _imported(path: str) -> Callable[..., Transform]:
    """A transform of the user's own; only what a user wrote comes here, no header of a file."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ConfigurationError(
            f"part: expected the import path of a transform, got {path!r} ({error}). Start the command where "
            f"{module.partition('.')[0]} can be imported."
        ) from error
    if not (inspect.isclass(found) and issubclass(found, Transform)) or inspect.isabstract(found):
        raise ConfigurationError(
            f"part: expected the import path of a transform, got {path!r}, which is "
            f"{'not there' if found is None else 'something else'}. Name a subclass of lit_merge.transforms.Transform."
        )
    return found


def _is_transform(hint: Any) -> bool:
    return any(inspect.isclass(one) and issubclass(one, Transform) for one in (hint, *get_args(hint)))


def _transform(value: Any) -> Any:
    """A field that is a transform: None and transforms stay, a list is a chain."""
    if value is None or isinstance(value, Transform):
        return value
    return _part(value) if isinstance(value, (str, Mapping)) else from_parts(value)


def resolve_transform(
    recipe_name: str | None,
    settings: Mapping[str, Any] | None,
    transform: Transform | None,
    parts: Sequence[str | Mapping[str, Any]] | None = None,
    overrides: Sequence[Mapping[str, Any]] | None = None,
) -> Transform:
    """The chain that a recipe's name with settings, a transform, or a list of parts stands for.

    Raises:
        ConfigurationError: not exactly one of them is given, or a name, a field or a value is refused.
    """
    given = {"recipe": recipe_name, "transform": transform, "parts": parts}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ConfigurationError(
            f"recipe, transform and parts: expected exactly one of them, got {' and '.join(names) or 'none'}. "
            "Use e.g. recipe: task_arithmetic."
        )
    if settings and recipe_name is None:
        raise ConfigurationError(
            f"settings: expected none beside {names[0]}, got {dict(settings)}. Put them inside it."
        )
    if recipe_name is not None:
        fields = _with_transforms(RECIPES[recipe_name], settings or {}) if recipe_name in RECIPES else {}
        chosen: Transform = recipe(recipe_name, **fields)
    else:
        chosen = transform if transform is not None else from_parts(parts or [])
    return chosen if overrides is None else with_overrides(chosen, overrides)
