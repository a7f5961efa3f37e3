"""``linearize`` in float64 against dense Jacobians taken in reverse mode, and against plain ``torch.func.jvp``."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from open_clip.model import _build_vision_tower
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.functional import linearize

VIT = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def own_parameters(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def draw_tau(module, names):
    own = own_parameters(module)
    return {name: draw(*own[name].shape).requires_grad_() for name in own if name in names}


@contextmanager
def slow_attention():
    """Torch's fused kernels have no forward-mode formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def by_jvp(module, tau, *inputs, **keywords):
    own = own_parameters(module)

    def evaluate(chosen):
        return functional_call(module, {**own, **chosen}, inputs, keywords)

    with slow_attention():
        return torch.func.jvp(evaluate, ({name: own[name] for name in tau},), (tau,))


def by_jacobian(module, *inputs, **keywords):
    """A function of τ that multiplies with the dense Jacobian, which is computed once."""
    own = own_parameters(module)
    with slow_attention():
        value = functional_call(module, own, inputs, keywords).detach()
        jacobian = jacrev(lambda chosen: functional_call(module, chosen, inputs, keywords))(own)

    def evaluate(tau):
        products = [jacobian[name].detach().reshape(value.numel(), -1) @ tau[name].flatten() for name in tau]
        return value, torch.stack(products).sum(0).view_as(value)

    return evaluate


def check_close(got, expected, tolerance, what):
    """Relative to the largest entry; absolutely where the true values are all zero but for rounding."""
    size = float(expected.detach().abs().max())
    error = float((got - expected).detach().abs().max())
    assert error <= tolerance * (size if size > 1e-8 else 1.0), f"{what}: {error} of {size}"


def gradients_of(value, tangent, tau):
    """Zeros where the tangent does not depend on τ."""
    if not tangent.requires_grad:
        return [torch.zeros_like(each) for each in tau]
    loss = ((value + tangent).tanh().square() + tangent.sin() * value.cos()).sum()
    return torch.autograd.grad(loss, tau, retain_graph=True, materialize_grads=True)


def check_agreement(results, references, tau, tolerance=1e-10):
    """Value, tangent, and the gradient of a non-linear function of both."""
    gradients = [gradients_of(*each, list(tau.values())) for each in (results, references)]
    assert not results[0].requires_grad
    assert results[0].dtype == results[1].dtype == references[0].dtype
    assert results[1].shape == results[0].shape
    check_close(results[0], references[0], tolerance, "value")
    check_close(results[1], references[1], tolerance, "tangent")
    for name, got, expected in zip(tau, *gradients, strict=True):
        assert got.shape == tau[name].shape
        check_close(got, expected, tolerance, f"gradient of {name}")


def selections(names):
    """All of them, each one alone, all but each one, biases alone, weights alone."""
    names = list(names)
    chosen = [names, *([name] for name in names), *([other for other in names if other != name] for name in names)]
    biases = [name for name in names if "bias" in name or name in ("b", "db")]
    chosen += [biases, [name for name in names if name not in biases]]
    return [list(each) for each in dict.fromkeys(map(tuple, chosen)) if each]


# Every rule and every way around it, with each set of its tensors as what has a tangent


