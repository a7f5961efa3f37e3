"""What a search varies, and by what it chooses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal, get_args

from lit_merge.errors import ConfigurationError
from lit_merge.evaluation.measures import MeanReward, Measure, TokenProbability
from lit_merge.metrics.rewards import Reward
from lit_merge.models.language.generation import Generation
from lit_merge.transforms import Transform, replace_field
from lit_merge.transforms.base import finite_number, plain_object, whole_number
from lit_merge.vectors import TaskVectors

__all__ = ["CONTROLLED", "CoefficientSearch", "Criterion", "OptunaStudy", "Precision", "with_fields"]

Criterion = Literal["normalised", "absolute", "target_control", "negation"]

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

CONTROLLED = ("target_control", "negation")
"""The criteria that need control tasks."""


def _grid() -> list[float]:
    return [round(0.05 * step, 2) for step in range(21)]


@dataclass(frozen=True)
class OptunaStudy:
    """Trials that Optuna's tree-structured Parzen estimator suggests (Bergstra et al. 2011), one after the other.

    Args:
        ranges: a field's address -> its lowest and highest value; of a field that holds a whole number, whole numbers.
        trials: how many points are evaluated.
        seed: of the sampler; the same seed and accuracies give the same points.

    Raises:
        ConfigurationError: there is no range, one is empty, or a number is out of its range.
    """

    ranges: dict[str, tuple[float, float]]
    trials: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ConfigurationError(
                "search.optuna.ranges: expected at least one field, got none. Use e.g. {coefficient: [0.0, 1.0]}."
            )
        for name, (low, high) in self.ranges.items():
            low, high = (finite_number(f"search.optuna.ranges of {name}", bound) for bound in (low, high))
            if low >= high:
                raise ConfigurationError(
                    f"search.optuna.ranges of {name}: expected the lower bound first, got [{low:g}, {high:g}]. "
                    "Give a lower and a higher one."
                )
        whole_number("search.optuna.trials", self.trials, minimum=1)
        whole_number("search.optuna.seed", self.seed, minimum=0)


@dataclass(frozen=True)
class CoefficientSearch:
    """A search over one field of a chain, or over several; on validation data, never on the test split.

    Fields are addressed as by :func:`lit_merge.transforms.replace_field`: ``coefficient``, ``LiNeS.beta``,
    ``1.density``, ``ConsensusMask.merge.Trim.density``. The criteria, with accuracies on the same images everywhere:

    - ``normalised``: the mean over the target tasks of accuracy / accuracy of the single fine-tuned model (Ilharco et
      al. 2023);
    - ``absolute``: the mean accuracy on the target tasks;
    - ``target_control``: ``normalised`` and the mean over the control tasks of accuracy / accuracy of the pre-trained
      model, weighted w : 1 with w = ``target_weight`` (one task's LiNeS, Wang et al. 2025, as in their program);
    - ``negation``: the lowest mean accuracy on the target tasks among the points that keep the share
      ``control_share`` of the pre-trained model's mean accuracy on the control tasks (Ilharco et al. 2023, section 3).

    A task can be measured by something else than its accuracy. By ``perplexity``, ``1 / perplexity`` stands for the
    accuracy everywhere: a control keeps the share s where ``perplexity(θ) ≤ perplexity(θ0) / s``, each such control by
    itself, and the target is forgotten where its perplexity is highest. By ``rewards``, it is the mean reward of what
    is written after its prompts (``absolute``, or the target of ``negation`` if it is a probability). The points then
    come with their Pareto front and its hypervolume above the pre-trained model's.

    Among equals the point with the smallest values is taken.

    Args:
        values: the grid; by default the papers' 21 points in [0, 1].
        field: which field.
        criterion: by what is chosen.
        fields: instead of values and field, the grids of several fields at once: every combination is evaluated.
        optuna: instead of a grid, trials that Optuna suggests; it needs ``pip install lit-merge[optuna]``.
        target: tasks that are to be done well, or to be forgotten; by default those of the vectors.
        control: tasks that are not to suffer; by default the others of the data.
        control_share: s, in (0, 1].
        target_weight: w, at least 0.
        precision: that the models are evaluated in; a suite takes that of its tests.
        perplexity: tasks of texts that are measured by a language model's perplexity.
        rewards: task -> the reward of responses to its prompts, by class path, which it is measured by.
        max_new_tokens: most tokens of such a response.

    Raises:
        ConfigurationError: a grid is empty, there is no such criterion, a number is out of its range, or the points
            are given in two ways.
    """

    values: list[float] = field(default_factory=_grid)
    field: str = "coefficient"
    criterion: Criterion = "normalised"
    fields: dict[str, list[float]] | None = None
    optuna: OptunaStudy | None = None
    target: list[str] | None = None
    control: list[str] | None = None
    control_share: float = 0.95
    target_weight: float = 2.0
    precision: Precision = "32-true"
    perplexity: list[str] | None = None
    rewards: dict[str, Reward] | None = None
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        one_field = self.values != _grid() or self.field != "coefficient"
        ways = [name for name in ("fields", "optuna") if getattr(self, name) is not None]
        ways += ["values or field"] if one_field else []
        if len(ways) > 1:
            raise ConfigurationError(
                f"search: expected one of values with field, fields, and optuna, got {' and '.join(ways)}. Remove one."
            )
        if not self.values:
            raise ConfigurationError("search.values: expected at least one value, got none. Use e.g. [0.2, 0.3, 0.4].")
        empty = [name for name, values in (self.fields or {}).items() if not values]
        if empty or self.fields == {}:
            got = f"none for {empty[0]}" if empty else "no field"
            raise ConfigurationError(
                f"search.fields: expected values of at least one field, got {got}. Use e.g. {{density: [0.1, 0.2]}}."
            )
        if self.criterion not in get_args(Criterion):
            raise ConfigurationError(
                f"search.criterion: expected {', '.join(get_args(Criterion)[:-1])} or {get_args(Criterion)[-1]}, got "
                f"{self.criterion!r}. Use one of them."
            )
        if self.precision not in get_args(Precision):
            raise ConfigurationError(
                f"search.precision: expected {', '.join(get_args(Precision)[:-1])} or {get_args(Precision)[-1]}, got "
                f"{self.precision!r}. Use one of them."
            )
        if self.target == []:
            raise ConfigurationError("search.target: expected at least one task, got none. Leave it out, or name one.")
        finite_number("search.target_weight", self.target_weight, minimum=0.0)
        if not finite_number("search.control_share", self.control_share, minimum=0.0, maximum=1.0):
            raise ConfigurationError(
                "search.control_share: expected a share above 0 and at most 1, got 0. Use e.g. 0.95."
            )
        if both := [task for task in self.perplexity or [] if task in (self.rewards or {})]:
            raise ConfigurationError(
                f"search.perplexity and search.rewards: expected a task in one of them, got {both[0]!r} in both."
            )
        if self.rewards and self.criterion not in ("absolute", "negation"):
            raise ConfigurationError(
                f"search.rewards: expected the criterion absolute or negation, as rewards have no ratios, got "
                f"{self.criterion}. Set criterion to absolute."
            )
        self.measures()  # refuses its settings

    def measures(self) -> dict[str, Measure]:
        """Task -> what it is measured by, of the tasks whose accuracy is not meant."""
        generation = Generation(self.max_new_tokens)
        return {
            **{task: TokenProbability() for task in self.perplexity or []},
            **{task: MeanReward(task, reward, generation) for task, reward in (self.rewards or {}).items()},
        }

    def measured(self, task: str) -> str:
        """What a task is measured by: ``accuracy``, ``perplexity`` or ``reward``."""
        return (
            "perplexity"
            if task in (self.perplexity or [])
            else "reward"
            if task in (self.rewards or {})
            else "accuracy"
        )

    @property
    def varied(self) -> list[str]:
        """The addresses of the fields that are varied."""
        return list(self._axes())

    def grid(self, last: str | None = None) -> Iterator[dict[str, float]]:
        """The points of the grid, field -> value, the last field varied fastest; of a study, its corners.

        Args:
            last: a field to vary fastest instead.
        """
        axes = self._axes()
        order = sorted(axes, key=lambda name: name == last)
        for values in itertools.product(*(axes[name] for name in order)):
            point = dict(zip(order, values, strict=True))
            yield {name: point[name] for name in axes}

    def check(self, transform: Transform, vectors: TaskVectors | None = None) -> None:
        """Refuse what cannot be searched over in a transform.

        Args:
            transform: whose fields are varied.
            vectors: what it is applied to, if they are known; no tensor is read for it.

        Raises:
            ConfigurationError: a field is unknown, a value is refused, also by these vectors, or Optuna is needed and
                not installed.
        """
        for point in self.grid():
            changed = with_fields(transform, point)
            if vectors is not None:
                changed(vectors)
        if self.optuna is not None and find_spec("optuna") is None:
            raise ConfigurationError(
                "search.optuna: expected the package optuna, got none installed. Run pip install lit-merge[optuna]."
            )

    def to_config(self) -> dict[str, Any]:
        """The search as plain data, without what is as by default; the grid of one field always."""
        defaults = asdict(CoefficientSearch())
        several = self.fields is not None or self.optuna is not None
        always = {"criterion"} if several else {"values", "field", "criterion"}
        whole = asdict(replace(self, rewards=None))
        given = {name: value for name, value in whole.items() if name in always or value != defaults[name]}
        if self.rewards:
            given["rewards"] = {task: plain_object(reward) for task, reward in self.rewards.items()}
        plain: dict[str, Any] = json.loads(json.dumps(given))
        return plain

    def _axes(self) -> dict[str, list[float]]:
        if self.optuna is not None:
            return {name: list(bounds) for name, bounds in self.optuna.ranges.items()}
        return self.fields if self.fields is not None else {self.field: self.values}


def with_fields(transform: Transform, point: dict[str, float]) -> Transform:
    """The transform with these values of its fields.

    Raises:
        ConfigurationError: a field is unknown, or a value is refused.
    """
    for name, value in point.items():
        transform = replace_field(transform, name, value)
    return transform
