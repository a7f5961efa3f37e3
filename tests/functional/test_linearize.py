"""``linearize`` and ``LinearizedModel`` around the arithmetic: what they touch, refuse, cost and keep.

The arithmetic itself is in ``oracles/test_linearize_oracle.py``.
"""

from __future__ import annotations

import copy
import operator
import pickle
from collections import Counter, namedtuple
from contextlib import nullcontext

import pytest
import torch
from open_clip.model import _build_vision_tower
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lit_merge.errors import ConfigurationError, LitMergeError, StructureMismatchError
from lit_merge.functional import linearize
from lit_merge.models.linearized import LinearizedModel

VIT = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
Pair = namedtuple("Pair", "first second")


def own_parameters(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def draw_tau(module, names=None):
    own = own_parameters(module)
    return {name: torch.randn_like(own[name]).requires_grad_() for name in (own if names is None else names)}


def vit(**settings):
    torch.manual_seed(0)
    return _build_vision_tower(6, {**VIT, **settings})


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def with_tau(module, trainable=None):
    """A LinearizedModel whose τ is random."""
    model = LinearizedModel(module, trainable)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_()
    return model


class Through(nn.Module):
    """A linear layer and what comes behind it."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def one_line(error, kind=LitMergeError):
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    return str(error.value)


# No work for the others


class Operators(TorchDispatchMode):
    """Count what reaches the kernels."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self):
        names = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "mkldnn_convolution")
        return sum(self.counts[name] for name in names)


def operators(evaluate):
    with Operators() as seen:
        evaluate()
    return seen


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        (["4.weight", "4.bias"], 1),
        (["4.bias"], 0),
        (["2.weight"], 2),
        (["2.weight", "4.weight"], 3),
        (["0.bias"], 2),
        (["0.weight", "0.bias"], 3),
        (None, 5),
    ],
)
def test_a_layer_costs_one_product_per_term(names, extra):
    module, x = mlp(), torch.randn(2, 6, 4, dtype=torch.float64)
    tau = draw_tau(module, names)
    assert operators(lambda: module(x)).products == 3
    assert operators(lambda: linearize(module, {}, tau, x)).products == 3 + extra


