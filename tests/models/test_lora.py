"""LoRA against the plain encoder with θ0 + ΔW, and against the peft library where that is right."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import weakref

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.errors import ConfigurationError
from lit_merge.models import All, Attention, Matching, Selection, load_clip
from lit_merge.models.lora import LoRA, Update, clear_updates, own_parameters, update_of, updates

IMAGES = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention over the image's rows; keys and values are another width with ``other``, so that they are separate."""

    def __init__(self, batch_first=False, other=None):
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=batch_first, kdim=other, vdim=other)
        self.other, self.batch_first = other, batch_first

    def forward(self, images):
        rows = images.mean(1)
        rows = rows if self.batch_first else rows.transpose(0, 1)
        other = rows if self.other is None else rows[..., : self.other]
        out = self.attn(rows, other, other)[0]
        return out.mean(1 if self.batch_first else 0)


class Rows(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.blocks = nn.ModuleList([Block(**settings)])

    def forward(self, images):
        return self.blocks[0](images)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, groups=2, stride=4),
        nn.Flatten(),
        nn.Linear(128, 5),
    )


def timm_vit(kind):
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return kind(**sizes)


SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
BUILT = {  # encoder, selection and the last parts of the selected names
    "open_clip": (None, None, ("attn.in_proj_weight", "attn.out_proj.weight")),
    "open_clip, one projection": (None, Matching(r"out_proj\.weight"), ("attn.out_proj.weight",)),
    "open_clip, with MLPs": (
        None,
        Attention(3),
        ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    ),
    "open_clip, around the blocks": (
        None,
        Matching(r"\A(proj|positional_embedding|conv1\.weight)\Z"),
        ("proj", "positional_embedding", "conv1.weight"),
    ),
    "sequence first": (lambda: Rows(), None, ("attn.in_proj_weight", "attn.out_proj.weight")),
    "batch first": (lambda: Rows(batch_first=True), None, ("attn.in_proj_weight", "attn.out_proj.weight")),
    "separate": (lambda: Rows(other=8), None, tuple(f"attn.{name}" for name in SEPARATE)),
    "timm": (
        lambda: timm_vit(timm.models.vision_transformer.VisionTransformer),
        None,
        ("attn.qkv.weight", "attn.proj.weight"),
    ),
    "weights read from outside": (  # of `attn.qkv`, which is never called
        lambda: timm_vit(timm.models.beit.Beit),
        None,
        ("attn.qkv.weight", "attn.proj.weight"),
    ),
    "convolutions": (convolutions, Matching(r"\A[035]\.weight"), ("0.weight", "3.weight", "5.weight")),
}


@pytest.fixture
def plain(clip_config):
    """``plain(kind)``: an encoder of images ``[B, 3, 32, 32]``, always the same weights, none of them zero."""

    def build(kind="open_clip", dtype=torch.float64):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            make = BUILT[kind][0]
            encoder = (make() if make else load_clip(clip_config, "random").visual).to(dtype)
            for parameter in encoder.parameters():
                nn.init.normal_(parameter, std=0.2)
        return encoder

    return build


