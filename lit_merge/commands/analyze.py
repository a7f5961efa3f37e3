"""Measure and draw task vectors, alone and merged.

Examples:
  lit-merge analyze --vectors '[digits.safetensors, signs.safetensors]' --output analysis
  lit-merge analyze --vectors '[a.safetensors, b.safetensors]' --base model.safetensors --output analysis
  lit-merge analyze --config configs/analyze/models.yaml --vectors '[a.safetensors, b.safetensors]' --output analysis
"""

from lit_merge.evaluation.analysis.command import analyze

__all__ = ["analyze"]
