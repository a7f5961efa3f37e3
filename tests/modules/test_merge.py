"""Learning coefficients as a fit: a step's gradient, what changes it and what does not, resuming, what is written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import lightning as L
import pytest
import torch
from builders.learned_merge import BlockEncoder
from builders.merge_batches import CLASSES, SILENT, TASKS, Batches
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_merge import Coefficients, MergeModule, TaskVector
from lit_merge.commands.main import main
from lit_merge.commands.merge import merge
from lit_merge.data import MergeDataModule
from lit_merge.data.batch import ImageBatch
from lit_merge.errors import ConfigurationError, DataError, NonFiniteError, StructureMismatchError
from lit_merge.functional import linearize, shannon_entropy
from lit_merge.models import load_clip
from lit_merge.vectors import LazyTensors


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    torch.manual_seed(3)
    shapes = {name: own.shape for name, own in BlockEncoder().named_parameters()}
    for task in TASKS:
        metadata = {"classes": json.dumps(list("qwert")[: CLASSES[task]])}
        TaskVector({n: 0.4 * torch.randn(s) for n, s in shapes.items()}, task, metadata=metadata).save(
            folder / f"{task}.safetensors"
        )
    return [str(folder / f"{task}.safetensors") for task in TASKS]


def module(files, kind=MergeModule, tasks=TASKS, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    encoder = BlockEncoder().to(dtype)
    heads = {task: nn.Linear(6, CLASSES[task]).to(dtype) for task in tasks}
    return kind(files, encoder=encoder, heads=heads, **settings)


def fitted(learned, data=None, steps=3, **settings):
    trainer = L.Trainer(**{**SILENT, "max_steps": steps, **settings})
    trainer.fit(learned, data or Batches())
    return learned.merged.coefficients.detach().clone()


def naive(files, steps, learning_rate=1e-3, objective=None, images=None, linearized=False, granularity="tensor"):
    """AdaMerging written plainly: the merged weights under autograd, one pass for every task."""
    torch.manual_seed(0)
    encoder = BlockEncoder().eval()
    heads = {task: nn.Linear(6, CLASSES[task]) for task in TASKS}
    vectors = [TaskVector.load(path) for path in files]
    names = [name for name, _ in encoder.named_parameters()]
    coefficients = torch.full((3, 1 if granularity == "task" else len(names)), 0.3, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=learning_rate)
    data = images or Batches()
    for step in range(steps):
        total = 0.0
        for task, batch in data.batch(step).items():
            applied = coefficients.clamp(0, 1).expand(3, len(names))
            moved = {
                name: sum(applied[row, column] * vectors[row][name] for row in range(3))
                for column, name in enumerate(names)
            }
            if linearized:
                features = torch.add(*linearize(encoder, {}, moved, batch.images))
            else:
                weights = {name: own.detach() + moved[name] for name, own in encoder.named_parameters()}
                features = torch.func.functional_call(encoder, weights, (batch.images,))
            logits = heads[task](features)
            total = total + (objective or (lambda logits, batch: shannon_entropy(logits).mean()))(logits, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return coefficients.detach()


def close(found, expected):
    assert (expected - 0.3).abs().max() > 1e-4  # something was learned
    return (found - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("settings", [{}, {"images_per_pass": 1}, {"images_per_pass": 9}, {"storage": "mapped"}])
def test_a_fit_is_the_papers_loop(files, settings):
    assert close(fitted(module(files, **settings)), naive(files, 3))


def test_supervised_and_own_objectives(files):
    expected = naive(files, 3, objective=lambda logits, batch: nn.functional.cross_entropy(logits, batch.labels))
    assert close(fitted(module(files, objective="cross_entropy")), expected)

    class Confident(MergeModule):
        def compute_loss(self, logits, batch, task):
            assert task in TASKS
            return -logits.softmax(-1).amax(-1).mean()

    expected = naive(files, 3, objective=lambda logits, batch: -logits.softmax(-1).amax(-1).mean())
    assert close(fitted(module(files, Confident)), expected)


def test_linearised_models(files):
    found = fitted(module(files, linearized=True))
    assert close(found, naive(files, 3, linearized=True))


def test_gradients_accumulate(files):
    """Two batches of half the size are one of the whole."""

    class Halves(Batches):
        def batch(self, step):
            whole = Batches(size=8).batch(step // 2)
            part = slice(0, 4) if step % 2 == 0 else slice(4, 8)
            return {task: ImageBatch(*(one[part] for one in batch)) for task, batch in whole.items()}

    found = fitted(module(files), Halves(), steps=2, accumulate_grad_batches=2)
    assert close(found, naive(files, 2, images=Batches(size=8)))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 2e-3), ("64-true", 1e-6), ("bf16-true", 5e-3)])
def test_precisions(files, precision, tolerance):
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    learned = module(files)
    found = fitted(learned, Batches(dtype=dtype), precision=precision)
    assert found.dtype in (torch.float32, torch.float64)
    assert (found.float() - naive(files, 3)).abs().max() <= tolerance
    assert (found - 0.3).abs().min() > 0  # steps of 0.001 vanish in bfloat16


def test_optimiser_and_scheduler_can_be_others(files):
    learned = module(
        files,
        optimizer=partial(torch.optim.SGD, lr=0.5),
        scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.0 if step else 1.0),
    )
    one = fitted(learned, steps=1)
    again = fitted(
        module(
            files,
            optimizer=partial(torch.optim.SGD, lr=0.5),
            scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.0 if step else 1.0),
        ),
        steps=3,
    )
    assert not torch.equal(one, torch.full_like(one, 0.3))
    assert torch.equal(one, again)  # from the second step on the rate is zero


def test_activation_checkpointing_changes_nothing_but_memory(clip_config, clip_weights, tmp_path):
    clip = load_clip(clip_config, clip_weights)
    shapes = {name: own.shape for name, own in clip.visual.named_parameters()}
    torch.manual_seed(0)
    paths = []
    for task in TASKS:
        paths.append(str(tmp_path / f"{task}.safetensors"))
        TaskVector({n: 0.05 * torch.randn(s) for n, s in shapes.items()}, task).save(paths[-1])

    class Images(Batches):
        def batch(self, step):
            batch = super().batch(step)
            return {
                task: ImageBatch(part.images.repeat(1, 1, 8, 8), part.labels, part.indices)
                for task, part in batch.items()
            }

    found = {}
    for checkpointed in (False, True):
        learned = MergeModule(
            paths,
            model=clip_config,
            pretrained=clip_weights,
            heads={task: nn.Linear(12, CLASSES[task]) for task in TASKS},
            activation_checkpointing=checkpointed,
            optimizer=partial(torch.optim.SGD, lr=1.0),
        )
        torch.manual_seed(1)
        for head in learned.heads.values():
            nn.init.normal_(head.weight)
            nn.init.zeros_(head.bias)
        found[checkpointed] = fitted(learned, Images(), steps=1)
    assert (found[True] - 0.3).abs().max() > 1e-4
    assert torch.allclose(found[True], found[False], atol=1e-5)
    with pytest.raises(
        ConfigurationError, match="activation_checkpointing: expected an encoder with set_grad_checkpoi"
    ):
        MergeModule(paths, model=clip_config, pretrained=clip_weights, linearized=True, activation_checkpointing=True)


def test_only_tasks_with_a_vector_are_learned_on_and_others_are_evaluated(files):
    learned = module(files[:2])
    data = Batches(steps=2)
    data.batch = lambda step: {
        task: one for task, one in Batches.batch(data, step).items() if task != "c" or step == 99
    }
    trainer = L.Trainer(**{**SILENT, "max_steps": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0})
    trainer.fit(learned, data)
    assert learned.merged_tasks == ("a", "b")
    assert {f"val/{task}/{what}" for task in TASKS for what in ("accuracy", "entropy")} <= set(trainer.callback_metrics)
    logits = {task: learned.classify(learned(part.images), task) for task, part in data.batch(99).items()}
    for task in TASKS:
        expected = shannon_entropy(logits[task]).mean()
        assert trainer.callback_metrics[f"val/{task}/entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    both = sum(trainer.callback_metrics[f"val/{task}/entropy"] for task in "ab") / 2
    assert trainer.callback_metrics["val/entropy"].item() == pytest.approx(both.item(), rel=1e-5)


def test_a_resumed_fit_ends_where_the_whole_one_does(files, tmp_path):
    whole = fitted(module(files), steps=6)
    first = module(files)
    trainer = L.Trainer(**{**SILENT, "max_steps": 3})
    trainer.fit(first, Batches(steps=3))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert (tmp_path / "half.ckpt").stat().st_size < 60_000
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("encoder.") for name in state)  # θ0 is the base model's

    class Later(Batches):
        def batch(self, step):
            return super().batch(step + 3)

    second = module(files)
    L.Trainer(**{**SILENT, "max_steps": 6}).fit(second, Later(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(second.merged.coefficients, whole)
    with pytest.raises(
        StructureMismatchError, match="expected one of coefficients for the groups of parameters head, emb"
    ):
        L.Trainer(**{**SILENT, "max_steps": 6}).fit(
            module(files, granularity="block"), Batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )
    with pytest.raises(StructureMismatchError, match="expected one of coefficients for the tasks c, a, b, got a, b, c"):
        L.Trainer(**{**SILENT, "max_steps": 6}).fit(
            module([files[2], *files[:2]]), Batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
        )


def test_entropies_that_are_not_finite_stop_the_fit(files):
    learned = module(files)
    nn.init.constant_(learned.heads["task-b"].weight, float("nan"))
    with pytest.raises(
        NonFiniteError, match=r"entropy: expected finite values, got others for b at step 0\. Lower learn"
    ):
        fitted(learned)
    assert (learned.merged.coefficients == 0.3).all()


def test_a_head_of_other_classes_is_refused(files):
    data = Batches()
    data.tasks["b"].classes[0] = "another"
    with pytest.raises(
        StructureMismatchError,
        match=r"task b: expected the classes of its task vector, 4 \(q, w, e and 1 more\), got 4 \(another, w, e",
    ):
        fitted(module(files), data)


def test_settings_that_make_no_sense_are_refused(files, tmp_path):
    def refused(match, error=ConfigurationError, **settings):
        with pytest.raises(error, match=match) as refusal:
            module(**{"files": files, **settings})
        assert "\n" not in str(refusal.value)

    refused(r"vectors: expected a list of at least two task vector files, got \['", files=files[:1])
    refused("parts and transform: expected at most one of them", parts=["ElectSign"], transform=object())
    refused("or an object by class path, got 'gini'", objective="gini")
    refused("images_per_pass: expected a positive number or null, got 0", images_per_pass=0)
    refused("learning_rate: expected a number in", learning_rate=-1.0)
    refused("clamp: expected the lower number first", clamp=(1.0, 0.0))
    refused("transform: expected one that leaves a vector for each of 3 tasks, got 1 of chain", parts=["ties"])
    refused(r"vectors: expected a name for every task, each once, got a\.", files=[files[0], files[0]])
    with pytest.raises(
        ConfigurationError, match=r"data: expected images of every merged task, got none of c \(data: a"
    ):
        fitted(module(files, tasks=["a", "b"]), Batches(["a", "b"]))
    unlabelled = Batches()
    unlabelled.labelled = False
    with pytest.raises(
        ConfigurationError, match="objective cross_entropy: expected labelled images, got data with label"
    ):
        fitted(module(files, objective="cross_entropy"), unlabelled)
    other = Coefficients(torch.ones(3, 1), ("a", "b", "q"), ("all",), {"w": "all"}, "task")
    other.save(tmp_path / "c.json")
    refused("expected", StructureMismatchError, init=str(tmp_path / "c.json"))


# On the embedded suite, by the command.


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, few_images, clip_config, clip_weights):
    folder = tmp_path_factory.mktemp("embedded")
    torch.manual_seed(0)
    shapes = {name: own.shape for name, own in load_clip(clip_config, clip_weights).visual.named_parameters()}
    for task in ("digits", "letters"):
        vector = TaskVector({n: 0.05 * torch.randn(s) for n, s in shapes.items()}, task)
        vector.save(folder / f"{task}.safetensors")
    return folder


def command(folder, model, *more, name="out"):
    plain = ["accelerator=cpu", "enable_progress_bar=false", "enable_model_summary=false", "log_every_n_steps=1"]
    return [
        "fit",
        *(f"--trainer.{one}" for one in plain),
        "--trainer.num_sanity_val_steps=0",
        "--model=MergeModule",
        f"--model.model={model[0]}",
        f"--model.pretrained={model[1]}",
        f"--model.vectors=[{folder}/digits.safetensors,{folder}/letters.safetensors]",
        "--data=MergeDataModule",
        "--data.tasks=[digits,letters,signs]",
        "--data.batch_size=8",
        f"--output={folder / name}",
        *more,
    ]


def test_the_command_learns_and_merge_reuses_it(embedded, clip_config, clip_weights):
    model = (clip_config, clip_weights)
    more = ["--data.adapt_on=val", "--trainer.max_steps=6", "--model.parts=[{Trim: {density: 0.5}}, ElectSign]"]
    assert main(command(embedded, model, *more)) == 0
    out = embedded / "out"
    names = {path.name for path in out.iterdir()}
    assert {"coefficients.safetensors", "coefficients.json", "merged.safetensors", "fit.yaml", "metrics.csv"} <= names
    found = Coefficients.load(out / "coefficients.safetensors")
    assert found.tasks == ("digits", "letters")
    assert found.metadata["learned_on"] == "val"
    assert (found.values - 0.3).abs().max() > 1e-3
    assert torch.equal(Coefficients.load(out / "coefficients.json").values, found.values)
    vectors = [str(embedded / f"{task}.safetensors") for task in found.tasks]
    settings = {"coefficients": str(out / "coefficients.safetensors")}
    merge(vectors, str(out / "again.safetensors"), "adamerging", settings, model=clip_config, pretrained=clip_weights)
    one, other = (LazyTensors(out / name) for name in ("merged.safetensors", "again.safetensors"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert main(command(embedded, model, *more)) == 2  # the folder is taken
    test = [
        "test",
        "--model=MultiTaskModule",
        f"--model.weights={out / 'merged.safetensors'}",
        "--data=MultiTaskDataModule",
    ]
    test += ["--data.tasks=[digits]", f"--model.model={clip_config}", f"--model.pretrained={clip_weights}"]
    assert main([*test, "--trainer.accelerator=cpu", f"--output={embedded / 'test'}"]) == 0


def test_a_resumed_command_sees_the_images_that_the_whole_one_sees(embedded, clip_config, clip_weights):
    model = (clip_config, clip_weights)
    more = ["--data.adapt_on=train", "--data.batch_size=32", "--trainer.limit_val_batches=0"]
    assert main(command(embedded, model, *more, "--trainer.max_steps=7", name="whole")) == 0
    assert main(command(embedded, model, *more, "--trainer.max_steps=5", name="half")) == 0
    (checkpoint,) = (embedded / "half/checkpoints").glob("*.ckpt")
    resumed = [*more, "--trainer.max_steps=7", f"--ckpt_path={checkpoint}"]
    assert main(command(embedded, model, *resumed, name="rest")) == 0
    whole, rest = (Coefficients.load(embedded / name / "coefficients.safetensors") for name in ("whole", "rest"))
    assert torch.equal(whole.values, rest.values)


def test_task_wise_linearised_merges_are_learned_without_passes(embedded, clip_config, clip_weights, monkeypatch):
    model = (clip_config, clip_weights)
    more = ["--data.adapt_on=val", "--model.linearized=true", "--trainer.max_steps=4", "--trainer.limit_val_batches=0"]
    assert main(command(embedded, model, *more, "--model.granularity=block", "--model.clamp=null", name="passes")) == 0
    passes = []
    encode = MergeModule.encode
    monkeypatch.setattr(MergeModule, "encode", lambda self, *inputs: passes.append(1) or encode(self, *inputs))
    assert main(command(embedded, model, *more, "--model.granularity=task", name="known")) == 0
    assert not passes
    known = Coefficients.load(embedded / "known/coefficients.safetensors")
    monkeypatch.setattr(MergeModule, "on_fit_start", lambda self: None)
    assert main(command(embedded, model, *more, "--model.granularity=task", name="network")) == 0
    assert passes
    network = Coefficients.load(embedded / "network/coefficients.safetensors")
    assert (known.values - 0.3).abs().max() > 1e-3
    assert torch.allclose(known.values, network.values, atol=1e-5)


@pytest.mark.parametrize(("share", "count", "kept"), [(0.07, 100, 7), (0.001, 999, 1), (0.1, 70, 7), (0.29, 100, 29)])
def test_a_fraction_is_of_the_number_that_is_written(share, count, kept):
    """As floats 0.07 × 100 is more than 7."""

    class Images:
        labels = torch.zeros(count, dtype=torch.int64)
        positions: ClassVar[list[int]] = []

        def __len__(self):
            return count

        def subset(self, positions):
            self.positions = positions
            return self

    data = MergeDataModule("val", tasks=["digits"], fraction=share)
    found = data._images("digits", SimpleNamespace(source=SimpleNamespace(split=lambda *_: Images())), None)
    assert len(set(found.positions)) == kept


def test_fractions_and_splits(few_images, clip_config, clip_weights):
    preprocessing = load_clip(clip_config, clip_weights).preprocessing

    def images(**settings):
        data = MergeDataModule(**{"tasks": ["digits", "letters"], "preprocessing": preprocessing, **settings})
        data.setup("fit")
        return data, {name: task.datasets["train"] for name, task in data.tasks.items() if "train" in task.datasets}

    data, whole = images(adapt_on="test")
    assert {name: len(one) for name, one in whole.items()} == {"digits": 61, "letters": 61}
    assert all((one.labels == -1).all() for one in whole.values())
    batch = next(iter(data.train_dataloader()))[0]
    assert {name: len(part.images) for name, part in batch.items()} == {"digits": 16, "letters": 16}
    few, more = (images(adapt_on="test", fraction=share)[1]["digits"] for share in (0.1, 0.5))
    assert (len(few), len(more)) == (7, 31)
    assert set(few.names) < set(more.names) < set(whole["digits"].names)
    assert len(images(adapt_on="val", fraction=0.001)[1]["digits"]) == 1
    _, labelled = images(adapt_on="val", labelled=True, adapted=["letters"])
    assert list(labelled) == ["letters"]
    assert (labelled["letters"].labels >= 0).all()
    for settings, said in (
        ({"adapt_on": "all"}, "adapt_on: expected train, val, test, got 'all'"),
        ({"adapt_on": "val", "fraction": 0.0}, r"fraction: expected a number in \(0, 1\], got 0.0"),
        ({"adapt_on": "val", "adapted": ["q"]}, "adapted: expected names among digits, letters, got q"),
        ({"adapt_on": "val", "divide": "classes"}, "divide: expected images, tasks, got 'classes'"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            images(**settings)


def test_processes_that_divide_tasks_divide_the_images_of_an_evaluation(few_images, clip_config, clip_weights):
    preprocessing = load_clip(clip_config, clip_weights).preprocessing
    evaluated, trained = [], []
    for rank in (0, 1):
        data = MergeDataModule("train", tasks=["digits", "letters"], divide="tasks", preprocessing=preprocessing)
        data.trainer = SimpleNamespace(
            world_size=2,
            global_rank=rank,
            lightning_module=None,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        data.setup("fit")
        evaluated += [int(one) for one in data.val_dataloader()[0].sampler]
        loaders = data.train_dataloader().iterables
        (own,) = (loader for loader in loaders.values() if hasattr(loader, "sampler"))
        trained.append(len(own.sampler) == len(own.dataset))
    count = len(data.tasks["digits"].datasets["val"])
    assert sorted(index for index in evaluated if index >= 0) == list(range(count))
    assert trained == [True, True]


def test_a_task_without_images_is_refused(colour_folder, clip_config, clip_weights):
    preprocessing = load_clip(clip_config, clip_weights).preprocessing
    folder = colour_folder(count=10)
    data = MergeDataModule(
        "val", paths={"colours": str(folder)}, fractions=(0.5, 0.0, 0.5), preprocessing=preprocessing
    )
    with pytest.raises(
        DataError, match=r"colours: expected images in the split val to learn on, got none\. Add some, ch"
    ):
        data.setup("fit")


@pytest.mark.parametrize("name", ["layer_wise", "task_wise", "plus_plus", "supervised", "large"])
def test_every_configuration_runs(name, embedded, clip_config, clip_weights):
    config = Path(__file__).parents[2] / "configs/adamerging" / f"{name}.yaml"
    vectors = f"[{embedded}/digits.safetensors,{embedded}/letters.safetensors]"
    arguments = ["fit", f"--config={config}", f"--model.vectors={vectors}", f"--output={embedded / name}"]
    arguments += [f"--model.model={clip_config}", f"--model.pretrained={clip_weights}", "--data.tasks=[digits,letters]"]
    arguments += ["--data.batch_size=4", "--data.workers=0", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    if name == "plus_plus":
        arguments += ["--trainer.val_check_interval=1", "--trainer.callbacks.every_n_steps=1"]
    assert main([*arguments, "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]) == 0
    found = Coefficients.load(embedded / name / "coefficients.safetensors")
    assert found.granularity == ("task" if name == "task_wise" else "tensor")
    assert found.metadata["step"] == "2"
    written = {path.name for path in (embedded / name).iterdir()}
    assert ("coefficients.png" in written) == (name == "layer_wise")
    assert ("spearman.json" in written) == (name == "plus_plus")


class Recomputed(nn.Module):
    """Blocks with statistics of their own, and attention whose dropout is a number."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)
        self.first.attention_dropout, self.recomputes = dropout, False

    def set_grad_checkpointing(self, enable=True):
        self.recomputes = enable

    def forward(self, images):
        def block(hidden):
            return torch.tanh(self.norm(self.first(hidden)))

        hidden = images.flatten(1)
        again = self.recomputes and self.training
        return self.last(checkpoint(block, hidden, use_reentrant=False) if again else block(hidden))


