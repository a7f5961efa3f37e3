from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders.suite_document import INDIVIDUAL, TASK_ARITHMETIC, TASKS, document
from PIL import Image
from rich.console import Console

from lit_merge.errors import ConfigurationError, FileFormatError
from lit_merge.report import (
    Results,
    accuracy_table,
    display_name,
    markdown_table,
    results_figure,
    summary,
    vector_table,
)


def results(seeds: int = 3) -> Results:
    return Results.from_dict(document(seeds))


def text_of(table: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells_of(table: object) -> dict[str, list[str]]:
    """First cell of every row of a printed table -> the others."""
    lines = [line for line in text_of(table).splitlines() if line.startswith(("│", "┃"))]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in rows}


# ---------------------------------------------------------------------------------------------------- averages


def test_methods_and_their_accuracies():
    read = results()
    assert read.methods() == ["zero-shot", "weight_average", "task_arithmetic", "individual"]
    assert read.accuracy("zero-shot", "signs") == [0.30, 0.30, 0.30]
    assert read.accuracy("individual", "digits") == [0.96, 0.98, 1.00]
    assert read.accuracy("task_arithmetic", "signs") == [0.60, 0.66, 0.63]
    assert read.mean_accuracy("task_arithmetic") == pytest.approx([0.70, 0.68, 0.735])


def test_normalised_divides_by_the_individual_model_of_the_same_seed():
    read = results()
    assert read.normalised("task_arithmetic", "digits") == pytest.approx([0.80 / 0.96, 0.70 / 0.98, 0.84])
    assert read.normalised("zero-shot", "signs") == pytest.approx([0.30 / 0.75, 0.30 / 0.80, 0.30 / 0.70])
    assert read.normalised("individual", "signs") == [1.0, 1.0, 1.0]
    # The mean of the ratios, not the ratio of the means.
    expected = [
        (a / b + c / d) / 2 for (a, c), (b, d) in zip(TASK_ARITHMETIC.values(), INDIVIDUAL.values(), strict=True)
    ]
    assert read.mean_normalised("task_arithmetic") == pytest.approx(expected)


def test_summary_is_mean_and_sample_standard_deviation():
    mean, spread = summary([0.70, 0.68, 0.735])
    assert mean == pytest.approx(0.705)
    assert spread == pytest.approx(math.sqrt((0.005**2 + 0.025**2 + 0.030**2) / 2))
    assert summary([0.4]) == (0.4, None)


def test_an_individual_model_that_is_never_right_has_no_normalised_accuracy():
    data = document(1)
    data["seeds"]["0"]["individual"]["signs"] = 0.0
    read = Results.from_dict(data)
    assert math.isnan(read.normalised("task_arithmetic", "signs")[0])
    assert methods_of(accuracy_table(read, normalised=True))["task arithmetic"] == ["83.3", "–", "–"]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("zero-shot", "zero-shot"),
        ("weight_average", "weight average"),
        ("task_arithmetic", "task arithmetic"),
        ("ties", "TIES"),
        ("tsv_m", "TSV-M"),
        ("task_arithmetic_lines", "task arithmetic LiNeS"),
    ],
)
def test_display_names(method, name):
    assert display_name(method) == name


# ---------------------------------------------------------------------------------------------------- reader


def test_a_file_is_read_as_the_document_is(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document()), encoding="utf-8")
    read = Results.load(path)
    assert read == results()
    assert (read.model_name, read.model_parameters, read.tasks) == ("lit-tiny", 2734848, ("digits", "signs"))
    search = read.merged("task_arithmetic")[1].search
    assert search is not None
    assert search.normalised == (0.6, 0.8, 0.4)
    assert read.merged("weight_average")[0].search is None


def test_keys_of_later_versions_are_ignored_and_task_order_is_that_of_the_suite():
    data = document()
    data["notes"] = "later"
    data["zero_shot"] = dict(reversed(data["zero_shot"].items()))
    read = Results.from_dict(data)
    assert read == results()
    assert list(read.zero_shot) == TASKS


def without(*keys):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def with_value(value, *keys):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


