"""``python -m lit_merge`` is the ``lit-merge`` command."""

import sys

from lit_merge.commands.main import process

if __name__ == "__main__":
    sys.exit(process())
