"""Everything that can be wrong with a command: one clear line, a non-zero exit code, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_merge import FineTuneModule
from lit_merge.commands.main import main

QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
]
MERGE = ["merge", "--vectors=[a]", "--output=m.safetensors"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def tiny(clip_config: str, clip_weights: str) -> list[str]:
    """The options that choose the tiny CLIP, and silence."""
    return [*QUIET, "--model.model", clip_config, "--model.pretrained", clip_weights]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(arguments, code)``: run it and return its one line, having checked that it left nothing."""

    def call(arguments: list[str], code: int) -> str:
        before = tree()
        capsys.readouterr()
        assert main(arguments) == code
        said = capsys.readouterr()
        (line,) = [line for line in said.err.splitlines() if "error:" in line]
        assert line == said.err.strip().splitlines()[-1]
        assert line.startswith("lit-merge")
        assert "Traceback" not in said.err
        assert len(line) < 500
        assert tree() == before
        return line.partition("error: ")[2]

    return call


def tree() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()} | {
        str(path): 0 for path in Path().rglob("*") if path.is_dir()
    }


# Misspelt commands, settings and classes

MISSPELT = [
    ("fti", "", "Did you mean fit?"),
    ("tset --data.task digits", "", "Did you mean test?"),
    (
        "nonsense",
        "",
        "expected one of fit, predict, test, validate, analyze, data, import, inspect, merge, pull,",
    ),
    ("fit --outptu R", "", "got 'outptu', which there is not. Did you mean output?"),
    ("fit --trainer.max_stepz 3", "", "Did you mean trainer.max_steps"),
    ("fit --trainr.max_steps 3", "", "Did you mean trainer.max_steps?"),
    ("fit --max_steps 3", "", "Did you mean trainer.max_steps?"),
    ("fit --batch_size 3", "", "Did you mean data.batch_size?"),
    ("fit --model.learning_rat 3", "", "FineTuneModule: expected a setting, got 'learning_rat'"),
    ("test --data.tsk digits", "", "Did you mean task?"),
    ("predict --data.predict_paht x", "", "Did you mean predict_path?"),
    ("validate --model FineTuneModul", "", "Did you mean FineTuneModule?"),
    ("fit --model lit_merge.modules.FineTuneModul", "", "Did you mean lit_merge.modules.FineTuneModule?"),
    ("fit --model lit_merg.FineTuneModule", "", "Did you mean lit_merge.modules.FineTuneModule?"),
    ("fit --data TaskDatModule", "", "Did you mean TaskDataModule?"),
    ("fit --trainer.callbacks+=ExtractTaskVecto", "", "Did you mean ExtractTaskVector?"),
    ("fit --trainer.callbacks EarlyStoping", "", "Did you mean EarlyStopping?"),
    ("fit --trainer.callbacks+=ExtractTaskVector --trainer.callbacks.pth x", "", "Did you mean path?"),
    ("fit --trainer.logger CSVLoger", "", "Did you mean CSVLogger?"),
    ("fit --model.trainable Atention", "", "Did you mean Attention?"),
    ("fit --model.rates LinLr", "", "Did you mean LinLR?"),
    ("fit --model.encoder torch.nn.Linea", "", "encoder: expected a class, got 'torch.nn.Linea'"),
    ("merge --vectrs [a]", "", "Did you mean vectors?"),
    ("merge --vectors [a] --output m.safetensors --transform Meen", "", "Did you mean Mean?"),
    ("merge --vectors [a] --output m.safetensors --transform Scale --transform.factr 3", "", "Known: coefficient."),
    ("merge --vectors [a] --output m.safetensors --recipe task_arithmetc", "", "Did you mean task_arithmetic?"),
    ("merge --vectors [a] --output m.safetensors --recipe negation --settings.coeff 1", "", "mean coefficient?"),
    ("merge --vectors [a] --output m.safetensors --data MultiTaskDataModul", "", "Did you mean MultiTaskDataModule?"),
    ("merge --vectors [a] --output m.safetensors --search.valuez [1]", "", "Did you mean values?"),
    ("suite --output S --taks [digits]", "", "Did you mean tasks"),
    ("suite --output S --tasks [digitz]", "", "Did you mean digits?"),
    ("suite --output S --fit.trainer.max_stepz 3", "", "Did you mean trainer.max_steps"),
    ("suite --output S --test.trainer.max_stepz 3", "", "Did you mean trainer.max_steps"),
    ("suite --output S --recipes.one.recip x", "", "got 'recip', which there is not. Did you mean recipe?"),
    ("data sheet --output s.png --row 3", "", "Did you mean rows?"),
    ("fit", "trainr: {max_steps: 3}", "Did you mean trainer"),
    ("fit", "trainer: {max_stepz: 3}", "Did you mean trainer.max_steps"),
    ("fit", "trainr: {}", "Did you mean trainer?"),
    ("fit", "trainer: {profilr: {}}", "Did you mean trainer.profiler?"),
    ("fit", "data: {init_args: {class_nams: {}}}", "Did you mean class_names?"),
    ("suite --output S", "recipes: {one: {recipe: negation, serch: {}}}", "Did you mean search?"),
    ("fit --print_config", "trainer: {max_stepz: 3}", "Did you mean trainer.max_steps"),
    ("fit", "model: {class_path: FinetuneModul}", "Did you mean FineTuneModule?"),
    (
        "test",
        "model: {class_path: lit_merge.modules.MultiTaskModul}",
        "Did you mean lit_merge.modules.MultiTaskModule?",
    ),
    ("fit", "model: {init_args: {learning_rat: 1}}", "Did you mean learning_rate?"),
    ("predict", "data: {class_path: TaskDataModule, init_args: {predictpath: a}}", "Did you mean predict_path?"),
    ("fit", "data: {class_path: TaskDatModule}", "Did you mean TaskDataModule?"),
    ("fit", "trainer: {callbacks: [{class_path: ExtractTaskVecto}]}", "Did you mean ExtractTaskVector?"),
    (
        "fit",
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStoping}]}",
        "callbacks.EarlyStopping?",
    ),
    ("fit", "trainer: {callbacks: [{class_path: ExtractTaskVector, init_args: {dtpe: a}}]}", "Did you mean dtype?"),
    ("merge --vectors [a] --output m.safetensors", "serch: {}", "Did you mean search?"),
    ("merge --vectors [a] --output m.safetensors", "transform: {class_path: Summ}", "Did you mean Sum?"),
    ("suite --output S", "recipes: {one: {recip: negation}}", "Did you mean recipe?"),
    ("suite --output S", "recipes: {one: {transform: {class_path: Meen}}}", "Did you mean Mean?"),
    ("suite --output S", "recipes: {one: {recipe: negatio}}", "Did you mean negation?"),
    ("suite --output S", "fit: {model: {class_path: FineTuneModul}}", "Did you mean FineTuneModule?"),
    ("suite --output S", "fit: {data: {init_args: {batchsize: 1}}}", "Did you mean batch_size?"),
]


