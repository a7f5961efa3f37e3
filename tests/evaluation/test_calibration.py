"""RegMean++ and FeatCal against sums written plainly in float64, and what must hold whatever the network."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lit_merge.commands.merge import merge
from lit_merge.data import MultiTaskDataModule, Task, TensorExamples
from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.calibration import FeatCal, RegMeanPlusPlus
from lit_merge.evaluation.calibration.activations import Activations
from lit_merge.evaluation.calibration.blocks import Blocks
from lit_merge.evaluation.calibration.walk import Walk
from lit_merge.evaluation.statistics import collect_gram
from lit_merge.models import ModuleNetwork
from lit_merge.transforms import Mean, RegMean, task_arithmetic
from lit_merge.vectors import LazyTensors, TaskVector, TaskVectors
from lit_merge.vectors.statistics import write_statistics

D, TASKS, EXAMPLES, TOKENS = 6, ("a", "b", "c"), 5, 5
LINEAR = ("q_proj", "k_proj", "v_proj", "out", "fc")


class Block(nn.Module):
    """Attention of one head and a layer, each added to what comes in."""

    def __init__(self, packed):
        super().__init__()
        self.norm = nn.LayerNorm(D)
        if packed:
            self.attn = nn.MultiheadAttention(D, 1, batch_first=True)
        else:
            for name in LINEAR[:4]:
                self.add_module(name, nn.Linear(D, D))
        self.fc = nn.Linear(D, D)

    def forward(self, hidden):
        z = self.norm(hidden)
        if hasattr(self, "attn"):
            attended = self.attn(z, z, z, need_weights=False)[0]
        else:
            attended = self.out(F.scaled_dot_product_attention(self.q_proj(z), self.k_proj(z), self.v_proj(z)))
        hidden = hidden + attended
        return hidden + torch.tanh(self.fc(hidden))


class Tower(nn.Module):
    """Tokens to the features of the first one."""

    def __init__(self, packed=False, blocks=2):
        super().__init__()
        self.stem, self.ln_post = nn.Linear(3, D), nn.LayerNorm(D)
        self.layers = nn.ModuleList(Block(packed) for _ in range(blocks))

    def forward(self, tokens):
        hidden = self.stem(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.ln_post(hidden)[:, 0]


def drawn(*shape, seed, scale=0.3):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(module):
    with torch.no_grad():
        for index, value in enumerate(module.parameters()):
            value.copy_(drawn(*value.shape, seed=index) + (value.ndim == 1) * 0.5)
    return module.double().eval()


def vectors_of(module, around=True, same=False):
    rows = []
    for task, name in enumerate(TASKS):
        moved = {
            key: drawn(*value.shape, seed=100 + 50 * (0 if same else task) + index, scale=0.2)
            * (around or key.startswith("layers"))
            for index, (key, value) in enumerate(module.named_parameters())
        }
        rows.append(TaskVector(moved, name))
    return TaskVectors(rows)


@pytest.fixture
def tower():
    return randomised(Tower().double())


@pytest.fixture
def given():
    return {
        task: [(drawn(EXAMPLES, TOKENS, 3, seed=7 + 2 * index + half, scale=1.0),) for half in range(2)]
        for index, task in enumerate(TASKS)
    }


# By hand


def passed(p, x):
    """A block's output, what its linear layers get, and its normalised input."""

    def linear(name, value):
        return value @ p[f"{name}.weight"].mT + p[f"{name}.bias"]

    z = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    n = z * p["norm.weight"] + p["norm.bias"]
    scores = linear("q_proj", n) @ linear("k_proj", n).mT / D**0.5
    attended = scores.softmax(-1) @ linear("v_proj", n)
    middle = x + linear("out", attended)
    inputs = dict(zip(LINEAR, (n, n, n, attended, middle), strict=True))
    return middle + torch.tanh(linear("fc", middle)), inputs, z