SEED = ("seeds", "1")
MERGED = (*SEED, "merged", "task_arithmetic")
REFUSALS = [
    (without("tasks"), "r: expected the key 'tasks', got 'schema', 'name', 'model' and 7 more. Run the suite again."),
    (without("schema"), "r: expected the results that a suite writes, got an object with 'name', 'model',"),
    (with_value(2, "schema"), "r: expected schema 1 at schema, got 2. Read it with the version that wrote it."),
    (with_value(True, "schema"), "r: expected schema 1 at schema, got True."),
    (with_value([], "tasks"), "r: expected one or more different tasks at tasks, got []."),
    (with_value(["digits", "digits"], "tasks"), "r: expected one or more different tasks at tasks"),
    (with_value("digits", "tasks"), "r: expected an array at tasks, got 'digits'."),
    (with_value({}, "seeds"), "r: expected one or more seeds at seeds, got none."),
    (without("model", "fingerprint"), "r: expected the key 'fingerprint' at model, got 'name', 'parameters'."),
    (with_value(2.5, "model", "parameters"), "r: expected an integer at model.parameters, got 2.5."),
    (with_value(7, "name"), "r: expected text at name, got 7."),
    (with_value(None, "versions"), "r: expected an object at versions, got None."),
    (without("zero_shot", "signs"), "r: expected one entry per task at zero_shot, got 1 missing (signs)."),
    (
        with_value({"digits": 0.5, "sings": 0.5}, "zero_shot"),
        "r: expected one entry per task at zero_shot, got 1 missing (signs) and 1 unexpected (sings).",
    ),
    (
        with_value(96.0, *SEED, "individual", "digits"),
        "r: expected a fraction from 0 to 1 at seeds.1.individual.digits, got 96.0. Divide percentages by 100.",
    ),
    (
        with_value(math.nan, *SEED, "task_vectors", "digits", "norm"),
        "r: expected a finite number at seeds.1.task_vectors.digits.norm, got nan.",
    ),
    (with_value(True, "zero_shot", "digits"), "r: expected a finite number at zero_shot.digits, got True."),
    (with_value(10**400, "zero_shot", "digits"), "r: expected a finite number at zero_shot.digits, got 1000"),
    (
        with_value([[1.0, 0.1]], *SEED, "cosine_similarity"),
        "r: expected 2 rows of 2 values at seeds.1.cosine_similarity, got rows of [2] values.",
    ),
    (
        with_value([[1.0, "x"], [0.1, 1.0]], *SEED, "cosine_similarity"),
        "r: expected a finite number at seeds.1.cosine_similarity[0][1], got 'x'.",
    ),
    (
        without(*MERGED),
        "r: expected the methods of seed 0 (weight_average, task_arithmetic) at seeds.1.merged, got weight_average.",
    ),
    (
        lambda data: data["seeds"]["1"]["merged"].update({"zero-shot": data["seeds"]["1"]["merged"]["weight_average"]}),
        "r: expected a merged model under the name of its recipe at seeds.1.merged.zero-shot, got zero-shot.",
    ),
    (
        with_value([0.0], *MERGED, "search", "values"),
        "r: expected as many values as normalised and absolute accuracies at seeds.1.merged.task_arithmetic.search, "
        "got 1 and 3 and 3 of them.",
    ),
    (without(*MERGED, "coefficient"), "r: expected the key 'coefficient' at seeds.1.merged.task_arithmetic, got"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[message[12:50] for _, message in REFUSALS])
def test_what_is_missing_or_wrong_is_said_in_one_line(change, message):
    data = copy.deepcopy(document())
    change(data)
    with pytest.raises(FileFormatError) as refusal:
        Results.from_dict(data, source="r")
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_files_that_are_no_results(tmp_path):
    with pytest.raises(FileFormatError, match=r"none\.json: expected a results file, got No such file or directory\."):
        Results.load(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_bytes(b'{"schema": 1,\n')
    with pytest.raises(
        FileFormatError, match=r"broken\.json: expected JSON, got something else \(.*\)\. Run the suite"
    ):
        Results.load(broken)
    broken.write_bytes(b"[" * 100_000)
    with pytest.raises(FileFormatError, match="expected JSON"):
        Results.load(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match="expected JSON"):
        Results.load(broken)
    broken.write_bytes(b"[1]")
    with pytest.raises(FileFormatError, match=r"broken\.json: expected an object, got an array\."):
        Results.load(broken)


# ---------------------------------------------------------------------------------------------------- tables


def methods_of(table):
    """The printed table by method: its columns, each from top to bottom."""
    cells = cells_of(table)
    tasks = [name for name in cells if name != "task"]
    columns = {method: [cells[task][place] for task in tasks] for place, method in enumerate(cells["task"])}
    return {"method": tasks, **columns}


def test_accuracy_table():
    cells = methods_of(accuracy_table(results()))
    assert list(cells) == ["method", "zero-shot", "weight average", "task arithmetic", "individual"]
    assert cells["method"] == ["digits", "signs", "mean"]
    assert cells["zero-shot"] == ["60.0", "30.0", "45.0"]  # the same for all seeds: no spread
    assert cells["weight average"] == ["70.0", "50.0", "60.0 ± 0.0"]
    assert cells["task arithmetic"] == ["78.0", "63.0", "70.5 ± 2.8"]
    assert cells["individual"] == ["98.0", "75.0", "86.5 ± 2.2"]
    title = str(accuracy_table(results()).title)
    assert title == "lit-tiny, 2 tasks, 3 seeds: test accuracy, coefficients chosen on validation"


def test_normalised_accuracy_table():
    cells = methods_of(accuracy_table(results(), normalised=True))
    read = results()
    mean, spread = summary(read.mean_normalised("zero-shot"))
    assert cells["zero-shot"][-1] == f"{100 * mean:.1f} ± {100 * spread:.1f}"
    assert cells["task arithmetic"][0] == f"{100 * (0.80 / 0.96 + 0.70 / 0.98 + 0.84) / 3:.1f}"
    assert cells["individual"] == ["100.0", "100.0", "100.0"]
    assert ": normalised test accuracy" in str(accuracy_table(read, normalised=True).title)


def test_one_seed_has_no_spread():
    assert "±" not in text_of(accuracy_table(results(1)))
    assert "±" not in text_of(vector_table(results(1)))
    assert "±" not in markdown_table(results(1))
    assert "lit-tiny, 2 tasks, 1 seed:" in text_of(accuracy_table(results(1)))


def test_vector_table():
    cells = cells_of(vector_table(results()))
    assert cells["task"] == ["‖τ‖", "‖τ‖ / ‖θ0‖ (%)", "steps"]
    assert cells["digits"] == ["1.300 ± 0.100", "2.40 ± 0.00", "110"]
    data = document()
    data["seeds"]["2"]["task_vectors"]["signs"]["steps"] = 130
    assert cells_of(vector_table(Results.from_dict(data)))["signs"][-1] == "110–130"


@pytest.mark.parametrize("width", [40, 60, 80, 132, 400])
@pytest.mark.parametrize("methods", [2, 14])
def test_tables_fit_the_terminal_and_break_no_word(width, methods):
    data = document()
    for seed in data["seeds"].values():
        one = seed["merged"].pop("task_arithmetic")
        seed["merged"] |= {f"adamerging_plus_plus_{number}": one for number in range(methods)}
    read = Results.from_dict(data)
    for table in (accuracy_table(read), accuracy_table(read, normalised=True), vector_table(read)):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        console.print(table)
        printed = console.file.getvalue()
        assert max(map(len, printed.splitlines())) <= width
        body = " ".join(printed.split())
        cells = cells_of(table)
        for row, values in cells.items():
            assert all(value in body for value in values if row != "task" or " " not in value)
            assert all(word in body for value in values for word in value.split())
        assert printed.count(str(table.title)[:20]) == 1
        words = re.findall(r"[\w+]+", str(table.caption or ""))
        assert all(body.count(word) >= 1 for word in words)
        if width == 400:
            assert printed.count("┏") == 1  # one table, where there is room


def test_names_are_shown_as_they_are():
    data = json.loads(json.dumps(document()).replace("digits", "[bold]$1|2"))
    read = Results.from_dict(data)
    assert "[bold]$1|2" in text_of(accuracy_table(read))
    assert markdown_table(read).startswith("| method | [bold]$1\\|2 | signs |")


def test_markdown_table():
    lines = markdown_table(results()).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in rows} == {5}
    assert rows[0] == ["method", "digits", "signs", "mean", "normalised"]
    assert all(re.fullmatch(":?-+:?", cell) for cell in rows[1])
    printed, normalised = methods_of(accuracy_table(results())), methods_of(accuracy_table(results(), normalised=True))
    assert [row[0] for row in rows[2:]] == list(printed)[1:]
    for name, *cells in rows[2:]:
        assert cells == [*printed[name], normalised[name][-1]]


# ---------------------------------------------------------------------------------------------------- figure


@pytest.mark.parametrize("seeds", [1, 3])
def test_figure_is_a_picture_of_the_announced_size(tmp_path, seeds):
    path = results_figure(results(seeds), tmp_path / "new" / "figure.png")
    assert path == tmp_path / "new" / "figure.png"
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1950, 975))
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
        assert "Software" not in picture.info
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_results_give_the_same_bytes(tmp_path, suffix):
    import matplotlib

    first = results_figure(results(), tmp_path / f"first{suffix}").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        again = results_figure(results(), tmp_path / f"again{suffix}").read_bytes()
        assert dict(matplotlib.rcParams) == before
    assert first == again
    assert results_figure(results(1), tmp_path / f"again{suffix}").read_bytes() != first


