"""What a language model writes: compared with what it should have written, and rewarded."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_merge.errors import ConfigurationError
from lit_merge.files.text import write_text
from lit_merge.metrics.example_mean import ExampleMean
from lit_merge.metrics.rewards import Reward, checked_rewards
from lit_merge.metrics.spearman import Spearman
from lit_merge.models.language.generation import Generation, expected_texts, prompt_texts, prompts
from lit_merge.models.merged import swapped

__all__ = ["GeneratedAnswers"]


class GeneratedAnswers(L.Callback):
    """Lets the model answer in its own words in ``validate`` and ``test``, greedily.

    Logs ``test/{task}/exact_match``, the fraction of answers that are letter by letter the expected ones, and of tasks
    whose answers are all numbers ``test/{task}/spearman``, their rank correlation (STS-B), where what is no number
    counts as 0. With ``rewards`` it also logs ``test/{task}/reward/{name}``, the mean reward of what was written, e.g.
    the toxicity that a classifier finds in it. All settings of the generation are written beside the metrics.

    Args:
        max_new_tokens: most tokens of an answer.
        tasks: which tasks; None for all that predict tokens.
        path: the file with settings and results, relative to the run's directory.
        rewards: name -> reward of prompts and what was written, by class path.

    Raises:
        ConfigurationError: a number is out of its range; in evaluation, the network predicts no tokens.
    """

    def __init__(
        self,
        max_new_tokens: int = 32,
        tasks: list[str] | None = None,
        path: str = "generation.json",
        rewards: dict[str, Reward] | None = None,
    ) -> None:
        self.generation, self.tasks, self.path = Generation(max_new_tokens), tasks, path
        self.rewards = dict(rewards or {})
        self._rewarded: dict[tuple[str, str], ExampleMean] = {}
        self._matches: dict[str, ExampleMean] = {}
        self._numbers: dict[str, Spearman] = {}
        self._unreadable: dict[str, ExampleMean] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse what cannot write."""
        self._begin(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse what cannot write."""
        self._begin(pl_module)

    def _begin(self, pl_module: Any) -> None:
        base = getattr(pl_module, "base", None)
        kind = getattr(getattr(base, "preprocessing", None), "kind", None)
        if kind not in ("encoder_decoder", "causal"):
            raise ConfigurationError(
                f"GeneratedAnswers: expected a network that predicts tokens, got {getattr(base, 'name', base)!r}. "
                "Remove the callback."
            )
        self._matches, self._numbers, self._unreadable, self._rewarded = {}, {}, {}, {}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write answers to a batch."""
        self._answer(pl_module, batch, dataloader_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write answers to a batch."""
        self._answer(pl_module, batch, dataloader_idx)

    def _answer(self, pl_module: Any, batch: Any, dataloader_idx: int) -> None:
        task = pl_module.tasks[dataloader_idx] if hasattr(pl_module, "tasks") else pl_module.task
        if self.tasks is not None and task not in self.tasks:
            return
        tokenization = pl_module.base.preprocessing
        held = getattr(pl_module, "_held", None)
        given = prompts(batch, tokenization)
        if pl_module.linearized:  # transformers' own way knows nothing of tangents
            written = self.generation.of_function(pl_module, tokenization, given)
        else:
            with swapped(pl_module.network, held) if held is not None else nullcontext():
                written = self.generation(pl_module.network, tokenization, given)
        for name, reward in self.rewards.items():
            values = checked_rewards(name, reward, prompt_texts(given, tokenization), written).to(pl_module.device)
            mean = self._rewarded.setdefault((task, name), ExampleMean().to(pl_module.device))
            mean.update(values, batch.indices >= 0)
        pairs = [
            (got, expected)
            for got, expected, index in zip(
                written, expected_texts(batch, tokenization), batch.indices.tolist(), strict=True
            )
            if expected is not None and index >= 0
        ]
        right = torch.tensor([float(got == expected) for got, expected in pairs], device=pl_module.device)
        self._matches.setdefault(task, ExampleMean().to(pl_module.device)).update(right, torch.ones_like(right))
        numbers = torch.tensor(
            [[_number(got), _number(expected)] for got, expected in pairs], device=pl_module.device
        ).view(-1, 2)
        unreadable = numbers.isnan().float()
        self._unreadable.setdefault(task, ExampleMean().to(pl_module.device)).update(
            unreadable[:, 1], torch.ones_like(right)
        )
        self._numbers.setdefault(task, Spearman().to(pl_module.device)).update(*numbers.nan_to_num(0.0).T)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the results."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the results, and write them with the settings."""
        found = self._log(pl_module, "test")
        if trainer.is_global_zero:
            rewards = {"rewards": {name: repr(reward) for name, reward in self.rewards.items()}} if self.rewards else {}
            settings = self.generation.settings(pl_module.base.preprocessing)
            content = {"settings": settings, **rewards, "results": found}
            write_text(Path(trainer.default_root_dir) / self.path, json.dumps(content, indent=2) + "\n")

    def _log(self, pl_module: Any, split: str) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for task, metric in self._matches.items():
            found[task] = {"exact_match": float(metric.compute())}
            numbers = self._numbers[task].compute()
            if float(self._unreadable[task].compute()) == 0:
                found[task]["spearman"] = float(numbers)
            own = {name: mean for (one, name), mean in self._rewarded.items() if one == task}
            found[task] |= {f"reward/{name}": float(mean.compute()) for name, mean in own.items()}
            for name, value in found[task].items():
                whose = f"{split}/{task}/{name}" if hasattr(pl_module, "tasks") else f"{split}/{name}"
                pl_module.log(whose, value, rank_zero_only=False)
        return found


def _number(text: str) -> float:
    """The number that a text is; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
