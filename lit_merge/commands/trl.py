"""Fine-tune a causal language model with trl, on texts or by rewards: a LoRA adapter to be merged.

Examples:
  lit-merge trl --config configs/trl/llama2_sft.yaml --output runs/sft
  lit-merge trl --config configs/trl/llama2_helpful.yaml --output runs/helpful
  lit-merge trl --config configs/trl/llama2_faithful.yaml --output runs/faithful

The two adapters make a rewarded soup (configs/merge/rewarded_soup_llama2.yaml). Needs the extras text and rl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lit_merge.data.sources import Task
from lit_merge.metrics.rewards import Reward
from lit_merge.models.lora import LoRA
from lit_merge.models.network import Network
from lit_merge.modules.rewarded import RewardedRun, train_adapter

__all__ = ["TrainedAdapter", "trl"]


@dataclass(frozen=True)
class TrainedAdapter:
    """What ``lit-merge trl`` wrote.

    Attributes:
        output: the adapter's folder.
        record: settings, versions and trl's log, as in its ``training.json``.
    """

    output: str
    record: dict[str, Any]

    def describe(self) -> str:
        """The run in a line, with the mean rewards of the first and the last step."""
        steps = [one for one in self.record["log"] if "reward" in one or "loss" in one]
        measured = [f"{steps[at][key]:.4g}" for key in ("reward", "loss") for at in (0, -1) if key in steps[at]][:2]
        name = "reward" if steps and "reward" in steps[0] else "loss"
        return f"{self.record['method']}, {name} {' -> '.join(measured) or 'not logged'} -> {self.output}"


def trl(
    network: Network,
    source: Task,
    output: str,
    method: Literal["sft", "grpo"] = "grpo",
    rewards: dict[str, Reward] | None = None,
    lora: LoRA | None = None,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> TrainedAdapter:
    """Fine-tune a causal language model with trl, and write its LoRA adapter.

    Args:
        network: the base, a CausalNetwork by class path.
        source: a TextTask by class path: texts and, for sft, their targets; its training split is read.
        output: the adapter's folder, which merge, import and peft open; settings and log are written into it.
        method: sft for supervised fine-tuning; grpo for group relative policy optimisation of the rewards.
        rewards: of grpo, name -> reward by class path, e.g. lit_merge.metrics.ClassifierReward; they are added up,
            with settings.reward_weights if there are any.
        lora: rank, alpha, dropout and which weights; by default rank 16 on attention.
        settings: arguments of trl's SFTConfig or GRPOConfig, e.g. {max_steps: 100, learning_rate: 1.0e-4}.
        seed: of everything that is drawn.
        overwrite: replace an existing output.

    Raises:
        LitMergeError: a package is missing, a setting is refused, or the texts cannot be read.
    """
    run = RewardedRun(method, rewards or {}, lora or LoRA(), settings or {}, seed)
    return TrainedAdapter(output, train_adapter(network, source, run, output, overwrite))
