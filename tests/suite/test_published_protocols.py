"""The papers' protocols: their numbers, and every file from end to end on tiny copies of the real data sets."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders.published_files import write_published

from lit_merge.commands.main import main
from lit_merge.data.published.registry import REGISTRY, SUITES
from lit_merge.evaluation.calibration import FeatCal, RegMeanPlusPlus
from lit_merge.models import full_clip_model, save_clip
from lit_merge.report import Results
from lit_merge.suite.overlays import with_parts
from lit_merge.transforms import RECIPES
from lit_merge.vectors import Coefficients, TaskVector

ROOT = Path(__file__).parents[2]
SUITE_FILES = sorted((ROOT / "configs/suite").glob("clip*.yaml"))
REGIMES = [
    "full",
    "linearized",
    "attention",
    "exp_lr",
    "lin_lr",
    "half_ft",
    "last_ft",
    "tau_jp_cyclic",
    "tau_jp_strict",
]
MODELS = {"b32": "ViT-B-32-quickgelu", "b16": "ViT-B-16-quickgelu", "l14": "ViT-L-14-quickgelu"}
RECIPE_FILE = ROOT / "configs/suite/protocol/recipes.yaml"


def loaded(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def resolved(*arguments: str) -> dict[str, Any]:
    """A suite's configuration as the command takes it."""
    whole: dict[str, Any] = {}
    for argument in with_parts(arguments):
        name, equals, value = argument.removeprefix("--").partition("=")
        if equals:
            whole[name] = json.loads(value)
        elif argument != "--config":
            whole |= yaml.safe_load(argument)
    return whole


# The numbers


def test_there_is_one_for_every_model_and_list_of_tasks() -> None:
    found = {path.stem: loaded(path) for path in SUITE_FILES}
    assert set(found) == {f"{tasks}_vit_{model}" for tasks in ("clip8", "clip14", "clip20") for model in MODELS}
    for name, config in found.items():
        tasks, _, model = name.partition("_vit_")
        assert tuple(config["tasks"]) == SUITES[tasks]
        assert (config["model"], config["pretrained"]) == (MODELS[model], "openai")
        assert (config["name"], config["output"]) == (name, f"runs/{name}")
        other = found[f"clip8_vit_{model}"]  # nothing else differs
        different = {"name", "output", "tasks", "expected"}
        assert {key: config[key] for key in config.keys() - different} == {
            key: other[key] for key in other.keys() - different
        }


def regime_files(regime: str, suite: str) -> str:
    """A regime's configuration and then that of a suite's network, as ``--fit`` takes them."""
    network = suite.partition("_")[2]
    return json.dumps([f"configs/finetune/{regime}.yaml", f"configs/finetune/clip_{network}.yaml"])


