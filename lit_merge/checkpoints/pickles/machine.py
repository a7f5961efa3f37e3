"""Pickles as data: what a file says is read by an unpickler that imports nothing and calls nothing.

Python's own unpickler calls whatever the file names. Here a class or function that is named stays a name
(:class:`Named`), and a call of it stays a record (:class:`Call`). What the standard library could be misused for, such
as ``os.system``, has no place among tensors: a file that asks for it is refused.

The opcodes are those of protocols 2 to 5 (https://docs.python.org/3/library/pickletools.html), without the extension
registry, out-of-band buffers and textual persistent names. The standard library's unpickler in Python does those that
only move values; those that call, set attributes or choose keys are ours.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from lit_merge.checkpoints.pickles.objects import (
    COLLECTIONS,
    DICTIONARIES,
    GETATTR,
    LONGEST_NAME,
    Call,
    Malformed,
    Named,
    hostile,
    key_of,
    known_name,
)
from lit_merge.errors import FileFormatError, LitMergeError
from lit_merge.files.file_parts import COPY_AGAIN

__all__ = ["Call", "Malformed", "Named", "Unpickled", "read_pickle"]

_Unpickler: Any = pickle._Unpickler  # the one written in Python
_MOST_NAMES = 10_000
_MOST_OPERATIONS = 2_000_000  # of which a tensor takes about 30


class Unpickled:
    """What a pickle holds.

    Attributes:
        value: None, booleans, numbers, strings, bytes, tuples, lists, dicts, :class:`Named`, :class:`Call`, or what the
            two functions given to :func:`read_pickle` returned. Sets are lists. It may contain itself.
        names: dotted names of the classes and functions it mentions, in their order.
    """

    def __init__(self, value: Any, names: tuple[str, ...]) -> None:
        self.value, self.names = value, names


def read_pickle(
    file: BinaryIO,
    length: int,
    source: object,
    load: Callable[[Any], Any],
    rebuild: Callable[[Named, tuple[Any, ...]], Any],
) -> Unpickled:
    """Read one pickle from the file's position on; the position is then after it.

    Args:
        file: a buffered binary file.
        length: how many bytes the pickle may take at most.
        source: where this is read from, for messages.
        load: persistent identifier -> value.
        rebuild: ``(function, arguments)`` -> value, or ``NotImplemented`` to leave the call a :class:`Call`.

    Raises:
        FileFormatError: the pickle is truncated or malformed, of another protocol, has more than 2 million operations
            or 10,000 names, or names what belongs to Python's standard library and builds no plain value.
    """
    machine = _Machine(file, length, load, rebuild)
    try:
        return Unpickled(machine.load(), tuple(named.dotted for named in machine.named.values()))
    except Malformed as error:
        raise FileFormatError(f"{source}: expected tensors and plain values, got {error}") from error
    except LitMergeError:
        raise
    except (*_PYTHONS_OWN, pickle.UnpicklingError, struct.error) as error:
        raise FileFormatError(
            f"{source}: expected a whole pickle of tensors and plain values, got something else at byte "
            f"{machine.position:,} of it (truncated or damaged?). {COPY_AGAIN}"
        ) from error


# What underflow, wrong types and lengths raise.
_PYTHONS_OWN = (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError)


class _Machine(_Unpickler):
    """Underflow, wrong types and lengths raise whatever Python raises."""

    def __init__(
        self,
        file: BinaryIO,
        length: int,
        load: Callable[[Any], Any],
        rebuild: Callable[[Named, tuple[Any, ...]], Any],
    ) -> None:
        super().__init__(file, encoding="latin-1")  # of the strings of Python 2
        self._file, self._begin, self._length = file, file.tell(), length
        self.persistent_load, self._rebuild = load, rebuild
        self._extra = 0  # operations of what is built in one
        self.named: dict[tuple[str, str], Named] = {}

    @property
    def position(self) -> int:
        return self._file.tell() - self._begin

    def load(self) -> Any:
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []  # the stacks under the marks
        self.append = self.stack.append
        read, methods, count = self._file.read, _METHODS, 0
        while (code := read(1)) != b".":
            count += 1
            if count + self._extra > _MOST_OPERATIONS:
                raise Malformed(f"more than {_MOST_OPERATIONS:,} operations. Save the tensors alone, as a state dict.")
            if code not in methods:
                raise self._unknown(code)
            methods[code](self)
        if self.metastack or self.position > self._length:
            raise ValueError("marks are left, or bytes of something else were read")
        return self.stack.pop()

    def _unknown(self, code: bytes) -> Malformed:
        if not code or self.position > self._length:
            return Malformed(f"the end inside the pickle (truncated?). {COPY_AGAIN}")
        return Malformed(
            f"opcode 0x{code.hex()} at byte {self.position - 1:,} of the pickle, which PyTorch does not write: "
            "damaged, not to be trusted, or not of protocol 2 to 5. Copy it again, or ask for a safetensors file."
        )

    def read(self, count: int) -> bytes:
        """What goes beyond the pickle's end is refused before memory is taken for it."""
        data = self._file.read(count) if count <= self._length - self.position else b""
        if len(data) != count:
            raise ValueError("longer than the pickle")
        return data

    def readline(self) -> bytes:
        line = self._file.readline(LONGEST_NAME + 2)
        if not line.endswith(b"\n"):
            raise ValueError("name")
        return line

    def find_class(self, module: str, name: str) -> Named:
        """A name, which is not followed."""
        if max(len(module), len(name)) > LONGEST_NAME:
            raise ValueError("name")
        named = self.named.get((module, name))
        if named is None:
            if len(self.named) == _MOST_NAMES:
                raise Malformed(f"more than {_MOST_NAMES:,} classes and functions. Save the tensors as a state dict.")
            named = self.named[module, name] = known_name(module, name)
        return named

    def frame(self) -> None:
        """Where a frame ends is of no use here."""
        if int.from_bytes(self.read(8), "little") > self._length - self.position:
            raise ValueError("frame")

    def protocol(self) -> None:
        if self.read(1)[0] not in (2, 3, 4, 5):
            raise ValueError("protocol")

    def take_text(self, size: int) -> None:
        """Strictly UTF-8: half a surrogate could not be printed."""
        self.append(self.read(int.from_bytes(self.read(size), "little")).decode())

    def put_item(self) -> None:
        value = self.stack.pop()
        self._put([self.stack.pop(), value])

    def put_marked(self) -> None:
        self._put(self.pop_mark())

    def _put(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Call:
            if target.items is None:
                target.items = {}
            target = target.items
        if type(target) is not dict or len(values) % 2:
            raise TypeError("items of what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[key_of(key)] = value

    def reduce(self) -> None:
        arguments = self.stack.pop()
        self.append(self._called(self.stack.pop(), arguments))

    def reduce_with_keywords(self) -> None:
        if type(self.stack.pop()) is not dict:
            raise TypeError("keywords")
        self.reduce()

    def _called(self, function: Any, arguments: Any) -> Any:
        """What a call, which is not made, stands for."""
        if type(function) is not Named or type(arguments) is not tuple:
            raise TypeError("call")
        dotted, only = function.dotted, arguments[0] if len(arguments) == 1 else None
        if dotted in GETATTR:
            # A bound method, or a member of an enumeration as some versions of Python write it.
            of, name = arguments
            if type(of) not in (Named, Call) or type(name) is not str or name.startswith("_"):
                raise hostile(function)
        elif dotted in DICTIONARIES and type(only) is list:
            self._extra += len(only)
            return {key_of(key): value for key, value in only}
        elif dotted in DICTIONARIES and type(only) is dict:
            return only
        elif (dotted in DICTIONARIES and not arguments) or (
            dotted == "collections.defaultdict" and len(arguments) <= 1
        ):
            return {}
        elif dotted in COLLECTIONS and len(arguments) <= 1:
            return arguments[0] if arguments else []
        value = self._rebuild(function, arguments)
        return Call(function, arguments) if value is NotImplemented else value

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Call and target.state is None:
            target.state = state
        elif type(target) is not dict:  # the attributes of an OrderedDict are no tensors
            raise TypeError("state")


_PASSIVE = (
    *("MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "BINPERSID"),
)


def _as(name: str) -> Callable[[_Machine], None]:
    return _Unpickler.dispatch[getattr(pickle, name)[0]]


_METHODS: dict[bytes, Callable[[_Machine], None]] = {
    **{getattr(pickle, name): _as(name) for name in _PASSIVE},
    pickle.EMPTY_SET: _as("EMPTY_LIST"),  # elements of a set would have to be hashed
    pickle.FROZENSET: _as("TUPLE"),
    pickle.ADDITEMS: _as("APPENDS"),
    pickle.BYTEARRAY8: _as("BINBYTES8"),
    pickle.FRAME: _Machine.frame,
    pickle.PROTO: _Machine.protocol,
    pickle.SHORT_BINUNICODE: lambda machine: machine.take_text(1),
    pickle.BINUNICODE: lambda machine: machine.take_text(4),
    pickle.BINUNICODE8: lambda machine: machine.take_text(8),
    pickle.SETITEM: _Machine.put_item,
    pickle.SETITEMS: _Machine.put_marked,
    pickle.REDUCE: _Machine.reduce,
    pickle.NEWOBJ: _Machine.reduce,
    pickle.NEWOBJ_EX: _Machine.reduce_with_keywords,
    pickle.BUILD: _Machine.build,
}
