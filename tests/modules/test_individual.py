"""Merges that are learned by comparison with the individual models: what is kept, gradients, what holds the weights."""

from __future__ import annotations

import hashlib

import lightning as L
import pytest
import torch
from builders.learned_merge import BlockEncoder
from builders.merge_batches import CLASSES, SILENT, TASKS, Batches, vector_files
from torch import nn
from torch.func import functional_call

from lit_merge import MergeModule, TaskVector
from lit_merge.data import Batch
from lit_merge.errors import ConfigurationError
from lit_merge.functional import linearize
from lit_merge.modules import Expert, Features, Outputs
from lit_merge.transforms import Trim, ties, tsv_m
from lit_merge.vectors import TaskVectors

FEATURES = torch.zeros(5, 2, dtype=torch.float64)
EXPERT = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 1, 0], [0, 3, 0], [9, 0, 0]], dtype=torch.float64)
MERGED = torch.tensor([[1.0, 0, 0], [5, 0, 0], [1, 0, 0], [2, 0, 0], [9, 0, 0]], dtype=torch.float64)
BATCH = Batch((), torch.full((5,), -1), torch.tensor([0, 1, 2, 3, -1]))


def test_the_expert_labels_what_both_agree_on_or_it_is_surer_of() -> None:
    """Rows: agree; the merge is surer; as sure; the expert is surer; padding."""
    merged, expert = Outputs(FEATURES, MERGED), Outputs(FEATURES, EXPERT)
    log = MERGED.log_softmax(-1)
    expected = -(log[0, 0] + log[2, 1] + log[3, 1]) / 3
    torch.testing.assert_close(Expert().against(merged, expert, BATCH), expected)
    torch.testing.assert_close(Expert("all").against(merged, expert, BATCH), -(log[0, 0] + log[1:4, 1].sum()) / 4)
    nothing = Batch((), BATCH.targets[1:2], BATCH.indices[1:2])
    logits = MERGED[1:2].clone().requires_grad_()
    loss = Expert().against(Outputs(FEATURES[1:2], logits), Outputs(FEATURES[1:2], EXPERT[1:2]), nothing)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    with pytest.raises(ConfigurationError, match=r"Expert\.keep: expected trusted or all, got 'most'\."):
        Expert("most")
    with pytest.raises(ConfigurationError, match=r"objective Expert\(keep='trusted'\): expected a merge of individual"):
        Expert()(MERGED, BATCH)


def test_of_next_tokens_every_position_is_an_example() -> None:
    """Two examples of two positions, the last of which predicts nothing."""
    merged, expert = MERGED[:4].view(2, 2, 3).clone(), EXPERT[:4].view(2, 2, 3).clone()
    merged[1, 1] = expert[1, 1] = 0
    batch = Batch((), torch.full((2, 2), -1), torch.tensor([0, 1]))
    log = MERGED.log_softmax(-1)
    found = Expert().against(Outputs(merged, merged), Outputs(expert, expert), batch)
    torch.testing.assert_close(found, -(log[0, 0] + log[2, 1]) / 2)


def test_features_are_compared_element_by_element() -> None:
    batch = Batch((), torch.full((2,), -1), torch.tensor([3, -1]))
    merged = torch.tensor([[1.0, -2.0], [7.0, 7.0]], dtype=torch.float64)
    found = Features().against(Outputs(merged, merged), Outputs(torch.zeros_like(merged), merged), batch)
    assert float(found) == 1.5
    nothing = Batch((), torch.full((1,), -1), torch.tensor([-1]))
    assert float(Features().against(Outputs(merged[1:], merged[1:]), Outputs(merged[1:], merged[1:]), nothing)) == 0
    merged, expert = MERGED[:4].view(2, 2, 3).clone(), EXPERT[:4].view(2, 2, 3).clone()
    merged[1, 1] = expert[1, 1] = 0  # where nothing is predicted
    several = Batch((), torch.full((2, 2), -1), torch.tensor([0, 1]))
    found = Features().against(Outputs(merged, merged), Outputs(expert, expert), several)
    torch.testing.assert_close(found, (MERGED[:3] - EXPERT[:3]).abs().mean())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return vector_files(tmp_path_factory.mktemp("vectors"))


