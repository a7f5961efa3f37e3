"""Laws that every transform obeys. A new transform is one more line in CASES."""

from __future__ import annotations

import itertools
import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from lit_merge import transforms
from lit_merge.errors import LitMergeError, NonFiniteError
from lit_merge.transforms import (
    ACE,
    CART,
    DOGE,
    ESM,
    PCB,
    RAM,
    SCE,
    WUDI,
    CalibratedDirections,
    CARTDirections,
    Chain,
    Clip,
    ConsensusMask,
    CoreSpace,
    DCMerge,
    Departures,
    DisjointMean,
    DisjointSum,
    Drop,
    DropByRank,
    ElectSign,
    FisherMean,
    Interpolate,
    IsoC,
    IsoCTS,
    KarcherMean,
    KnOTS,
    LargestMagnitude,
    LearnedScale,
    LiNeS,
    MagnitudeWindow,
    Mean,
    ModelStock,
    Negate,
    OptMerge,
    OrthoMerge,
    Override,
    Polarise,
    ProjectedSum,
    RegMean,
    Rescale,
    RunningMean,
    Scale,
    ScaleBlocks,
    SignMask,
    Slerp,
    SpectralWUDI,
    Sum,
    TallMask,
    Transform,
    Trim,
    TrustRegion,
    TSVDirections,
    TSVMerge,
    WithOverrides,
    adamerging,
    analogy,
    breadcrumbs,
    chain,
    consensus_ta,
    consensus_ties,
    continual,
    dare_linear,
    dare_ties,
    della,
    iso_c,
    iso_cts,
    karcher,
    lines,
    model_stock,
    negation,
    recipe,
    rewarded_soup,
    slerp,
    svc,
    tall_masks,
    task_arithmetic,
    ties,
    tsv_m,
    weight_average,
    wudi,
)
from lit_merge.vectors import Coefficients, Granularity, TaskVector, TaskVectors, group_names, sources
from lit_merge.vectors.statistics import write_statistics

TASKS = ("digits", "letters", "signs")
SHAPES = {
    "patch_embed.proj.weight": (2, 3, 2, 2),
    "blocks.1.weight": (4, 3),
    "blocks.0.bias": (4,),
    "blocks.0.weight": (5, 3),
    "blocks.2.scalar": (),
    "blocks.2.empty": (0, 3),
    "single": (1, 1),
}
ENDS = [Override(Trim(0.5, "tensor"), names="^single|embed"), Override(Scale(2.0), names="weight", blocks=[0, 1])]

FOLDER = tempfile.TemporaryDirectory()  # of statistics, which the cases below name


def files_of(kind: Literal["fisher", "gram", "gradients"]) -> dict[str, str]:
    """Random statistics of every task."""
    paths = {}
    for index, task in enumerate(TASKS):
        generator = torch.Generator().manual_seed(index)
        shapes = SHAPES if kind != "gram" else {"blocks.0.weight": (3, 3), "single": (1, 1)}
        roots = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors = {name: root.T @ root if kind == "gram" else root**2 for name, root in roots.items()}
        paths[task] = f"{FOLDER.name}/{task}-{kind}.safetensors"
        write_statistics(paths[task], kind, tensors, task)
    return paths