def models(module, vectors, start):
    own = {name: value.detach() for name, value in module.named_parameters()}
    sums = [{name: own[name] + tau[row] for name, tau in vectors.items()} for row in range(len(TASKS))]
    return own, sums, {name: own[name] + tau[0] for name, tau in start.items()}


def block_of(model, index):
    head = f"layers.{index}."
    return {name.removeprefix(head): value for name, value in model.items() if name.startswith(head)}


def embedded(model, batches):
    return torch.cat([batch @ model["stem.weight"].mT + model["stem.bias"] for (batch,) in batches])


def regmean_plus_plus(module, vectors, start, given, alpha):
    own, tuned, merged = models(module, vectors, start)
    hidden = [embedded(merged, given[task]) for task in TASKS]
    found = {}
    for index in range(2):
        blocks = [block_of(one, index) for one in tuned]
        solved = {name: torch.stack([one[name] for one in blocks]).mean(0) for name in blocks[0]}
        for name in LINEAR:
            left, right = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
            for block, x in zip(blocks, hidden, strict=True):
                rows = passed(block, x)[1][name].reshape(-1, D)
                gram = sum(torch.outer(row, row) for row in rows) / len(rows)
                gram = torch.where(torch.eye(D, dtype=torch.bool), gram, alpha * gram)
                left, right = left + gram, right + gram @ block[f"{name}.weight"].mT
            solved[f"{name}.weight"] = (torch.linalg.inv(left) @ right).mT
        hidden = [passed(solved, x)[0] for x in hidden]
        found |= {f"layers.{index}.{name}": value - own[f"layers.{index}.{name}"] for name, value in solved.items()}
    return found


def featcal(module, vectors, start, given, s):
    own, tuned, merged = models(module, vectors, start)
    students = [embedded(merged, given[task]) for task in TASKS]
    experts = [embedded(one, given[task]) for one, task in zip(tuned, TASKS, strict=True)]
    eye, found = torch.eye(D, dtype=torch.float64), {}
    for index in range(2):
        blocks = [block_of(one, index) for one in tuned]
        base, before = block_of(own, index), block_of(merged, index)
        anchors = {name: base[name] + s.anchor * (before[name] - base[name]) for name in base}
        first = torch.ones(TOKENS, dtype=torch.float64)
        if index == 1:
            first[1:] = s.unused_tokens
        ours, theirs = (
            [passed(before, x) for x in students],
            [passed(one, x) for one, x in zip(blocks, experts, strict=True)],
        )
        solved = {}
        for name in LINEAR:
            w = torch.ones(TOKENS) if name in ("k_proj", "v_proj") else first
            w = w.repeat(len(students[0])).double()
            parts = []
            for block, (_, mine, _), (_, other, _) in zip(blocks, ours, theirs, strict=True):
                x = mine[name].reshape(-1, D)
                y = (1 - s.interpolation) * x + s.interpolation * other[name].reshape(-1, D)
                gram, cross = (x * w[:, None]).mT @ x / w.sum(), (x * w[:, None]).mT @ y / w.sum()
                parts.append((1 / gram.norm(), gram, cross, w @ x / w.sum(), w @ y / w.sum(), block))
            left = sum(k * gram for k, gram, *_ in parts) + s.ridge * eye
            right = sum(k * cross @ one[f"{name}.weight"].mT for k, _, cross, _, _, one in parts)
            weight = torch.linalg.solve(left, right + s.ridge * anchors[f"{name}.weight"].mT).mT
            shift = sum(
                k * (one[f"{name}.bias"] + one[f"{name}.weight"] @ y - weight @ x) for k, _, _, x, y, one in parts
            )
            scale = sum(k for k, *_ in parts)
            solved[f"{name}.weight"] = weight
            solved[f"{name}.bias"] = (shift + s.ridge * anchors[f"{name}.bias"]) / (scale + s.ridge)
        w = first.repeat(len(students[0]))
        for channel in range(D):
            system, target = torch.eye(2, dtype=torch.float64) * s.ridge, torch.zeros(2, dtype=torch.float64)
            target += s.ridge * torch.stack([anchors["norm.weight"][channel], anchors["norm.bias"][channel]])
            for block, (_, _, z) in zip(blocks, ours, strict=True):
                one = z.reshape(-1, D)[:, channel]
                design = torch.stack([one, torch.ones_like(one)], 1)
                moment = (design * w[:, None]).mT @ design / w.sum()
                system = system + moment
                target = target + moment @ torch.stack([block["norm.weight"][channel], block["norm.bias"][channel]])
            gamma, beta = torch.linalg.solve(system, target)
            solved.setdefault("norm.weight", torch.zeros(D, dtype=torch.float64))[channel] = gamma
            solved.setdefault("norm.bias", torch.zeros(D, dtype=torch.float64))[channel] = beta
        experts, students = [one[0] for one in theirs], [passed(solved, x)[0] for x in students]
        found |= {f"layers.{index}.{name}": value - base[name] for name, value in solved.items()}
    return found