@pytest.mark.parametrize(("line", "config", "expected"), MISSPELT)
def test_misspelt_names_are_refused_with_the_nearest(line, config, expected, refused) -> None:
    arguments = line.split()
    if config:
        Path("config.yaml").write_text(config, encoding="utf-8")
        arguments[1:1] = ["--config", "config.yaml"]
    assert expected in refused(arguments, 2)


def test_a_users_own_class_is_looked_for_in_its_own_module(refused) -> None:
    Path("own_modules.py").write_text("from lit_merge import FineTuneModule\nclass Focal(FineTuneModule):\n    pass\n")
    assert "Did you mean own_modules.Focal?" in refused(["fit", "--model", "own_modules.Fokal"], 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit", "--trainer.max_steps=three"], "trainer.max_steps: expected int, got 'three'."),
        (["fit", "--model.learning_rate=fast"], "model: FineTuneModule: learning_rate: expected float, got 'fast'."),
        (["fit", "--model=TaskDataModule"], "model: expected a class that fits, got 'TaskDataModule'"),
        (["fit", "--seed_everything=x"], "seed_everything: expected bool, int, got 'x'."),
        (["fit", "surplus"], "unrecognized arguments: surplus."),
        (["fit", "--config=none.yaml"], "none.yaml"),
        (["fit", "--config"], "expected one argument"),
        (["merge", "--vectors=a", "--output=m"], "vectors: expected list, got 'a'. A list is written '[a, b]'."),
        (["fit", "--output="], "output: expected a folder, got an empty name. Name one, or leave --output out."),
        (["merge", "--vectors=[a]"], "the following arguments are required: output."),
        (
            [*MERGE, "--recipe=negation", "--kind=weigths"],
            "kind: expected Literal['weights', 'task_vector', 'lora'], got 'weigths'. Did you mean weights?",
        ),
        (["analyze", "--vectors=[a]", "--output=A", "--analyses=[cosin]"], "got 'cosin'. Did you mean cosine?"),
        (MERGE, "recipe, transform and parts: expected exactly one of them, got none."),
        (["suite"], "the following arguments are required: output."),
        (["fit"], "task, path and source: expected exactly one of them, got none."),
        (["fit", "--data.task=digits", "--model.learning_rate=-1"], "learning_rate: expected a number in [0, inf)"),
    ],
    ids=str,
)
def test_wrong_values(arguments, expected, refused) -> None:
    assert expected in refused(arguments, 2)


