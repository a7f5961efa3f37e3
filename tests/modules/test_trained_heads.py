"""Classifiers that trained with their tasks are found again beside the task vectors; untrained ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders.hub_server import served_hub
from builders.language_folders import language_folder

from lit_merge.callbacks import EvaluateMerge, ExtractTaskVector
from lit_merge.commands.main import main
from lit_merge.data import MultiTaskDataModule, TaskDataModule, TextTask
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.models.language import TaskHead, TextEncoderNetwork
from lit_merge.models.language.classifiers import head_file
from lit_merge.modules import FineTuneModule, MergeModule, MultiTaskModule
from lit_merge.modules.trained_heads import trained_head
from lit_merge.vectors import TaskVector

CLASS = "lit_merge.models.language.TextEncoderNetwork"
NETWORK = f"{{class_path: {CLASS}, init_args: {{path: model, head: classifier%s}}}}"
TASKS = {"first": ("no", "yes"), "second": ("bad", "good")}
TRAINER = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
VECTORS = {task: f"runs/{task}/task_vector.safetensors" for task in TASKS}
BOTH = f"--vectors=[{', '.join(VECTORS.values())}]"
PLACED = "Set heads of the network: --model.network.heads '{%s: path}'"


def of_one(task):
    return [f"--data.source={{class_path: lit_merge.data.TextTask, init_args: {{path: {task}.csv, repeated: keep}}}}"]


SOURCES = "{class_path: lit_merge.data.TextTask, init_args: {path: %s.csv, repeated: keep}}"
OF_ALL = [
    "--data=lit_merge.data.MultiTaskDataModule",
    f"--data.sources={{{', '.join(f'{task}: {SOURCES % task}' for task in TASKS)}}}",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model, two tables, and a run of each, whose head is far from where it started."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        language_folder(place / "model", "bert")
        for task, classes in TASKS.items():
            rows = [f"{'abcdefgh'[i % 8]} w{i % 9} {'xy'[i % 2]},{classes[i % 2]}" for i in range(60)]
            (place / f"{task}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
            fit = [f"--model.network={NETWORK % ''}", *of_one(task), *TRAINER, "--model.learning_rate=1e-2"]
            fit += ["--trainer.max_steps=20", "--data.batch_size=8", "--model.weight_decay=0"]
            assert main(["fit", *fit, f"--output=runs/{task}"]) == 0
    return place


@pytest.fixture(autouse=True)
def inside(trained, monkeypatch, own_cache):
    monkeypatch.chdir(trained)


def network(**settings):
    return TextEncoderNetwork("model", head="classifier", **settings)


def own_data(task="first", **settings):
    return TaskDataModule(source=TextTask(f"{task}.csv", repeated="keep"), name=task, **settings)


def all_data():
    return MultiTaskDataModule(sources={task: TextTask(f"{task}.csv", repeated="keep") for task in TASKS})


def fresh():
    return network().head(SimpleNamespace(name="first", classes=TASKS["first"], templates=()))


def stored(task):
    return TaskHead.load(f"runs/{task}/task_vector.head.safetensors")


def test_commands_of_one_task(tmp_path, capfd):
    vector, metrics = [f"--model.task_vector={VECTORS['first']}"], {}
    for name, more in (("beside", vector), ("named", vector), ("none", [])):
        heads = ", heads: {first: runs/first/task_vector.head.safetensors}" if name == "named" else ""
        test = ["test", f"--model.network={NETWORK % heads}", *more, *of_one("first"), *TRAINER]
        code = main([*test, f"--output={tmp_path / name}"])
        assert code == (0 if more else 2)
        if more:
            metrics[name] = json.loads((tmp_path / name / "test_metrics.json").read_text())
    assert metrics["beside"] == metrics["named"]
    assert metrics["beside"]["test/accuracy"] > 0.9
    said = capfd.readouterr().err
    assert "head of first: expected a trained classifier, got no task vector that has one. " in said
    assert PLACED % "first" in said
    predict = ["predict", f"--model.network={NETWORK % ''}", *of_one("first"), *TRAINER]
    assert main([*predict, f"--output={tmp_path / 'p'}"]) == 2
    assert main([*predict, *vector, f"--output={tmp_path / 'q'}"]) == 0
    # A checkpoint brings its own head, whatever lies beside a vector.
    checkpoint = next(Path("runs/first").rglob("*.ckpt"))
    test = ["test", f"--model.network={NETWORK % ''}", *of_one("first"), *TRAINER, f"--output={tmp_path / 'c'}"]
    assert main([*test, f"--ckpt_path={checkpoint}"]) == 0
    assert json.loads((tmp_path / "c/test_metrics.json").read_text()) == pytest.approx(metrics["beside"], abs=1e-5)


def test_a_vector_is_conditioned_with_its_own_head(tmp_path, capfd):
    condition = ["fit", "--model=ConditionModule", f"--model.network={NETWORK % ''}", *of_one("first"), *TRAINER]
    condition += [f"--model.task_vector={VECTORS['first']}", "--model.scale=0.9", "--trainer.max_steps=5"]
    condition += ["--data.batch_size=8", "--model.learning_rate=1e-3"]
    assert main([*condition, f"--output={tmp_path / 'run'}"]) == 0
    vector = tmp_path / "run/task_vector.safetensors"
    head, before = (TaskHead.load(path).state_dict() for path in (head_file(vector), head_file(VECTORS["first"])))
    assert head.keys() == before.keys()
    assert all(torch.equal(head[name], value) for name, value in before.items())
    test = ["test", f"--model.network={NETWORK % ''}", f"--model.task_vector={vector}", *of_one("first"), *TRAINER]
    assert main([*test, f"--output={tmp_path / 'test'}"]) == 0
    assert json.loads((tmp_path / "test/test_metrics.json").read_text())["test/accuracy"] > 0.9
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(Path(VECTORS["first"]).read_bytes())
    condition = [one.replace(VECTORS["first"], str(bare)) for one in condition]
    capfd.readouterr()
    assert main([*condition, f"--output={tmp_path / 'other'}"]) == 2
    assert "head of first: expected a trained classifier, got none beside" in capfd.readouterr().err


def test_commands_of_several_tasks(tmp_path, capfd):
    alone = ["--network", NETWORK % ""]
    search = ["merge", BOTH, *alone, *OF_ALL, "--recipe=task_arithmetic", "--search.values=[0.4, 0.8]"]
    assert main([*search, f"--output={tmp_path / 'm.safetensors'}", "--kind=task_vector"]) == 0
    found = json.loads((tmp_path / "m-search.json").read_text())
    assert all(value > 0.9 for value in found["individual"].values())
    assert main(["soup", BOTH, *alone, *OF_ALL, f"--output={tmp_path / 's.safetensors'}"]) == 0
    analyze = ["analyze", BOTH, *alone, *OF_ALL, "--analyses=[accuracy]", f"--output={tmp_path / 'a'}"]
    assert main(analyze) == 0
    fisher = ["--kind=fisher", f"--task_vector={VECTORS['first']}", *alone, *of_one("first"), "--images=4"]
    assert main(["statistics", *fisher, f"--output={tmp_path / 'f.safetensors'}"]) == 0
    test = ["test", "--model=MultiTaskModule", f"--model.network={NETWORK % ''}", *OF_ALL, *TRAINER]
    merged = [f"--model.task_vector={tmp_path / 'm.safetensors'}"]
    capfd.readouterr()
    assert main([*test, *merged, f"--output={tmp_path / 't'}"]) == 2
    said = capfd.readouterr().err
    assert "head of first: expected a trained classifier, got none beside" in said
    assert PLACED % "first" in said
    heads = ", heads: 'runs/{task}/task_vector.head.safetensors'"
    test[2] = f"--model.network={NETWORK % heads}"
    assert main([*test, *merged, f"--output={tmp_path / 't'}"]) == 0


def test_a_learned_merge_takes_the_heads_beside_its_vectors(silent_trainer):
    module = MergeModule(list(VECTORS.values()), network=network(), granularity="task")
    silent_trainer(max_steps=1).fit(module, datamodule=all_data())
    for task in TASKS:
        torch.testing.assert_close(module.head_of(task).weight, stored(task).weight)
    joint = MultiTaskModule(network=network(), task_vector=VECTORS["second"])
    with pytest.raises(ConfigurationError, match=r"head of first: .* got none beside runs/second/task_vector"):
        silent_trainer().test(joint, datamodule=all_data())
    torch.testing.assert_close(joint.head_of("second").weight, stored("second").weight)


def test_fit_starts_a_new_head_and_takes_those_of_other_tasks(silent_trainer):
    """The merge on the way is the second task's vector alone, with the head that it was trained with."""
    merging = EvaluateMerge([VECTORS["second"]], "weight_average", every_n_steps=1, data=all_data())
    tuned = FineTuneModule(network=network(), task_vector=VECTORS["second"], learning_rate=0.0, weight_decay=0.0)
    trainer = silent_trainer(max_steps=1, callbacks=[merging])
    trainer.fit(tuned, datamodule=own_data())
    torch.testing.assert_close(tuned.head.weight, fresh().weight)
    assert trainer.callback_metrics["merge/second/accuracy"] > 0.9
    sources = {task: TextTask(f"{task.rstrip('-')}.csv", repeated="keep") for task in (*TASKS, "first-")}
    unknown = EvaluateMerge([VECTORS["second"]], "weight_average", data=MultiTaskDataModule(sources=sources))
    tuned = FineTuneModule(network=network(), learning_rate=0.0)
    with pytest.raises(ConfigurationError, match="head of first-: expected a trained classifier, got none beside"):
        silent_trainer(max_steps=1, callbacks=[unknown]).fit(tuned, datamodule=own_data())


