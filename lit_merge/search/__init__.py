"""Searching over the fields of transforms on validation data; every evaluated point is kept."""

from lit_merge.search.coefficient import direction_of, search_coefficient
from lit_merge.search.evaluation import Evaluation, quiet, silent_trainer, validation_loaders
from lit_merge.search.result import SearchPoint, SearchResult
from lit_merge.search.scores import negation_score, normalised_accuracy, pareto_front, target_control_score
from lit_merge.search.settings import CoefficientSearch, OptunaStudy

__all__ = [
    "CoefficientSearch",
    "Evaluation",
    "OptunaStudy",
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
