"""Captioned images: drawn once, found in the cache afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lit_merge.data import pretraining
from lit_merge.data.embedded.captions import captioned_image
from lit_merge.data.pretraining import CaptionDataModule
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
