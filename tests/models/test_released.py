"""Weights that a command brings: fetched, copied, checked by their hash, and refused in one line."""

from __future__ import annotations

import hashlib
from types import MappingProxyType

import pytest
import torch

from lit_merge.data.published.preparation import prepare
from lit_merge.errors import ConfigurationError, DataError
from lit_merge.models import load_clip, save_clip
from lit_merge.models import released as module
from lit_merge.models.encoder import full_clip_model
from lit_merge.models.released import RELEASED, Release, released_weights


def pinned(monkeypatch, url: str, sha256: str) -> None:
    table = MappingProxyType({"lit-small": Release("lit-small", url, sha256)})
    for place in ("lit_merge.models.released", "lit_merge.data.published.preparation", "lit_merge.models.encoder"):
        monkeypatch.setattr(f"{place}.RELEASED", table)


def test_the_table():
    assert list(RELEASED) == ["lit-small"]
    assert RELEASED["lit-small"].url.startswith("https://")
    assert RELEASED["lit-small"].sha256 == "" or len(bytes.fromhex(RELEASED["lit-small"].sha256)) == 32


def test_fetched_checked_and_loaded(own_cache, tmp_path, monkeypatch, capsys):
    whole, _ = full_clip_model("lit-small")
    path = save_clip(tmp_path / "made.safetensors", whole.state_dict())
    assert path.stat().st_size < 15 << 20
    pinned(monkeypatch, path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest())
    missing = (
        r"^lit-small: expected its weights at .*weights/lit-small.safetensors, got none. Run: lit-merge data prepare "
        r"lit-small \(with --file FILE if you have them already\), or pre-train some with "
        r"configs/pretrain/lit_small.yaml and set pretrained to their file.$"
    )
    with pytest.raises(ConfigurationError, match=missing):
        load_clip("lit-small")
    assert prepare(["lit-small"]) == ()
    clip = load_clip("lit-small")
    assert (clip.name, clip.pretrained, clip.preprocessing.image_size) == ("lit-small", "shipped", 32)
    expected = whole.visual.conv1.weight.half().float()
    assert torch.equal(clip.visual.conv1.weight, expected)
    assert len(clip.visual.transformer.resblocks) == 12
    prepare(["lit-small"])
    assert "is there already" in capsys.readouterr().out
    (own_cache / "weights/lit-small.safetensors").write_bytes(b"other")
    with pytest.raises(ConfigurationError, match=r"expected the weights with the SHA-256 .* Remove the file and"):
        released_weights("lit-small")
    prepare(["lit-small"], file=str(path))
    assert released_weights("lit-small").read_bytes() == path.read_bytes()


def test_refusals(own_cache, tmp_path, monkeypatch):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"other")
    pinned(monkeypatch, (tmp_path / "nothing").as_uri(), "0" * 64)
    with pytest.raises(DataError, match=r"expected to download its weights from file://.*, got .*--file FILE\.$"):
        prepare(["lit-small"])
    with pytest.raises(
        DataError, match=r"lit-small: expected weights with the SHA-256 0{64}, got .* set pretrained to"
    ):
        prepare(["lit-small"], file=str(path))
    with pytest.raises(ConfigurationError, match="file: expected a copy of the weights of lit-small, got gone"):
        prepare(["lit-small"], file="gone")
    with pytest.raises(
        ConfigurationError, match="file: expected only with lit-small as the one name, got it with mnist"
    ):
        prepare(["mnist"], file=str(path))
    pinned(monkeypatch, path.as_uri(), "0" * 64)
    monkeypatch.setattr(module, "_LARGEST", 3)
    with pytest.raises(DataError, match=r"expected at most 3 bytes, got more. It is not the released file."):
        prepare(["lit-small"])
    assert not list((own_cache / "weights").iterdir())
