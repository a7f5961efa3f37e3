"""A suite's ways to merge: by a chain of transforms, with statistics of a little data, or with learned coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.evaluation.calibration import Calibration
from lit_merge.evaluation.search import CoefficientSearch
from lit_merge.transforms import Transform
from lit_merge.transforms.parts import from_parts, resolve_transform

__all__ = ["STATISTICS", "Recipe", "named_files"]

STATISTICS = {"fisher": "fisher", "regmean": "gram"}
"""Recipe -> the kind of statistics that it needs of every task."""

_OF_STATISTICS = ("split", "images", "labels", "convolutions", "seed")
_FILLED_IN = ("vectors", "model", "pretrained", "network", "linearized")


@dataclass(frozen=True)
class Recipe:
    """A way to merge.

    Strings in settings, parts, overrides and learned may hold ``{seed}``, which becomes the fine-tuning seed. A file of
    coefficients that they name may be one that the suite itself writes, such as
    ``runs/suite/seed-{seed}/merge/adamerging/coefficients.safetensors``: it is read when it is there.

    Args:
        recipe: name of a method of :data:`lit_merge.transforms.RECIPES`. For fisher and regmean the suite collects the
            statistics.
        settings: its arguments.
        transform: instead, any transform by class path, or a Chain of them.
        parts: instead, a list of names of transforms and recipes, each with its fields if it needs any.
        overrides: other parts for some of the parameters.
        search: what is varied, and chosen on validation data.
        statistics: of fisher and regmean, how they are collected: images, split, labels, convolutions, seed.
        calibrate: FeatCal or RegMeanPlusPlus: what the merged blocks are solved for again by, on unlabelled inputs.
        learned: instead of all of these, coefficients are learned: arguments of
            :class:`~lit_merge.modules.MergeModule`, e.g. {granularity: tensor}.
        data: of learned, arguments of :class:`~lit_merge.data.MergeDataModule`, e.g. {adapt_on: test}.
        trainer: of learned, e.g. {max_steps: 500}.
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    transform: Transform | None = None
    parts: list[str | dict[str, Any]] | None = None
    overrides: list[dict[str, Any]] | None = None
    search: CoefficientSearch | None = None
    calibrate: Calibration | None = None
    # Not dict[str, Any], in which the parser would build the classes that are named.
    statistics: dict | None = None
    learned: dict | None = None
    data: dict | None = None
    trainer: dict | None = None

    @property
    def has_outputs(self) -> bool:
        """Whether it leaves something for every task behind the encoder, beside the merged weights."""
        return bool({"heads", "surgery"} & set((self.learned or {}).get("learn") or ()))

    @property
    def collected(self) -> str | None:
        """The kind of statistics that the suite collects for it, if any."""
        return None if "statistics" in self.settings else STATISTICS.get(self.recipe or "")

    def check(self, directory: Path | None = None, seed: int = 0) -> Transform | None:
        """Refuse what no merge could be made of.

        Args:
            directory: of the suite; a recipe that names a file in it is looked at when that is there.
            seed: of the fine-tuning, for files that are named by it.

        Returns:
            The transform, before the coefficients if these are learned; None if it needs a file that is not there yet,
            or there is none.

        Raises:
            ConfigurationError: the recipe, a setting or the searched field is unknown, or a value is refused.
        """
        given = self.of_seed(seed)
        later = directory is not None and any(_is_below(path, directory) for path in self.files(seed))
        if self.learned is not None:
            self._check_learned()
            return from_parts(given["learned"]["parts"]) if self.learned.get("parts") and not later else None
        if without := [name for name in ("data", "trainer") if getattr(self, name) is not None]:
            raise ConfigurationError(
                f"{without[0]}: expected only with learned, got it without. Add learned: {{granularity: tensor}}, or "
                f"remove {without[0]}."
            )
        if self.statistics is not None:
            self._check_statistics()
        if later:
            return None
        files = {"statistics": {"a task": "a file"}} if self.collected else {}
        settings = {**(given["settings"] or {}), **files} or None
        transform = resolve_transform(self.recipe, settings, self.transform, given["parts"], given["overrides"])
        if self.search:
            self.search.check(transform)
        return None if self.collected else transform

    def _check_learned(self) -> None:
        given = ("recipe", "settings", "transform", "parts", "overrides", "search", "calibrate", "statistics")
        if others := [name for name in given if getattr(self, name)]:
            raise ConfigurationError(
                f"learned: expected no {others[0]} together with it, got one. Put parts and transform inside learned."
            )
        assert self.learned is not None
        if wrong := [name for name in _FILLED_IN if name in self.learned]:
            raise ConfigurationError(
                f"learned: expected no {wrong[0]}, which the suite fills in, got {self.learned[wrong[0]]!r}. Remove it."
            )

    def _check_statistics(self) -> None:
        if not self.collected:
            raise ConfigurationError(
                f"statistics: expected only with recipe {' or '.join(STATISTICS)}, whose settings name no files, got "
                f"it with {self.recipe or 'no recipe'}. Remove it."
            )
        if unknown := [name for name in self.statistics or {} if name not in _OF_STATISTICS]:
            raise ConfigurationError(
                f"statistics: expected settings among {', '.join(_OF_STATISTICS)}, got {first_few(unknown)}. Remove it."
            )

    def files(self, seed: int = 0) -> list[Path]:
        """The files of coefficients or statistics that settings, parts, overrides and learned name."""
        return named_files(self.of_seed(seed))

    def of_seed(self, seed: int) -> dict[str, Any]:
        """Settings, parts, overrides and learned of one fine-tuning seed."""
        given = {"settings": self.settings or None, "parts": self.parts, "overrides": self.overrides}
        given |= {"learned": self.learned}
        filled: dict[str, Any] = _mapped(given, lambda text: text.replace("{seed}", str(seed)))
        return filled

    def description(self) -> dict[str, Any]:
        """The recipe as plain data."""
        optional = ("parts", "overrides", "statistics", "learned", "data", "trainer")
        given = {name: getattr(self, name) for name in optional if getattr(self, name)}
        if self.learned is not None:
            return {**given, "learned": self.learned}
        return {
            "recipe": self.recipe,
            "settings": self.settings,
            "transform": self.transform.to_config() if self.transform else None,
            **given,
            "search": self.search.to_config() if self.search else None,
            **({"calibrate": self.calibrate.to_config()} if self.calibrate else {}),
        }


def named_files(config: Any) -> list[Path]:
    """The files of tensors or JSON that strings in a configuration name."""
    named = _strings(config)
    return [Path(one) for one in named if one.endswith((".safetensors", ".json")) and "://" not in one]


def _is_below(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, function) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, function) for inner in value]
    return function(value) if isinstance(value, str) else value
