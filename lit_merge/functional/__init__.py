"""Pure functions: what the modules compute, without their state."""

from lit_merge.functional.combine import Directions, combine
from lit_merge.functional.entropy import shannon_entropy
from lit_merge.functional.linearize import linearize

__all__ = ["Directions", "combine", "linearize", "shannon_entropy"]
