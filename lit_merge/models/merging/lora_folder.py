"""The folder of a LoRA adapter as one of the outputs of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lit_merge.checkpoints.adapters.additions import model_settings
from lit_merge.checkpoints.adapters.reading import CONFIGURATION
from lit_merge.checkpoints.layouts.views import as_lazy
from lit_merge.errors import ConfigurationError
from lit_merge.files.hub import parse_address
from lit_merge.files.lazy import LazyMapping
from lit_merge.models.merging.companions import Companions
from lit_merge.models.merging.form import Form
from lit_merge.models.merging.inputs import Input
from lit_merge.models.merging.lora_output import ADAPTER_STEM, PlannedLora, plan_lora
from lit_merge.models.merging.output import Output
from lit_merge.models.network import Base

__all__ = ["check_lora", "factored", "lora_form", "planned_lora"]


def check_lora(kind: str, rank: int | None, base: str | None, output: Path, is_file: bool) -> None:
    """Refuse settings of an adapter that do not go together.

    Raises:
        ConfigurationError: there is a rank and no adapter, the output is a file, or the base is a network.
    """
    if kind != "lora":
        raise ConfigurationError(f"rank: expected kind lora, whose factors have one, got kind {kind}. Remove one.")
    if is_file:
        raise ConfigurationError(f"output: expected a folder for an adapter, got the file {output}. Name a folder.")
    if base is None:
        raise ConfigurationError(
            "kind lora: expected base, the weights of the model that peft adapts, got none. Set base, or write weights."
        )
    if rank is not None and rank < 1:
        raise ConfigurationError(f"rank: expected a positive number, got {rank}. Use e.g. 16.")


def lora_form() -> Form:
    """The files of an adapter's folder; the configuration is known when the factors are."""
    return Form(Companions(library="peft", stem=ADAPTER_STEM, files={CONFIGURATION: b"{}\n"}))


def planned_lora(
    base: Base,
    inputs: Sequence[Input],
    merged: LazyMapping,
    rank: int | None,
    dtype: torch.dtype | None,
    base_path: str | None,
) -> PlannedLora:
    """The factors of one merged vector, before anything is read.

    Args:
        base: θ0.
        inputs: what was merged.
        merged: τ.
        rank: of the factors, at most.
        dtype: to store them in; None for that of most of the base's weights.
        base_path: of the base, which peft is told if the inputs do not agree on one.

    Raises:
        LitMergeError: as for :func:`~lit_merge.models.merging.lora_output.plan_lora`.
    """
    parameters = as_lazy(base.parameters)
    plan = plan_lora(parameters, [one.adapter for one in inputs], rank, model_settings(base.files), merged)
    address = parse_address(base_path or "")
    origin = base_path if address is None else address.repository
    plan = replace(plan, settings={"base_model_name_or_path": origin, **plan.settings})
    if dtype is None:
        dtypes = [parameters.dtype(one.name) for one in plan.weights]
        dtype = max(set(dtypes), key=dtypes.count, default=torch.float32)
    return PlannedLora(plan, merged, dtype)


def factored(output: Output) -> Output:
    """An adapter whose factors are computed: with their configuration, and with what they miss in the header."""
    planned = output.tensors
    assert isinstance(planned, PlannedLora)
    written = planned.written
    companions = replace(output.companions, files={CONFIGURATION: written.config_text.encode()})
    return Output.plan(
        output.stem,
        as_lazy(written.tensors),
        {**output.metadata, **written.header, "lora": f"{output.model}: {written.describe()}"},
        None,
        output.place,
        companions,
    )
