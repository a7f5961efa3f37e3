"""Task vectors: one (:class:`TaskVector`), several (:class:`TaskVectors`), on disk, and added to a base model.

Imports torch and safetensors only.
"""

from lit_merge.vectors.merge import check_base, merged_parameters
from lit_merge.vectors.store import LazyTensors, file_digest, verify, write_tensors
from lit_merge.vectors.task_vector import TaskVector
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = [
    "LazyTensors",
    "TaskVector",
    "TaskVectors",
    "check_base",
    "file_digest",
    "merged_parameters",
    "verify",
    "write_tensors",
]