@pytest.mark.parametrize("regime", ["", *REGIMES])
@pytest.mark.parametrize("path", SUITE_FILES, ids=lambda path: path.stem)
def test_fine_tuning_is_the_papers(path, regime, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    given = [f"--fit={regime_files(regime, path.stem)}"] if regime else []
    fit = resolved("--config", str(path), *given)["fit"]
    trainer, model, data = fit["trainer"], fit["model"]["init_args"], fit["data"]["init_args"]
    assert trainer["max_steps"] == 2000
    assert data["batch_size"] * trainer.get("accumulate_grad_batches", 1) == 128
    assert trainer.get("accumulate_grad_batches", 1) == (2 if "l14" in path.stem else 1)
    assert (model["learning_rate"], model["weight_decay"], model["gradient_clip"]) == (1e-5, 0.1, 1.0)
    assert model["warmup_fraction"] * trainer["max_steps"] == 200
    assert (model["model"], model["pretrained"]) == (MODELS[path.stem.rpartition("_")[2]], "openai")
    assert ("penalty" in model) == regime.startswith("tau_jp")
    if "penalty" in model:  # on an eighth of the batch, however that is divided
        assert model["linearized"]
        assert model["penalty"] == {"schedule": regime.removeprefix("tau_jp_"), "weight": 0.1}


def test_merging_is_the_papers() -> None:
    recipes = loaded(RECIPE_FILE)
    named = {recipe.get("recipe") for recipe in recipes.values()}
    several = {"tall_masks", "emr"}  # which leave a model per task
    for_few = {"negation", "analogy", "rewarded_soup", "slerp", "nearswap"}
    # Of papers with protocols of their own.
    newer = {"magmax", "pcb", "sce", "ram", "ram_plus", "tatr", "doge", "knots", "core_space"}
    newer |= {"iwudi", "swudi", "aswudi", "actmerge", "optmerge", "cart", "esm", "dc_merge", "svc", "ace", "orthomerge"}
    newer |= {"continual", "continual_average"}
    assert set(RECIPES) - named - newer == {*several, *for_few, "adamerging"}
    assert recipes["task_arithmetic"]["search"] == {}  # 21 points in [0, 1], by default
    assert recipes["task_arithmetic_fixed"]["settings"] == {"coefficient": 0.3}
    assert recipes["ties"]["settings"] == {"density": 0.2}
    assert recipes["ties"]["search"]["values"] == pytest.approx([0.1 * step for step in range(1, 16)])
    assert recipes["dare"]["settings"] == {"p": 0.9}
    assert recipes["consensus_ta"]["settings"] == {"k": 2}
    assert recipes["consensus_ta"]["search"]["fields"]["ConsensusMask.threshold"] == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert recipes["lines"] == {
        "recipe": "lines", "settings": {"alpha": "norm_ratio"}, "search": {"field": "LiNeS.beta"}
    }  # fmt: skip
    assert recipes["regmean"]["settings"] == {"off_diagonal": 0.9}
    for name, recipe in recipes.items():
        if "learned" in recipe:
            learned = recipe["learned"]
            assert name.startswith("adamerging")
            assert (learned["init"], learned["clamp"], float(learned["learning_rate"])) == (0.3, [0.0, 1.0], 1e-3)
            assert learned["granularity"] == ("task" if name.endswith("task_wise") else "tensor")
            ties = [{"Trim": {"density": 0.2}}, "ElectSign"] if "plus_plus" in name else None
            assert learned.get("parts") == ties
            assert recipe["trainer"] == {"max_steps": 500}
            assert recipe["data"]["batch_size"] == 16
            unlabelled = recipe["data"]["adapt_on"] == "test" and "labelled" not in recipe["data"]
            assert unlabelled == ("supervised" not in name)


def test_joint_fine_tuning_sees_as_many_images_of_a_task() -> None:
    for path in SUITE_FILES:
        joint = resolved("--config", str(path))["joint"]
        images = joint["data"]["init_args"]["batch_size"] * joint["trainer"].get("accumulate_grad_batches", 1)
        assert images * joint["trainer"]["max_steps"] == 2000 * 128


# From end to end


@pytest.fixture(scope="module")
def reading_clip(clip_config, tmp_path_factory) -> tuple[str, str]:
    """The tests' CLIP, but it reads class names to their end, where those of traffic signs differ; and weights."""
    folder = tmp_path_factory.mktemp("clip")
    config = json.loads(Path(clip_config).read_text(encoding="utf-8"))
    config["text_cfg"]["context_length"] = 32
    path = folder / "tiny-clip.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = full_clip_model(str(path))[0].state_dict()
    return str(path), str(save_clip(folder / "tiny-clip.safetensors", state, {}, torch.float32))


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Callable[..., str]:
    """``data_root("mnist", …)``: the folder of the published data sets, these being there in their real formats."""
    root, written = tmp_path_factory.mktemp("data"), set[str]()

    def with_data_sets(*names: str) -> str:
        for name in names:
            if name not in written:  # of few classes 40 images are held out for validation, some of every class
                entry = REGISTRY[name]
                few = len(entry.classes) <= 10 and entry.validation == "from train"
                write_published(name, root, per_class=math.ceil((400 if few else 20) / len(entry.classes)))
                written.add(name)
        return str(root)

    return with_data_sets


@pytest.fixture
def run(
    tmp_path, monkeypatch, clip_config, clip_weights, reading_clip, data_root, few_images_cache
) -> Callable[..., Path]:
    """``run(suite, tasks, recipes, …)``: run one of the files, made small by its command line; returns the output."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("LIT_MERGE_CACHE", str(few_images_cache))

    def run(suite: str, tasks: list[str], recipes: list[str], joint: bool, *options: str) -> Path:
        path = f"configs/suite/{suite}.yaml"
        model, pretrained = reading_clip if "gtsrb" in tasks else (clip_config, clip_weights)
        small = {
            "model": model,
            "pretrained": pretrained,
            "output": str(tmp_path / "S"),
            "data.root": data_root(*tasks),
            "data.workers": "0",
            "tasks": json.dumps(tasks),
        }
        arguments = [f"--{key}={value}" for key, value in small.items()]
        arguments += options
        arguments += [f"--fit.{key}" for key in ("trainer.max_steps=2", "trainer.accelerator=cpu")]
        arguments += [f"--fit.data.init_args.{key}" for key in ("batch_size=2", "workers=0")]
        arguments += ["--test.trainer.accelerator=cpu"]
        joints = ("trainer.max_steps=2", "trainer.accelerator=cpu", "data.init_args.batch_size=1")
        arguments += [f"--joint.{key}" for key in joints] if joint else ["--joint=null"]
        for name, recipe in loaded(RECIPE_FILE).items():
            arguments += [f"--recipes.{name}{change}" for change in _shrunk(recipe)] if name in recipes else [
                f"--recipes.{name}=null"
            ]  # fmt: skip
        assert main(["suite", "--config", path, *arguments]) == 0
        return tmp_path / "S"

    return run


def _shrunk(recipe: dict[str, Any]) -> list[str]:
    """What makes a recipe small."""
    if "learned" in recipe:
        return [".trainer.max_steps=2", ".trainer.accelerator=cpu", ".data.batch_size=2"]
    if "statistics" in recipe:
        return [".statistics.images=2"]
    search = recipe.get("search")
    if search is None:
        return []
    if "fields" in search:
        few = {name: values[:2] for name, values in search["fields"].items()}
        return [f".search.fields={json.dumps(few)}"]
    return [".search.values=[0.3, 0.5]"]


RUNS: list[tuple[str, list[str], list[str], bool, str, str]] = [
    # suite, tasks, recipes, joint, regime, what the task vectors' header says of it. A search for a coefficient needs
    # models that get something right: it has tasks of few classes, of which a guess gets some.
    ("clip8_vit_b32", ["sun397", "cars", "resisc45", "gtsrb"], ["task_arithmetic_fixed", "adamerging"], True,
     "", "full"),
    ("clip8_vit_b32", ["svhn", "dtd"], ["fisher"], False, "tau_jp_strict", "strict"),
    ("clip8_vit_b16", ["svhn", "mnist"], ["task_arithmetic", "lines", "adamerging_task_wise"], False,
     "linearized", "linearized"),
    ("clip8_vit_l14", ["eurosat", "mnist"], ["weight_average", "ties", "dare_ties"], True, "", "full"),
    ("clip14_vit_b32", ["cifar100", "oxford_pets"], ["karcher", "tsv_m", "regmean"], False, "attention", "Attention"),
    ("clip14_vit_b16", ["stl10", "fer2013"], ["dare", "consensus_ta", "iso_c"], False, "lin_lr", "LinLR"),
    ("clip14_vit_l14", ["pcam", "fer2013"], ["breadcrumbs", "consensus_ties", "adamerging_plus_plus"], False,
     "exp_lr", "ExpLR"),
    ("clip20_vit_b32", ["emnist", "cifar10"], ["della", "iso_cts", "adamerging_plus_plus_task_wise"], False,
     "half_ft", "LastBlocks"),
    ("clip20_vit_b16", ["food101", "flowers102"], ["model_stock", "wudi", "adamerging_supervised"], False,
     "last_ft", "LastBlocks"),
    ("clip20_vit_l14", ["rendered_sst2", "kmnist", "fashion_mnist"], ["lines_consensus", "lines_ties"], False,
     "tau_jp_cyclic", "cyclic"),
]  # fmt: skip


def test_calibrations_are_the_papers() -> None:
    recipes = loaded(RECIPE_FILE.with_name("calibrations.yaml"))
    made = {name: recipe["calibrate"]["class_path"] for name, recipe in recipes.items()}
    assert made == {"regmean_plus_plus": "RegMeanPlusPlus", "featcal": "FeatCal"}
    for name, rule in (("regmean_plus_plus", RegMeanPlusPlus()), ("featcal", FeatCal())):
        assert type(rule)(**recipes[name]["calibrate"]["init_args"]) == rule
    assert recipes["featcal"]["settings"] == {"coefficient": 0.3}


def test_every_file_is_run() -> None:
    assert {run[0] for run in RUNS} == {path.stem for path in SUITE_FILES}
    assert {run[4] for run in RUNS} == {"", *REGIMES} - {"full"}
    assert sorted(recipe for run in RUNS for recipe in run[2]) == sorted(loaded(RECIPE_FILE))
    tasks = [task for run in RUNS for task in run[1]]
    assert set(tasks) == set(SUITES["clip20"])


@pytest.mark.parametrize(("suite", "tasks", "recipes", "joint", "regime", "header"), RUNS, ids=lambda value: str(value))
def test_a_protocol_from_end_to_end(run, suite, tasks, recipes, joint, regime, header) -> None:
    output = run(suite, tasks, recipes, joint, *([f"--fit={regime_files(regime, suite)}"] if regime else []))
    results = Results.load(output / "results.json")
    assert results.tasks == tuple(tasks)
    assert results.classes == {task: len(REGISTRY[task].classes) for task in tasks}
    assert results.merged_methods() == [name for name in loaded(RECIPE_FILE) if name in recipes]
    assert results.references() == (["joint"] if joint else [])
    for task in tasks:
        vector = TaskVector.load(output / "seed-0/fit" / task / "task_vector.safetensors")
        assert header in vector.metadata["regime"]
        assert vector.norm() > 0
        assert json.loads(vector.metadata["classes"]) == list(REGISTRY[task].classes)
        fit = loaded(output / "seed-0/fit" / task / "fit.yaml")
        assert fit["trainer"]["precision"] == "bf16-mixed"
        assert fit["trainer"]["accumulate_grad_batches"] == (2 if suite.endswith("_l14") else 1)
    for name in recipes:
        if name.startswith("adamerging"):
            coefficients = Coefficients.load(output / "seed-0/merge" / name / "coefficients.safetensors")
            assert set(coefficients.tasks) == set(tasks)
            assert coefficients.metadata["learned_on"] == ("val" if "supervised" in name else "test")
            assert coefficients.metadata["step"] == "2"