@pytest.mark.parametrize("multiply", [operator.matmul, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_a_product_with_a_matrix_costs_one_per_term(multiply, shape):
    class Multiply(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return multiply(multiply(x, self.first), self.second)

    module, x = Multiply(), torch.randn(shape)
    for names, extra in ((["second"], 1), (["first"], 2), (["first", "second"], 3)):
        tau = draw_tau(module, names)
        seen = operators(lambda tau=tau: linearize(module, {}, tau, x))
        assert seen.products == 2 + extra
        assert seen.counts["bmm"] == 0


@pytest.mark.parametrize(("names", "extra"), [(["weight"], 1), (["bias"], 0), (["weight", "bias"], 1)])
def test_images_have_no_tangent(names, extra):
    module, images = nn.Conv2d(3, 4, 2), torch.randn(2, 3, 4, 4)
    tau = draw_tau(module, names)
    assert operators(lambda: linearize(module, {}, tau, images)).counts["convolution"] == 1 + extra


@pytest.mark.parametrize(("part", "extra"), [("in_proj", 1 + 4 + 1), ("out_proj", 1)])
def test_attention_costs_one_product_per_term(part, extra):
    module, x = nn.MultiheadAttention(8, 2), torch.randn(3, 2, 8)

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = module

        def forward(self):
            return self.attn(x, x, x, need_weights=False)[0]

    tau = draw_tau(Attend(), [f"attn.{part}{'_' if part == 'in_proj' else '.'}weight"])
    seen = operators(lambda: linearize(Attend(), {}, tau))
    # In front of what has a tangent torch's own fused attention runs, one operator.
    fused = sum(count for name, count in seen.counts.items() if "flash_attention" in name)
    assert (seen.products, fused) == ((4 + extra, 0) if part == "in_proj" else (2 + extra, 1))


def test_a_subset_costs_less_and_an_early_layer_nothing():
    module, images = vit().eval(), torch.randn(2, 3, 16, 16)
    names = list(own_parameters(module))
    attention = [name for name in names if ".attn." in name and "weight" in name]
    last = [name for name in names if "resblocks.1." in name]
    chosen = {"all": names, "attention": attention, "last": last, "proj": ["proj"], "none": []}
    products = {}
    for key, selected in chosen.items():
        tau = draw_tau(module, selected)
        products[key] = operators(lambda tau=tau: linearize(module, {}, tau, images)).products
    assert products["none"] == operators(lambda: module(images)).products
    assert products["proj"] == products["none"] + 1
    assert products["none"] < products["last"] < products["attention"] < products["all"]
    tau = draw_tau(module, last)
    seen = operators(lambda: linearize(module, {}, tau, images))
    assert sum(count for name, count in seen.counts.items() if "flash_attention" in name) == 1


def test_without_any_tangent_the_value_is_exact():
    module, images = vit().eval(), torch.randn(2, 3, 16, 16)
    value, tangent = linearize(module, {}, {}, images)
    torch.testing.assert_close(value, module(images).detach(), rtol=0, atol=1e-6)
    assert value.shape == tangent.shape
    assert not tangent.any()


# What is left alone


def globals_of_torch():
    with forward_ad.dual_level():  # only possible outside of any level
        pass
    with torch.autograd.graph.save_on_cpu():  # only possible where hooks are
        pass
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        len(torch.overrides._get_current_function_mode_stack()),
    )


def fail(x):
    raise KeyError("unrelated")


def attend(x):
    """Through the fall-back, which chooses torch's kernel itself."""
    x = x.view(1, 1, -1, 4)
    return F.scaled_dot_product_attention(x, x, x, enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (torch.tanh, None),
        (attend, None),
        (fail, KeyError),
        (lambda x: (x, x), LitMergeError),
        (lambda x: x @ x, RuntimeError),
    ],
    ids=["ordinary", "fall-back", "exception", "refusal", "torch's error"],
)
@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_changes_outside(function, kind, fastpath, mode):
    module = Through(function).train()
    module.layer.eval()
    before_parameters = dict(module.named_parameters())
    storage = [value.data_ptr() for value in module.parameters()]
    default = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        with mode():
            before = globals_of_torch() if mode is not torch.inference_mode else None
            with nullcontext() if kind is None else pytest.raises(kind):
                linearize(module, {}, draw_tau(module), torch.randn(3, 4))
            if before is not None:
                assert globals_of_torch() == before
            assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
            assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    finally:
        torch.backends.mha.set_fastpath_enabled(default)
    assert (module.training, module.layer.training) == (True, False)
    for name, value in module.named_parameters():
        assert value is before_parameters[name]
        assert value.grad is None
    assert [value.data_ptr() for value in module.parameters()] == storage


def test_the_gradient_flows_into_tau_alone():
    module = mlp()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    moved = {"2.weight": torch.randn(5, 5, dtype=torch.float64, requires_grad=True)}
    tau = draw_tau(module)
    value, tangent = linearize(module, moved, tau, x)
    assert not value.requires_grad
    (value + tangent).square().sum().backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in tau.values())
    assert x.grad is None
    assert moved["2.weight"].grad is None
    assert all(each.grad is None for each in module.parameters())


def test_an_input_that_requires_grad_may_go_into_a_norm():
    """Its hand-written backward pass knows no gradient of the input."""
    module, x = nn.LayerNorm(4).double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    value, tangent = linearize(module, {}, draw_tau(module), x)
    assert not value.requires_grad
    tangent.sum().backward()
    assert x.grad is None


# Modes, dtypes, inputs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_and_keeps_no_graph(mode):
    model, images = with_tau(vit().double()), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model.forward_parts(images)
    assert expected[1].requires_grad
    with mode():
        got = model.forward_parts(images * 1)  # under inference_mode an inference tensor
    for each, other in zip(got, expected, strict=True):
        assert not each.requires_grad
        assert not each.is_inference()
        torch.testing.assert_close(each, other.detach(), rtol=1e-12, atol=1e-12)


