"""The paths in ``configs/merge`` at tiny size: WiSE-FT, rewarded soups, negation, one task's LiNeS."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_merge.commands.main import main
from lit_merge.models import load_clip
from lit_merge.naming import block_of
from lit_merge.vectors import TaskVector

CONFIGS = Path(__file__).parents[2] / "configs" / "merge"
GRID_11 = [step / 10 for step in range(11)]
GRID_21 = [step / 20 for step in range(21)]


@pytest.fixture
def run(clip_config, clip_weights, own_cache, image_folder, tmp_path, monkeypatch, capsys):
    """``run(configuration, tasks)``: the merged τ, the vectors' τ, and the search's file; and what was said."""
    monkeypatch.chdir(tmp_path)
    clip = load_clip(clip_config, clip_weights)
    header = {"base_fingerprint": clip.fingerprint, "base_model": clip.name}
    paths = {"shapes": image_folder(9, 32), "things": image_folder(7, 32), "others": image_folder(5, 32)}
    for path in paths.values():
        for image in Path(path).rglob("*.png"):
            if image.parts[-3] != "val":
                image.write_bytes(b"not to be looked at")

    def merge(configuration, tasks, *more):
        taus = []
        for seed, task in enumerate(tasks):
            generator = torch.Generator().manual_seed(seed)
            own = {n: torch.randn(v.shape, generator=generator) * 0.2 for n, v in clip.visual.named_parameters()}
            TaskVector(own, task, metadata=header).save(f"{task}.safetensors")
            taus.append(own)
        vectors = json.dumps([f"{task}.safetensors" for task in tasks])
        given = ["--config", str(CONFIGS / f"{configuration}.yaml")] if configuration else []
        arguments = ["merge", *given, "--vectors", vectors, "--output", "merged.safetensors"]
        arguments += ["--model", clip_config, "--pretrained", clip_weights]
        arguments += ["--kind", "task_vector", "--data", "MultiTaskDataModule", "--data.paths", json.dumps(paths)]
        assert main([*arguments, *more]) == 0, capsys.readouterr().err
        found = json.loads(Path("merged-search.json").read_text(encoding="utf-8"))
        return load_file("merged.safetensors"), taus, found, capsys.readouterr().out

    return merge


def assert_front(points, front):
    """By the definition, from the file alone."""
    for index, point in enumerate(points):
        dominated = any(all(a >= b for a, b in zip(other, point, strict=True)) and other != point for other in points)
        assert (index in front) == (not dominated)


def of(found, tasks):
    return [[point["accuracy"][task] for task in tasks] for point in found["points"]]


def test_the_wise_ft_path(run):
    merged, (tau,), found, said = run("wise_ft", ["shapes"])
    assert found["values"] == GRID_21
    assert (found["target"], found["control"]) == (["shapes"], ["things", "others"])
    assert (found["criterion"], found["split"]) == ("target_control", "val")
    assert len({json.dumps(point["accuracy"]) for point in found["points"]}) > 3
    assert found["points"][0]["accuracy"] == found["zero_shot"]
    assert found["points"][20]["accuracy"]["shapes"] == found["individual"]["shapes"]
    assert_front(of(found, ["shapes", "things", "others"]), found["pareto"])
    individual, zero_shot = found["individual"]["shapes"], found["zero_shot"]
    scores = []
    for point in found["points"]:
        control = sum(point["accuracy"][task] / zero_shot[task] for task in ("things", "others")) / 2
        scores.append((2 * point["accuracy"]["shapes"] / individual + control) / 3)
    assert [point["score"] for point in found["points"]] == pytest.approx(scores)
    assert scores[found["chosen"]] == pytest.approx(max(scores))
    assert found["best"] == GRID_21[found["chosen"]]
    for name, value in tau.items():
        torch.testing.assert_close(merged[name], found["best"] * value, rtol=1e-6, atol=1e-7)
    assert f"coefficient {found['best']:g} chosen on validation data" in said


def test_the_rewarded_soup_path(run):
    merged, (first, second), found, _ = run("rewarded_soup", ["shapes", "things"])
    assert found["values"] == GRID_11
    assert found["field"] == "fraction"
    assert (found["target"], found["control"]) == (["shapes", "things"], ["others"])
    assert found["points"][0]["accuracy"]["shapes"] == found["individual"]["shapes"]
    assert found["points"][10]["accuracy"]["things"] == found["individual"]["things"]
    assert_front(of(found, ["shapes", "things", "others"]), found["pareto"])
    means = [sum(pair) / 2 for pair in of(found, ["shapes", "things"])]
    assert found["absolute"] == pytest.approx(means)
    assert found["chosen"] == means.index(max(means))
    fraction = found["best"]
    for name in first:
        expected = (1 - fraction) * first[name] + fraction * second[name]
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_negation(run):
    merged, (tau,), found, _ = run("negation", ["shapes"])
    assert found["values"] == GRID_21
    kept = 0.95 * sum(found["zero_shot"][task] for task in ("things", "others")) / 2
    allowed = []
    for index, (target, *control) in enumerate(of(found, ["shapes", "things", "others"])):
        if sum(control) / 2 >= kept:
            allowed.append((target, GRID_21[index]))
    assert 0 < len(allowed) < 21
    assert (found["points"][found["chosen"]]["accuracy"]["shapes"], found["best"]) == min(allowed)
    for name, value in tau.items():
        torch.testing.assert_close(merged[name], -found["best"] * value, rtol=1e-6, atol=1e-7)
    assert_front([[-a, b, c] for a, b, c in of(found, ["shapes", "things", "others"])], found["pareto"])


def test_one_tasks_lines(run):
    merged, (tau,), found, _ = run("lines_single_task", ["shapes"])
    assert found["values"] == GRID_11
    assert (found["field"], found["criterion"]) == ("LiNeS.alpha", "target_control")
    assert found["points"][10]["accuracy"]["shapes"] == found["individual"]["shapes"]  # α = 1 is the vector itself
    alpha = found["best"]
    assert found["transform"] == f"LiNeS(alpha={alpha}, beta=None, schedule='linear', outside=None)"
    for name, value in tau.items():
        block = block_of(name)  # of two
        factor = alpha if block is None else alpha + (1 - alpha) * block
        torch.testing.assert_close(merged[name], factor * value, rtol=1e-6, atol=1e-7)


def test_several_fields_from_the_shell(run):
    search = {"fields": {"LiNeS.alpha": [0.0, 1.0], "LiNeS.beta": [0.0, 0.5]}, "criterion": "absolute"}
    lines = ["--transform", "LiNeS", "--transform.alpha", "0.5", "--transform.beta", "0"]
    _, _, found, said = run(None, ["shapes"], *lines, "--search", json.dumps(search))
    assert [list(point["fields"].values()) for point in found["points"]] == [[0, 0], [0, 0.5], [1, 0], [1, 0.5]]
    assert "best" not in found
    alpha, beta = found["fields"].values()
    assert f", LiNeS.alpha {alpha:g}, LiNeS.beta {beta:g} chosen on validation data, the " in said


def test_a_study_from_the_shell(run):
    pytest.importorskip("optuna")
    search = {"optuna": {"ranges": {"coefficient": [0.2, 0.4]}, "trials": 3}, "criterion": "absolute"}
    _, _, found, _ = run(None, ["shapes", "things"], "--recipe", "ties", "--search", json.dumps(search))
    assert len(found["points"]) == 3
    assert all(0.2 <= value <= 0.4 for value in found["values"])
    assert found["best"] in found["values"]


def test_the_data_module_is_named_without_its_module_in_a_process_of_its_own(tmp_path):
    """Nothing else may have imported it before."""
    line = ["merge", "--vectors=[a.safetensors]", "--output=m.safetensors", "--recipe=task_arithmetic", "--search={}"]
    line += ["--data=MultiTaskDataModule", "--data.tasks=[digits]"]
    command = [sys.executable, "-m", "lit_merge", *line]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "a.safetensors: expected a checkpoint, got nothing" in done.stderr
