"""Lightning callbacks: what is extracted, merged and measured in training, and what evaluation leaves on disk."""

from lit_merge.callbacks.entropy_correlation import EntropyLossCorrelation
from lit_merge.callbacks.evaluate_merge import EvaluateMerge
from lit_merge.callbacks.extract import ExtractTaskVector
from lit_merge.callbacks.generated_answers import GeneratedAnswers
from lit_merge.callbacks.log_coefficients import LogCoefficients
from lit_merge.callbacks.write_merge import WriteMerge
from lit_merge.callbacks.writing import WriteHits, WriteMetrics, WritePredictions

__all__ = [
    "EntropyLossCorrelation",
    "EvaluateMerge",
    "ExtractTaskVector",
    "GeneratedAnswers",
    "LogCoefficients",
    "WriteHits",
    "WriteMerge",
    "WriteMetrics",
    "WritePredictions",
]
