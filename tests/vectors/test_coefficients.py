"""Groups of parameters, merging coefficients, their files, and the layouts in which other programs publish them."""

from __future__ import annotations

import json
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_merge.errors import (
    ConfigurationError,
    FileFormatError,
    LitMergeError,
    NonFiniteError,
    StructureMismatchError,
)
from lit_merge.files.store import LazyTensors, write_tensors
from lit_merge.models import load_clip
from lit_merge.vectors import Coefficients, TaskVector, TaskVectors, group_names, verify

NAMES = (  # as a small vision transformer registers them
    "positional_embedding",
    "proj",
    "conv1.weight",
    "transformer.resblocks.0.ln_1.weight",
    "transformer.resblocks.0.attn.in_proj_weight",
    "transformer.resblocks.0.mlp.c_fc.bias",
    "transformer.resblocks.1.attn.out_proj.bias",
    "transformer.resblocks.2.mlp.c_proj.weight",
    "ln_post.weight",
)
TASKS = ("digits", "letters", "signs")
METADATA = {"base_model": "tiny", "base_fingerprint": "0123456789abcdef", "objective": "entropy", "step": "500"}


def make(granularity="block", tasks=TASKS, names=NAMES, **fields):
    """Different coefficients for every task and group."""
    members = dict(zip(names, group_names(names, granularity), strict=True))
    groups = tuple(dict.fromkeys(members.values()))
    values = torch.arange(len(tasks) * len(groups), dtype=torch.float64).reshape(len(tasks), -1) / 7 - 0.1
    return Coefficients(values, tasks, groups, members, granularity, **{"metadata": METADATA, **fields})


def vectors(tasks=TASKS, names=NAMES, fingerprint="0123456789abcdef"):
    return TaskVectors(
        [
            TaskVector({name: torch.ones(2) for name in names}, task, metadata={"base_fingerprint": fingerprint})
            for task in tasks
        ]
    )


def assert_same(first: Coefficients, second: Coefficients) -> None:
    assert torch.equal(first.values, second.values)
    assert first.values.dtype == second.values.dtype == torch.float64
    for field in ("tasks", "groups", "granularity", "metadata"):
        assert getattr(first, field) == getattr(second, field), field
    assert list(first.members.items()) == list(second.members.items())


def refused(error_class, line, call, *arguments, **fields):
    with pytest.raises(error_class, match=line) as error:
        call(*arguments, **fields)
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in str(error.value)


# Groups


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ("task", ["all"] * 9),
        ("tensor", list(NAMES)),
        ("block", ["embedding", "head", "embedding", *["block 0"] * 3, "block 1", "block 2", "head"]),
        (
            "group",
            [
                *("embedding", "head", "embedding"),
                *("block 0 other", "block 0 attention", "block 0 mlp"),
                *("block 1 attention", "block 2 mlp", "head"),
            ],
        ),
    ],
)
def test_the_group_of_every_parameter(granularity, expected):
    assert list(group_names(NAMES, granularity)) == expected


def test_the_embedded_model_has_a_group_per_block_and_kind():
    names = [name for name, _ in load_clip("lit-tiny", None).visual.named_parameters()]
    blocks = {int(name.split("resblocks.")[1].split(".")[0]) for name in names if "resblocks." in name}
    assert set(group_names(names, "block")) == {"embedding", "head", *(f"block {index}" for index in blocks)}
    kinds = {f"block {index} {kind}" for index in blocks for kind in ("attention", "mlp", "other")}
    assert set(group_names(names, "group")) == {"embedding", "head", *kinds}


def test_a_network_without_blocks_has_no_block_groups():
    for granularity in ("block", "group"):
        line = (
            rf"^granularity {granularity}: expected parameters in numbered blocks, such as blocks\.3\.mlp\.weight, got "
            r"inner\.weight, outer\.weight\. Use tensor for this network\.$"
        )
        refused(ConfigurationError, line, group_names, ["inner.weight", "outer.weight"], granularity)
    refused(ConfigurationError, r"got 'layer'\.$", group_names, NAMES, "layer")
    assert group_names([], "tensor") == ()


# What they are


def test_the_coefficients_of_a_parameter_are_its_groups():
    coefficients = make("block")
    for name, group in zip(NAMES, group_names(NAMES, "block"), strict=True):
        column = ["embedding", "head", "block 0", "block 1", "block 2"].index(group)
        assert coefficients.of(name).tolist() == [(row * 5 + column) / 7 - 0.1 for row in range(3)]
    refused(StructureMismatchError, r"expected one of 9 parameters .*, got 'fc'", coefficients.of, "fc")