def agree(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=tolerance, atol=tolerance)


def test_regmean_plus_plus_by_hand(tower, given):
    vectors = vectors_of(tower)
    start = Mean()(vectors)
    found = RegMeanPlusPlus(off_diagonal=0.8).calibrate(tower, vectors, start, given)
    agree(found, regmean_plus_plus(tower, vectors, start, given, 0.8))


@pytest.mark.parametrize("settings", [{}, {"ridge": 0.5, "anchor": 1.3, "interpolation": 0.9, "unused_tokens": 1.0}])
def test_featcal_by_hand(settings, tower, given):
    vectors = vectors_of(tower)
    start = task_arithmetic(0.4)(vectors)
    rule = FeatCal(**settings)
    agree(rule.calibrate(tower, vectors, start, given), featcal(tower, vectors, start, given, rule))


# Laws


def test_the_first_block_is_regmeans(tower, given, tmp_path):
    vectors = vectors_of(tower, around=False)
    own = {name: value.detach().clone() for name, value in tower.named_parameters()}
    files = {}
    for row, task in enumerate(TASKS):
        tower.load_state_dict({name: own[name] + vectors[name][row] for name in own})
        files[task] = str(tmp_path / f"{task}.safetensors")
        write_statistics(files[task], "gram", collect_gram(tower, [batch for (batch,) in given[task]]), task)
    tower.load_state_dict(own)
    expected = RegMean(files, off_diagonal=0.95)(vectors)
    found = RegMeanPlusPlus().calibrate(tower, vectors, Mean()(vectors), given)
    first = {name: value for name, value in found.items() if name.startswith("layers.0.")}
    agree(first, {name: expected[name][0] for name in first})
    assert any((found[name] - expected[name][0]).abs().max() > 1e-3 for name in found.keys() - first.keys())


@pytest.mark.parametrize("rule", [RegMeanPlusPlus(), FeatCal(anchor=1.0), FeatCal(anchor=1.0, interpolation=1.0)])
def test_equal_models_stay(rule, tower, given):
    vectors = vectors_of(tower, same=True)
    found = rule.calibrate(tower, vectors, Mean()(vectors), given)
    agree(found, {name: vectors[name][0] for name in found})
    assert {name for name in vectors if name.startswith("layers")} == found.keys()


def test_one_task_is_that_task(tower, given):
    vectors = vectors_of(tower).select([1])
    found = RegMeanPlusPlus().calibrate(tower, vectors, vectors, given)
    agree(found, {name: vectors[name][0] for name in found})


