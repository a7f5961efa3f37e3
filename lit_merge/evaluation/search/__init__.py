"""Searching over the fields of transforms on validation data; every evaluated point is kept."""

from lit_merge.evaluation.accuracies import Evaluation, quiet, silent_trainer, validation_loaders
from lit_merge.evaluation.search.coefficient import direction_of, search_coefficient
from lit_merge.evaluation.search.result import SearchPoint, SearchResult
from lit_merge.evaluation.search.settings import CoefficientSearch, OptunaStudy, Precision
from lit_merge.metrics.scores import negation_score, normalised_accuracy, pareto_front, target_control_score

__all__ = [
    "CoefficientSearch",
    "Evaluation",
    "OptunaStudy",
    "Precision",
    "SearchPoint",
    "SearchResult",
    "direction_of",
    "negation_score",
    "normalised_accuracy",
    "pareto_front",
    "quiet",
    "search_coefficient",
    "silent_trainer",
    "target_control_score",
    "validation_loaders",
]
