"""Merges by size, competition, variance, overlap and conflict against their definitions, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_merge import TaskVector, TaskVectors
from lit_merge.errors import ConfigurationError, FileFormatError, StructureMismatchError
from lit_merge.transforms import (
    PCB,
    RAM,
    SCE,
    Clip,
    ElectSign,
    LargestMagnitude,
    Scale,
    SignMask,
    Sum,
    Transform,
    Trim,
    TrustRegion,
    chain,
    emr,
    magmax,
    nearswap,
    pcb,
    tatr,
)
from lit_merge.vectors.statistics import write_statistics

SHAPES = {"b.weight": (7, 6), "a.weight": (5, 8), "c": (9,), "scale": ()}
TASKS = ("one", "two", "three", "four")


def stacks(tasks: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {
        name: (common[name] + torch.randn((tasks, *shape), generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in SHAPES.items()
    }


def vectors_of(given: dict[str, Tensor]) -> TaskVectors:
    count = len(next(iter(given.values())))
    return TaskVectors([TaskVector({name: one[t] for name, one in given.items()}, TASKS[t]) for t in range(count)])


def flat(given: dict[str, Tensor]) -> Tensor:
    """``(T, n)``, the parameters in sorted order."""
    return torch.cat([given[name].reshape(len(given[name]), -1) for name in sorted(given)], 1)


def check(transform: Transform, definition: Callable[[Tensor], Tensor], tasks: int = 4) -> None:
    given = stacks(tasks)
    result = transform(vectors_of(given))
    found = flat({name: result[name] for name in result})
    torch.testing.assert_close(found, definition(flat(given)).view(found.shape), rtol=1e-12, atol=1e-12)


def test_clip_moves_an_element_by_no_more_than_the_limit() -> None:
    check(Clip(0.4), lambda taus: torch.sign(taus) * taus.abs().clamp(max=0.4))

    def mixed(taus: Tensor) -> Tensor:  # NearSwap: the weight of the second model, element by element
        first = torch.full_like(taus, 3.0)
        second = first + taus
        weight = (0.25 / (first - second).abs()).clamp(max=1)
        return weight * second + (1 - weight) * first - first

    check(nearswap(0.25), mixed, tasks=1)


def test_magmax_takes_each_element_from_the_task_where_it_is_largest() -> None:
    def largest(taus: Tensor) -> Tensor:
        return taus.gather(0, taus.abs().argmax(0, keepdim=True))

    check(LargestMagnitude(), largest)
    check(magmax(), lambda taus: 0.5 * largest(taus))
    even = vectors_of({"c": torch.tensor([[-2.0, 1.0], [2.0, -3.0]])})
    assert LargestMagnitude()(even)["c"].tolist() == [[2.0, -3.0]]


def test_emr_elects_masks_and_rescales() -> None:
    def definition(taus: Tensor) -> Tensor:
        sign = torch.where(taus.sum(0) > 0, 1.0, -1.0).to(taus)
        unified = torch.stack([(tau * sign).clamp(min=0) for tau in taus]).amax(0) * sign
        rows = []
        for tau in taus:
            masked = torch.where(tau * unified > 0, unified, torch.zeros_like(unified))
            rows.append(masked * tau.abs().sum() / masked.abs().sum())
        return torch.stack(rows)

    check(emr(), definition)
    assert emr() == chain(SignMask(chain(ElectSign(), LargestMagnitude())), chain(emr().steps[1]))


def ordered(values: Tensor, place: int) -> Tensor:
    return values.sort(dim=1).values[:, place : place + 1]


@pytest.mark.parametrize(("fraction", "clamp", "others"), [(0.05, 0.01, "normalised"), (0.4, 0.1, "plain")])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_pcb_balances_competition(fraction: float, clamp: float, others: str, tasks: int) -> None:
    def definition(taus: Tensor) -> Tensor:
        count, size = taus.shape
        low = ordered(taus.abs(), int(size * clamp))
        high = ordered(taus.abs(), int(size * (1 - clamp)) - 1)
        limited = taus.abs().clamp(min=low).clamp(max=high)
        norm = (limited - low) / (high - low)
        total = (taus.sign() * norm).sum(0) if others == "normalised" else taus.sum(0)
        balance = torch.exp(count * norm**2) * torch.tanh(taus * total)
        floor = ordered(balance, int(size * (1 - fraction)))
        top = balance.amax(1, keepdim=True)
        weights = (balance.clamp(min=floor) - floor) / (top - floor)
        return (taus.sign() * limited * weights).sum(0) / weights.sum(0).clamp(min=1e-12)

    check(PCB(fraction, clamp, others), definition, tasks)
    if others == "normalised":
        check(pcb(fraction, 0.5), lambda taus: 0.5 * definition(taus), tasks)


def test_pcb_finds_a_threshold_below_zero() -> None:
    """Tasks against which the others stand have few positive balances: the quantile is a negative number."""
    taus = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    taus[1], taus[2] = -3 * taus[0], -4 * taus[0]
    result = PCB(1.0, 0.0, "plain")(vectors_of({"c": taus}))["c"][0]
    norm = taus.abs() - taus.abs().amin(1, keepdim=True)
    norm /= norm.amax(1, keepdim=True)
    balance = torch.exp(3 * norm**2) * torch.tanh(taus * taus.sum(0))
    assert int((balance[0] > 0).sum()) < 2
    weights = balance - balance.amin(1, keepdim=True)
    weights /= weights.amax(1, keepdim=True)
    torch.testing.assert_close(result, (taus * weights).sum(0) / weights.sum(0), rtol=1e-12, atol=1e-12)


def test_pcb_of_many_tasks_and_of_vectors_without_any_spread() -> None:
    many = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).expand(90, -1)
    alike = TaskVectors([TaskVector({"c": row}, f"task {index}") for index, row in enumerate(many)])
    assert torch.isfinite(PCB()(alike)["c"]).all()  # exp(90) alone would overflow
    for values in (torch.zeros(3, 20), torch.ones(3, 20)):
        assert not PCB()(vectors_of({"c": values}))["c"].any()


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_selects_calculates_and_erases(density: float) -> None:
    given = stacks()
    result = SCE(density)(vectors_of(given))
    for name, stack in given.items():
        taus = stack.reshape(4, -1)
        variance = ((taus - taus.mean(0)) ** 2).mean(0)
        kept = max(math.floor(density * len(variance) + 1e-9), 1)
        selected = taus * (variance >= variance.sort().values[-kept])
        energies = (selected**2).mean(1)
        weights = (energies / energies.sum()).view(4, 1)
        sign = torch.where(selected.sum(0) >= 0, 1, -1)
        left = weights * (selected.sign() == sign)
        merged = (selected * left).sum(0) / left.sum(0).where(left.sum(0) > 0, torch.ones(()).double())
        torch.testing.assert_close(result[name].reshape(-1), merged, rtol=1e-12, atol=1e-12)


def test_sce_of_equal_vectors_is_that_vector() -> None:
    one = stacks(1)
    same = {name: stack.expand(3, *stack.shape[1:]) for name, stack in one.items()}
    result = SCE(0.1)(vectors_of(same))
    for name in one:
        torch.testing.assert_close(result[name], one[name])


@pytest.mark.parametrize(("boost", "limit", "scope"), [(0, 1, "global"), (0.2, 1, "global"), (0.1, 0.2, "tensor")])
def test_ram_averages_what_several_changed_and_keeps_what_one_did(boost: float, limit: float, scope: str) -> None:
    given = stacks()

    def definition(taus: Tensor, counted: Tensor) -> Tensor:
        merged = torch.zeros_like(taus[0])
        factors = []
        for row in counted.abs() > 1.0:
            others = (counted.abs() > 1.0).sum(0)
            shared, own = int((row & (others > 1)).sum()), int((row & (others == 1)).sum())
            factors.append(1 + boost * min(shared / own if own else (math.inf if shared else 0), limit))
        for place in range(taus.shape[1]):
            who = [index for index in range(len(taus)) if abs(taus[index, place]) > 1.0]
            if len(who) == 1:
                merged[place] = factors[who[0]] * taus[who[0], place]
            elif who:
                merged[place] = sum(taus[index, place] for index in who) / len(who)
        return merged

    result = RAM(1.0, boost, limit, scope)(vectors_of(given))
    for name, stack in given.items():
        taus = stack.reshape(4, -1)
        expected = definition(taus, flat(given) if scope == "global" else taus)
        torch.testing.assert_close(result[name].reshape(-1), expected, rtol=1e-12, atol=1e-12)


def conflict(taus: Tensor, gradients: Tensor) -> Tensor:
    pairs = [(s, t) for s in range(len(taus)) for t in range(len(taus)) if s != t]
    return sum((gradients[s].abs() * taus[t].abs() for s, t in pairs), torch.zeros_like(taus[0]))


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9])
def test_the_trust_region_leaves_out_where_tasks_conflict(fraction: float) -> None:
    def definition(taus: Tensor) -> Tensor:
        omega = conflict(taus, taus)
        threshold = omega.sort().values[int(len(omega) * (1 - fraction))]
        return taus * (omega < threshold)

    check(TrustRegion(fraction), definition)
    check(tatr(fraction, coefficient=0.7), lambda taus: 0.7 * definition(taus).sum(0))


def test_a_vector_alone_is_in_no_conflict() -> None:
    alone = vectors_of(stacks(1))
    for name in alone:
        assert torch.equal(TrustRegion(0.5)(alone)[name], alone[name])
    apart = {"c": torch.eye(3)}  # no element is used twice
    assert torch.equal(TrustRegion(0.9)(vectors_of(apart))["c"], apart["c"])


def test_the_trust_region_by_gradients(tmp_path) -> None:
    given, gradients = stacks(3), stacks(3, seed=9)
    files = {}
    for index, task in enumerate(TASKS[:3]):
        files[task] = str(tmp_path / f"{task}.safetensors")
        write_statistics(files[task], "gradients", {name: one[index].abs() for name, one in gradients.items()}, task)
    result = TrustRegion(0.3, files)(vectors_of(given))
    omega = conflict(flat(given), flat(gradients))
    expected = flat(given) * (omega < omega.sort().values[int(len(omega) * 0.7)])
    torch.testing.assert_close(flat({name: result[name] for name in result}), expected, rtol=0, atol=0)
    plan = chain(TrustRegion(0.3, files), Sum(), Scale(0.3))(vectors_of(given))
    assert [repr(one) for one in plan.statistics] == [
        "TrustRegion: threshold of the conflict (at most 10 reads)"  # vectors and gradients, in float64
    ]
    write_statistics(files["one"], "fisher", {name: one[0].abs() for name, one in gradients.items()}, "one")
    with pytest.raises(FileFormatError, match=r"expected format lit-merge/gradients/1, got lit-merge/fisher/1"):
        TrustRegion(0.3, files)(vectors_of(given))
    write_statistics(files["one"], "gradients", {"c": torch.ones(9)}, "one")
    with pytest.raises(StructureMismatchError, match="expected the mean absolute gradients of every parameter"):
        TrustRegion(0.3, files)(vectors_of(given))


def test_they_are_streamed() -> None:
    """What treats elements by themselves goes through parameters chunk by chunk, and says how often."""
    vectors = vectors_of(stacks(dtype=torch.float32))
    reads = {"Clip": 1, "LargestMagnitude": 1, "SignMask": 3, "PCB": 14, "RAM": 2, "TrustRegion": 4}
    parts: list[Transform] = [Clip(), LargestMagnitude(), SignMask(), PCB(), RAM(1.0, 0.2), TrustRegion()]
    for part in parts:
        result = part(vectors)
        assert result.by_chunks
        assert (type(part).__name__, result.reads) == (type(part).__name__, reads[type(part).__name__])
    assert not SCE()(vectors).by_chunks
    assert SCE()(vectors).work("b.weight").memory == 3 * 4 * 42 * 4


def test_they_compose() -> None:
    given = stacks()
    chained = chain(Trim(0.5), TrustRegion(0.1), SignMask(chain(PCB(0.5), Clip(2.0))))(vectors_of(given))
    trimmed = Trim(0.5)(vectors_of(given))
    inside = TrustRegion(0.1)(vectors_of({name: trimmed[name] for name in trimmed}))
    step = {name: inside[name] for name in inside}
    merged = chain(PCB(0.5), Clip(2.0))(vectors_of(step))
    for name in given:
        assert torch.equal(chained[name], merged[name] * (step[name] * merged[name] > 0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Clip(-1), r"Clip.limit: expected a finite number at least 0, got -1"),
        (lambda: PCB(0), r"PCB.fraction: expected a fraction above 0 and at most 1, got 0"),
        (lambda: PCB(clamp=0.5), r"PCB.clamp: expected a finite number at least 0 and below 0.5, got 0.5"),
        (lambda: PCB(others="all"), r"PCB.others: expected normalised or plain, got 'all'"),
        (lambda: SCE(2), r"SCE.density: expected a finite number at least 0 and at most 1, got 2"),
        (lambda: SCE()(vectors_of(stacks(1))), r"SCE: expected at least two vectors, got 1, which has no variance"),
        (lambda: RAM(-1), r"RAM.threshold: expected a finite number at least 0, got -1"),
        (lambda: RAM(scope="row"), r"RAM.scope: expected global or tensor, got 'row'"),
        (lambda: TrustRegion(1.0), r"TrustRegion.fraction: expected a finite number at least 0 and below 1, got 1"),
        (lambda: TrustRegion(statistics={}), r"TrustRegion.statistics: expected a mapping from tasks to files"),
        (lambda: SignMask(Sum), r"SignMask.merge: expected a transform, got <class"),
        (
            lambda: SignMask(Clip())(vectors_of(stacks())),
            r"SignMask.merge: expected .* leaves one vector",
        ),
    ],
)
def test_refusals(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()
