"""The configurations of a suite's stages: the same network and tasks for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_merge import FineTuneModule
from lit_merge.commands.suite import suite
from lit_merge.data import MultiTaskDataModule, TaskDataModule
from lit_merge.data.sources import Task
from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.search import CoefficientSearch
from lit_merge.files.store import file_digest
from lit_merge.functional import products
from lit_merge.models.network import Network
from lit_merge.suite.plan import SuitePlan
from lit_merge.suite.recipe import Recipe
from lit_merge.suite.settings import SuiteSettings, task_names
from lit_merge.transforms import RegMean, Scale, Transform
from lit_merge.vectors import Coefficients, TaskVectors

NETWORK = {"class_path": f"{__name__}.TwoLayers", "init_args": {"width": 4}}
SOURCES = {
    "odd": {"class_path": f"{__name__}.Numbers", "init_args": {"name": "odd"}},
    "even": {"class_path": f"{__name__}.Numbers", "init_args": {"name": "even", "digested": True}},
}
PENALTY = {"model": {"init_args": {"linearized": True, "penalty": {"schedule": "strict"}}}}
RECIPES = {
    "average": Recipe("weight_average"),
    "fisher": Recipe("fisher", statistics={"images": 4}),
    "learned": Recipe(learned={"granularity": "task"}),
}


OPENED: list[Network] = []


class TwoLayers(Network):
    """A network of one's own."""

    def __init__(self, width: int = 3) -> None:
        self.name, self.module = "two-layers", nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))
        OPENED.append(self)

    def head(self, task: Any) -> nn.Module:
        return nn.Identity()


class Numbers(Task):
    """A task of one's own."""

    def __init__(self, name: str, digested: bool = False) -> None:
        self.name, self.classes = name, ("one", "two")
        if digested:
            self.digest = lambda: f"content of {name}"

    def split(self, split: str, preprocessing: Any, augmentation_seed: int | None = None) -> Any:
        raise NotImplementedError


class Own(FineTuneModule):
    """A module of one's own, with a setting of its own."""

    def __init__(self, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)


def settings(kind: type[SuiteSettings] = SuiteSettings, **given: Any) -> Any:
    known = {"name": "n", "directory": Path("S"), "model": "lit-tiny", "pretrained": None, "tasks": ["digits"],
             "paths": {}, "seeds": [0], "fit": {}, "test": {}, "recipes": RECIPES}  # fmt: skip
    return kind(**known | given)


def own(kind: type[SuiteSettings] = SuiteSettings, **given: Any) -> Any:
    """A suite of a network and tasks of one's own beside an embedded one."""
    tasks = ["digits", "odd", "even"]
    return settings(kind, **{"network": NETWORK, "sources": SOURCES, "tasks": tasks, "joint": {}} | given)


# The network


def test_every_stage_gets_the_network_and_no_model() -> None:
    suite = own()
    modules = [suite.fit_config(0, "digits"), suite.fit_config(0, "odd"), suite.joint_config(0)]
    modules += [suite.learned_config(0, RECIPES["learned"], ["a"]), suite.test_config(suite.all_data(), {})]
    modules += [suite.test_config(suite.task_data("odd", 0), {"task_vector": Path("t")})]
    for config in modules:
        assert config["model"]["init_args"]["network"] == NETWORK
        assert not {"model", "pretrained"} & config["model"]["init_args"].keys()


def test_merges_and_statistics_get_the_network_too() -> None:
    plan = own(SuitePlan, tasks=["digits"], sources={})
    OPENED.clear()
    commands = {"merge": 2, "statistics": 1}
    for command, count in commands.items():
        found = [stage.config for stage in plan.stages if stage.command == command]
        assert len(found) == count
        for config in found:
            assert config["network"] == NETWORK
            assert not {"model", "pretrained"} & config.keys()
    described = plan.model_description
    assert (described["name"], described["parameters"]) == ("two-layers", 3 * 4 + 5 * 2)
    assert described["fingerprint"] == OPENED[-1].fingerprint
    assert len(OPENED) == 1  # the plan opens it once
    assert all(stage.settings["network"] == NETWORK for stage in plan.stages)
    assert plan.description()["network"] == NETWORK
    assert "model" not in plan.description()