def test_joint_training_starts_new_heads_that_are_found_again(silent_trainer, tmp_path):
    module = MultiTaskModule(network=network(), learning_rate=0.0, weight_decay=0.0)
    trainer = silent_trainer(max_steps=1, callbacks=[ExtractTaskVector()])
    trainer.fit(module, datamodule=all_data())
    torch.testing.assert_close(module.head_of("first").weight, fresh().weight)
    with torch.no_grad():
        module.head_of("first").weight.add_(1)
    trainer.save_checkpoint(tmp_path / "joint.ckpt")
    restored = MultiTaskModule(network=network())
    silent_trainer().test(restored, datamodule=all_data(), ckpt_path=tmp_path / "joint.ckpt", weights_only=False)
    torch.testing.assert_close(restored.head_of("first").weight, fresh().weight + 1)
    trainer.callbacks[0].write(trainer, module)
    path = f"{trainer.default_root_dir}/task_vector.safetensors"
    for again, data in ((MultiTaskModule, all_data()), (FineTuneModule, own_data())):
        found = again(network=network(), task_vector=path)
        silent_trainer().test(found, datamodule=data)
        head = found.head if again is FineTuneModule else found.head_of("first")
        torch.testing.assert_close(head.weight, fresh().weight + 1)


def test_the_head_beside_is_of_the_tasks_classes(silent_trainer):
    module = FineTuneModule(network=network(), task_vector=VECTORS["second"])
    with pytest.raises(StructureMismatchError, match=r"expected a classifier of the classes no, yes, got bad, good\."):
        silent_trainer().test(module, datamodule=own_data())
    with pytest.raises(StructureMismatchError, match=r"expected a classifier of the classes no, yes, got bad, good\."):
        silent_trainer().validate(module, datamodule=own_data())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with served_hub(tmp_path / "hub", monkeypatch) as server:
        yield server