def plain_gradient(files, objective, linearized=False, granularity="tensor", transform=None):
    """Of λ = 0.3, under autograd, one model at a time; and how many examples the expert's labels were dropped of."""
    torch.manual_seed(0)
    encoder = BlockEncoder().double().eval()
    heads = {task: nn.Linear(6, CLASSES[task]).double() for task in TASKS}
    vectors = {task: dict(TaskVector.load(path)) for task, path in zip(TASKS, files, strict=True)}
    names = [name for name, _ in encoder.named_parameters()]
    columns = [0 if granularity == "task" else column for column in range(len(names))]
    coefficients = torch.full((3, max(columns) + 1), 0.3, dtype=torch.float64, requires_grad=True)

    def features(move, images):
        if linearized:
            return torch.add(*linearize(encoder, {}, move, images))
        return functional_call(encoder, {n: own.detach() + move[n] for n, own in encoder.named_parameters()}, (images,))

    trimmed = {task: {n: transform(n, v) if transform else v for n, v in vectors[task].items()} for task in TASKS}
    moved = {
        name: sum(coefficients[row, column] * trimmed[task][name] for row, task in enumerate(TASKS))
        for name, column in zip(names, columns, strict=True)
    }
    total, dropped = torch.zeros((), dtype=torch.float64), 0
    for task, batch in Batches(dtype=torch.float64).batch(0).items():
        merged, own = features(moved, batch.images), features(vectors[task], batch.images).detach()
        if objective == "features":
            total = total + (merged - own).abs().mean()
            continue
        p, q = heads[task](merged).softmax(-1), heads[task](own).softmax(-1)
        chosen = []
        for mine, his in zip(p, q, strict=True):
            label = int(his.argmax())
            if int(mine.argmax()) == label or his.max() >= mine.max():
                chosen.append(-mine[label].log())
        dropped += len(p) - len(chosen)
        total = total + sum(chosen) / len(chosen)
    (gradient,) = torch.autograd.grad(total, coefficients)
    return gradient, dropped


class Images(list):
    """A data set that tells its content from others."""

    def digest(self):
        return hashlib.sha256(torch.stack(self).numpy().tobytes()).hexdigest()


class InOrder(Batches):
    """Also tells what may be computed of all images before the fit."""

    def __init__(self):
        super().__init__(dtype=torch.float64)
        self.adapted_tasks = TASKS
        for task, one in self.tasks.items():
            batch = self.batch(0)[task]
            loader = torch.utils.data.DataLoader(
                Images(batch.images), collate_fn=lambda _, batch=batch: batch, batch_size=4
            )
            one.ordered_loader = lambda split, loader=loader: loader


def learned(files, data=None, steps=1, **settings):
    torch.manual_seed(0)
    encoder = BlockEncoder().double()
    heads = {task: nn.Linear(6, CLASSES[task]).double() for task in TASKS}
    descent = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0), "clamp": None}
    module = MergeModule(files, encoder=encoder, heads=heads, **descent, **settings)
    trainer = L.Trainer(**SILENT, precision="64-true", max_steps=steps)
    trainer.fit(module, data or InOrder())
    return module


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("expert", {}),
        ("expert", {"storage": "mapped", "images_per_pass": 1}),
        ("expert", {"linearized": True}),
        ("expert", {"linearized": True, "granularity": "task"}),
        ("features", {}),
        ("features", {"storage": "host", "granularity": "block"}),
    ],
)
def test_gradients_are_those_of_two_plain_models(files, objective, settings, own_cache) -> None:
    if settings.get("granularity") == "block":
        module = learned(files, objective=objective, **settings)
        whole, _ = plain_gradient(files, objective)
        groups = [module.merged.groups.index(group) for group in module.merged.members.values()]
        expected = torch.zeros(3, len(module.merged.groups), dtype=torch.float64)
        expected.index_add_(1, torch.tensor(groups), whole)
    else:
        plain = {name: value for name, value in settings.items() if name in ("linearized", "granularity")}
        expected, dropped = plain_gradient(files, objective, **plain)
        assert objective == "features" or dropped
        module = learned(files, objective=objective, **settings)
        assert bool(module._linear) == (settings == {"linearized": True, "granularity": "task"})
    found = 0.3 - module.merged.coefficients.detach()
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert module.describe()["objective"] == objective