def test_without_a_network_it_is_model_and_pretrained() -> None:
    suite = settings(pretrained="shipped")
    for config in (suite.fit_config(0, "digits"), suite.test_config(suite.all_data(), {})):
        arguments = config["model"]["init_args"]
        assert (arguments["model"], arguments["pretrained"]) == ("lit-tiny", "shipped")
        assert "network" not in arguments


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ({"class_path": f"{__name__}.NoNetwork"}, "network: expected class_path and init_args of a Network"),
        ({"class_path": f"{__name__}.Numbers", "init_args": {"name": "a"}}, "network: expected .* of a Network"),
        ({"class_path": f"{__name__}.TwoLayers", "init_args": {"widht": 3}}, "network: expected .*widht"),
    ],
)
def test_what_is_no_network_is_refused(network, expected) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        assert settings(SuitePlan, network=network).model_description


def test_a_network_excludes_model_and_pretrained() -> None:
    for given in ({"model": "ViT-B-32"}, {"pretrained": "random"}):
        with pytest.raises(ConfigurationError, match=f"network: expected no {next(iter(given))} together with it"):
            settings(SuitePlan, network=NETWORK, **given).check(lambda *_: None)


@pytest.mark.parametrize("name", ["Linearised", "Direct"])
def test_a_linearised_parametrisation_is_evaluated_linearised(name) -> None:
    parametrisation = {"class_path": f"lit_merge.models.parametrisations.{name}"}
    suite = own(fit={"model": {"init_args": {"parametrisation": parametrisation}}})
    configs = [suite.joint_config(0), suite.learned_config(0, RECIPES["learned"], [])]
    configs += [suite.test_config(data, {}) for data in (suite.all_data(), suite.task_data("odd", 0))]
    for config in configs:
        assert config["model"]["init_args"].get("linearized", False) == (name == "Linearised")
        assert "parametrisation" not in config["model"]["init_args"]
    wrong = {"class_path": "lit_merge.models.parametrisations.Bent"}
    with pytest.raises(ConfigurationError, match=r"fit\.model\.init_args\.parametrisation: expected the import path"):
        assert own(fit={"model": {"init_args": {"parametrisation": wrong}}}).trained_linearized


# Tasks


def test_tasks_are_given_as_objects() -> None:
    suite = own(fit=PENALTY, data={"workers": 2, "root": "elsewhere"})
    one = suite.task_data("odd", 3)
    assert one == {
        "class_path": "lit_merge.data.TaskDataModule",
        "init_args": {"workers": 2, "source": SOURCES["odd"], "name": "odd", "seed": 3},
    }
    several = suite.all_data()["init_args"]
    assert (several["tasks"], several["paths"], several["sources"]) == (["digits"], None, SOURCES)
    others = suite.fit_config(0, "digits")["data"]["init_args"]
    assert (others["task"], others["other_tasks"], others["other_sources"]) == ("digits", [], SOURCES)
    others = suite.fit_config(0, "odd")["data"]["init_args"]
    assert (others["other_tasks"], others["other_sources"]) == (["digits"], {"even": SOURCES["even"]})
    learned = suite.learned_config(0, RECIPES["learned"], [])["data"]
    assert (learned["class_path"], learned["init_args"]["sources"]) == ("lit_merge.data.MergeDataModule", SOURCES)
    assert "sources" not in settings().all_data()["init_args"]
    assert "other_sources" not in settings(fit=PENALTY).fit_config(0, "digits")["data"]["init_args"]


def test_the_names_of_all_tasks() -> None:
    assert task_names(["digits"], {"a": "folder"}, SOURCES) == ["digits", "a", "odd", "even"]
    assert task_names(None, None, SOURCES) == ["odd", "even"]
    assert len(task_names(None, None, None)) == 8
    with pytest.raises(ConfigurationError, match="tasks: expected every task once, got 'odd' twice"):
        task_names(["odd"], None, SOURCES)