def test_activation_checkpointing_leaves_running_statistics_alone(tmp_path):
    torch.manual_seed(0)
    shapes = {name: own.shape for name, own in Recomputed().named_parameters()}
    paths = [str(tmp_path / f"{task}.safetensors") for task in TASKS]
    for task, path in zip(TASKS, paths, strict=True):
        TaskVector({name: 0.4 * torch.randn(shape) for name, shape in shapes.items()}, task).save(path)

    def learned(checkpointed, objective):
        torch.manual_seed(0)
        encoder = Recomputed()
        heads = {task: nn.Linear(6, CLASSES[task]) for task in TASKS}
        settings = {"optimizer": partial(torch.optim.SGD, lr=1.0), "objective": objective}
        found = fitted(
            MergeModule(paths, encoder=encoder, heads=heads, activation_checkpointing=checkpointed, **settings)
        )
        assert encoder.training == checkpointed
        assert not encoder.norm.running_mean.any()
        return found

    for objective in ("entropy", "expert"):
        plain = learned(False, objective)
        assert (plain - 0.3).abs().max() > 1e-2
        torch.testing.assert_close(learned(True, objective), plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigurationError, match=r"an encoder without dropout, got first\. Turn it off, or set images"):
        MergeModule(paths, encoder=Recomputed(dropout=0.1), heads={}, activation_checkpointing=True)
