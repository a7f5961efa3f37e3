"""Collect what Fisher merging, RegMean, the trust region and the Tak penalty need of a task.

Examples:
  lit-merge statistics --kind fisher --task_vector runs/digits/task_vector.safetensors
  lit-merge statistics --kind gram --task_vector runs/digits/task_vector.safetensors --images 1024
  lit-merge statistics --kind kfac --data.task digits --output runs/digits/kfac.safetensors
"""

from lit_merge.evaluation.statistics.command import statistics

__all__ = ["statistics"]
