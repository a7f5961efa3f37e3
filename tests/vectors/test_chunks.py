"""Reading in chunks: what is read and how often, how much memory that takes, and views of views."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from builders.live_memory import LiveTensorBytes
from safetensors.torch import save_file

from lit_merge.errors import ConfigurationError, NonFiniteError, StructureMismatchError
from lit_merge.files.lazy import Computed, LazyMapping
from lit_merge.transforms import (
    ConsensusMask,
    DisjointMean,
    Drop,
    ElectSign,
    LiNeS,
    MagnitudeWindow,
    Mean,
    Negate,
    Override,
    Rescale,
    Scale,
    Sum,
    TallMask,
    Transform,
    Trim,
    WithOverrides,
    chain,
    magnitudes,
    ties,
)
from lit_merge.vectors import TaskVector, TaskVectors, sources
from lit_merge.vectors.global_value import Statistic

SHAPES = {"blocks.0.weight": (50, 40), "blocks.1.weight": (30,), "proj": (), "empty": (0,)}


class Counting(LazyMapping):
    """Tensors that count how many of their entries were read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.counts = dict.fromkeys(tensors, 0)

    def __getitem__(self, name):
        self.counts[name] += self.tensors[name].numel()
        return self.tensors[name].clone()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return self.tensors[name].dtype

    def slicer(self, name):
        return partial(self.read, name)

    def read(self, name, start, stop, out):
        self.counts[name] += stop - start
        out.copy_(self.tensors[name].reshape(-1)[start:stop])


def random_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def random_vectors(count: int = 3, dtype: torch.dtype = torch.float32) -> TaskVectors:
    return TaskVectors([TaskVector(random_tensors(seed, dtype), f"t{seed}") for seed in range(count)])


def counted(rows: list[dict[str, torch.Tensor]], transform: Transform) -> tuple[TaskVectors, set[float]]:
    """The view, and how often going through it reads the entries of each vector and parameter."""
    inputs = [Counting(row) for row in rows]
    result = transform(TaskVectors([TaskVector(row, f"t{at}") for at, row in enumerate(inputs)]))
    assert not any(count for row in inputs for count in row.counts.values())  # nothing is read before it is asked for
    for name in result:
        result[name]
    return result, {
        row.counts[name] / row.tensors[name].numel() for row in inputs for name in SHAPES if name != "empty"
    }


READS = [  # how often the inputs are read, and at most
    (chain(), 1, 1),
    (chain(Scale(2), Sum(), Negate()), 1, 1),
    (Drop(), 1, 1),
    (Trim(0.3), 3, 4),
    (Trim(0.3, "tensor"), 1, 1),
    (Trim(1.0), 1, 1),
    (MagnitudeWindow(), 1, 1),
    (MagnitudeWindow(0.5, 0.2, "global"), 5, 7),
    (ElectSign(), 1, 2),
    (ties(0.3), 3, 5),
    (chain(Trim(0.5), Scale(2), Trim(0.5)), 5, 7),
    (Rescale(), 3, 3),
    (Rescale(scope="tensor"), 2, 2),
    (chain(Trim(0.5), Rescale()), 5, 6),
    (chain(Trim(0.5, "tensor"), Sum(), Rescale(scope="tensor")), 2, 2),
    (LiNeS(0.3), 1, 1),
    (chain(Sum(), LiNeS("norm_ratio")), 1, 1),
    (chain(Sum(), Scale(0.3), LiNeS("norm_ratio")), 3, 3),
    (chain(ties(0.5), LiNeS("norm_ratio")), 5, 7),
    (TallMask(), 2, 2),
    (TallMask(merge=ties(0.3)), 4, 6),
    (ConsensusMask(merge=chain(Sum(), LiNeS("norm_ratio"))), 2, 2),
    (chain(TallMask(), Sum()), 2, 2),
    (chain(TallMask(), Trim(0.5)), 6, 8),
]


@pytest.mark.parametrize(("transform", "reads", "at_most"), READS, ids=str)
def test_the_announced_reads_are_those_that_happen(transform, reads, at_most):
    rows = [random_tensors(seed) for seed in range(3)]
    result, found = counted(rows, transform)
    assert found == {reads}
    assert result.reads == at_most
    assert result.walk + sum(one.reads for one in result.statistics) == at_most
    assert any(one.at_most for one in result.statistics) == (reads != at_most)