def texts_of(read: Results) -> list[tuple[str, object]]:
    """Every visible text of the figure with its extent in pixels, as drawn."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from lit_merge.report import figures

    with style.context(["default", figures._SETTINGS]):
        figure = Figure(dpi=150)
        canvas = FigureCanvasAgg(figure)
        figures._arrange(figure, read)
        canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        undrawn = {
            id(label)
            for axes in figure.axes
            for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
            for tick in axis.get_major_ticks()
            for label in (tick.label1, tick.label2)
            if not axes.axison or not low <= tick.get_loc() <= high
        }
        renderer = canvas.get_renderer()
        shown = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if id(text) not in undrawn]
    width, height = figure.get_size_inches() * 150
    assert all(box.x1 <= width and box.y1 <= height for _, box in shown)
    return shown


def many(tasks: list[str], methods: list[str], seeds: int, searched: bool = True) -> Results:
    data = document(seeds)
    model = data["seeds"]["0"]["merged"]["task_arithmetic"]
    for index, seed in enumerate(data["seeds"].values()):
        accuracy = {task: 0.5 + 0.04 * ((3 * column + index) % 10) for column, task in enumerate(tasks)}
        seed["individual"] = dict.fromkeys(tasks, 0.97 - 0.01 * index)
        seed["task_vectors"] = {task: {"norm": 1.5, "relative_norm": 0.03, "steps": 110} for task in tasks}
        seed["cosine_similarity"] = [[1.0] * len(tasks)] * len(tasks)
        search = model["search"] if searched else None
        seed["merged"] = {method: {**model, "accuracy": accuracy, "search": search} for method in methods}
    data.update(tasks=tasks, classes=dict.fromkeys(tasks, 10), zero_shot=dict.fromkeys(tasks, 0.4))
    return Results.from_dict(data)


EIGHT = ["digits", "clutter", "letters", "signs", "textures", "land", "vehicles", "scenes"]
TWENTY = [f"{name}_{number}" for number in range(5) for name in ("stanford_cars", "mnist", "eurosat", "kmnist")]
SHAPES = {
    "one task": many(["digits"], ["ties"], 1),
    "eight tasks": many(EIGHT, ["weight_average", "task_arithmetic", "ties"], 3),
    "six methods": many(EIGHT, ["weight_average", "task_arithmetic", "ties", "lines", "tsv_m", "iso_c"], 3),
    "no search": many(EIGHT, ["weight_average"], 2, searched=False),
    "no merge": many(EIGHT, [], 2),
    "twenty tasks": many(TWENTY, ["weight_average", "task_arithmetic"], 3),
    "long names": many(EIGHT, [f"{number}_consensus_task_arithmetic_with_lines" for number in range(12)], 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_text_overlaps_another_or_leaves_the_figure(shape):
    shown = texts_of(SHAPES[shape])
    assert len(shown) > 20
    for index, (first, box) in enumerate(shown):
        assert box.x0 >= 0, f"{first!r} leaves the figure"
        assert box.y0 >= 0, f"{first!r} leaves the figure"
        for second, other in shown[index + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, down) <= 1, f"{first!r} overlaps {second!r} by {across:.0f} x {down:.0f} pixels"


def test_figure_says_what_was_measured():
    texts = [text for text, _ in texts_of(results())]
    for expected in (
        "lit-tiny, 2 tasks, 3 seeds",
        "test accuracy, coefficients chosen on validation",
        "task arithmetic",
        "70.5",
        "± 2.8",
        "78.0",
        "normalised validation accuracy (%) by coefficient",
        "task arithmetic\nchosen 0.30",
        "2.4",
    ):
        assert expected in texts


def test_numbers_in_the_heat_map_can_be_read():
    from lit_merge.report.panels import INK, readable_on

    assert readable_on((1.0, 1.0, 0.8, 1.0)) == INK
    assert readable_on((0.13, 0.2, 0.6, 1.0)) == "white"


def test_more_rows_make_the_figure_higher(tmp_path):
    with Image.open(results_figure(SHAPES["long names"], tmp_path / "figure.png")) as picture:
        assert picture.width == 1950
        assert picture.height > 975


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    read = Results.from_dict(json.loads(json.dumps(document()).replace("digits", "$a_{b$")))
    assert results_figure(read, tmp_path / "figure.svg").stat().st_size > 10_000


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"figure\.pdf: expected a path that ends in \.png or \.svg, got '\.pdf'"
    ):
        results_figure(results(), tmp_path / "figure.pdf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_figure_and_nothing_else(tmp_path, monkeypatch, error):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise error("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(error):
        results_figure(results(), path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


# ---------------------------------------------------------------------------------------------------- imports


def test_importing_is_light_and_pyplot_stays_out(tmp_path):
    data = tmp_path / "results.json"
    data.write_text(json.dumps(document()), encoding="utf-8")
    program = (
        "import sys, lit_merge.report as report\n"
        "assert not {'matplotlib', 'rich'} & set(sys.modules)\n"
        f"results = report.Results.load({str(data)!r})\n"
        "report.markdown_table(results)\n"
        "assert not {'matplotlib', 'rich'} & set(sys.modules)\n"
        f"report.results_figure(results, {str(tmp_path / 'figure.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_public_names():
    import lit_merge.report as report

    assert all(callable(getattr(report, name)) for name in report.__all__)
    assert dir(report) == sorted(report.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        report.nothing  # noqa: B018
