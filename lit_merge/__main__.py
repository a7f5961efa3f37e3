"""``python -m lit_merge`` is the ``lit-merge`` command."""

import sys

from lit_merge.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
