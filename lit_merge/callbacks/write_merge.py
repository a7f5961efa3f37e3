"""What a learned merge leaves behind: its coefficients, and the merged weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lit_merge._version import __version__
from lit_merge.callbacks.steps import EverySteps
from lit_merge.errors import ConfigurationError
from lit_merge.files.store import write_tensors
from lit_merge.models.merging.output import MergedWeights
from lit_merge.models.network import Base
from lit_merge.models.task_output import output_name
from lit_merge.transforms import LearnedScale, Sum, chain
from lit_merge.transforms.base import whole_number

__all__ = ["LEARNED", "WriteMerge"]

LEARNED = ("objective", "learned_on", "fraction", "examples", "step")
"""What a learned merge says about how it was learned, in the headers of its files."""


class WriteMerge(EverySteps):
    """Writes the coefficients and the merged weights when fit ends, and coefficients on the way if asked to.

    ``coefficients.safetensors`` can be merged with again (``recipe: adamerging`` of ``lit-merge merge``) and started
    from (``init``); ``coefficients.json`` holds the same to be read; ``merged.safetensors`` is the whole model, of a
    CLIP one that open_clip loads, computed from the coefficients exactly as ``lit-merge merge`` does. Rank zero writes,
    each file atomically; the others wait.

    Args:
        weights: whether to write the merged weights.
        every_n_steps: also write ``coefficients-step=<n>.safetensors`` every so many steps.

    Raises:
        ConfigurationError: ``every_n_steps`` is not positive; in fit, the module learns no coefficients.
    """

    def __init__(self, weights: bool = True, every_n_steps: int | None = None) -> None:
        whole_number("every_n_steps", every_n_steps, minimum=1, optional=True)
        self.weights, self.every_n_steps = weights, every_n_steps
        self.began = False  # with the final files

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a module without coefficients before it has been trained."""
        if not hasattr(pl_module, "merged") or not hasattr(pl_module, "describe"):
            raise ConfigurationError(
                f"WriteMerge: expected a module with merging coefficients, such as MergeModule, got "
                f"{type(pl_module).__name__}. Remove the callback."
            )

    def _at_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            suffix = f"-step={trainer.global_step}"
            self._write_coefficients(trainer, pl_module, Path(trainer.default_root_dir), suffix)
        trainer.strategy.barrier("coefficients written")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write everything."""
        self.began = True
        if trainer.is_global_zero:
            self.write(trainer, pl_module)
        trainer.strategy.barrier("merge written")

    def write(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the coefficients and the merge as they are now, from this process alone."""
        folder = Path(trainer.default_root_dir)
        path = self._write_coefficients(trainer, pl_module, folder, "")
        written = [path.name]
        if self.weights:
            self._write_weights(pl_module, path, folder / "merged.safetensors")
            written.append("merged.safetensors")
        written += self._write_outputs(pl_module, folder)
        rank_zero_info(f"Learned merge of {pl_module.task}: {' and '.join(written)} in {folder}")

    def _write_coefficients(self, trainer: L.Trainer, pl_module: Any, folder: Path, suffix: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"lit_merge": __version__, "lightning": L.__version__}
        found = pl_module.merged.to_coefficients({**pl_module.describe(), "versions": json.dumps(versions)})
        path = folder / f"coefficients{suffix}.safetensors"
        found.save(path)
        if not suffix:
            found.save(path.with_suffix(".json"))
        return path

    def _write_outputs(self, pl_module: Any, folder: Path) -> list[str]:
        described = pl_module.describe()
        entries = {name: described[name] for name in (*LEARNED, "base_fingerprint", "base_model") if name in described}
        names = []
        for task in getattr(pl_module, "tasks", ()) if getattr(pl_module, "outputs", None) else ():
            if (output := pl_module.output_of(task)) is not None:
                names.append(output_name(task))
                output.save(folder / names[-1], {**entries, "task": task})
        return names

    def _write_weights(self, pl_module: Any, coefficients: Path, path: Path) -> None:
        base: Base = pl_module.base
        vectors = chain(LearnedScale(str(coefficients)), Sum())(pl_module.merged.task_vectors)
        described = pl_module.describe()
        metadata = {
            "format": "lit-merge/weights/1",
            "base_model": base.name,
            "base_fingerprint": base.fingerprint,
            "inputs": json.dumps(list(vectors.provenance)),
            "lit_merge": __version__,
            **{name: described[name] for name in LEARNED if name in described},
            **({"linearized": "true"} if pl_module.linearized else {}),
        }
        write_tensors(path, MergedWeights(base, vectors, None), metadata)
