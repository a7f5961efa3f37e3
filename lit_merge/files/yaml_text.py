"""YAML by the C library where PyYAML has it, and what YAML does that no one means.

That is a few lines that stand for billions of nodes, and a key ``on`` that reads as true.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

try:
    from yaml import CSafeDumper as SafeDumper
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML built without the C library
    from yaml import SafeDumper, SafeLoader  # type: ignore[assignment]

from lit_merge.errors import ConfigurationError

__all__ = ["SafeDumper", "SafeLoader", "check_yaml", "dump_yaml", "load_yaml", "with_plain_keys"]

_LIMIT = 100_000
_TRUTH = re.compile(r"\b(on|off|yes|no)\s*:", re.IGNORECASE)


def load_yaml(text: str, loader: Any = SafeLoader) -> Any:
    """What YAML holds, of plain types only.

    Args:
        text: YAML.
        loader: a subclass of ``SafeLoader`` that reads some values in another way.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, Loader=loader)


def dump_yaml(content: Any, **settings: Any) -> str:
    """YAML of plain types, keys in their order and without escapes.

    Args:
        content: dictionaries, lists, texts, numbers and truth values.
        settings: of :func:`yaml.dump`, over these.
    """
    return yaml.dump(content, Dumper=SafeDumper, **{"sort_keys": False, "allow_unicode": True, **settings})


def check_yaml(text: str, what: str = "config") -> None:
    """Refuse YAML that has more than 100,000 nodes with every alias written out, or one within itself.

    Args:
        text: YAML; other faults in it are for its parser to say.
        what: is it, for the message.

    Raises:
        ConfigurationError: it is too large.
    """
    if len(text) < _LIMIT and not ("&" in text and "*" in text):
        return
    try:
        root = yaml.compose(text, Loader=SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return
    counts: dict[int, int] = {}

    def count(node: Any) -> int:
        if id(node) not in counts:
            counts[id(node)] = _LIMIT + 1  # of a node within itself
            inner = node.value if isinstance(node.value, list) else ()
            parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
            counts[id(node)] = 1 + sum(map(count, parts))
        return counts[id(node)]

    try:
        found = count(root) if root is not None else 0
    except RecursionError:
        found = _LIMIT + 1
    if found > _LIMIT:
        raise ConfigurationError(
            f"{what}: expected YAML of at most {_LIMIT:,} nodes, got more with its aliases (*) written out. Remove "
            "aliases of aliases."
        )


def with_plain_keys(text: str) -> str:
    """The same YAML with quotes around keys like ``on`` and ``no``, which YAML 1.1 reads as true and false."""
    if not _TRUTH.search(text):
        return text
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # marks count characters
    except (yaml.YAMLError, RecursionError):
        return text  # for its parser to say
    seen: set[int] = set()

    def keys(node: Any) -> Iterator[tuple[int, int]]:
        if id(node) in seen or not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
            return
        seen.add(id(node))
        for one in node.value:
            for place, part in enumerate(one if isinstance(one, tuple) else (one,)):
                is_key = isinstance(one, tuple) and place == 0 and isinstance(part, yaml.ScalarNode)
                if is_key and part.style is None and _TRUTH.fullmatch(f"{part.value}:"):
                    yield part.start_mark.index, part.end_mark.index
                yield from keys(part)

    for start, end in sorted(set(keys(root)), reverse=True):
        text = f'{text[:start]}"{text[start:end]}"{text[end:]}'
    return text
