"""The one cache: found by all that a result depends on, verified, and never trusted when it is damaged."""

from __future__ import annotations

import json

import pytest
import torch

from lit_merge.errors import WriteError
from lit_merge.files.cache import Cache

CONTENT = [1, "encoder", ["cat", "dog"], None, 0.5]


@pytest.fixture
def cache(tmp_path):
    return Cache("things", tmp_path / "things")


def store(cache, kind, key, number=1.0):
    if kind == "tensors":
        cache.write_tensors(key, {"a": torch.full((3,), number)})
    else:
        cache.write_value(key, {"a": [number, None]})


def stored(cache, kind, key):
    return cache.tensors(key) if kind == "tensors" else cache.value(key)


def test_the_folder_is_below_the_users(own_cache):
    key = Cache.key(CONTENT)
    Cache("things").write_value(key, 1)
    assert [path.name for path in (own_cache / "things").iterdir()] == [f"{key}.json"]


def test_the_key_depends_on_everything():
    others = [[2, *CONTENT[1:]], CONTENT[:-1], [*CONTENT[:2], ["dog", "cat"], None, 0.5], {"content": CONTENT}]
    assert len({Cache.key(content) for content in [CONTENT, *others]}) == 5
    assert Cache.key(CONTENT) == Cache.key(json.loads(json.dumps(CONTENT)))


@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_what_is_stored_is_found(cache, kind):
    key = cache.key(CONTENT)
    assert stored(cache, kind, key) is None
    store(cache, kind, key)
    found = stored(cache, kind, key)
    if kind == "tensors":
        torch.testing.assert_close(found, {"a": torch.ones(3)}, rtol=0, atol=0)
    else:
        assert found == {"a": [1.0, None]}
    store(cache, kind, key, 2.0)
    assert stored(cache, kind, key)["a"][0] == 2
    assert stored(cache, kind, cache.key([])) is None
    assert len(list(cache.folder.iterdir())) == 1


@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_damaged_or_foreign_entry_is_missing(cache, kind):
    key, other = cache.key(CONTENT), cache.key([])
    store(cache, kind, key)
    (file,) = cache.folder.iterdir()
    whole = file.read_bytes()
    (cache.folder / file.name.replace(key, other)).write_bytes(whole)
    assert stored(cache, kind, other) is None
    nested = b"[" * 100_000
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * 40, b"[]", b"null", nested, b'{"value": 1}'):
        file.write_bytes(damaged)
        assert stored(cache, kind, key) is None
    if kind == "tensors":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert stored(cache, kind, key) is None
    file.unlink()
    file.mkdir()
    assert stored(cache, kind, key) is None
    file.rmdir()
    store(cache, kind, key)
    assert stored(cache, kind, key) is not None


@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_full_disk_is_said_with_the_path(cache, kind, full_disk):
    with pytest.raises(WriteError, match=rf"{cache.folder}/\w{{64}}\.\w+: expected room for .* bytes"), full_disk():
        store(cache, kind, cache.key(CONTENT))
    assert list(cache.folder.iterdir()) == []
