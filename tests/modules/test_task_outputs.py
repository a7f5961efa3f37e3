"""What is learned for a task behind the encoder: surgery and heads, against plain loops; files, and evaluation."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from builders.learned_merge import BlockEncoder
from builders.merge_batches import SILENT, TASKS, Batches, encoder_and_heads, vector_files
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lit_merge import MergeModule, MultiTaskModule, TaskVector
from lit_merge.callbacks import WriteMerge
from lit_merge.errors import ConfigurationError, FileFormatError, StructureMismatchError
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.models import ZeroShotHead
from lit_merge.models.task_output import Surgery, TaskOutput, TrainedHead


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return vector_files(tmp_path_factory.mktemp("vectors"))


class Repeated(Batches):
    """The same batch at every step: where a run goes on in an epoch does not matter."""

    def batch(self, step):
        return super().batch(0)


def learned(files, steps, learn, objective, folder=None, checkpoint=None, rate=1e-2, data=Batches, **settings):
    encoder, heads = encoder_and_heads()
    adam = {"optimizer": lambda own: torch.optim.Adam(own, lr=rate), "clamp": None}
    module = MergeModule(
        files, encoder=encoder, heads=heads, learn=learn, objective=objective, surgery_rank=2, **adam, **settings
    )
    place = {"default_root_dir": str(folder), "callbacks": [WriteMerge()]} if folder else {}
    trainer = L.Trainer(**SILENT, precision="64-true", max_steps=steps, **place)
    trainer.fit(module, data(dtype=torch.float64), ckpt_path=checkpoint, weights_only=True)
    if folder:
        trainer.save_checkpoint(folder / "last.ckpt")
    return module


def weights(encoder, vector, factor=1.0):
    return {name: own.detach() + factor * vector[name] for name, own in encoder.named_parameters()}


def test_surgery_is_the_loop_of_its_definition_and_the_merge_stays(files, tmp_path) -> None:
    """Adam on D and U of one task after another, features' L1 distance to the individual model's (Yang et al. 2024)."""
    module = learned(files, 4, ["surgery"], "features", tmp_path)
    assert torch.equal(module.merged.coefficients, torch.full_like(module.merged.coefficients, 0.3))
    encoder, _ = encoder_and_heads()
    vectors = [dict(TaskVector.load(path)) for path in files]
    merged = weights(encoder, {name: sum(one[name] for one in vectors) for name in vectors[0]}, 0.3)
    down = {task: Surgery(6, 2).down.weight.detach().double().requires_grad_() for task in TASKS}
    up = {task: torch.zeros(6, 2, dtype=torch.float64, requires_grad=True) for task in TASKS}
    adam = torch.optim.Adam([*down.values(), *up.values()], lr=1e-2)
    for step in range(4):
        for task, vector in zip(TASKS, vectors, strict=True):
            images = Batches(dtype=torch.float64).batch(step)[task].images
            with torch.no_grad():
                own = functional_call(encoder, weights(encoder, vector), (images,))
                features = functional_call(encoder, merged, (images,))
            changed = features - F.linear(F.relu(F.linear(features, down[task])), up[task])
            adam.zero_grad()
            (changed - own).abs().mean().backward()
            adam.step()
    for task in TASKS:
        surgery = module.output_of(task).surgery
        assert up[task].abs().max() > 1e-2
        torch.testing.assert_close(surgery.down.weight, down[task], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(surgery.up.weight, up[task], rtol=1e-6, atol=1e-7)
        header = LazyTensors(tmp_path / f"{task}.output.safetensors").metadata
        assert (header["task"], header["objective"], header["step"]) == (task, "features", "4")
        assert header["base_fingerprint"] == module.base_fingerprint


def test_a_fit_that_was_interrupted_goes_on(files, tmp_path) -> None:
    learned(files, 2, ["surgery"], "features", tmp_path, data=Repeated)
    again = learned(files, 3, ["surgery"], "features", checkpoint=str(tmp_path / "last.ckpt"), data=Repeated)
    straight = learned(files, 3, ["surgery"], "features", data=Repeated)
    for one, other in zip(again.outputs.parameters(), straight.outputs.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(
        StructureMismatchError, match=r"one of a fit that learns coefficients, got one of surgery\. Set"
    ):
        learned(files, 3, None, "features", checkpoint=str(tmp_path / "last.ckpt"))


def test_heads_train_with_the_coefficients_and_the_labels_stay_the_frozen_heads_own(files) -> None:
    """The first two steps under autograd; SyMerge's objective without dropping."""
    from lit_merge.modules import Expert

    settings = {"optimizer": lambda own: torch.optim.SGD(own, lr=1.0)}
    encoder, heads = encoder_and_heads()
    module = MergeModule(
        files,
        encoder=encoder,
        heads=heads,
        learn=["heads", "coefficients"],
        objective=Expert("all"),
        clamp=None,
        **settings,
    )
    L.Trainer(**SILENT, precision="64-true", max_steps=2).fit(module, Batches(dtype=torch.float64))
    encoder, heads = encoder_and_heads()
    vectors = [dict(TaskVector.load(path)) for path in files]
    names = [name for name, _ in encoder.named_parameters()]
    values = torch.full((3, len(names)), 0.3, dtype=torch.float64, requires_grad=True)
    own = {task: [one.detach().clone().requires_grad_() for one in heads[task].parameters()] for task in TASKS}
    base = {name: one.detach() for name, one in encoder.named_parameters()}
    for step in range(2):
        total = torch.zeros((), dtype=torch.float64)
        moved = {n: base[n] + sum(values[t, c] * vectors[t][n] for t in range(3)) for c, n in enumerate(names)}
        for task, batch in Batches(dtype=torch.float64).batch(step).items():
            with torch.no_grad():
                individual = functional_call(encoder, weights(encoder, vectors[TASKS.index(task)]), (batch.images,))
                labels = heads[task](individual).argmax(-1)
            logits = F.linear(functional_call(encoder, moved, (batch.images,)), *own[task])
            total = total + F.cross_entropy(logits, labels)
        every = [values, *(one for pair in own.values() for one in pair)]
        for one, gradient in zip(every, torch.autograd.grad(total, every), strict=True):
            one.data -= gradient
    torch.testing.assert_close(module.merged.coefficients.detach(), values.detach(), rtol=1e-8, atol=1e-9)
    for task in TASKS:
        for one, other in zip(module.output_of(task).head.parameters(), own[task], strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-8, atol=1e-9)
        assert torch.equal(module.head_of(task).weight, heads[task].weight)
    assert module.describe()["learn"] == '["coefficients", "heads"]'


