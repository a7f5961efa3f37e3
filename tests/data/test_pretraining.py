"""Captioned images: drawn once, found in the cache afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lit_merge.data import pretraining
from lit_merge.data.embedded.captions import captioned_image
from lit_merge.data.pretraining import CaptionDataModule, augment_strongly
from lit_merge.errors import ConfigurationError
from lit_merge.models.encoder import Preprocessing


def test_images_are_drawn_once_and_damage_is_mended(own_cache, monkeypatch):
    drawn = []
    monkeypatch.setattr(pretraining, "captioned_image", lambda *of: drawn.append(of) or captioned_image(*of))
    said = []
    model = SimpleNamespace(
        tokenizer=lambda texts: said.extend(texts) or torch.arange(len(texts))[:, None], preprocessing=Preprocessing(32)
    )
    for calls in (12, 12):
        data = CaptionDataModule(count=12, batch_size=4, seed=3, workers=0)
        data.trainer = SimpleNamespace(lightning_module=model, global_rank=0, world_size=1)
        data.prepare_data()
        data.setup("fit")
        assert len(drawn) == calls
        for index in range(12):
            image, caption = captioned_image(index, 3)
            assert torch.equal(data.images[index], torch.from_numpy(image).permute(2, 0, 1))
            assert said[int(data.captions[index])] == caption
    batches = list(data.train_dataloader())
    assert [len(images) for images, _, _ in batches] == [4, 4, 4]
    for file in (own_cache / "pretraining").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        data.prepare_data()
        assert file.read_bytes() == whole
    assert len(drawn) == 36


class Kept(L.LightningModule):
    """Takes every image's caption's number, and changes nothing."""

    tokenizer, preprocessing = staticmethod(lambda texts: torch.arange(len(texts))[:, None]), Preprocessing(32)

    def __init__(self):
        super().__init__()
        self.weight, self.epochs = torch.nn.Parameter(torch.zeros(())), {}

    def training_step(self, batch, batch_idx):
        _, tokens, of_image = batch
        self.epochs.setdefault(self.current_epoch, []).extend(tokens[of_image][:, 0].tolist())
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_every_epoch_has_an_order_of_its_own(own_cache, silent_trainer):
    kept = Kept()
    silent_trainer(max_epochs=3).fit(kept, CaptionDataModule(count=24, batch_size=4, seed=2, workers=0))
    assert [sorted(order) == sorted(kept.epochs[0]) for order in kept.epochs.values()] == [True] * 3
    assert len({tuple(order) for order in kept.epochs.values()}) == 3


def test_images_are_augmented_where_the_batch_is(own_cache):
    """The numbers of images go to the device, their pixels are there, and every batch has its own augmentation."""
    model = SimpleNamespace(tokenizer=lambda texts: torch.arange(len(texts))[:, None], preprocessing=Preprocessing(32))
    data = CaptionDataModule(count=8, batch_size=4, seed=1, workers=0, fine=0.5)
    data.trainer = SimpleNamespace(lightning_module=model, global_rank=0, world_size=1)
    data.prepare_data()
    data.setup("fit")
    generator = torch.Generator().manual_seed(1)
    for chosen, tokens, caption_of_image in data.train_dataloader():
        images, same_tokens, same_captions = data.on_after_batch_transfer((chosen, tokens, caption_of_image), 0)
        expected = augment_strongly(data.images[chosen].float() / 255, generator)
        mean, std = torch.tensor(Preprocessing(32).mean), torch.tensor(Preprocessing(32).std)
        torch.testing.assert_close(images, (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        assert same_tokens is tokens
        assert torch.equal(tokens[same_captions][:, 0], data.captions[chosen])


def test_a_fraction_that_is_none():
    with pytest.raises(ConfigurationError, match=r"fine: expected a fraction in \[0, 1\], got 1.5. Use e.g. 0.5."):
        CaptionDataModule(count=8, batch_size=4, fine=1.5)
