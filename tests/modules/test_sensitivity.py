"""Fine-tuning of the least sensitive elements: the masks against their definition, and what training leaves alone."""

from __future__ import annotations

import pytest
import torch

from lit_merge.errors import ConfigurationError, DataError
from lit_merge.models import Matching, Preprocessing, TaLoS
from lit_merge.modules import FineTuneModule, MultiTaskModule
from lit_merge.modules.sensitivity import least_sensitive

DOUBLE = torch.float64


@pytest.fixture
def module(tiny_encoder, tiny_head):
    """``module(**settings)``: a FineTuneModule around the tiny encoder, in float64."""

    def build(**settings):
        return FineTuneModule(
            encoder=tiny_encoder(dtype=DOUBLE),
            preprocessing=Preprocessing(image_size=4),
            **{"head": tiny_head(dtype=DOUBLE), "learning_rate": 0.03, "warmup_fraction": 0.0, **settings},
        )

    return build


def test_masks_are_those_of_the_definition(tiny_encoder, tiny_head) -> None:
    encoder, head = tiny_encoder(dtype=DOUBLE), tiny_head(dtype=DOUBLE)
    images = torch.randn(5, 3, 4, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    start = {name: value.detach().clone() for name, value in encoder.named_parameters()}
    found = least_sensitive(encoder, head, lambda: [(images[:2],), (images[2:],)], list(start), 0.25, 2, seed=4)
    total = sum(value.numel() for value in start.values())
    kept = {name: torch.ones_like(value, dtype=torch.bool) for name, value in start.items()}
    for number in (1, 2):
        generator = torch.Generator().manual_seed(4 + number)
        weights = {n: torch.where(kept[n], v, 0.1 * v).requires_grad_() for n, v in start.items()}
        scores = {name: torch.zeros_like(value) for name, value in start.items()}
        for image in images:
            logits = head(torch.func.functional_call(encoder, weights, (image[None],)))[0]
            drawn = int(torch.multinomial(logits.detach().softmax(0), 1, generator=generator))
            for name, gradient in zip(scores, torch.autograd.grad(logits[drawn], list(weights.values())), strict=True):
                scores[name] += gradient.square()
        left = torch.cat([scores[name][kept[name]] for name in scores]).sort().values
        threshold = left[round(0.25 ** (number / 2) * total) - 1]
        kept = {name: kept[name] & (scores[name] <= threshold) for name in scores}
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.25 * total)
    for name, value in encoder.named_parameters():
        assert torch.equal(found[name], kept[name])
        assert torch.equal(value, start[name])
        assert value.grad is None


@pytest.mark.parametrize("linearized", [False, True])
def test_the_other_elements_stay(linearized, module, tiny_data, silent_trainer, tmp_path) -> None:
    selection = TaLoS(0.3, Matching("weight"), examples=6, rounds=2)
    tuned, trainer = (
        module(trainable=selection, linearized=linearized),
        silent_trainer(max_steps=3, precision="64-true"),
    )
    assert repr(selection) in tuned.regime
    trainer.fit(tuned, datamodule=tiny_data(dtype=DOUBLE))
    masks, vector = tuned.masks, dict(tuned.task_vector())
    assert set(masks) == {"inner.weight", "outer.weight"}
    for name, value in vector.items():
        moves = masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert not value[~moves].any()  # by weight decay neither
        assert not moves.any() or value[moves].ne(0).float().mean() > 0.9
    elements = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * elements)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    assert set(torch.load(tmp_path / "tuned.ckpt", weights_only=True)["masks"]) == set(masks)
    again = module(trainable=TaLoS(0.3, Matching("weight"), 6, 2, seed=9), linearized=linearized)
    more = silent_trainer(max_steps=4, precision="64-true")
    more.fit(again, datamodule=tiny_data(dtype=DOUBLE), ckpt_path=tmp_path / "tuned.ckpt", weights_only=True)
    for name, mask in masks.items():  # of the checkpoint, not found again
        assert torch.equal(again.masks[name], mask)
        assert not again.task_vector()[name][~mask].any()


def test_what_cannot_be_is_refused(tiny_encoder, tiny_head) -> None:
    for settings, part in (
        ({"fraction": 0}, r"^TaLoS.fraction: expected a number in \(0, 1\], got 0"),
        ({"examples": 0}, r"^TaLoS.examples: expected an integer of at least 1, got 0"),
        ({"rounds": 1.5}, r"^TaLoS.rounds: expected an integer of at least 1, got 1.5"),
    ):
        with pytest.raises(ConfigurationError, match=part):
            TaLoS(**settings)
    with pytest.raises(ConfigurationError, match=r"^trainable: expected whole parameters with MultiTaskModule"):
        MultiTaskModule(encoder=tiny_encoder(), heads={"a": tiny_head()}, trainable=TaLoS())
    with pytest.raises(DataError, match=r"^TaLoS: expected at least one training example, got none"):
        least_sensitive(tiny_encoder(), tiny_head(), list, ["inner.weight"])
    batch, head = [(torch.randn(1, 1, 6),)], torch.nn.Linear(6, 6)
    with pytest.raises(ConfigurationError, match=r"^TaLoS: expected logits \[1, C\] of one example, got \[1, 1, 6\]"):
        least_sensitive(head, torch.nn.Identity(), lambda: batch, ["weight"])
