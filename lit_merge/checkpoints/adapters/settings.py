"""What an adapter's configuration says, and which of it changes what the adapter's tensors mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_merge.errors import FileFormatError, first_few
from lit_merge.files.file_parts import printable
from lit_merge.files.text import read_json

__all__ = ["fitting_values", "read_settings"]

_LARGEST = 16 << 20
# What is read below, and what has no bearing on the saved weights: where and how they were trained.
_KNOWN = {
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save"),
    *("peft_type", "r", "rank_pattern", "use_rslora"),
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of initialisations, checked by their name
}
# Initialisations that leave the base as it is.
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")
_QUANTIFIER = re.compile(r"[*+{]")
_LONGEST_PATTERN, _LONGEST_NAME, _MOST_QUANTIFIERS = 200, 500, 3


def read_settings(path: Path) -> dict[str, Any]:
    """The entries of ``adapter_config.json``.

    Raises:
        FileFormatError: there is no such file, it is no configuration of LoRA, an entry is of another type than
            expected, or one changes the weights in a way that is not known here.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise FileFormatError(
                f"{path}: expected a configuration of at most {_LARGEST:,} bytes, got {path.stat().st_size:,}. "
                "Copy the adapter again."
            )
        settings = read_json(path)
    except OSError as error:
        raise FileFormatError(
            f"{path}: expected the configuration of an adapter, got {error.strerror or 'no file'}. Check the path."
        ) from error
    except ValueError as error:
        raise FileFormatError(f"{path}: expected JSON, got something else. Copy the adapter again.") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise FileFormatError(
            f"{path}: expected an adapter with peft_type LORA, got {_shown(kind)}. "
            "Merge it into its base with peft, and use the merged model."
        )
    unknown = [f"{printable(key)} = {_shown(value)}" for key, value in settings.items() if value and key not in _KNOWN]
    initial = settings.get("init_lora_weights", True)
    if not any(initial is plain or (isinstance(plain, str) and initial == plain) for plain in _PLAIN):
        unknown.append(f"init_lora_weights = {_shown(initial)}")
    if unknown:
        raise FileFormatError(
            f"{path}: expected plain LoRA, got {first_few(unknown)}. "
            "Merge the adapter into its base with peft, and use the merged model."
        )
    _check_types(path, settings)
    return settings


def fitting_values(path: Path, settings: Mapping[str, Any], which: str, module: str) -> list[float]:
    """The values of ``rank_pattern`` or ``alpha_pattern`` whose regular expressions fit a module's name or its ending.

    Raises:
        FileFormatError: an expression is malformed, or could take very long.
    """
    values = []
    for pattern, value in (settings.get(which) or {}).items():
        if pattern == module or module.endswith("." + pattern):
            values.append(value)
            continue
        if re.fullmatch(r"[\w.]*", pattern):  # a plain name: there may be one for every module
            continue
        try:
            fits = re.match(rf"(.*\.)?({_harmless(pattern, module)})$", module)
        except (ValueError, re.error, RecursionError, OverflowError) as error:
            raise FileFormatError(
                f"{path}: expected short regular expressions in {which}, got {_shown(pattern)}. "
                "Write the modules' names instead."
            ) from error
        values += [value] if fits else []
    return values


def _harmless(pattern: str, name: str) -> str:
    """The pattern, if matching it takes no time worth mentioning: no repeated group, few repetitions."""
    repeated_group = re.search(r"\)[*+{]", pattern)
    if len(pattern) > _LONGEST_PATTERN or len(name) > _LONGEST_NAME or repeated_group:
        raise ValueError
    if len(_QUANTIFIER.findall(pattern)) > _MOST_QUANTIFIERS:
        raise ValueError
    return pattern


def _check_types(path: Path, settings: Mapping[str, Any]) -> None:
    numbers = {"r": settings.get("r", 8), "lora_alpha": settings.get("lora_alpha", 8)}
    for which in ("rank_pattern", "alpha_pattern"):
        entries = settings.get(which) or {}
        if not isinstance(entries, dict):
            raise FileFormatError(f"{path}: expected {which} to be a mapping, got {_shown(entries)}. Save it again.")
        numbers |= {f"{which}[{_shown(key)}]": value for key, value in entries.items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise FileFormatError(
                f"{path}: expected {key} to be a positive number, got {_shown(value)}. Save it again."
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