@pytest.mark.parametrize("rule", [RegMeanPlusPlus, FeatCal])
def test_on_the_disk_it_is_the_same_and_nothing_is_left(rule, tower, given, tmp_path):
    vectors, before = vectors_of(tower), {name: value.clone() for name, value in tower.state_dict().items()}
    start = Mean()(vectors)
    expected = rule().calibrate(tower.train(), vectors, start, given)
    found = rule(memory=0.0).calibrate(tower, vectors, start, given, tmp_path)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not list(tmp_path.iterdir())
    assert tower.layers[0].training
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    assert all("forward" not in vars(part) for part in tower.modules())
    store = Activations(tmp_path, 100)
    first = store.keep((torch.ones(20), None))
    second = store.keep([torch.ones(20), torch.tensor(3)])
    assert (store.held, store.on_disk) == (88, 80)
    assert torch.equal(first[0], second[0])
    del first
    assert store.held == 8


def test_packed_projections_are_the_separate_ones(tower, given):
    names = {"out.": "attn.out_proj."}
    packed = randomised(Tower(packed=True).double())

    def renamed(tensors):
        found = {}
        for name, value in tensors.items():
            for one, other in names.items():
                name = name.replace(one, other)
            if ".k_proj." not in name and ".v_proj." not in name:
                parts = (
                    [tensors[name.replace("q_proj", other)] for other in LINEAR[:3]] if "q_proj" in name else [value]
                )
                found[name.replace("q_proj.", "attn.in_proj_")] = torch.cat(parts)
        return found

    packed.load_state_dict(renamed(tower.state_dict()))
    vectors = vectors_of(tower)
    rows = [
        TaskVector(renamed({name: tau[row] for name, tau in vectors.items()}), task) for row, task in enumerate(TASKS)
    ]
    for rule in (FeatCal(), RegMeanPlusPlus()):
        expected = rule.calibrate(tower, vectors, Mean()(vectors), given)
        other = TaskVectors(rows)
        agree(rule.calibrate(packed, other, Mean()(other), given), renamed(expected))


class Around(Tower):
    """With a projection before the blocks, and a table for all of them."""

    def __init__(self):
        super().__init__()
        self.proj, self.table = nn.Linear(D, D), nn.Parameter(torch.zeros(D))

    def forward(self, tokens):
        hidden = self.proj(self.stem(tokens))
        for layer in self.layers:
            hidden = layer(hidden + self.table)
        return self.ln_post(hidden)[:, 0]


def test_what_is_around_the_blocks_is_the_models_own_too(given):
    module = randomised(Around().double())
    vectors = vectors_of(module)
    start, store, passes = Mean()(vectors), Activations(), []
    walk = Walk(module, vectors, start, {task: [store.keep(one) for one in given[task]] for task in TASKS}, store)
    own = {name: value.detach() + start[name][0] for name, value in module.named_parameters()}
    for layer in module.layers:
        layer.register_forward_hook(lambda layer, given, output: passes.append(output))
    torch.func.functional_call(module, own, given["a"][0])
    expected = passes.copy()
    for index in range(2):
        with walk.placed(index, walk.merged_weights(index, walk.start(index))):
            output = walk.run(index, "a", 0)
        walk.record(index, "a", 0, output)
        torch.testing.assert_close(output, expected[index], rtol=1e-6, atol=1e-7)
    before = {"table", "stem.weight", "stem.bias", "proj.weight", "proj.bias"}
    assert [set(walk.blocks.around(index)) for index in range(2)] == [before, {"table"}]
    assert not any(value.grad is not None for value in module.parameters())


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_language_models_go_through_their_blocks(kind):
    transformers = pytest.importorskip("transformers")
    from lit_merge.models.language.modules import CausalModule, EncoderDecoderModule

    sizes = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "t5":
        config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, **sizes)
        module = EncoderDecoderModule(transformers.T5ForConditionalGeneration(config))
    else:
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, **sizes)
        module = CausalModule(transformers.GPT2LMHeadModel(config))
    module = module.double().eval()
    ids = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2:, 4:] = 0
    batch = (ids, mask, ids[:, :3] if kind == "t5" else torch.full((4, 1), 2))
    vectors = TaskVectors(
        [
            TaskVector(
                {name: drawn(*p.shape, seed=i, scale=0.05) for i, (name, p) in enumerate(module.named_parameters())}, t
            )
            for t in "ab"
        ]
    )
    given = {"a": [batch], "b": [batch]}
    found = FeatCal(anchor=1.0).calibrate(module, vectors, Mean()(vectors), given)
    agree(found, {name: vectors[name][0] for name in found})
    inside = {name for name in vectors if ".block." in name or ".h." in name}
    assert found.keys() == {name for name in inside if "relative_attention" not in name}
    order = Blocks(module, batch).paths
    assert order == (
        ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
        if kind == "t5"
        else ("transformer.h.0", "transformer.h.1")
    )