def test_everything_may_come_from_inference_mode():
    """θ0, τ, the input, and the inputs inside of it: all of them are inference tensors, and a gradient is wanted."""

    class Multiply(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, pair, *, others):
            return self.norm(pair.first) * pair.second * others["list"][0] * others["text"].count("a")

    with torch.inference_mode():
        module, x, tau = Multiply(), torch.randn(3, 4), {"norm.weight": torch.randn(4)}
    learned = {"norm.bias": torch.randn(4, requires_grad=True)}
    _, tangent = linearize(module, {}, {**tau, **learned}, Pair(x, x), others={"list": [x, None], "text": "banana"})
    tangent.sum().backward()
    x = x.clone()
    expected = (F.layer_norm(x, (4,)) * tau["norm.weight"] + learned["norm.bias"]) * x * x * 3
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(learned["norm.bias"].grad, (3 * x * x).sum(0))


def test_a_part_of_tau_may_come_from_inference_mode():
    module, x = nn.Conv1d(4, 3, 1), torch.randn(2, 4, 5)
    with torch.inference_mode():
        weight = torch.randn(3, 4, 1)
    bias = torch.randn(3, requires_grad=True)
    _, tangent = linearize(module, {}, {"weight": weight, "bias": bias}, x)
    tangent.sum().backward()
    torch.testing.assert_close(tangent, F.conv1d(x, weight.clone(), bias))
    torch.testing.assert_close(bias.grad, torch.full((3,), 10.0))


NETWORKS = {
    "vit": lambda: vit(ls_init_value=0.5),
    "attentional pool": lambda: vit(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=3),
    "unpacked": lambda: vit(image_size=32, timm_model_name="test_vit", timm_pool="", timm_proj="linear"),
    "resnet": lambda: vit(image_size=32, layers=[1, 1, 1, 1], width=16),
    "norm last": lambda: nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.Flatten(), nn.LazyLinear(8), nn.LayerNorm(8)),
}


