"""The rooms of the package and their imports: read from the code, checked by a test, drawn for docs/architecture.md.

``python docs/rooms.py`` writes ``docs/rooms.svg``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lit_merge"

LOOSE = ("_version", "errors", "naming", "params")
"""The files on which everything stands; ``__init__`` and ``__main__`` are the roof."""

ROOMS = {
    "files": "bytes on disk: text, tensors, shards, cache, hf://",
    "functional": "pure functions: linearise, combine, entropy",
    "checkpoints": "other programs' files, opened and differenced",
    "vectors": "task vectors, coefficients, where they are stored",
    "transforms": "task vectors to task vectors; recipes",
    "report": "tables, figures, the page",
    "models": "networks, heads, parametrisations, θ0 + τ",
    "data": "tasks, batches, data modules",
    "metrics": "what is measured of models and vectors",
    "modules": "the LightningModules, objectives, penalties",
    "callbacks": "what happens while a module trains",
    "evaluation": "search, soup, statistics, analysis",
    "suite": "stages, their keys, the engines that run them",
    "commands": "what lit-merge can be told to do",
}
"""The rooms from the ground up, and what is in each."""

ORDER = (*LOOSE, *ROOMS, "__init__", "__main__")
"""From the ground up: each may import those before it, and no other."""


def room_of(module: str) -> str:
    """The room of ``lit_merge.vectors.store``: its folder, or the loose file."""
    return [*module.split("."), "__init__"][1]


@cache
def module_imports(package: Path = PACKAGE) -> dict[str, dict[str, int]]:
    """Module -> modules of the package that it imports, with a line; imports in functions and by name included.

    An import that only a type checker sees is none.
    """
    files = {_name(file, package): file for file in sorted(package.rglob("*.py"))}
    found: dict[str, dict[str, int]] = {}
    for module, file in files.items():
        targets: dict[str, int] = {}
        for node in _executed(ast.parse(file.read_text(encoding="utf-8"))):
            for name in _named(node):
                while name not in files and "." in name:  # a name inside of a module
                    name = name.rpartition(".")[0]
                if name in files and name != module:
                    for executed in {
                        name,
                        *_packages(name),
                    } & files.keys():  # theirs run as well, unless this one is in them
                        if not module.startswith(f"{executed}.") and executed != module:
                            targets.setdefault(executed, getattr(node, "lineno", 0))
        found[module] = targets
    return found


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            waiting += reversed([*ast.iter_child_nodes(node)])


def room_imports(modules: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, list[str]]]:
    """Room -> rooms that it imports, each with the imports that do so, ``module:line -> module``."""
    found: dict[str, dict[str, list[str]]] = {}
    for module, targets in modules.items():
        own = found.setdefault(room_of(module), {})
        for target, line in targets.items():
            if room_of(target) != room_of(module):
                own.setdefault(room_of(target), []).append(f"{module}:{line} -> {target}")
    return found


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def picture(graph: Mapping[str, Iterable[str]]) -> str:
    """The rooms as SVG, the ground at the bottom; a line for every import that no other path implies.

    Of two rooms one above the other the line is straight, otherwise an arc on the right, the wider the further it goes:
    it leaves the upper room and ends, with an arrowhead, in the one that is imported.
    """
    ground = ", ".join(LOOSE[1:])
    bars = {ground: "loose files", **{room: text for room, text in ROOMS.items() if room in graph}}
    rooms = list(bars)
    wide, high, up, left, top = 450, 32, 48, 10, 10
    y = {room: top + up * (len(rooms) - 1 - floor) for floor, room in enumerate(rooms)}
    width, height = left + wide + 160, top + up * len(rooms)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0L8,4L0,8z" fill="#567"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    merged = {room: {ground if to in LOOSE else to for to in graph.get(room, ())} & set(rooms) for room in rooms}
    for room in reversed(rooms):
        implied = {below for target in merged[room] for below in _below(merged, target)}
        for target in sorted(merged[room] - implied, key=rooms.index):
            floors = rooms.index(room) - rooms.index(target)
            start, end = y[room] + high, y[target]
            if floors == 1:
                middle = left + wide // 2
                path = f"M{middle},{start}L{middle},{end}"
            else:
                side, reach = left + wide, 24 * floors
                start, end = y[room] + high - 8, y[target] + 8
                path = f"M{side},{start}C{side + reach},{start} {side + reach},{end} {side + 1},{end}"
            parts.append(f'<path d="{path}" fill="none" stroke="#567" stroke-width="1.3" marker-end="url(#end)"/>')
    for room in rooms:
        shift = 200 if room == ground else 112
        parts.append(
            f'<rect x="{left}" y="{y[room]}" width="{wide}" height="{high}" rx="5" fill="#eef3f8" stroke="#456"/>'
            f'<text x="{left + 10}" y="{y[room] + 21}" font-size="14" font-weight="bold" fill="#123">{room}</text>'
            f'<text x="{left + shift}" y="{y[room] + 21}" font-size="12" fill="#345">{escape(bars[room])}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _below(graph: Mapping[str, Iterable[str]], room: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph.get(room, ()))
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += graph.get(one, ())
    return found


def _name(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _packages(module: str) -> list[str]:
    """The packages that a module is in, but for the whole one."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(2, len(parts))]


def _named(node: ast.AST) -> list[str]:
    """What an import, or a text that can be given to ``import_module``, names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and re.fullmatch(r"lit_merge(\.\w+)+", str(node.value)):
        return [str(node.value)]
    return []


def main() -> None:
    """Write the picture."""
    path = Path(__file__).with_name("rooms.svg")
    path.write_text(picture(room_imports(module_imports())), encoding="utf-8")


if __name__ == "__main__":
    main()