@pytest.mark.parametrize("command", ["fit", "merge"])
def test_a_damaged_configuration(command, refused) -> None:
    contents = {
        b"model: [1, 2\n": "YAML in UTF-8, got while parsing a flow sequence",
        b"output: caf\xe9\n": "YAML in UTF-8, got 'utf-8' codec can't decode byte 0xe9",
        b"": "settings, a line each (output: runs/mine), got nothing.",
        b"- a\n": "settings, a line each (output: runs/mine), got a list.",
    }
    for content, expected in contents.items():
        Path("broken.yaml").write_bytes(content)
        assert refused([command, "--config=broken.yaml"], 2).startswith(f"broken.yaml: expected {expected}")
    Path("broken.yaml").write_text("model: [1, 2\n")
    assert "line 2" in refused([command, "--config=broken.yaml"], 2)


def test_aliases_that_stand_for_too_much_are_refused_at_once(refused) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    Path("bomb.yaml").write_text("\n".join(lines))
    Path("itself.yaml").write_text("trainer: &a [*a]\n")
    started = time.process_time()
    for name in ("bomb.yaml", "itself.yaml"):
        for command in ("fit", "merge", "suite", "inspect", "data list"):
            line = refused([*command.split(), "--config", name], 2)
            assert line.startswith(f"{name}: expected YAML of at most 100,000 nodes")
    text = Path("bomb.yaml").read_text()
    assert "expected YAML of at most 100,000 nodes" in refused(
        [*MERGE, "--settings", f"{{{', '.join(text.splitlines())}}}"], 2
    )
    assert time.process_time() - started < 5


def test_aliases_and_long_files_are_taken(capsys) -> None:
    Path("fine.yaml").write_text(
        f"vectors: &v [{', '.join(f'a{number}' for number in range(2000))}]\ntasks: *v\noutput: m\n"
    )
    assert main(["merge", "--config", "fine.yaml", "--print_config"]) == 0


@pytest.mark.parametrize(
    "line",
    [
        "fit --data.path http://host/images",
        "fit --data.task digits --ckpt_path https://host/a.ckpt",
        "fit --data.task digits --model.weights https://host/a.safetensors",
        "fit --config https://host/fit.yaml",
        "predict --data.task digits --data.predict_path https://host/a.png",
        "test --data.task digits --output http://host/folder",
        "merge --vectors [https://host/a.safetensors] --recipe ties --output m.safetensors",
        "merge --vectors [a.safetensors] --recipe ties --output http://host/m.safetensors",
        "suite --output S --paths {mine:\xa0http://host/images}",
        "report --results http://host/results.json",
        "inspect https://host/a.safetensors",
    ],
)
def test_a_url_as_a_path(line, refused) -> None:
    said = refused([part.replace("\xa0", " ") for part in line.split(" ")], 2)
    assert "hf://owner/name/file on the Hugging Face Hub, got http" in said
    assert "URLs are not read. Download it first." in said


def test_a_page_of_the_hub_as_an_address(refused) -> None:
    said = refused([*MERGE[:2], "--base=https://huggingface.co/me/base/tree/main", "--output=m", "--recipe=ties"], 2)
    assert said.endswith("URLs are not read. Write hf://me/base.")


# The machine


def test_an_absent_gpu(tiny, refused, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refused(["fit", "--data.task=digits", "--output=R", *tiny, "--trainer.accelerator=gpu"], 2)
    assert line.startswith("trainer: No supported gpu backend found. Change its accelerator")
    line = refused(["fit", "--data.task=digits", "--output=R", *tiny, "--trainer.accelerator=gpuu"], 2)
    assert "'gpuu'" in line


def test_a_package_that_is_not_installed(tiny, refused, monkeypatch) -> None:
    from lightning.fabric.loggers import tensorboard

    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard, name, False)
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs"]
    assert "tensorboard" in refused(["fit", "--data.task=digits", "--output=R", *tiny, *logger], 1)


