"""Suites that learn, collect statistics, fine-tune jointly, and are put together from several files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_merge.commands.main import main
from lit_merge.errors import ConfigurationError
from lit_merge.report import Results, accuracy_table, markdown_table, results_figure
from lit_merge.suite.overlays import with_parts
from lit_merge.suite.plan import SuitePlan
from lit_merge.suite.recipe import Recipe
from lit_merge.transforms import recipe
from lit_merge.vectors import Coefficients, LazyTensors, TaskVector, TaskVectors

CPU = {"accelerator": "cpu"}
LEARNED = {
    "learned": {"granularity": "block", "parts": [{"Trim": {"density": 0.5}}, "ElectSign"], "learning_rate": 0.1},
    "data": {"adapt_on": "val", "batch_size": 4},
    "trainer": {"max_steps": 2, **CPU},
}
AVERAGED = {"merge": {"adamerging": {"coefficients": "S/seed-{seed}/merge/learned/coefficients.safetensors"}}}
OPERATED = {
    "learned": {"learn": ["surgery"], "objective": "features", "parts": [{"Departures": AVERAGED}], "init": 1.0,
                "clamp": None, "surgery_rank": 2, "learning_rate": 0.1},
    "data": {"adapt_on": "val", "batch_size": 4},
    "trainer": {"max_steps": 2, **CPU},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "tasks": ["digits", "signs"],
    "fit": {"trainer": {"max_steps": 2, **CPU}, "model": {"init_args": {"learning_rate": 1e-3}},
            "data": {"init_args": {"batch_size": 8}}},
    "test": {"trainer": CPU},
    "joint": {"trainer": {"max_steps": 3, **CPU}, "model": {"init_args": {"learning_rate": 1e-3}},
              "data": {"init_args": {"batch_size": 4}}},
    "recipes": {
        "halved": {"parts": [{"adamerging": {"coefficients": "S/seed-{seed}/merge/learned/coefficients.safetensors"}},
                             {"Scale": {"coefficient": 0.5}}]},
        "learned": LEARNED,
        "operated": OPERATED,
        "fisher": {"recipe": "fisher", "settings": {"floor": 1e-5}, "statistics": {"images": 8}},
        "regmean": {"recipe": "regmean", "statistics": {"images": 8, "split": "val"}},
        "featcal": {"recipe": "task_arithmetic", "calibrate": {"class_path": "FeatCal", "init_args": {"images": 8}}},
    },
}  # fmt: skip


MADE: list[Path] = []


@pytest.fixture(scope="module")
def template(tmp_path_factory, few_images, clip_config, clip_weights) -> Path:
    if MADE:  # tests are handed out in no order, and other modules' come between
        return MADE[0]
    folder = tmp_path_factory.mktemp("recipes")
    config = {**CONFIG, "model": clip_config, "pretrained": clip_weights}
    (folder / "suite.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        assert main(["suite", "--config=suite.yaml", "--output=S"]) == 0
    MADE.append(folder)
    return folder


@pytest.fixture
def place(template, few_images, monkeypatch) -> Path:
    """The current folder is that of the finished suite; what is done in it stays."""
    monkeypatch.chdir(template)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return template


def vectors() -> TaskVectors:
    return TaskVectors(
        [TaskVector.load(f"S/seed-0/fit/{task}/task_vector.safetensors") for task in ("digits", "signs")]
    )


def results() -> dict[str, Any]:
    return json.loads(Path("S/results.json").read_text(encoding="utf-8"))


def accuracies(stage: str) -> dict[str, float]:
    stored = json.loads(Path(f"S/seed-0/{stage}/test_metrics.json").read_text(encoding="utf-8"))
    return {task: round(stored[f"test/{task}/accuracy"], 6) for task in ("digits", "signs")}


# What comes out


def test_a_learned_recipe_is_tested_with_its_merged_weights(place, clip_weights) -> None:
    folder = Path("S/seed-0/merge/learned")
    coefficients = Coefficients.load(folder / "coefficients.safetensors")
    assert (coefficients.granularity, coefficients.metadata["step"]) == ("block", "2")
    assert not torch.equal(coefficients.values, torch.full_like(coefficients.values, 0.3))
    found = results()["seeds"]["0"]["merged"]["learned"]
    assert found["accuracy"] == accuracies("test/learned")
    ties = "Trim(density=0.5, scope='global'), ElectSign(weighting='mass')"
    assert found["transform"] == f"chain({ties}, learned λ per task and block, Sum())"
    assert (found["coefficient"], found["search"]) == (None, None)
    said = found["learned"]
    assert (said["objective"], said["learned_on"], said["fraction"], said["step"]) == ("entropy", "val", 1.0, 2)
    assert set(said["examples"]) == {"digits", "signs"}
    assert min(said["examples"].values()) > 0
    header = LazyTensors(folder / "merged.safetensors").metadata
    assert (header["learned_on"], json.loads(header["examples"])) == ("val", said["examples"])
    assert found["mean_coefficients"]["signs"] == pytest.approx(
        float(coefficients.values[coefficients.tasks.index("signs")].mean()), abs=1e-6
    )
    tested = yaml.safe_load(Path("S/seed-0/test/learned/stage.yaml").read_text())["model"]["init_args"]
    assert (tested["task_vector"], tested["weights"]) == (None, "S/seed-0/merge/learned/merged.safetensors")
    stored, base = LazyTensors(folder / "merged.safetensors"), LazyTensors(clip_weights)
    merged = recipe("adamerging", coefficients=str(folder / "coefficients.safetensors"))(vectors()).single()
    for name, value in merged.items():
        torch.testing.assert_close(stored[f"visual.{name}"] - base[f"visual.{name}"], value, atol=1e-6, rtol=1e-4)


def test_surgery_follows_another_recipes_merge_and_is_tested_with_it(place) -> None:
    folder = Path("S/seed-0/merge/operated")
    before, after = (LazyTensors(f"S/seed-0/merge/{name}/merged.safetensors") for name in ("learned", "operated"))
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=1e-4)
    tested = yaml.safe_load(Path("S/seed-0/test/operated/stage.yaml").read_text())["model"]["init_args"]
    assert tested["task_outputs"] == {task: str(folder / f"{task}.output.safetensors") for task in ("digits", "signs")}
    header = LazyTensors(folder / "digits.output.safetensors").metadata
    assert (header["task"], header["objective"], header["learned_on"]) == ("digits", "features", "val")
    assert set(json.loads(header["examples"])) == {"digits", "signs"}
    found = results()["seeds"]["0"]["merged"]["operated"]
    assert found["accuracy"] == accuracies("test/operated")
    assert "path='seed-0/merge/learned/coefficients.safetensors'" in found["transform"]


def test_a_recipe_may_name_coefficients_that_the_suite_itself_learns(place) -> None:
    """It comes before the recipe that learns them, and waits."""
    learned = recipe("adamerging", coefficients="S/seed-0/merge/learned/coefficients.safetensors")(vectors()).single()
    halved = TaskVector.load("S/seed-0/merge/halved/merged.safetensors")
    for name, value in halved.items():
        torch.testing.assert_close(value, learned[name] / 2, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("name", "kind", "settings"), [("fisher", "fisher", {"floor": 1e-5}), ("regmean", "gram", {})])
def test_statistics_are_collected_of_every_task(place, name, kind, settings) -> None:
    files = {task: f"S/seed-0/statistics/{name}/{task}/{kind}.safetensors" for task in ("digits", "signs")}
    for task, path in files.items():
        header = LazyTensors(path).metadata
        assert (header["task"], header["images"]) == (task, "8")
        assert header["split"] == ("val" if name == "regmean" else "train")
    expected = recipe(name, statistics=files, **settings)(vectors()).single()
    found = TaskVector.load(f"S/seed-0/merge/{name}/merged.safetensors")
    for parameter, value in found.items():
        torch.testing.assert_close(value, expected[parameter], atol=1e-7, rtol=1e-4)
    said = results()["seeds"]["0"]["merged"][name]["transform"]
    assert f"'seed-0/statistics/{name}/digits/{kind}.safetensors'" in said  # the same wherever the suite lies


def test_blocks_are_calibrated_on_the_suites_data(place) -> None:
    header = LazyTensors("S/seed-0/merge/featcal/merged.safetensors").metadata
    assert json.loads(header["calibration"])["inputs"] == {"digits": 8, "signs": 8}
    made = results()["settings"]["recipes"]["featcal"]["calibrate"]
    assert (made["class_path"], made["init_args"]["images"]) == ("lit_merge.evaluation.calibration.FeatCal", 8)
    start = recipe("task_arithmetic")(vectors()).single()
    found = TaskVector.load("S/seed-0/merge/featcal/merged.safetensors")
    for name, value in found.items():
        assert torch.allclose(value, start[name], atol=1e-6) == ("resblocks" not in name)


def test_joint_fine_tuning_is_a_reference(place, tmp_path) -> None:
    vector = TaskVector.load("S/seed-0/joint/fit/task_vector.safetensors")
    assert (vector.task, vector.metadata["step"]) == ("digits+signs", "3")
    assert results()["seeds"]["0"]["references"] == {"joint": accuracies("joint/test")}
    loaded = Results.load("S/results.json")
    assert loaded.references() == ["joint"]
    merged = ["halved", "learned", "operated", "fisher", "regmean", "featcal"]
    assert loaded.methods() == ["zero-shot", *merged, "joint", "individual"]
    assert loaded.merged_methods() == merged
    assert loaded.accuracy("joint", "signs") == [accuracies("joint/test")["signs"]]
    assert "| joint |" in markdown_table(loaded)
    assert results_figure(loaded, tmp_path / "a.png").stat().st_size > 10_000


def test_of_many_methods_the_table_has_a_row_each(place) -> None:
    many = results()
    merged = many["seeds"]["0"]["merged"]
    merged |= {f"fisher_{number}": merged["fisher"] for number in range(8)}
    table = accuracy_table(Results.from_dict(many))
    assert [str(column.header) for column in table.columns] == ["method", "digits", "signs", "mean"]
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    assert [row[0] for row in rows][-3:] == ["fisher 7", "joint", "individual"]
    expected = [100 * value for value in many["seeds"]["0"]["individual"].values()]
    assert rows[-1][1:] == tuple(f"{value:.1f}" for value in [*expected, sum(expected) / 2])


def test_results_without_references_are_read_as_before(place) -> None:
    plain = results()
    del plain["seeds"]["0"]["references"]
    assert Results.from_dict(plain).references() == []
    two = results()
    two["seeds"]["1"] = {**two["seeds"]["0"], "references": {}}
    with pytest.raises(Exception, match=r"expected the methods of seed 0 \(joint\) at seeds.1.references, got none"):
        Results.from_dict(two)
    named = results()
    named["seeds"]["0"]["merged"]["joint"] = named["seeds"]["0"]["merged"]["fisher"]
    with pytest.raises(Exception, match=r"expected a merged model under the name of its recipe at .*joint, got joint"):
        Results.from_dict(named)


def test_where_a_suite_lies_decides_nothing(place) -> None:
    config = yaml.safe_load(Path("suite.yaml").read_text())
    others = ("halved", "operated", "featcal")  # the parser makes a calibration of a configuration
    recipes = {name: Recipe(**one) for name, one in config["recipes"].items() if name not in others}
    plans = [
        SuitePlan("n", Path(place), config["model"], config["pretrained"], config["tasks"], {}, [0], config["fit"],
                  config["test"], recipes, joint=config["joint"])
        for place in ("here", "there/S")
    ]  # fmt: skip
    here, there = ([(stage.name, stage.settings) for stage in plan.stages] for plan in plans)
    assert here == there
    assert len(here) == 1 + 2 + 2 + 2 + 2 + 2 * (2 + 2)
    written = {path for stage in plans[1].stages for path in stage.paths(Path("there/S"))}
    assert all(set(stage.inputs) <= written for stage in plans[1].stages)


def test_only_what_changed_is_done_again(place, tmp_path, monkeypatch) -> None:
    """On a copy, as it changes what the other tests look at."""
    shutil.copytree(place, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    assert main(["suite", "--config=suite.yaml", "--output=S"]) == 0  # its files are new ones

    def ran(*options: str) -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in Path("S/stages").iterdir()}
        assert main(["suite", "--config=suite.yaml", "--output=S", *options]) == 0
        new = {path.stem for path in Path("S/stages").iterdir() if before.get(path) != path.stat().st_mtime_ns}
        return {name.removeprefix("seed-0--") for name in new}

    learned = {f"{kind}--{name}" for kind in ("merge", "test") for name in ("learned", "halved", "operated")}
    joint = {"joint--fit", "joint--test"}
    assert ran() == set()
    assert ran("--recipes.learned.trainer.max_steps=3") == learned
    assert ran("--recipes.learned.trainer.max_steps=3", "--joint.trainer.max_steps=2") == joint
    statistics = {f"statistics--fisher--{task}" for task in ("digits", "signs")} | {"merge--fisher", "test--fisher"}
    assert ran("--recipes.fisher.statistics.images=4") == learned | joint | statistics


# What is refused


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"learned": {"granularity": "task"}, "recipe": "ties"}, "learned: expected no recipe together with it"),
        ({"learned": {"model": "lit-tiny"}}, r"learned: expected no model, which the suite fills in, got 'lit-tiny'"),
        ({"recipe": "ties", "data": {"adapt_on": "val"}}, "data: expected only with learned"),
        ({"recipe": "ties", "trainer": {"max_steps": 1}}, "trainer: expected only with learned"),
        ({"recipe": "ties", "statistics": {}}, "statistics: expected only with recipe fisher or regmean"),
        ({"recipe": "fisher", "statistics": {"image": 3}}, "statistics: expected settings among split, .*got image"),
        ({"recipe": "fisher", "settings": {"flour": 1}}, "expected fields among .*'flour'"),
        ({"recipe": "adamerging", "settings": {"coefficients": "no.json"}}, "no.json: expected a file of coefficients"),
        ({"parts": [{"Trimm": {"density": 0.5}}, "Sum"]}, "Trim"),
        ({"recipe": "ties", "parts": ["Sum"]}, "parts"),
    ],
)  # fmt: skip
def test_a_recipe_is_refused(given, error, tmp_path) -> None:
    with pytest.raises(Exception, match=error):
        Recipe(**given).check(tmp_path)


def test_a_recipe_may_be_a_list_of_parts() -> None:
    listed = Recipe(parts=[{"Trim": {"density": 0.5}}, "Sum"], overrides=[{"names": "ln_", "parts": ["Mean"]}])
    listed.check()
    assert listed.description()["parts"] == [{"Trim": {"density": 0.5}}, "Sum"]
    assert Recipe(**listed.description()) == listed
    assert Recipe(**Recipe(**LEARNED).description()) == Recipe(**LEARNED)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--recipes={joint: {recipe: weight_average}}"], "other names than individual and zero-shot and joint"),
        (["--recipes.halved.parts=[{adamerging: {coefficients: S/seed-0/no.safetensors}}]"],
         "seed-0/merge/halved: expected a file that some stage writes, got S/seed-0/no.safetensors"),
        (["--linearized=true"], "Leave it out: --recipes.regmean=null"),
        (["--linearized=true", "--recipes.regmean=null"], "Leave it out: --recipes.featcal=null"),
        (["--recipes.featcal.calibrate.init_args.images=0"], "calibrate.images: expected a whole number"),
        (["--recipes.learned.learned.granularty=task"], "granularty"),
        (["--recipes.learned.data.adapt=val"], "adapt"),
        (["--joint.trainer.max_step=3"], "max_step"),
        (["--recipes.named=weight_avrage"], "recipes.named: recipe: expected the name of a method, got"),
        (["--recipes.listed=[Summ]"], "recipes.listed: part: expected a transform or recipe, got 'Summ'. Did you mean"),
        (["--recipes.odd=3"], "recipes"),
        (["--retries=-1"], "retries: expected a number of at least 0, got -1"),
        (["--parallel=0"], "parallel: expected a positive number, got 0"),
        (["--fit=missing.yaml"], "fit: expected settings or a YAML file of them, got missing.yaml (No such file"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_stage(place, options, expected, capsys) -> None:
    before = Path("S/results.json").read_bytes()
    assert main(["suite", "--config=suite.yaml", "--output=S", *options]) == 2
    assert expected in capsys.readouterr().err
    assert Path("S/results.json").read_bytes() == before


# Parts in files


def parts_of(*arguments: str) -> tuple[dict[str, Any], list[str]]:
    given = with_parts(arguments)
    named = {one.partition("=")[0][2:]: json.loads(one.partition("=")[2]) for one in given if one.startswith("--fit=")
             or one.startswith("--recipes=") or one.startswith("--joint=")}  # fmt: skip
    return named, [one for one in given if one.partition("=")[0][2:] not in named]


def test_parts_come_from_files_later_ones_over_earlier_ones(tmp_path, monkeypatch) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below/fit.yaml").write_text("trainer: {max_steps: 5, devices: 2}\nmodel: {init_args: {lr: 1e-3}}\n")
    (tmp_path / "suite.yaml").write_text(
        "name: n\nfit: [below/fit.yaml, {trainer: {max_steps: 6}}]\nrecipes: {a: {recipe: ties}}\nfit.model.x: 1\n"
    )
    monkeypatch.chdir(tmp_path / "below")
    named, others = parts_of("--config", "../suite.yaml", "--fit.trainer.accelerator", "cpu", "--recipes.b=null")
    assert named["fit"] == {
        "trainer": {"max_steps": 6, "devices": 2, "accelerator": "cpu"},
        "model": {"init_args": {"lr": 0.001}, "x": 1},
    }
    assert named["recipes"] == {"a": {"recipe": "ties"}, "b": None}
    assert [yaml.safe_load(one) for one in others] == ["--config", {"name": "n"}]
    named, _ = parts_of("--config=../suite.yaml", "--fit=fit.yaml", "--fit.trainer.devices=1", "--seeds+=1")
    assert named["fit"] == {"trainer": {"max_steps": 5, "devices": 1}, "model": {"init_args": {"lr": 0.001}}}
    assert with_parts(["--name=x", "--print_config"]) == ["--name=x", "--print_config"]
    assert parts_of("--joint", "null")[0] == {"joint": None}


def test_a_recipe_may_be_a_name_a_list_or_a_transform() -> None:
    own = {"class_path": "Chain", "init_args": {"steps": [{"class_path": "Sum"}]}}
    named, _ = parts_of(
        f"--recipes={json.dumps({'a': 'weight_average', 'b': [{'Trim': {'density': 0.2}}, 'Sum'], 'c': own})}",
        "--recipes.d=ties",
        "--recipes.e=null",
    )
    assert named["recipes"] == {
        "a": {"recipe": "weight_average"},
        "b": {"parts": [{"Trim": {"density": 0.2}}, "Sum"]},
        "c": {"transform": own},
        "d": {"recipe": "ties"},
        "e": None,
    }


def test_files_that_hold_no_settings(tmp_path) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigurationError, match=r"fit: expected a YAML file of settings, got .*list.yaml, .* list"):
        with_parts([f"--fit={tmp_path / 'list.yaml'}"])
    (tmp_path / "odd.yaml").write_text("a: [")
    with pytest.raises(ConfigurationError, match=r"test: expected settings or a YAML file of them, .*\(no YAML\)"):
        with_parts([f"--test={tmp_path / 'odd.yaml'}"])


def test_classes_in_parts_are_named_not_built(place, capsys) -> None:
    """A regime of a suite is as of fit; its classes are for the stages to build."""
    trainable = {"class_path": "lit_merge.models.Attention", "init_args": {"paradigm": 2}}
    options = ["--fit.model.class_path=lit_merge.FineTuneModule", "--recipes={}", "--joint=null", "--tasks=[signs]"]
    options.append(f"--fit.model.init_args.trainable={json.dumps(trainable)}")
    assert main(["suite", "--config=suite.yaml", "--output=T", *options]) == 0
    header = TaskVector.load("T/seed-0/fit/signs/task_vector.safetensors").metadata
    assert "Attention(paradigm=2)" in header["regime"]
    saved = yaml.safe_load(Path("T/suite.yaml").read_text())
    assert saved["fit"]["model"]["init_args"]["trainable"] == trainable