def test_control_tasks_are_evaluated_and_not_trained_on() -> None:
    average = {"average": RECIPES["average"]}
    plan = own(SuitePlan, tasks=["odd"], control=["digits", "even"], joint=None, recipes=average)
    several = plan.all_data()["init_args"]
    assert (several["tasks"], several["sources"]) == (["digits"], SOURCES)
    stages = [stage.name for stage in plan.stages]
    assert stages[1:] == ["seed-0/fit/odd", "seed-0/individual/odd", "seed-0/merge/average", "seed-0/test/average"]
    assert plan.description()["control"] == ["digits", "even"]
    for given, got in (
        ({"tasks": []}, "no other task"),
        ({"joint": {}}, "joint"),
        ({"recipes": RECIPES}, "learned learned"),
    ):
        with pytest.raises(ConfigurationError, match=f"control: expected tasks to be kept, .* got {got}. Remove one"):
            own(SuitePlan, **{"tasks": ["odd"], "joint": None, "recipes": average, "control": ["even"]} | given).check(
                lambda *_: None
            )
    with pytest.raises(ConfigurationError, match=r"control: expected some of the tasks \(digits\), got 'land'\. Add"):
        suite("nowhere", tasks=["digits"], control=["land"])


def test_a_penalty_reads_no_control_task() -> None:
    plan = own(SuitePlan, tasks=["odd", "digits"], control=["even", "letters"], joint=None, recipes={}, fit=PENALTY)
    read = plan.fit_config(0, "odd")["data"]["init_args"]
    assert (read["other_tasks"], read["other_paths"]) == (["digits"], None)
    assert "other_sources" not in read
    read = plan.fit_config(0, "digits")["data"]["init_args"]
    assert (read["other_tasks"], read["other_sources"]) == ([], {"odd": SOURCES["odd"]})
    alone = own(SuitePlan, tasks=["odd"], control=["even"], joint=None, recipes={}, fit=PENALTY)
    with pytest.raises(ConfigurationError, match=r"penalty: expected several tasks, .* got 'odd' alone and control"):
        alone.check(lambda *_: None)


def test_a_tasks_content_counts() -> None:
    """By its own digest if it has one, otherwise by what it is made from."""
    plan = own(SuitePlan, joint=None)
    keys = {stage.name: stage.settings["images"] for stage in plan.stages}
    assert keys["seed-0/fit/odd"] == SOURCES["odd"]
    assert keys["seed-0/fit/even"] == "content of even"
    assert keys["seed-0/fit/digits"] is None
    assert keys["zero-shot"] == {"odd": SOURCES["odd"], "even": "content of even"}


def test_what_is_no_task_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"sources\.odd: expected class_path and init_args of a Task"):
        assert own(SuitePlan, sources={"odd": NETWORK}, tasks=["odd"]).data_module


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"recipe": "slerp"}, r"recipes.a: Slerp: expected two vectors, got 3 \(digits, odd, even\)"),
        ({"recipe": "tall_masks"}, "recipes.a: expected a method that leaves one vector for all tasks, got .*leaves 3"),
        ({"parts": ["Trim"]}, "which leaves 3. Add a part that reduces them, e.g. Sum"),
        ({"parts": [{"KnOTS": {"merge": "Trim"}}]}, "which leaves 3. Add a part that reduces them, e.g. Sum"),
        ({"recipe": "consensus_ta", "settings": {"k": 4}}, r"at most the number of task vectors \(3\), got 4"),
        ({"recipe": "task_arithmetic", "settings": {"coefficient": [1, 0]}}, r"one per task \(3: .*\), got 2"),
        (
            {"parts": ["Sum"], "overrides": [{"names": "^1", "parts": ["ElectSign"]}]},
            "number of vectors, got 1 and 3",
        ),
        ({"parts": ["Sum"], "overrides": [{"names": "none", "parts": ["Mean"]}]}, "none of 4 .such as 0.weight, 0.b"),
        (
            {"recipe": "consensus_ta", "search": CoefficientSearch(fields={"k": [2, 4], "coefficient": [0.1, 0.2]})},
            r"recipes.a: ConsensusMask.k: expected at most the number of task vectors \(3\), got 4",
        ),
        ({"recipe": "lines"}, "LiNeS: expected parameters in numbered blocks"),
        ({"learned": {"parts": ["Trim", "Sum"]}}, "a vector for each task, .* which leaves 1. Leave out what reduces"),
        ({"learned": {"parts": ["Trimm"]}}, "recipes.a: part: expected a transform or recipe, got 'Trimm'"),
    ],
    ids=str,
)
def test_vectors_that_a_recipe_would_refuse_are_refused_before(recipe, expected) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        own(SuitePlan, joint=None, recipes={"a": Recipe(**recipe)}).check(lambda *_: None)