def test_values_are_a_copy_in_float64():
    given = nn.Parameter(torch.full((3, 9), 0.3))
    coefficients = make("tensor")
    coefficients = Coefficients(given, TASKS, coefficients.groups, coefficients.members)
    given.data.zero_()
    assert coefficients.values.dtype == torch.float64
    assert not coefficients.values.requires_grad
    assert (coefficients.values == float(np.float32(0.3))).all()
    assert repr(coefficients) == (
        "Coefficients(tasks=('digits', 'letters', 'signs'), granularity='tensor', groups=9, parameters=9)"
    )
    assert_same(pickle.loads(pickle.dumps(coefficients)), coefficients)


def test_depth():
    for granularity in ("block", "group", "tensor"):
        coefficients = make(granularity)
        for name, group in coefficients.members.items():
            block = int(name.split(".")[2]) if "resblocks" in name else None
            assert coefficients.depth(group) == (None if block is None else block / 2)
    assert make("task").depth("all") is None
    assert make("block", names=("blocks.0.weight", "norm.weight")).depth("block 0") == 1.0
    refused(ConfigurationError, r"^group: expected one of all, got 'block 0'", make("task").depth, "block 0")


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"values": torch.ones(5, 3)}, ConfigurationError, r"column per group \(3, 5\), got \(5, 3\)\. Transpose"),
        ({"tasks": TASKS[:2]}, ConfigurationError, r"\(2, 5\), got \(3, 5\)"),
        ({"values": torch.ones(0, 5), "tasks": ()}, ConfigurationError, r"at least one task and group"),
        ({"values": torch.tensor([[torch.nan] * 5] * 3)}, NonFiniteError, r"expected finite values, got NaN"),
        ({"tasks": ("a", "b", "a")}, ConfigurationError, r"expected tasks of different names, got 'a' more than once"),
        (
            {"groups": ("head", "embedding", "block 0", "block 1", "block 2")},
            ConfigurationError,
            r"in the order of their first parameters \(embedding, head, block 0 and 2 more\), got 5 \(head, embedding",
        ),
        ({"members": dict.fromkeys(NAMES, "all")}, ConfigurationError, r"expected the 1 groups of the members"),
        ({"metadata": {"step": 500}}, ConfigurationError, r"^metadata: expected strings .*, got 'step'\. Use json"),
        (
            {"metadata": {"tasks": "a"}},
            ConfigurationError,
            r"other names than content_blake3, content_sha256, format, .*got 'tasks'",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, error, line):
    whole = make("block")
    fields = {name: getattr(whole, name) for name in ("values", "tasks", "groups", "members", "granularity")}
    refused(error, line, Coefficients, **{**fields, **changes})


# Which task vectors they are for


def test_rows_are_found_by_name():
    coefficients = make("tensor")
    turned = coefficients.for_tasks(("signs", "digits", "letters"))
    assert turned.tasks == ("signs", "digits", "letters")
    assert torch.equal(turned.values, coefficients.values[[2, 0, 1]])
    assert turned.members == coefficients.members
    coefficients.check_fits(vectors(("signs", "digits", "letters")))
    coefficients.check_fits(vectors(names=tuple(reversed(NAMES)), fingerprint=""))
    coefficients.check_fits(vectors().restrict(NAMES[:2]))
    make("tensor", metadata={}).check_fits(vectors(fingerprint="fedcba9876543210"))


@pytest.mark.parametrize(
    ("tasks", "got"),
    [
        (("digits", "letters", "land"), "nothing for 'land' and unknown 'signs'"),
        (("digits", "letters"), "unknown 'signs'"),
        ((*TASKS, "land"), "nothing for 'land'"),
        (("digits", "letters", "signs", "digits"), "two vectors of 'digits'"),
        (("", "letters", "signs"), "nothing for '' and unknown 'digits'"),
    ],
)
def test_other_tasks_are_refused(tasks, got):
    line = (
        rf"^coefficients: expected one row for each of the tasks {', '.join(tasks)}, got {got}\. Name the task vectors "
        r"as they were when the coefficients were learned: digits, letters, signs\.$"
    )
    refused(StructureMismatchError, line, make().check_fits, vectors(tasks))


