"""Task vectors: one (:class:`TaskVector`), several (:class:`TaskVectors`), on disk, and added to a base model.

:class:`Coefficients` are what they are scaled with, where that was learned. Imports torch and safetensors only.
"""

from lit_merge.files.store import LazyTensors, file_digest, verify, write_tensors
from lit_merge.vectors.coefficients import Coefficients
from lit_merge.vectors.groups import Granularity, group_names
from lit_merge.vectors.merge import check_base, merged_parameters
from lit_merge.vectors.task_vector import TaskVector
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = [
    "Coefficients",
    "Granularity",
    "LazyTensors",
    "TaskVector",
    "TaskVectors",
    "check_base",
    "file_digest",
    "group_names",
    "merged_parameters",
    "verify",
    "write_tensors",
]
