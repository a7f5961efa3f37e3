"""What pages of documentation hold: their blocks of code, and how these are run at tiny size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NOT_OURS = frozenset({"export", "hf", "mkdocs", "pip", "pytest", "python", "ray", "sbatch", "source"})
_AWAY = ("hf://", "data prepare", "data check", "--data.root", "suite/clip", "finetune/clip", "--ray_address")
_STARTERS = frozenset({"torchrun", "srun"})


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Language, file name (or "") and content of every fenced block."""
    return [(language, title, content) for language, title, content in _BLOCK.findall(text)]


def commands(text: str) -> list[str]:
    """Every line of a shell, continuation lines joined, comments left out."""
    shell = "".join(content for language, _, content in blocks(text) if language == "bash").replace("\\\n", " ")
    lines = (" ".join(line.split()) for line in shell.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def arguments_of(command: str) -> list[str] | None:
    """The arguments of ``lit-merge`` in a line; None for another program that need not be run.

    What needs several devices or machines, the network or data sets of its own gets ``--print_config``: the command
    line must be right.
    """
    words = shlex.split(command, comments=True)
    if not words:
        return None
    several = words[0] in _STARTERS
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
        assert words[0] == "lit_merge"
    elif words[0] == "srun":
        words = words[next(at for at, word in enumerate(words) if word == "lit-merge") :]
    elif words[0] != "lit-merge":
        assert words[0] in _NOT_OURS or "=" in words[0], f"a command that no test runs: {command}"
        return None
    arguments = words[1:]
    away = several or "--trainer.devices" in arguments or any(sign in command for sign in _AWAY)
    return [*arguments, "--print_config"] if away and "--help" not in arguments else arguments


def shrink(configs: Path) -> None:
    """Make every configuration tiny: two steps, two tasks, two values to search."""
    for path in configs.rglob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name == "suite" and not path.name.startswith(("clip", "glue", "nli", "t5_", "toxicity")):
            config |= {"tasks": ["digits", "signs"], "seeds": [0]}
            config["fit"]["trainer"]["max_steps"] = 1
            for recipe in config["recipes"].values():
                if "search" in recipe:
                    recipe["search"] = {"values": [0.2, 0.4]}
        elif "trainer" in config and "data" in config:
            config["trainer"]["max_steps"] = 2
            config["data"].setdefault("init_args", {})["batch_size"] = 4
        path.write_text(yaml.safe_dump(config), encoding="utf-8")


def write_texts(folder: Path) -> None:
    """Two tasks and some new texts as CSV, and a tiny sentence encoder where a packaged one would be."""
    from builders.language_folders import language_folder

    draw = np.random.default_rng(0)
    for name, classes in {"reviews": ("w1", "w2"), "tickets": ("w3", "w4", "w5")}.items():
        rows = [
            f"{' '.join(f'w{word}' for word in draw.integers(0, 20, 5))},{classes[row % len(classes)]}"
            for row in range(60)
        ]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "new_texts.csv").write_text("text\nw1 w2\nw3 w4 w5\n")
    language_folder(folder / "data" / "models" / "minilm", "bert")


def draw_images(folder: Path, classes: tuple[str, ...] = ("red_apple", "green_pear"), count: int = 6) -> None:
    """Write a few images per class."""
    pixels = np.random.default_rng(0)
    for kind in classes:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(pixels.integers(0, 255, (40, 48, 3), dtype=np.uint8))
            image.save(folder / kind / f"{number}.png")
