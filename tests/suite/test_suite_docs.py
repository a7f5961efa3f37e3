"""The commands and scripts of docs/suite.md are right."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_merge.commands.main import main
from lit_merge.evaluation.search import CoefficientSearch
from lit_merge.suite.overlays import with_parts
from lit_merge.suite.recipe import Recipe

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/suite.md").read_text(encoding="utf-8"), re.DOTALL)
SHELL = "".join(text for language, text in BLOCKS if language == "bash").replace("\\\n", " ")
COMMANDS = [" ".join(line.split()) for line in SHELL.splitlines() if line.startswith("lit-merge ")]
SCRIPTS = [text for language, text in BLOCKS if language == "slurm"]


@pytest.fixture(autouse=True)
def _where_the_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


def parsed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([*arguments, "--print_config"]) == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_taken(command, capsys) -> None:
    config = parsed(shlex.split(command)[1:], capsys)
    assert config["fit"]["trainer"]["max_steps"] == 2000
    batch = config["fit"]["data"]["init_args"]["batch_size"]
    assert batch * config["fit"]["trainer"].get("accumulate_grad_batches", 1) == 128
    if "regmean null" in command:
        assert config["recipes"]["regmean"] is None


def test_the_recipes_are_possible() -> None:
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    (given,) = with_parts([f"--recipes={json.dumps(yaml.safe_load(text)['recipes'])}"])
    recipes = json.loads(given.partition("=")[2])
    assert len(recipes) == 7
    for recipe in recipes.values():
        if "search" in recipe:
            recipe["search"] = CoefficientSearch(**recipe["search"])
        Recipe(**recipe).check(ROOT / "runs/clip8_vit_b32")


def run_with_stand_ins(script: str, folder: Path, **variables: str) -> list[list[str]]:
    """Run a script in which other programs only write down how they are called; returns the calls."""
    stand_in = f"#!{sys.executable} -S\n" + (
        "import fcntl, json, os, pathlib, sys\n"
        "name = pathlib.Path(sys.argv[0]).name\n"
        "with open(os.environ['CALLS'], 'a') as file:\n"
        "    file.write(json.dumps([name, *sys.argv[1:]]) + '\\n')\n"
        "if name == 'scontrol':\n"
        "    print('one\\ntwo\\nthree')\n"
    )
    for name in ("lit-merge", "srun", "scontrol"):
        (folder / name).write_text(stand_in)
        (folder / name).chmod(0o755)
    environment = {**os.environ, **variables, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    subprocess.run(["bash", "-eu", "-c", script + "\nwait"], env=environment, cwd=folder, check=True, timeout=30)
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_the_job_array(tmp_path, capsys) -> None:
    (call,) = run_with_stand_ins(SCRIPTS[0], tmp_path, SLURM_ARRAY_TASK_ID="2")
    config = parsed(call[1:], capsys)
    assert (config["seeds"], config["output"], config["parallel"]) == ([2], "runs/clip8_vit_b32/2", 4)


@pytest.mark.parametrize("nodes", [1, 3])
def test_ray_on_slurm(tmp_path, nodes, capsys) -> None:
    variables = {"SLURM_JOB_NODELIST": "several", "SLURM_JOB_NUM_NODES": str(nodes), "RAY_STARTS_IN": "0.5"}
    calls = run_with_stand_ins(SCRIPTS[1], tmp_path, **variables)
    assert [call[0] for call in calls] == ["scontrol", "srun", *(["srun"] if nodes > 1 else []), "lit-merge"]
    assert calls[0][1:] == ["show", "hostnames", "several"]
    assert {"--nodelist=one", "--head", "--node-ip-address=one", "--port=6379", "--block"} <= set(calls[1])
    if nodes > 1:
        assert {"--nodes=2", "--ntasks=2", "--exclude=one", "--address=one:6379", "--block"} <= set(calls[2])
    config = parsed(calls[-1][1:], capsys)
    assert (config["engine"], config["ray_address"], config["ray_cpus"]) == ("ray", "one:6379", 8)


def test_every_file_that_the_page_names_exists() -> None:
    text = (ROOT / "docs/suite.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:configs|lit_merge)/[\w./]+\w", text))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