def network(name):
    torch.manual_seed(2)
    side = 32 if name in ("unpacked", "resnet") else 16
    images = torch.randn(4, 3, side, side)
    module = NETWORKS[name]().eval()
    with torch.no_grad():
        module(images)
    return module, images


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("selected", ["all", "first", "weights", "biases", "norms"])
def test_autocast(name, selected):
    module, images = network(name)
    names = list(own_parameters(module))
    chosen = {
        "all": names,
        "first": names[:1],
        "weights": [each for each in names if each.endswith("weight")],
        "biases": [each for each in names if each.endswith("bias")],
        "norms": [each for each in names if "ln_" in each or "norm" in each or "bn" in each] or names[-2:],
    }[selected]
    tau = draw_tau(module, chosen)
    expected = linearize(module, {}, tau, images)
    expected_gradients = torch.autograd.grad(expected[1].square().sum(), list(tau.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ordinary = module(images)
        got = linearize(module, {}, tau, images)
        loss = got[1].float().square().sum()
    gradients = torch.autograd.grad(loss, list(tau.values()))
    assert got[0].dtype == ordinary.dtype == torch.bfloat16
    assert got[1].dtype == torch.bfloat16
    assert relative(got[0], expected[0]) < 0.03
    assert relative(got[1], expected[1]) < 0.1
    assert all(each.dtype == torch.float32 for each in gradients)
    joined = [torch.cat([each.flatten() for each in every]) for every in (gradients, expected_gradients)]
    assert relative(*joined) < 0.1


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (2, 4)),
        (nn.Conv1d(4, 3, 1), (2, 4, 1)),
        (nn.Conv2d(4, 3, 1), (4, 1, 1)),
        (nn.LayerNorm(4), (4,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_under_autocast_a_layer_returns_what_torch_does(module, shape, dtype, name):
    x = torch.randn(shape, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, tangent = linearize(module, {}, draw_tau(module, [name]), x)
        assert value.dtype == tangent.dtype == module(x).dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("name", ["vit", "attentional pool", "norm last"])
def test_other_dtypes(name, dtype, tolerance):
    module, images = network(name)
    module = copy.deepcopy(module).to(dtype)
    tau = draw_tau(module)
    got = linearize(module, {}, tau, images.to(dtype))
    got[1].float().square().sum().backward()
    exact = {key: value.detach().double() for key, value in tau.items()}
    expected = linearize(module.double(), {}, exact, images.to(dtype).double())
    for each, other in zip(got, expected, strict=True):
        assert each.dtype == dtype
        assert relative(each, other) < tolerance
    assert all(bool(each.grad.isfinite().all()) and each.grad.dtype == dtype for each in tau.values())


def test_autocast_leaves_float64_alone():
    model, x = with_tau(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()), torch.randn(5, 4).double()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_norm_wider_than_its_input():
    """Weights in float32, activations in bfloat16, no autocast: a CPU computes that, and so does the rule."""
    torch.manual_seed(3)
    module, x = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.LayerNorm(8)), torch.randn(5, 8).bfloat16()
    tau = draw_tau(module)
    value, tangent = linearize(module, {}, tau, x)
    assert value.dtype == tangent.dtype == module(x).dtype == torch.bfloat16
    exact = {name: each.detach().float() for name, each in tau.items()}
    assert relative(tangent, linearize(copy.deepcopy(module).float(), {}, exact, x.float())[1]) < 0.02


# Dropout and batch normalisation


def test_training_mode_makes_no_difference():
    torch.manual_seed(4)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6)
    ).double()
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    module.train()(images)  # statistics other than 0 and 1
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    tau = draw_tau(module)
    expected = linearize(module.eval(), {}, tau, images)
    module.train()
    module[2].eval()
    got = linearize(module, {}, tau, images)
    for each, other in zip(got, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(got[0], module.eval()(images), rtol=1e-12, atol=1e-12)
    for name, value in module.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=0, atol=0)


def test_the_modules_modes_come_back():
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(), nn.Linear(4, 4)))
    module[1][0].eval()
    linearize(module, {}, draw_tau(module), torch.randn(3, 4))
    assert [part.training for part in module.modules()] == [True, True, True, False, True]


# LinearizedModel


def test_the_model_has_the_modules_names_in_the_modules_order():
    module = vit()
    names = [name for name, _ in module.named_parameters()]
    model = LinearizedModel(module)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == names
    assert all(value.requires_grad and not bool(value.any()) for value in model.parameters())
    assert not any(value.requires_grad for value in module.parameters())
    some = [name for name in names if ".attn." in name]
    assert [name for name, _ in LinearizedModel(module, reversed(some)).named_parameters()] == some


def test_theta_0_is_not_copied():
    module = mlp()
    storage = {name: value.data_ptr() for name, value in module.named_parameters()}
    model = LinearizedModel(module)
    assert model.module is module
    model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
    assert {name: value.data_ptr() for name, value in model.module.named_parameters()} == storage
    assert {name: value.data_ptr() for name, value in model.initial_parameters().items()} == storage
    assert not any(value.requires_grad for value in model.initial_parameters().values())


def test_the_model_starts_at_f0_exactly():
    for module, x in ((mlp(), torch.randn(5, 4).double()), (vit().double(), torch.randn(2, 3, 16, 16).double())):
        model = LinearizedModel(module)
        value, tangent = model.forward_parts(x)
        assert not bool(tangent.any())
        torch.testing.assert_close(model(x), value, rtol=0, atol=0)
        torch.testing.assert_close(model(x), module(x), rtol=1e-13, atol=1e-13)