def test_an_output_that_cannot_be_created(tiny, refused) -> None:
    Path("file").write_text("")
    for output in ("file", "file/below"):
        assert f"got {output}" in refused(["fit", "--data.task=digits", *tiny, f"--output={output}"], 2)
        assert f"got {output}" in refused(["suite", "--tasks=[digits]", f"--output={output}"], 2)


# Data


def test_a_missing_path(tiny, refused) -> None:
    assert refused(["fit", "--data.path=missing", "--output=R/S", *tiny], 1).startswith("missing: expected the folder")
    assert refused(["fit", "--data.path=missing", *tiny], 1).startswith("missing: expected")  # without --output
    line = refused(["predict", "--data.task=digits", "--data.predict_path=missing", "--output=R", *tiny], 1)
    assert line.startswith("predict_path: expected an image or a folder of images, got")
    line = refused(["fit", "--data.task=digits", *tiny, "--model.weights=missing.safetensors"], 1)
    assert line.startswith("missing.safetensors: ")


def test_an_empty_class(colour_folder, tiny, refused) -> None:
    images = colour_folder()
    (images / "white").mkdir()
    line = refused(["fit", f"--data.path={images}", "--output=R", *tiny], 1)
    assert line.startswith(f"{images / 'white'}: expected images")


def test_a_class_that_only_the_test_images_have(colour_folder, tiny, refused) -> None:
    colour_folder("images/train")
    images = colour_folder("images/test").parent
    shutil.copytree(images / "test/blue", images / "test/white")
    for command in ("fit", "test"):
        assert "white" in refused([command, f"--data.path={images}", "--output=R", *tiny], 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named(colour_folder, tiny, refused, workers) -> None:
    images = colour_folder(count=4)
    for path in images.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:-400])
    options = [f"--data.workers={workers}", "--trainer.max_steps=2", "--trainer.limit_val_batches=0", *tiny]
    line = refused(["fit", f"--data.path={images}", "--output=R", *options], 1)
    assert str(images) in line
    assert ".png: expected a readable image, got" in line


# Models, vectors and checkpoints


def test_an_unknown_model(refused) -> None:
    for command in ("fit", "predict"):
        line = refused([command, "--data.task=digits", "--model.model=lit-tinny", "--output=R", *QUIET], 2)
        assert "Did you mean lit-tiny" in line
    assert "lit-tiny" in refused(["suite", "--tasks=[digits]", "--model=lit-tinny", "--output=S"], 2)