def learned(granularity: Granularity, before: Transform | None = None, ending: str = "safetensors") -> str:
    """Random coefficients of every task, learned over what a transform makes of the vectors."""
    members = dict(zip(SHAPES, group_names(list(SHAPES), granularity), strict=True))
    groups = tuple(dict.fromkeys(members.values()))
    values = torch.rand(len(TASKS), len(groups), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    metadata = {"transform_config": json.dumps(before.to_config())} if before else {}
    path = f"{FOLDER.name}/{granularity}-{'after' if before else 'plain'}.{ending}"
    Coefficients(values, TASKS, groups, members, granularity, metadata).save(path)
    return path


@dataclass(frozen=True)
class Case:
    transform: Transform
    tasks: tuple[str, ...] = TASKS
    reduces: bool = False  # T vectors become one
    order_free: bool = True  # permuting the tasks permutes the rows (or changes nothing, for a reducer)
    single: bool = True  # accepts T = 1
    identity_at_one: bool = False  # T = 1 gives the input back
    tolerance: float = 0.0  # of what may depend on the order or division of a sum over entries


CASES = [
    Case(Sum(), reduces=True, identity_at_one=True),
    Case(Mean(), reduces=True, identity_at_one=True),
    Case(Negate()),
    Case(Scale(0.3)),
    Case(Scale(1.0), identity_at_one=True),
    Case(Scale((1.0, -2.0, 0.5)), order_free=False, single=False),
    Case(Scale({"digits": 1.0, "signs": -2.0, "letters": 0.5}), single=False),
    Case(Interpolate(0.25), TASKS[:2], reduces=True, order_free=False, single=False),
    Case(Trim(0.4)),
    Case(Trim(0.4, "tensor")),
    Case(Trim(1.0), identity_at_one=True),
    Case(MagnitudeWindow(0.5, 0.2)),
    Case(MagnitudeWindow(0.5, 0.2, "global")),
    Case(Drop(0.5)),
    Case(Drop(0.5, rescale=False, seed=7)),
    Case(DropByRank(0.6, 0.3)),
    Case(DropByRank(0.6, 0.3, rescale=False, seed=7)),
    Case(ElectSign(), identity_at_one=True),
    Case(ElectSign("count"), identity_at_one=True),
    Case(DisjointMean(), reduces=True, identity_at_one=True),
    Case(DisjointSum(), reduces=True, identity_at_one=True),
    Case(TallMask(), identity_at_one=True),
    Case(TallMask({"digits": 0.2, "letters": 0.4, "signs": 0.6}, merge=chain(Mean(), Scale(2))), single=False),
    Case(TallMask((0.2, 0.4, 0.6)), order_free=False, single=False),
    Case(ConsensusMask(), reduces=True, single=False),
    Case(ConsensusMask(1, 0.6, merge=ties(0.5)), reduces=True),
    Case(ScaleBlocks((0.5, -1.0, 2.0))),
    Case(LearnedScale(learned("tensor")), single=False),
    Case(LearnedScale(learned("block", ending="json")), single=False),
    Case(LiNeS(0.3)),
    Case(LiNeS(0.3, 0.5, "sqrt", outside=0.0)),
    Case(chain(Trim(0.5), Rescale()), tolerance=1e-6),
    Case(chain(Sum(), Rescale("l1")), reduces=True, identity_at_one=True, tolerance=1e-6),
    Case(Rescale("linf", "tensor"), identity_at_one=True),
    Case(FisherMean(files_of("fisher")), reduces=True, single=False),
    Case(FisherMean(files_of("fisher"), (1.0, 0.0, 2.0), 0.1, None), reduces=True, order_free=False, single=False),
    Case(RegMean(files_of("gram")), reduces=True, single=False),
    Case(TSVMerge(), reduces=True, tolerance=1e-5),
    Case(TSVMerge(0.5, exclude="^single"), reduces=True, tolerance=1e-5),
    Case(IsoC(), reduces=True, tolerance=1e-5),
    Case(IsoCTS(0.5), reduces=True, tolerance=1e-5),
    Case(WUDI(5, 1e-6), reduces=True, tolerance=1e-5),
    Case(WUDI(5, 1e-6, exclude="^single"), reduces=True, tolerance=1e-5),
    Case(OptMerge(2, 1e-6), reduces=True, tolerance=1e-5),
    Case(SpectralWUDI(30.0, 0.65, exclude="^single"), reduces=True, tolerance=1e-5),
    Case(ACE(0.5, exclude="^single"), reduces=True, tolerance=1e-5),
    Case(CART(0.4), reduces=True, tolerance=1e-5),
    Case(CARTDirections(0.4), tolerance=1e-5),
    Case(TSVDirections(exclude="^single"), tolerance=1e-5),
    Case(CalibratedDirections(), tolerance=1e-5),
    Case(Departures(ties(0.4), 0.5), tolerance=1e-6),
    Case(ProjectedSum(), reduces=True, order_free=False, identity_at_one=True),
    Case(continual(0.2), reduces=True, order_free=False, tolerance=1e-6),
    Case(RunningMean(), reduces=True, identity_at_one=True, tolerance=1e-6),
    Case(DCMerge(0.3, "linear", exclude="^single"), reduces=True, tolerance=1e-5),
    Case(ESM(), reduces=True, tolerance=1e-5),
    Case(
        chain(Polarise("tasks"), Polarise("dimensions"), TSVMerge(), Polarise("layers")), reduces=True, tolerance=1e-5
    ),
    Case(svc(ties(0.4), 0.2), reduces=True, tolerance=1e-5),
    Case(Clip(0.3)),
    Case(LargestMagnitude(), reduces=True, identity_at_one=True),
    Case(SignMask(), identity_at_one=True),
    Case(PCB(0.3, 0.1), reduces=True, tolerance=1e-6),
    Case(SCE(0.5), reduces=True, single=False),
    Case(RAM(0.5, 0.2), reduces=True),
    Case(TrustRegion(0.2), identity_at_one=True),
    Case(TrustRegion(0.2, files_of("gradients")), single=False),
    Case(DOGE(3, 1e-6), reduces=True, tolerance=1e-5),
    Case(KnOTS(ties(0.4, scope="tensor"), exclude="^single"), reduces=True, tolerance=1e-5),
    Case(CoreSpace(TSVMerge()), reduces=True, tolerance=1e-5),
    Case(Slerp(0.25, "task_vectors"), TASKS[:2], reduces=True, order_free=False, single=False),
    Case(KarcherMean("task_vectors"), reduces=True, identity_at_one=True, tolerance=1e-5),
    Case(ModelStock(), reduces=True, single=False),
    Case(ModelStock(clamp=False), reduces=True, single=False),
    Case(WithOverrides(Negate(), ENDS)),
    Case(WithOverrides(Sum(), [Override(ties(0.5), blocks=[1])]), reduces=True),
    Case(chain(), identity_at_one=True),
    Case(chain(Scale(0.5), Mean(), Negate()), reduces=True),
    Case(chain(Trim(0.5), Drop(0.3), Trim(0.5), ElectSign(), DisjointSum(), Trim(0.5)), reduces=True),
    Case(task_arithmetic(), reduces=True),
    Case(weight_average(), reduces=True, identity_at_one=True),
    Case(negation(0.7)),
    Case(analogy(), reduces=True, order_free=False, single=False),
    Case(rewarded_soup(0.1), TASKS[:2], reduces=True, order_free=False, single=False),
    Case(ties(0.4), reduces=True),
    Case(ties(0.4, 0.3, "tensor"), reduces=True),
    Case(dare_linear(), reduces=True),
    Case(dare_ties(density=0.5), reduces=True),
    Case(breadcrumbs(), reduces=True),
    Case(della(), reduces=True),
    Case(consensus_ta(), reduces=True, single=False),
    Case(consensus_ties(), reduces=True, single=False),
    Case(tall_masks()),
    Case(tall_masks(0.3, density=0.5)),
    Case(tsv_m(0.5), reduces=True, tolerance=1e-5),
    Case(iso_c(), reduces=True, tolerance=1e-5),
    Case(iso_cts(), reduces=True, tolerance=1e-5),
    Case(wudi(2), reduces=True, tolerance=1e-4),  # a step may have the other sign where the gradient is all rounding
    Case(slerp(0.25, "task_vectors"), TASKS[:2], reduces=True, order_free=False, single=False),
    Case(karcher("task_vectors"), reduces=True, identity_at_one=True, tolerance=1e-5),
    Case(model_stock(), reduces=True, single=False),
    Case(lines(), reduces=True, tolerance=1e-6),
    Case(adamerging(learned("task")), reduces=True, single=False),
    Case(adamerging(learned("group", chain(Trim(0.4), ElectSign()))), reduces=True, single=False),
    Case(lines(ties(0.5), beta=0.5, schedule="quadratic"), reduces=True, tolerance=1e-6),
]
NEUTRAL = [
    chain(),
    Scale(1.0),
    Scale((1, 1, 1)),
    Scale(dict.fromkeys(TASKS, 1)),
    chain(Negate(), Negate()),
    Trim(1.0),
    Trim(1.0, "tensor"),
    MagnitudeWindow(1.0, 0.0),
    MagnitudeWindow(1.0, 0.0, "global"),
    Drop(0.0),
    Drop(0.0, rescale=False),
    DropByRank(1.0, 0.0),
    *(Rescale(norm, scope) for norm in ("l1", "l2", "linf") for scope in ("global", "tensor")),
    ScaleBlocks((1, 1, 1)),
    LiNeS(1.0),
    LiNeS(1.0, 0.0, "quadratic"),
    *(Polarise(level, 0.0) for level in ("tasks", "dimensions", "layers")),
    WithOverrides(chain(), [Override(Scale(1), names="weight")]),
    Clip(1e6),
    TrustRegion(0.0),
]
BY_ENTRY: list[tuple[Transform, Callable[[Transform], Transform]]] = [
    (transform, function)
    for transform in (Sum(), Scale(0.3), Drop(0.5), ElectSign("count"), TallMask(), LiNeS(0.3), Trim(0.5, "tensor"))
    for function in (
        lambda one: WithOverrides(one, [Override(one, names=".*")]),
        lambda one: WithOverrides(one, [Override(one, names="weight"), Override(one, blocks=(2,))]),
        lambda one: WithOverrides(one, []),
    )
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.transform).replace(FOLDER.name, ""))


