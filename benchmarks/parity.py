"""Our merging methods beside the releases of peft, mergekit and FusionBench, on the same random inputs.

Every row is one method: matrices and vectors, two to four tasks, float32 and float64, one parameter at a time, as these
libraries work; for what looks at images, a tiny network (benchmarks/parity_with_data.py). The difference is the largest
one divided by the library's largest entry. Methods that drop at random are given the masks that ours draws in place of
torch's random numbers.

A row that differs says why; one that differs without a reason, or agrees although it gives one, ends the run.

    pip install -r benchmarks/requirements.txt
    python benchmarks/parity.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import parity_table
import torch
from fusion_bench.method.dare.utils import param_random_drop_
from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.magmax.magmax import magmax_merge
from fusion_bench.method.model_stock import ModelStock as FusionBenchModelStock
from fusion_bench.method.simple_average import simple_average
from fusion_bench.method.singular_value_calibration.utils import (
    subspace_consistency_spectral_calibration_accelerated as fusion_bench_svc,
)
from fusion_bench.method.slerp.slerp_utils import slerp as fusion_bench_slerp
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.trust_region.clip_task_arithmetic import TaskArithmeticWithTrustRegionForCLIP
from fusion_bench.method.wudi import wudi_merging
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_mul
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.karcher import karcher_merge_tensors
from mergekit.merge_methods.nuslerp import nuslerp
from mergekit.merge_methods.slerp import slerp as mergekit_slerp
from parity_blocks import BlockRow, block_rows
from parity_with_data import DataRow, data_rows
from peft.utils import merge_utils as peft
from torch import Tensor, nn

from lit_merge import transforms as ours
from lit_merge._version import __version__
from lit_merge.report.environment import hardware
from lit_merge.transforms import Transform, chain
from lit_merge.vectors import TaskVector, TaskVectors

SEED = 20250731
TOLERANCE = 1e-5
SHAPES = [(16, 12), (12, 16), (10, 10), (50,)]
NAME = "weight"


@dataclass(frozen=True)
class Case:
    """θ0 and T task vectors of one parameter."""

    base: Tensor
    taus: list[Tensor]

    def stack(self, transform: Transform) -> Tensor:
        """What lit-merge makes of them, ``(T', *shape)``."""
        rows = [TaskVector({NAME: tau}, f"task{index}") for index, tau in enumerate(self.taus)]
        return transform(TaskVectors(rows, base={NAME: self.base}))[NAME]

    @property
    def tuned(self) -> list[Tensor]:
        """θ_t."""
        return [self.base + tau for tau in self.taus]

    @property
    def states(self) -> list[dict[str, Tensor]]:
        """The task vectors as state dicts."""
        return [{NAME: tau.clone()} for tau in self.taus]

    @property
    def ones(self) -> Tensor:
        """A weight of 1 for every task."""
        return torch.ones(len(self.taus), dtype=self.base.dtype)


Theirs = Callable[[Case], Tensor]
Change = Callable[[Case], Case]


@dataclass(frozen=True)
class Row:
    """One method: what a library and what we make of the same inputs, and why that differs, if it does."""

    method: str
    theirs: Theirs
    ours: Transform
    tasks: tuple[int, ...] = (2, 3, 4)
    change: Change = lambda case: case
    reason: str = ""
    paper: str = ""

    @property
    def lit_merge(self) -> str:
        """What we do."""
        return repr(self.ours)

    def results(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """What the library makes of every case, and what we do."""
        for case in map(self.change, cases(self.tasks, dtype)):
            yield self.theirs(case).detach(), case.stack(self.ours)[0]


def cases(tasks: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    """The same inputs for every row; what the vectors have in common keeps them within a right angle of each other."""
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(SEED)
        base, common, *taus = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(6))
        for count in tasks:
            yield Case(base.to(dtype), [(common + tau).to(dtype) for tau in taus[:count]])


def smaller(factor: float) -> Change:
    """Small vectors beside the same θ0."""
    return lambda case: Case(case.base, [factor * tau for tau in case.taus])


def opposed(case: Case) -> Case:
    """Vectors more than a right angle apart."""
    mean = torch.stack(case.taus).mean(0)
    return Case(case.base, [tau - 0.9 * mean for tau in case.taus])


def rank_one(case: Case) -> Case:
    """Vectors of low rank, as LoRA gives."""
    return Case(case.base, [tau if tau.ndim == 1 else torch.outer(tau[:, 0], tau[0]) for tau in case.taus])


def two_rows(case: Case) -> Case:
    """A rank below the number of tasks."""
    return Case(case.base[:2], [tau[:2] for tau in case.taus])


def as_matrix(case: Case) -> Case:
    """Vectors of fifty elements as matrices."""
    shape = case.base.shape if case.base.ndim > 1 else (5, 10)
    return Case(case.base.reshape(shape), [tau.reshape(shape) for tau in case.taus])


def with_our_masks(drop: Transform, theirs: Theirs, function: str = "bernoulli") -> Theirs:
    """The library's method, with the masks of our transform in place of one of torch's random functions."""

    def run(case: Case) -> Tensor:
        masks = iter((case.stack(drop) != 0).unbind())

        def give(like: Tensor, **keywords: Any) -> Tensor:
            return next(masks).reshape(like.shape).to(like.dtype)

        with mock.patch.object(torch, function, give):
            merged = theirs(case)
        assert next(masks, None) is None, f"expected one call of torch.{function} per vector"
        return merged

    return run


DROP, BARE_DROP = ours.Drop(0.6), ours.Drop(0.6, rescale=False)
RANKED, BARE_RANKED = ours.DropByRank(0.4, 0.2), ours.DropByRank(0.4, 0.2, rescale=False)
TRIM, WINDOW = ours.Trim(0.3, "tensor"), ours.MagnitudeWindow(0.5, 0.1, "tensor")
SUM, L1_NORM = ours.Sum(), ours.Rescale("l1", "tensor")
ELECTED_MEAN, ELECTED_SUM = (
    chain(ours.ElectSign(), ours.DisjointMean()),
    chain(ours.ElectSign(), ours.DisjointSum()),
)

ROUNDED = "0.58 · 100 in floating point is below 58: it keeps 57 entries, we 58"
ONE_MORE = "like the authors' program it keeps the threshold itself, ⌊density · n⌋ + 1 entries, we ⌊density · n⌋"
L1 = "it rescales what is left to the L1 norm before, we divide by the probability of being kept"
NO_RANK = "it gives room to singular values of 0, whose vectors are arbitrary; we leave them out"
NO_SHARE = "⌊r/T⌋ = 0: it keeps nothing, we one singular value of every task"
NEGATIVE = "cos θ < 0: its t is negative, our t is 0 (clamp=True)"
GUARDED = "its guard against a division by zero is as large as ‖τ‖²"
NO_ORDER = "all singular values are equal: which directions are calibrated is a matter of rounding"
ANGLES = "it averages the angles, we their cosines, as the authors say (naver-ai/model-stock, issue 2)"


def peft_rows() -> list[Row]:
    """What peft merges adapters with, weights 1."""
    by_count = chain(TRIM, ours.ElectSign("count"), ours.DisjointMean())
    more = chain(ours.Trim(0.58, "tensor"), SUM)
    linear = with_our_masks(DROP, lambda case: peft.dare_linear(case.taus, case.ones, 0.4))
    ties = with_our_masks(DROP, lambda case: peft.dare_ties(case.taus, case.ones, 0.4))

    def prune(density: float) -> Theirs:
        return lambda case: peft.magnitude_prune(case.taus, case.ones, density)

    return [
        Row("task_arithmetic", lambda case: peft.task_arithmetic(case.taus, case.ones), SUM),
        Row("magnitude_prune", prune(0.3), chain(TRIM, SUM)),
        Row("magnitude_prune, density 0.58", prune(0.58), more, reason=ROUNDED, paper="lit-merge"),
        Row("ties, total", lambda case: peft.ties(case.taus, case.ones, 0.3), chain(TRIM, ELECTED_MEAN)),
        Row("ties, frequency", lambda case: peft.ties(case.taus, case.ones, 0.3, "frequency"), by_count),
        Row("dare_linear", linear, chain(DROP, SUM)),
        Row("dare_ties", ties, chain(DROP, ELECTED_MEAN)),
    ]


def by_mergekit(method: str, **settings: float) -> Theirs:
    """A registered method on θ0 = 0, whose sums would hide the vectors' last digits; every weight is 1."""

    def run(case: Case) -> Tensor:
        found: Any = registry.get(method)
        group = TensorGroup.from_tensors([torch.zeros_like(case.base), *case.taus], base_index=0)
        values: dict[str, Any] = {}
        for item in found.spec.parameters:
            value = settings.get(item.name, 1.0 if item.name == "weight" else item.default)
            values[item.name] = value if item.scope.value == "shared" else {e.id: value for e in group.non_base}
        return found.merge_group(group, **values)

    return run


def della_as_published(case: Case) -> Tensor:
    """Σ_t m_t τ_t / p_t with mergekit's probabilities p_t and our masks m_t."""
    seen: list[Tensor] = []
    bernoulli = torch.bernoulli
    with mock.patch.object(torch, "bernoulli", lambda p: seen.append(p) or bernoulli(p)):
        by_mergekit("della_linear", density=0.4, epsilon=0.2)(case)
    masks = case.stack(RANKED) != 0
    kept = [tau * mask / p.view_as(tau) for tau, mask, p in zip(case.taus, masks, seen, strict=True)]
    return torch.stack(kept).sum(0)


def mergekit_rows() -> list[Row]:
    """What mergekit registers; some of it rescales after a drop, which ``Rescale`` restates."""

    def slerp(case: Case) -> Tensor:
        first, second = case.tuned
        return mergekit_slerp(torch.tensor([0.3], dtype=first.dtype), first[None], second[None])[0] - case.base

    def nearswap(case: Case) -> Tensor:
        group = TensorGroup.from_tensors([torch.zeros_like(case.base), *case.taus], base_index=0)
        return registry.get("nearswap").merge_group(group, t=0.3)

    def karcher(**settings: float) -> Theirs:
        return lambda case: (
            karcher_merge_tensors(case.tuned, [1 / len(case.taus)] * len(case.taus), **settings) - (case.base)
        )

    linear = with_our_masks(DROP, by_mergekit("dare_linear", density=0.4))
    plain = with_our_masks(DROP, by_mergekit("dare_linear", density=0.4, rescale=False))
    ties = with_our_masks(DROP, by_mergekit("dare_ties", density=0.4))
    della = with_our_masks(RANKED, by_mergekit("della", density=0.4, epsilon=0.2))
    della_linear = with_our_masks(RANKED, by_mergekit("della_linear", density=0.4, epsilon=0.2))
    crumbs, crumbs_ties = (by_mergekit(f"breadcrumbs{end}", density=0.5, gamma=0.1) for end in ("", "_ties"))
    arc = ours.Slerp(0.3, "task_vectors")
    return [
        Row("task_arithmetic", by_mergekit("task_arithmetic"), SUM),
        Row("ties", by_mergekit("ties", density=0.3), chain(TRIM, ELECTED_MEAN)),
        Row("dare_linear", linear, chain(DROP, SUM), reason=L1, paper="lit-merge"),
        Row("dare_linear, L1 norm", linear, chain(BARE_DROP, L1_NORM, SUM)),
        Row("dare_linear, rescale=False", plain, chain(BARE_DROP, SUM)),
        Row("dare_ties, L1 norm", ties, chain(BARE_DROP, L1_NORM, ELECTED_SUM)),
        Row("breadcrumbs", crumbs, chain(WINDOW, SUM)),
        Row("breadcrumbs_ties", crumbs_ties, chain(WINDOW, ELECTED_SUM)),
        Row("della", della, chain(RANKED, ELECTED_MEAN), reason=L1, paper="lit-merge"),
        Row("della, L1 norm", della, chain(BARE_RANKED, L1_NORM, ELECTED_MEAN)),
        Row("della_linear, L1 norm", della_linear, chain(BARE_RANKED, L1_NORM, SUM)),
        Row("della_linear, its probabilities", della_as_published, chain(RANKED, SUM)),
        Row("slerp", slerp, ours.Slerp(0.3), (2,)),
        Row("slerp, τ / 100 (linear)", slerp, ours.Slerp(0.3), (2,), smaller(0.01)),
        Row("nuslerp", lambda case: nuslerp(0.3, *case.taus, flatten=True), arc, (2,)),
        Row("karcher, 10 steps", karcher(), ours.KarcherMean()),
        Row("karcher, 1000 steps", karcher(max_iter=1000, tol=1e-7), ours.KarcherMean()),
        *model_stock_rows(by_mergekit("model_stock"), (2, 3, 4)),
        Row("sce", by_mergekit("sce", select_topk=0.3), ours.SCE(0.3)),
        Row("sce, all elements", by_mergekit("sce", select_topk=1.0), ours.SCE(1.0)),
        Row("ram", by_mergekit("ram", epsilon=0.8), ours.RAM(0.8)),
        Row("ramplus_tl", by_mergekit("ramplus_tl", epsilon=0.8), ours.RAM(0.8, 0.1, 0.2, "tensor")),
        Row("nearswap", nearswap, ours.Clip(0.3), (1,)),
    ]


def model_stock_rows(theirs: Theirs, tasks: tuple[int, ...]) -> list[Row]:
    """Model Stock of one library, where it is well behaved and where it is not."""
    apart, raw = "model_stock, cos θ < 0", ours.ModelStock(clamp=False)
    return [
        Row("model_stock", theirs, ours.ModelStock(), tasks),
        Row(apart, theirs, ours.ModelStock(), (2,), opposed, NEGATIVE, "unclear"),
        Row(f"{apart}, clamp=False", theirs, raw, (2,), opposed),
        Row("model_stock, τ · 1e-5", theirs, ours.ModelStock(), tasks, smaller(1e-5), GUARDED, "lit-merge"),
    ]


def module(value: Tensor) -> nn.Module:
    """A model of one parameter."""
    made = nn.Module()
    made.register_parameter(NAME, nn.Parameter(value.clone()))
    return made


class Pool:
    """Stands in for FusionBench's pool of models, with θ0 = 0."""

    def __init__(self, case: Case) -> None:
        self.models = {str(index): module(tau) for index, tau in enumerate(case.taus)}
        self.pretrained = module(torch.zeros_like(case.base))
        self.model_names = list(self.models)

    def load_pretrained_model(self) -> nn.Module:
        """θ0."""
        return self.pretrained

    def load_model(self, name: str) -> nn.Module:
        """θ_t."""
        return self.models[name]


class NamedPool(BaseModelPool):
    """Models whose parameter has the name that some algorithms look for."""

    def __init__(self, case: Case) -> None:
        known = {"_pretrained_": torch.zeros_like(case.base), **dict(zip("abcd", case.taus, strict=False))}
        models = {name: nn.Module() for name in known}
        for name, value in known.items():
            models[name].encoder = module(value)
        super().__init__(models)


class KeepOneMore(Transform):
    """Trims to ⌊0.2 n⌋ + 1 entries."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Trim to a density that gives this number."""
        size = vectors.shape(NAME)[1:].numel()
        return ours.Trim((size // 5 + 1.5) / size, "tensor")(vectors)


class DogeWithOneMore(Transform):
    """DOGE whose masks keep ⌊0.3 n⌋ + 1 entries."""

    def __call__(self, vectors: TaskVectors) -> TaskVectors:
        """Merge with a density that gives this number."""
        size = vectors.shape(NAME)[1:].numel()
        return ours.DOGE(density=(size * 3 // 10 + 1.5) / size)(vectors)


def calibrated(merge: Transform, alpha: float) -> Theirs:
    """FusionBench's calibration of what our merge makes of the matrices; vectors stay as they are."""

    def run(case: Case) -> Tensor:
        merged = case.stack(merge)[0]
        none = torch.zeros_like(merged)
        return merged if merged.ndim < 2 else fusion_bench_svc(none, case.taus, merged, alpha, accelerator="cpu")

    return run


def svc_rows() -> list[Row]:
    """Singular value calibration after several merges."""
    merges = {
        "task_arithmetic": (ours.task_arithmetic(), 0.1),
        "ties": (chain(TRIM, ELECTED_MEAN), 0.1),
        "tsv_m": (ours.tsv_m(), 1.0),
    }
    flat = ours.iso_cts()
    return [
        *(Row(f"svc of {name}", calibrated(merge, alpha), ours.svc(merge)) for name, (merge, alpha) in merges.items()),
        Row("svc of iso_cts", calibrated(flat, 0.2), ours.svc(flat), reason=NO_ORDER, paper="undefined"),
    ]


def fusion_bench_rows() -> list[Row]:
    """FusionBench's algorithms, or the functions that they consist of."""

    def arithmetic(case: Case) -> Tensor:
        total: Any = reduce(state_dict_add, case.states)  # task_arithmetic_merge of this release refuses parameters
        return state_dict_mul(total, 0.3)[NAME]

    def ties(case: Case) -> Tensor:
        flat = torch.stack([tau.flatten() for tau in case.taus])
        return ties_merging(flat, reset_thresh=20, merge_func="dis-mean").view_as(case.base)

    def dare(case: Case) -> Tensor:
        dropped = [tau.clone() for tau in case.taus]
        for tau in dropped:
            param_random_drop_(tau, 0.6, rescale=True)
        return torch.stack(dropped).sum(0)

    def stock(case: Case) -> Tensor:
        return FusionBenchModelStock().run(Pool(case)).state_dict()[NAME]

    def tsv_m(case: Case) -> Tensor:
        return compute_and_sum_svd_mem_reduction(case.states, accelerator="cpu")[NAME]

    def emr(case: Case) -> Tensor:
        unified, masks, factors = emr_merge(case.states)
        return unified[NAME] * masks[NAME][0] * factors[0]

    def magmax(case: Case) -> Tensor:
        models = [module(tau) for tau in case.taus]
        return magmax_merge(module(torch.zeros_like(case.base)), models, 0.5).state_dict()[NAME]

    def tatr(case: Case) -> Tensor:
        algorithm = TaskArithmeticWithTrustRegionForCLIP(0.3, 0.9, 128, 16, zero_shot=True)
        return algorithm.run(NamedPool(case)).state_dict()[f"encoder.{NAME}"]

    def doge(case: Case) -> Tensor:
        return DOGE_TA_Algorithm(6, 30, 0.07).run(NamedPool(case)).state_dict()[f"encoder.{NAME}"]

    def knots(case: Case) -> Tensor:
        left, values, right = subspace_alignment(case.taus)
        inside = [values.unsqueeze(1) * one for one in right]
        return left @ peft.ties(inside, case.ones, 0.3)

    dropped = with_our_masks(DROP, dare, "rand_like")
    in_space = ours.KnOTS(chain(TRIM, ELECTED_MEAN))
    spectral: list[tuple[str, Theirs, Transform]] = [
        ("tsv_m", tsv_m, ours.TSVMerge()),
        ("iso_c", lambda case: iso_c(case.states, accelerator="cpu")[NAME], ours.IsoC()),
        ("iso_cts", lambda case: iso_cts(case.states, 0.8, accelerator="cpu")[NAME], ours.IsoCTS(0.8)),
    ]
    trimmed = chain(ours.Trim(0.2, "tensor"), ELECTED_MEAN)
    return [
        Row("simple_average", lambda case: simple_average(case.states)[NAME], ours.Mean()),
        Row("task_arithmetic", arithmetic, ours.task_arithmetic(0.3)),
        Row("ties_merging", ties, trimmed, reason=ONE_MORE, paper="lit-merge"),
        Row("ties_merging, one entry more", ties, chain(KeepOneMore(), ELECTED_MEAN)),
        Row("dare", dropped, chain(DROP, SUM)),
        *(Row(*method) for method in spectral),
        *(Row(f"{name}, rank 1", *rest, (2, 3, 4), rank_one, NO_RANK, "undefined") for name, *rest in spectral),
        Row("tsv_m, r < T", tsv_m, ours.TSVMerge(), (3, 4), two_rows, NO_SHARE, "undefined"),
        Row("emr_merging", emr, ours.emr()),
        Row("magmax", magmax, ours.magmax(0.5)),
        Row("trust_region, zero-shot", tatr, ours.tatr(0.1, coefficient=0.3)),
        Row("doge_ta", doge, ours.doge(), change=as_matrix, reason=ONE_MORE, paper="lit-merge"),
        Row("doge_ta, one entry more", doge, DogeWithOneMore(), change=as_matrix),
        Row("knots, then peft's ties", knots, in_space, change=as_matrix),
        Row("knots, rank 1, then peft's ties", knots, in_space, change=lambda case: rank_one(as_matrix(case))),
        Row("wudi", lambda case: wudi_merging(case.states, accelerator="cpu")[NAME].detach(), ours.WUDI()),
        Row("slerp", lambda case: fusion_bench_slerp(0.3, *case.tuned) - case.base, ours.Slerp(0.3), (2,)),
        *svc_rows(),
        *model_stock_rows(stock, (2,)),
        Row("model_stock, T > 2", stock, ours.ModelStock(), (3, 4), reason=ANGLES, paper="lit-merge"),
    ]


def measured(library: str, row: Row | DataRow | BlockRow) -> dict[str, Any]:
    """The largest relative difference of a row in either dtype."""
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.float64):
        largest = 0.0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # some print a lot
            results = list(row.results(dtype))
        for theirs, mine in results:
            difference = (mine.double() - theirs.double()).abs().max()
            scale = theirs.abs().max() if theirs.any() else 1.0
            largest = max(largest, float(difference / scale))
        found[str(dtype).removeprefix("torch.")] = float(f"{largest:.2g}")
    agrees = max(found.values()) <= TOLERANCE
    if agrees == bool(row.reason):
        raise SystemExit(f"{library} {row.method}: the difference is {found}, its reason {row.reason!r}")
    outcome = {"agrees": True} if agrees else {"agrees": False, "reason": row.reason, "as_published": row.paper}
    return {"library": library, "method": row.method, "lit_merge": row.lit_merge, **found, **outcome}


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/parity.json"))
    options = parser.parse_args()
    libraries: dict[str, list[Row | DataRow | BlockRow]] = {
        "peft": [*peft_rows()],
        "mergekit": [*mergekit_rows()],
        "FusionBench": [*fusion_bench_rows(), *data_rows(), *block_rows()],
    }
    rows = [measured(library, row) for library, listed in libraries.items() for row in listed]
    installed = {name: metadata.version(name) for name in ("torch", "numpy", "peft", "mergekit", "fusion-bench")}
    report = {
        "seed": SEED,
        "tolerance": TOLERANCE,
        "shapes": SHAPES,
        "rows": rows,
        "versions": {"lit_merge": __version__, "python": platform.python_version(), **installed},
        "hardware": hardware(),
    }
    options.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    parity_table.place(report)


if __name__ == "__main__":
    main()