def test_task_vectors_that_do_not_belong(tiny, clip_config, clip_weights, refused) -> None:
    short = ["--data.task=digits", "--data.batch_size=4", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert main(["fit", *short, *tiny, "--output=R"]) == 0
    vector = Path("R/task_vector.safetensors")
    other = ["test", "--data.task=digits", "--output=T", *QUIET]
    assert "expected the base model" in refused([*other, f"--model.task_vector={vector}"], 1)
    base = ["--model", clip_config, "--pretrained", clip_weights]
    recipe = ["--recipe=weight_average", "--output=m.safetensors"]
    assert "base: expected every parameter of the task vectors, got 32 of another shape" in refused(
        ["merge", f"--vectors=[{vector}]", *recipe], 1
    )
    for keep in (0, 7, 2000, vector.stat().st_size - 1):
        Path("cut.safetensors").write_bytes(vector.read_bytes()[:keep])
        assert "cut.safetensors" in refused([*other, *tiny, "--model.task_vector=cut.safetensors"], 1)
        assert "cut.safetensors" in refused(["merge", f"--vectors=[{vector}, cut.safetensors]", *recipe, *base], 1)
    assert "got a task vector" in refused([*other, *tiny, f"--model.weights={vector}"], 1)
    assert "which exists" in refused(
        ["merge", f"--vectors=[{vector}]", *base, recipe[0], "--output=cut.safetensors"], 2
    )


def test_checkpoints_that_are_none(tiny, clip_weights, refused) -> None:
    short = ["--data.task=digits", "--data.batch_size=4", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    assert main(["fit", *short, *tiny, "--output=R"]) == 0
    (checkpoint,) = Path("R/checkpoints").glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"].pop("encoder.proj")
    torch.save(content, "lacking.ckpt")
    torch.save(content["state_dict"], "plain.ckpt")
    for keep in (0, 100, 10_000):
        Path(f"cut{keep}.ckpt").write_bytes(checkpoint.read_bytes()[:keep])
    predict = ["predict", "--data.task=digits", "--output=P", *tiny]
    for name in ("lacking.ckpt", "plain.ckpt", "cut0.ckpt", "cut100.ckpt", "cut10000.ckpt", clip_weights):
        line = refused([*predict, f"--ckpt_path={name}"], 1)
        assert line.startswith(f"{name}: expected a checkpoint of such a run, got")
    for name in ("no.ckpt", "best"):
        assert f"got {name}, which does not exist" in refused([*predict, f"--ckpt_path={name}"], 2)
    for name in ("R", "R/checkpoints"):
        said = refused([*predict, f"--ckpt_path={name}"], 2)
        assert said == f"ckpt_path: expected a checkpoint, got {name}, a folder of them. Name one, e.g. {checkpoint}."
    Path("empty").mkdir()
    assert refused([*predict, "--ckpt_path=empty"], 1).startswith("empty: expected a checkpoint of such a run, got IsA")


# Regimes

SHORT = ["--data.batch_size=8", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--output=R"]
ONE = "expected one of them, got both"
REGIMES = [
    (
        "--model.trainable=Matching --model.trainable.pattern=nothing",
        "Matching(pattern='nothing'): expected to select some parameters, got none of 32 parameters (class_embedding",
    ),
    (
        "--model.trainable=Matching --model.trainable.pattern=(",
        "Matching.pattern: expected a regular expression, got '(",
    ),
    ("--model.trainable=Attention --model.trainable.paradigm=5", "paradigm: expected Literal[1, 2, 3, 4], got '5'"),
    ("--model.trainable=Attention --model.trainable.paradim=2", "Did you mean paradigm?"),
    ("--model.trainable=Attenton", "trainable: expected a class, got 'Attenton', which there is not."),
    (
        "--model.lora.rank=4 --model.lora.dropout=0.1 --model.linearized=true",
        "lora.dropout: expected 0 of a linearised",
    ),
    ("--model.lora.rank=4 --model.trainable=Attention", f"lora and trainable: {ONE}: LoRA's factors are what trains."),
    ("--model.lora.rank=4 --model.penalty.schedule=strict", f"penalty and lora: {ONE}: the tangent is not linear in"),
    ("--model.lora.rank=0", "LoRA.rank: expected an integer of at least 1, got 0."),
    ("--model=MultiTaskModule --model.lora.rank=4 --model.tau_jp=true", f"tau_jp and lora: {ONE}"),
    ("--model.penalty.weight=-1", "penalty.weight: expected a finite number of at least 0, got -1.0. Change it."),
    ("--model.penalty.schedule=weekly", "schedule: expected Literal['cyclic', 'strict'], got 'weekly'"),
    ("--model.penalty.schdule=strict", "Did you mean schedule?"),
    (
        "--model.penalty.weight=1 --data.other_tasks=[]",
        "penalty: expected at least one other task, got none. Set data.oth",
    ),
    (
        "--model.penalty.tasks=[shapes] --data.other_tasks=[signs]",
        "penalty.tasks: expected names among signs, each once, got shapes. Choose some of them.",
    ),
    (
        "--model.penalty.schedule=strict --model.penalty.batch_size=5000 --data.other_tasks=[signs]",
        "penalty.batch_size: expected at most the 3000 images used of signs for all processes together, got 5000 x 1 =",
    ),
    (
        "--model.penalty.weight=1 --data=MultiTaskDataModule --data.tasks=[digits]",
        "with other tasks, got MultiTaskDataM",
    ),
]


@pytest.mark.parametrize(("line", "expected"), REGIMES, ids=[line for line, _ in REGIMES])
def test_regimes_that_cannot_be(line, expected, tiny, refused) -> None:
    options = line.split()
    first = [
        option for option in options if option.startswith(("--model=", "--data="))
    ]  # the class before its settings
    task = [] if "--data=MultiTaskDataModule" in first else ["--data.task=digits"]
    assert expected in refused(["fit", *first, *tiny, *task, *SHORT, *(o for o in options if o not in first)], 2)


def test_a_penalty_beside_own_images_alone(colour_folder, tiny, refused) -> None:
    own = ["fit", f"--data.path={colour_folder()}", *tiny, *SHORT, "--model.penalty.schedule=cyclic"]
    assert "Set data.other_tasks or data.other_paths, or remove the penalty." in refused(own, 2)
    few = [*own, f"--data.other_paths={{few: {colour_folder('few', 3)}}}", "--model.penalty.schedule=strict"]
    line = refused([*few, "--model.penalty.batch_size=7"], 2)
    assert line.startswith("penalty.batch_size: expected at most the 3 images used of few for all processes together")


OWN = """
import torch

class Plain(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4))

class Odd(Plain):
    def forward(self, images):
        return Doubled.apply(super().forward(images))

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features):
        return features * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2
"""


def test_networks_without_what_a_regime_is_about(tiny, clip_config, refused) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 8}
    config = {**json.loads(Path(clip_config).read_text(encoding="utf-8")), "vision_cfg": vision}
    Path("resnet.json").write_text(json.dumps(config), encoding="utf-8")
    Path("own_networks.py").write_text(OWN, encoding="utf-8")
    resnet = ["fit", *QUIET, "--model.model=resnet.json", "--model.pretrained=random", "--data.task=digits", *SHORT]
    line = refused([*resnet, "--model.trainable=Attention"], 2)
    assert line.startswith("attention paradigm 1: expected a network with attention blocks, got")
    own = ["fit", *QUIET, "--model.encoder=own_networks.Plain", "--model.preprocessing.image_size=32", *SHORT]
    own += ["--data.task=digits"]
    for options, expected in (
        (["--model.trainable=Attention"], "attention paradigm 1: expected a network with attention blocks, got 2 para"),
        (["--model.trainable=LastBlocks", "--model.trainable.count=1"], "LastBlocks: expected a network with numbered"),
        (["--model.rates=LinLR"], "LinLR(): expected a network with numbered blocks, got 2 parameters without"),
        (["--model.lora.rank=2"], "attention paradigm 1: expected a network with attention blocks"),
        (["--model.linearized=true"], "head: expected one for Plain, which is no CLIP, got none. Pass head="),
    ):
        assert refused([*own, *options], 2).startswith(expected)
    odd = [*own, "--model.encoder=own_networks.Odd", "--model.head=torch.nn.Identity", "--model.linearized=true"]
    line = refused(odd, 1)
    assert line.startswith("linearised: expected operators with a forward-mode derivative, got an autograd.Function")


def test_task_vectors_that_do_not_belong_to_a_linearised_model(tiny, clip_config, clip_weights, refused) -> None:
    assert main(["fit", "--data.task=digits", *SHORT, *tiny]) == 0
    vector = "--model.task_vector=R/task_vector.safetensors"
    linear = ["--model.linearized=true", "--output=T"]
    other = ["--model.model", clip_config, "--model.pretrained=random", "--seed_everything=1"]
    for command, model in (("test", QUIET), ("fit", QUIET), ("test", [*QUIET, *other])):
        line = refused([command, "--data.task=digits", *model, vector, *linear], 1)
        assert "expected the base model tiny-clip (fingerprint " in line
    partly = [*linear, "--model.trainable=Attention"]
    line = refused(["fit", "--data.task=digits", *tiny, vector, *partly], 2)
    assert line.startswith("task vector: expected zeros outside of the 4 parameters that train, got other values in 28")


# A loss that is not finite


def test_a_loss_that_is_not_finite_from_the_start(tiny, refused, monkeypatch) -> None:
    monkeypatch.setattr(FineTuneModule, "compute_loss", lambda self, logits, batch: logits.sum() * torch.nan)
    options = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--output=R", *tiny]
    line = refused(["fit", "--data.task=digits", *options], 1)
    assert line.startswith("loss: expected a finite value, got nan at step 0. Lower learning_rate")


def test_a_loss_that_explodes_leaves_no_task_vector(tiny, capsys) -> None:
    options = ["--model.learning_rate=1e30", "--trainer.max_steps=20", "--trainer.limit_val_batches=0"]
    options += ["--data.batch_size=8", "--trainer.log_every_n_steps=1", "--output=R", *tiny]
    assert main(["fit", "--data.task=digits", *options]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("lit-merge: error: loss: expected a finite value, got nan at step")
    assert not list(Path().rglob("*.safetensors"))
    assert "train/loss" in Path("R/metrics.csv").read_text()  # what led there can be looked at


def test_a_bug_keeps_its_traceback(tiny, monkeypatch) -> None:
    monkeypatch.setattr(FineTuneModule, "compute_loss", lambda self, logits, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["fit", "--data.task=digits", "--trainer.max_steps=1", "--output=R", *tiny])
    assert not Path("R").exists()