def test_heads_go_with_their_vectors_to_the_hub_and_are_found_there(hub, silent_trainer, capfd):
    for task in TASKS:
        assert main(["push", VECTORS[task], f"hf://me/{task}", "--license=mit"]) == 0
        files = hub.repositories[f"me/{task}"].files
        assert files["task_vector.head.safetensors"] == Path(f"runs/{task}/task_vector.head.safetensors").read_bytes()
        (model, head) = json.loads(files["task_vector-provenance.json"])["models"]
        assert [model["kind"], head["kind"]] == ["task vector", "head"]
    assert main(["push", "runs/first", "hf://me/folder"]) == 0  # the vector and its head are one model
    named = [f"hf://me/{task}" for task in TASKS]
    for addresses in (named, [f"{one}/task_vector.safetensors" for one in named]):
        module = MergeModule(addresses, network=network(), granularity="task")
        silent_trainer().test(module, all_data())
        for task in TASKS:
            assert torch.equal(module.heads[f"task-{task}"].weight, stored(task).weight)
    hub.requests.clear()
    for task, classes in TASKS.items():
        module.make_head(SimpleNamespace(name=task, classes=classes))
    asked = [path for _, path in hub.requests if path.startswith("/api/models/")]
    assert len(asked) == 2 * len(TASKS)  # to fetch each head; what the repositories have is known
    words = SimpleNamespace(name="first", classes=TASKS["first"])
    for place in ("runs/first", "hf://me/folder"):
        assert torch.equal(trained_head(words, [(place, None)]).weight, stored("first").weight)
    assert main(["push", VECTORS["first"], "hf://me/first/best.safetensors"]) == 0
    assert "best.head.safetensors" in hub.repositories["me/first"].files
    assert main(["push", "runs/first/task_vector.head.safetensors", "hf://me/head"]) == 2
    assert "source: expected a model, got the head runs/first/task_vector.head.safetensors" in capfd.readouterr().err
    bare = TaskVector({"encoder.x": torch.ones(2)}, "first")
    bare.save("bare.safetensors")
    assert main(["push", "bare.safetensors", "hf://me/bare"]) == 0
    with pytest.raises(ConfigurationError, match="head of first: expected a trained classifier, got none beside hf://"):
        trained_head(words, [("hf://me/bare", None)])
