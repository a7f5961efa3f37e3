"""Every regime on a BERT, a T5, a GPT-2 and a Llama against plain loops, and what else training does with them."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from builders.language_folders import in_double, language_folder
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lit_merge.callbacks import ExtractTaskVector
from lit_merge.data.batch import OtherBatch
from lit_merge.data.text.batch import TextBatch
from lit_merge.errors import FileFormatError, StructureMismatchError
from lit_merge.models import Attention, LinLR
from lit_merge.models.language import CausalNetwork, Seq2SeqNetwork, TaskClassifier, TextEncoderNetwork
from lit_merge.models.lora import LoRA
from lit_merge.modules import FineTuneModule, MergeModule, MultiTaskModule, TauJpPenalty
from lit_merge.modules.passes import passes
from lit_merge.naming import Depth
from lit_merge.vectors import TaskVector

NETWORKS = {"bert": TextEncoderNetwork, "t5": Seq2SeqNetwork, "gpt2": CausalNetwork, "llama": CausalNetwork}
STEPS, RATE, DECAY, WEIGHT = 2, 1e-2, 0.1, 0.3
EXACT = {"precision": "64-true"}
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "w1", "w2", "w3", "w4", "w5"]


@pytest.fixture
def network(tmp_path, own_cache):
    """``network(name)``: without dropout, in float64 unless another dtype is given."""

    def build(name, dtype="float64", **settings):
        folder = tmp_path / name
        if not folder.exists():
            language_folder(folder, name)
        made = NETWORKS[name](str(folder), dtype=dtype, dropout=0.0, **settings)
        if dtype == "float64":
            in_double(made.module.of_transformers)
        return made

    return build


def some_texts(count, draw, longest=7):
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (int(n),), generator=draw))
        for n in torch.randint(1, longest, (count,), generator=draw)
    ]


def text_batch(network, size, seed, longest=7):
    """Texts of different lengths with their targets, made by a generator of their own."""
    draw, tokenization = torch.Generator().manual_seed(seed), network.preprocessing
    sources = some_texts(size, draw, longest)
    if tokenization.kind == "encoder":
        inputs, _ = tokenization.padded(tokenization.encode(sources).input_ids)
        targets = torch.randint(3, (size,), generator=draw)
    else:
        encoded = tokenization.encode(sources, some_texts(size, draw, 4))
        inputs, targets = tokenization.padded(encoded.input_ids, encoded.target_ids)
    return TextBatch(inputs, targets, torch.arange(size), tokenization.fills)


class Texts(L.LightningDataModule):
    """Batches of texts, with some of two other tasks beside them if a penalty asks for them."""

    name, templates = "topics", ("{}",)

    def __init__(self, network, penalty=None, steps=STEPS, size=4, seed=0):
        super().__init__()
        self.classes = ("a", "b c", "w1") if network.preprocessing.kind == "encoder" else ()
        self.own = [text_batch(network, size, 10 * seed + step) for step in range(steps)]
        self.other = []
        for step in range(steps):
            parts = [text_batch(network, 2, 100 + 10 * step + task, longest=3 + 8 * task) for task in (0, 1)]
            tasks = [0, 1] if penalty is not None and penalty.schedule == "strict" else [step % 2]
            joined = TextBatch.join([parts[task] for task in tasks])
            self.other.append(OtherBatch(joined.inputs, torch.tensor(tasks).repeat_interleave(2), joined.indices))
        self.penalised = penalty is not None
        self.other_sources = {
            name: SimpleNamespace(name=name, classes=("x",), templates=("{}",)) for name in ("y", "z")
        }

    def train_dataloader(self):
        steps = self.own
        if self.penalised:
            steps = [{"own": own, "other": other} for own, other in zip(self.own, self.other, strict=True)]
        return DataLoader(steps, batch_size=None, collate_fn=lambda batch: batch)

    def val_dataloader(self):
        return DataLoader(self.own, batch_size=None, collate_fn=lambda batch: batch)

    test_dataloader = val_dataloader


class Several(L.LightningDataModule):
    def __init__(self, tasks):
        super().__init__()
        self.tasks, self.task_names = tasks, tuple(tasks)

    def train_dataloader(self):
        rows = [
            dict(zip(self.tasks, row, strict=True))
            for row in zip(*(one.own for one in self.tasks.values()), strict=True)
        ]
        return DataLoader(rows, batch_size=None, collate_fn=lambda batch: batch)

    def val_dataloader(self):
        return [one.val_dataloader() for one in self.tasks.values()]

    test_dataloader = val_dataloader


# The protocol written out


def objective(output, targets, head=None):
    """Cross-entropy of classes, or the mean over examples of that over their tokens."""
    if output.ndim == 2:
        logits = 20.0 * F.normalize(output, dim=-1) @ head.weight.T.to(output)
        return F.cross_entropy(logits, targets)
    losses = [
        F.cross_entropy(row[: int((own >= 0).sum())], own[own >= 0]) for row, own in zip(output, targets, strict=True)
    ]
    return torch.stack(losses).mean()


def plain_loop(module, data, head, linearized, names=None, penalty=None, rates=None):
    initial = {name: value.detach().clone() for name, value in module.named_parameters()}
    names = [name for name in (names or initial) if not name.startswith("pooler")]
    tau = {name: torch.zeros_like(initial[name]).requires_grad_() for name in names}
    theta = {name: initial[name].clone().requires_grad_() for name in names}
    trained = tau if linearized else theta
    factors = {name: 1.0 if rates is None else rates[name] for name in names}
    optimizer = torch.optim.AdamW(
        [{"params": [trained[name]], "lr": 0.0} for name in names], eps=1e-6, weight_decay=DECAY
    )

    def parts(inputs):
        change = tau if linearized else {name: theta[name] - initial[name] for name in names}
        with sdpa_kernel(SDPBackend.MATH):
            start = {name: initial[name] for name in names}
            return jvp(lambda part: functional_call(module, {**initial, **part}, inputs), (start,), (change,))

    for step, (own, other) in enumerate(zip(data.own, data.other, strict=True)):
        rate = RATE * 0.5 * (1 + math.cos(math.pi * step / len(data.own)))
        for group, name in zip(optimizer.param_groups, names, strict=True):
            group["lr"] = rate * factors[name]
        output = sum(parts(own.inputs)) if linearized else functional_call(module, {**initial, **theta}, own.inputs)
        loss = objective(output, own.targets, head)
        if penalty is not None:
            loss = loss + penalty.weight * parts(other.inputs)[1].flatten(1).norm(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
    return {name: (trained[name] - (0 if linearized else initial[name])).detach() for name in names}


def assert_close(found, expected):
    difference = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    size = sum(float(value.square().sum()) for value in expected.values())
    assert size > 0
    assert difference <= 1e-18 * size
    assert not any(bool(value.any()) for name, value in found.items() if name not in expected)


REGIMES = {
    "full": {},
    "attention": {"trainable": Attention(1)},
    "linear rates": {"rates": LinLR()},
    "linearised": {"linearized": True},
    "linearised, attention, cyclic": {
        "linearized": True,
        "trainable": Attention(1),
        "penalty": TauJpPenalty("cyclic", weight=WEIGHT),
    },
    "linearised, strict": {"linearized": True, "penalty": TauJpPenalty("strict", weight=WEIGHT)},
    "direct, strict": {"penalty": TauJpPenalty("strict", weight=WEIGHT)},
}


# What differs between the networks is in two regimes, what differs between the regimes in one network.
FITS = [(name, regime) for name in NETWORKS for regime in ("full", "linearised, attention, cyclic")]
FITS += [("t5", regime) for regime in REGIMES if ("t5", regime) not in FITS] + [("gpt2", "linearised, strict")]


@pytest.mark.parametrize(("name", "regime"), FITS)
def test_fit_is_the_plain_loop(name, regime, network, silent_trainer):
    settings = REGIMES[regime]
    base = network(name)
    data = Texts(base, settings.get("penalty"))
    module = copy.deepcopy(base.module)
    tuned = FineTuneModule(network=base, learning_rate=RATE, weight_decay=DECAY, warmup_fraction=0.0, **settings)
    trainer = silent_trainer(max_steps=STEPS, **EXACT)
    trainer.fit(tuned, datamodule=data)
    names = settings["trainable"](dict(module.named_parameters())) if "trainable" in settings else None
    rates = settings["rates"](dict(module.named_parameters())) if "rates" in settings else None
    expected = plain_loop(
        module, data, tuned.head, settings.get("linearized", False), names, settings.get("penalty"), rates
    )
    expected = {key: value for key, value in expected.items() if rates is None or rates[key]}
    assert_close(tuned.task_vector(), expected)
    metrics = trainer.callback_metrics
    assert ("val/perplexity" in metrics) == (name != "bert")
    assert torch.isfinite(metrics["val/loss"])


def answered(network, sources, targets):
    encoded = network.preprocessing.encode(sources, targets)
    inputs, tokens = network.preprocessing.padded(encoded.input_ids, encoded.target_ids)
    return TextBatch(inputs, tokens, torch.arange(len(sources)), network.preprocessing.fills)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_targets_of_other_tasks_may_be_longer(name, network, silent_trainer):
    base, penalty = network(name), TauJpPenalty("cyclic", weight=WEIGHT)
    data = Texts(base, penalty)
    short = answered(base, ["a b", "c"], ["a", "b"])
    long = answered(base, ["a", "c d"], ["a b c d e", "b"])
    assert long.targets.shape[1] > short.targets.shape[1]
    data.own, data.other = [short] * STEPS, [OtherBatch(long.inputs, torch.zeros(2).long(), long.indices)] * STEPS
    module = copy.deepcopy(base.module)
    tuned = FineTuneModule(
        network=base, learning_rate=RATE, warmup_fraction=0.0, linearized=True, penalty=penalty, weight_decay=DECAY
    )
    silent_trainer(max_steps=STEPS, **EXACT).fit(tuned, datamodule=data)
    assert_close(tuned.task_vector(), plain_loop(module, data, tuned.head, True, penalty=penalty))

    base = network(name)
    tasks = {"one": Texts(base, steps=1), "two": Texts(base, steps=1)}
    tasks["one"].own, tasks["two"].own = [short], [long]
    trainer, module = silent_trainer(max_steps=1, limit_val_batches=0, **EXACT), copy.deepcopy(base.module)
    trainer.fit(MultiTaskModule(network=base, learning_rate=RATE), datamodule=Several(tasks))
    losses = [float(objective(module(*one.inputs), one.targets)) for one in (short, long)]
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_low_rank_training_moves_attention_alone(name, network, silent_trainer):
    base = network(name)
    data, module = Texts(base), copy.deepcopy(base.module)
    tuned = FineTuneModule(network=base, learning_rate=RATE, lora=LoRA(rank=2, rslora=True))
    silent_trainer(max_steps=STEPS, **EXACT).fit(tuned, datamodule=data)
    tau = dict(tuned.task_vector())
    chosen = set(Attention(1)(tau))
    for key, value in tau.items():
        assert int(torch.linalg.matrix_rank(value)) == 2 if key in chosen else not value.any(), key
    start = dict(module.named_parameters())
    inputs = data.own[0].inputs
    with torch.no_grad():
        merged = functional_call(module, {key: value + tau[key] for key, value in start.items()}, inputs)
        torch.testing.assert_close(tuned.eval()(*inputs), merged, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_rates_rise_with_the_blocks_of_encoder_and_decoder(name, network):
    names = list(network(name).parameters)
    rates, depth = LinLR()(names), Depth(names)
    assert depth.blocks == (4 if name == "t5" else 2)
    for one in names:
        assert rates[one] == min(max(depth.position(one), 0), depth.blocks - 1) / (depth.blocks - 1)
    if name == "t5":
        assert rates["encoder.block.1.layer.0.SelfAttention.q.weight"] == pytest.approx(1 / 3)
        assert rates["decoder.block.0.layer.1.EncDecAttention.q.weight"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_joint_training_is_the_mean_over_the_tasks(name, network, silent_trainer):
    base = network(name)
    tasks = {"one": Texts(base, steps=1, seed=1), "two": Texts(base, steps=1, seed=2)}
    module = copy.deepcopy(base.module)
    tuned = MultiTaskModule(network=base, learning_rate=RATE, warmup_fraction=0.0, gradient_clip=0.0, tau_jp=True)
    trainer = silent_trainer(max_steps=1, **EXACT)
    trainer.fit(tuned, datamodule=Several(tasks))
    losses = [
        objective(module(*data.own[0].inputs), data.own[0].targets, tuned.head_of("one")) for data in tasks.values()
    ]
    torch.stack(losses).mean().backward()
    for key, value in module.named_parameters():
        if value.requires_grad:  # AdamW's first step: the sign of the gradient, but for ε
            step = value.grad / (value.grad.abs() + 1e-6) + DECAY * value
            torch.testing.assert_close(tuned.task_vector()[key], (-RATE * step).detach(), rtol=1e-7, atol=1e-12)
    assert {"val/one/tau_jp", "val/two/accuracy"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize(("name", "linearized"), [("gpt2", False), ("t5", True)], ids=str)
def test_half_precision_and_recomputation_train_alike(name, linearized, network, silent_trainer):
    found = {}
    for kind, precision in (("plain", "32-true"), ("mixed", "bf16-mixed"), ("recomputed", "32-true")):
        base = network(name, "float32")
        if kind == "recomputed":
            base.module.set_grad_checkpointing(True)
        tuned = FineTuneModule(network=base, learning_rate=1e-3, weight_decay=0.0, linearized=linearized)
        silent_trainer(max_steps=2, precision=precision).fit(tuned, datamodule=Texts(base))
        found[kind] = torch.cat([value.flatten() for value in tuned.task_vector().values()])
    assert float((found["plain"] - found["recomputed"]).norm() / found["plain"].norm()) < 1e-3
    assert float(F.cosine_similarity(found["plain"], found["mixed"], dim=0)) > 0.8


def test_a_classifier_trains_with_its_task_and_is_no_part_of_the_vector(network, silent_trainer, tmp_path):
    base = network("bert", head="classifier")
    tuned = FineTuneModule(network=base, learning_rate=RATE, weight_decay=0.0)
    trainer = silent_trainer(max_steps=2, callbacks=[ExtractTaskVector()], **EXACT)
    trainer.fit(tuned, datamodule=Texts(base))
    fresh = base.head(SimpleNamespace(name="topics", classes=("a", "b c", "w1"), templates=()))
    assert not torch.allclose(tuned.head.weight, fresh.weight.double())
    assert set(tuned.task_vector()) == set(base.parameters)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = FineTuneModule.load_from_checkpoint(tmp_path / "run.ckpt", network=network("bert", head="classifier"))
    torch.testing.assert_close(again.head.weight.double(), tuned.head.weight.detach(), check_dtype=False)
    task = SimpleNamespace(name="topics", classes=("a", "b c", "w1"), templates=())
    with_file = network("bert", head="classifier", heads=str(tmp_path / "run/task_vector.{task}.safetensors"))
    (tmp_path / "run/task_vector.head.safetensors").rename(tmp_path / "run/task_vector.topics.safetensors")
    torch.testing.assert_close(with_file.head(task).weight.double(), tuned.head.weight.detach(), check_dtype=False)
    task.classes = ("a", "b", "c")
    with pytest.raises(
        StructureMismatchError, match=r"expected a classifier of the classes a, b, c, got a, b c, w1. Give"
    ):
        with_file.head(task)
    with pytest.raises(FileFormatError, match="expected a task's classifier, got a file of format 'lit-merge/task-vec"):
        TaskClassifier.load(tmp_path / "run/task_vector.safetensors")


# Learning coefficients


def vectors(base, tmp_path, tasks):
    files = []
    for seed, task in enumerate(tasks):
        draw = torch.Generator().manual_seed(seed)
        tau = {
            name: 0.05 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
            for name, value in base.module.named_parameters()
        }
        metadata = {"base_fingerprint": base.fingerprint}
        files.append(str(tmp_path / f"{task}.safetensors"))
        TaskVector(tau, task, metadata=metadata).save(files[-1])
    return files


def ranked_batch(network, size, seed, answers=("c", "w1 w2")):
    draw, tokenization = torch.Generator().manual_seed(seed), network.preprocessing
    encoded = tokenization.encode(some_texts(size, draw), [answers[-1]] * size, ended=False)
    tokens = tokenization.encode(["a"] * len(answers), answers, ended=False).target_ids
    inputs = tokenization.padded_answers(encoded.input_ids, [tokens] * size)
    return TextBatch(
        inputs, torch.randint(len(answers), (size,), generator=draw), torch.arange(size), tokenization.fills
    )


def entropy(probabilities):
    return -(probabilities * probabilities.log()).sum(-1)


def plain_entropy(output, batch, head):
    """Of the classes, the answers or the next tokens, example by example."""
    if output.ndim == 2:
        return entropy((20.0 * F.normalize(output, dim=-1) @ head.weight.T.to(output)).softmax(-1)).mean()
    if output.ndim == 4:
        scores = output.log_softmax(-1)[..., 0] * (batch.inputs[3] >= 0)
        return entropy(scores.sum(-1).softmax(-1)).mean()
    rows = [entropy(row[own >= 0].softmax(-1)).mean() for row, own in zip(output, batch.targets, strict=True)]
    return torch.stack(rows).mean()


CASES = {
    "bert": ("bert", False, False),
    "bert, linearised": ("bert", False, True),
    "t5": ("t5", False, False),
    "t5, answers, linearised": ("t5", True, True),
    "gpt2": ("gpt2", False, False),
    "llama, answers": ("llama", True, False),
}


@pytest.mark.parametrize(("name", "ranked", "linearized"), CASES.values(), ids=CASES)
def test_the_gradient_of_the_coefficients_is_that_of_the_entropy(
    name, ranked, linearized, network, tmp_path, silent_trainer
):
    base = network(name)
    files = vectors(base, tmp_path, ("one", "two"))
    make = ranked_batch if ranked else text_batch
    batches = (
        {"one": make(base, 3, 1), "two": make(base, 3, 2)}
        if ranked
        else {"one": make(base, 3, 1, longest=3), "two": make(base, 3, 2, longest=14)}
    )
    module = copy.deepcopy(base.module)
    merged = MergeModule(files, network=base, granularity="task", linearized=linearized)
    tasks = {task: Texts(base) for task in batches}
    for task, batch in batches.items():
        tasks[task].own = [batch]
    trainer = silent_trainer(max_steps=1, **EXACT)
    data = Several(tasks)
    data.adapted_tasks = ()
    trainer.fit(merged, datamodule=data)
    assert len(passes(batches)) == (1 if ranked else 2)
    initial = {key: value.detach() for key, value in module.named_parameters()}
    taus = [dict(TaskVector.load(file)) for file in files]
    with torch.no_grad():
        merged.merged.coefficients.copy_(torch.full((2, 1), 0.3))
    coefficients = merged.merged.coefficients[:, 0].detach().double().requires_grad_()
    total = 0
    for task, batch in batches.items():
        tau = {key: sum(c * one[key].double() for c, one in zip(coefficients, taus, strict=True)) for key in initial}
        with sdpa_kernel(SDPBackend.MATH):
            if linearized:
                output = sum(
                    jvp(lambda part, batch=batch: functional_call(module, part, batch.inputs), (initial,), (tau,))
                )
            else:
                output = functional_call(module, {key: initial[key] + tau[key] for key in initial}, batch.inputs)
        total = total + plain_entropy(output, batch, merged.head_of(task) if name == "bert" else None)
    (gradient,) = torch.autograd.grad(total, coefficients)
    torch.testing.assert_close(trainer.callback_metrics["train/loss"].double(), total.detach(), rtol=1e-6, atol=1e-6)
    _, found = merged._accumulate(batches)
    torch.testing.assert_close(found[0][:, 0], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("storage", "objective"),
    [("device", "entropy"), ("bfloat16", "cross_entropy"), ("host", "entropy"), ("mapped", "cross_entropy")],
)
def test_coefficients_are_learned_in_every_storage(storage, objective, network, tmp_path, silent_trainer):
    base = network("t5", "float32")
    files = vectors(base, tmp_path, ("one", "two"))
    merged = MergeModule(files, network=base, storage=storage, objective=objective, activation_checkpointing=True)
    trainer = silent_trainer(max_steps=2)
    trainer.fit(merged, datamodule=Several({"one": Texts(base, steps=2, seed=1), "two": Texts(base, steps=2, seed=2)}))
    assert bool((merged.merged.coefficients != 0.3).any())
    assert {"val/entropy", "val/one/perplexity", "val/two/accuracy"} <= set(trainer.callback_metrics)


def test_texts_of_other_lengths_and_kinds_go_apart():
    def batch(*shapes):
        return TextBatch(
            tuple(torch.ones(shape, dtype=torch.int64) for shape in shapes),
            torch.ones(shapes[0][0]),
            torch.arange(shapes[0][0]),
            (0, 0, -1, -1),
        )

    short, long = batch((4, 8), (4, 8)), batch((4, 64), (4, 64))
    assert passes({"a": short, "b": long, "c": batch((4, 9), (4, 9))}) == [["a", "c"], ["b"]]
    assert passes({"a": short, "b": short, "c": short}) == [["a", "b", "c"]]
    assert passes({"a": short, "b": short, "c": short}, limit=8) == [["a", "b"], ["c"]]
    ranked = batch((4, 2, 8), (4, 2, 8), (4, 2, 1), (4, 2, 1))
    assert passes({"a": ranked, "b": batch((4, 8), (4, 8), (4, 1))}) == [["a"], ["b"]]


# Texts of one length whose targets or answers differ in number: one pass, padded to the longest


def batches_of_other_targets(base, kind):
    tokenization, found = base.preprocessing, {}
    for task, count in (("one", 2), ("two", 3)):
        if kind == "answers":
            found[task] = ranked_batch(base, 3, 1, ("c", "w1 w2", "d e f")[:count])
            continue
        encoded = tokenization.encode(["a b c d e f g h a b c d"] * 3, [" ".join(["b"] * count)] * 3)
        inputs, targets = tokenization.padded(encoded.input_ids, encoded.target_ids)
        found[task] = TextBatch(inputs, targets, torch.arange(3), tokenization.fills)
    return found


def several(base, batches):
    tasks = {task: Texts(base) for task in batches}
    for task, batch in batches.items():
        tasks[task].own = [batch]
    return Several(tasks)


@pytest.mark.parametrize("objective", ["cross_entropy", "expert", "features"])
@pytest.mark.parametrize(("name", "kind"), [("gpt2", "target"), ("t5", "target"), ("t5", "answers")])
def test_batches_with_longer_targets_beside_them_are_learned_on_as_alone(
    name, kind, objective, network, tmp_path, silent_trainer
):
    base, losses, values = network(name), [], []
    files, batches = vectors(base, tmp_path, ("one", "two")), batches_of_other_targets(base, kind)
    assert passes(batches) == [["one", "two"]]
    for limit in (None, 1):
        merged = MergeModule(
            files, network=network(name), granularity="task", objective=objective, images_per_pass=limit,
            optimizer=lambda own: torch.optim.SGD(own, lr=1.0), clamp=None,
        )  # fmt: skip
        trainer = silent_trainer(max_steps=1, **EXACT)
        trainer.fit(merged, datamodule=several(base, batches))
        losses.append(float(trainer.callback_metrics["train/loss"]))
        values.append(merged.merged.coefficients.detach())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert (values[0] - 0.3).abs().max() > 1e-6
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_joint_training_takes_targets_of_other_lengths(name, network, silent_trainer):
    base = network(name)
    batches, module = batches_of_other_targets(base, "target"), copy.deepcopy(base.module)
    trainer = silent_trainer(max_steps=1, **EXACT)
    trainer.fit(MultiTaskModule(network=base, learning_rate=RATE), datamodule=several(base, batches))
    with torch.no_grad():
        expected = torch.stack([objective(module(*one.inputs), one.targets) for one in batches.values()]).mean()
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_a_penalty_on_longer_targets_leaves_the_objective_as_it_is(network, silent_trainer):
    losses = []
    for penalised in (False, True):
        base = network("t5")
        data = Texts(base, steps=1)
        short, long = batches_of_other_targets(base, "target").values()
        data.own, data.other = [short], [OtherBatch(long.inputs, torch.zeros(3, dtype=torch.int64), long.indices)]
        penalty = TauJpPenalty("strict", weight=WEIGHT) if penalised else None
        data.penalised = penalised
        tuned = FineTuneModule(network=base, learning_rate=RATE, linearized=True, penalty=penalty)
        trainer = silent_trainer(max_steps=1, **EXACT)
        trainer.fit(tuned, datamodule=data)
        losses.append(float(trainer.callback_metrics["train/loss"]))  # τ is 0, and with it the penalty
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
