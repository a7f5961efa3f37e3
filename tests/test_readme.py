"""The README's commands and programs run as written; only the configurations and the embedded tasks are smaller."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lit_merge.cli import main
from lit_merge.report import Results, markdown_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every shell line, continuation lines joined."""
    shell = "".join(text for language, text in BLOCKS if language == "bash").replace("\\\n", " ")
    return [" ".join(line.split()) for line in shell.splitlines() if line.strip()]


def programs() -> list[str]:
    return [text for language, text in BLOCKS if language == "python"]


def shrink(configs: Path) -> None:
    """Make every configuration tiny: two steps, two tasks, two values to search."""
    for path in configs.rglob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name == "suite" and isinstance(config["fit"], dict):  # the papers' are not run here
            config |= {"tasks": ["digits", "signs"], "seeds": [0]}
            config["fit"]["trainer"]["max_steps"] = 1
            for recipe in config["recipes"].values():
                if "search" in recipe:
                    recipe["search"] = {"values": [0.2, 0.4]}
        elif path.parent.name not in ("suite", "protocol") and "trainer" in config:
            config["trainer"]["max_steps"] = 2
            config["data"].setdefault("init_args", {})["batch_size"] = 4
        path.write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_images: None) -> Path:
    """A working directory as after cloning, with a folder of images and the README's subclass."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shrink(tmp_path / "configs")
    pixels = np.random.default_rng(0)
    for kind in ("red_apple", "green_pear"):
        (tmp_path / "my_images" / kind).mkdir(parents=True)
        for number in range(6):
            image = Image.fromarray(pixels.integers(0, 255, (40, 48, 3), dtype=np.uint8))
            image.save(tmp_path / "my_images" / kind / f"{number}.png")
    (tmp_path / "new_images").mkdir()
    image.save(tmp_path / "new_images" / "unknown.png")
    (tmp_path / "focal_loss.py").write_text(next(text for text in programs() if "FocalLoss" in text), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("focal_loss", None)


def test_every_command_and_program_runs_as_written(fresh: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran = []
    for command in commands():
        words = shlex.split(command)
        if words[0] != "lit-merge":
            assert words[0] in ("python", "pip", "pytest"), f"a command that no test runs: {command}"
            continue  # making the environment and calling pytest is what runs this test
        arguments = words[1:]
        if "8" in arguments[-3:] or "--trainer.devices" in arguments:
            arguments.append("--print_config")  # eight GPUs are not at hand: the command line must still be right
        if "focal_loss.FocalLoss" in arguments:
            arguments[arguments.index("--trainer.max_steps") + 1] = "2"
        assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
        ran.append(arguments[0])
    assert {"fit", "merge", "test", "predict", "suite"} <= set(ran)
    assert (fresh / "runs/quickstart/results.png").stat().st_size > 10_000
    lines = (fresh / "runs/mine/predictions.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "image,class,probability,green pear,red apple"
    assert len(lines) == 2
    assert lines[1].split(",")[1] in ("green pear", "red apple")
    for program in programs():
        if "FocalLoss" not in program:
            exec(compile(program, "README.md", "exec"), {})


def test_every_file_that_the_readme_names_exists() -> None:
    names = set(re.findall(r"\]\(([\w./-]+)\)", README)) | set(re.findall(r"configs/[\w/]+\.yaml", README))
    names |= set(re.findall(r"`((?:lit_merge|benchmarks|docs)/[\w./-]+)`", README))
    missing = sorted(name for name in names if not (ROOT / name).exists())
    assert not missing


def test_the_table_is_the_committed_json() -> None:
    stored = json.loads((ROOT / "benchmarks/results/embedded_suite.json").read_text(encoding="utf-8"))
    assert markdown_table(Results.from_dict(stored)).strip() in README
    assert len(stored["seeds"]) >= 3
