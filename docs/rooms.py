"""The rooms of the package and their imports: read from the code, checked by a test, drawn for docs/architecture.md.

``python docs/rooms.py`` writes ``docs/rooms.svg``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lit_merge"

ORDER = (
    *("_version", "errors", "naming", "params", "files", "functional", "checkpoints", "vectors", "transforms"),
    *("report", "models", "data", "metrics", "modules", "callbacks", "evaluation", "suite", "commands"),
    *("__init__", "__main__"),
)
"""The rooms from the ground up: each may import those before it, and no other."""


def room_of(module: str) -> str:
    """The room of ``lit_merge.vectors.store``: its folder, or the loose file."""
    return [*module.split("."), "__init__"][1]


def module_imports(package: Path = PACKAGE) -> dict[str, dict[str, int]]:
    """Module -> modules of the package that it imports, with a line; imports in functions and by name included.

    An import that only a type checker sees is none.
    """
    files = {_name(file, package): file for file in sorted(package.rglob("*.py"))}
    found: dict[str, dict[str, int]] = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        unseen = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        targets: dict[str, int] = {}
        for node in ast.walk(tree):
            if id(node) in unseen:
                continue
            for name in _named(node):
                while name not in files and "." in name:  # a name inside of a module
                    name = name.rpartition(".")[0]
                if name in files and name != module:
                    targets.setdefault(name, getattr(node, "lineno", 0))
        found[module] = targets
    return found


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


def picture(graph: Mapping[str, Mapping[str, list[str]]], lines: Mapping[str, int]) -> str:
    """The rooms as SVG, the ground floor at the bottom; an arrow for every import that no other path implies."""
    rooms = [room for room in ORDER if room in graph and not room.startswith("__")]
    level: dict[str, int] = {}
    for room in rooms:
        level[room] = 1 + max((level[target] for target in graph[room] if target in level), default=-1)
    floors = [[room for room in rooms if level[room] == floor] for floor in range(1 + max(level.values()))]
    wide, high, across, up = 132, 34, 156, 70
    width = across * max(map(len, floors)) + 40
    height = up * len(floors) + 30
    place = {}
    for floor, inside in enumerate(floors):
        start = (width - across * len(inside)) / 2
        for position, room in enumerate(inside):
            place[room] = (start + across * position + (across - wide) / 2, height - up * (floor + 1))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="sans-serif">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0,0L8,4L0,8z" fill="#789"/></marker></defs>',
    ]
    for room in rooms:
        direct = set(graph[room]) & set(place)
        implied = {below for target in direct for below in _below(graph, target)}
        for target in sorted(direct - implied):
            (x, y), (to_x, to_y) = place[room], place[target]
            parts.append(
                f'<line x1="{x + wide / 2:.0f}" y1="{y + high:.0f}" x2="{to_x + wide / 2:.0f}" y2="{to_y:.0f}" '
                'stroke="#789" marker-end="url(#end)"/>'
            )
    for room, (x, y) in place.items():
        parts.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide}" height="{high}" rx="6" fill="#eef3f8" stroke="#456"/>'
            f'<text x="{x + wide / 2:.0f}" y="{y + 15:.0f}" text-anchor="middle" font-size="13">{escape(room)}</text>'
            f'<text x="{x + wide / 2:.0f}" y="{y + 28:.0f}" text-anchor="middle" font-size="10" fill="#567">'
            f"{lines[room]:,} lines</text>"
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
    lines: dict[str, int] = {}
    for file in PACKAGE.rglob("*.py"):
        room = room_of(_name(file, PACKAGE))
        lines[room] = lines.get(room, 0) + len(file.read_text(encoding="utf-8").splitlines())
    path = Path(__file__).with_name("rooms.svg")
    path.write_text(picture(room_imports(module_imports()), lines), encoding="utf-8")


if __name__ == "__main__":
    main()
