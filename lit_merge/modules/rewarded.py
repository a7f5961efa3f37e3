"""Fine-tuning of language models by ``trl``, on texts or by rewards of what they write: LoRA adapters to be merged.

The only file that imports trl. What comes out is an adapter's folder of peft, which is a vector like any other: it is
merged as it is, and ``lit-merge import`` writes it as a dense task vector.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from lit_merge._version import __version__
from lit_merge.data.sources import Task
from lit_merge.data.text.examples import TextExamples
from lit_merge.errors import ConfigurationError, DataError, first_few, one_line
from lit_merge.files.staging import staged
from lit_merge.files.text import write_text
from lit_merge.metrics.rewards import Reward, checked_rewards
from lit_merge.models.language.generation import prompt_texts
from lit_merge.models.language.modules import CausalModule
from lit_merge.models.lora import LoRA
from lit_merge.models.network import Network
from lit_merge.models.selection import Attention

__all__ = ["RewardedRun", "train_adapter"]

_RECORD = "training.json"
Method = Literal["sft", "grpo"]


@dataclass(frozen=True)
class RewardedRun:
    """What was trained, and how.

    Attributes:
        method: ``sft`` or ``grpo``.
        rewards: name -> reward; their sum is what ``grpo`` maximises.
        lora: rank, scale and which weights.
        settings: arguments of trl's ``SFTConfig`` or ``GRPOConfig``.
        seed: of everything that is drawn.
    """

    method: Method = "grpo"
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    lora: LoRA = field(default_factory=LoRA)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("sft", "grpo"):
            raise ConfigurationError(f"method: expected sft or grpo, got {self.method!r}.")
        if bool(self.rewards) != (self.method == "grpo"):
            got = "none" if not self.rewards else f"{first_few(self.rewards)} with {self.method}"
            raise ConfigurationError(f"rewards: expected at least one with method grpo, and none with sft, got {got}.")
        taken = sorted({"output_dir", "seed", "report_to", "save_strategy"} & set(self.settings))
        if taken:
            raise ConfigurationError(f"settings: expected none that are set here, got {first_few(taken)}. Remove them.")


def train_adapter(
    network: Network, task: Task, run: RewardedRun, output: str | Path, overwrite: bool = False
) -> dict[str, Any]:
    """Train a LoRA adapter and write its folder.

    ``sft`` minimises the cross-entropy of the targets (of whole texts, without targets). ``grpo`` maximises the sum of
    the rewards by group relative policy optimisation (Shao et al. 2024, equation 3): for every prompt several responses
    are drawn, and the advantage of each is its reward less the group's mean, over its standard deviation. The network
    is as it was afterwards.

    Args:
        network: a causal language model, θ0.
        task: texts; the training split is read.
        run: the settings.
        output: the adapter's folder; the log is written into it as ``training.json``.
        overwrite: replace an adapter that is there.

    Returns:
        The content of ``training.json``.

    Raises:
        ConfigurationError: a package is missing, the network is no causal language model, or trl refuses a setting.
        DataError: the task has no texts to train on.
        NonFiniteError: a reward is no finite number.
        WriteError: the disk is full or not writable.
    """
    for package in ("trl", "peft", "datasets"):
        if find_spec(package) is None:
            raise ConfigurationError(
                f"trl: expected the package {package}, got none. Install it: pip install 'lit-merge[text,rl]'."
            )
    if not isinstance(network.module, CausalModule):
        raise ConfigurationError(f"network: expected a causal language model, got {network.name!r}. Use CausalNetwork.")
    target = Path(output)
    if target.exists() and not overwrite:
        raise ConfigurationError(f"output: expected a new folder, got {target}, which exists. Set overwrite to true.")
    examples = task.split("train", network.preprocessing)
    if not isinstance(examples, TextExamples) or not len(examples):
        got = "none" if isinstance(examples, TextExamples) else type(examples).__name__
        raise DataError(f"{task.name}: expected texts to train on, got {got}. Give a text task with a training split.")
    fingerprint = network.fingerprint
    with TemporaryDirectory() as folder, _as_before(network.module.of_transformers):
        trainer = _trainer(network, examples, run, Path(folder))
        trainer.train()
        tuned = trainer.accelerator.unwrap_model(trainer.model)
        origin = getattr(network, "repository", None) or str(getattr(network, "folder", network.name))
        tuned.peft_config["default"].base_model_name_or_path = origin
        record = {
            **{"method": run.method, "rewards": {name: repr(one) for name, one in run.rewards.items()}},
            **{"lora": repr(run.lora), "settings": dict(run.settings), "seed": run.seed},
            **{"base_model": network.name, "base_fingerprint": fingerprint, "texts": len(examples)},
            "versions": _versions(),
            "log": trainer.state.log_history,
        }
        if trainer.is_world_process_zero():
            with staged(target) as place:
                # By default peft looks the base's vocabulary up on the Hub.
                tuned.save_pretrained(place, save_embedding_layers=False)
                (place / "README.md").unlink(missing_ok=True)  # a form that nobody filled in
                write_text(place / _RECORD, json.dumps(record, indent=2, default=str) + "\n")
        trainer.accelerator.wait_for_everyone()
    return record


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Put back what a trainer changes in a model, whether it ends or fails."""
    modules = dict(model.named_modules(remove_duplicate=False))
    device, trained = next(model.parameters()).device, {one for one in model.parameters() if one.requires_grad}
    settings, generation = copy.deepcopy(vars(model.config)), copy.deepcopy(model.generation_config)
    try:
        yield
    finally:
        for name, module in modules.items():  # peft has put its own in their places
            owner, _, own = name.rpartition(".")
            if name:
                modules[owner]._modules[own] = module
        model.__dict__.pop("peft_config", None)
        vars(model.config).clear()
        vars(model.config).update(settings)
        model.generation_config = generation
        for one in model.parameters():
            one.requires_grad_(one in trained)
            one.grad = None
        model.to(device).eval()