def test_a_head_starts_as_the_frozen_one() -> None:
    weight = F.normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    for frozen in (ZeroShotHead(weight, 20.0, ["a", "b", "c"]), nn.Linear(6, 3), nn.Linear(6, 3, bias=False)):
        torch.testing.assert_close(TrainedHead.starting_from(frozen)(features), frozen(features))
    assert torch.equal(TaskOutput.starting(frozen, ["surgery"], 4).represent(features), features)
    with pytest.raises(ConfigurationError, match="expected zero-shot or linear heads to train, got Bilinear"):
        TrainedHead.starting_from(nn.Bilinear(2, 2, 2))
    with pytest.raises(
        ConfigurationError, match=r"expected heads of features \[B, d\] with a weight \[C, d\], got ReLU"
    ):
        TaskOutput.starting(nn.ReLU(), ["surgery"], 4)


class TestSplit(Batches):
    __test__ = False

    def test_dataloader(self):
        return self.val_dataloader()


def test_files_are_evaluated_as_they_were_learned(files, tmp_path) -> None:
    module = learned(files, 30, ["surgery", "heads"], "expert", tmp_path, rate=0.1)
    batch = Batches(dtype=torch.float64).batch(99)
    paths = {task: str(tmp_path / f"{task}.output.safetensors") for task in TASKS}
    encoder, heads = encoder_and_heads()
    given = {"encoder": encoder, "heads": heads, "weights": str(tmp_path / "merged.safetensors")}
    tested = MultiTaskModule(**given, task_outputs=paths)
    trainer = L.Trainer(**SILENT, precision="64-true")
    metrics = trainer.test(tested, TestSplit(dtype=torch.float64), verbose=False)
    found = {key: value for one in metrics for key, value in one.items()}
    for task in TASKS:
        logits = module.classify(module(batch[task].images), task)
        torch.testing.assert_close(tested.classify(tested.encoder(batch[task].images), task), logits)
        assert not torch.allclose(logits, module.head_of(task)(module(batch[task].images)))
        right = (logits.argmax(-1) == batch[task].targets).double().mean()
        assert found[f"test/{task}/accuracy"] == pytest.approx(float(right))
    trainer.save_checkpoint(tmp_path / "tested.ckpt")
    opened = MultiTaskModule.load_from_checkpoint(
        tmp_path / "tested.ckpt", encoder=encoder_and_heads()[0], heads=encoder_and_heads()[1], weights_only=True
    )
    torch.testing.assert_close(opened.outputs.state_dict(), tested.outputs.state_dict())

    swapped = {"a": paths["b"]}
    with pytest.raises(StructureMismatchError, match=r"expected the task a, got b\. Give the file of this task"):
        MultiTaskModule(encoder=encoder_and_heads()[0], heads=encoder_and_heads()[1], task_outputs=swapped)
    other = MultiTaskModule(
        encoder=encoder_and_heads()[0], heads={"a": encoder_and_heads()[1]["a"]}, task_outputs=paths
    )
    with pytest.raises(ConfigurationError, match=r"task_outputs: expected tasks of data, a, got b\. Remove it"):
        trainer.test(other, TestSplit(["a"], dtype=torch.float64), verbose=False)
    narrow = MultiTaskModule(
        encoder=encoder_and_heads()[0],
        heads=encoder_and_heads()[1] | {"a": nn.Linear(6, 9).double()},
        task_outputs=paths,
    )
    with pytest.raises(StructureMismatchError, match="task_outputs of a: expected a classifier of 9 classes, got 3"):
        trainer.test(narrow, TestSplit(dtype=torch.float64), verbose=False)


