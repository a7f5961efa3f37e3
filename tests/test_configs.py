"""Every YAML file in ``configs/`` is right for the command that it is for, and so is the command line in its head."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lit_merge.commands.suite
from lit_merge.commands.main import main
from lit_merge.errors import LitMergeError

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").rglob("*") if path.is_file())
CONFIGS = [path for path in FILES if path.parent.name != "protocol"]  # whose files are parts of suites
COMMANDS = {"finetune": "fit", "adamerging": "fit", "pretrain": "fit", "merge": "merge", "suite": "suite"}
COMMANDS["statistics"] = "statistics"
COMMANDS["soup"] = "soup"
COMMANDS["paper"] = "suite"
COMMANDS["analyze"] = "analyze"
COMMANDS["trl"] = "trl"
REQUIRED = {"merge": ["--vectors=[a.safetensors]", "--output=b.safetensors"]}
REQUIRED["analyze"] = ["--vectors=[a.safetensors]", "--output=b"]
REQUIRED["trl"] = ["--output=b"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def missing(part: Any, whole: Any, place: str = "") -> list[str]:
    """Where ``whole`` lacks what ``part`` says; classes may be named by another of their paths, or not at all."""
    if isinstance(part, dict) and isinstance(whole, dict):
        if "class_path" in whole and "class_path" not in part:
            whole = whole["init_args"]
        return [found for key in part for found in missing(part[key], whole.get(key), f"{place}.{key}")]
    if isinstance(part, list) and isinstance(whole, list) and len(part) == len(whole):
        return [found for index, item in enumerate(part) for found in missing(item, whole[index], f"{place}.{index}")]
    same = part == whole or (place.endswith("class_path") and str(part).split(".")[-1] == str(whole).split(".")[-1])
    return [] if same else [f"{place}: {part!r} became {whole!r}"]


def parsed(text: str) -> Any:
    """The resolved configurations are long: the parser in C takes a tenth of the time."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def loaded(path: Path) -> Any:
    return parsed(path.read_text(encoding="utf-8"))


def with_named_parts(suite: dict[str, Any], path: Path) -> dict[str, Any]:
    """A suite's configuration with the settings of the files that it names."""

    def over(first: Any, second: Any) -> Any:
        both = isinstance(first, dict) and isinstance(second, dict)
        return {**first, **{key: over(first.get(key), value) for key, value in second.items()}} if both else second

    whole = dict(suite)
    for name in ("fit", "joint", "recipes", "test", "data"):
        listed = suite.get(name) if isinstance(suite.get(name), list) else [suite[name]] if name in suite else []
        for part in listed:
            content = loaded(path.parent / part) if isinstance(part, str) else part
            whole[name] = over(whole[name] if isinstance(whole.get(name), dict) else {}, content)
    return whole


def test_no_file_is_forgotten() -> None:
    assert {path.suffix for path in FILES} == {".yaml"}
    parts = {path.name for path in FILES} - {path.name for path in CONFIGS}
    assert all(any(name in path.read_text() for path in CONFIGS if path.parent.name == "suite") for name in parts)
    assert {path.relative_to(ROOT / "configs").parts[0] for path in CONFIGS} == set(COMMANDS)


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_every_setting_is_taken_up_and_the_command_in_its_head_is_right(path: Path, capsys) -> None:
    command = COMMANDS[path.relative_to(ROOT / "configs").parts[0]]
    head = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert head, "a first line that says what it is for"
    plain = [command, "--config", named(path), *REQUIRED.get(command, [])]
    printed = {}
    for arguments in [plain, *(shlex.split(line)[1:] for line in head if line.startswith("lit-merge "))]:
        assert " ".join(arguments).count(f"--config {named(path)}") == 1
        if tuple(arguments) not in printed:  # most heads have no more than the file
            code = main([*arguments, "--print_config"])
            printed[tuple(arguments)], said = capsys.readouterr()
            assert code == 0, said
    given = with_named_parts(loaded(path), path) if command == "suite" else loaded(path)
    resolved = parsed(printed[tuple(plain)])
    assert missing(given, resolved) == []
    if command == "fit":  # the trainer has an end that the learning rate falls towards
        assert resolved["trainer"]["max_steps"] > 0


SETTINGS = loaded(ROOT / "tests/finetune_settings.yaml")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_regime_and_a_network_make_what_one_file_was(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting, those of the defaults as well; the order of the files is the regime's first."""
    one = SETTINGS[name]
    files = [f"--config=configs/finetune/{file}.yaml" for file in one["files"]]
    resolved = []
    for arguments in ([*files, *one.get("options", [])], ["--config", yaml.safe_dump(one["settings"])]):
        assert main(["fit", *arguments, "--print_config"]) == 0
        resolved.append(parsed(capsys.readouterr().out))
    assert resolved[0] == resolved[1]


def test_every_way_to_fine_tune_is_there_once() -> None:
    finetune = {path.stem: loaded(path) for path in CONFIGS if path.parent.name == "finetune"}
    assert set(finetune) == {file for one in SETTINGS.values() for file in one["files"]} | {
        "clip_vit_b16",
        "clip_vit_l14",
        "condition",  # of a vector that is there
    }
    assert len({json.dumps(content, sort_keys=True) for content in finetune.values()}) == len(finetune)
    for name, content in finetune.items():  # a network says all numbers; a regime is lit-tiny's unless one follows it
        settings = content["model"]["init_args"]
        assert ("model" in settings) == name.startswith("clip_")
        assert content["trainer"].keys() >= {"max_steps", "log_every_n_steps"}
        assert "learning_rate" in settings


PAPERS = ("clip", "glue", "nli", "t5_", "text", "toxicity")  # need weights and data sets: other tests run them


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.parent.name == "suite" and not path.name.startswith(PAPERS)],
    ids=named,
)
def test_suites_pass_the_check_of_all_their_stages(path, monkeypatch, capsys) -> None:
    def reached(plan: Any, scheduler: Any) -> None:
        raise LitMergeError(f"all {scheduler.total} stages are possible")

    monkeypatch.setattr(lit_merge.commands.suite.SuitePlan, "run", reached)
    assert main(["suite", "--config", str(path), "--output=S"]) == 1
    assert re.search(r"error: all \d+ stages are possible", capsys.readouterr().err)
