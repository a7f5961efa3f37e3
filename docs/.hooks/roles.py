"""Docstrings name classes and functions as Sphinx does; in the site only the name is shown."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):\s*<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the role, and of a name with a tilde all but its last part."""
    return _ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)
