"""Lightning callbacks: task vector extraction, and what evaluation and prediction leave on disk."""

from lit_merge.callbacks.extract import ExtractTaskVector
from lit_merge.callbacks.writing import WriteMetrics, WritePredictions

__all__ = ["ExtractTaskVector", "WriteMetrics", "WritePredictions"]
