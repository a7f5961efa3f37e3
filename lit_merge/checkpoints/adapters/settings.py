"""What an adapter's configuration says, and which of it changes what the adapter's tensors mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_merge.errors import FileFormatError, first_few
from lit_merge.files.file_parts import printable
from lit_merge.files.text import read_json

__all__ = ["KINDS", "Settings", "read_settings"]

_LARGEST = 16 << 20
# What has no bearing on the saved weights of any kind: where and how they were trained.
_COMMON = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision", "target_modules", "task_type"),
}
_LORA = {
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "r", "rank_pattern"),
    *("ensure_weight_tying", "trainable_token_indices", "use_dora", "use_rslora", "kasa_config"),
    *("lora_dropout", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of initialisations, checked by their name
    "velora_config",  # of the backward pass
}
_ADALORA = {"beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"}
_LYCORIS = {
    *("alpha", "alpha_pattern", "init_weights", "module_dropout", "r", "rank_dropout", "rank_pattern"),
    *("use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale"),
}
KINDS = {
    "LORA": _LORA,
    "ADALORA": (_LORA | _ADALORA) - {"use_dora", "kasa_config", "lora_bias", "trainable_token_indices"},
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS,
    "IA3": {"fan_in_fan_out", "feedforward_modules", "init_ia3_weights"},
    "TRAINABLE_TOKENS": {"init_weights", "token_indices"},
}
"""The kinds of adapters that are read, and the entries of their configurations that are understood."""

# Kinds that add inputs, layers or choices instead of changing weights: nobody can merge them.
_NO_CHANGE = {
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "XLORA"),
}
# Initialisations that leave the base as it is.
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_QUANTIFIER = re.compile(r"[*+{]")
_LONGEST_PATTERN, _LONGEST_NAME, _MOST_QUANTIFIERS = 200, 500, 3
_PLAIN_NAME = re.compile(r"[\w.]*")


class Settings(dict[str, Any]):
    """The entries of ``adapter_config.json``, and what they say of one module.

    Args:
        path: of the file.
        entries: its content.
    """

    def __init__(self, path: Path, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self.path = path

    @property
    def kind(self) -> str:
        """The entry ``peft_type``, one of :data:`KINDS`."""
        return str(self["peft_type"])

    def fitting(self, which: str, module: str) -> list[float]:
        """The values of ``rank_pattern`` or ``alpha_pattern`` that fit a module's name, in the file's order.

        peft takes the first key that fits the name or what follows one of its dots, as a regular expression
        (``peft.utils.other.get_pattern_key``).

        Raises:
            FileFormatError: an expression is malformed, or could take very long.
        """
        entries = self.get(which) or {}
        return [value for pattern, value in entries.items() if self._fits(which, str(pattern), module)]

    def value(self, which: str, default: str, otherwise: float, module: str) -> float:
        """What holds for a module: the first fitting entry of a pattern, or the one for all.

        Args:
            which: ``rank_pattern`` or ``alpha_pattern``.
            default: name of the entry for all other modules.
            otherwise: what holds where there is no such entry.
            module: the module's name.
        """
        fitting = self.fitting(which, module)
        return float(fitting[0] if fitting else self.get(default, otherwise))

    def _fits(self, which: str, pattern: str, module: str) -> bool:
        if _is_plain(pattern):  # there may be one for every module: a dot stands for any character
            start = len(module) - len(pattern)
            if start and (start < 0 or module[start - 1] != "."):
                return False
            end = module[start:]
            return end == pattern or all(wanted in (".", got) for wanted, got in zip(pattern, end, strict=True))
        try:
            return re.match(rf"(.*\.)?({_harmless(pattern, module)})$", module) is not None
        except (ValueError, re.error, RecursionError, OverflowError) as error:
            raise FileFormatError(
                f"{self.path.parent}: expected short regular expressions in {which}, got {_shown(pattern)}. "
                "Write the modules' names instead."
            ) from error


def read_settings(path: Path) -> Settings:
    """The entries of ``adapter_config.json``.

    Raises:
        FileFormatError: there is no such file, it is none of a kind that is read here, an entry is of another type than
            expected, or one changes the weights in a way that is not known here.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise FileFormatError(
                f"{path}: expected a configuration of at most {_LARGEST:,} bytes, got {path.stat().st_size:,}. "
                "Copy the adapter again."
            )
        content = read_json(path)
    except OSError as error:
        raise FileFormatError(
            f"{path}: expected the configuration of an adapter, got {error.strerror or 'no file'}. Check the path."
        ) from error
    except ValueError as error:
        raise FileFormatError(f"{path}: expected JSON, got something else. Copy the adapter again.") from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        advice = (
            "It adds to the input or chooses by it, and changes no weights that could be merged."
            if isinstance(kind, str) and kind in _NO_CHANGE
            else "Merge it into its base with peft, and use the merged model."
        )
        raise FileFormatError(
            f"{path}: expected an adapter with peft_type {', '.join(KINDS)}, got {_shown(kind)}. {advice}"
        )
    settings = Settings(path, content)
    _check_known(settings)
    _check_types(settings)
    return settings


def _check_known(settings: Settings) -> None:
    initial = settings.get("init_lora_weights", True)
    moved = isinstance(initial, str) and initial.lower().startswith(_MOVED)
    if moved:
        raise FileFormatError(
            f"{settings.path}: expected factors beside the unchanged base, got init_lora_weights = {_shown(initial)}, "
            "which takes a part of the base into the factors. Save it with path_initial_model_for_weight_conversion, "
            "which makes plain LoRA of it, or merge it with peft, and use the merged model."
        )
    known = KINDS[settings.kind] | _COMMON
    unknown = [f"{printable(key)} = {_shown(value)}" for key, value in settings.items() if value and key not in known]
    if not any(initial is plain or (isinstance(plain, str) and initial == plain) for plain in _PLAIN):
        unknown.append(f"init_lora_weights = {_shown(initial)}")
    if unknown:
        plain = "LoRA" if settings.kind == "LORA" else settings.kind
        raise FileFormatError(
            f"{settings.path}: expected plain {plain}, got {first_few(unknown)}. "
            "Merge the adapter into its base with peft, and use the merged model."
        )


@lru_cache(maxsize=4096)
def _is_plain(pattern: str) -> bool:
    return _PLAIN_NAME.fullmatch(pattern) is not None


def _harmless(pattern: str, name: str) -> str:
    """The pattern, if matching it takes no time worth mentioning: no repeated group, few repetitions."""
    repeated_group = re.search(r"\)[*+{]", pattern)
    if len(pattern) > _LONGEST_PATTERN or len(name) > _LONGEST_NAME or repeated_group:
        raise ValueError
    if len(_QUANTIFIER.findall(pattern)) > _MOST_QUANTIFIERS:
        raise ValueError
    return pattern


def _check_types(settings: Settings) -> None:
    path = settings.path
    numbers = {key: settings.get(key, 8) for key in ("r", "lora_alpha", "alpha", "init_r")}
    for which in ("rank_pattern", "alpha_pattern"):
        entries = settings.get(which) or {}
        if not isinstance(entries, dict):
            raise FileFormatError(f"{path}: expected {which} to be a mapping, got {_shown(entries)}. Save it again.")
        if settings.kind != "ADALORA":  # whose ranks are lists of what was kept
            numbers |= {f"{which}[{_shown(key)}]": value for key, value in entries.items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise FileFormatError(
                f"{path}: expected {key} to be a positive number, got {_shown(value)}. Save it again."
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