def test_what_must_be_told_apart_takes_one_more_pass():
    even = [{name: tensor.sign() for name, tensor in random_tensors(seed).items()} for seed in range(2)]
    assert counted(even, Trim(0.3))[1] >= {4}  # until the place is found
    assert max(counted(even, Trim(0.3))[1]) == 4
    assert counted(even, ElectSign())[1] == {2}
    zeros = [{name: tensor * (tensor > 1.5) for name, tensor in random_tensors(seed).items()} for seed in range(2)]
    assert counted(zeros, Trim(0.3))[1] == {3}  # equal zeros need not be told apart
    doubles, found = counted([random_tensors(seed, torch.float64) for seed in range(2)], Trim(0.3))
    assert found == {5}
    assert doubles.reads == 6


def test_overrides_read_no_more_than_announced():
    transform = WithOverrides(Trim(0.3), [Override(chain(Trim(0.5), Rescale()), names="weight")])
    result, found = counted([random_tensors(seed) for seed in range(2)], transform)
    assert found == {3, 5}
    assert result.reads == 9
    assert result.walk == 1


def test_a_statistic_is_computed_once():
    inputs = Counting(random_tensors(0))
    result = Trim(0.3)(TaskVectors([TaskVector(inputs, "t")]))
    for _ in range(2):
        for name in result:
            result[name]
    assert inputs.counts["blocks.0.weight"] == 4 * 2000
    copied = pickle.loads(pickle.dumps(result))
    assert torch.equal(copied["blocks.0.weight"], result["blocks.0.weight"])
    assert inputs.counts["blocks.0.weight"] == 5 * 2000
    assert repr(result.statistics) == "(Trim: threshold (at most 3 reads),)"
    calls = []
    statistic = Statistic("what", 2, lambda: calls.append(1))
    assert (statistic(), statistic(), calls) == (None, None, [1])
    assert repr(statistic) == "what (2 reads)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        *(chain(), ties(0.3), chain(Trim(0.5), ElectSign("count"), DisjointMean()), Sum(), Mean(), Drop(0.5)),
        *(MagnitudeWindow(0.5, 0.2, "global"), MagnitudeWindow(0.5, 0.2), TallMask(merge=ties(0.3)), ConsensusMask()),
        *(ElectSign(), DisjointMean()),
    ],
    ids=repr,
)
def test_the_length_of_pieces_changes_no_bit(transform, dtype, monkeypatch):
    """Nine vectors: torch adds five rows or more in an order that depends on where a column lies."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"blocks.0.weight": (9, 11), "proj": (), "blocks.1.weight": (61,), "empty": (0,)}
    rows = [
        TaskVector({name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}, task)
        for task in "abcdefghi"
    ]
    vectors = TaskVectors(rows)
    expected = transform(vectors)
    expected = {name: expected[name] for name in expected}
    for length in (1, 7):
        monkeypatch.setattr(sources, "_ELEMENTS_IN_CACHE", 1)
        monkeypatch.setattr(sources, "_ELEMENTS_OF_A_SUM", 1)
        monkeypatch.setattr(sources, "_FEWEST_ELEMENTS", length if length > 1 else 64)
        monkeypatch.setattr(magnitudes, "_LENGTH", 97)
        result = transform(vectors)
        assert result.chunk_length("proj") == (7 if length > 1 else 64)
        for name in shapes:
            assert torch.equal(result[name], expected[name])
            whole = torch.cat([chunk for _, chunk in result.chunks(name, length)], dim=1)
            assert torch.equal(whole, expected[name].reshape(len(whole), -1))


ROW_BY_ROW = [
    (chain(Drop(0.5), Scale([1.0, -0.5, 2.0]), Negate()), True),
    (chain(Trim(0.5), Rescale()), True),
    (chain(MagnitudeWindow(0.5, 0.2, "global"), Drop(0.3)), True),
    (chain(Trim(0.5), LiNeS(0.3)), False),
    (chain(ElectSign(), Scale(2.0)), False),
]


@pytest.mark.parametrize(("transform", "by_rows"), ROW_BY_ROW, ids=str)
def test_a_sum_of_rows_is_that_of_their_stack(transform, by_rows):
    vectors = transform(random_vectors())
    assert vectors.by_rows == by_rows == vectors.restrict(["proj"]).by_rows
    summed = Sum()(vectors)
    for name in vectors:
        stack = vectors[name]
        expected = stack[0] + stack[1] + stack[2]
        assert torch.equal(summed[name][0], expected)
        parts = [list(map(torch.clone, vectors.rows(name)(start, start + 1))) for start in range(stack[0].numel())]
        if parts:
            assert torch.equal(torch.stack([torch.cat(row) for row in zip(*parts, strict=True)]), stack.view(3, -1))
    with pytest.raises(KeyError, match="nothing"):
        vectors.rows("nothing")


def test_summing_rows_makes_no_chunk_of_all(monkeypatch):
    vectors = Scale(2.0)(random_vectors())
    monkeypatch.setattr(sources.Rows, "reader", None)
    assert torch.equal(Sum()(vectors)["proj"][0], 2 * sum(random_tensors(seed)["proj"] for seed in range(3)))


def test_what_is_not_finite_is_named_though_it_is_dropped():
    values = torch.ones(1000)
    values[::2] = float("nan")
    broken = TaskVectors([TaskVector({"weight": torch.ones(1000)}, "a"), TaskVector({"weight": values}, "b")])
    with pytest.raises(NonFiniteError, match=r"task vector 'b'.*weight"):
        Sum()(Drop(1 - 1e-9)(broken))["weight"]


def test_pieces_are_the_callers_own():
    for transform in (chain(), Sum(), Trim(0.5, "tensor"), TallMask()):
        result = transform(random_vectors())
        before = result["blocks.0.weight"].clone()
        for _, chunk in result.chunks("blocks.0.weight", 100):
            chunk.fill_(7.0)
        assert torch.equal(result["blocks.0.weight"], before)
    with pytest.raises(KeyError, match="nothing"):
        random_vectors().chunks("nothing").__next__()
    with pytest.raises(KeyError, match="nothing"):
        random_vectors()["nothing"]


def test_a_stack_does_not_hold_the_stacks_it_was_made_of():
    def first_row(name, stack):
        return stack[:1]

    def spread(name, stack):
        return stack.mean(0, keepdim=True).expand(stack.shape)

    vectors = random_vectors(9)
    views = [Sum()(vectors), vectors.map(first_row, ["t"]), vectors.map(spread), vectors.select(["t3"])]
    for view in views:
        stack = view["blocks.0.weight"]
        assert stack.is_contiguous()
        assert stack.untyped_storage().nbytes() == stack.nbytes
    assert Trim(0.5, "tensor")(vectors.map(spread))["blocks.0.weight"].count_nonzero() == 9 * 1000


def peak(layers: int, transform: Transform, tasks: int = 4) -> float:
    """The most MiB held while a merged model of layers of half a MiB is computed and dropped layer by layer."""
    structure = {f"blocks.{index}.weight": (torch.Size([1 << 17]), torch.float32) for index in range(layers)}

    def computed(seed, name):
        generator = torch.Generator().manual_seed(100 * seed + int(name.split(".")[1]))
        return torch.randn(1 << 17, generator=generator)

    rows = [TaskVector(Computed(structure, partial(computed, seed)), str(seed)) for seed in range(tasks)]
    result = transform(TaskVectors(rows))
    with LiveTensorBytes() as live:
        for name in result:
            result[name]
    return live.peak / 2**20


@pytest.mark.parametrize("transform", [ties(0.3), chain(Trim(0.3), Rescale()), TallMask(merge=ties(0.3))], ids=repr)
def test_memory_does_not_grow_with_depth(transform):
    shallow, deep = peak(3, transform), peak(6, transform)
    assert deep <= shallow * 1.02
    assert deep <= 24  # a stack has 2 MiB, the histograms of four rows as much


def test_restricted_views_have_statistics_of_their_own():
    vectors = random_vectors()
    part = vectors.restrict(["proj", "blocks.1.weight"])
    assert part.names == ("proj", "blocks.1.weight")
    assert part.model_names == vectors.names
    assert part.inputs is part
    assert Trim(0.1)(part)["blocks.1.weight"].count_nonzero() + Trim(0.1)(part)["proj"].count_nonzero() == 3 * 3
    later = Trim(0.5)(vectors).restrict(["blocks.1.weight"])
    assert torch.equal(later["blocks.1.weight"], Trim(0.5)(vectors)["blocks.1.weight"])
    assert later.inputs.names == ("blocks.1.weight",)
    assert torch.equal(later.inputs["blocks.1.weight"], vectors["blocks.1.weight"])
    assert len(later.statistics) == 1
    assert Rescale()(later).reads == 3 + 1 + 1 + 1
    again = part.restrict(["proj"])
    assert torch.equal(again["proj"], vectors["proj"])
    assert again.chunk_length("proj") == vectors.chunk_length("proj")


def test_restrict_refuses_unknown_names():
    for names, got in (([], "none"), (["proj", "x", "y"], "x, y")):
        with pytest.raises(
            ConfigurationError, match=rf"names: expected parameters of the task vectors, got {got}\. Use their names\."
        ):
            random_vectors().restrict(names)


def test_united_puts_parts_together():
    vectors = random_vectors()
    parts = [Scale(2)(vectors.restrict(["proj", "empty"])), Trim(0.5)(vectors.restrict(list(SHAPES)[:2]))]
    result = vectors.united(parts, note="parts")
    assert result.names == vectors.names
    assert torch.equal(result["proj"], vectors["proj"] * 2)
    assert torch.equal(result["blocks.0.weight"], parts[1]["blocks.0.weight"])
    assert result.statistics == parts[1].statistics
    assert result.provenance == (*vectors.provenance, "parts")
    with pytest.raises(
        ConfigurationError,
        match=r"parts: expected parts with the same number of vectors, got 1 and 3\. Let all of them",
    ):
        vectors.united([Sum()(parts[0]), parts[1]], note="parts")


def test_selecting_from_a_view_selects_its_inputs_too():
    """Rescale gives every row the norm of the input that it came from, wherever that row is now."""
    vectors = random_vectors()
    chosen = Trim(0.3)(vectors).select(["t2", "t0"])
    assert chosen.tasks == chosen.inputs.tasks == ("t2", "t0")
    expected = chain(Trim(0.3), Rescale())(vectors.select(["t2", "t0"]))
    for name in SHAPES:
        torch.testing.assert_close(Rescale()(chosen)[name], expected[name])
    part = vectors.restrict(["proj"]).select([1])
    assert part.inputs is part
    assert torch.equal(part["proj"], vectors["proj"][1:2])
    merged = Sum()(vectors).select([0])
    assert merged.inputs.tasks == vectors.tasks  # a merged row came from all of them
    assert Trim(0.3)(vectors).select([1]).provenance[-1] == "select(['t1'])"


def test_rescale_refuses_rows_that_came_from_nowhere():
    vectors = random_vectors()
    fewer = vectors.map_elements(lambda name, start, chunk: chunk[:2], tasks=["x", "y"])
    with pytest.raises(
        ConfigurationError, match=r"Rescale: expected 1 or 3 vectors, as many as the inputs, got 2\. Put it before"
    ):
        Rescale()(fewer)


def test_map_and_map_entries_hand_over_other_views():
    vectors = random_vectors()
    doubled = Scale(2)(vectors)

    def both(name, stack, other):
        return stack + other

    def chunks(name, start, chunk, other):
        return chunk + other

    for view in (vectors.map(both, others=[doubled]), vectors.map_elements(chunks, others=[doubled])):
        torch.testing.assert_close(view["blocks.0.weight"], vectors["blocks.0.weight"] * 3)
        assert view.reads == 2
    trimmed = Trim(0.5)(vectors)
    assert vectors.map(both, others=[trimmed]).statistics == trimmed.statistics
    assert not vectors.map(both, others=[trimmed]).by_chunks
    assert vectors.map_elements(chunks, others=[trimmed]).by_chunks
    assert not Sum()(vectors.map(both, others=[trimmed])).by_chunks


def test_pieces_of_another_shape_are_refused():
    view = random_vectors().map_elements(lambda name, start, chunk: chunk[:, :1], note="cut")
    with pytest.raises(StructureMismatchError, match=r"cut: expected torch.float32 \(3, 2000\) for blocks.0.w"):
        view["blocks.0.weight"]


def test_a_vector_without_a_name_is_named_by_its_number():
    tensors = [random_tensors(seed) for seed in range(3)]
    tensors[1]["proj"] = torch.tensor(torch.nan)
    vectors = TaskVectors([TaskVector(row) for row in tensors])
    for read in (vectors.__getitem__, lambda name: list(Sum()(vectors).chunks(name)), Trim(0.5)(vectors).__getitem__):
        with pytest.raises(NonFiniteError, match=r"task vector number 1: expected finite values, .* in proj\."):
            read("proj")


def test_a_sum_that_overflows_hides_nothing():
    large = torch.full((3,), 3e38)
    vectors = TaskVectors([TaskVector({"w": large}, "a"), TaskVector({"w": large.clone()}, "b")])
    assert torch.equal(vectors["w"], large.expand(2, 3))
    vectors = TaskVectors([TaskVector({"w": large}, "a"), TaskVector({"w": torch.tensor([1.0, torch.inf, 1])}, "b")])
    with pytest.raises(NonFiniteError, match=r"task vector 'b': .* in w\."):
        vectors["w"]


def test_the_base_is_given_or_asked_for():
    vectors = random_vectors()
    with pytest.raises(ConfigurationError, match=r"base: expected the pre-trained parameters, got none\. Use TaskV"):
        _ = vectors.base
    base = random_tensors(7)
    rows = [vectors.vector(task) for task in vectors.tasks]
    known = TaskVectors(rows, base=base)
    assert known.base is base
    assert Sum()(known).base is Trim(0.5)(known).restrict(["proj"]).base is known.select(["t1"]).base is base
    with pytest.raises(StructureMismatchError, match=r"base: expected every parameter .* got 1 missing \(proj\)\."):
        TaskVectors(rows, base={name: tensor for name, tensor in base.items() if name != "proj"})
    with pytest.raises(
        StructureMismatchError, match=r"base: expected every parameter .* got 1 of another shape \(proj \(3,\) inst"
    ):
        TaskVectors(rows, base={**base, "proj": torch.zeros(3)})


def of_files(folder, count: int, damaged: int | None = None) -> tuple[TaskVectors, torch.Tensor]:
    """Fine-tuned weights in bfloat16 beside their base, and their differences, ``(T, n)``."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(100_000, generator=generator).bfloat16()
    rows, differences = [], []
    save_file({"w": base}, folder / "base.safetensors")
    for index in range(count):
        tuned = (base + 0.1 * torch.randn(100_000, generator=generator)).bfloat16()
        if index == damaged:
            tuned[77_777] = float("inf")
        save_file({"w": tuned}, folder / f"{index}.safetensors")
        path = folder / f"{index}.safetensors"
        rows.append(TaskVector.from_checkpoints(folder / "base.safetensors", path, task=f"task{index}"))
        differences.append(tuned.float() - base.float())
    return TaskVectors(rows), torch.stack(differences)