def _trainer(network: Network, examples: TextExamples, run: RewardedRun, folder: Path) -> Any:
    import trl
    from datasets import Dataset

    model, tokenizer = network.module.of_transformers, copy.deepcopy(network.preprocessing.tokenizer)
    kinds = {"sft": (trl.SFTConfig, trl.SFTTrainer), "grpo": (trl.GRPOConfig, trl.GRPOTrainer)}
    configuration, trainer = kinds[run.method]
    on_cpu = not torch.cuda.is_available()
    fixed = {
        **{"output_dir": str(folder), "seed": run.seed, "report_to": "none", "save_strategy": "no"},
        **{"use_cpu": on_cpu, "bf16": not on_cpu and torch.cuda.is_bf16_supported(), "logging_steps": 1},
        **{"gradient_checkpointing": False, "disable_tqdm": True},
    }
    try:
        arguments = configuration(**{**fixed, **run.settings})
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"settings: expected arguments of trl's {configuration.__name__}, got {dict(run.settings)} "
            f"({one_line(error, 200)})."
        ) from error
    given: dict[str, Any] = {"model": model, "args": arguments, "processing_class": tokenizer}
    given["peft_config"] = _peft(network, run.lora)
    prompts = _prompts(network, examples)
    if run.method == "grpo":
        given["train_dataset"] = Dataset.from_dict({"prompt": prompts})
        given["reward_funcs"] = [_function(name, reward) for name, reward in run.rewards.items()]
    elif examples.targets:
        given["train_dataset"] = Dataset.from_dict({"prompt": prompts, "completion": list(examples.targets)})
    else:
        given["train_dataset"] = Dataset.from_dict({"text": prompts})
    try:
        return trainer(**given)
    except ValueError as error:  # how trl refuses settings that do not go together
        raise ConfigurationError(
            f"settings: expected what trl's {trainer.__name__} takes, got {one_line(error)}."
        ) from error


def _prompts(network: Network, examples: TextExamples) -> list[str]:
    """The texts as they are; of those that are too long for the network, or packed, what their tokens say."""
    ids = [torch.from_numpy(row) for row in examples.input_ids]
    if not examples.texts:
        return prompt_texts(ids, network.preprocessing)
    whole = network.preprocessing.tokenizer(list(examples.texts), verbose=False)["input_ids"]
    return [
        text if len(every) <= len(kept) else prompt_texts([kept], network.preprocessing)[0]
        for text, every, kept in zip(examples.texts, whole, ids, strict=True)
    ]


def _peft(network: Network, lora: LoRA) -> Any:
    """The same settings as peft has them; of layers, which it adapts, instead of weights."""
    from peft import LoraConfig

    weights = dict(network.module.named_parameters())
    names = (lora.on or Attention(1))(weights)
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float as well
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=layers,
        rank_pattern=dict(lora.rank_pattern or {}),
        alpha_pattern=dict(lora.alpha_pattern or {}),
    )


def _function(name: str, reward: Reward) -> Callable[..., list[float]]:
    """A reward as trl calls it."""

    def rewarded(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        values: list[float] = checked_rewards(name, reward, prompts, completions).tolist()
        return values

    rewarded.__name__ = name
    return rewarded


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    named = {name: version(name) for name in ("trl", "transformers", "peft", "datasets", "accelerate")}
    return {"lit_merge": __version__, "torch": str(torch.__version__), **named}