def make_vectors(
    dtype: torch.dtype = torch.float32,
    tasks: tuple[str, ...] = TASKS,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> list[TaskVector]:
    vectors = []
    for task in tasks:
        generator = torch.Generator().manual_seed(sum(task.encode()))
        tensors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in (shapes or SHAPES).items()
        }
        vectors.append(TaskVector(tensors, task, metadata={"base_fingerprint": "0123456789abcdef"}))
    return vectors


def vectors_of(case: Case, dtype: torch.dtype = torch.float32) -> list[TaskVector]:
    return make_vectors(dtype, case.tasks)


def assert_same(first: TaskVectors, second: TaskVectors, tolerance: float = 0.0) -> None:
    assert sorted(first.names) == sorted(second.names)  # a file has its names sorted
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


def test_every_public_transform_has_a_case() -> None:
    public = [getattr(transforms, name) for name in transforms.__all__]
    classes = {item for item in public if isinstance(item, type) and issubclass(item, Transform)} - {Transform}
    steps = {type(step) for case in CASES if isinstance(case.transform, Chain) for step in case.transform.steps}
    with_base = {OrthoMerge}  # its laws are beside its oracle
    assert classes <= steps | {type(case.transform) for case in CASES} | with_base


@every_case
def test_names_shapes_and_tasks(case: Case) -> None:
    vectors = TaskVectors(vectors_of(case))
    result = case.transform(vectors)
    assert result.names == vectors.names == tuple(SHAPES)
    rows = 1 if case.reduces else len(case.tasks)
    assert result.tasks == (("+".join(case.tasks),) if case.reduces else case.tasks)
    assert result.base_fingerprint == vectors.base_fingerprint
    for name, shape in SHAPES.items():
        assert result.shape(name) == result[name].shape == (rows, *shape)
        assert torch.isfinite(result[name]).all()