def test_refused(files, tmp_path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"surgery.up.weight": torch.ones(2, 2)}, {"format": "else"})
    with pytest.raises(FileFormatError, match=r"expected what a learned merge wrote of a task .* format 'else'"):
        TaskOutput.load(tmp_path / "x.safetensors")
    odd = {"surgery.down.weight": torch.ones(2, 2), "surgery.up.weight": torch.ones(3, 2)}
    write_tensors(tmp_path / "x.safetensors", odd, {"format": "lit-merge/task-output/1"})
    with pytest.raises(
        FileFormatError, match=r"that fit, got surgery.down.weight \[2, 2\], surgery.up.weight \[3, 2\]"
    ):
        TaskOutput.load(tmp_path / "x.safetensors")
    for settings, said in (
        ({"learn": []}, r"learn: expected some of coefficients, heads, surgery, each once, got \[\]. Change it"),
        ({"learn": ["head"]}, "learn: expected some of coefficients"),
        ({"learn": ["heads"], "masks": "m"}, "masks: expected coefficients in learn, with which they are learned"),
        ({"learn": ["heads"], "objective": "features"}, "learn: expected no heads with objective features"),
        ({"surgery_rank": 0}, "surgery_rank: expected a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            MergeModule(files, encoder=BlockEncoder(), heads={}, **settings)
    encoder, heads = encoder_and_heads()
    module = MergeModule(files, encoder=encoder, heads=heads, learn=["surgery"])
    module.base.vector_features = False
    with pytest.raises(
        ConfigurationError, match=r"learn: expected a network of features \[B, d\] for surgery, got one"
    ):
        L.Trainer(**SILENT, max_steps=1).fit(module, Batches())


class OfOne(TestSplit):
    """One of the three tasks is learned on."""

    adapted_tasks = ()
    adapted = "a"

    def setup(self, stage):
        self.adapted_tasks = (self.adapted,) if stage == "fit" else ()

    def batch(self, step):
        batch = super().batch(step)
        return batch if step == 99 else {self.adapted: batch[self.adapted]}


class OfAnother(OfOne):
    adapted = "b"


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_what_is_learned_of_some_tasks_is_evaluated_on_all(stage, files, tmp_path) -> None:
    module = learned(files, 3, ["surgery"], "features", tmp_path, data=OfOne)
    encoder, heads = encoder_and_heads()
    again = MergeModule(files, encoder=encoder, heads=heads, learn=["surgery"], objective="features", surgery_rank=2)
    trainer = L.Trainer(**{**SILENT, "limit_val_batches": 1.0}, precision="64-true")
    getattr(trainer, stage)(again, OfOne(dtype=torch.float64), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.output_of("b") is None
    torch.testing.assert_close(again.outputs.state_dict(), module.outputs.state_dict())
    with pytest.raises(
        StructureMismatchError, match=r"checkpoint: expected surgery or heads of b, got those of a\. Set learn and data"
    ):
        learned(files, 4, ["surgery"], "features", checkpoint=str(tmp_path / "last.ckpt"), data=OfAnother)
