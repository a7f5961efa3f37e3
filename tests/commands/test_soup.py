"""Greedy soups: against a plain restatement of the recipe, and as a command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_merge.commands.main import main
from lit_merge.data import MultiTaskDataModule
from lit_merge.evaluation.accuracies import Evaluation
from lit_merge.evaluation.soup import SoupResult, SoupStep, greedy_soup
from lit_merge.models import load_clip
from lit_merge.modules import MultiTaskModule
from lit_merge.transforms import Mean
from lit_merge.vectors import TaskVector, TaskVectors


def recipe_1(values, accuracy):
    """Wortsman et al. 2022, recipe 1: of the rows of ``values``, each a number whose mean is the soup's."""
    order = sorted(range(len(values)), key=lambda row: accuracy(values[row]), reverse=True)
    ingredients: list[int] = []
    for row in order:
        added = [values[index] for index in [*ingredients, row]]
        present = [values[index] for index in ingredients]
        if not present or accuracy(sum(added) / len(added)) >= accuracy(sum(present) / len(present)):
            ingredients.append(row)
    return ingredients


def test_greedy_is_the_papers_recipe():
    """Models on a line, of steps of 1/4; accuracy falls with the distance from 0.3, and has plateaus."""
    numbers = random.Random(0)
    sizes = set()
    for _ in range(30):
        values = [numbers.randrange(-8, 9) / 4 for _ in range(numbers.randrange(1, 7))]

        def accuracy(value):
            return round(1 - abs(float(value) - 0.3) / 4, 1)

        vectors = TaskVectors([TaskVector({"w": torch.tensor([value], dtype=torch.float64)}, "a") for value in values])
        result = greedy_soup(vectors, lambda vector: accuracy(vector["w"]))
        assert result.chosen == recipe_1(values, accuracy)
        assert result.individual == [accuracy(value) for value in values]
        mean = Mean()(vectors.select(result.chosen)).single()
        assert result.accuracy == accuracy(mean["w"])
        assert result.accuracy >= max(result.individual)
        sizes.add(len(result.chosen))
    assert len(sizes) > 2


def test_every_step_is_told():
    """By hand: accuracies 0.5, 0.9 and 0.7, whose means are no worse; equal ones; and a mean that is worse."""
    seen = []

    def evaluate(vector):
        seen.append(float(vector["w"]))
        return {1.0: 0.5, 3.0: 0.9, 5.0: 0.7, 4.0: 0.9}.get(seen[-1], 0.2)

    vectors = TaskVectors([TaskVector({"w": torch.tensor(value)}, "a") for value in (1.0, 3.0, 5.0)])
    result = greedy_soup(vectors, evaluate)
    assert result == SoupResult([0.5, 0.9, 0.7], [SoupStep(row, 0.9, True) for row in (1, 2, 0)])
    assert seen == [1.0, 3.0, 5.0, 4.0, 3.0]
    assert (result.chosen, result.accuracy) == ([1, 2, 0], 0.9)
    ties = greedy_soup(vectors, lambda vector: 0.5)
    assert ties.chosen == [0, 1, 2]
    worse = greedy_soup(vectors.select([1, 0]), lambda vector: {3.0: 0.9, 1.0: 0.9, 2.0: 0.8}[float(vector["w"])])
    assert worse.steps == [SoupStep(0, 0.9, True), SoupStep(1, 0.8, False)]
    assert (worse.chosen, worse.accuracy) == ([0], 0.9)
    nearly = {1.0: 0.6000000000000001, 3.0: 0.5, 2.0: 0.6}
    rounded = greedy_soup(vectors.select([0, 1]), lambda vector: nearly[float(vector["w"])])
    assert rounded.chosen == [0, 1]  # the mean over tasks is as high as before


class ValidationOnly(MultiTaskDataModule):
    def train_dataloader(self):
        raise AssertionError("training images")

    def test_dataloader(self):
        raise AssertionError("test images")


@pytest.fixture
def files(clip_config, clip_weights, own_cache, tmp_path):
    """Three vectors of one task."""
    clip = load_clip(clip_config, clip_weights)
    header = {"base_fingerprint": clip.fingerprint, "base_model": clip.name}
    written = []
    for seed, scale in enumerate((0.3, 0.02, 0.1)):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: torch.randn(value.shape, generator=generator) * scale
            for name, value in clip.visual.named_parameters()
        }
        written.append(str(tmp_path / f"{seed}.safetensors"))
        TaskVector(tensors, "shapes", metadata=header).save(written[-1])
    return written


def test_the_command_averages_what_it_chose(
    files, image_folder, clip_config, clip_weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    paths = {"shapes": image_folder(9, 32)}
    for image in Path(paths["shapes"]).glob("test/*/*.png"):
        image.write_bytes(b"not to be looked at")
    base = ["--model", clip_config, "--pretrained", clip_weights]
    data = ["--data", "MultiTaskDataModule", "--data.paths", json.dumps(paths)]
    command = ["soup", "--vectors", json.dumps(files), "--output", "soup.safetensors", *base, *data]
    assert main(command) == 0
    said = capsys.readouterr().out

    module = MultiTaskModule(clip_config, clip_weights)
    start = {name: value.detach().clone() for name, value in module.encoder.named_parameters()}
    loaders = ValidationOnly(paths=paths)
    from lit_merge.evaluation.search import validation_loaders

    evaluation = Evaluation(module, validation_loaders(module, loaders, ["shapes"]))
    taus = [load_file(file) for file in files]

    def accuracy(rows):
        mean = {name: sum(taus[row][name] for row in rows) / len(rows) for name in start}
        return evaluation.accuracy(TaskVector(mean))["shapes"]

    individual = [accuracy([row]) for row in range(3)]
    order = sorted(range(3), key=lambda row: -individual[row])
    chosen = order[:1]
    for row in order[1:]:
        chosen = [*chosen, row] if accuracy([*chosen, row]) >= accuracy(chosen) else chosen
    curve = json.loads(Path("soup-soup.json").read_text(encoding="utf-8"))
    assert curve["split"] == "val"
    assert curve["tasks"] == ["shapes"]
    assert [entry["accuracy"] for entry in curve["vectors"]] == individual
    assert [entry["file"] for entry in curve["vectors"]] == files
    assert curve["chosen"] == chosen
    assert [step["row"] for step in curve["steps"]] == order
    assert curve["accuracy"] == accuracy(chosen)
    merged = load_file("soup.safetensors")
    for name, value in start.items():
        expected = value + sum(taus[row][name] for row in chosen) / len(chosen)
        torch.testing.assert_close(merged[f"visual.{name}"], expected, rtol=1e-6, atol=1e-6)
    names = ", ".join(files[row] for row in chosen)
    assert said == (
        f"greedy soup of {len(chosen)} of 3 vectors ({names}), validation accuracy {accuracy(chosen):.4g} "
        "-> soup.safetensors\n"
    )

    def never(self, *settings, **more):
        raise AssertionError("evaluated")

    monkeypatch.setattr(Evaluation, "accuracy", never)
    assert main(command) == 2  # before anything is evaluated
    assert "output: expected a new file, got soup.safetensors, which exists" in capsys.readouterr().err
    for left in Path().glob("soup*"):
        if left.name != "soup-soup.json":
            left.unlink()
    assert main(command) == 2
    assert "output: expected a new file, got soup-soup.json, which exists. Set" in capsys.readouterr().err
    assert main([*command[:2], "[]", *command[3:]]) == 2