def test_the_model_is_linear_in_tau():
    model, images = with_tau(vit().double()), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    first = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    second = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    outputs = {}
    combined = {name: 0.7 * first[name] - 2.5 * second[name] for name in first}
    for key, tau in (("first", first), ("second", second), ("combined", combined)):
        model.load_task_vector(tau)
        value, tangent = model.forward_parts(images)
        outputs[key] = tangent
        torch.testing.assert_close(model(images), value + tangent, rtol=0, atol=0)
        torch.testing.assert_close(model.tangent(images), tangent, rtol=0, atol=0)
    torch.testing.assert_close(
        outputs["combined"], 0.7 * outputs["first"] - 2.5 * outputs["second"], rtol=1e-11, atol=1e-11
    )
    assert float(outputs["combined"].detach().norm()) > 1e-3


def test_the_tangent_is_the_derivative_along_a_full_fine_tune():
    """Post-hoc linearisation: ``f(θ0 + h τ) - f(θ0)`` over h goes to it."""
    module, x, h = mlp(), torch.randn(5, 4, dtype=torch.float64), 1e-6
    base = own_parameters(module)
    tuned = {name: value + 0.1 * torch.randn_like(value) for name, value in base.items()}
    tau = {name: tuned[name] - base[name] for name in base}
    model = LinearizedModel(module)
    model.load_task_vector(tau)
    ends = [functional_call(module, {name: base[name] + s * h * tau[name] for name in base}, (x,)) for s in (1, -1)]
    torch.testing.assert_close(model.tangent(x), (ends[0] - ends[1]) / (2 * h), rtol=1e-7, atol=1e-8)


def test_a_task_vector_comes_back():
    model = LinearizedModel(mlp())
    tau = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    model.load_task_vector(tau, 0.5)
    got = model.task_vector()
    assert list(got) == list(tau)
    for name, value in got.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, 0.5 * tau[name], rtol=0, atol=0)
    model.load_task_vector(got, -2)
    for name, value in model.task_vector().items():
        torch.testing.assert_close(value, -tau[name], rtol=0, atol=0)


def test_a_subset_has_zeros_elsewhere():
    model = with_tau(mlp(), ["4.bias", "2.weight"])
    names = ["2.weight", "4.bias"]
    assert list(model.state_dict()) == names
    vector = model.task_vector()
    assert list(vector) == [name for name, _ in mlp().named_parameters()]
    assert [name for name, value in vector.items() if bool(value.any())] == names
    LinearizedModel(mlp(), names).load_task_vector(vector)
    with pytest.raises(ConfigurationError) as error:
        LinearizedModel(mlp(), names[1:]).load_task_vector(vector)
    assert one_line(error, ConfigurationError) == (
        "task vector: expected zeros outside of the 1 parameters that train, got other values in 1: 2.weight. "
        "Let them train as well."
    )
    none = LinearizedModel(mlp(), names[1:])
    none.load_task_vector(vector, 0)
    assert not any(bool(value.any()) for value in none.parameters())


def test_other_task_vectors_are_refused():
    model = LinearizedModel(mlp(), ["4.bias"])
    vector = model.task_vector()
    with pytest.raises(StructureMismatchError) as error:
        model.load_task_vector({name: value for name, value in vector.items() if name != "2.bias"})
    assert "task vector: expected the same 6 parameters, got 1 missing (2.bias)" in str(error.value)
    with pytest.raises(StructureMismatchError) as error:
        model.load_task_vector({**vector, "4.bias": torch.ones(1)})
    assert "4.bias (1,) instead of (3,)" in str(error.value)


@pytest.mark.parametrize(
    ("module", "trainable", "expected"),
    [
        (mlp(), ["0.weight", "0.wait"], "of the 6 parameters of Sequential, got 0.wait."),
        (mlp(), "bias", "of the 6 parameters of Sequential, got b, i, a and 1 more."),
        (mlp(), [], "of the 6 parameters of Sequential, got none."),
        (nn.Tanh(), None, "of the 0 parameters of Tanh, got none."),
    ],
)
def test_names_of_nothing_are_refused(module, trainable, expected):
    with pytest.raises(ConfigurationError) as error:
        LinearizedModel(module, trainable)
    text = one_line(error, ConfigurationError)
    assert text == f"trainable: expected names {expected} Use names of module.named_parameters()."