@dataclass(frozen=True)
class Measured(Transform):
    """A transform of one's own that looks at the vectors at once."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        return Scale(float(vectors["0.weight"].norm()))(vectors)


def test_recipes_that_can_only_be_tried_later_pass(tmp_path) -> None:
    coefficients = Coefficients(torch.ones(3, 1), ("digits", "odd", "even"), ("all",), dict.fromkeys("ab", "all"))
    for seed in (3, 4):
        coefficients.save(tmp_path / f"{seed}.json")
    recipes = {
        "own": Recipe(transform=Measured()),
        "blocks": Recipe(parts=[{"ScaleBlocks": {"coefficients": [1.0]}}, "Sum"]),
        "by_seed": Recipe("adamerging", settings={"coefficients": f"{tmp_path}/{{seed}}.json"}),
        "slerp": Recipe(parts=[{"Slerp": {"space": "weights"}}]),
        "learned": Recipe(learned={"parts": ["Trim", "ElectSign"]}),
    }
    own(SuitePlan, tasks=["odd", "even"], seeds=[3, 4], joint=None, recipes=recipes).check(lambda *_: None)


# The module that tests


def test_one_task_is_tested_by_the_module_that_was_fine_tuned() -> None:
    model = {
        "class_path": f"{__name__}.Own",
        "init_args": {
            "temperature": 2.0,
            "learning_rate": 1e-3,
            "penalty": {},
            "head": {"class_path": "torch.nn.Identity"},
        },
    }
    suite = settings(fit={"model": model})
    tested = suite.test_config(suite.task_data("digits", 0), {"task_vector": Path("t")})["model"]
    assert tested["class_path"] == f"{__name__}.Own"
    expected = {"temperature": 2.0, "head": model["init_args"]["head"], "task_vector": "t"}
    assert tested["init_args"] == {**expected, "model": "lit-tiny", "pretrained": None}
    several = suite.test_config(suite.all_data(), {})["model"]
    assert several["class_path"] == "lit_merge.modules.MultiTaskModule"
    assert "temperature" not in several["init_args"]


def test_all_tasks_are_tested_by_the_module_that_test_names() -> None:
    model = {"class_path": "my.Several", "init_args": {"extra": 1}}
    suite = settings(test={"model": model, "trainer": {"accelerator": "cpu"}})
    several = suite.test_config(suite.all_data(), {})
    assert several["model"]["class_path"] == "my.Several"
    assert several["model"]["init_args"]["extra"] == 1
    one = suite.test_config(suite.task_data("digits", 0), {})
    assert one["model"]["class_path"] == "lit_merge.modules.FineTuneModule"
    assert "extra" not in one["model"]["init_args"]
    assert one["trainer"]["accelerator"] == "cpu"
    both = settings(test={"model": {"init_args": {"linearized": True}}})
    for data in (both.all_data(), both.task_data("digits", 0)):
        assert both.test_config(data, {})["model"]["init_args"]["linearized"] is True


# Precision


@pytest.mark.parametrize(
    ("tested", "own_choice", "expected"),
    [
        (None, {}, None),
        ("bf16-mixed", {}, "bf16-mixed"),
        ("bf16-mixed", {"precision": "16-mixed"}, "16-mixed"),
        ("64-true", {}, None),
    ],
)
def test_a_coefficient_is_chosen_in_the_precision_of_the_tests(tested, own_choice, expected) -> None:
    searched = {"searched": Recipe("task_arithmetic", search=CoefficientSearch(**own_choice))}
    test = {"trainer": {"precision": tested}} if tested else {}
    plan = settings(SuitePlan, tasks=["digits"], recipes=searched, test=test)
    stage = next(stage for stage in plan.stages if stage.name == "seed-0/merge/searched")
    assert stage.config["search"].get("precision") == expected


# Factors of other tasks, for a penalty that reads no data of theirs


TAK = {"class_path": "lit_merge.modules.Tak", "init_args": {"weight": 3.0}}


def of_tak(penalty=TAK, statistics=None, **given):
    fit = {"model": {"init_args": {"linearized": True, "penalty": penalty}}}
    fit |= {} if statistics is None else {"statistics": statistics}
    return own(SuitePlan, fit=fit, seeds=[0, 1], recipes={}, joint=None, **given)


def test_factors_of_every_task_come_before_the_fits() -> None:
    plan = of_tak(statistics={"images": 5, "corrected": True})
    plan.check_statistics()
    stages = {stage.name: stage for stage in plan.stages}
    collected = [name for name in stages if name.startswith("statistics/")]
    assert collected == ["statistics/digits", "statistics/odd", "statistics/even"]  # once for all seeds
    one = stages["statistics/even"]
    assert one.command == "statistics"
    assert one.config["data"]["init_args"]["source"] == SOURCES["even"]
    given = {"kind": "kfac", "images": 5, "corrected": True, "network": NETWORK}
    assert given.items() <= one.config.items()
    assert one.config["output"] == "S/statistics/even/kfac.safetensors"
    assert one.inputs == ()
    assert one.settings["images"] == "content of even"
    for seed in (0, 1):
        fit = stages[f"seed-{seed}/fit/odd"]
        files = {task: f"S/statistics/{task}/kfac.safetensors" for task in ("digits", "even")}
        assert fit.config["model"]["init_args"]["penalty"]["init_args"] == {"weight": 3.0, "files": files}
        assert fit.inputs == tuple(map(Path, files.values()))
        assert "statistics" not in fit.config
        assert "S/" not in str(fit.settings)  # what is in the files counts, not where they are
        assert "other_tasks" not in fit.config["data"]["init_args"]  # no image of another task
    assert not plan.penalised


def test_factors_of_a_reference_or_of_files_given() -> None:
    plan = of_tak(statistics={"tasks": ["signs"]})
    plan.check_statistics()
    stages = {stage.name: stage for stage in plan.stages}
    assert [name for name in stages if name.startswith("statistics/")] == ["statistics/signs"]
    assert stages["statistics/signs"].config["data"]["init_args"]["task"] == "signs"
    penalty = stages["seed-0/fit/even"].config["model"]["init_args"]["penalty"]
    assert penalty["init_args"]["files"] == {"signs": "S/statistics/signs/kfac.safetensors"}
    plan = of_tak({"class_path": "Tak", "init_args": {"files": {"signs": "elsewhere.safetensors"}}})
    assert not [stage for stage in plan.stages if stage.command == "statistics"]
    assert of_tak({"schedule": "strict"}).penalised  # the τJp penalty as before
    assert not of_tak({"class_path": "OrthoReg"}).penalised


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"penalty": {"schedule": "strict"}, "statistics": {"images": 5}}, "only with a penalty that reads factors"),
        ({"statistics": {"labels": "true"}}, "fit.statistics: expected settings among tasks, images, .* got labels"),
        ({"statistics": {"tasks": ["odd"]}}, "expected factors of another task than 'odd' for its penalty, got none"),
        ({"penalty": {"class_path": "Tuk"}}, "fit.model.init_args.penalty: expected the import path of a class"),
    ],
    ids=str,
)
def test_factors_that_nothing_could_use_are_refused(given, expected) -> None:
    with pytest.raises(ConfigurationError, match=expected) as error:
        of_tak(**given).check_statistics()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_precision_that_is_slow_here_is_said_before_the_stages_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_cpu: bool
) -> None:
    monkeypatch.setattr(products, "bfloat16_cost", lambda: 20.0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: not on_cpu)
    slow = {"trainer": {"precision": "bf16-mixed"}}
    recipes = {"learned": Recipe(learned={"granularity": "task"}, **slow)}
    plan = SuitePlan("n", tmp_path, "lit-tiny", None, ["digits"], {}, [0], {}, slow, recipes)
    expected = (
        "test.trainer.precision bf16-mixed: this processor has no units for bfloat16; its products take 20 times as "
        "long as those of float32 (measured). Use 32-true."
    )
    assert plan.cautions() == ([expected] if on_cpu else [])


# What decides, and what does not


FOLDER = {"class_path": "lit_merge.data.images.folders.FolderSource", "init_args": {"path": "colours"}}
CORRUPTED = {
    "class_path": "lit_merge.data.CorruptedTask",
    "init_args": {"task": FOLDER, "corruption": "gaussian_noise"},
}


def keys_of(**given: Any) -> dict[str, Any]:
    """Stage -> what its key is made of, of a suite with the task hues."""
    plan = settings(SuitePlan, **{"tasks": ["digits", "hues"], "recipes": {"average": RECIPES["average"]}} | given)
    return {stage.name: (stage.settings, [file_digest(path) for path in stage.inputs if path.is_file()])
            for stage in plan.stages}  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {"paths": {"hues": "colours"}},
        {"paths": {"hues": "~/colours"}},
        {"sources": {"hues": FOLDER}},
        {"sources": {"hues": CORRUPTED}},
    ],
    ids=["path", "home", "source", "corrupted"],
)
def test_the_content_of_a_folder_counts(given, tmp_path, write_colours, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_colours(tmp_path / "colours", 3)
    before = keys_of(**given)
    assert keys_of(**given) == before
    (tmp_path / "colours/blue/0.png").rename(tmp_path / "colours/blue/another.png")
    after = keys_of(**given)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"zero-shot", "seed-0/fit/hues", "seed-0/individual/hues", "seed-0/test/average"}


@pytest.mark.parametrize("fit", [{}, PENALTY], ids=["alone", "penalised"])
def test_neither_the_place_of_images_nor_who_reads_them_counts(fit, tmp_path, write_colours) -> None:
    """A suite goes on from another folder with the same content, and with other workers."""
    here, there = write_colours(tmp_path / "here", 3), write_colours(tmp_path / "there" / "hues", 3)
    before = keys_of(fit=fit, paths={"hues": str(here)}, data={"workers": 0, "evaluation_batch_size": 8})
    assert keys_of(fit=fit, paths={"hues": str(there)}, data={"workers": 2, "evaluation_batch_size": 8}) == before
    assert keys_of(fit=fit, paths={"hues": str(there)}, data={"evaluation_batch_size": 4}) != before


def test_the_content_of_files_that_a_part_names_counts(tmp_path, write_colours) -> None:
    factors, gram = tmp_path / "factors.safetensors", tmp_path / "gram.safetensors"
    penalty = {"class_path": "lit_merge.modules.Tak", "init_args": {"files": {"signs": str(factors)}}}
    given = {
        "paths": {"hues": str(write_colours(tmp_path / "colours", 3))},
        "fit": {"model": {"init_args": {"penalty": penalty}}},
        "recipes": {"mean": Recipe(transform=RegMean({"digits": str(gram), "hues": str(gram)}))},
    }
    for path in (factors, gram):
        path.write_bytes(b"one")
    before = keys_of(**given)
    for path, expected in ((factors, {"seed-0/fit/digits", "seed-0/fit/hues"}), (gram, {"seed-0/merge/mean"})):
        path.write_bytes(b"two")
        after = keys_of(**given)
        assert {name for name in before if before[name] != after[name]} == expected
        before = after


@pytest.mark.parametrize("fit", [{}, PENALTY], ids=["alone", "penalised"])
def test_every_task_takes_the_settings_of_data_that_are_about_it(fit, tmp_path, write_colours) -> None:
    data = {
        "root": str(tmp_path),
        "workers": 2,
        "fractions": [0.6, 0.2, 0.2],
        "templates": {"hues": ["a {} patch."], "mnist": ["the digit {}."]},
        "class_names": {"hues": {"dark_red": "crimson"}},
    }
    paths = {"hues": str(write_colours(tmp_path / "colours", 5))}
    suite = settings(tasks=["digits", "mnist", "hues"], paths=paths, data=data, fit=fit)
    made = {task: TaskDataModule(**suite.task_data(task, 1)["init_args"]) for task in suite.tasks}
    assert {one.workers for one in made.values()} == {2}
    assert made["mnist"].source.root == tmp_path
    assert made["mnist"].templates == ("the digit {}.",)
    assert made["hues"].templates == ("a {} patch.",)
    assert set(made["hues"].classes) == {"blue", "green", "crimson"}
    for task in suite.tasks:  # with a penalty it reads the others as well
        trained = TaskDataModule(**suite.fit_config(0, task)["data"]["init_args"])
        assert trained.templates == made[task].templates
    several = MultiTaskDataModule(**suite.all_data()["init_args"])
    assert several.tasks["hues"].templates == made["hues"].templates
