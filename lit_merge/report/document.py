"""One HTML file that needs no network: sections with figures, tables that sort, and lists."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lit_merge.errors import ConfigurationError

__all__ = ["Cell", "Section", "Table", "address_of", "definitions", "document", "drawn_figure", "drawn_table"]

_ASSETS = Path(__file__).parent / "assets"
_KINDS = {".svg": "svg+xml", ".png": "png"}

Section = tuple[str, str, str]
"""Key, title and content, which is HTML."""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what it is sorted and copied by."""

    text: str
    value: float | str = ""
    spread: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page; the first cell of a row is its heading."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def document(title: str, lines: Iterable[str], sections: Sequence[Section]) -> str:
    """The whole page as text; a policy in it forbids whatever is not part of it.

    Args:
        title: of the page.
        lines: below it, text.
        sections: in this order, with links to each.
    """
    links = "".join(f'<li><a href="#{key}">{escape(name)}</a></li>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(name)}</h2>\n{content}</section>\n' for key, name, content in sections
    )
    style, script = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    below = "".join(f'<p class="quiet">{escape(line)}</p>\n' for line in lines)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n{below}<nav><ul>{links}</ul></nav></header>\n"
        f"<main>\n{body}</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def drawn_table(table: Table, number: int) -> str:
    """A table whose columns sort and that can be copied as CSV; wider than the window, it scrolls in its box."""
    name = f"values-{number}"
    head = "".join(f'<th scope="col" aria-sort="none"><button>{escape(one)}</button></th>' for one in table.columns)
    body = "".join(f"<tr>{''.join(_html(cell, at == 0) for at, cell in enumerate(row))}</tr>\n" for row in table.rows)
    return (
        f'<div class="bar"><p class="quiet">{escape(table.note)}</p>'
        f'<button class="copy" data-table="{name}">Copy as CSV</button></div>\n'
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table id="{name}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )


def _html(cell: Cell, heading: bool) -> str:
    value = f"{cell.value:.10g}" if isinstance(cell.value, float) else cell.value
    text = escape(cell.text)
    if heading:
        return f'<th scope="row" data-value="{escape(value)}">{text}</th>'
    spread = ""
    if cell.spread is not None:
        digits = len(cell.text.partition(".")[2])
        text += f" <small>± {cell.spread:.{digits}f}</small>"
        spread = f' data-spread="{cell.spread:.10g}"'
    best = ' class="best"' if cell.best else ""
    return f'<td data-value="{escape(value)}"{spread}{best}>{text}</td>'


def drawn_figure(caption: str, address: str) -> str:
    """A picture, given by its data address, with a caption; wider than the window, it scrolls in its box."""
    return (
        f'<figure><div class="picture" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<img src="{address}" alt="{escape(caption)} The numbers are in the tables."></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def definitions(entries: Mapping[str, str]) -> str:
    """A list of names and what they are; the latter is HTML."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{text}</dd>' for name, text in entries.items())}</dl>\n"


def address_of(path: str | os.PathLike[str]) -> str:
    """A picture file as a data address.

    Raises:
        ConfigurationError: it is no ``.svg`` or ``.png``, or is missing.
    """
    source = Path(path)
    if source.suffix not in _KINDS or not source.is_file():
        raise ConfigurationError(
            f"figures: expected files that end in {' or '.join(_KINDS)}, got {source}"
            f"{'' if source.is_file() else ', which is no file'}."
        )
    return f"data:image/{_KINDS[source.suffix]};base64,{base64.b64encode(source.read_bytes()).decode()}"
