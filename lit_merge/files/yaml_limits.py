"""A limit on the size of YAML: a few lines of aliases can stand for billions of nodes."""

from __future__ import annotations

from typing import Any

import yaml

from lit_merge.errors import ConfigurationError

__all__ = ["check_yaml"]

_LIMIT = 100_000


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
        root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
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
