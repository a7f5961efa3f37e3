"""Trimming, windows and random dropping against their definitions, restated in NumPy and plain loops."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import pickle
from decimal import Decimal

import numpy as np
import pytest
import torch
from builders.oracle_arrays import arrays, random_vectors, window

from lit_merge.errors import NonFiniteError
from lit_merge.transforms import (
    Chain,
    Drop,
    DropByRank,
    MagnitudeWindow,
    Sum,
    Transform,
    Trim,
    chain,
    magnitudes,
    sparsify,
)
from lit_merge.transforms.random import Uniform
from lit_merge.vectors import TaskVector, TaskVectors, global_value, sources
from lit_merge.vectors.threads import NeededInMainThread, in_worker


def check(transform: Transform, vectors: TaskVectors, density: float, outliers: float, scope: str) -> None:
    expected = [window(vector, density, outliers, scope) for vector in arrays(vectors)]
    found = arrays(transform(vectors))
    for one, other in zip(found, expected, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


KINDS = ("float64", "float32", "mixed", "equal", "denormal", "zero", "sparse", "extreme")


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_trim(kind, scope):
    vectors = random_vectors(kind)
    for density in (0.01, 0.2, 0.29, 0.5, 0.99):
        check(Trim(density, scope), vectors, density, 0.0, scope)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_magnitude_window(kind, scope):
    vectors = random_vectors(kind)
    for density, outliers in ((0.85, 0.01), (0.5, 0.0), (0.3, 0.3), (0.01, 0.5), (0.6, 0.4)):
        check(MagnitudeWindow(density, outliers, scope), vectors, density, outliers, scope)


@pytest.mark.parametrize("density", [0.29, 0.57, 0.58, 0.07, 0.01, 0.009, 1e-05])
def test_a_share_means_what_is_written(density):
    """29 of 100, although the float 0.29 times 100 is 28.999…; and at least one."""
    vectors = TaskVectors([TaskVector({"weight": torch.arange(1.0, 101)}, "t")])
    count = max(int(Decimal(str(density)) * 100), 1)
    for scope in ("global", "tensor"):
        assert Trim(density, scope)(vectors)["weight"].count_nonzero() == count
        assert MagnitudeWindow(density, 0.0, scope)(vectors)["weight"].count_nonzero() == count
        # as many outliers, and what comes after them
        kept = MagnitudeWindow(0.25, density, scope)(vectors)["weight"].nonzero()[:, 1].tolist()
        top = int(Decimal(str(density)) * 100)
        assert kept == list(range(100 - top - 25, 100 - top))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_float64_threshold_among_float32_entries(scope):
    """Numbers that float32 cannot tell apart, in one vector with entries that are float32."""
    step = 2.0**-40
    doubles = torch.tensor([1 + step, -1 + step, -1 - step, 1 - step, 1 + 2.0**-23 - step, 3.0], dtype=torch.float64)
    singles = torch.tensor([1.0, -1.0, 1 + 2.0**-23, 1 - 2.0**-24, 0.5])
    for first, second in itertools.permutations((doubles, singles)):
        vectors = TaskVectors([TaskVector({"a": first, "b": second}, "t"), TaskVector({"a": -first, "b": second}, "u")])
        for count in range(1, 12):
            density = (count + 0.5) / 11 if count < 11 else 1.0
            check(Trim(density, scope), vectors, density, 0.0, scope)
            outliers = (count - 0.5) / 11
            check(MagnitudeWindow(0.04, outliers, scope), vectors, 0.04, outliers, scope)


def big_vectors(kind: str, dtype: torch.dtype = torch.float32) -> tuple[TaskVectors, torch.Tensor]:
    """Several parameters of several chunks, and the vectors flattened in sorted order."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"c": (300, 1000), "a": (40_001,), "d": (5, 7, 999), "b": (3,)}
    rows = []
    for task in "pq":
        values = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in sizes.items()}
        if kind == "equal":
            values = {name: value.mul(8).round() for name, value in values.items()}
        if kind == "constant":
            values = {name: value.sign() for name, value in values.items()}
        if kind == "narrow":  # differences of bfloat16: a percent of them equals the threshold
            base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in sizes.items()}
            values = {name: (one + values[name] / 9).bfloat16().to(dtype) - one for name, one in base.items()}
        rows.append(TaskVector(values, task))
    vectors = TaskVectors(rows)
    return vectors, torch.cat([vectors[name].flatten(1) for name in sorted(sizes)], dim=1)


