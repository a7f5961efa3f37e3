"""Tensors under the names that ``state_dict()`` would give them, and plain values, of objects that were not built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_merge.checkpoints.pickles.machine import Call, Malformed, Named
from lit_merge.checkpoints.pickles.tensors import StoredTensor, Unsupported
from lit_merge.files.file_parts import printable

__all__ = ["has_tensors", "is_module", "items_of", "module_tensors", "name_of", "plain", "script_tensors"]

_DEEPEST = 1000
_MOST_VISITS = 500_000
_MOST_CHARACTERS = 32 << 20  # in all names together
_DEEPEST_PLAIN = 50
_MOST_PLAIN = 100_000
_LONGEST_PLAIN = 1 << 20  # characters of a string


def items_of(value: Any) -> dict[Any, Any] | None:
    """The items of a dict or of an object that is one; None for anything else."""
    if type(value) is Call and value.items is not None:
        return value.items
    return value if type(value) is dict else None


def is_module(value: Any) -> bool:
    """Whether this is a ``torch.nn.Module`` as pickles describe it."""
    state = _state(value)
    return type(state.get("_modules")) is dict and type(state.get("_parameters")) is dict


def has_tensors(value: Any) -> bool:
    """Whether this is a module, or a dict with a tensor among its values."""
    return is_module(value) or any(_is_tensor(one) for one in (items_of(value) or {}).values())


def module_tensors(module: Call) -> dict[str, StoredTensor | Unsupported]:
    """Parameters and persistent buffers of a module and the modules in it, in the order of ``state_dict()``.

    Raises:
        Malformed: modules are nested deeper than 1,000, as those that contain themselves, or there are too many.
    """

    def own(state: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
        hidden = state.get("_non_persistent_buffers_set") or ()  # files of older versions have none
        left_out = {name for name in hidden if type(name) is str} if type(hidden) in (list, tuple) else set()
        yield from state["_parameters"].items()
        buffers = state.get("_buffers")
        yield from ((name, value) for name, value in (buffers or {}).items() if name not in left_out)

    return _walk(module, own, lambda state: state["_modules"], is_module)


def script_tensors(module: Call) -> dict[str, StoredTensor | Unsupported]:
    """All tensors that are attributes of a TorchScript module and the modules in it.

    Raises:
        Malformed: as :func:`module_tensors`.
    """
    return _walk(module, lambda state: state.items(), lambda state: state, lambda value: bool(_state(value)))


def _walk(module: Call, own: Any, inner: Any, descends: Any) -> dict[str, StoredTensor | Unsupported]:
    tensors: dict[str, StoredTensor | Unsupported] = {}
    waiting: list[tuple[str, Call, int]] = [("", module, 0)]
    visits = characters = 0
    while waiting:
        prefix, visited, depth = waiting.pop()
        state = _state(visited)
        found = [(prefix + name_of(name), value) for name, value in own(state) if _is_tensor(value)]
        below = [(f"{prefix}{name_of(name)}.", value) for name, value in inner(state).items() if descends(value)]
        visits += 1 + len(found) + len(below)
        characters += sum(len(name) for name, _ in found) + sum(len(name) for name, _ in below)
        if visits > _MOST_VISITS or characters > _MOST_CHARACTERS:
            raise Malformed("more tensors than a model has. Save the tensors alone, as a state dict.")
        if below and depth == _DEEPEST:
            raise Malformed(f"modules nested deeper than {_DEEPEST:,} (one that contains itself?). Save a state dict.")
        tensors.update(found)
        waiting.extend((name, value, depth + 1) for name, value in reversed(below))
    return tensors


def name_of(name: Any) -> str:
    """A tensor's name, which must be a printable string."""
    if type(name) is not str or not name.isprintable():
        raise Malformed(f"one named {printable(plain(name))}. Rename it.")
    return name


def _state(value: Any) -> dict[Any, Any]:
    state = value.state if type(value) is Call else None
    if type(state) is tuple and len(state) == 2:  # attributes and slots
        state = state[0]
    return state if type(state) is dict else {}


def _is_tensor(value: Any) -> bool:
    return type(value) in (StoredTensor, Unsupported)


class _Budget:
    left = _MOST_PLAIN


def plain(value: Any) -> Any:
    """Strings, numbers, booleans, None, and lists and dicts of them; anything else is a string that says what it is.

    It is a tree of its own, of at most 100,000 values and 50 levels: what is beyond is the string ``"<…>"``.
    """
    return _plain(value, 0, _Budget())


def _plain(value: Any, depth: int, budget: _Budget) -> Any:
    budget.left -= 1
    kind = type(value)
    if value is None or kind in (bool, float):
        return value
    if kind is int:
        return value if value.bit_length() <= 64 else "<large integer>"
    if kind is str:
        return value if len(value) <= _LONGEST_PLAIN else f"<string of {len(value):,} characters>"
    if kind is bytes:
        return f"<{len(value):,} bytes>"
    if kind is StoredTensor:
        return f"<tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}>"
    if kind is Named:
        return f"<{printable(value.dotted)}>"
    items = items_of(value)
    if items is None and kind not in (list, tuple):
        return f"<{printable(value.function.dotted)}>" if kind is Call else "<object>"
    if depth == _DEEPEST_PLAIN or budget.left < len(items if items is not None else value):
        return "<…>"
    if items is None:
        return [_plain(one, depth + 1, budget) for one in value]
    return {_key(key): _plain(one, depth + 1, budget) for key, one in items.items()}


def _key(key: Any) -> str:
    return printable(key) if type(key) in (str, float, bool, int) or key is None else "<object>"