def test_the_individual_models_are_those_before_any_transform(files) -> None:
    def largest(name, values):
        threshold = values.abs().flatten().sort(descending=True).values[max(values.numel() // 2, 1) - 1]
        return torch.where(values.abs() >= threshold, values, 0)

    expected, _ = plain_gradient(files, "features", transform=largest)
    module = learned(files, objective=Features(), transform=Trim(0.5, scope="tensor"))
    torch.testing.assert_close(0.3 - module.merged.coefficients.detach(), expected, rtol=1e-9, atol=1e-11)
    assert module.describe()["objective"] == "Features()"


def test_one_vector_is_read_alone_and_exactly(files) -> None:
    module = learned(files, steps=0)
    for row, path in enumerate(files):
        vector = TaskVector.load(path)
        found = module.individuals.parameters(row)
        for name, own in module.network.named_parameters():
            assert torch.equal(found[name], own + vector[name])


@pytest.mark.parametrize(
    ("parts", "merge"),
    [(["TSVDirections"], tsv_m()), ([{"Departures": {"merge": {"ties": {"density": 0.3}}}}], ties(0.3))],
)
def test_a_fit_starts_from_any_merge_and_acts_on_its_parts(files, parts, merge) -> None:
    before = learned(files, steps=0, parts=parts, init=1.0, objective="expert")
    rows = TaskVectors([TaskVector.load(path) for path in files])
    expected = merge(rows).single()
    for name, value in before.merged.merged_parameters(tangent=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
    module = learned(files, steps=1, parts=parts, init=1.0, objective="expert")
    assert not torch.equal(module.merged.coefficients, before.merged.coefficients)
    own = {n: v.detach() + TaskVector.load(files[1])[n] for n, v in module.network.named_parameters()}
    for name, value in module.individuals.parameters(1).items():
        torch.testing.assert_close(value, own[name])


@pytest.mark.parametrize("linearized", [False, True])
def test_a_task_without_a_vector_has_nothing_to_be_compared_with(files, linearized, own_cache) -> None:
    with pytest.raises(
        ConfigurationError, match=r"objective Expert\(.*\): expected one vector of every task .* got none of c\. Leave"
    ):
        learned(files[:2], objective="expert", linearized=linearized, granularity="task")


def test_a_task_of_two_vectors_has_no_individual_model(files, tmp_path) -> None:
    both = TaskVector(dict(TaskVector.load(files[2])), ["c", "a"])
    both.save(tmp_path / "both.safetensors")
    with pytest.raises(ConfigurationError, match=r"expected one vector of every task .* got several of a\."):
        learned([*files[:2], str(tmp_path / "both.safetensors")], objective="features")


def test_linearised_vectors_may_lack_parameters_and_data_need_not_say_what_is_adapted(files, tmp_path, own_cache):
    paths = []
    for task, path in zip(TASKS, files, strict=True):
        vector = {name: value for name, value in TaskVector.load(path).items() if not name.startswith("blocks.1")}
        TaskVector(vector, task).save(tmp_path / f"{task}.safetensors")
        paths.append(str(tmp_path / f"{task}.safetensors"))
    known = learned(paths, linearized=True, granularity="task")
    assert known._linear
    data = InOrder()
    del data.adapted_tasks
    passes = learned(paths, data, linearized=True, granularity="task")
    assert not passes._linear
    assert (passes.merged.coefficients - 0.3).abs().max() > 1e-3
    torch.testing.assert_close(known.merged.coefficients, passes.merged.coefficients, rtol=1e-9, atol=1e-11)