class Call(nn.Module):
    """A function of named tensors, all of which are parameters; an input, if any, is a constant."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterDict({name: draw(*shape) for name, shape in shapes.items()})

    def forward(self):
        return self.function(**self.tensors)


def subsets(names):
    names = list(names)
    for bits in range(1, 2 ** len(names)):
        yield [f"tensors.{name}" for index, name in enumerate(names) if bits >> index & 1]


def linear(x, w, b=None):
    return F.linear(x, w, b)


def convolution(function, **settings):
    return lambda x, w, b=None: function(x, w, b, **settings)


def norm(shape, transposed=False, eps=0.3):
    def evaluate(x, w=None, b=None):
        return F.layer_norm(x.mT if transposed else x, shape, w, b, eps)

    return evaluate


def attention(mask=None, **settings):
    def evaluate(q, k, v, m=None):
        return F.scaled_dot_product_attention(q, k, v, mask if m is None else m, **settings)

    return evaluate


HIDING = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])  # the second query may see no key
ADDED = torch.tensor([[0.5, -2.0, 0.0, 1.0], [-torch.inf] * 4, [-torch.inf, 0.3, 0.1, -0.4]], dtype=torch.float64)
HEADS = {"q": (2, 2, 3, 5), "k": (2, 2, 4, 5), "v": (2, 2, 4, 6)}

RULES = {
    "linear 3-D": (linear, {"x": (2, 3, 4), "w": (5, 4), "b": (5,)}),
    "linear 2-D": (linear, {"x": (3, 4), "w": (5, 4), "b": (5,)}),
    "linear 1-D": (linear, {"x": (4,), "w": (5, 4), "b": (5,)}),
    "linear without bias": (linear, {"x": (2, 2, 3, 4), "w": (5, 4)}),
    "linear of strided rows": (lambda x, w, b: F.linear(x.mT, w, b), {"x": (2, 4, 3), "w": (5, 4), "b": (5,)}),
    "linear with a vector": (linear, {"x": (2, 3, 4), "w": (4,)}),
    "torch.matmul": (lambda x, w: torch.matmul(x, w), {"x": (2, 3, 4), "w": (4, 5)}),
    "Tensor.matmul": (lambda x, w: x.matmul(w), {"x": (2, 3, 4), "w": (4, 5)}),
    "@": (lambda x, w: x @ w, {"x": (2, 2, 3, 4), "w": (4, 5)}),
    "matrix @ matrix": (lambda x, w: x @ w, {"x": (3, 4), "w": (4, 5)}),
    "vector @ matrix": (lambda x, w: x @ w, {"x": (4,), "w": (4, 5)}),
    "@ vector": (lambda x, w: x @ w, {"x": (2, 3, 4), "w": (4,)}),
    "@ batch": (lambda x, w: x @ w, {"x": (2, 3, 4), "w": (2, 4, 5)}),
    "conv1d": (convolution(F.conv1d, padding=2, dilation=2), {"x": (2, 3, 6), "w": (4, 3, 3), "b": (4,)}),
    "conv1d without bias": (convolution(F.conv1d, stride=2), {"x": (2, 3, 6), "w": (4, 3, 2)}),
    "conv2d": (convolution(F.conv2d, stride=2, padding=1), {"x": (2, 3, 5, 4), "w": (4, 3, 3, 2), "b": (4,)}),
    "conv2d without bias": (convolution(F.conv2d), {"x": (2, 3, 4, 4), "w": (2, 3, 2, 2)}),
    "conv2d groups": (convolution(F.conv2d, groups=2), {"x": (2, 4, 3, 3), "w": (6, 2, 2, 2), "b": (6,)}),
    "conv2d same": (convolution(F.conv2d, padding="same"), {"x": (2, 2, 3, 4), "w": (3, 2, 3, 2), "b": (3,)}),
    "conv2d valid": (convolution(F.conv2d, padding="valid"), {"x": (2, 2, 3, 4), "w": (3, 2, 3, 2), "b": (3,)}),
    "conv2d unbatched": (convolution(F.conv2d), {"x": (3, 4, 4), "w": (2, 3, 2, 2), "b": (2,)}),
    "conv3d": (convolution(F.conv3d), {"x": (2, 2, 3, 2, 2), "w": (2, 2, 2, 2, 1), "b": (2,)}),
    "layer_norm": (norm((4,)), {"x": (2, 3, 4), "w": (4,), "b": (4,)}),
    "layer_norm of two axes": (norm((3, 4)), {"x": (2, 3, 4), "w": (3, 4), "b": (3, 4)}),
    "layer_norm of a vector": (norm((4,)), {"x": (4,), "w": (4,), "b": (4,)}),
    "layer_norm without bias": (norm([4]), {"x": (3, 4), "w": (4,)}),
    "layer_norm without weight": (norm((4,)), {"x": (3, 4), "b": (4,)}),
    "layer_norm without affine": (norm((4,)), {"x": (2, 3, 4)}),
    "layer_norm of strided rows": (norm((3,), transposed=True), {"x": (2, 3, 4), "w": (3,), "b": (3,)}),
    "attention": (attention(), HEADS),
    "attention 3-D": (attention(), {"q": (2, 3, 5), "k": (2, 4, 5), "v": (2, 4, 6)}),
    "attention scale": (attention(scale=0.7), HEADS),
    "attention causal": (attention(is_causal=True), {"q": (2, 2, 4, 5), "k": (2, 2, 3, 5), "v": (2, 2, 3, 6)}),
    "attention boolean mask": (attention(HIDING), HEADS),
    "attention additive mask": (attention(ADDED), HEADS),
    "attention one mask per head": (attention(torch.stack([HIDING, HIDING.flip(0)])), HEADS),
    "attention learned mask": (attention(), {**HEADS, "v": (2, 2, 4, 5), "m": (2, 2, 3, 4)}),
    "attention shared keys": (attention(), {"q": (2, 2, 3, 5), "k": (1, 2, 4, 5), "v": (2, 2, 4, 6)}),
    "attention shared scores": (attention(), {"q": (1, 2, 3, 5), "k": (1, 2, 4, 5), "v": (2, 2, 4, 6)}),
    "attention learned bias": (attention(), {**HEADS, "m": (1, 2, 3, 4)}),
    "attention learned bias of a head": (attention(), {**HEADS, "m": (3, 4)}),
    "attention groups, causal": (
        attention(enable_gqa=True, is_causal=True, scale=0.7),
        {"q": (2, 4, 3, 5), "k": (2, 2, 3, 5), "v": (2, 2, 3, 6)},
    ),
    "attention groups, a mask per head": (
        attention(enable_gqa=True),
        {"q": (2, 4, 3, 5), "k": (2, 2, 4, 5), "v": (2, 2, 4, 5), "m": (2, 4, 3, 4)},
    ),
    "attention groups, one mask": (
        attention(torch.stack([HIDING] * 2).unsqueeze(1), enable_gqa=True),
        {"q": (2, 4, 3, 5), "k": (2, 2, 4, 5), "v": (2, 2, 4, 5)},
    ),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), {"x": (3, 4), "w": (4, 5), "b": (5,)}),
    "addmm scaled": (lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2), {"x": (3, 4), "w": (4, 5), "b": (5,)}),
    "attention groups": (attention(enable_gqa=True), {"q": (2, 4, 3, 5), "k": (2, 2, 3, 5), "v": (2, 2, 3, 5)}),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_gives_the_jacobians_product(rule):
    torch.manual_seed(1)
    function, shapes = RULES[rule]
    module = Call(function, **shapes)
    reference = by_jacobian(module)
    for names in subsets(shapes):
        tau = draw_tau(module, names)
        check_agreement(linearize(module, {}, tau), reference(tau), tau)


def test_dropout_that_a_function_is_told_to_apply():
    module = Call(attention(dropout_p=0.4), **HEADS)
    tau = draw_tau(module, own_parameters(module))
    results = []
    for evaluate in (lambda: linearize(module, {}, tau), lambda: by_jvp(module, tau)):
        torch.manual_seed(2)
        results.append(evaluate())
    check_agreement(*results, tau)


def test_results_may_be_changed_in_place():
    torch.manual_seed(3)
    behind = (nn.Conv2d(2, 3, 2), nn.LayerNorm((3, 2, 2)), nn.Conv2d(3, 2, 1, bias=False), nn.Linear(2, 4))
    module = nn.Sequential(*(part for layer in behind for part in (layer, nn.LeakyReLU(0.3, inplace=True)))).double()
    images = draw(2, 2, 3, 3)
    reference = by_jacobian(module, images)
    for names in selections(own_parameters(module)):
        tau = draw_tau(module, names)
        check_agreement(linearize(module, {}, tau, images), reference(tau), tau)


# nn.MultiheadAttention and the function below it

# True hides, and no query may see nothing: there torch itself has gradients that are NaN.
HIDDEN = torch.tensor([[False, True, False], [False, False, False], [True, True, False]])
PADDING = torch.tensor([[False, False, True], [False, True, False]])
PER_HEAD = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
QUERY, KEY, OTHER = torch.randn(3, 3, 2, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Attend(nn.Module):
    """Attention of the output of a layer, which an input None stands for, or of constants."""

    def __init__(self, inputs=(None, None, None), settings=None, output=0, **construction):
        super().__init__()
        self.inputs, self.settings, self.output = inputs, settings or {}, output
        self.inner = nn.Linear(4, 4)
        self.attn = nn.MultiheadAttention(4, 2, **construction)
        for value in self.attn.parameters():
            nn.init.normal_(value, 0, 0.5)

    def forward(self):
        given = {None: self.inner(QUERY), **{each: each for each in self.inputs if each is not None}}
        if self.attn.batch_first:
            given = {key: each.transpose(0, 1) for key, each in given.items()}
        inputs = [given[each] for each in self.inputs]  # what is one object stays one
        return self.attn(*inputs, **{"need_weights": False, **self.settings})[self.output]


ATTENTIONS = {
    "self": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "constant inputs": {"inputs": (QUERY, QUERY, QUERY)},
    "cross": {"inputs": (None, KEY, KEY), "batch_first": True},
    "cross, length first": {"inputs": (KEY, None, None)},
    "other values": {"inputs": (None, None, OTHER)},
    "three inputs": {"inputs": (QUERY, None, OTHER)},
    "separate projections": {"inputs": (None, KEY[..., :3], OTHER[..., :2]), "kdim": 3, "vdim": 2},
    "separate projections without bias": {"inputs": (None, KEY[..., :3], OTHER), "kdim": 3, "bias": False},
    "boolean mask": {"settings": {"attn_mask": HIDDEN}},
    "additive mask": {"settings": {"attn_mask": HIDDEN * -1.5}, "batch_first": True},
    "one mask per head": {"settings": {"attn_mask": PER_HEAD}},
    "causal": {"settings": {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True}},
    "padding": {"settings": {"key_padding_mask": PADDING}},
    "padding and mask": {"settings": {"key_padding_mask": PADDING, "attn_mask": HIDDEN[:1].expand(3, 3)}},
    "with weights": {"settings": {"need_weights": True}},
    "the weights": {"settings": {"need_weights": True, "average_attn_weights": False}, "output": 1},
    "bias_k": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "unbatched": {"inputs": (QUERY[:, 0], KEY[:, 0], KEY[:, 0])},
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_multi_head_attention_gives_the_jacobians_product(case):
    torch.manual_seed(6)
    module = Attend(**ATTENTIONS[case]).double().eval()
    reference = by_jacobian(module)
    for names in selections(own_parameters(module)):
        tau = draw_tau(module, names)
        check_agreement(linearize(module, {}, tau), reference(tau), tau)


@pytest.mark.parametrize("mask", [HIDDEN, (PER_HEAD > 0) & HIDDEN, PER_HEAD], ids=["boolean", "per head", "additive"])
@pytest.mark.parametrize("training", [False, True])
def test_the_function_below_multi_head_attention(mask, training):
    """Called directly, as attention pools do: its boolean masks have not been turned into numbers yet."""

    def evaluate(x, w, b, o):
        return F.multi_head_attention_forward(
            *(x, x, x, 4, 2, w, b, None, None, False, 0.5, o, None),
            training=training,
            need_weights=False,
            attn_mask=mask,
        )[0]

    module = Call(evaluate, x=(3, 2, 4), w=(12, 4), b=(12,), o=(4, 4))
    for names in subsets("xwbo"):
        tau = draw_tau(module, names)
        results = []
        for method in (linearize, by_jvp):
            torch.manual_seed(7)  # the dropout's
            results.append(method(module, {}, tau) if method is linearize else by_jvp(module, tau))
        check_agreement(*results, tau)


def test_separate_projections_of_one_input():
    """As in the attention pool of CLIP's ResNets."""

    def evaluate(x, q, k, v, b):
        return F.multi_head_attention_forward(
            *(x, x, x, 4, 2, None, b, None, None, False, 0.0, torch.eye(4, dtype=x.dtype), None),
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=q,
            k_proj_weight=k,
            v_proj_weight=v,
        )[0]

    module = Call(evaluate, x=(3, 2, 4), q=(4, 4), k=(4, 4), v=(4, 4), b=(12,))
    reference = by_jacobian(module)
    for names in subsets("xqkvb"):
        tau = draw_tau(module, names)
        check_agreement(linearize(module, {}, tau), reference(tau), tau)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_layer_gives_the_jacobians_product(batch_first, norm_first, masked):
    torch.manual_seed(8)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first, norm_first=norm_first).double().eval()
    keywords = {"src_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True} if masked else {}
    x = draw(2, 3, 4) if batch_first else draw(3, 2, 4)
    reference = by_jacobian(layer, x, **keywords)
    for names in selections(own_parameters(layer)):
        tau = draw_tau(layer, names)
        check_agreement(linearize(layer, {}, tau, x, **keywords), reference(tau), tau)


# Whole networks


def mlp():
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.GELU(), nn.Linear(5, 3)).double()


