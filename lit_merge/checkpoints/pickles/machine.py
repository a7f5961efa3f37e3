"""Pickles as data: what a file says is read by a small interpreter that imports nothing and calls nothing.

Python's own unpickler calls whatever the file names. Here a class or function that is named stays a name
(:class:`Named`), and a call of it stays a record (:class:`Call`). What the standard library could be misused for, such
as ``os.system``, has no place among tensors: a file that asks for it is refused.

The opcodes are those of protocols 2 to 5 (https://docs.python.org/3/library/pickletools.html), without the extension
registry, out-of-band buffers and textual persistent names.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from lit_merge.errors import FileFormatError, LitMergeError
from lit_merge.files.file_parts import COPY_AGAIN
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

__all__ = ["Call", "Malformed", "Named", "Unpickled", "read_pickle"]

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
    """Read one pickle from the file's position on; the position is then behind it.

    Args:
        file: a buffered binary file.
        length: how many bytes the pickle may take at most.
        source: where this is read from, for messages.
        load: persistent identifier -> value.
        rebuild: ``(function, arguments)`` -> value, or ``NotImplemented`` to keep the call as a :class:`Call`.

    Raises:
        FileFormatError: the pickle is truncated or malformed, of another protocol, has more than 2 million operations
            or 10,000 names, or names what belongs to Python's standard library and builds no plain value.
    """
    machine = _Machine(file, length, load, rebuild)
    try:
        value = machine.run()
    except Malformed as error:
        raise FileFormatError(f"{source}: expected tensors and plain values, got {error}") from error
    except LitMergeError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, struct.error, RecursionError, OverflowError) as error:
        raise FileFormatError(
            f"{source}: expected a whole pickle of tensors and plain values, got something else at byte "
            f"{machine.position():,} of it (truncated or damaged?). {COPY_AGAIN}"
        ) from error
    return Unpickled(value, tuple(named.dotted for named in machine.named.values()))


class _Machine:
    """The stack machine; underflow, wrong types and unknown opcodes raise whatever Python raises."""

    def __init__(
        self,
        file: BinaryIO,
        length: int,
        load: Callable[[Any], Any],
        rebuild: Callable[[Named, tuple[Any, ...]], Any],
    ) -> None:
        self._file, self._begin = file, file.tell()
        self._end = self._begin + length
        self._load, self._rebuild = load, rebuild
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}
        self._extra = 0
        self.named: dict[tuple[str, str], Named] = {}

    def position(self) -> int:
        return self._file.tell() - self._begin

    def run(self) -> Any:
        read = self._file.read
        operations = {code: partial(getattr(self, name), *rest) for code, (name, *rest) in _OPERATIONS.items()}
        count = 0
        while True:
            code = read(1)
            if code == b".":
                if self._below or self.position() > self._end - self._begin:
                    raise ValueError("marks are left, or bytes of something else were read")
                return self._stack.pop()
            count += 1
            if count + self._extra > _MOST_OPERATIONS:
                raise Malformed(f"more than {_MOST_OPERATIONS:,} operations. Save the tensors alone, as a state dict.")
            if code not in operations:
                raise self._unknown(code)
            operations[code]()

    def _unknown(self, code: bytes) -> Exception:
        if not code or self.position() > self._end - self._begin:
            return Malformed(f"the end inside the pickle (truncated?). {COPY_AGAIN}")
        return Malformed(
            f"opcode 0x{code.hex()} at byte {self.position() - 1:,} of the pickle, which PyTorch does not write: "
            "damaged, not to be trusted, or not of protocol 2 to 5. Copy it again, or ask for a safetensors file."
        )

    # Reading

    def _take(self, count: int) -> bytes:
        if count < 0 or self._file.tell() + count > self._end:
            raise ValueError("longer than the pickle")
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("truncated")
        return data

    def _number(self, size: int, signed: bool = False) -> int:
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError("truncated")
        return int.from_bytes(data, "little", signed=signed)

    def _marked(self) -> list[Any]:
        """What lies above the topmost mark; the stack is then what lies below it."""
        values, self._stack = self._stack, self._below.pop()
        return values

    # Numbers, strings, constants

    def protocol(self) -> None:
        if self._number(1) not in (2, 3, 4, 5):
            raise ValueError("protocol")

    def frame(self) -> None:
        if self._file.tell() + self._number(8) > self._end:
            raise ValueError("frame")

    def constant(self, value: Any) -> None:
        self._stack.append(value)

    def integer(self, size: int, signed: bool) -> None:
        self._stack.append(self._number(size, signed))

    def long(self, size: int) -> None:
        length = self._number(size, signed=size == 4)
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def real(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def take_text(self, size: int, encoding: str) -> None:
        self._stack.append(self._take(self._number(size)).decode(encoding))

    def take_bytes(self, size: int) -> None:
        self._stack.append(self._take(self._number(size)))

    # Containers

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def empty(self, kind: type[list[Any]] | type[dict[Any, Any]]) -> None:
        self._stack.append(kind())

    def make_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("tuple")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def tuple_marked(self) -> None:
        values = self._marked()
        self._stack.append(tuple(values))

    def append(self) -> None:
        value = self._stack.pop()
        self._extend([value])

    def append_marked(self) -> None:
        values = self._marked()
        self._extend(values)

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Call:
            if target.elements is None:
                target.elements = []
            target = target.elements
        if type(target) is not list:
            raise TypeError("elements of what is no list")
        target.extend(values)

    def put_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._put([key, value])

    def put_marked(self) -> None:
        values = self._marked()
        self._put(values)

    def _put(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is Call:
            if target.items is None:
                target.items = {}
            target = target.items
        if type(target) is not dict or len(values) % 2:
            raise TypeError("items of what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[key_of(key)] = value

    # The stack and the memo

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def pop_marked(self) -> None:
        self._marked()

    def duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def remember(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def remember_at(self, size: int) -> None:
        self._memo[self._number(size)] = self._stack[-1]

    def recall(self, size: int) -> None:
        self._stack.append(self._memo[self._number(size)])

    # Names and calls, none of which is followed

    def name_lines(self) -> None:
        lines = [self._file.readline(LONGEST_NAME + 2) for _ in range(2)]
        if not all(line.endswith(b"\n") for line in lines):
            raise ValueError("name")
        self._name(lines[0][:-1].decode(), lines[1][:-1].decode())

    def name_stacked(self) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > LONGEST_NAME:
            raise TypeError("name")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        named = self.named.get((module, name))
        if named is None:
            if len(self.named) == _MOST_NAMES:
                raise Malformed(f"more than {_MOST_NAMES:,} classes and functions. Save the tensors as a state dict.")
            named = self.named[module, name] = known_name(module, name)
        self._stack.append(named)

    def reduce(self) -> None:
        arguments = self._stack.pop()
        self._call(self._stack.pop(), arguments)

    def reduce_with_keywords(self) -> None:
        keywords = self._stack.pop()
        if type(keywords) is not dict:
            raise TypeError("keywords")
        self.reduce()

    def _call(self, function: Any, arguments: Any) -> None:
        if type(function) is not Named or type(arguments) is not tuple:
            raise TypeError("call")
        dotted = function.dotted
        if dotted in GETATTR:
            # A bound method, or a member of an enumeration as some versions of Python write it.
            of, name = arguments
            if type(of) not in (Named, Call) or type(name) is not str or name.startswith("_"):
                raise hostile(function)
        elif dotted in DICTIONARIES and not arguments:
            return self._stack.append({})
        elif dotted in DICTIONARIES and len(arguments) == 1 and type(arguments[0]) is list:
            self._extra += len(arguments[0])
            return self._stack.append({key_of(key): value for key, value in arguments[0]})
        elif dotted in DICTIONARIES and len(arguments) == 1 and type(arguments[0]) is dict:
            return self._stack.append(arguments[0])
        elif dotted == "collections.defaultdict" and len(arguments) <= 1:
            return self._stack.append({})
        elif dotted in COLLECTIONS and len(arguments) <= 1:
            return self._stack.append(arguments[0] if arguments else [])
        value = self._rebuild(function, arguments)
        self._stack.append(Call(function, arguments) if value is NotImplemented else value)

    def build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is Call and target.state is None:
            target.state = state
        elif type(target) is not dict:  # the attributes of an OrderedDict are no tensors
            raise TypeError("state")

    def persistent(self) -> None:
        self._stack.append(self._load(self._stack.pop()))


_OPERATIONS: dict[bytes, tuple[Any, ...]] = {  # opcode -> method and its arguments
    b"\x80": ("protocol",),
    b"\x95": ("frame",),
    b"N": ("constant", None),
    b"\x88": ("constant", True),
    b"\x89": ("constant", False),
    b")": ("constant", ()),
    b"J": ("integer", 4, True),
    b"K": ("integer", 1, False),
    b"M": ("integer", 2, False),
    b"\x8a": ("long", 1),
    b"\x8b": ("long", 4),
    b"G": ("real",),
    b"\x8c": ("take_text", 1, "utf-8"),
    b"X": ("take_text", 4, "utf-8"),
    b"\x8d": ("take_text", 8, "utf-8"),
    b"U": ("take_text", 1, "latin-1"),  # a str of Python 2
    b"T": ("take_text", 4, "latin-1"),
    b"C": ("take_bytes", 1),
    b"B": ("take_bytes", 4),
    b"\x8e": ("take_bytes", 8),
    b"\x96": ("take_bytes", 8),
    b"(": ("mark",),
    b"\x85": ("make_tuple", 1),
    b"\x86": ("make_tuple", 2),
    b"\x87": ("make_tuple", 3),
    b"t": ("tuple_marked",),
    b"\x91": ("tuple_marked",),
    b"]": ("empty", list),
    b"\x8f": ("empty", list),
    b"}": ("empty", dict),
    b"a": ("append",),
    b"e": ("append_marked",),
    b"\x90": ("append_marked",),
    b"s": ("put_item",),
    b"u": ("put_marked",),
    b"0": ("pop",),
    b"1": ("pop_marked",),
    b"2": ("duplicate",),
    b"\x94": ("remember",),
    b"q": ("remember_at", 1),
    b"r": ("remember_at", 4),
    b"h": ("recall", 1),
    b"j": ("recall", 4),
    b"c": ("name_lines",),
    b"\x93": ("name_stacked",),
    b"R": ("reduce",),
    b"\x81": ("reduce",),
    b"\x92": ("reduce_with_keywords",),
    b"b": ("build",),
    b"Q": ("persistent",),
}