def test_which_tokens_the_features_depend_on(tower, given):
    (batch,) = given["a"][0]
    blocks = Blocks(tower, (batch,))
    hidden = tower.layers[0](tower.stem(batch))
    used = blocks.used_tokens((batch,), {"layers": hidden}, tower.layers[1](hidden))
    assert torch.equal(used, torch.arange(TOKENS).eq(0).expand(EXAMPLES, -1))


# Through the command


class Noise(Task):
    """Tokens around a mean of their own."""

    classes = ("x", "y")

    def __init__(self, seed):
        self.seed = seed

    def split(self, split, preprocessing, augmentation_seed=None):
        return TensorExamples((drawn(12, TOKENS, 3, seed=self.seed, scale=1.0).float(),), torch.zeros(12).long())


@pytest.fixture
def merged(tmp_path):
    network = ModuleNetwork(randomised(Tower().double()).float(), preprocessing=object(), name="tower")
    vectors, paths = vectors_of(network.module), []
    for row, task in enumerate(TASKS):
        paths.append(str(tmp_path / f"{task}.safetensors"))
        TaskVector({name: tau[row].float() for name, tau in vectors.items()}, task).save(paths[-1])
    data = MultiTaskDataModule(sources={task: Noise(seed) for seed, task in enumerate(TASKS)})

    def run(name, **settings):
        return merge(paths, str(tmp_path / name), network=network, data=data, progress=False, **settings)

    return run, network, paths, data