def test_an_mlp_gives_the_jacobians_product():
    module, x = mlp(), draw(6, 4)
    reference = by_jacobian(module, x)
    for names in selections(own_parameters(module)):
        tau = draw_tau(module, names)
        check_agreement(linearize(module, {}, tau, x), reference(tau), tau)


def test_parameters_replace_the_modules_own():
    module, x = mlp(), draw(6, 4)
    moved = {name: draw(*value.shape).requires_grad_() for name, value in own_parameters(module).items() if "0" in name}
    tau = draw_tau(module, ["0.weight", "2.weight"])
    other = mlp()
    other.load_state_dict({**other.state_dict(), **moved})
    check_agreement(linearize(module, moved, tau, x), by_jvp(other, tau, x), tau)


def tower(**settings):
    """An image tower of open_clip whose parameters and statistics are all random."""
    torch.manual_seed(10)
    module = _build_vision_tower(6, settings).double().eval()
    with torch.no_grad():
        for value in module.parameters():
            value.add_(draw(*value.shape), alpha=0.1)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    return module, draw(2, 3, *[settings["image_size"]] * 2)


TOWERS = {
    "vit": VIT,
    "vit, layer scale": {**VIT, "ls_init_value": 0.5},
    "vit, attentional pool": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3},
    "vit, average pool": {**VIT, "pool_type": "avg", "final_ln_after_pool": True},
    "vit, patch dropout": {**VIT, "patch_dropout": 0.5},
    "vit, custom attention": {**VIT, "block_type": "custom", "qk_norm": True, "scale_heads": True},
    "vit, unpacked": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
    "convnext": {"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp"},
    "convnext, attention pool": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "abs_attn"},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 8},
}