def largest(flat: torch.Tensor, count: int, top: int = 0) -> torch.Tensor:
    order = flat.abs().sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(flat).scatter_(1, order[:, top:count], flat.gather(1, order[:, top:count]))


def flattened(result: TaskVectors) -> torch.Tensor:
    return torch.cat([result[name].flatten(1) for name in sorted(result)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "equal", "constant", "narrow"])
@pytest.mark.parametrize("chunks", [None, 64], ids=["digits", "sample"])
def test_large_vectors_are_ranked_exactly(kind, dtype, chunks, monkeypatch):
    """In many chunks; by digits alone, and with a sample that tells where the threshold lies."""
    monkeypatch.setattr(magnitudes, "_LENGTH", 1 << 15)
    monkeypatch.setattr(magnitudes, "_FEWEST", 1 << (16 if chunks else 20))
    if chunks:
        monkeypatch.setattr(magnitudes, "_CHUNK", chunks)
        monkeypatch.setattr(magnitudes, "_SAMPLE", 1 << 14)
    vectors, flat = big_vectors(kind, dtype)
    assert magnitudes.sampled(vectors) == bool(chunks)
    count = int(Decimal("0.2") * flat.shape[1])
    assert torch.equal(flattened(Trim(0.2)(vectors)), largest(flat, count))
    top = int(Decimal("0.1") * flat.shape[1])
    found = flattened(MagnitudeWindow(0.3, 0.1, "global")(vectors))
    assert torch.equal(found, largest(flat, top + int(Decimal("0.3") * flat.shape[1]), top))


@pytest.fixture
def in_files(tmp_path, monkeypatch):
    """``in_files(vectors, cached, streamed, held)``: the same in files, read in chunks; large stacks are streamed."""

    def write(vectors: TaskVectors, cached: int, streamed: int, held: int = 0) -> TaskVectors:
        monkeypatch.setattr(magnitudes, "_LENGTH", 1 << 14)
        monkeypatch.setattr(magnitudes, "_HELD", held)
        monkeypatch.setattr(sources, "_ELEMENTS_IN_CACHE", cached)
        monkeypatch.setattr(sparsify, "_STREAMED", streamed)
        paths = [tmp_path / f"{task}.safetensors" for task in vectors.tasks]
        for task, path in zip(vectors.tasks, paths, strict=True):
            vectors.vector(task).save(path)
        return TaskVectors([TaskVector.load(path) for path in paths])

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "equal", "constant", "narrow"])
@pytest.mark.parametrize(("streamed", "in_memory"), [(False, 0), (True, 0), (True, 1 << 18)])
@pytest.mark.parametrize(("density", "outliers"), [(0.2, 0.0), (0.3, 0.1), (0.3, 1e-5)])
def test_tensors_are_ranked_by_themselves(kind, dtype, streamed, in_memory, density, outliers, in_files, monkeypatch):
    """In memory, with a sample for the largest; chunk by chunk, without a stack in memory; and some either way."""
    monkeypatch.setattr(magnitudes, "_FEWEST", 1 << 15)
    held = big_vectors(kind, dtype)[0]
    vectors = in_files(held, cached=1 << 13, streamed=1 << (12 if streamed else 30), held=in_memory)
    found = MagnitudeWindow(density, outliers, "tensor")(vectors)
    assert any("large tensors" in one.what for one in found.statistics) == streamed
    for name in held:
        flat = held[name].flatten(1)
        top = int(Decimal(str(outliers)) * flat.shape[1])
        count = min(top + max(int(Decimal(str(density)) * flat.shape[1]), 1), flat.shape[1])
        assert torch.equal(found[name].flatten(1), largest(flat, count, top)), name


