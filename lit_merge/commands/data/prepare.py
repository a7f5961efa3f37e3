"""Download published data sets, through torchvision or from the Hugging Face Hub.

Examples:
  lit-merge data prepare mnist
  lit-merge data prepare clip8 --root /data
  lit-merge data prepare eurosat --source hub
"""

from lit_merge.data.published.preparation import prepare

__all__ = ["prepare"]

POSITIONAL = ("names",)
