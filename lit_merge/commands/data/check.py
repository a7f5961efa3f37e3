"""Say which data sets are on the disk, and whether they are complete.

Examples:
  lit-merge data check
  lit-merge data check clip8 --root /data
  lit-merge data check mnist --json true
"""

from lit_merge.data.published.checking import check

__all__ = ["check"]

POSITIONAL = ("names",)
