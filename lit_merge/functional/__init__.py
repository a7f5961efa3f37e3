"""Pure functions: what the modules compute, without their state."""

from lit_merge.functional.linearize import linearize

__all__ = ["linearize"]
