"""Write a suite's results as one HTML page.

Examples:
  lit-merge report --results runs/suite
  lit-merge report --results runs/suite/results.json --output page.html
  lit-merge report --results runs/suite --figures '[analysis/cosine.svg]'
"""

from lit_merge.report.page import report

__all__ = ["report"]