def groups(names):
    """Every parameter, attention's weights, biases, the first layer, the last one, some single tensors."""
    names = list(names)
    attention = [name for name in names if "attn" in name and "weight" in name]
    biases = [name for name in names if name.endswith("bias")]
    chosen = [names, attention, biases, names[:1], names[-1:], names[len(names) // 2 :], [names[len(names) // 2]]]
    return [each for each in chosen if each]


@pytest.mark.parametrize("name", TOWERS)
def test_an_image_tower_gives_what_plain_jvp_gives(name):
    module, images = tower(**TOWERS[name])
    for names in groups(own_parameters(module)):
        tau = draw_tau(module, names)
        check_agreement(linearize(module, {}, tau, images), by_jvp(module, tau, images), tau)


def test_each_tensor_of_a_vit_alone():
    module, images = tower(**{**VIT, "layers": 1})
    for name in own_parameters(module):
        tau = draw_tau(module, [name])
        check_agreement(linearize(module, {}, tau, images), by_jvp(module, tau, images), tau)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_layers_that_keep_lists_of_their_parameters(kind):
    torch.manual_seed(11)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(3, 4)

        def forward(self, x):
            return self.cell(x)[0]

    module, x = Last().double(), draw(3, 2, 3)
    reference = by_jacobian(module, x)
    for names in selections(own_parameters(module)):
        tau = draw_tau(module, names)
        check_agreement(linearize(module, {}, tau, x), reference(tau), tau)


def test_tied_weights_have_one_tangent():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    module[2].weight = module[0].weight
    x = draw(3, 4)
    reference = by_jacobian(module, x)
    assert list(own_parameters(module)) == ["0.weight", "0.bias", "2.bias"]
    tau = draw_tau(module, ["0.weight", "2.bias"])
    check_agreement(linearize(module, {}, tau, x), reference(tau), tau)


def test_layers_of_a_vit_b_32_in_float32():
    torch.manual_seed(12)
    module = _build_vision_tower(512, {"image_size": 224, "layers": 3, "width": 768, "patch_size": 32})
    images = torch.randn(2, 3, 224, 224)
    tau = {name: torch.randn_like(value).mul_(0.01).requires_grad_() for name, value in own_parameters(module).items()}
    check_agreement(linearize(module, {}, tau, images), by_jvp(module, tau, images), tau, 1e-4)
