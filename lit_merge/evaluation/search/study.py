"""Points that Optuna suggests. The only file that imports it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from lit_merge.evaluation.search.settings import OptunaStudy

__all__ = ["run_study"]


def run_study(study: OptunaStudy, whole: Collection[str], score: Callable[[dict[str, float]], float]) -> None:
    """Call ``score`` with one point after the other, each suggested by what the earlier ones scored.

    Args:
        study: ranges, number of trials and seed.
        whole: the fields that hold whole numbers.
        score: evaluates a point, field -> value; the higher the better.
    """
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        trials = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=study.seed))
        for _ in range(study.trials):
            trial = trials.ask()
            point: dict[str, float] = {}
            for name, (low, high) in study.ranges.items():
                if name in whole:
                    point[name] = trial.suggest_int(name, int(low), int(high))
                else:
                    point[name] = trial.suggest_float(name, low, high)
            trials.tell(trial, score(point))
    finally:
        optuna.logging.set_verbosity(level)
