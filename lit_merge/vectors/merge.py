"""The merged parameters θ0 + τ, streamed name by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from lit_merge.checkpoints.activation import check_activation
from lit_merge.errors import NonFiniteError, StructureMismatchError, first_few
from lit_merge.params import add_scaled, check_same_structure, check_variance, dtype_of, is_finite
from lit_merge.vectors.task_vector import TaskVector
from lit_merge.vectors.task_vectors import TaskVectors

__all__ = ["check_base", "merged_parameters"]


def merged_parameters(base: Mapping[str, Tensor], vectors: TaskVectors | TaskVector) -> Iterator[tuple[str, Tensor]]:
    """θ = θ0 + τ, one parameter at a time, in the order, dtypes and devices of the base.

    Everything that can be checked without reading is checked before the first parameter is computed. The sum is done
    in float32 or better and rounded once. ``dict(merged_parameters(base, vectors))`` gives the whole model.

    Args:
        base: θ0, name -> tensor; entries that the vector does not have pass through unchanged.
        vectors: T = 1 vectors, e.g. the result of a recipe, or one task vector.

    Returns:
        An iterator over (name, merged tensor).

    Raises:
        ConfigurationError: there are several vectors.
        StructureMismatchError: the vector has names that the base lacks, or shapes or kinds of dtype differ.
        NonFiniteError: a merged value is NaN or infinite (when that parameter is reached).
    """
    vector = vectors.single() if isinstance(vectors, TaskVectors) else vectors
    advice = "Use the base model that was fine-tuned."
    check_same_structure(base, vector, "merged parameters", "parameters of the base model", advice, required=())
    integers = [f"{name} ({dtype_of(base, name)})" for name in vector if not dtype_of(base, name).is_floating_point]
    if integers:
        raise StructureMismatchError(
            f"merged parameters: expected a floating-point base, got {first_few(integers)}. Convert the base model."
        )
    return _merged(base, vector)


def check_base(
    vectors: TaskVectors | TaskVector, base_fingerprint: str, base_name: str = "", activation: str = ""
) -> None:
    """Refuse task vectors that are known to start from another base model.

    Args:
        vectors: the task vectors; they pass if they do not know their base.
        base_fingerprint: :func:`lit_merge.params.fingerprint` of the base's parameters; empty if unknown.
        base_name: how the message calls the base.
        activation: the activation function that the base computes, which no parameter shows; empty if unknown.

    Raises:
        StructureMismatchError: both fingerprints, or both activation functions, are known and differ.
    """
    known, tasks = vectors.metadata, first_few(vectors.tasks) if isinstance(vectors, TaskVectors) else vectors.task
    made_from = known.get("base_model", "")
    what = f"task vectors ({tasks})"
    check_activation(activation, known.get("activation", ""), what, base_name, made_from)
    if vectors.base_fingerprint and base_fingerprint and vectors.base_fingerprint != base_fingerprint:
        raise StructureMismatchError(
            f"{what}: expected the base model {made_from or 'they were fine-tuned from'} "
            f"(fingerprint {vectors.base_fingerprint}), got {base_name or 'one'} (fingerprint {base_fingerprint}). "
            "Use the pre-trained parameters that the vectors start from."
        )


def _merged(base: Mapping[str, Tensor], vector: TaskVector) -> Iterator[tuple[str, Tensor]]:
    for name in base:
        if name not in vector:
            yield name, base[name]
            continue
        merged = check_variance(name, add_scaled(base[name].detach(), vector[name]))
        if not is_finite(merged):
            raise NonFiniteError(
                f"merged parameters: expected finite values, got NaN or infinity in {name}. "
                "Use a smaller coefficient, or remove the damaged input."
            )
        yield name, merged
