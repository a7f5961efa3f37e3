"""Every recipe against its definition, restated in float64, or against its chain, written out.

The definitions of the chains' parts are restated beside their own oracles.
"""

from __future__ import annotations

import inspect
import json
import tempfile

import pytest
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.transforms import (
    ACE,
    CART,
    DOGE,
    ESM,
    PCB,
    RAM,
    RECIPES,
    SCE,
    WUDI,
    Calibrate,
    Clip,
    ConsensusMask,
    CoreSpace,
    DCMerge,
    DisjointMean,
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
    Polarise,
    ProjectedSum,
    RegMean,
    Rescale,
    RunningMean,
    Scale,
    SignMask,
    Slerp,
    SpectralWUDI,
    Sum,
    TallMask,
    Trim,
    TrustRegion,
    TSVMerge,
    analogy,
    chain,
    negation,
    recipe,
    task_arithmetic,
    weight_average,
)
from lit_merge.vectors import Coefficients, TaskVector, TaskVectors, merged_parameters

SHAPES = {"weight": (6, 5), "bias": (6,), "scale": ()}


def random_params(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def problem(request):
    """θ0, θ_1..θ_3, and the tolerance of the dtype in which they are held."""
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}[request.param]
    return random_params(0, request.param), [random_params(seed, request.param) for seed in (1, 2, 3)], tolerance


def merge(base, finetuned, transform):
    vectors = TaskVectors([TaskVector.from_checkpoints(base, params, str(i)) for i, params in enumerate(finetuned)])
    return dict(merged_parameters(base, transform(vectors)))


def check(merged, base, definition, tolerance):
    assert list(merged) == list(base)
    for name in base:
        assert merged[name].dtype == base[name].dtype
        torch.testing.assert_close(merged[name].double(), definition(name), rtol=tolerance, atol=tolerance)


def test_task_arithmetic(problem):
    base, tuned, tolerance = problem
    for coefficient in (0.0, 0.3, 1.0):
        check(
            merge(base, tuned, task_arithmetic(coefficient)),
            base,
            lambda n, coefficient=coefficient: (
                base[n].double() + coefficient * sum(t[n].double() - base[n].double() for t in tuned)
            ),
            tolerance,
        )


def test_weight_average(problem):
    base, tuned, tolerance = problem
    check(merge(base, tuned, weight_average()), base, lambda n: sum(t[n].double() for t in tuned) / 3, tolerance)


def test_negation(problem):
    base, tuned, tolerance = problem
    check(
        merge(base, tuned[:1], negation(0.7)),
        base,
        lambda n: base[n].double() - 0.7 * (tuned[0][n].double() - base[n].double()),
        tolerance,
    )


def test_analogy(problem):
    base, (a, b, c), tolerance = problem
    check(
        merge(base, [a, b, c], analogy()),
        base,
        lambda n: c[n].double() + b[n].double() - a[n].double(),  # θ0 + τ_C + (τ_B − τ_A)
        tolerance,
    )
    check(
        merge(base, [a, b, c], analogy(0.4)),
        base,
        lambda n: base[n].double() + 0.4 * (c[n].double() - base[n].double() + b[n].double() - a[n].double()),
        tolerance,
    )


def test_per_task_coefficients(problem):
    base, tuned, tolerance = problem
    weights = {"0": 0.2, "2": -1.5, "1": 0.7}
    check(
        merge(base, tuned, chain(Scale(weights), Sum())),
        base,
        lambda n: (
            base[n].double() + sum(weights[str(i)] * (t[n].double() - base[n].double()) for i, t in enumerate(tuned))
        ),
        tolerance,
    )


def test_mean_is_task_arithmetic_at_one_over_t(problem):
    base, tuned, tolerance = problem
    first, second = merge(base, tuned, chain(Mean())), merge(base, tuned, task_arithmetic(1 / 3))
    for name in base:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


def test_one_task_at_coefficient_one_gives_the_fine_tuned_model(problem):
    base, tuned, tolerance = problem
    check(merge(base, tuned[:1], task_arithmetic(1.0)), base, lambda n: tuned[0][n].double(), tolerance)


ELECT = (ElectSign(), DisjointMean())
FOLDER = tempfile.TemporaryDirectory()  # of learned coefficients, which a recipe reads when it is built


