from __future__ import annotations

import hashlib
import random
import re

from lit_merge.data.packaged import division
from lit_merge.data.packaged.division import divided, same_text

WORDS = [f"{first}{second}o" for first in "bcdfgklmnprst" for second in "aeiouy"]


def texts(count: int, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=12)) for _ in range(count)]


def test_same_texts_and_others() -> None:
    assert same_text("Re: HELLO, 12 world!  http://x.org @you #now") == "re hello world"
    assert same_text("ﬁne Straße") == "fine strasse"
    assert same_text(" ".join(["a", "b"] * 40)) == " ".join(["a", "b"] * 15)


def test_the_split_is_the_hash_of_the_words_and_nothing_else() -> None:
    pairs = [(text, "ab"[index % 2]) for index, text in enumerate(texts(700))]
    splits = divided(pairs, ["a", "b"])
    for split, examples in splits.items():
        for one in examples:
            number = int(hashlib.sha256(same_text(one.text).encode()).hexdigest()[:15], 16) % 7
            assert split == ("train" if number < 4 else "val" if number == 4 else "test")
    shuffled = random.Random(1).sample(pairs, len(pairs))
    assert divided(shuffled, ["a", "b"]) == splits  # order is no matter
    fewer = divided(pairs[:300], ["a", "b"])
    assert all(one in splits[split] for split in fewer for one in fewer[split])
    assert sum(map(len, splits.values())) == 700
    assert 330 < len(splits["train"]) < 470


def test_the_order_says_nothing_about_classes(monkeypatch) -> None:
    monkeypatch.setattr(division, "CAPS", {"train": 200, "val": 50, "test": 100})
    pairs = [(text, "common" if index % 5 else "rare") for index, text in enumerate(texts(900))]
    train = divided(pairs, ["common", "rare"])["train"]
    rare = [one.label == "rare" for one in train]
    assert len(train) == 200
    assert sum(rare) in (99, 100, 101)  # as many of each as there are
    assert 0.35 < sum(rare[:100]) / 100 < 0.65


def test_copies_near_copies_and_contradictions() -> None:
    first, second, third = texts(3, seed=4)
    near = f"{first} indeed"
    pairs = [(first, "a"), (first.upper() + "!", "a"), (near, "a"), (second, "a"), (second, "b"), (third, "b")]
    kept = [one for examples in divided(pairs, ["a", "b"]).values() for one in examples]
    assert len(kept) == 2
    assert {one.label for one in kept} == {"a", "b"}
    assert third in [one.text for one in kept]
    assert second not in [one.text for one in kept]


def test_short_texts_other_labels_caps_and_lengths() -> None:
    pairs = [("two words", "a"), ("three whole words", "a"), ("of another class", "c"), ("", "a")]
    assert [one.text for split in divided(pairs, ["a"]).values() for one in split] == ["three whole words"]
    many = [(text, "a") for text in texts(50)]
    assert sum(map(len, divided(many, ["a"], per_class=20).values())) == 20
    cut = [one.text for split in divided(many, ["a"], longest=20).values() for one in split]
    assert all(len(text) <= 20 and re.fullmatch(r"(\w+ )*\w+", text) for text in cut)
    whole = " ".join(text.split()[0] for text in cut)
    assert set(whole.split()) <= set(WORDS)
    assert (
        divided([("x" * 30 + " b c", "a")], ["a"], longest=20)["train"]
        + divided([("q" * 30 + " b c", "a")], ["a"])["val"]
        is not None
    )