@every_case
def test_dtype_is_at_least_float32(case: Case) -> None:
    for given in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        result = case.transform(TaskVectors(vectors_of(case, given)))
        expected = torch.promote_types(given, torch.float32)
        assert {result[name].dtype for name in result} == {result.dtype(name) for name in result} == {expected}


@every_case
def test_half_precision_input_is_computed_in_float32(case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        half = vectors_of(case, dtype)
        full = [TaskVector({name: vector[name].float() for name in vector}, vector.task) for vector in half]
        assert_same(case.transform(TaskVectors(half)), case.transform(TaskVectors(full)))


@every_case
def test_input_is_not_mutated(case: Case) -> None:
    inputs, untouched = vectors_of(case), vectors_of(case)
    vectors = TaskVectors(inputs)
    result = case.transform(vectors)
    for name in result:
        result[name].fill_(7.0)
    for vector, reference in zip(inputs, untouched, strict=True):
        for name in reference:
            assert torch.equal(vector[name], reference[name])
    assert vectors.tasks == case.tasks
    assert_same(vectors, TaskVectors(untouched))


@every_case
def test_every_access_gives_the_same_values(case: Case) -> None:
    result = case.transform(TaskVectors(vectors_of(case)))
    first = {name: result[name].clone() for name in result}
    for name in reversed(result.names):
        result[name].zero_()
        assert torch.equal(result[name], first[name])


@every_case
def test_task_order_does_not_matter(case: Case) -> None:
    if not case.order_free:
        pytest.skip("declared to depend on the order")
    order = [2, 0, 1]
    vectors = vectors_of(case)
    result = case.transform(TaskVectors(vectors))
    permuted = case.transform(TaskVectors([vectors[index] for index in order]))
    for name in result:
        expected = result[name] if case.reduces else result[name][order]
        tolerance = max(case.tolerance, 1e-6)
        torch.testing.assert_close(permuted[name], expected, rtol=tolerance, atol=tolerance)


@every_case
def test_one_task(case: Case) -> None:
    one = TaskVectors(make_vectors(tasks=TASKS[:1]))
    if not case.single:
        with pytest.raises(LitMergeError, match="expected"):
            case.transform(one)
        return
    result = case.transform(one)
    assert result.tasks == TASKS[:1]
    assert {name: tuple(result.single()[name].shape) for name in result} == SHAPES
    if case.identity_at_one:
        assert_same(result, one)


@pytest.mark.parametrize("transform", NEUTRAL, ids=repr)
def test_neutral_settings_are_the_identity(transform: Transform) -> None:
    vectors = TaskVectors(make_vectors())
    assert_same(transform(vectors), vectors)
    doubles = TaskVectors(make_vectors(torch.float64))
    assert_same(transform(doubles), doubles)


@pytest.mark.parametrize(("transform", "function"), BY_ENTRY)
def test_overrides_that_do_the_same_change_nothing(
    transform: Transform, function: Callable[[Transform], Transform]
) -> None:
    vectors = TaskVectors(make_vectors())
    assert_same(function(transform)(vectors), transform(vectors))


@every_case
@pytest.mark.parametrize("whole_numbers", [False, True], ids=["random", "equal_magnitudes"])
def test_parameter_order_does_not_matter(case: Case, whole_numbers: bool) -> None:
    vectors = vectors_of(case)
    if whole_numbers:
        vectors = [TaskVector({name: vector[name].round() for name in vector}, vector.task) for vector in vectors]
    turned = [TaskVector({name: vector[name] for name in reversed(list(vector))}, vector.task) for vector in vectors]
    result = case.transform(TaskVectors(turned))
    assert result.names == tuple(reversed(SHAPES))
    assert_same(result, case.transform(TaskVectors(vectors)), case.tolerance)


@every_case
def test_pieces_are_the_stack(case: Case) -> None:
    for length in (1, 3, 7, 1 << 40):
        result = case.transform(TaskVectors(vectors_of(case)))
        for name in result:
            chunks = list(result.chunks(name, length))
            stack = result[name]
            assert [start for start, _ in chunks] == list(range(0, max(stack[0].numel(), 1), length))
            whole = torch.cat([chunk for _, chunk in chunks], dim=1)
            assert whole.dtype == stack.dtype
            assert torch.equal(whole, stack.reshape(len(stack), -1))


MANY = ["task_arithmetic", "weight_average", "continual_average", "ties", "dare_ties", "dare_linear", "della"]
MANY += ["breadcrumbs", "magmax", "sce", "ram", "ram_plus", "consensus_ta", "consensus_ties", "lines", "model_stock"]
MANY += ["emr", "tall_masks"]


@pytest.mark.parametrize("transform", [*map(recipe, MANY), Departures(Sum()), Interpolate(0.3)], ids=str)
def test_more_than_eight_vectors_are_added_in_one_order_everywhere(transform: Transform) -> None:
    two = isinstance(transform, Interpolate)
    drawn = torch.randn(2 if two else 9, 300, generator=torch.Generator().manual_seed(0))
    names = [f"blocks.{block}.weight" for block in range(2)]
    vectors = TaskVectors([TaskVector({name: row.clone() for name in names}, f"t{i}") for i, row in enumerate(drawn)])
    result = transform(vectors)
    for name in result:
        for length in (7, 100, 299):
            pieces = torch.cat([chunk for _, chunk in result.chunks(name, length)], dim=1)
            assert torch.equal(pieces, result[name].reshape(len(result.tasks), -1))


@every_case
def test_the_number_of_threads_does_not_matter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_ELEMENTS_IN_CACHE", 3 * len(case.tasks))
    monkeypatch.setattr(sources, "_ELEMENTS_OF_A_SUM", 3)
    monkeypatch.setattr(sources, "_FEWEST_ELEMENTS", 2)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            result = case.transform(TaskVectors(vectors_of(case)))
            results.append({name: result[name] for name in result})
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    for name, stack in results[0].items():
        assert torch.equal(stack, results[1][name])


@every_case
def test_what_is_not_finite_is_named(case: Case) -> None:
    for name, value in itertools.product(SHAPES, (torch.nan, -torch.inf)):
        vectors = vectors_of(case)
        if vectors[0].shape(name).numel() == 0:
            continue
        vectors[-1][name].view(-1)[-1] = value
        result = case.transform(TaskVectors(vectors))
        with pytest.raises(
            NonFiniteError, match=rf"task vector '{case.tasks[-1]}': expected finite .* infinity in {name}\."
        ):
            [chunk for other in result for chunk in result.chunks(other, 3)]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_disk_equals_in_memory_bit_for_bit(case: Case, dtype: torch.dtype, tmp_path) -> None:
    vectors = vectors_of(case, dtype)
    for vector in vectors:
        vector.save(tmp_path / f"{vector.task}.safetensors")
    stored = [TaskVector.load(tmp_path / f"{task}.safetensors", verify=True) for task in case.tasks]
    assert_same(case.transform(TaskVectors(stored)), case.transform(TaskVectors(vectors)), case.tolerance)


@every_case
def test_prints_compares_hashes_and_pickles(case: Case) -> None:
    transform = case.transform
    rebuilt = eval(repr(transform), {name: getattr(transforms, name) for name in transforms.__all__})
    copied = pickle.loads(pickle.dumps(transform))
    for other in (rebuilt, copied):
        assert other == transform
        assert type(other) is type(transform)
        assert hash(other) == hash(transform)
        assert repr(other) == repr(transform)
    assert sum(transform == other.transform for other in CASES) == 1


@every_case
def test_the_result_pickles(case: Case) -> None:
    result = case.transform(TaskVectors(vectors_of(case)))
    before = pickle.loads(pickle.dumps(result))  # no statistic is known yet
    assert_same(before, result)
    after = pickle.loads(pickle.dumps(result))
    assert_same(after, result)
    assert [repr(one) for one in before.statistics] == [repr(one) for one in after.statistics]


@every_case
def test_config_round_trip(case: Case) -> None:
    import jsonargparse
    import yaml

    config = yaml.safe_load(yaml.safe_dump(case.transform.to_config()))
    assert config["class_path"].startswith("lit_merge.transforms.")
    assert config["class_path"].count(".") == 2
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--transform", type=Transform)
    built = parser.instantiate_classes(parser.parse_object({"transform": config})).transform
    assert built == case.transform


@every_case
def test_provenance_names_inputs_and_every_step(case: Case) -> None:
    result = case.transform(TaskVectors(vectors_of(case)))
    steps = case.transform.steps if isinstance(case.transform, Chain) else (case.transform,)
    assert result.provenance == (*(f"TaskVector(task={task!r})" for task in case.tasks), *map(repr, steps))
