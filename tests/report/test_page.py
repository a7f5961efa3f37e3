from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from builders.suite_document import document

import lit_merge.report
from lit_merge.commands.main import main, run
from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.models.network import ClipNetwork
from lit_merge.report import Results, report, results_page, summary
from lit_merge.vectors import TaskVector

ASSETS = Path(lit_merge.report.__file__).parent / "assets"


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
    assert "lit-merge suite --config suite.yaml --output FOLDER" in text  # the file does not name its own
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


def rules(width: int) -> dict[str, dict[str, str]]:
    """Selector -> what the style sheet says of it in a window of so many pixels, at 16 pixels per rem."""
    text = re.sub(r"/\*.*?\*/", "", (ASSETS / "page.css").read_text(encoding="utf-8"), flags=re.DOTALL)
    found: dict[str, dict[str, str]] = {}
    for condition, inside in re.findall(r"@media ([^{]+)\{((?:[^{}]*\{[^{}]*\})*)\s*\}", text):
        most = re.search(r"max-width: ([\d.]+)rem", condition)
        text = text.replace(f"@media {condition}{{{inside}}}", "")
        if most and width <= 16 * float(most[1]):
            text += inside
    for selectors, declarations in re.findall(r"([^{}]+)\{([^{}]*)\}", text):
        said = dict(re.findall(r"([\w-]+):\s*([^;]+);?", declarations))
        for selector in selectors.split(","):
            found.setdefault(" ".join(selector.split()), {}).update(said)
    return found


def test_what_is_wider_than_a_narrow_window_scrolls_in_its_own_box():
    """Figures, tables and files are the only things that cannot be made as narrow as a telephone."""
    style = rules(420)
    text = results_page(Results.from_dict(document()), {}, "name: embedded\n", [("more", "data:image/png;base64,")])
    for box in (".picture", ".table", "pre"):
        assert (style[box]["overflow-x"], style[box]["max-width"]) == ("auto", "100%")
    body = text[text.index("<main>") : text.index("</main>")]
    assert body.count("<table") == body.count('<div class="table" tabindex="0"') > 0
    assert body.count("<img") == body.count('<div class="picture" tabindex="0"') == 2
    for selector, said in style.items():
        inside = any(box in selector for box in (".picture", "td", "th", "button", ".scrolls"))
        assert inside or "nowrap" not in said.get("white-space", "")
        assert inside or said.get("min-width", "0") == "0"
        assert "max-content" not in said.get("grid-template-columns", "")
    for name in ("h1", "h2", "dt", "dd", "code", "figcaption"):  # long names break
        assert style[name]["overflow-wrap"] == "anywhere"
    assert 'classList.toggle("scrolls"' in text
    assert "sideways" in style[".scrolls::before"]["content"]


ANALYSES = ["cosine", "norms", "signs", "accuracy", "paths", "tau_jp", "advantage", "disentanglement"]


@pytest.fixture(scope="module")
def analysis(tmp_path_factory, clip_config, clip_weights, few_images) -> Path:
    """The folder of a small analysis of two vectors, with every analysis that needs no coefficients."""
    folder = tmp_path_factory.mktemp("analysis")
    network = ClipNetwork(clip_config, clip_weights)
    names = []
    for seed, task in enumerate(("digits", "land")):
        torch.manual_seed(seed)
        noise = {name: 0.02 * torch.randn_like(value) for name, value in network.parameters.items()}
        known = {"base_model": network.name, "base_fingerprint": network.fingerprint}
        TaskVector(noise, task, metadata=known).save(folder / f"{task}.safetensors")
        names.append(str(folder / f"{task}.safetensors"))
    settings = {
        "vectors": names,
        "output": str(folder / "A"),
        "analyses": ANALYSES,
        "model": clip_config,
        "pretrained": clip_weights,
        "images": None,
        "grid": {"steps": 2},
        "paths": {"points": 2},
    }
    (folder / "analysis.yaml").write_text(json.dumps(settings), encoding="utf-8")
    assert main(["analyze", "--config", str(folder / "analysis.yaml")]) == 0
    return folder / "A"


def test_an_analysis_has_a_page_too(analysis: Path, tmp_path: Path, capsys):
    assert main(["report", "--results", str(analysis)]) == 0
    assert capsys.readouterr().out == f"{analysis / 'report.html'}\n"
    text = (analysis / "report.html").read_text(encoding="utf-8")
    report(str(analysis / "analysis.json"), str(tmp_path / "other.html"))
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == text
    found, read = json.loads((analysis / "analysis.json").read_text(encoding="utf-8")), Page(text)
    assert not read.open
    assert all(address.startswith(("#", "data:")) for address in read.addresses)
    drawn = [address for address in read.addresses if address.startswith("data:")]
    assert len(drawn) == len(list(analysis.glob("figures/*.svg"))) >= len(ANALYSES)
    values = {
        (rows[0][0][0], row[0][0], head): cell[1]["data-value"]
        for rows in read.tables.values()
        for row in rows[1:]
        for (head, _), cell in zip(rows[0][1:], row[1:], strict=True)
    }
    cosine = found["analyses"]["cosine"]
    assert float(values["name", "digits, land", "whole"]) == pytest.approx(cosine["cosine"][0][0][1])
    accuracy = found["analyses"]["accuracy"]
    assert float(values["name", "zero-shot", "mean"]) == pytest.approx(100 * accuracy["mean"]["zero-shot"])
    assert float(values["name", "digits", "advantage"]) == pytest.approx(
        100 * found["analyses"]["advantage"]["digits"]["advantage"]
    )
    assert len(read.tables) == 1 + 2 + 2 + len(accuracy["measured"]["zero-shot"]["digits"]) + 2 + 1 + 1
    assert found["model"]["fingerprint"] in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "TypeError"),
        ("{", "expected an analysis of lit-merge analyze, got"),
        ('{"kind": "suite"}', "kind 'suite'"),
        ('{"kind": "analysis", "analyses": {"cosine": {}}, "tasks": ["a", "b"]}', "KeyError"),
        (None, "No such file"),
    ],
)
def test_what_is_no_analysis_is_refused_in_one_line(tmp_path: Path, content, said, capsys):
    if content is not None:
        (tmp_path / "analysis.json").write_text(content, encoding="utf-8")
    assert main(["report", "--results", str(tmp_path / "analysis.json")]) == 1
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