@pytest.mark.parametrize("which", ["parameters", "tangents"])
def test_linearize_refuses_names_of_nothing(which):
    module = nn.Linear(4, 4)
    chosen = {"parameters": {}, "tangents": draw_tau(module), which: {"wait": torch.ones(4), "bias": torch.ones(4)}}
    with pytest.raises(ConfigurationError) as error:
        linearize(module, chosen["parameters"], chosen["tangents"], torch.ones(2, 4))
    assert one_line(error, ConfigurationError) == (
        "linearised Linear: expected names of its 2 parameters, got wait. Use names of module.named_parameters()."
    )


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_theta_0(how):
    model, x = with_tau(mlp(), ["2.weight"]), torch.randn(5, 4, dtype=torch.float64)
    twin = how(model)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert list(twin.state_dict()) == ["2.weight"]
    before = model(x).detach().clone()
    with torch.no_grad():
        twin.module[0].weight.add_(1)
        for value in twin.parameters():
            value.add_(1)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert bool((twin(x) != before).all())


def test_a_state_dict_goes_into_another_model():
    model, other = with_tau(mlp()), LinearizedModel(mlp())
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda model: model.double(), torch.float64),
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
        (lambda model: nn.ModuleList([model]).half()[0], torch.float16),
    ],
)
def test_theta_0_and_buffers_are_converted_too(convert, dtype):
    model = convert(LinearizedModel(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))))
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert {value.dtype for value in model.module.parameters()} == {dtype}
    assert model.module[1].running_mean.dtype == dtype
    assert model(torch.randn(2, 4, dtype=dtype)).dtype == dtype


def test_training_the_model_leaves_the_module_in_evaluation():
    model = with_tau(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).train())
    x = torch.randn(5, 4)
    expected = model.eval()(x)
    torch.testing.assert_close(model.train()(x), expected, rtol=0, atol=0)
    assert model.training
    assert not model.module.training


def test_children_may_be_called_like_methods_of_the_model():
    names = ["module", "tangent", "forward_parts", "task_vector", "load_task_vector", "initial_parameters", "_base"]

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, x):
            for part in self.children():
                x = part(x).tanh()
            return x

    torch.manual_seed(5)
    module = nn.Sequential(Inner()).double()
    for each, prefix in ((module, "0."), (module[0], "")):
        model = with_tau(each)
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in each.named_parameters()]
        assert next(iter(model.state_dict())) == f"{prefix}module.weight"
        x = torch.randn(3, 4, dtype=torch.float64)
        value, tangent = model.train().eval().double().forward_parts(x)
        torch.testing.assert_close(value, each(x), rtol=1e-12, atol=1e-12)
        tangent.sum().backward()
        assert all(value.grad is not None for value in model.parameters())
        torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


def test_a_parameter_may_be_called_like_a_property():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self._parameters["module"] = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x * self._parameters["module"]

    model = with_tau(Inner())
    assert list(model.state_dict()) == ["module"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(model.tangent(x), x * model.state_dict()["module"])


def test_tied_weights_stay_tied():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    model = with_tau(module).double()
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.bias"]
    assert model.module[2].weight is model.module[0].weight
    assert list(model.task_vector()) == ["0.weight", "0.bias", "2.bias"]


def test_more_inputs():
    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, factor, *, shift=0.0, pair=None):
            return self.layer(x) * factor + shift + pair.first

    model, x = with_tau(Affine()), torch.randn(5, 4)
    factor, zero = torch.randn(5, 3), torch.zeros(3)
    value, tangent = model.forward_parts(x, factor, shift=2.0, pair=Pair(zero + 1, None))
    torch.testing.assert_close(value, model.module.layer(x) * factor + 3)
    torch.testing.assert_close(tangent, F.linear(x, *model.parameters()) * factor)
    torch.testing.assert_close(model(x, factor, pair=Pair(zero, None)), value - 3 + tangent)


# Refusals