@pytest.mark.parametrize("transform", [Sum(), Mean(), chain(Sum(), Scale(0.3))], ids=repr)
def test_sums_of_files_are_read_vector_by_vector(tmp_path, transform, monkeypatch):
    """The same bits as from a stack of all of them, in memory that does not grow with T."""
    vectors, differences = of_files(tmp_path, 12)
    monkeypatch.setattr(sources, "_ELEMENTS_OF_A_SUM", 1 << 15)
    monkeypatch.setattr(sources, "_ELEMENTS_IN_CACHE", 1 << 20)
    expected = transform(TaskVectors([TaskVector({"w": row}, str(index)) for index, row in enumerate(differences)]))
    result = transform(vectors)
    assert torch.equal(result["w"], expected["w"])
    with LiveTensorBytes() as live:
        chunks = [chunk.sum() for _, chunk in result.chunks("w")]
    assert len(chunks) > 1
    assert live.peak < 6 * 4 * (1 << 17)  # a chunk of twelve has 1.5 MiB or more beside what is made of it


def test_a_damaged_vector_in_a_sum_is_named(tmp_path):
    vectors, _ = of_files(tmp_path, 3, damaged=1)
    with pytest.raises(NonFiniteError, match="task vector 'task1': expected finite values, got NaN or infinity in w"):
        Sum()(vectors)["w"]


def test_a_sum_that_overflows_is_nobodys_fault():
    rows = [TaskVector({"w": torch.full((5,), 3e38)}, task) for task in "ab"]
    assert torch.isinf(Sum()(TaskVectors(rows))["w"]).all()
