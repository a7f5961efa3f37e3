"""Run directories: one per run, never overwritten without being asked, and gone again if nothing came of the run."""

from __future__ import annotations

import contextlib
import os
import shutil
from datetime import datetime
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_merge.errors import ConfigurationError, first_few
from lit_merge.files.text import write_text

__all__ = ["RunDirectory"]

_OUTPUTS = {
    "fit": (
        *("task_vector*.safetensors", "coefficients*", "merged.safetensors", "spearman.json"),
        *("metrics*.csv", "checkpoints"),
    ),
    "validate": ("validate_metrics.json",),
    "test": ("test_metrics.json", "test_hits.safetensors"),
    "predict": ("predictions.csv",),
}
_KEYWORDS = ("hpc", "registry")  # Lightning finds the checkpoint
_OF_SLURM = "hpc_ckpt_*.ckpt"  # written by Lightning when SLURM's time limit ends a job


class RunDirectory:
    """The directory of one run. Only the process of rank zero touches the disk.

    Args:
        command: one of Lightning's commands.
        output: the directory; None for that of the run which is resumed, else ``runs/COMMAND/TIME``.
        overwrite: whether an earlier run of this command in it may be replaced, once this one begins.
        checkpoint: the checkpoint that is given; fit resumes in its directory. ``last`` is the newest
            one in ``output``.

    Attributes:
        path: the directory.
        checkpoint: the checkpoint's path, or what Lightning makes of it.

    Raises:
        ConfigurationError: it holds such a run, has no name or cannot be created; or there is no such checkpoint.
    """

    def __init__(
        self, command: str, output: str | None = None, overwrite: bool = False, checkpoint: str | None = None
    ) -> None:
        if output == "":  # such as a shell's variable that is not set
            raise ConfigurationError("output: expected a folder, got an empty name. Name one, or leave --output out.")
        self.command = command
        self.config = f"{command}.yaml"
        source = _checkpoint_file(checkpoint, output)
        self.checkpoint = checkpoint if source is None else str(source)
        resumable = command == "fit" and source is not None and source.parent.name == "checkpoints"
        if output is None and resumable and source is not None and (source.parents[1] / self.config).exists():
            output = str(source.parents[1])
        self.path = Path(output) if output is not None else Path("runs") / command / _name()
        inside = source is not None and source.resolve().is_relative_to(self.path.resolve())
        left = sorted(self.path.glob(_OF_SLURM), key=lambda file: (len(file.name), file.name))
        if command == "fit" and checkpoint is None and left:  # SLURM started the job again
            self.checkpoint, inside = str(left[-1]), True
        self._resumes = command == "fit" and (inside or (self.checkpoint is not None and source is None))
        self._set_aside: Path | None = None
        self._new: list[Path] = []  # what was not there before, files first
        if _is_first():
            self._claim(overwrite)

    def _claim(self, overwrite: bool) -> None:
        results = self._results()
        if results and not overwrite and not self._resumes:
            newest = _newest(self.path / "checkpoints")
            on = f"go on from it with --ckpt_path {newest}, " if self.command == "fit" and newest.is_file() else ""
            raise ConfigurationError(
                f"output: expected a new run directory, got {self.path}, which holds a run already "
                f"({results[0].name}). Choose another --output, {on}or replace it with --overwrite true."
            )
        if self._resumes:
            said = f"{self.path}: goes on from {self.checkpoint}"
            rank_zero_info(f"{said}; what it writes replaces this run's {first_few(path.name for path in results)}")
        files = [self.path / name for name in (self.config, "metrics.csv", "hparams.yaml")]
        self._new = [path for path in (*files, self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"output: expected a folder that can be created, got {self.path} ({error.strerror}). Choose another."
            ) from error
        metrics = self.path / "metrics.csv"
        if self.command == "fit" and metrics.exists():  # Lightning's logger would begin by deleting it
            earlier = len(list(self.path.glob("metrics-*.csv")))
            self._set_aside = metrics.replace(self.path / f"metrics-{earlier + 1}.csv")

    def begin(self, config: str) -> None:
        """The inputs are there: remove what is to be overwritten, and save the resolved configuration."""
        if not self._resumes and (self.path / self.config).exists():
            for path in self._results():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._set_aside = None
            self._new = [self.path / name for name in (self.config, "metrics.csv", "hparams.yaml")]
        write_text(self.path / self.config, config)

    def replaced_bytes(self) -> int:
        """What :meth:`begin` removes, in bytes."""
        if self._resumes or not (self.path / self.config).exists():
            return 0
        inside = [file for path in self._results() for file in (path, *path.rglob("*"))]
        return sum(file.stat().st_size for file in inside if file.is_file())

    def going_on(self) -> str:
        """How to go on with a run that has ended early; empty if it left no checkpoint."""
        newest = _newest(self.path / "checkpoints")
        return f"to go on, add --ckpt_path {newest}" if self.command == "fit" and newest.is_file() else ""

    def discard(self, begun: bool = False) -> None:
        """The run failed: leave the directory as it was found, unless the run had ``begun`` and left some results."""
        if not _is_first() or (begun and self._results()):
            return
        if self._set_aside is not None:
            self._set_aside.replace(self.path / "metrics.csv")
        with contextlib.suppress(OSError):  # a folder is not empty, so that its parents are not, either
            for path in self._new:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)

    def _results(self) -> list[Path]:
        return [path for pattern in _OUTPUTS[self.command] for path in sorted(self.path.glob(pattern))]


def _is_first() -> bool:
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _name() -> str:
    """The time; processes that Lightning starts for other devices inherit it."""
    variable = "LIT_MERGE_RUN_NAME"
    if _is_first() or variable not in os.environ:
        os.environ[variable] = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return os.environ[variable]


def _checkpoint_file(checkpoint: str | None, output: str | None) -> Path | None:
    """The file, or None if there is none or Lightning is to find it."""
    if checkpoint is None or "://" in checkpoint or checkpoint.partition(":")[0] in _KEYWORDS:
        return None
    path = Path(checkpoint)
    if checkpoint == "last":
        folder = Path(output or ".") / "checkpoints"
        path = _newest(folder)
    if not path.exists():
        raise ConfigurationError(f"ckpt_path: expected a checkpoint, got {path}, which does not exist. Check the path.")
    if path.is_dir():  # without such files it may be a checkpoint in shards
        inside = _newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if inside.is_file():
            raise ConfigurationError(
                f"ckpt_path: expected a checkpoint, got {path}, a folder of them. Name one, e.g. {inside}."
            )
    return path


def _newest(folder: Path) -> Path:
    """The newest checkpoint, or a pattern that is no file if there is none."""
    return max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=folder / "*.ckpt")
