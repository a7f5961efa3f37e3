from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders.suite_document import document

from lit_merge.commands.main import main, run
from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.report import Results, report, results_page, summary


class Page(HTMLParser):
    """Tables as rows of (text, attributes), addresses, and how often each tag was opened and closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[tuple[str, dict]]]] = {}
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.titles: list[str] = []
        self._cell: dict | None = None
        self._text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [values[key] for key in ("src", "href", "action", "data") if values.get(key)]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(values["id"], [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "h1", "title"):
            self._cell, self._text = values, ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag in ("td", "th"):
            self.rows[-1].append((self._text, self._cell))
        if tag in ("h1", "title"):
            self.titles.append(self._text)

    def handle_data(self, data):
        self._text += data


def page(data: dict) -> Page:
    found = Page(results_page(Results.from_dict(data)))
    assert not found.open
    return found


def test_tables_hold_the_means_and_spreads_with_all_digits():
    results = Results.from_dict(document())
    accuracies, normalised, *_ = page(document()).tables.values()
    assert [text for text, _ in accuracies[0]] == ["method", "digits", "signs", "mean"]
    assert [row[0][0] for row in accuracies[1:]] == ["zero-shot", "weight average", "task arithmetic", "individual"]
    for rows, by_task, means in (
        (accuracies, results.accuracy, results.mean_accuracy),
        (normalised, results.normalised, results.mean_normalised),
    ):
        for row, method in zip(rows[1:], results.methods(), strict=True):
            expected = [summary(by_task(method, task)) for task in results.tasks] + [summary(means(method))]
            for (text, attributes), (mean, spread) in zip(row[1:], expected, strict=True):
                assert float(attributes["data-value"]) == pytest.approx(100 * mean, rel=1e-9)
                assert text.startswith(f"{100 * mean:.1f}")
                if spread and spread > 1e-12:
                    assert float(attributes["data-spread"]) == pytest.approx(100 * spread, rel=1e-6)
                    assert text.endswith(f"± {100 * spread:.1f}")
                else:
                    assert "±" not in text


def test_best_merged_model_of_a_column_is_bold_and_references_never_are():
    rows = next(iter(page(document()).tables.values()))[1:]
    best = {
        (row[0][0], column) for row in rows for column, cell in enumerate(row) if "best" in cell[1].get("class", "")
    }
    assert best == {("task arithmetic", 1), ("task arithmetic", 2), ("task arithmetic", 3)}


def test_further_references_have_rows_and_are_never_best():
    data = document()
    for seed in data["seeds"].values():
        seed["references"] = {"joint": {"digits": 0.99, "signs": 0.98}}
    rows = next(iter(page(data).tables.values()))[1:]
    assert [row[0][0] for row in rows][-2:] == ["joint", "individual"]
    assert [cell[0] for cell in rows[-2][1:]] == ["99.0", "98.0", "98.5"]
    assert not any("best" in cell[1].get("class", "") for cell in rows[-2])


def test_task_vectors_and_cosines_are_listed():
    *_, vectors, cosines = page(document()).tables.values()
    assert vectors[1][0][0] == "digits"
    assert vectors[1][1][0].startswith("1.300")
    assert [text for text, _ in vectors[1]][3:] == ["110", "10"]
    assert [text for text, _ in cosines[1]] == ["digits", "1.000", "0.100"]


def test_page_needs_no_network_and_forbids_it():
    text = results_page(Results.from_dict(document()))
    assert all(address.startswith(("#", "data:")) for address in Page(text).addresses)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(", text)


def test_names_from_the_file_are_text_and_never_markup():
    hostile = "<img src=x onerror=alert(1)>\"'&"
    data = json.loads(json.dumps(document()).replace("task_arithmetic", "evil"))
    data["name"] = hostile
    data["tasks"] = [hostile, "signs"]
    data["zero_shot"] = {hostile: 0.5, "signs": 0.5}
    data["classes"] = {hostile: 3, "signs": 3}
    for seed in data["seeds"].values():
        for holder in [seed, *seed["merged"].values()]:
            for key in ("individual", "task_vectors", "accuracy"):
                if key in holder:
                    holder[key][hostile] = holder[key].pop("digits")
        seed["merged"]["evil"]["transform"] = "</pre><script>alert(2)</script>"
    found = page(data)
    assert hostile in found.titles[0]
    assert hostile in [text for text, _ in next(iter(found.tables.values()))[0]]
    assert "alert(2)</script>" not in results_page(Results.from_dict(data))


def test_one_seed_has_no_spread():
    text = results_page(Results.from_dict(document(seeds=1)))
    assert "±" not in re.sub(r"<script>.*</script>|<style>.*</style>|data:\S+", "", text, flags=re.DOTALL)
    assert "seed 0, without a spread" in text


def test_same_results_give_the_same_bytes():
    assert results_page(Results.from_dict(document())) == results_page(Results.from_dict(copy.deepcopy(document())))


def test_command_finds_results_in_a_suites_folder_and_shows_its_configuration(tmp_path: Path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(document()), encoding="utf-8")
    (tmp_path / "suite.yaml").write_text("name: embedded\nseeds: [0, 1, 2]  # <three>\n", encoding="utf-8")
    assert main(["report", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "seeds: [0, 1, 2]  # &lt;three&gt;" in text
    picture = tmp_path / "cosine-matrix.svg"
    picture.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    run(["report", "--results", str(tmp_path), "--output", str(tmp_path / "two.html"), "--figures", f"[{picture}]"])
    assert "<figcaption>cosine matrix</figcaption>" in (tmp_path / "two.html").read_text(encoding="utf-8")


def test_refusals_name_what_is_wrong_and_write_nothing(tmp_path: Path):
    source = tmp_path / "results.json"
    with pytest.raises(FileFormatError, match=r"expected a results file, got No such file"):
        report(str(source))
    source.write_text(json.dumps(document()), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"output: expected a path that ends in \.html, got .*page\.pdf"):
        report(str(source), str(tmp_path / "page.pdf"))
    with pytest.raises(ConfigurationError, match=r"expected an existing folder to write into, got none"):
        report(str(source), str(tmp_path / "none" / "page.html"))
    with pytest.raises(ConfigurationError, match=r"figures: expected files that end in \.svg or \.png, got .*results"):
        report(str(source), figures=[str(source)])
    with pytest.raises(ConfigurationError, match=r"got .*gone\.png, which is no file"):
        report(str(source), figures=[str(tmp_path / "gone.png")])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