def test_a_merge_is_calibrated_and_says_so(merged, tmp_path, capsys):
    run, network, paths, data = merged
    rule = FeatCal(images=10, batch_size=4, memory=0.0)
    settings = {"recipe": "task_arithmetic", "settings": {"coefficient": 0.4}, "calibrate": rule}
    line = "blocks calibrated by FeatCal on at most 10 unlabelled train inputs of every task (calibrate)"
    dry = run("dry.safetensors", dry_run=True, **settings)
    assert line in str(dry.plan)
    result = run("weights.safetensors", **settings)
    assert line in result.describe()
    assert line in (tmp_path / "weights.md").read_text()
    run("vector.safetensors", kind="task_vector", **settings)
    vector = TaskVector.load(tmp_path / "vector.safetensors")
    entry = json.loads(vector.metadata["calibration"])
    assert entry["class_path"] == "lit_merge.evaluation.calibration.FeatCal"
    assert (entry["inputs"], entry["labels_read"]) == (dict.fromkeys(TASKS, 10), False)
    assert (entry["init_args"]["split"], vector.tasks) == ("train", TASKS)
    stored = TaskVectors([TaskVector.load(path) for path in paths])
    start = task_arithmetic(0.4)(stored)
    found, seen = rule.of(network, stored, start, data)
    assert seen == entry["inputs"]
    weights, own = load_file(tmp_path / "weights.safetensors"), dict(network.module.named_parameters())
    for name in own:
        expected = found.get(name, start[name][0])
        torch.testing.assert_close(vector[name], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(weights[name], own[name].detach() + expected, rtol=0, atol=1e-6)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_dir()) == []
    run("test.safetensors", recipe="weight_average", calibrate=RegMeanPlusPlus(images=2, split="test"))
    assert "measured on what it has seen" in (tmp_path / "test.md").read_text()
    assert "calibration" in LazyTensors(tmp_path / "test.safetensors").metadata


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"linearized": True}, "calibrate: expected ordinary weights, got a linearised merge, whose layers"),
        ({"recipe": "tall_masks"}, "calibrate: expected one merged vector, got 3. Reduce them first"),
        ({"tasks": ["a", "b", "b"]}, "calibrate: expected vectors of different tasks, got 'b' for several"),
        ({"tasks": ["a", "b", "d"]}, "calibrate: expected inputs of the tasks a, b, d, got none of d .data: a, b, c"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(settings, message, merged, tmp_path):
    run, *_ = merged
    with pytest.raises(ConfigurationError, match=message):
        run("no.safetensors", **{"recipe": "weight_average", "calibrate": FeatCal(images=2), **settings})
    assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (FeatCal, {"images": 0}, "calibrate.images: expected a whole number of at least 1"),
        (FeatCal, {"batch_size": 0}, "calibrate.batch_size: expected a whole number of at least 1"),
        (FeatCal, {"split": "all"}, "calibrate.split: expected train or val or test, got 'all'"),
        (FeatCal, {"memory": -1.0}, "calibrate.memory: expected"),
        (FeatCal, {"ridge": 0.0}, "FeatCal.ridge: expected a number above 0"),
        (FeatCal, {"unused_tokens": 1.5}, "FeatCal.unused_tokens: expected"),
        (FeatCal, {"interpolation": 2.0}, "FeatCal.interpolation: expected"),
        (FeatCal, {"anchor": float("nan")}, "FeatCal.anchor: expected"),
        (RegMeanPlusPlus, {"off_diagonal": 1.1}, "RegMeanPlusPlus.off_diagonal: expected"),
    ],
)
def test_a_setting_out_of_range_is_refused(rule, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        rule(**settings)


class Again(nn.Module):
    """Its only block runs twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x):
        return self.layers[0](self.layers[0](x))


class Skipping(Again):
    """The last block takes what the first one gives."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first) + 2 * first)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(3, 3), "expected a network with numbered blocks, got Linear without. Merge it by recipe regmean"),
        (Again(), "expected blocks that run once in a pass, got layers.0, which runs again"),
        (Skipping(), "expected blocks that take what the one before them gives, got layers.2, which takes something"),
    ],
)
def test_a_network_without_such_blocks_is_refused(module, message):
    vectors = TaskVectors([TaskVector({name: value.detach() for name, value in module.named_parameters()}, "a")])
    with pytest.raises(ConfigurationError, match=message):
        RegMeanPlusPlus().calibrate(module, vectors, vectors, {"a": [(torch.randn(2, 3),)]})
    with pytest.raises(ConfigurationError, match="expected inputs of every task, got none of a"):
        RegMeanPlusPlus().calibrate(module, vectors, vectors, {"a": []})
    two = TaskVectors([TaskVector({name: p.detach() for name, p in module.named_parameters()}, task) for task in "ab"])
    with pytest.raises(ConfigurationError, match="expected one vector"):
        RegMeanPlusPlus().calibrate(module, two, two, {})


class Some(nn.Module):
    """A layer on those rows that its own scale lets through."""

    def __init__(self):
        super().__init__()
        self.gate, self.fc = nn.Parameter(torch.ones(())), nn.Linear(3, 3)

    def forward(self, x):
        return x + self.fc(x[: max(1, round(float(self.gate)))]).sum()


def test_other_rows_in_the_individual_model_are_refused():
    module = nn.Sequential()
    module.add_module("layers", nn.Sequential(Some()))
    zero = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    vectors = TaskVectors([TaskVector({**zero, "layers.0.gate": torch.tensor(1.0)}, "a")])
    start = task_arithmetic(0.0)(vectors)
    with pytest.raises(
        ConfigurationError, match=r"expected as many rows of input .* got 1 and 2 for layers.0.fc.weight"
    ):
        FeatCal().calibrate(module, vectors, start, {"a": [(torch.randn(4, 3),)]})
