"""The layers of docs/architecture.md: which room of the package imports what, and that importing stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_merge"
EVERYTHING = {"*"}
BELOW_MODULES = {
    "errors",
    "hub",
    "naming",
    "params",
    "cache",
    "functional",
    "vectors",
    "transforms",
    "models",
    "metrics",
}
LAYERS: dict[str, set[str]] = {  # room -> rooms of lit_merge and third-party packages that it may import
    "_version": set(),
    "errors": set(),
    "naming": set(),
    "cache": {"errors"},
    "params": {"errors", "torch"},
    "functional": {"errors", "params", "torch"},
    "hub": {"errors", "hub_refusals", "huggingface_hub"},
    "hub_refusals": {"errors", "hub", "huggingface_hub"},
    "vectors": {"errors", "hub", "naming", "params", "functional", "torch", "safetensors", "numpy"},
    "transforms": {"errors", "hub", "naming", "params", "functional", "vectors", "torch", "safetensors", "numpy"},
    "models": {
        "errors",
        "hub",
        "naming",
        "params",
        "cache",
        "functional",
        "vectors",
        "torch",
        "torchvision",
        "numpy",
        "PIL",
    },
    "linear_features": {"errors", "params", "cache", "functional", "vectors", "torch", "numpy"},
    "metrics": {
        *("errors", "naming", "params", "functional", "vectors", "torch", "torchmetrics"),
        *("search", "report", "matplotlib"),  # the scores of search; report draws
    },
    "data": {
        *{"errors", "cache", "vectors", "torch", "torchvision", "lightning", "PIL", "numpy"},  # vectors: the store
        *{"datasets", "h5py", "huggingface_hub", "scipy"},  # published data sets, where one needs it
    },
    "modules": BELOW_MODULES | {"linear_features", "torch", "lightning", "torchmetrics"},
    "callbacks": {
        "errors",
        "params",
        "functional",
        "vectors",
        "transforms",
        "models",
        "metrics",
        "modules",
        "data",
        "merge_inputs",
        "merge_output",
        "report",
        "torch",
        "lightning",
        "matplotlib",
    },
    "statistics": {
        "errors",
        "hub",
        "functional",
        "params",
        "vectors",
        "transforms",
        "data",
        "modules",
        "search",
        "torch",
    },
    "analysis": EVERYTHING,
    "report": EVERYTHING,
    "search": EVERYTHING,
    "soup": EVERYTHING,
    "inspection": {"errors", "hub", "naming", "vectors", "torch", "rich"},
    "importing": BELOW_MODULES | {"torch"},
    "merging": EVERYTHING,
    "merge_inputs": BELOW_MODULES | {"torch"},
    "merge_output": BELOW_MODULES | {"merge_inputs", "torch"},
    "merge_plan": BELOW_MODULES | {"merge_inputs", "merge_output"},
    "merge_progress": {"vectors", "torch", "rich"},
    "model_card": BELOW_MODULES | {"environment", "merge_inputs", "yaml"},
    "repository_card": {"errors", "yaml"},
    "hub_pull": {"errors", "hub", "vectors"},
    "hub_push": EVERYTHING,
    "engines": {"errors", "commands", "search", "torch"},
    "stages": {"errors", "vectors", "callbacks", "engines", "yaml"},
    "environment": {"torch"},
    "suite_files": {"errors", "suite_settings", "yaml"},
    "suite_plan": EVERYTHING,
    "suite_recipe": {"errors", "merging", "search", "transforms"},
    "suite_results": {"environment", "report", "suite_recipe", "vectors"},
    "suite_settings": {"data", "suite_recipe"},
    "suite": EVERYTHING,
    "runs": {"errors", "callbacks", "lightning"},
    "command_parser": EVERYTHING,
    "lightning_cli": EVERYTHING,
    "commands": EVERYTHING,
    "cli": EVERYTHING,
    "__init__": EVERYTHING,
    "__main__": EVERYTHING,
}
ONLY_HERE = {  # third-party package -> the only file that imports it
    "open_clip": "models/encoder.py",
    "optuna": "search/study.py",
    "ray": "engines/cluster.py",
    "fontTools": "data/embedded/build_atlas.py",
    "sklearn": "data/embedded/build_digits.py",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> set[str]:
    """Third-party packages and rooms of lit_merge that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import in line {node.lineno}"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "lit_merge" else {str(node.module)}
    parts = [name.split(".") for name in found]
    rooms = {part[1] for part in parts if part[0] == "lit_merge" and len(part) > 1}
    return rooms | {part[0] for part in parts if part[0] != "lit_merge"} - sys.stdlib_module_names


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_layers(file: Path) -> None:
    room = room_of(file)
    assert room in LAYERS, f"{room} is no room of the layer table; add it to docs/architecture.md and to this test"
    imported = imports_of(file) - {room, "__future__", "_version", *ONLY_HERE}
    if LAYERS[room] != EVERYTHING:
        assert imported <= LAYERS[room], f"{file.relative_to(PACKAGE)} must not import {imported - LAYERS[room]}"
    assert "cli" not in imported or room == "__main__", "nothing imports the command line"
    for package, only in ONLY_HERE.items():
        assert package not in imports_of(file) or file.relative_to(PACKAGE).as_posix() == only


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_is_a_drawer(file: Path) -> None:
    assert file.stem not in {"utils", "util", "helpers", "misc", "common"}


def test_transforms_and_vectors_import_torch_and_safetensors_only() -> None:
    program = (
        "import sys, lit_merge, lit_merge.transforms, lit_merge.vectors;"
        "heavy = {'lightning', 'open_clip', 'matplotlib', 'torchvision', 'torchmetrics', 'jsonargparse', 'PIL'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert run.stdout.strip() == "[]"
