"""The configuration that a command runs with, for what a command writes with its output."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["RESOLVED"]

RESOLVED: ContextVar[str] = ContextVar("resolved configuration", default="")
"""As YAML, with all defaults; empty where a command's function is called from Python."""
