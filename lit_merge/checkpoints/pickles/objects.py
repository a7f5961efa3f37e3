"""What a pickle can describe: names, calls that are not made; and which names of the standard library are harmless."""

from __future__ import annotations

import sys
from typing import Any

from lit_merge.files.file_parts import printable

__all__ = [
    "COLLECTIONS",
    "DICTIONARIES",
    "GETATTR",
    "LONGEST_NAME",
    "Call",
    "Malformed",
    "Named",
    "NotPlain",
    "hostile",
    "key_of",
    "known_name",
]

LONGEST_NAME = 500
"""Characters of the name of a module, or of a class or function."""

_LARGEST_KEY = 1 << 60  # larger integers could be chosen to have the same hash

# Of the standard library: plain values, and functions that do nothing but build them.
_BUILT_IN = (
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "long"),
    *("object", "range", "set", "slice", "str", "tuple", "unicode", "xrange"),
)
# "pathlib._local" is what Python 3.13 calls the module of paths.
_PLAIN_MODULES = frozenset({"datetime", "math", "numbers", "pathlib", "pathlib._local", "typing", "zoneinfo"})
_PLAIN = frozenset(
    {
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILT_IN),
        "_codecs.encode",
        "argparse.Namespace",
        "collections.Counter",
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.deque",
        "contextlib.nullcontext",
        "copy_reg._reconstructor",
        "copyreg._reconstructor",
        "decimal.Decimal",
        "fractions.Fraction",
        "functools.partial",
        "logging.getLogger",
        "random.Random",
        "re._compile",
        "types.SimpleNamespace",
        "uuid.UUID",
    }
)
_FORMER_MODULES = frozenset(
    {
        *("__builtin__", "asyncore", "cPickle", "commands", "copy_reg", "distutils", "exceptions", "imp", "os2"),
        *("pipes", "popen2", "posixfile"),
    }
)
DICTIONARIES = frozenset({"collections.OrderedDict", "collections.Counter", "builtins.dict", "__builtin__.dict"})
COLLECTIONS = frozenset(
    f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "list", "tuple")
)
GETATTR = frozenset({"builtins.getattr", "__builtin__.getattr"})


class Malformed(Exception):  # noqa: N818 - never leaves this package: it becomes a FileFormatError
    """What is wrong with the file, as the part of a sentence that follows "got"."""


class Named:
    """A class or function that a file names; it is not imported."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @property
    def dotted(self) -> str:
        """Module and name, joined with a dot."""
        return f"{self.module}.{self.name}"


class Call:
    """An object that a file describes by a call, which is not made.

    Attributes:
        function: the class or function.
        arguments: what it would be called with.
        state: what would be set on the object afterwards; None if nothing.
        items: what would be put into it as into a dict; None if nothing.
        elements: what would be appended to it; None if nothing.
    """

    __slots__ = ("arguments", "elements", "function", "items", "state")

    def __init__(self, function: Named, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.state: Any = None
        self.items: dict[Any, Any] | None = None
        self.elements: list[Any] | None = None

    def append(self, element: Any) -> None:
        """Note one more element."""
        self.extend([element])

    def extend(self, elements: list[Any]) -> None:
        """Note more elements."""
        if self.elements is None:
            self.elements = []
        self.elements.extend(elements)


class NotPlain:
    """A key of a dict that is no plain value."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def known_name(module: str, name: str) -> Named:
    """A name as a pickle gives it.

    Raises:
        Malformed: it belongs to the standard library and builds no plain value.
    """
    named = Named(module, name)
    package = module.partition(".")[0]
    standard = package in sys.stdlib_module_names or package in _FORMER_MODULES
    if standard and module not in _PLAIN_MODULES and named.dotted not in _PLAIN:
        raise hostile(named)
    return named


def hostile(named: Named) -> Malformed:
    """The refusal of a file that asks for this."""
    return Malformed(
        f"a file that asks for {printable(named.dotted)}, which tensors do not need: do not trust it. "
        "Ask its author for a safetensors file or a state dict."
    )


def key_of(value: Any) -> Any:
    """A key whose hash takes no time and is not chosen by the file."""
    kind = type(value)
    if kind in (str, bytes, bool, float, Named, Call) or value is None:
        return value
    return value if kind is int and -_LARGEST_KEY < value < _LARGEST_KEY else NotPlain(value)