NO_FORMULA = (
    "linearised: expected operators with a forward-mode derivative, got {}, which has none. Replace it in the module "
    "by operators that have one, give its autograd.Function a jvp, train only parameters after it, or do not "
    "linearise."
)


class OldSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class NewSquare(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Square(NewSquare):
    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


def ctc(x):
    targets, lengths = torch.ones(2, 2, dtype=torch.long), torch.full((2,), 2)
    return F.ctc_loss(x.view(-1, 2, 4).log_softmax(-1), targets, lengths * 2, lengths)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.cdist(x, x), "_cdist_forward"),
        (ctc, "_ctc_loss"),
        (lambda x: torch.add(x, 1, out=torch.empty(8, 4)), "add_out"),
        (OldSquare.apply, "an autograd.Function without jvp"),
        (NewSquare.apply, "an autograd.Function without jvp"),
    ],
    ids=["cdist", "ctc_loss", "out=", "old function", "new function"],
)
def test_operators_without_a_formula_are_named(function, named):
    module = Through(function)
    with pytest.raises(LitMergeError) as error:
        linearize(module, {}, draw_tau(module), torch.randn(8, 4))
    assert one_line(error) == NO_FORMULA.format(named)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_operators_without_a_formula_may_stand_in_front_of_what_trains():
    module = nn.Sequential(Through(lambda x: torch.cdist(x, x)), nn.Linear(8, 3))
    x, tau = torch.randn(8, 4), draw_tau(module, ["1.weight"])
    torch.testing.assert_close(linearize(module, {}, tau, x)[1], module[0](x) @ tau["1.weight"].T)


def test_a_function_with_jvp_is_fine():
    module, x = Through(Square.apply), torch.randn(8, 4)
    tau = draw_tau(module, ["layer.bias"])
    torch.testing.assert_close(linearize(module, {}, tau, x)[1], 2 * module.layer(x) * tau["layer.bias"])


def test_products_into_a_given_tensor():
    """Not differentiable, but of constants allowed."""
    constant = torch.ones(2, 3, 4)

    def multiply(x):
        return x * torch.matmul(constant, torch.ones(4, 4), out=torch.empty(2, 3, 4))

    module, x = Through(multiply), torch.randn(2, 3, 4)
    tau = draw_tau(module, ["layer.bias"])
    torch.testing.assert_close(linearize(module, {}, tau, x)[1], (4 * tau["layer.bias"]).expand(2, 3, 4))
    module = Through(lambda x: torch.matmul(x, torch.ones(4, 4), out=torch.empty(2, 3, 4)))
    with pytest.raises(LitMergeError) as error:
        linearize(module, {}, draw_tau(module), x)
    assert "_out, which has none" in one_line(error)


@pytest.mark.parametrize(
    ("function", "got"), [(lambda x: (x, x), "tuple"), (lambda x: {"x": x}, "dict"), (lambda x: None, "NoneType")]
)
def test_a_module_returns_one_tensor(function, got):
    module = Through(function)
    with pytest.raises(LitMergeError) as error:
        linearize(module, {}, draw_tau(module), torch.randn(3, 4))
    assert one_line(error) == (
        f"linearised Through: expected a module that returns one tensor, got {got}. Wrap it in one that does."
    )


@pytest.mark.parametrize(
    "function",
    [lambda x: x @ x, lambda x: x.view(5), lambda x: F.layer_norm(x, (3,)), fail, lambda x: x[9], lambda x: x.nothing],
)
def test_other_errors_pass_through(function):
    module, x = Through(function), torch.randn(3, 4)
    with pytest.raises(Exception) as expected:
        module(x)
    with pytest.raises(type(expected.value)) as error:
        linearize(module, {}, draw_tau(module), x)
    assert str(error.value) == str(expected.value)
    assert error.value.__cause__ is None


def test_a_tangent_of_another_shape_is_torchs_error():
    module = nn.Linear(4, 3)
    with pytest.raises(RuntimeError, match="different size than that of the original Tensor"):
        linearize(module, {}, {"weight": torch.ones(1)}, torch.randn(3, 4))


