"""Fisher information, Gram matrices and the two weighted means against their definitions, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.evaluation.statistics import collect_fisher, collect_gram
from lit_merge.models import load_clip
from lit_merge.transforms.weighted import FisherMean, RegMean
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.statistics import write_statistics

BASE = "0123456789abcdef"
TASKS = ("digits", "letters", "signs")


class Attending(nn.Module):
    """``[B, 3, 4]``, three tokens, -> logits ``[B, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        self.outer = nn.Linear(4, 5, dtype=torch.float64)

    def forward(self, tokens):
        return self.outer(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


@pytest.fixture(params=["mlp", "attention"])
def network(request):
    """A module and eight inputs with labels in [0, 5)."""
    torch.manual_seed(0)
    if request.param == "mlp":
        layers = nn.Linear(12, 6, dtype=torch.float64), nn.Tanh(), nn.Linear(6, 5, dtype=torch.float64)
        module = nn.Sequential(nn.Flatten(), *layers)
    else:
        module = Attending()
    return module, torch.randn(8, 3, 4, dtype=torch.float64) * 2, torch.randint(5, (8,))


def squares(module, image):
    """``(∂ log p(y|x) / ∂θ)²`` of one image, name -> ``[C, *shape]``, and ``p(y|x)``, ``[C]``."""
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def log_probabilities(values):
        return functional_call(module, values, (image[None],)).log_softmax(-1)[0]

    with sdpa_kernel(SDPBackend.MATH):
        jacobian = jacrev(log_probabilities)(parameters)
    return {name: value**2 for name, value in jacobian.items()}, log_probabilities(parameters).exp()


@pytest.mark.parametrize("labels", ["expected", "sampled", "true"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_fisher_is_the_mean_squared_gradient(labels, batch_size, network) -> None:
    module, images, targets = network
    expected = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    generator = torch.Generator().manual_seed(7)
    for image, target in zip(images, targets, strict=True):
        squared, probabilities = squares(module, image)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        weights = {
            "expected": probabilities,
            "sampled": F.one_hot(drawn[0], 5).double(),
            "true": F.one_hot(target, 5).double(),
        }[labels]
        for name, square in squared.items():
            expected[name] += torch.tensordot(weights, square, 1) / len(images)
    loader = list(zip(images.split(batch_size), targets.split(batch_size), strict=True))
    fisher = collect_fisher(module, loader, labels=labels, seed=7)
    assert list(fisher) == list(expected)
    for name in expected:
        torch.testing.assert_close(fisher[name], expected[name], rtol=1e-9, atol=1e-14)
        assert not fisher[name].requires_grad


def test_fisher_of_a_linear_softmax_model_has_a_closed_form() -> None:
    torch.manual_seed(0)
    encoder, head = nn.Linear(4, 3, dtype=torch.float64), nn.Identity()
    images = torch.randn(10, 4, dtype=torch.float64)
    p = encoder(images).detach().softmax(-1)
    variance = p * (1 - p)  # of the indicator of a class
    fisher = collect_fisher(encoder, [images], head)
    torch.testing.assert_close(fisher["weight"], variance.T @ images**2 / 10, rtol=1e-12, atol=0)
    torch.testing.assert_close(fisher["bias"], variance.mean(0), rtol=1e-12, atol=0)


def test_gram_matrices_of_a_vision_transformer(clip_config, clip_weights) -> None:
    tower = load_clip(clip_config, clip_weights).visual.double().eval()
    torch.manual_seed(1)
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    seen = {}
    hooks = [
        part.register_forward_hook(lambda part, given, result, name=name: seen.update({name: (given[0], result)}))
        for name, part in tower.named_modules()
    ]
    features = tower(images).detach()
    for hook in hooks:
        hook.remove()
    grams = collect_gram(tower, [images[:2], images[2:]], convolutions=True)
    blocks = [f"transformer.resblocks.{index}" for index in range(2)]
    kinds = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert set(grams) == {"conv1.weight", "proj.T", *(f"{block}.{kind}" for block in blocks for kind in kinds)}

    def check(name, rows):
        rows = rows.detach().reshape(-1, rows.shape[-1])
        expected = sum(torch.outer(row, row) for row in rows) / len(rows)
        torch.testing.assert_close(grams[name], expected, rtol=1e-9, atol=1e-12)

    for block in blocks:
        check(f"{block}.mlp.c_fc.weight", seen[f"{block}.mlp.c_fc"][0])
        check(f"{block}.mlp.c_proj.weight", seen[f"{block}.mlp.c_proj"][0])
        normalised = seen[f"{block}.ln_1"][1]  # [batch, tokens, width]
        check(f"{block}.attn.in_proj_weight", normalised)
        attention = dict(tower.named_modules())[f"{block}.attn"]
        projected = normalised @ attention.in_proj_weight.T + attention.in_proj_bias
        heads = attention.num_heads
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(3, -1))
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        check(f"{block}.attn.out_proj.weight", attended.transpose(1, 2).flatten(2))
    pooled = seen["ln_post"][1][:, 0]
    torch.testing.assert_close(pooled @ tower.proj, features)
    check("proj.T", pooled)
    patches = images.unflatten(3, (2, 16)).unflatten(2, (2, 16)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    check("conv1.weight", patches)


@pytest.fixture
def store(tmp_path):
    """``store(kind, {task: tensors})``: their files, task -> path."""

    def write(kind, tensors):
        paths = {task: str(tmp_path / f"{task}-{kind}.safetensors") for task in tensors}
        for task, path in paths.items():
            write_statistics(path, kind, tensors[task], task, BASE)
        return paths

    return write


def stacked(rows):
    return TaskVectors([TaskVector(row, task) for task, row in zip(TASKS, rows, strict=False)])


def random_rows(seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in TASKS
    ]


@pytest.mark.parametrize("normalise", [None, "norm", "mean"])
@pytest.mark.parametrize("coefficients", [None, (1.0, 0.0, 2.5), {"signs": 2.5, "digits": 1.0, "letters": 0.0}])
def test_fisher_mean_is_the_weighted_mean_of_the_weights(normalise, coefficients, store) -> None:
    start, *_ = random_rows(3, w=(3, 4), b=(5,))
    tuned = random_rows(4, w=(3, 4), b=(5,))
    fishers = random_rows(5, w=(3, 4), b=(5,))
    fishers = [{name: row[name] ** 2 * scale for name in row} for scale, row in zip((1, 0.1, 10), fishers, strict=True)]
    fishers[1]["w"][0] = fishers[0]["w"][0] = fishers[2]["w"][0] = 0.0
    factors = (1.0, 1.0, 1.0) if coefficients is None else (1.0, 0.0, 2.5)
    floor = 1e-4
    vectors = stacked([{name: row[name] - start[name] for name in row} for row in tuned])
    merged = FisherMean(store("fisher", dict(zip(TASKS, fishers, strict=True))), coefficients, floor, normalise)(
        vectors
    )
    scales = []
    for fisher in fishers:
        every = np.concatenate([value.numpy().ravel() for value in fisher.values()])
        scales.append({None: 1.0, "norm": np.sqrt((every**2).mean()), "mean": every.mean()}[normalise])
    for name in start:
        for entry in np.ndindex(*start[name].shape):
            weights = [
                factor * max(float(fisher[name][entry]) / scale, floor)
                for factor, fisher, scale in zip(factors, fishers, scales, strict=True)
            ]
            theta = sum(weight * float(row[name][entry]) for weight, row in zip(weights, tuned, strict=True))
            expected = theta / sum(weights) - float(start[name][entry])
            assert float(merged[name][0][entry]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_fisher_mean_with_equal_fishers_is_the_mean(store) -> None:
    shapes = {"w": (3, 4), "scalar": (), "empty": (0, 2)}
    rows, (fisher, *_) = random_rows(**shapes), random_rows(1, **shapes)
    fisher = {name: value**2 for name, value in fisher.items()}
    for given in (fisher, {name: torch.zeros_like(value) for name, value in fisher.items()}):
        merged = FisherMean(store("fisher", dict.fromkeys(TASKS, given)))(stacked(rows))
        for name in fisher:
            mean = sum(row[name] for row in rows) / 3
            torch.testing.assert_close(merged[name][0], mean, rtol=1e-12, atol=1e-15)
    merged = FisherMean(store("fisher", dict.fromkeys(TASKS, given)), floor=0.0)(stacked(rows))
    torch.testing.assert_close(merged["w"][0], sum(row["w"] for row in rows) / 3)


def regressions(rows=20, width=6, outputs=3, seed=0):
    generator = np.random.default_rng(seed)
    data = [(generator.normal(size=(rows, width)), generator.normal(size=(rows, outputs))) for _ in TASKS]
    return data, [np.linalg.lstsq(x, y, rcond=None)[0] for x, y in data]


def as_tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def test_regmean_of_linear_models_is_least_squares_on_the_pooled_data(store) -> None:
    data, solutions = regressions()
    pooled = np.linalg.lstsq(np.vstack([x for x, _ in data]), np.vstack([y for _, y in data]), rcond=None)[0]
    grams = {}
    for task, (x, _), solution in zip(TASKS, data, solutions, strict=True):
        layer = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        layer.weight.data = as_tensor(solution.T)
        grams[task] = collect_gram(layer, [as_tensor(x[:7]), as_tensor(x[7:])])
    vectors = stacked([{"weight": as_tensor(solution.T)} for solution in solutions])
    merged = RegMean(store("gram", grams), off_diagonal=1.0)(vectors)
    torch.testing.assert_close(merged["weight"][0], as_tensor(pooled.T), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.4, 0.9, 1.0])
def test_regmean_is_its_formula_however_the_weight_is_used(off_diagonal, store) -> None:
    data, _ = regressions(width=8, seed=1)
    start, *_ = random_rows(3, linear=(3, 8), matmul=(8, 3), conv=(3, 2, 2, 2), square=(8, 8), bias=(3,))
    tuned = random_rows(4, linear=(3, 8), matmul=(8, 3), conv=(3, 2, 2, 2), square=(8, 8), bias=(3,))
    grams = [x.T @ x / len(x) for x, _ in data]
    files = {
        task: {key: as_tensor(gram) for key in ("linear", "matmul.T", "conv", "square.T")}
        for task, gram in zip(TASKS, grams, strict=True)
    }
    vectors = stacked([{name: row[name] - start[name] for name in row} for row in tuned])
    merged = RegMean(store("gram", files), off_diagonal)(vectors)
    reduced = [off_diagonal * gram + (1 - off_diagonal) * np.diag(np.diag(gram)) for gram in grams]
    inverse = np.linalg.inv(sum(reduced))

    def regression(matrices):  # [in, out] each
        return inverse @ sum(gram @ matrix.numpy() for gram, matrix in zip(reduced, matrices, strict=True))

    expected = {
        "linear": regression([row["linear"].T for row in tuned]).T,
        "matmul": regression([row["matmul"] for row in tuned]),
        "conv": regression([row["conv"].flatten(1).T for row in tuned]).T.reshape(3, 2, 2, 2),
        "square": regression([row["square"] for row in tuned]),
        "bias": sum(row["bias"].numpy() for row in tuned) / 3,
    }
    for name, value in expected.items():
        torch.testing.assert_close(merged[name][0] + start[name], as_tensor(value), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_inputs_do_not_determine_stays_at_the_mean(dtype, store) -> None:
    data, _ = regressions(width=5, seed=2)
    inputs = []
    for x, _ in data:  # one input is always zero, another the double of a third, and one is tiny but independent
        x = np.hstack([x[:, :1], np.zeros((20, 1)), x[:, 1:], 2 * x[:, 2:3]])
        x[:, 0] *= 1e-4
        inputs.append(x)
    rows = random_rows(5, weight=(3, 7))
    grams = {task: {"weight": as_tensor(x.T @ x / 20).to(dtype)} for task, x in zip(TASKS, inputs, strict=True)}
    merged = RegMean(store("gram", grams), 1.0)(stacked(rows))["weight"][0].numpy()
    mean = sum(row["weight"].numpy() for row in rows) / 3
    targets = np.vstack([x @ (row["weight"].numpy() - mean).T for x, row in zip(inputs, rows, strict=True)])
    every = np.vstack(inputs)
    scale = np.sqrt((every**2).mean(0))
    scale[1] = 1.0
    nearest = mean + (np.linalg.lstsq(every / scale, targets, rcond=1e-9)[0] / scale[:, None]).T
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(merged[:, 1], mean[:, 1], rtol=1e-12)
    np.testing.assert_allclose(merged, nearest, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalise", [None, "norm", "mean"])
def test_a_task_without_any_information_has_next_to_no_weight(normalise, store) -> None:
    rows, one = random_rows(w=(3, 4)), torch.ones(3, 4, dtype=torch.float64)
    files = store("fisher", {"digits": {"w": 0 * one}, "letters": {"w": one}, "signs": {"w": one}})
    merged = FisherMean(files, normalise=normalise)(stacked(rows))["w"][0]
    torch.testing.assert_close(merged, (rows[1]["w"] + rows[2]["w"]) / 2, rtol=1e-4, atol=1e-5)