def learned(name: str, **metadata: str) -> str:
    path = f"{FOLDER.name}/{name}.json"
    members = dict.fromkeys(SHAPES, "all")
    Coefficients(torch.tensor([[0.3], [0.2]]), ("digits", "signs"), ("all",), members, "task", metadata).save(path)
    return path


LEARNED = learned("learned")
LEARNED_OVER_TIES = learned(
    "learned_over_ties", transform_config=json.dumps(chain(Trim(0.2, "tensor"), ElectSign()).to_config())
)
FILES = {"digits": "digits.safetensors", "signs": "signs.safetensors"}
CHAINS = {  # name -> the chain by default, and with all fields
    "task_arithmetic": [({}, chain(Sum(), Scale(0.3))), ({"coefficient": 0.5}, chain(Sum(), Scale(0.5)))],
    "weight_average": [({}, chain(Mean()))],
    "continual": [
        ({}, chain(ProjectedSum(0.5, None), Rescale(), Scale(1.0))),
        (
            {"alpha": 0.2, "order": ["b", "a"], "coefficient": 2.0},
            chain(ProjectedSum(0.2, ["b", "a"]), Rescale(), Scale(2.0)),
        ),
    ],
    "continual_average": [({}, chain(RunningMean()))],
    "negation": [({}, chain(Negate(), Scale(1.0))), ({"coefficient": 0.5}, chain(Negate(), Scale(0.5)))],
    "analogy": [
        ({}, chain(Scale((-1.0, 1.0, 1.0)), Sum())),
        ({"coefficient": 0.5}, chain(Scale((-0.5, 0.5, 0.5)), Sum())),
    ],
    "rewarded_soup": [({}, chain(Interpolate(0.5))), ({"fraction": 0.2}, chain(Interpolate(0.2)))],
    "ties": [
        ({}, chain(Trim(0.2, "global"), *ELECT, Scale(1.0))),
        (
            {"density": 0.1, "coefficient": 0.5, "scope": "tensor"},
            chain(Trim(0.1, "tensor"), *ELECT, Scale(0.5)),
        ),
    ],
    "dare_linear": [
        ({}, chain(Drop(0.9, True, 0), Sum(), Scale(0.3))),
        ({"p": 0.5, "coefficient": 0.2, "seed": 3}, chain(Drop(0.5, True, 3), Sum(), Scale(0.2))),
    ],
    "dare_ties": [
        ({}, chain(Drop(0.9, True, 0), Trim(1.0), *ELECT, Scale(1.0))),
        (
            {"p": 0.5, "density": 0.3, "coefficient": 0.2, "seed": 3},
            chain(Drop(0.5, True, 3), Trim(0.3), *ELECT, Scale(0.2)),
        ),
    ],
    "breadcrumbs": [
        ({}, chain(MagnitudeWindow(0.85, 0.01, "tensor"), Sum(), Scale(0.3))),
        (
            {"density": 0.5, "outliers": 0.1, "coefficient": 0.2},
            chain(MagnitudeWindow(0.5, 0.1, "tensor"), Sum(), Scale(0.2)),
        ),
    ],
    "della": [
        ({}, chain(DropByRank(0.7, 0.1, True, 0), *ELECT, Scale(1.0))),
        (
            {"density": 0.5, "epsilon": 0.2, "coefficient": 0.3, "seed": 4},
            chain(DropByRank(0.5, 0.2, True, 4), *ELECT, Scale(0.3)),
        ),
    ],
    "consensus_ta": [
        ({}, chain(ConsensusMask(2, 0.4, Sum()), Scale(0.3))),
        ({"k": 3, "threshold": 0.2, "coefficient": 0.1}, chain(ConsensusMask(3, 0.2, Sum()), Scale(0.1))),
    ],
    "consensus_ties": [
        ({}, chain(ConsensusMask(2, 0.4, chain(Trim(0.2), *ELECT, Scale(1.0))), Scale(1.0))),
        (
            {"k": 3, "threshold": 0.3, "density": 0.1, "coefficient": 0.5},
            chain(ConsensusMask(3, 0.3, chain(Trim(0.1), *ELECT, Scale(1.0))), Scale(0.5)),
        ),
    ],
    "tall_masks": [
        ({}, chain(TallMask(0.4, Sum()))),
        ({"threshold": 0.2, "density": 0.1}, chain(TallMask(0.2, chain(Trim(0.1), *ELECT, Scale(1.0))))),
    ],
    "lines": [
        ({}, chain(Sum(), LiNeS("norm_ratio", 1.0, "linear"))),
        (
            {"merge": chain(Mean(), Scale(2.0)), "alpha": 0.3, "beta": 0.5, "schedule": "sqrt"},
            chain(Mean(), Scale(2.0), LiNeS(0.3, 0.5, "sqrt")),
        ),
    ],
    "tsv_m": [({}, chain(TSVMerge(None), Scale(1.0))), ({"coefficient": 0.5}, chain(TSVMerge(None), Scale(0.5)))],
    "iso_c": [({}, chain(IsoC(), Scale(1.0))), ({"coefficient": 0.5}, chain(IsoC(), Scale(0.5)))],
    "iso_cts": [
        ({}, chain(IsoCTS(0.8), Scale(1.0))),
        ({"common_fraction": 0.6, "coefficient": 0.5}, chain(IsoCTS(0.6), Scale(0.5))),
    ],
    "wudi": [({}, chain(WUDI(300, 1e-5), Scale(1.0))), ({"steps": 7, "coefficient": 0.5}, chain(WUDI(7), Scale(0.5)))],
    "iwudi": [
        ({}, chain(SpectralWUDI(300.0, 1.0, True), Scale(1.0))),
        ({"time": 20.0, "coefficient": 0.5}, chain(SpectralWUDI(20.0), Scale(0.5))),
    ],
    "swudi": [
        ({}, chain(SpectralWUDI(1300.0, 0.65, True), Scale(1.0))),
        ({"time": 20.0, "rank": 0.5, "coefficient": 0.5}, chain(SpectralWUDI(20.0, 0.5), Scale(0.5))),
    ],
    "aswudi": [
        ({}, chain(SpectralWUDI(None, "participation", True), Scale(1.0))),
        ({"coefficient": 0.5}, chain(SpectralWUDI(None, "participation"), Scale(0.5))),
    ],
    "actmerge": [
        ({}, chain(SpectralWUDI(None, 1.0, False, 1e-8), Scale(1.0))),
        ({"floor": 1e-5, "coefficient": 0.5}, chain(SpectralWUDI(None, 1.0, False, 1e-5), Scale(0.5))),
    ],
    "ace": [
        ({}, chain(ACE(1e-2, 0.3, 0.3), Scale(1.0))),
        ({"ridge": 0.1, "coefficient": 0.5}, chain(ACE(0.1), Scale(0.5))),
    ],
    "optmerge": [
        ({}, chain(OptMerge(300, 1e-5, None), Scale(1.0))),
        ({"steps": 7, "coefficient": 0.5}, chain(OptMerge(7), Scale(0.5))),
    ],
    "cart": [
        ({}, chain(CART(0.16, 2.3))),
        ({"rank_fraction": 0.08, "coefficient": 1.5}, chain(CART(0.08, 1.5))),
    ],
    "esm": [
        ({}, chain(ESM(None, True, 0.0, None), Polarise("layers", 2.0), Scale(1.0))),
        ({"statistics": FILES, "coefficient": 0.5}, chain(ESM(FILES), Polarise("layers"), Scale(0.5))),
    ],
    "dc_merge": [
        ({}, chain(DCMerge(1e-3, None), Scale(1.0))),
        ({"keep": 0.1, "smoothing": "mean", "coefficient": 0.5}, chain(DCMerge(0.1, "mean"), Scale(0.5))),
    ],
    "orthomerge": [
        ({}, chain(OrthoMerge(chain(Sum(), Scale(0.2)), False))),
        ({"coefficient": 0.5, "conflicts": True}, chain(OrthoMerge(chain(Sum(), Scale(0.5)), True))),
    ],
    "svc": [
        ({}, chain(Sum(), Scale(0.3), Calibrate(0.1))),
        ({"merge": chain(TSVMerge(), Scale(0.5))}, chain(TSVMerge(), Scale(0.5), Calibrate(1.0))),
        ({"merge": IsoCTS(0.7), "alpha": 0.3}, chain(IsoCTS(0.7), Calibrate(0.3))),
    ],
    "magmax": [
        ({}, chain(LargestMagnitude(), Scale(0.5))),
        ({"coefficient": 1.0}, chain(LargestMagnitude(), Scale(1.0))),
    ],
    "emr": [({}, chain(SignMask(chain(ElectSign(), LargestMagnitude())), Rescale("l1", "global")))],
    "pcb": [
        ({}, chain(PCB(0.05, 0.01, "normalised"), Scale(1.2))),
        ({"fraction": 0.1, "coefficient": 1.0}, chain(PCB(0.1), Scale(1.0))),
    ],
    "sce": [
        ({}, chain(SCE(0.1), Scale(1.0))),
        ({"density": 0.5, "coefficient": 0.8}, chain(SCE(0.5), Scale(0.8))),
    ],
    "ram": [
        ({}, chain(RAM(1e-5, 0.0), Scale(1.0))),
        ({"threshold": 0.1, "coefficient": 0.5}, chain(RAM(0.1), Scale(0.5))),
    ],
    "ram_plus": [
        ({}, chain(RAM(1e-5, 0.2, 1.0, "global"), Scale(1.0))),
        (
            {"threshold": 0.1, "boost": 0.1, "limit": 0.2, "coefficient": 0.5},
            chain(RAM(0.1, 0.1, 0.2), Scale(0.5)),
        ),
    ],
    "tatr": [
        ({}, chain(TrustRegion(0.01, None), Sum(), Scale(0.3))),
        (
            {"fraction": 0.02, "statistics": FILES, "coefficient": (0.1, 0.2)},
            chain(TrustRegion(0.02, FILES), Scale((0.1, 0.2)), Sum()),
        ),
    ],
    "doge": [
        ({}, chain(DOGE(400, 1e-4, 0.07, 0.3, 6, None), Scale(1.0))),
        (
            {"steps": 5, "strength": 0.1, "density": 0.5, "coefficient": 0.5},
            chain(DOGE(5, strength=0.1, density=0.5), Scale(0.5)),
        ),
    ],
    "nearswap": [({}, chain(Clip(1e-4))), ({"limit": 0.01}, chain(Clip(0.01)))],
    "knots": [
        ({}, chain(KnOTS(chain(Trim(0.2), *ELECT, Scale(1.0))), Scale(1.0))),
        ({"merge": Sum(), "coefficient": 0.3}, chain(KnOTS(Sum()), Scale(0.3))),
    ],
    "core_space": [
        ({}, chain(CoreSpace(chain(TSVMerge(), Scale(1.0))), Scale(1.0))),
        ({"merge": Sum(), "coefficient": 0.3}, chain(CoreSpace(Sum()), Scale(0.3))),
    ],
    "slerp": [
        ({}, chain(Slerp(0.5, "weights", 0.9995))),
        ({"fraction": 0.2, "space": "task_vectors"}, chain(Slerp(0.2, "task_vectors", 0.9995))),
    ],
    "karcher": [
        ({}, chain(KarcherMean("weights", 100, 1e-10))),
        ({"space": "task_vectors"}, chain(KarcherMean("task_vectors", 100, 1e-10))),
    ],
    "model_stock": [({}, chain(ModelStock(True)))],
    "fisher": [
        ({"statistics": FILES}, chain(FisherMean(FILES, None, 1e-6, "norm"), Scale(1.0))),
        (
            {"statistics": FILES, "floor": 0.1, "normalise": "mean", "coefficient": 0.5},
            chain(FisherMean(FILES, None, 0.1, "mean"), Scale(0.5)),
        ),
    ],
    "regmean": [
        ({"statistics": FILES}, chain(RegMean(FILES, 0.9), Scale(1.0))),
        (
            {"statistics": FILES, "off_diagonal": 0.5, "coefficient": 0.5},
            chain(RegMean(FILES, 0.5), Scale(0.5)),
        ),
    ],
    "adamerging": [
        ({"coefficients": LEARNED}, chain(LearnedScale(LEARNED), Sum())),
        (
            {"coefficients": LEARNED_OVER_TIES},
            chain(Trim(0.2, "tensor"), ElectSign(), LearnedScale(LEARNED_OVER_TIES), Sum()),
        ),
    ],
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_its_chain(name):
    assert name in CHAINS, "write the chain of a new recipe out in CHAINS"
    for fields, expected in CHAINS[name]:
        assert recipe(name, **fields) == RECIPES[name](**fields) == expected
    assert set(fields) == set(inspect.signature(RECIPES[name]).parameters)  # the last one sets them all


def test_every_chain_is_a_recipe():
    assert set(CHAINS) == set(RECIPES)


@pytest.mark.parametrize(("name", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_a_recipe_says_what_it_needs(name, kind):
    line = rf"^recipe {name}: expected a value for statistics, got none\. .*lit-merge statistics --kind {kind}\.$"
    with pytest.raises(ConfigurationError, match=line):
        recipe(name)
