"""TAK: a penalty on how far τ moves other tasks' features, by Kronecker factors of their curvature instead of data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.hub import pinned
from lit_merge.modules.curvature import Curvature, LayerCurvature, curvatures_of_files, dtype_of_products
from lit_merge.modules.penalty import Penalty
from lit_merge.transforms.base import finite_number, one_of, whole_number
from lit_merge.vectors.statistics import StatisticsFiles, open_one

__all__ = ["Tak"]


@dataclass(frozen=True, repr=False)
class Tak(Penalty):
    r"""``λ (Σ_l tr(G_l ΔW_l A_l ΔW_lᵀ) + Σ_p τ_pᵀ F_p τ_p)``, the curvature of other tasks' features (TAK, ICLR 2026).

    An estimate of ``E_x ‖J_θ f(x; θ0) τ‖²`` over other tasks' inputs, which needs none of them in training: their
    Kronecker factors at θ0 come from ``lit-merge statistics --kind kfac``, a file for each task. They are put together
    into one set (:func:`~lit_merge.modules.curvature.aggregated`), so that neither memory nor time depends on their
    number. The penalty is quadratic in τ, whether the network is linearised or not, and costs two products per layer,
    under bfloat16 autocast in bfloat16 (sums in float32). Rounded to it, factors of a MiniLM have eigenvalues that
    differ by up to 5e-5 of the largest, so that what is nearly free may be, or be rewarded by as little.
    Files with corrected eigenvalues (``--corrected true``, EK-FAC) are taken as they are: they fit better, are kept for
    each task, and cost four products per layer and task.

    Args:
        files: task -> file of its factors. That of the task which is trained is left out, so that all runs of a suite
            may name the same files; None where ``lit-merge suite`` collects and names them.
        weight: λ; the authors' value for CLIP, with corrected eigenvalues 500 (and ``projection`` 0.1).
        vectors: what the forms of normalisations and tokens, those with an F, are multiplied by.
        projection: what the forms of projections out of the network are multiplied by.
        projections: a regular expression for their names.
        without_factor: whether parameters of which there is no factor, such as position embeddings, are ``frozen``, as
            the authors' are, or train ``unpenalised``.
        start_step: the first optimiser step with a penalty.

    Raises:
        ConfigurationError: a setting is out of its range; when training begins, no file of another task is named, or
            nothing that trains has a factor.
        FileFormatError: when training begins, a file is missing, damaged, or of another format.
        StructureMismatchError: when training begins, a file belongs to another task, base model or network, or lacks
            a layer that another one has.
    """

    name: ClassVar[str] = "tak"
    reads_factors: ClassVar[bool] = True
    files: dict[str, str] | None = None
    weight: float = 100.0
    vectors: float = 10.0
    projection: float = 0.01
    projections: str = r"(^|\.)(proj|visual_projection\.weight)$"
    without_factor: Literal["frozen", "unpenalised"] = "frozen"
    start_step: int = 0
    _read: dict[tuple[Any, ...], list[Curvature]] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.files is not None:
            StatisticsFiles(self.files, "penalty.files")
        for name in ("weight", "vectors", "projection"):
            finite_number(f"penalty.{name}", getattr(self, name), minimum=0.0)
        whole_number("penalty.start_step", self.start_step, minimum=0)
        one_of("penalty.without_factor", self.without_factor, ("frozen", "unpenalised"))
        try:
            re.compile(self.projections)
        except (re.error, TypeError) as error:
            raise ConfigurationError(
                f"penalty.projections: expected a regular expression, got {self.projections!r} ({error})."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": {}}  # a checkpoint holds the files' names

    def __repr__(self) -> str:  # without paths, as it goes into a task vector's header
        return (
            f"Tak(tasks={sorted(self.files or ())}, weight={self.weight}, vectors={self.vectors}, "
            f"projection={self.projection}, without_factor={self.without_factor!r}, start_step={self.start_step})"
        )

    def prepare(self, module: Any) -> None:
        """Read the factors of the other tasks, and freeze what has none if that is asked for."""
        covered = {name for one in self._curvatures(module) for name in one.names}
        trained = [name for name, _ in module.parametrisation.departures()]
        bare = [name for name in trained if name not in covered]
        if len(bare) == len(trained):
            raise ConfigurationError(
                f"penalty: expected parameters that train and have a factor, got none among {first_few(trained)}. "
                "Select others, or remove the penalty."
            )
        if self.without_factor == "unpenalised":
            return
        own = dict(module.encoder.named_parameters())
        inseparable = [name for name in bare if name not in own]
        if inseparable:
            raise ConfigurationError(
                f"penalty: expected a factor for all that trains, got none for {first_few(inseparable)}, which cannot "
                "be frozen. Adapt other weights, or set without_factor to unpenalised."
            )
        for name in bare:
            own[name].requires_grad_(False)

    def of_module(self, module: Any) -> Tensor:
        """The sum of all forms, a scalar in float32 or float64."""
        changes = dict(module.parametrisation.departures())
        some = next(iter(changes.values()))
        where = (some.device, dtype_of_products(some))
        forms = ((one, one.of(changes)) for one in self._curvatures(module, *where))
        return torch.stack([self._factor(one) * form for one, form in forms if form is not None]).sum()

    def _factor(self, one: Curvature) -> float:
        if not isinstance(one, LayerCurvature):
            return self.vectors
        return self.projection if re.search(self.projections, one.weight) else 1.0

    def _curvatures(self, module: Any, *where: Any) -> list[Curvature]:
        """Those of the other tasks, read once, and kept where and in the dtype in which they are used."""
        key = (module.base_fingerprint, module.task)
        if key not in self._read:
            self._read.clear()
            self._read[key] = self._opened(module)
        if not where:
            return self._read[key]
        moved = (*key, *where)
        if moved not in self._read:
            self._read[moved] = [one.to(*where) for one in self._read[key]]
        return self._read[moved]

    def _opened(self, module: Any) -> list[Curvature]:
        if self.files is None:
            raise ConfigurationError(
                "penalty.files: expected a file of each other task's factors, got none. Collect them with lit-merge "
                "statistics --kind kfac, or run lit-merge suite, which does."
            )
        others = {task: path for task, path in self.files.items() if task != module.task}
        if not others:
            raise ConfigurationError(
                f"penalty.files: expected a file of another task than {module.task!r}, got that one's alone. Collect "
                "others with lit-merge statistics --kind kfac."
            )
        files = [open_one("kfac", task, pinned(path), module.base_fingerprint, "run") for task, path in others.items()]
        return curvatures_of_files(files, module.initial_parameters)