NESTED = (
    "linearised: expected no torch.func.jvp, jacfwd or vmap and no other linearised module around or inside this one, "
    "got one; torch cannot nest them. Call the module itself."
)


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda module, tau, x: torch.func.jvp(lambda x: linearize(module, {}, tau, x)[1], (x,), (x,)),
        lambda module, tau, x: torch.func.jvp(lambda tau: linearize(module, {}, tau, x)[1], (tau,), (tau,)),
        lambda module, tau, x: torch.func.vmap(lambda x: linearize(module, {}, tau, x)[1])(x),
        lambda module, tau, x: torch.func.vmap(lambda b: linearize(module, {}, {"bias": b}, x)[1])(x),
        lambda module, tau, x: linearize(
            Through(lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1]), {}, {"layer.bias": tau["bias"]}, x
        ),
        lambda module, tau, x: linearize(Through(LinearizedModel(nn.Linear(4, 4))), {}, {"layer.bias": tau["bias"]}, x),
    ],
    ids=["jvp of x", "jvp of τ", "vmap of x", "vmap of τ", "jvp inside", "a linearised module inside"],
)
def test_nesting_is_refused(evaluate):
    module = nn.Linear(4, 4)
    tau = {name: value.detach() for name, value in draw_tau(module).items()}
    with pytest.raises(LitMergeError) as error:
        evaluate(module, tau, torch.randn(3, 4))
    assert one_line(error) == NESTED
    globals_of_torch()


def test_torch_func_grad_may_stand_outside():
    module, x = mlp(), torch.randn(5, 4, dtype=torch.float64)
    tau = {name: value.detach() for name, value in draw_tau(module).items()}
    got = torch.func.grad(lambda tau: linearize(module, {}, tau, x)[1].square().sum())(tau)
    learned = {name: value.clone().requires_grad_() for name, value in tau.items()}
    linearize(module, {}, learned, x)[1].square().sum().backward()
    for name, value in got.items():
        torch.testing.assert_close(value, learned[name].grad)


# Gradient checkpointing

CHECKPOINTING = (
    "linearised: expected a module without gradient checkpointing, got one that recomputes. Switch it off, e.g. with "
    "set_grad_checkpointing(False)."
)


def test_gradient_checkpointing_is_refused_before_the_backward_pass():
    model, images = with_tau(vit()), torch.randn(2, 3, 16, 16)
    expected = model(images).detach()
    model.module.set_grad_checkpointing()
    with pytest.raises(LitMergeError) as error:
        model(images)
    assert one_line(error) == CHECKPOINTING
    with torch.inference_mode():  # nothing is recomputed there
        torch.testing.assert_close(model(images), expected)
    model.module.set_grad_checkpointing(False)
    torch.testing.assert_close(model(images).detach(), expected)


def test_the_older_checkpointing_is_an_autograd_function():
    module = Through(lambda x: checkpoint(torch.sin, x, use_reentrant=True))
    with pytest.raises(LitMergeError) as error:
        linearize(module, {}, draw_tau(module), torch.randn(3, 4))
    assert one_line(error) == NO_FORMULA.format("an autograd.Function without jvp")


def test_hooks_around_are_left_to_their_owner():
    model, x = with_tau(mlp()), torch.randn(5, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [value.grad.clone() for value in model.parameters()]
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        loss = model(x).square().sum()
    loss.backward()
    for value, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=0, atol=0)


def test_flex_attention_is_refused_with_the_setting_that_replaces_it():
    module = Through(lambda x: flex_attention(*[x.view(1, 1, 16, 16)] * 3))
    with pytest.raises(LitMergeError) as error:
        linearize(module, {}, draw_tau(module), torch.randn(64, 4))
    assert one_line(error) == (
        "linearised: expected no part that torch.compile computes, got flex_attention, whose tangent would be dropped. "
        'Do not compile it; of a transformers network set attn_implementation="sdpa" (or "eager").'
    )
