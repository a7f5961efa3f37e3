"""Lightning callbacks: task vectors extracted and merged in training, and what evaluation leaves on disk."""

from lit_merge.callbacks.evaluate_merge import EvaluateMerge
from lit_merge.callbacks.extract import ExtractTaskVector
from lit_merge.callbacks.writing import WriteMetrics, WritePredictions

__all__ = ["EvaluateMerge", "ExtractTaskVector", "WriteMetrics", "WritePredictions"]
