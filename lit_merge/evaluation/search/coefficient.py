"""Searching over fields of a transform: the points, their accuracies on validation data, and the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.evaluation.accuracies import (
    Evaluation,
    LinearEvaluation,
    in_memory,
    validation_loaders,
)
from lit_merge.evaluation.search.result import SearchPoint, SearchResult
from lit_merge.evaluation.search.settings import CONTROLLED, CoefficientSearch, with_fields
from lit_merge.metrics.scores import (
    best_point,
    hypervolume,
    kept_share,
    mean_accuracy,
    negation_score,
    normalised_accuracy,
    pareto_front,
    target_control_score,
)
from lit_merge.models.network import Network, network_of
from lit_merge.transforms import Chain, Interpolate, Mean, Negate, Scale, ScaleBlocks, Sum, Transform, replace_field
from lit_merge.transforms.fields import field_path, field_value
from lit_merge.vectors import TaskVector, TaskVectors

if TYPE_CHECKING:
    from lit_merge.modules.multitask import MultiTaskModule

__all__ = ["direction_of", "search_coefficient"]

_HOMOGENEOUS = (Scale, ScaleBlocks, Sum, Mean, Negate, Interpolate)
"""Transforms T with T(α τ) = α T(τ)."""


def search_coefficient(
    vectors: TaskVectors,
    transform: Transform,
    search: CoefficientSearch,
    model: str = "lit-tiny",
    pretrained: str | None = None,
    data: Any = None,
    linearized: bool = False,
    network: Network | None = None,
    vector_files: Sequence[str] = (),
) -> SearchResult:
    """Evaluate ``θ0 + transform(vectors)`` at every point of a search, on the validation split of every task.

    Where a field is only a factor (:func:`direction_of`) the vectors are merged once for all its values, otherwise once
    per point. Accuracies are kept on disk as soon as they are known: an interrupted search goes on where it was, and
    points that another search has evaluated cost a merge only.

    Linearised, and where a field is only a factor, the features at every value are ``f0(x) + α J τ(x)``: the network
    sees each image once, and in a search with the same vectors and images not at all, as ``f0`` and the tangents are
    kept (:class:`lit_merge.models.linear_features.LinearFeatureCache`).

    Args:
        vectors: the task vectors.
        transform: a chain that reduces to one vector.
        search: what is varied, and by what is chosen.
        model: shorthand for a CLIP as the base model.
        pretrained: its weights.
        data: a :class:`lit_merge.data.MultiTaskDataModule`; by default the embedded tasks that the search is about:
            those of the vectors, and for the criteria with control tasks all others.
        linearized: whether to evaluate the encoder's tangent at θ0, as vectors that were trained linearised want it.
        network: the base model, instead of model and pretrained; its parameters stay θ0.
        vector_files: where the vectors are from, in order: trained heads are looked for beside them.

    Returns:
        Every point, and the chosen one.

    Raises:
        ConfigurationError: the chain has no such field, the tasks are not in the data, the criterion needs other tasks
            or vectors, Optuna is not installed, no point keeps the control accuracy, or a task cannot be measured as
            the search says.
        DataError: a task has no validation images, or an accuracy to divide by is 0.
        NonFiniteError: a reward is NaN or infinite.
        StructureMismatchError: the vectors belong to another base or architecture.
    """
    from lit_merge.modules.multitask import MultiTaskModule

    search.check(transform)
    data = data if data is not None else _embedded(vectors, search)
    target, control = _roles(vectors, search, data)
    module = MultiTaskModule(network=network_of(network, model, pretrained), linearized=linearized)
    module.look_beside((file, [task]) for file, task in zip(vector_files, vectors.tasks, strict=False))
    runner = _Search(vectors, transform, search, target, control, module, data)
    if search.optuna is None:
        for point in search.grid(last=runner.factor):
            runner.evaluate(point)
    else:
        from lit_merge.evaluation.search.study import run_study

        whole = [name for name in search.varied if isinstance(field_value(transform, name), Integral)]
        run_study(search.optuna, whole, runner.evaluate)
    return runner.result()


def direction_of(transform: Transform, field: str) -> Transform | None:
    """The transform D with ``transform(vectors) = α D(vectors)`` for every value α of a field, if structure tells.

    That is: the field is the one number of a :class:`~lit_merge.transforms.Scale`, and nothing but ``Scale``,
    ``ScaleBlocks``, ``Sum``, ``Mean``, ``Negate`` and ``Interpolate`` comes after it; before it anything may. D is the
    same chain with α = 1.

    Args:
        transform: a transform or a chain.
        field: the field's address, as for :func:`~lit_merge.transforms.replace_field`.

    Returns:
        D, or None where α may be more than a factor, e.g. one coefficient per task or the density of a trim.

    Raises:
        ConfigurationError: the address leads to no field or to several.

    Examples:
        >>> from lit_merge.transforms import task_arithmetic
        >>> direction_of(task_arithmetic(0.3), "coefficient")
        chain(Sum(), Scale(coefficient=1.0))
    """
    path = field_path(transform, field)
    steps = transform.steps if isinstance(transform, Chain) else (transform,)
    index = int(path[1]) if isinstance(transform, Chain) else 0
    step = steps[index]
    factor = type(step) is Scale and isinstance(step.coefficient, float) and path[-1] == "coefficient"
    linear = all(type(later) in _HOMOGENEOUS for later in steps[index + 1 :])
    return replace_field(transform, field, 1.0) if factor and linear else None


@dataclass
class _Search:
    """The points that were evaluated so far, and what they are compared with, measured when it is first needed."""

    vectors: TaskVectors
    transform: Transform
    search: CoefficientSearch
    target: list[str]
    control: list[str]
    module: MultiTaskModule
    data: Any

    def __post_init__(self) -> None:
        self.points: list[SearchPoint] = []
        self.measures = self.search.measures()
        named = [task for task in self.measures if task not in [*self.target, *self.control]]
        kinds = {self.search.measured(task) for task in self.target}
        if named or len(kinds) > 1:
            what = f"{named[0]!r}, which is neither" if named else f"targets measured by {' and '.join(sorted(kinds))}"
            raise ConfigurationError(
                "search.perplexity and search.rewards: expected target and control tasks, all targets measured alike, "
                f"got {what}. Name the tasks of data, and the targets by search.target."
            )
        varied = self.search.varied
        self.factor = next((name for name in varied if direction_of(self.transform, name) is not None), None)
        self._merged: tuple[Transform, TaskVector] | None = None
        tasks = self.vectors.tasks
        self._own = {task: self.vectors.vector(tasks.index(task)) for task in self.target if tasks.count(task) == 1}
        if self.search.criterion in ("normalised", "target_control") and len(self._own) < len(self.target):
            task = next(task for task in self.target if task not in self._own)
            raise ConfigurationError(
                f"search.criterion: expected one vector of every target task for {self.search.criterion}, got "
                f"{tasks.count(task)} of {task}. Use absolute, or name the target tasks."
            )

    @cached_property
    def evaluation(self) -> Evaluation:
        """Built after the first merge, which refuses what cannot be merged."""
        loaders = validation_loaders(self.module, self.data, [*self.target, *self.control])
        told = all(hasattr(getattr(loader, "dataset", None), "digest") for loader in loaders.values())
        kept = getattr(self.module.base, "vector_features", True)  # not logits over a vocabulary at every position
        if self.module.linearized and self.factor is not None and told and kept and not self.measures:
            return LinearEvaluation(self.module, loaders, self._own, self.search.precision)
        return Evaluation(self.module, loaders, self.search.precision, self.measures)

    @cached_property
    def individual(self) -> dict[str, float] | None:
        """Target task -> accuracy of its own vector, where the criterion or the report of one task each needs it."""
        of_rewards = any(task in (self.search.rewards or {}) for task in self.target)  # that have no ratios
        if self.search.criterion == "negation" or len(self._own) < len(self.target) or of_rewards:
            return None
        return {task: self.evaluation.accuracy(own, tasks=[task])[task] for task, own in self._own.items()}

    @cached_property
    def zero_shot(self) -> dict[str, float] | None:
        """Task -> accuracy of the pre-trained model, where the criterion or a measure needs it."""
        return self.evaluation.accuracy(None) if self.search.criterion in CONTROLLED or self.measures else None

    def evaluate(self, point: dict[str, float]) -> float:
        """The score of a point, which is kept."""
        accuracy = self._accuracy(point)
        own = {task: accuracy[task] for task in self.target}
        normalised = None if self.individual is None else normalised_accuracy(own, self.individual)
        absolute = mean_accuracy(accuracy, self.target)
        control = self._control(accuracy) if self.control else None
        score = self._score(accuracy, normalised, absolute, control)
        self.points.append(SearchPoint(point, accuracy, absolute, normalised, control, score))
        return score

    def _control(self, accuracy: Mapping[str, float]) -> float:
        """The mean accuracy of the control tasks; the share that is kept, where they are not all measured by it."""
        alone = [task for task in self.control if task in self.measures]
        if not alone:
            return mean_accuracy(accuracy, self.control)
        assert self.zero_shot is not None
        return kept_share(accuracy, self.zero_shot, self.control, alone)

    def result(self) -> SearchResult:
        """The choice among the points."""
        best = best_point([point.score for point in self.points], [list(p.fields.values()) for p in self.points])
        chosen = self.points[best]
        forgetting = self.search.criterion == "negation"
        if forgetting and chosen.score < -1:
            assert self.zero_shot is not None
            kept, what = self._control(self.zero_shot), "accuracy"
            what = "measures" if any(task in self.measures for task in self.control) else what
            raise ConfigurationError(
                f"search: expected a point that keeps {self.search.control_share:g} of the control {what} "
                f"{kept:.4g}, got at most {chosen.control:.4g} ({_named(chosen.fields)}). "
                "Add smaller values; 0 keeps all of it."
            )
        signs = {task: -1 if forgetting and task in self.target else 1 for task in chosen.accuracy}
        places = [[signs[task] * point.accuracy[task] for task in signs] for point in self.points]
        front, volume = pareto_front(places), None
        if self.measures:
            assert self.zero_shot is not None
            start = [signs[task] * self.zero_shot[task] for task in signs]
            volume = hypervolume([places[index] for index in front], start)
        return SearchResult(
            points=self.points,
            chosen=best,
            pareto=front,
            transform=with_fields(self.transform, chosen.fields),
            criterion=self.search.criterion,
            split="val",
            target=self.target,
            control=self.control,
            individual=self.individual,
            zero_shot=self.zero_shot,
            measures={task: measure.describe() for task, measure in self.measures.items()},
            perplexity=list(self.search.perplexity or []),
            hypervolume=volume,
        )

    def _accuracy(self, point: Mapping[str, float]) -> dict[str, float]:
        fixed = dict(point)
        value = fixed.pop(self.factor) if self.factor is not None else 1.0
        candidate = with_fields(self.transform, fixed)
        if self.factor is not None:
            candidate = replace_field(candidate, self.factor, 1.0)
        if self._merged is None or self._merged[0] != candidate:
            self._merged = candidate, in_memory(candidate(self.vectors).single())
        return self.evaluation.accuracy(self._merged[1], value)

    def _score(
        self, accuracy: Mapping[str, float], normalised: float | None, absolute: float, control: float | None
    ) -> float:
        if self.search.criterion == "absolute":
            return absolute
        if self.search.criterion == "normalised":
            assert normalised is not None
            return normalised
        assert control is not None
        assert self.zero_shot is not None
        if self.search.criterion == "negation":
            kept = self._control(self.zero_shot)
            if not 0 <= absolute <= 1:
                raise ConfigurationError(
                    f"search.rewards: expected a target of negation in [0, 1], such as a probability, got "
                    f"{absolute:.4g}. Set score of the classifier to softmax or sigmoid."
                )
            return negation_score(absolute, control, kept, self.search.control_share)
        assert self.individual is not None
        zero_shot = {task: self.zero_shot[task] for task in self.control}
        return target_control_score(accuracy, self.individual, zero_shot, self.search.target_weight)


def _embedded(vectors: TaskVectors, search: CoefficientSearch) -> Any:
    """The embedded tasks that a search is about."""
    from lit_merge.data.embedded.tasks import EMBEDDED_TASKS
    from lit_merge.data.multitask import MultiTaskDataModule

    named = list(dict.fromkeys(search.target or vectors.tasks))
    others = list(EMBEDDED_TASKS) if search.criterion in CONTROLLED else []
    others = others if search.control is None else search.control
    return MultiTaskDataModule(tasks=[*named, *(task for task in others if task not in named)])


def _roles(vectors: TaskVectors, search: CoefficientSearch, data: Any) -> tuple[list[str], list[str]]:
    """The target and the control tasks."""
    from lit_merge.data.multitask import task_names

    names = task_names(data)
    target = list(dict.fromkeys(search.target or vectors.tasks))
    given = list(dict.fromkeys(search.control or []))
    control = [task for task in names if task not in target] if search.control is None else given
    missing = [task for task in [*target, *control] if task not in names]
    if missing:
        raise ConfigurationError(
            f"search: expected data of every task, got none of {missing[0]!r} (data: {', '.join(names)}). "
            "Name the tasks of data as the vectors', or give search.target."
        )
    both = [task for task in control if task in target]
    if both:
        raise ConfigurationError(
            f"search.control: expected other tasks than the targets, got {first_few(both)}. Name each task once."
        )
    if search.criterion in CONTROLLED and not control:
        raise ConfigurationError(
            f"search.criterion: expected control tasks for {search.criterion}, got none. "
            "Give data of other tasks as well."
        )
    return target, control


def _named(fields: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in fields.items())
