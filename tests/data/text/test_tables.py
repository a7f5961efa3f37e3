"""Every format gives the same rows; every kind of damage is one line."""

from __future__ import annotations

import json

import pytest
from builders.text_tables import write_rows

from lit_merge.data.text.tables import is_table, read_parquet, read_saved, read_table
from lit_merge.errors import ConfigurationError, DataError

ROWS = [{"text": 'one, "two"\nthree', "label": "a"}, {"text": "Zürich ✓", "label": "b"}]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_formats(tmp_path, suffix):
    table = read_table(tmp_path / write_rows(tmp_path / f"rows{suffix}", ROWS))
    assert [table.row(index) for index in range(len(table))] == ROWS
    assert table.take([1]).row(0) == ROWS[1]
    assert is_table(tmp_path / f"rows{suffix}")


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        ('"so" it goes\t1\nb\t0\n', ['"so" it goes', "b"]),  # behind a quote comes neither tab nor end
        ('"so it goes\t1\nb\t0\n', ['"so it goes', "b"]),  # never closed
        ('"a\t1\nb"\t0\r\nc\t1\n', ['"a', 'b"', "c"]),  # one cell by quotes, although every line is whole
        ('"a\tb"\t1\n"c\nd"\t0\n', ["a\tb", "c\nd"]),  # tabs and ends of lines within quotes
        ('"he said ""so"""\t1\nb\t0\n', ['he said "so"', "b"]),
    ],
)
def test_tabs_with_and_without_quotes(tmp_path, raw, texts):
    path = tmp_path / "rows.tsv"
    path.write_text(f"text\tlabel\n{raw}", newline="")
    assert read_table(path).columns["text"] == texts
    path.write_text('text\n"so" it goes\n', newline="")  # one column: nothing tells that all lines are whole
    with pytest.raises(DataError, match=r"separated by tabs, with quotes that are closed, got '.' expected after"):
        read_table(path)


def test_what_datasets_saved_and_class_names_of_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    datasets.disable_progress_bars()
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "some.parquet"))
    for table in (read_saved(tmp_path / "saved"), read_parquet([tmp_path / "some.parquet"])):
        assert table.columns == {"text": ["x", "y"], "label": [1, 0]}
        assert table.label_names == {"label": ("no", "yes")}
    assert is_table(tmp_path / "saved")
    with pytest.raises(DataError, match=r"expected what save_to_disk of the datasets library wrote, got"):
        read_saved(tmp_path)


def test_long_cells_and_marks(tmp_path):
    long = "x" * 200_000
    path = tmp_path / "long.csv"
    path.write_text(f"text,label\n{long},a\n", encoding="utf-8-sig")
    assert read_table(path).columns == {"text": [long], "label": ["a"]}
    path.write_text("text,label\nü,a\n", encoding="utf-16")
    assert read_table(path, "utf-16").row(0) == {"text": "ü", "label": "a"}
    path.write_text("text\tlabel\nü\ta\n", encoding="latin-1")
    assert list(read_table(path, "latin-1").columns) == ["text\tlabel"]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", b"", r"a.csv: expected rows of texts, got an empty file\. Check the path\.$"),
        ("a.csv", b" \n", r"got an empty file"),
        ("a.csv", b"text,label\n", r"got an empty file"),
        ("a.jsonl", b"\n\n", r"got an empty file"),
        ("a.csv", "text\nü".encode("utf-16"), r"in utf-8, got byte 0xff at 0, as in utf-16\. Set encoding to utf-16,"),
        ("a.csv", "text\nü".encode("utf-16-le"), r"in utf-8, got byte 0xfc at 10, as in latin-1|got a zero byte"),
        ("a.csv", "text\nu".encode("utf-16-le"), r"in utf-8, got a zero byte, as in UTF-16 or a binary file"),
        ("a.csv", "text\nü".encode("latin-1"), r"in utf-8, got byte 0xfc at 5, as in latin-1 or cp1252\. Set encoding"),
        (
            "a.csv",
            b"text,label\na,b,c\n",
            r"expected 2 cells in every row, as its first line has, got 3 in row 1\. Put",
        ),
        ("a.csv", b"text,text\na,b\n", r"expected a first line with a name for every column, each once, got 'text'"),
        ("a.csv", b'text,label\n"a,b\n', r"with quotes that are closed, got .* in line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"expected a JSON object per line, got .* in line 2\. Correct it"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"got a key that is there twice in line 1"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', r"expected the columns text in every row, got txt in row 2\.$"),
        ("a.jsonl", b"[1]\n", r"expected rows of texts, got \[1\]\.$"),
        ("a.json", b"[" * 100_000, r"expected a JSON object per line, got"),
        ("a.parquet", b"PAR1", r"a.parquet: expected a Parquet file, got .*\. Fetch it again"),
        ("a.xlsx", b"x", r"expected a file that ends in .csv, .*, got .xlsx"),
    ],
)
def test_damage(tmp_path, name, raw, message):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as refused:
        read_table(path)
    assert "\n" not in str(refused.value)


def test_settings(tmp_path):
    path = tmp_path / "a.csv"
    with pytest.raises(DataError, match=r"a.csv: expected a file of texts \(.csv, .*\), got no such file"):
        read_table(path)
    path.write_text("text\na\n")
    with pytest.raises(ConfigurationError, match=r"^encoding: expected one that Python knows, got 'klingon'"):
        read_table(path, "klingon")
    assert not is_table(tmp_path / "folder")
    assert not is_table(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert is_table(tmp_path)