def test_other_parameters_are_refused():
    others = ("a", "b", *NAMES[4:])
    line = (
        r"^coefficients: expected the 7 parameters of the task vectors, got 2 missing \(a, b\) and 4 unexpected "
        r"\(positional_embedding, proj, conv1\.weight and 1 more\)\. Use coefficients that were learned for this"
    )
    refused(StructureMismatchError, line, make().check_fits, vectors(names=others))
    # not only of those that are left
    refused(StructureMismatchError, line, make().check_fits, vectors(names=others).restrict(NAMES[4:6]))


def test_another_base_is_refused():
    line = r"base model \(fingerprint fedcba9876543210\), got fingerprint 0123456789abcdef\. Learn them on vectors of"
    refused(StructureMismatchError, line, make().check_fits, vectors(fingerprint="fedcba9876543210"))


# Files


@pytest.mark.parametrize("granularity", ["task", "block", "tensor", "group"])
@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_file_gives_back_what_was_saved(granularity, ending, tmp_path):
    saved = make(granularity, tasks=("ß ünïcode", "a/b", ""))
    saved = Coefficients(saved.values.exp() / 3, saved.tasks, saved.groups, saved.members, granularity, METADATA)
    path = tmp_path / f"coefficients.{ending}"
    saved.save(path)
    assert_same(Coefficients.load(path), saved)
    assert_same(Coefficients.load(str(path)), saved)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    first = path.read_bytes()
    saved.save(path)
    assert path.read_bytes() == first


def test_what_the_files_hold(tmp_path):
    saved = make("block")
    saved.save(tmp_path / "c.safetensors")
    saved.save(tmp_path / "c.json")
    verify(tmp_path / "c.safetensors")
    assert load_file(tmp_path / "c.safetensors")["coefficients"].tolist() == saved.values.tolist()
    header = LazyTensors(tmp_path / "c.safetensors").metadata
    assert {key: header[key] for key in METADATA} == METADATA
    assert json.loads(header["tasks"]) == list(TASKS)
    plain = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert list(plain) == ["format", "granularity", "coefficients", "members", "metadata"]
    assert plain["format"] == header["format"] == "lit-merge/coefficients/1"
    assert plain["coefficients"]["letters"] == {
        group: (5 + column) / 7 - 0.1
        for column, group in enumerate(("embedding", "head", "block 0", "block 1", "block 2"))
    }
    assert plain["members"] == dict(saved.members)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    make("task").save(tmp_path / "c.json")
    make("task").save(tmp_path / "c.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for name in before:
        with pytest.raises(OSError, match="No space left"):
            make("block").save(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_where_they_cannot_be_saved(tmp_path):
    for ending in ("json", "safetensors"):
        line = rf"missing/c\.{ending}: expected an existing folder to write into, got none\. Create it first\.$"
        refused(ConfigurationError, line, make().save, tmp_path / "missing" / f"c.{ending}")
    assert not (tmp_path / "missing").exists()
    for call in (make().save, Coefficients.load):
        line = (
            r"c\.pt: expected a file of coefficients ending in \.safetensors or \.json, got \.pt\. Rename it; for pub"
        )
        refused(ConfigurationError, line, call, tmp_path / "c.pt")


def _whole() -> dict:
    return {
        "format": "lit-merge/coefficients/1",
        "granularity": "task",
        "coefficients": {"a": {"all": 0.5}, "b": {"all": 1}},
        "members": {"x": "all", "y": "all"},
        "metadata": {},
    }


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"format": "lit-merge/coefficients/2"},
            r"expected format lit-merge/coefficients/1, got lit-merge/coefficients/2",
        ),
        (
            {"format": 3},
            r"expected format lit-merge/coefficients/1, got none\. Use a file that Coefficients\.save wrote",
        ),
        ({"coefficients": {"a": {"all": 0.5}, "b": {}}}, "got an incomplete or malformed file"),
        ({"coefficients": {"a": {"all": 0.5, "more": 1}}}, "got an incomplete or malformed file"),
        ({"coefficients": {"a": {"all": "much"}}}, "got an incomplete or malformed file"),
        ({"coefficients": {"a": {"all": None}}}, "got an incomplete or malformed file"),
        ({"coefficients": {"a": {"all": 10**400}}}, "got an incomplete or malformed file"),
        ({"coefficients": {}}, "expected at least one task and group"),
        ({"coefficients": [0.5]}, "got an incomplete or malformed file"),
        ({"coefficients": {"a": {"all": float("inf")}}}, "expected finite values, got NaN or infinity"),
        ({"members": {}}, "got an incomplete or malformed file"),
        ({"members": {"x": ["all"]}}, "got an incomplete or malformed file"),
        ({"members": {"x": 1}, "coefficients": {"a": {1: 0.5}}}, "got an incomplete or malformed file"),
        ({"metadata": {"step": 3}}, "got an incomplete or malformed file"),
        ({"metadata": []}, "got an incomplete or malformed file"),
        ({"metadata": {"format": "x"}}, r"metadata: expected strings under other names"),
        ({"granularity": None}, "got an incomplete or malformed file"),
    ],
)
def test_damaged_json_is_refused(change, line, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(_whole()), encoding="utf-8")
    assert Coefficients.load(path).values.tolist() == [[0.5], [1.0]]
    path.write_text(json.dumps({**_whole(), **change}), encoding="utf-8")
    refused(FileFormatError, rf"^{re.escape(str(path))}: .*{line}", Coefficients.load, path)


