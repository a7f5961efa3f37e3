"""Show the data sets that can be tasks, and the texts and networks of packages.

Examples:
  lit-merge data list
  lit-merge data list clip8
  lit-merge data list mnist svhn
"""

from lit_merge.data.published.checking import list_data as list_

__all__ = ["list_"]

POSITIONAL = ("names",)
