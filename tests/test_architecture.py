"""The house of docs/architecture.md: rooms in one order, no circle of imports, and starting stays light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lit_merge"
MODULES = sorted(PACKAGE.rglob("*.py"))
ONLY_HERE = {  # third-party package -> the only file that imports it
    "open_clip": "models/encoder.py",
    "optuna": "evaluation/search/study.py",
    "ray": "suite/engines/cluster.py",
}


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = loaded(ROOT / "docs" / "rooms.py")
IMPORTS: dict[str, dict[str, int]] = rooms.module_imports()


def test_few_rooms_and_few_loose_files() -> None:
    folders = {file.relative_to(PACKAGE).parts[0] for file in MODULES if len(file.relative_to(PACKAGE).parts) > 1}
    assert len(folders) <= 14
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert {*folders, *(file.stem for file in PACKAGE.glob("*.py"))} == set(rooms.ORDER)


def test_no_circle_over_rooms() -> None:
    assert rooms.circles(rooms.room_imports(IMPORTS)) == []


def test_no_circle_over_files() -> None:
    assert rooms.circles(IMPORTS) == []


@pytest.mark.parametrize("room", rooms.ORDER)
def test_imports_go_downwards(room: str) -> None:
    below = set(rooms.ORDER[: rooms.ORDER.index(room)])
    # What the package itself offers (``from lit_merge import …``) comes from above.
    upwards = {to: how for to, how in rooms.room_imports(IMPORTS).get(room, {}).items() if to not in below}
    assert upwards == {}


def test_circles_are_found() -> None:
    graph = {"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": [], "e": ["e2"], "e2": ["e"]}
    assert rooms.circles(graph) == [["a", "b", "c"], ["e", "e2"]]


def test_lazy_imports_and_names_count(tmp_path: Path) -> None:
    package = tmp_path / "lit_merge"
    for path, text in {
        "__init__.py": "",
        "a/__init__.py": "",
        "a/one.py": "def f():\n    from lit_merge.b import two\n",
        "b/__init__.py": "",
        "b/two.py": "HOME = 'lit_merge.a.one'\n",
        "c/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lit_merge.a import one\n",
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text, encoding="utf-8")
    found = rooms.module_imports(package)
    assert found["lit_merge.a.one"] == {"lit_merge.b.two": 2, "lit_merge.b": 2}  # whose __init__ runs as well
    assert found["lit_merge.c"] == {}
    assert rooms.circles(rooms.room_imports(found)) == [["a", "b"]]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_each_file(file: Path) -> None:
    """Absolute imports, some packages in one file only, functions of a readable length, a name that says something."""
    place = file.relative_to(PACKAGE).as_posix()
    assert file.stem not in {"utils", "util", "helpers", "misc", "common"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place}: relative import in line {node.lineno}"
            names = [str(node.module)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - text.count("\n")
            assert length <= 80, f"{place}: {node.name} has {length} lines"
        for name in names:
            assert place == ONLY_HERE.get(name.partition(".")[0], place), f"{place} must not import {name}"


def test_tests_have_the_folders_of_the_package() -> None:
    tests = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert tests <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda file: file.name)
def test_no_test_imports_another(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not str(node.module).rpartition(".")[2].startswith("test_"), f"{file}: {node.module}"


def test_transforms_and_vectors_import_torch_and_safetensors_only() -> None:
    program = (
        "import sys, lit_merge, lit_merge.transforms, lit_merge.vectors;"
        "heavy = {'lightning', 'open_clip', 'matplotlib', 'torchvision', 'torchmetrics', 'jsonargparse', 'PIL'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"