@pytest.mark.parametrize("missing", sorted(_whole()))
def test_incomplete_json_is_refused(missing, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({key: value for key, value in _whole().items() if key != missing}), encoding="utf-8")
    refused(FileFormatError, "expected format|incomplete or malformed", Coefficients.load, path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"__import__('os')"])
def test_what_is_no_json_is_refused(content, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    refused(
        FileFormatError,
        r"c\.json: expected JSON, got something else\. Copy or write it again\.$",
        Coefficients.load,
        path,
    )
    path.write_text("[[0.3]]")
    refused(
        FileFormatError, r"expected format .*, got none\. .*from_published for bare numbers", Coefficients.load, path
    )
    path.unlink()
    refused(FileFormatError, r"got No such file or directory\. Check the path\.$", Coefficients.load, path)


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    saved = make("block")
    saved.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    refused(FileFormatError, r"expected [\d,]+ bytes according to the header", Coefficients.load, path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(FileFormatError, "the file has changed since it was written", Coefficients.load, path)
    save_file({"coefficients": saved.values}, path)
    refused(FileFormatError, r"expected format lit-merge/coefficients/1, got none", Coefficients.load, path)
    good = {"format": "lit-merge/coefficients/1", "granularity": "task", "tasks": '["a"]', "members": '{"x": "all"}'}
    one = torch.ones(1, 1, dtype=torch.float64)
    write_tensors(path, {"coefficients": one}, good)
    assert Coefficients.load(path).tasks == ("a",)
    for change in ({"tasks": "a"}, {"tasks": "{}"}, {"tasks": "[1]"}, {"members": "[]"}, {"members": "[" * 100_000}):
        write_tensors(path, {"coefficients": one}, {**good, **change})
        refused(FileFormatError, "got an incomplete or malformed file", Coefficients.load, path)
    for key in ("granularity", "tasks", "members"):
        write_tensors(path, {"coefficients": one}, {name: text for name, text in good.items() if name != key})
        refused(FileFormatError, "got an incomplete or malformed file", Coefficients.load, path)
    write_tensors(path, {"others": one}, good)
    refused(FileFormatError, "got an incomplete or malformed file", Coefficients.load, path)
    write_tensors(path, {"coefficients": one.long()}, good)
    refused(FileFormatError, "got an incomplete or malformed file", Coefficients.load, path)
    write_tensors(path, {"coefficients": one[0]}, good)
    refused(FileFormatError, r"c\.safetensors: coefficients: expected .* \(1, 1\), got \(1,\)", Coefficients.load, path)


# Published tables: for parameters p and tasks t, the number of p and t is (p + 1) / 10 + t / 100

PARAMETERS = ("weight", "bias", "norm.weight", "norm.bias")
TABLE = [[(p + 1) / 10 + t / 100 for t in range(3)] for p in range(4)]


def check_table(found: Coefficients, tolerance: float = 0.0) -> None:
    assert found.tasks == TASKS
    assert found.groups == PARAMETERS
    assert found.granularity == "tensor"
    for row, name in zip(TABLE, PARAMETERS, strict=True):
        torch.testing.assert_close(found.of(name), torch.tensor(row, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "table",
    [
        [[1.0, *row] for row in TABLE],
        [[1, *row] for row in TABLE],
        TABLE,
        torch.tensor(TABLE, dtype=torch.float64).T,
        nn.Parameter(torch.tensor(TABLE, dtype=torch.float64).T),
        np.array(TABLE),
    ],
    ids=["AdaMerging", "integers", "rows", "FusionBench", "parameter", "numpy"],
)
@pytest.mark.parametrize("granularity", [None, "tensor"])
def test_every_layout_of_a_layer_wise_table(table, granularity):
    check_table(Coefficients.from_published(table, PARAMETERS, TASKS, granularity))


@pytest.mark.parametrize(
    "table",
    [[[1.0, 0.2202, 0.1413, 0.0]], [1.0, 0.2202, 0.1413, 0.0], [0.2202, 0.1413, 0.0], [[0.2202], [0.1413], [0.0]]],
    ids=["AdaMerging", "flat", "FusionBench", "column"],
)
@pytest.mark.parametrize("granularity", [None, "task"])
def test_every_layout_of_a_task_wise_table(table, granularity):
    found = Coefficients.from_published(table, sorted(NAMES), TASKS, granularity)
    assert found.granularity == "task"
    assert found.groups == ("all",)
    assert {tuple(found.of(name).tolist()) for name in NAMES} == {(0.2202, 0.1413, 0.0)}


def test_a_table_by_blocks():
    table = [[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.4]]
    found = Coefficients.from_published(table, NAMES[3:], ["one"], "block")
    assert found.groups == ("block 0", "block 1", "block 2", "head")
    assert [found.of(name).tolist() for name in NAMES[3:]] == [[0.1], [0.1], [0.1], [0.2], [0.3], [0.4]]


def test_what_was_learned_may_be_clamped():
    raw = [[-0.2, 0.5, 1.4]]
    assert Coefficients.from_published(raw, NAMES, TASKS).values.tolist() == [[-0.2], [0.5], [1.4]]
    assert Coefficients.from_published(raw, NAMES, TASKS, clamp=(0, 1)).values.tolist() == [[0.0], [0.5], [1.0]]


def _save(path, table):
    if path.suffix == ".json":
        path.write_text(json.dumps(table), encoding="utf-8")
    elif path.suffix == ".txt":  # as a tensor prints
        path.write_text(str([[1.0, *row] for row in table]).replace(".0,", ".,").replace(".4,", ".4000,"))
        assert "[1., 0.1" in path.read_text()
    elif path.suffix in (".npy", ".np"):
        with path.open("wb") as file:
            np.save(file, np.array(table, dtype=np.float32).T)
    elif path.suffix == ".safetensors":
        save_file({"merge_weight": torch.tensor(table, dtype=torch.float64)}, path)
    elif path.suffix == ".pth":
        torch.save({"merge_weight": nn.Parameter(torch.tensor(table).T.clone())}, path)
    else:
        torch.save(torch.tensor(table).T.clone(), path)


@pytest.mark.parametrize("ending", [".json", ".txt", ".npy", ".np", ".pt", ".pth", ".safetensors"])
def test_every_kind_of_file(ending, tmp_path):
    path = tmp_path / f"table{ending}"
    _save(path, TABLE)
    exact = ending in (".json", ".txt", ".safetensors")
    check_table(Coefficients.from_published(path, PARAMETERS, TASKS), 0.0 if exact else 1e-7)
    check_table(Coefficients.from_published(str(path), PARAMETERS, TASKS), 0.0 if exact else 1e-7)


class _Harmful:
    def __reduce__(self):
        return (exec, ("raise AssertionError('a file was executed')",))


def test_nothing_in_a_file_is_executed(tmp_path):
    line = r"expected an array of numbers that can be read without running code, got something else\. Save the numbers"
    torch.save({"merge_weight": _Harmful()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(_Harmful(), protocol=2))
    with (tmp_path / "c.npy").open("wb") as file:
        np.save(file, np.array([_Harmful()], dtype=object))
    (tmp_path / "d.json").write_text("__import__('os').abort()")
    (tmp_path / "e.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "f.pth").write_bytes(b"")
    (tmp_path / "g.txt").write_bytes(b"[" * 100_000)
    for path in sorted(tmp_path.iterdir()):
        refused(FileFormatError, line, Coefficients.from_published, path, PARAMETERS, TASKS)


@pytest.mark.parametrize(
    ("table", "got"),
    [
        ([[0.3] * 3] * 5, r"\(5, 3\)"),
        ([[1.0] + [0.3] * 2] * 2, r"\(2, 3\)"),
        ([[0.9] + [0.3] * 3] * 4, r"\(4, 4\)"),
        ([[1.0] + [0.3] * 3] * 3 + [[0.9] + [0.3] * 3], r"\(4, 4\)"),
        ([0.3] * 4, r"\(4,\)"),
        ([0.3] * 5, r"\(5,\)"),
    ],
)
def test_a_shape_that_fits_nothing_is_refused(table, got):
    line = (
        r"^coefficients: expected the shape \(L, 4\) with a first column of 1, \(L, 3\) or \(3, L\) for 3 tasks and "
        rf"L = 1 or 4, got {got}\. Leave out the rows of parameters that the task vectors lack"
    )
    refused(ConfigurationError, line, Coefficients.from_published, table, PARAMETERS, TASKS)
    line = r"for 3 tasks and L = 1, got "
    refused(ConfigurationError, line, Coefficients.from_published, [[0.3] * 4] * 3, PARAMETERS, TASKS, "task")


def test_a_shape_with_two_meanings_is_refused():
    names = PARAMETERS[:3]
    square = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]
    line = (
        r"^coefficients: expected a shape with one meaning for 3 tasks, got \(3, 3\), which is 3 rows, one column per "
        r"task or one row per task, 3 columns\. Give one row per group of parameters with a leading 1, 4 columns\.$"
    )
    refused(ConfigurationError, line, Coefficients.from_published, square, names, TASKS)
    found = Coefficients.from_published([[1.0, *row] for row in square], names, TASKS)  # as the message says
    assert [found.of(name).tolist() for name in names] == square
    # what it means does not matter here
    assert Coefficients.from_published([[0.3] * 3] * 3, names, TASKS).values.tolist() == [[0.3] * 3] * 3
    # one task, two parameters: (1, 2) is θ0's factor and one for all, or one for each
    line = r"which is one row per task, 2 columns or 1 rows with a leading 1\. Give one row .* 2 columns"
    refused(ConfigurationError, line, Coefficients.from_published, [[1.0, 0.5]], PARAMETERS[:2], ["one"])
    assert Coefficients.from_published([[1.0, 0.5]], PARAMETERS[:2], ["one"], "task").values.tolist() == [[0.5]]
    assert Coefficients.from_published([[0.9, 0.5]], PARAMETERS[:2], ["one"]).values.tolist() == [[0.9, 0.5]]


def test_sorted_names_are_refused():
    line = (
        r"^names: expected them in the order of the model's parameters, got them sorted \(bias, norm\.bias, "
        r"norm\.weight and 1 more\)\. Use \[name for name, _ in module\.named_parameters\(\)\]"
    )
    refused(ConfigurationError, line, Coefficients.from_published, TABLE, sorted(PARAMETERS), TASKS)


@pytest.mark.parametrize("table", [[], [[]], [[0.1, 0.2], [0.3]], [["a"]], [[[0.3]]], 0.3, None, {"a": [["b"]]}])
def test_what_is_no_table_is_refused(table, tmp_path):
    line = r"expected one row of numbers or several of one length, got something else\. Give nested lists, or a tensor"
    refused(ConfigurationError, rf"^coefficients: {line}", Coefficients.from_published, table, PARAMETERS, TASKS)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(table))
    refused(FileFormatError, rf"t\.json: {line}", Coefficients.from_published, path, PARAMETERS, TASKS)


def test_other_files_are_refused(tmp_path):
    def read(name):
        return Coefficients.from_published(tmp_path / name, PARAMETERS, TASKS)

    line = r"^0\.3: expected a file ending in \.json, \.txt, .*, got \.3\. Convert it first\.$"
    refused(ConfigurationError, line, Coefficients.from_published, "0.3", PARAMETERS, TASKS)
    refused(FileFormatError, r"a\.pt: expected a file of coefficients, got No such file", read, "a.pt")
    refused(FileFormatError, r"a\.safetensors: expected a safetensors file, got No such", read, "a.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "b.safetensors")
    refused(
        FileFormatError,
        r"b\.safetensors: expected one tensor, got 2\. Save the coefficients alone",
        read,
        "b.safetensors",
    )
    make("task").save(tmp_path / "c.safetensors")
    line = r"expected bare numbers, got a file of lit-merge, lit-merge/coefficients/1\. Use Coefficients\.load"
    refused(FileFormatError, line, read, "c.safetensors")
    (tmp_path / "d.json").write_text("[[1, NaN, 0.5, 0.5]]")
    refused(NonFiniteError, "expected finite values", read, "d.json")