@pytest.fixture
def adapted(plain):
    """``adapted(kind, dtype=…, **settings)``: the same encoder with LoRA of rank 3 by default."""

    def build(kind="open_clip", dtype=torch.float64, **settings):
        encoder = plain(kind, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            LoRA(**{"rank": 3, "alpha": 6.0, "on": BUILT[kind][1], **settings}).inject(encoder)
        return encoder

    return build


def factors(encoder):
    return {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def train(encoder, steps=4, images=IMAGES, rate=0.03):
    optimizer = torch.optim.Adam(factors(encoder).values(), lr=rate)
    for number in range(steps):
        optimizer.zero_grad()
        (encoder(images) - number).square().mean().backward()
        optimizer.step()
    return encoder


def merged(encoder):
    """θ0 + ΔW under own names."""
    dense = dict(updates(encoder))
    return {name: value.detach() + dense.get(name, 0) for name, value in own_parameters(encoder).items()}


def same(first, second):
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


# The function


@pytest.mark.parametrize("kind", BUILT)
def test_it_starts_as_the_plain_encoder(kind, plain, adapted):
    with torch.no_grad():
        for mode in (False, True):
            started, original = adapted(kind).train(mode)(IMAGES), plain(kind).train(mode)(IMAGES)
            torch.testing.assert_close(started, original, rtol=0, atol=1e-12)  # fused or not: another order of sums


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", BUILT)
def test_the_trained_function_is_the_plain_encoders_with_the_updates(kind, training, plain, adapted):
    encoder = train(adapted(kind)).train(training)
    original = plain(kind)
    original.load_state_dict(dict(encoder.named_buffers()), strict=False)  # running statistics, which train as ever
    parameters = merged(encoder)
    for recording in (False, True):  # without gradients, attention in evaluation is one fused operator
        with torch.set_grad_enabled(recording):
            reference = functional_call(copy.deepcopy(original).train(training), parameters, IMAGES)
            torch.testing.assert_close(copy.deepcopy(encoder)(IMAGES), reference, rtol=0, atol=1e-10)
    with torch.no_grad():
        assert (reference - original.train(training)(IMAGES)).abs().max() > 1e-2


def test_the_fused_attention_sees_the_updates(plain, adapted, monkeypatch):
    seen, fused = [], torch._native_multi_head_attention

    def spy(query, key, value, width, heads, in_weight, in_bias, out_weight, *rest):
        seen.extend([in_weight.detach(), out_weight.detach()])
        return fused(query, key, value, width, heads, in_weight, in_bias, out_weight, *rest)

    encoder = train(adapted(), steps=2).eval()
    monkeypatch.setattr(torch, "_native_multi_head_attention", spy)
    with torch.inference_mode():
        encoder(IMAGES)
    adapted_names = {name for name, _ in updates(encoder)}
    names = [name for name, _ in plain().named_parameters() if name in adapted_names]
    assert len(names) == 4
    for tensor, name in zip(seen, names, strict=True):
        torch.testing.assert_close(tensor, merged(encoder)[name], rtol=0, atol=1e-15)


def test_the_kernel_that_trains_on_a_cpu_gives_the_same_gradients(adapted):
    encoder, other = adapted(), adapted()
    encoder(IMAGES).square().sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        other(IMAGES).square().sum().backward()
    for name, factor in factors(encoder).items():
        torch.testing.assert_close(factor.grad, factors(other)[name].grad, rtol=0, atol=1e-9)


def test_autocast_rounds_the_sum_and_not_the_updates(adapted):
    encoder = train(adapted(dtype=torch.float32), steps=1, images=IMAGES.float(), rate=1e-5)
    attention = encoder.transformer.resblocks[0].attn
    exact = attention.in_proj_weight
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention.in_proj_weight
        loss = encoder(IMAGES.float()).float().square().mean()
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact)
    assert not torch.equal(exact, own_parameters(encoder)["transformer.resblocks.0.attn.in_proj_weight"])
    loss.backward()
    assert all(factor.grad.dtype == torch.float32 and factor.grad.any() for factor in factors(encoder).values())


def test_factors_of_a_half_precision_encoder_are_float32():
    encoder = nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16)
    LoRA(rank=1, on=Matching("weight")).inject(encoder)
    assert {factor.dtype for factor in factors(encoder).values()} == {torch.float32}
    assert encoder(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert [update.dtype for _, update in updates(encoder)] == [torch.bfloat16]


# Names and tensors


@pytest.mark.parametrize("kind", BUILT)
def test_own_parameters_are_the_encoders(kind, plain):
    encoder, (_, on, leaves) = plain(kind), BUILT[kind]
    parameters, buffers = dict(encoder.named_parameters()), dict(encoder.named_buffers())
    assert own_parameters(encoder) == parameters
    assert list(own_parameters(encoder)) == list(parameters)
    names = LoRA(rank=2, on=on).inject(encoder)
    assert set(own_parameters(encoder)) == set(parameters)
    assert all(value is parameters[name] for name, value in own_parameters(encoder).items())
    assert not any(value.requires_grad for value in parameters.values())
    assert list(names) == [name for name in parameters if name in names]
    assert {leaf for leaf in leaves if any(name.endswith(leaf) for name in names)} == set(leaves)
    assert all(name.endswith(leaves) for name in names)
    assert {name: value.shape for name, value in updates(encoder)} == {name: parameters[name].shape for name in names}
    assert {name: id(buffer) for name, buffer in encoder.named_buffers()} == {
        name: id(buffer) for name, buffer in buffers.items()
    }
    own_names = {own for own in parameters if own not in names}
    assert own_names <= {name for name, _ in encoder.named_parameters()}


def test_a_weight_at_the_root_keeps_its_name():
    layer = nn.Linear(4, 3)
    assert LoRA(rank=1, on=Matching("weight")).inject(layer) == ("weight",)
    assert set(own_parameters(layer)) == {"weight", "bias"}
    assert [name for name, _ in updates(layer)] == ["weight"]


def test_other_parametrisations_are_nobodys_updates():
    encoder = nn.ModuleDict({"normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "free": nn.Linear(3, 2)})
    parameters = dict(encoder.named_parameters())
    LoRA(rank=1, on=Matching("free.weight")).inject(encoder)
    assert set(own_parameters(encoder)) == set(parameters)
    assert [name for name, _ in updates(encoder)] == ["free.weight"]


def test_without_lora_there_are_no_updates(plain):
    assert list(updates(plain())) == []
    clear_updates(plain())


@pytest.mark.parametrize("kind", ["open_clip, with MLPs", "separate", "weights read from outside", "convolutions"])
def test_gradients_reach_the_factors_alone(kind, adapted):
    encoder = adapted(kind)
    train(encoder, steps=1)
    encoder.zero_grad()
    encoder(IMAGES).square().sum().backward()
    names = [name for name, _ in updates(encoder)]
    assert len(factors(encoder)) == 2 * len(names)
    assert all(factor.grad is not None and factor.grad.any() for factor in factors(encoder).values())
    assert all(value.grad is None for value in own_parameters(encoder).values())


def test_training_leaves_the_frozen_weights_bit_for_bit(plain, adapted):
    same(dict(plain().named_parameters()), own_parameters(train(adapted(), steps=3)))


def test_other_weights_to_start_from(plain, adapted):
    encoder, original = train(adapted()), plain()
    with torch.no_grad():
        for value in own_parameters(encoder).values():
            value.mul_(1.1)
        for value in original.parameters():
            value.mul_(1.1)
        expected = functional_call(original, merged(encoder), IMAGES)
        torch.testing.assert_close(encoder(IMAGES), expected, rtol=0, atol=1e-10)
        drawn = {name: factor.clone() for name, factor in factors(encoder).items() if name.endswith("A")}
        clear_updates(encoder)
        torch.testing.assert_close(encoder(IMAGES), original(IMAGES), rtol=0, atol=1e-12)
    same({name: factor for name, factor in factors(encoder).items() if name.endswith("A")}, drawn)
    assert not any(factor.any() for name, factor in factors(encoder).items() if name.endswith("B"))
    assert all(not update.any() for _, update in updates(encoder))
    train(encoder, steps=2)
    assert all(update.any() for _, update in updates(encoder))


def test_batch_statistics_and_modes_behave(plain, adapted):
    encoder, original = adapted("convolutions"), plain("convolutions")
    for network in (encoder, original):
        network.train()(IMAGES)
        network.eval()(IMAGES + 1)
    same(dict(encoder.named_buffers()), dict(original.named_buffers()))
    assert encoder[1].num_batches_tracked == 1
    assert not any(part.training for part in encoder.modules())
    assert all(part.training for part in encoder.train().modules())


def test_the_modes_of_the_encoder_are_kept(plain):
    encoder = plain()
    encoder.transformer.resblocks[0].eval()
    before = {name: part.training for name, part in encoder.named_modules()}
    LoRA(rank=1, dropout=0.9).inject(encoder)
    after = dict(encoder.named_modules())
    assert {name: after[name].training for name in before} == before
    for name, part in after.items():
        if isinstance(part, Update):
            assert part.training == ("resblocks.1" in name)


# The updates


@pytest.mark.parametrize("kind", ["open_clip, with MLPs", "convolutions"])
def test_updates_have_the_rank_and_the_scale(kind, adapted):
    encoder = train(adapted(kind, rank=2, alpha=5.0))
    parts = [part for part in encoder.modules() if isinstance(part, Update)]
    dense = dict(updates(encoder))
    assert len(parts) == len(dense)
    for update, part in zip(dense.values(), parts, strict=True):
        torch.testing.assert_close(update.flatten(1), 2.5 * part.B @ part.A, rtol=0, atol=1e-14)
        assert torch.linalg.matrix_rank(update.flatten(1)) == 2
        assert not update.requires_grad
    with torch.no_grad():
        for value in own_parameters(encoder).values():
            value.fill_(1e9)
    same(dict(updates(encoder)), dense)  # not the rounded difference of two sums


def test_updates_are_computed_one_at_a_time(adapted, monkeypatch):
    encoder, count, compute = adapted(), [], Update.dense

    def counted(self, weight):
        count.append(self)
        return compute(self, weight)

    monkeypatch.setattr(Update, "dense", counted)
    iterator = updates(encoder)
    assert not count
    alive = []
    for number in range(1, 5):
        alive.append(weakref.ref(next(iterator)[1]))
        gc.collect()
        assert len(count) == number
        assert [reference() for reference in alive[:-1]] == [None] * (number - 1)
    assert next(iterator, None) is None


def test_one_update_by_name(adapted, monkeypatch):
    encoder, count, compute = train(adapted()), [], Update.dense
    expected = dict(updates(encoder))
    monkeypatch.setattr(Update, "dense", lambda self, weight: count.append(self) or compute(self, weight))
    assert len(expected) == 4
    same({name: update_of(encoder, name) for name in expected}, expected)
    assert len(count) == 4
    for name in ("conv1.weight", "attn.out_proj.weight", "nothing"):
        assert update_of(encoder, name) is None


def test_updates_do_not_depend_on_where_they_are_computed(adapted):
    encoder = train(adapted(dtype=torch.float32, dropout=0.5), images=IMAGES.float())
    expected = dict(updates(encoder))
    same(dict(updates(encoder.eval())), expected)
    with torch.autocast("cpu", torch.bfloat16):
        same(dict(updates(encoder)), expected)


def test_the_initialisation_is_that_of_linear_layers():
    encoder = nn.Linear(400, 50)
    LoRA(rank=8, on=Matching("weight")).inject(encoder)
    first, second = factors(encoder).values()
    assert (first.shape, second.shape) == ((8, 400), (50, 8))
    assert not second.any()
    bound = 1 / math.sqrt(400)
    assert 0.98 * bound < first.abs().max() <= bound
    assert first.mean().abs() < 0.05 * bound
    torch.testing.assert_close(first.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.05, atol=0)


def test_dropout_takes_whole_input_features_out_of_the_updates_in_training():
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(40, 5))
    LoRA(rank=4, alpha=2.0, dropout=0.25, on=Matching("weight")).inject(encoder)
    nn.init.normal_(factors(encoder)["0.parametrizations.weight.0.B"])
    ((_, update),), frozen = updates(encoder), own_parameters(encoder)["0.weight"]
    drawn = torch.stack([encoder[0].weight - frozen for _ in range(2000)])
    kept = drawn.abs().amax(1) > 1e-5
    torch.testing.assert_close(drawn, kept[:, None] * update / 0.75, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept.float().mean(0), torch.full((40,), 0.75), rtol=0, atol=0.06)
    assert len({tuple(mask.tolist()) for mask in kept}) > 1900
    torch.testing.assert_close(encoder.eval()[0].weight, frozen + update, rtol=0, atol=1e-6)


def test_no_randomness_is_used_without_dropout(adapted):
    encoder = adapted()
    state = torch.random.get_rng_state()
    encoder(IMAGES)
    clear_updates(encoder)
    list(updates(encoder))
    assert torch.equal(torch.random.get_rng_state(), state)


# peft


@pytest.mark.parametrize("kind", ["timm", "convolutions"])
def test_it_is_what_peft_does_with_linear_layers_and_convolutions(kind, plain, adapted):
    peft = pytest.importorskip("peft")
    encoder = adapted(kind, on=Matching(r"(attn.*weight)|(\A[05]\.weight)"))
    names = [name for name, _ in updates(encoder)]
    targets = [name.removesuffix(".weight") for name in names]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    theirs = peft.inject_adapter_in_model(config, plain(kind))
    ours = factors(encoder)
    with torch.no_grad():
        for target in targets:
            layer = theirs.get_submodule(target)
            for letter, factor in {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}.items():
                own = ours[f"{target}.parametrizations.weight.0.{letter}"]
                assert own.numel() == factor.numel()
                factor.copy_(own.reshape(factor.shape))
    train(theirs)
    train(encoder)
    torch.testing.assert_close(encoder(IMAGES), theirs(IMAGES), rtol=0, atol=1e-9)
    for name, update in updates(encoder):
        delta = theirs.get_submodule(name.removesuffix(".weight")).get_delta_weight("default")
        torch.testing.assert_close(update, delta.detach(), rtol=0, atol=1e-9)


# Around it


def test_a_state_dict_brings_everything_back(adapted, tmp_path):
    encoder = train(adapted())
    torch.save(encoder.state_dict(), tmp_path / "state.pt")
    other = adapted()
    assert not torch.equal(other(IMAGES), encoder(IMAGES))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(IMAGES), encoder(IMAGES))
    same(dict(updates(other)), dict(updates(encoder)))


def test_a_copy_is_independent(adapted):
    encoder = train(adapted())
    other = copy.deepcopy(encoder)
    before = {name: update.clone() for name, update in updates(encoder)}
    train(other)
    same(dict(updates(encoder)), before)
    assert set(own_parameters(other)) == set(own_parameters(encoder))
    assert all(not torch.equal(update, before[name]) for name, update in updates(other))


def test_checkpointed_activations_give_the_same_gradients(adapted):
    encoder, other = adapted("timm"), adapted("timm")
    other.set_grad_checkpointing()
    for network in (encoder, other):
        network(IMAGES).square().sum().backward()
    for name, factor in factors(encoder).items():
        torch.testing.assert_close(factor.grad, factors(other)[name].grad, rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_every_factor_takes_part_in_distributed_training(adapted, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        encoder, alone = adapted("open_clip, with MLPs"), adapted("open_clip, with MLPs")
        train(nn.parallel.DistributedDataParallel(encoder), steps=3)
        same(dict(updates(encoder)), dict(updates(train(alone, steps=3))))
    finally:
        torch.distributed.destroy_process_group()


# Refusals


def refusal(call, *arguments, **settings):
    with pytest.raises(ConfigurationError) as error:
        call(*arguments, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "LoRA.rank: expected an integer of at least 1, got 0."),
        ({"rank": 2.0}, "LoRA.rank: expected an integer of at least 1, got 2.0."),
        ({"rank": True}, "LoRA.rank: expected an integer of at least 1, got True."),
        ({"alpha": 0.0}, "LoRA.alpha: expected a positive number, got 0.0."),
        ({"alpha": -1}, "LoRA.alpha: expected a positive number, got -1."),
        ({"alpha": math.inf}, "LoRA.alpha: expected a positive number, got inf."),
        ({"alpha": math.nan}, "LoRA.alpha: expected a positive number, got nan."),
        ({"alpha": "8"}, "LoRA.alpha: expected a positive number, got '8'."),
        ({"dropout": -0.1}, "LoRA.dropout: expected a number in [0, 1), got -0.1."),
        ({"dropout": 1}, "LoRA.dropout: expected a number in [0, 1), got 1."),
        ({"dropout": math.nan}, "LoRA.dropout: expected a number in [0, 1), got nan."),
        ({"dropout": None}, "LoRA.dropout: expected a number in [0, 1), got None."),
    ],
)
def test_numbers_out_of_range(settings, message):
    assert refusal(LoRA, **settings) == message


def test_settings():
    assert LoRA() == LoRA(16, 16.0, 0.0, None)
    assert LoRA(1, 1, 0.99).dropout == 0.99
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRA().rank = 2


def test_a_selection_of_what_has_no_rank(plain):
    encoder = plain()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    message = refusal(LoRA(on=Attention(2)).inject, encoder)
    block = "transformer.resblocks"
    assert message == (
        "LoRA.on: expected floating-point weights of two or more dimensions, got "
        f"{block}.0.attn.in_proj_bias, {block}.0.attn.out_proj.bias, {block}.1.attn.in_proj_bias and 1 more. "
        f"Select only those that LoRA can adapt, e.g. {block}.0.attn.in_proj_weight, {block}.0.attn.out_proj.weight, "
        f"{block}.1.attn.in_proj_weight and 1 more."
    )
    assert list(encoder.state_dict()) == list(before)
    assert all(value.requires_grad for value in encoder.parameters())
    assert "e.g. positional_embedding, proj, conv1.weight and 8 more." in refusal(
        LoRA(on=Matching("ln_")).inject, encoder
    )
    assert "got class_embedding, ln_pre.weight" in refusal(LoRA(on=All()).inject, encoder)
    assert refusal(LoRA(on=All()).inject, nn.LayerNorm(3)) == (
        "LoRA.on: expected floating-point weights of two or more dimensions, got weight, bias. Train in full."
    )


def test_integer_weights():
    encoder = nn.Linear(2, 2)
    encoder.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert "got weight. Train in full." in refusal(LoRA(on=Matching("weight")).inject, encoder)


def test_shared_weights():
    encoder = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3), "third": nn.Linear(3, 3)})
    encoder["second"].weight = encoder["first"].weight
    assert refusal(LoRA(on=Matching("weight")).inject, encoder) == (
        "LoRA.on: expected weights that one layer has for itself, got first.weight, which several layers share. "
        "Leave them out of the selection."
    )
    encoder["fourth"] = encoder["third"]  # the same layer twice is one layer
    assert LoRA(rank=1, on=Matching("third.weight")).inject(encoder) == ("third.weight",)
    assert set(own_parameters(encoder)) == {"first.weight", "first.bias", "second.bias", "third.weight", "third.bias"}


def test_twice(adapted):
    message = "LoRA: expected an encoder without LoRA, got one that has it already."
    assert refusal(LoRA(rank=1).inject, adapted()) == message


def test_nothing_to_adapt():
    assert "expected a network with attention blocks" in refusal(LoRA().inject, nn.Linear(3, 2))


def test_any_selection_will_do():
    class Second(Selection):
        def selects(self, names):
            return lambda name: name == "1.weight"

    encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    LoRA(rank=1, alpha=3, on=Second()).inject(encoder)
    assert [name for name, _ in updates(encoder)] == ["1.weight"]
    train(encoder, images=torch.ones(2, 3, dtype=torch.float64))
    inputs = torch.randn(2, 3, dtype=torch.float64)
    values = merged(encoder)
    expected = F.linear(F.linear(inputs, values["0.weight"], values["0.bias"]), values["1.weight"], values["1.bias"])
    torch.testing.assert_close(encoder(inputs), expected, rtol=0, atol=1e-12)