@pytest.mark.parametrize("brackets", [(5.0, 6.0), (0.1, 0.2), (0.0, 9.0), (0.5, 9.0)])
def test_a_sample_of_a_stack_that_misleads_is_noticed(brackets, monkeypatch):
    monkeypatch.setattr(magnitudes, "_LENGTH", 1 << 15)
    monkeypatch.setattr(magnitudes, "_brackets_of", lambda sample, lengths, fraction: [brackets, brackets])
    vectors, _ = big_vectors("random")
    flat = vectors["c"].flatten(1)
    assert torch.equal(Trim(0.2, "tensor")(vectors)["c"].flatten(1), largest(flat, flat.shape[1] // 5))


def test_a_sample_of_rows_that_differ_seldom_misleads():
    """Rows of a matrix are 1024 elements that are alike; a sample has a hundred blocks."""
    generator = torch.Generator().manual_seed(1)
    for scale in (0.0, 0.5, 1.5):
        rows = torch.randn(12, 512, 1, generator=generator).mul_(scale).exp_()
        flat = (torch.randn(12, 512, 1024, generator=generator) * rows).flatten(1)
        kept = flat.shape[1] // 5
        cuts = magnitudes._cuts_within_stack("w", flat, kept)
        assert cuts is not None, scale
        assert cuts == magnitudes.find_cuts(lambda flat=flat: magnitudes.walk_stack("w", flat), kept, torch.float32)


def test_a_large_tensor_is_never_a_stack_in_memory(in_files, monkeypatch):
    held = big_vectors("random")[0]
    vectors = in_files(held, cached=1 << 15, streamed=1 << 17)
    read: list[tuple[str, int]] = []
    monkeypatch.setattr(sources.Rows, "reader", counted(sources.Rows.reader, read))
    for _ in chain(Trim(0.2, "tensor"), Sum())(vectors).stream(list(held)):
        pass
    assert {name for name, length in read if length > 1 << 15} == {"a", "d"}  # the small ones, as a whole
    assert {name for name, _ in read} == set(held)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_thresholds_of_small_tensors_are_found_ahead(in_files, monkeypatch, two_threads):
    """On the threads that compute chunks, each once; also if they wait for what the main thread has to find first."""
    held = big_vectors("random")[0]
    expected = Sum()(Trim(0.2, "tensor")(Trim(0.5)(held)))
    vectors = in_files(held, cached=1 << 13, streamed=1 << 12, held=1 << 30)
    found: list[tuple[str, bool]] = []
    original = magnitudes.find_cuts_of_stack

    def find(name: str, stack: torch.Tensor, kept: int) -> tuple[magnitudes.Cut, ...]:
        found.append((name, in_worker()))
        return original(name, stack, kept)

    monkeypatch.setattr(magnitudes, "find_cuts_of_stack", find)
    trimmed = Trim(0.2, "tensor")(vectors)
    for name, values in Sum()(trimmed).vector(0).stream(list(held)):
        assert values.isfinite().all(), name
    large = sorted(name for name in held if held[name].numel() >= 1 << 12 and held[name][0].numel() > 1 << 12)
    assert sorted(found) == [(name, True) for name in large]
    copied = pickle.loads(pickle.dumps(trimmed))
    assert torch.equal(copied["d"], trimmed["d"])

    twice = Sum()(Trim(0.2, "tensor")(Trim(0.5)(vectors))).vector(0)
    pieces: dict[str, list[torch.Tensor]] = {}
    for name, values in twice.stream(list(held)):
        pieces.setdefault(name, []).append(values)
    for name in held:
        assert torch.equal(torch.cat(pieces[name]), expected[name].flatten()), name


def test_what_is_not_finite_is_named_by_what_is_found_ahead(monkeypatch, two_threads):
    monkeypatch.setattr(sparsify, "_STREAMED", 1 << 12)
    monkeypatch.setattr(sources, "_ELEMENTS_IN_CACHE", 1 << 13)
    values = {"a": torch.randn(1 << 15), "b": torch.randn(1 << 15)}
    values["b"][7] = float("inf")
    vectors = TaskVectors([TaskVector(values, "t")])
    with pytest.raises(NonFiniteError, match=r"task vector 't'.*in b"):
        list(Sum()(Trim(0.2, "tensor")(vectors)).vector(0).stream(["a", "b"]))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_what_waits_for_a_threshold_is_not_held(in_files, monkeypatch, scope):
    """A chunk whose computation needs a value that there is not yet is let go, without the garbage collector.

    Thresholds of single tensors are found before their chunks are computed, so that none has to wait.
    """
    vectors = in_files(big_vectors("random")[0], cached=1 << 15, streamed=1 << 12)
    asked = []
    for module in (magnitudes, global_value):
        monkeypatch.setattr(
            module, "NeededInMainThread", lambda compute: asked.append(1) or NeededInMainThread(compute)
        )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    gc.collect()
    gc.disable()
    try:
        for _ in chain(Trim(0.2, scope), Sum())(vectors).vector(0).stream(["a", "c", "d"]):
            pass
        assert not [one for one in gc.get_objects() if isinstance(one, NeededInMainThread)]
    finally:
        gc.enable()
        torch.set_num_threads(before)
    assert bool(asked) == (scope == "global")


def counted(reader, read):
    """As it is, keeping which parameters are read, and how much of them at a time."""

    def of(self, name):
        part = reader(self, name)

        def noted(start: int, stop: int) -> torch.Tensor:
            read.append((name, stop - start))
            return part(start, stop)

        return noted

    return of


@pytest.mark.parametrize("brackets", [(5.0, 6.0), (0.1, 0.2), (0.0, 9.0), (0.5, 9.0)])
def test_a_sample_that_misleads_is_noticed(brackets, monkeypatch):
    monkeypatch.setattr(magnitudes, "_SAMPLE", 1 << 14)
    monkeypatch.setattr(magnitudes, "_brackets", lambda vectors, kept: [brackets, brackets])
    vectors, flat = big_vectors("random")
    assert torch.equal(flattened(Trim(0.2)(vectors)), largest(flat, int(Decimal("0.2") * flat.shape[1])))


def test_equal_magnitudes_without_end_are_not_collected(monkeypatch):
    """Vectors of plus and minus one: all entries lie where the threshold is, and memory has to stay bounded."""
    monkeypatch.setattr(magnitudes, "_SAMPLE", 1 << 14)
    constant, flat = big_vectors("constant")
    kept = flat.shape[1] // 5
    assert magnitudes._cuts_within(constant, kept, [(1.0, 1.0)] * 2) is None


@pytest.mark.parametrize("streamed", [1 << 12, 1 << 24])
def test_few_values_of_a_parameter_are_no_reason_to_read_it_again(in_files, monkeypatch, streamed):
    """As differences of bfloat16 have: a tenth of all elements equals the threshold."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(600_000, generator=draw).mul_(3).round_() for _ in range(2)]
    held = TaskVectors([TaskVector({"w": row}, name) for row, name in zip(rows, "ab", strict=True)])
    vectors = in_files(held, 1 << 15, streamed)
    monkeypatch.setattr(magnitudes, "find_cuts", None)  # the digits, by two more passes
    found = Trim(0.2, "tensor")(vectors)["w"]
    for row, kept in zip(rows, found, strict=True):
        order = row.abs().argsort(descending=True, stable=True)[:120_000]
        assert torch.equal(kept, torch.zeros_like(row).index_copy_(0, order, row[order]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "narrow"])
def test_between_the_brackets_one_pass_finds_what_the_digits_find(kind, dtype, monkeypatch):
    monkeypatch.setattr(magnitudes, "_SAMPLE", 1 << 14)
    monkeypatch.setattr(magnitudes, "_LENGTH", 1 << 12)
    vectors, flat = big_vectors(kind, dtype)
    for kept in (flat.shape[1] // 5, flat.shape[1] // 5 + 700):
        found = magnitudes._cuts_within(vectors, kept, magnitudes._brackets(vectors, kept))
        assert found == magnitudes.find_cuts(lambda: magnitudes.walk_all(vectors), kept, dtype)
        assert (None in {cut.name for cut in found}) != (kind == "narrow")


def test_trim_of_what_was_dropped():
    """A chain: the threshold is of the sparse vectors, and zeros may be among what is kept."""
    vectors = random_vectors("float32")
    for density in (0.1, 0.3, 0.9):
        check(Trim(density), Drop(0.5)(vectors), density, 0.0, "global")
        once = arrays(chain(Drop(0.5), Trim(density))(vectors))
        for one, other in zip(once, arrays(Drop(0.5)(vectors)), strict=True):
            for name, values in window(other, density).items():
                np.testing.assert_array_equal(one[name], values)


# --- random dropping ---


def bits(seed: int, task: str, number: int, name: str, position: int) -> int:
    """The documented hash in whole numbers without a limit."""
    digest = hashlib.sha256(json.dumps([seed, task, number, name]).encode()).digest()
    factor, offset = (int.from_bytes(digest[first : first + 4], "little") for first in (0, 4))
    value = (position * (factor | 1) + offset) % 2**32
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        value = (value ^ (value >> shift)) * multiplier % 2**32
    return value ^ 2**31  # compared as a signed number


def ones(size: int, tasks: str = "a", name: str = "weight") -> TaskVectors:
    return TaskVectors([TaskVector({name: torch.ones(size)}, task) for task in tasks])


@pytest.mark.parametrize(("seed", "task", "name"), [(0, "digits", "weight"), (-3, "ö", "blocks.1.β"), (2**70, "", "x")])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.25, 0.9, 1 - 1e-12])
def test_drop(seed, task, name, p):
    values = torch.linspace(-2, 2, 300)
    vectors = TaskVectors([TaskVector({name: values}, task), TaskVector({name: values}, task)])
    found = Drop(p, seed=seed)(vectors)[name]
    for number in (0, 1):  # the second row of one name has numbers of its own
        dropped = [bits(seed, task, number, name, place) < round(p * 2**32) for place in range(300)]
        expected = [0.0 if gone else float(value) / (1 - p) for value, gone in zip(values, dropped, strict=True)]
        np.testing.assert_allclose(found[number].numpy(), expected, rtol=3e-7)
        plain = Drop(p, rescale=False, seed=seed)(vectors)[name][number]
        assert torch.equal(plain, values.masked_fill(torch.tensor(dropped), 0))


@pytest.mark.parametrize("start", [2**31 - 3, 2**32 - 3, 2**33 + 1])
def test_positions_wrap_after_32_bits(start):
    found = torch.ones(6)
    Uniform(1, (("t", 0),)).drop(0.5, 0, "n", start, found)
    assert (found == 0).tolist() == [bits(1, "t", 0, "n", position) < 2**31 for position in range(start, start + 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("p", "start"), [(0.9, 0), (0.5, 2**32 - 70_000), (2.0**-32, 7), (1 - 1e-12, 2**33 + 1)])
def test_processors_and_accelerators_drop_the_same(dtype, p, start):
    """Blocks of NumPy's unsigned integers there, the whole chunk of torch's signed ones here."""
    found = torch.randn(150_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    elsewhere = found.unsqueeze(1).repeat(1, 2)[:, 0]  # strided, which is computed as on other devices
    for values in (found, elsewhere):
        Uniform(3, (("a", 0), ("b", 0))).drop(p, 1, "n", start, values)
    assert torch.equal(found, elsewhere)
    assert not found[found == 0].signbit().any()


@pytest.mark.parametrize(
    ("transform", "task", "name", "kept"),
    [
        (Drop(0.5, seed=0), "digits", "blocks.0.attn.in_proj_weight", "a3941fafa5c6448b"),
        (Drop(0.5, seed=1), "digits", "blocks.0.attn.in_proj_weight", "f220d5c4075073c2"),
        (Drop(0.9, seed=0), "letters", "ln_post.bias", "8002080001110001"),
        (DropByRank(0.5, 0.3, seed=0), "digits", "conv1.weight", "263c83c8f238e47e"),
    ],
)
def test_masks_never_change(transform, task, name, kept):
    """Of 64 entries, four to a hexadecimal digit: the same in every version."""
    vectors = TaskVectors([TaskVector({name: torch.linspace(1, 2, 64)}, task)])
    mask = transform(vectors)[name][0] != 0
    assert f"{int(''.join(str(int(bit)) for bit in mask), 2):016x}" == kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_as_much_is_dropped_as_asked_for(p):
    size = 200_000
    for seed in range(3):
        kept = Drop(p, seed=seed)(ones(size, "abc"))["weight"].count_nonzero(dim=1) / size
        assert (kept - (1 - p)).abs().max() < 4 * math.sqrt(p * (1 - p) / size)


def test_masks_are_independent():
    """Between tasks, parameters, seeds and positions: correlations within 4.5 standard deviations of none."""
    size = 200_000
    masks = {
        (seed, task, name): Drop(0.5, rescale=False, seed=seed)(ones(size, task, name))[name][0] * 2 - 1
        for seed in (0, 1)
        for task in "ab"
        for name in ("weight", "weighu")
    }
    limit = 4.5 / math.sqrt(size)
    for one, other in itertools.combinations(masks.values(), 2):
        assert abs(float((one * other).mean())) < limit
    for mask in masks.values():
        for lag in (1, 2, 3, 7, 64, 256, 768, 1024, 65536):
            assert abs(float((mask[:-lag] * mask[lag:]).mean())) < limit * 1.3
        runs = mask.view(-1, 8).sum(1)  # of eight neighbours: variance 8 if they are independent
        assert abs(float(runs.square().mean()) / 8 - 1) < 4.5 * math.sqrt(2 / (size / 8))


def test_the_expectation_stays():
    values = torch.linspace(-1, 1, 50)
    vectors = TaskVectors([TaskVector({"weight": values}, "t")])
    for transform, spread in ((Drop, {"p": 0.7}), (DropByRank, {"density": 0.3, "epsilon": 0.2})):
        runs = torch.stack([transform(**spread, seed=seed)(vectors)["weight"][0] for seed in range(1000)])
        deviation = math.sqrt(9 / 1000)  # (1 − p) / p for the least probability, 0.1
        assert ((runs.mean(0) - values).abs() <= 4.5 * deviation * values.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (40,), (4, 2, 3, 3), (2, 3, 4), (5, 1), (), (0, 4)], ids=str)
def test_drop_by_rank(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).mul(3).round().div(3) for _ in "ab"]
    vectors = TaskVectors([TaskVector({"weight": tensor}, task) for task, tensor in zip("ab", tensors, strict=True)])
    transform = DropByRank(0.5, 0.4, seed=2)
    plain = DropByRank(0.5, 0.4, rescale=False, seed=2)
    for row, task in enumerate("ab"):
        values = tensors[row].numpy().astype(float)
        lines = values.reshape(shape[0], -1) if values.size and len(shape) > 1 else values.reshape(1, -1)
        expected, unscaled = np.zeros(lines.shape), np.zeros(lines.shape)
        for line, places in enumerate(lines):
            order = sorted(range(len(places)), key=lambda place: abs(places[place]))
            for rank, place in enumerate(order):
                kept = 0.5 - 0.4 + 0.8 * rank / (len(places) - 1) if len(places) > 1 else 0.5
                number = (bits(2, task, 0, "weight", line * len(places) + place) ^ 2**31) >> 8
                if number / 2**24 < kept:
                    expected[line, place], unscaled[line, place] = places[place] / kept, places[place]
        np.testing.assert_allclose(transform(vectors)["weight"][row].numpy(), expected.reshape(shape), rtol=1e-6)
        np.testing.assert_array_equal(plain(vectors)["weight"][row].numpy(), unscaled.reshape(shape))


def test_what_is_larger_is_kept_more_often():
    values = torch.rand(2000, 50, generator=torch.Generator().manual_seed(0)) + 0.1
    result = DropByRank(0.6, 0.3)(TaskVectors([TaskVector({"weight": values}, "t")]))["weight"][0]
    ranks = values.argsort(dim=1).argsort(dim=1)
    for rank, wanted in ((0, 0.3), (25, 0.3 + 0.6 * 25 / 49), (49, 0.9)):
        share = float((result[ranks == rank] != 0).float().mean())
        assert abs(share - wanted) < 4.5 * math.sqrt(wanted * (1 - wanted) / 2000)


def test_two_drops_in_one_chain_need_two_seeds():
    """With one seed they drop the same entries."""
    vectors = ones(20_000)
    both = Chain([Drop(0.5, rescale=False), Drop(0.5, rescale=False)])(vectors)["weight"]
    assert torch.equal(both, Drop(0.5, rescale=False)(vectors)["weight"])
    other = chain(Drop(0.5, rescale=False), Drop(0.5, rescale=False, seed=1))(vectors)["weight"]
    assert abs(float(other.mean()) - 0.25) < 0.015
