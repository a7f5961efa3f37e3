"""Linearised language models in float64 against dense Jacobians and plain ``torch.func.jvp``, with every mask."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from builders.language_folders import KINDS, in_double, language_model, tokenizer
from torch.func import functional_call, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.functional import linearize
from lit_merge.functional.tokens import answer_scores, answers_first
from lit_merge.models import Attention
from lit_merge.models.language.modules import CausalModule, EncoderDecoderModule, PooledEncoder
from lit_merge.models.language.tokenization import Tokenization

NETWORKS = ["bert", "t5", "gpt2", "llama"]
OTHERS = ["roberta", "distilbert", "modernbert", "flan-t5"]
MODULES = {"encoder": PooledEncoder, "encoder_decoder": EncoderDecoderModule, "causal": CausalModule}


def built(name, attention="sdpa", module=None, **settings):
    kind = KINDS.get(name, "encoder")
    model = in_double(language_model(name, **settings))
    model.set_attn_implementation(attention)
    return (module or MODULES[kind])(model), Tokenization(tokenizer(kind), kind, 24, 8, start_id=0)


def batch(tokenization, ranked=False):
    """Texts of different lengths, so that some of each batch is padding."""
    sources = ["a b c w3", "b"] if tokenization.kind == "causal" else ["a b c w3 d", "b"]
    if tokenization.kind == "encoder":
        return tokenization.padded(tokenization.encode(sources).input_ids)[0]
    encoded = tokenization.encode(sources, ["c d", "w1"], ended=not ranked)
    if ranked:
        return tokenization.padded_answers(encoded.input_ids, [encoded.target_ids, encoded.target_ids[:1]])
    return tokenization.padded(encoded.input_ids, encoded.target_ids)[0]


def own(module):
    return {name: value.detach() for name, value in module.named_parameters()}


def drawn(module, names=None):
    draw = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(value.shape, generator=draw, dtype=torch.float64).requires_grad_()
        for name, value in own(module).items()
        if names is None or name in names
    }


def gradients(value, tangent, tau):
    loss = ((value + tangent).tanh().square() + tangent.sin()).sum()
    found = torch.autograd.grad(loss, list(tau.values()), allow_unused=True)
    return [torch.zeros_like(one) if got is None else got for one, got in zip(tau.values(), found, strict=True)]


def check(found, expected, what):
    size = max(1.0, float(expected.detach().abs().max()))
    assert float((found - expected).detach().abs().max()) <= 1e-10 * size, what


def check_against(expected, module, tau, inputs):
    value, tangent = linearize(module, {}, tau, *inputs)
    check(value, expected[0], "value")
    check(tangent, expected[1], "tangent")
    for name, got, true in zip(tau, gradients(value, tangent, tau), gradients(*expected, tau), strict=True):
        check(got, true, name)


def by_jvp(module, tau, inputs):
    base = own(module)
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(lambda part: functional_call(module, {**base, **part}, inputs), ({n: base[n] for n in tau},), (tau,))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dense_jacobian_gives_the_same(name):
    module, tokenization = built(name)
    inputs, base, tau = batch(tokenization), own(module), drawn(module)
    with sdpa_kernel(SDPBackend.MATH):
        value = module(*inputs).detach()
        jacobian = jacrev(lambda chosen: functional_call(module, chosen, inputs), chunk_size=64)(base)
    tangent = sum(jacobian[key].reshape(value.numel(), -1) @ tau[key].flatten() for key in tau).view_as(value)
    check_against((value, tangent), module, tau, inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
def test_plain_forward_mode_gives_the_same(name, attention):
    module, tokenization = built(name, attention)
    inputs = batch(tokenization)
    for names in (None, Attention(1)(own(module))):
        tau = drawn(module, names)
        check_against(by_jvp(module, tau, inputs), module, tau, inputs)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_answers_that_are_ranked(name):
    module, tokenization = built(name)
    inputs, tau = batch(tokenization, ranked=True), drawn(module)
    check_against(by_jvp(module, tau, inputs), module, tau, inputs)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooled_features_of_length_1(pooling):
    module, tokenization = built("bert", module=partial(PooledEncoder, pooling=pooling, normalize=True))
    inputs, tau = batch(tokenization), drawn(module)
    check_against(by_jvp(module, tau, inputs), module, tau, inputs)
    assert torch.allclose(module(*inputs).norm(dim=1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_changes_nothing(name):
    module, tokenization = built(name)
    tau = drawn(module)
    wide = batch(tokenization)
    for row in range(2):
        text = [one[row : row + 1] for one in wide]
        length = int(text[1].sum())
        count = int((text[2] >= 0).sum()) if len(text) > 2 else 0
        narrow = [text[0][:, :length], text[1][:, :length], *(one[:, :count] for one in text[2:])]
        for whole, alone in zip(linearize(module, {}, tau, *wide), linearize(module, {}, tau, *narrow), strict=True):
            if count:
                assert not whole[row, count:].any()
            check(whole[row, : alone.shape[1]] if count else whole[row], alone[0], name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_logits_are_those_of_transformers(name):
    module, tokenization = built(name)
    inputs = batch(tokenization)
    logits = module(*inputs)
    if name == "t5":
        keywords = {"decoder_input_ids": inputs[2].clamp(min=0)}
        whole = module.of_transformers(input_ids=inputs[0], attention_mask=inputs[1], **keywords).logits
    else:
        whole = module.of_transformers(input_ids=inputs[0], attention_mask=inputs[1]).logits
        whole = torch.stack([row[places.clamp(min=0)] for row, places in zip(whole, inputs[2], strict=True)])
    check(logits, whole * (inputs[2] >= 0).unsqueeze(-1), name)
    ids, mask, _ = inputs
    if name != "t5":  # all positions
        everywhere = module.of_transformers(input_ids=ids, attention_mask=mask).logits
        check(module(ids, mask), everywhere * mask.unsqueeze(-1), name)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_answers_scores_are_sums_of_their_tokens_log_probabilities(name):
    module, tokenization = built(name)
    sources, answers = ["a b c", "d"], [["c d", "w1"], ["w1"]]
    encoded = [
        tokenization.encode([source], [answer], ended=False)
        for source, own in zip(sources, answers, strict=True)
        for answer in own
    ]
    expected = []
    for one in encoded:
        inputs, targets = tokenization.padded(one.input_ids, one.target_ids)
        tokens = module(*inputs).log_softmax(-1)[0].gather(-1, targets[0].unsqueeze(-1))
        expected.append((tokens.sum(), tokens.mean()))
    ids = [tokenization.encode([source], ["a"]).input_ids[0] for source in sources]
    tokens = [[tokenization.encode(["a"], [answer], ended=False).target_ids[0] for answer in own] for own in answers]
    features = module(*tokenization.padded_answers(ids, tokens))
    for which, mean in enumerate((False, True)):
        scores = answer_scores(features, mean)
        found = [scores[0, 0], scores[0, 1], scores[1, 0]]
        check(torch.stack(found), torch.stack([one[which] for one in expected]), name)
        assert scores.softmax(-1)[1].tolist() == [1, 0]
        loss = scores.softmax(-1).square().sum()
        assert all(torch.isfinite(one).all() for one in torch.autograd.grad(loss, features, retain_graph=True))


def test_the_order_of_answers_first_is_linear():
    draw = torch.Generator().manual_seed(0)
    value, tangent = torch.randn(2, 2, 3, 2, 5, generator=draw, dtype=torch.float64)
    answers = torch.tensor([[[4, 0], [1, -1], [-1, -1]], [[2, 2], [0, 1], [3, -1]]])
    derivative = jvp(lambda logits: answers_first(logits, answers), (value,), (tangent,))[1]
    together = answers_first(value + tangent, answers)
    check(together, answers_first(value, answers) + derivative, "sum")
    assert not derivative[0, 2].any()
