"""SmolLM2-135M, a real generative model: two domains, their merges, one of them unlearned, and a rewarded soup.

    lit-merge data prepare smollm2 news_texts glossary_texts quotations
    python benchmarks/language_model.py            # 3 seeds; on one data centre GPU in minutes
    python benchmarks/language_model.py --small    # 1 seed and less of everything: ten minutes on two cores
    python benchmarks/language_model.py --small --seeds 1 2 --add    # keeps what was measured of other seeds

Per seed: the model is fine-tuned on news articles and on a glossary of computing (language modelling, packed blocks),
the two vectors are merged, and the news are unlearned by negation, whose coefficient keeps the control's perplexity
(quotations) within 1 / 0.95 of the pre-trained model's. Every coefficient is chosen on validation texts, every number
shown is of test texts. Then GRPO trains two LoRA adapters from the pre-trained model, each for one reward: how much
likelier, in nats per token, the response to the beginning of a quotation is to the news model, or to that of the
glossary, than to the pre-trained one. The soup is the path between the two, with and without LiNeS; nothing is chosen.
Needs the extras text and rl (trl); --no_rewards leaves the last part out.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from placing import place_between
from widened import slow, widen

from lit_merge.data import TaskDataModule
from lit_merge.data.text import TextTask
from lit_merge.evaluation.accuracies import in_memory
from lit_merge.evaluation.search import quiet, silent_trainer
from lit_merge.files.text import write_text
from lit_merge.functional.tokens import token_losses
from lit_merge.metrics import Reward, hypervolume, kept_share, pareto_front
from lit_merge.metrics.scores import best_point, negation_score, normalised_accuracy
from lit_merge.models import LoRA
from lit_merge.models.language import CausalNetwork
from lit_merge.models.language.generation import Generation
from lit_merge.models.language.modules import CausalModule
from lit_merge.models.merged import swapped
from lit_merge.modules import FineTuneModule
from lit_merge.modules.rewarded import RewardedRun, train_adapter
from lit_merge.report.environment import hardware, versions
from lit_merge.transforms import Chain, Interpolate, LiNeS, Transform, iso_c, task_arithmetic, ties
from lit_merge.vectors import TaskVector, TaskVectors

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/language_model.json"
PAGE = ROOT / "docs/language.md"
BEGIN, END = "<!-- language model: written by benchmarks/language_model.py -->", "<!-- end of language model -->"
DOMAINS, CONTROL, FORGOTTEN = ("news_texts", "glossary_texts"), "quotations", "news_texts"
MERGES = {"task arithmetic": task_arithmetic, "TIES": ties, "Iso-C": iso_c}
COEFFICIENTS = (0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0, 4.0)
NEGATIVE = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.2)
SHARE = 0.95
LINES = {"plain": (), "LiNeS": (LiNeS(0.5, 0.5),)}
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    length: int = 512
    batch: int = 16
    steps: int = 80
    rate: float = 5e-5
    val_blocks: int = 24
    test_blocks: int = 96
    prompts: int = 64
    words: int = 8
    tokens: int = 24
    rewarded_steps: int = 16
    rewarded_rate: float = 3e-4
    group: int = 8
    per_step: int = 64
    fractions: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


SMALL = Size(128, 8, 16, 1e-4, 4, 12, 16, 8, 16, 4, 1e-3, 4, 16, (0.0, 0.5, 1.0))


class Model:
    """θ0 + τ, measured; θ0 stays.

    Args:
        path: of the model.
        data: the folder of prepared texts.
        size: how much is read.
    """

    def __init__(self, path: str, data: Path, size: Size) -> None:
        self.network = CausalNetwork(path, max_length=size.length)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size, self.data = size, data
        _ = self.network.fingerprint  # of θ0, before anything is moved
        self.module: Any = self.network.module.to(self.device)
        self.base = {name: value.detach().clone() for name, value in self.module.named_parameters()}
        scorer = copy.deepcopy(self.module.of_transformers).to(self.device).eval()
        self.scorer = CausalModule(scorer)  # the trainers change the layers of the other one
        self.blocks = {name: self._blocks(name) for name in (*DOMAINS, CONTROL)}

    def task(self, name: str) -> TextTask:
        return TextTask(path=str(self.data / name), label_column=None, pack=True, repeated="keep")

    def _blocks(self, name: str) -> dict[str, Tensor]:
        task, counts = self.task(name), {"val": self.size.val_blocks, "test": self.size.test_blocks}
        found = {split: task.split(split, self.network.preprocessing).input_ids for split in counts}
        return {split: torch.tensor([one.tolist() for one in found[split][: counts[split]]]) for split in counts}

    def at(self, vector: Parameters | None, coefficient: float = 1.0) -> dict[str, Tensor]:
        if vector is None:
            return dict(self.base)
        return {name: value + coefficient * vector[name].to(value) for name, value in self.base.items()}

    @torch.inference_mode()
    def probabilities(self, parameters: Parameters, split: str) -> dict[str, float]:
        """Text -> 1 / perplexity."""
        found = {}
        with swapped(self.module.to(self.device), parameters):
            for name, blocks in self.blocks.items():
                total, tokens = 0.0, 0
                for batch in blocks[split].to(self.device).split(8):
                    logits = self.module(batch[:, :-1], torch.ones_like(batch[:, :-1]))
                    loss, count = token_losses(logits, batch[:, 1:])
                    total, tokens = total + float(loss.double().sum()), tokens + int(count.sum())
                found[name] = float(torch.tensor(-total / tokens, dtype=torch.float64).exp())
        return found

    def fine_tuned(self, name: str, seed: int) -> TaskVector:
        """The vector of language modelling on a domain."""
        L.seed_everything(seed, verbose=False)
        module = FineTuneModule(network=self.network, learning_rate=self.size.rate, weight_decay=0.1)
        data = TaskDataModule(source=self.task(name), name=name, batch_size=self.size.batch, seed=seed)
        accelerator = "gpu" if self.device.type == "cuda" else "cpu"
        with quiet(), tempfile.TemporaryDirectory() as folder:
            settings = {"max_steps": self.size.steps, "limit_val_batches": 0, "default_root_dir": folder}
            trainer = silent_trainer(accelerator=accelerator, precision="bf16-mixed", **settings)
            trainer.fit(module, datamodule=data)
        vector = TaskVector(dict(module.task_vector()), name, metadata=module.base_description())
        module.load_parameters(module.initial_parameters)
        self.module.to(self.device).eval()
        return vector


class Likelier(Reward):
    """log p_domain − log p_0 of a response given its prompt, in nats per token; 0 for none."""

    def __init__(self, model: Model, domain: Parameters) -> None:
        self.model, self.domain = model, domain

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        tokenizer = self.model.network.preprocessing.tokenizer
        rows, starts = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            rows.append(tokenizer(f"{prompt.strip()} {response.strip()}".strip())["input_ids"])
            starts.append(len(tokenizer(prompt.strip())["input_ids"]))
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, -1)
        for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
            targets[place, start - 1 : len(row) - 1] = torch.tensor(row[start:])
        given = [one.to(self.model.device) for one in (ids, mask, targets)]
        plain, count = token_losses(self.model.scorer(*given[:2]), given[2])
        with swapped(self.model.scorer, self.domain):
            own, _ = token_losses(self.model.scorer(*given[:2]), given[2])
        return ((plain - own) / count.clamp(min=1)).float().cpu()


def merges(model: Model, vectors: TaskVectors) -> dict[str, Any]:
    """The domains' own models and their merges; every coefficient is that of the highest normalised 1 / perplexity."""
    own = {task: vectors.vector(row) for row, task in enumerate(vectors.tasks)}
    individual = {task: model.probabilities(model.at(own[task]), "val")[task] for task in own}
    found: dict[str, Any] = {f"fine-tuned, {task}": {"test": shown(model, model.at(own[task]))} for task in own}
    for name, recipe in MERGES.items():
        merged = {one: value.to(model.device) for one, value in recipe(coefficient=1.0)(vectors).single().items()}
        curve = []
        for value in COEFFICIENTS:
            at = model.probabilities(model.at(merged, value), "val")
            curve.append(normalised_accuracy({task: at[task] for task in own}, individual))
        best = COEFFICIENTS[best_point(curve, [(value,) for value in COEFFICIENTS])]
        found[name] = {"coefficient": best, "curve": curve, "test": shown(model, model.at(merged, best))}
    return found


def negated(model: Model, vector: Parameters) -> dict[str, Any]:
    """The domain that is forgotten: θ0 − α τ with the α that the rule says."""
    vector = {name: value.to(model.device) for name, value in vector.items()}
    curve = [model.probabilities(model.at(vector, -value), "val") for value in NEGATIVE]
    shares = [kept_share(one, curve[0], [CONTROL], [CONTROL]) for one in curve]
    scores = [negation_score(one[FORGOTTEN], kept, 1.0, SHARE) for one, kept in zip(curve, shares, strict=True)]
    best = best_point(scores, [(value,) for value in NEGATIVE])
    return {
        "coefficient": NEGATIVE[best],
        "control kept on validation": shares,
        "perplexities on validation": [{name: 1 / value for name, value in one.items()} for one in curve],
        "test": shown(model, model.at(vector, -NEGATIVE[best])),
    }


def shown(model: Model, parameters: Parameters) -> dict[str, float]:
    """Perplexities of test texts."""
    return {name: 1 / value for name, value in model.probabilities(parameters, "test").items()}


def soup(model: Model, vectors: TaskVectors, seed: int) -> dict[str, Any]:
    """Two adapters by GRPO, and the path between them."""
    size, tokenization = model.size, model.network.preprocessing
    prompts = prompted(model)
    own = [model.at({name: value.to(model.device) for name, value in vectors.vector(row).items()}) for row in (0, 1)]
    rewards = {task: Likelier(model, parameters) for task, parameters in zip(vectors.tasks, own, strict=True)}
    settings = {"max_steps": size.rewarded_steps, "per_device_train_batch_size": size.per_step, "logging_steps": 1}
    settings |= {"learning_rate": size.rewarded_rate, "num_generations": size.group, "lr_scheduler_type": "constant"}
    settings |= {"max_completion_length": size.tokens}
    adapters, logs = [], {}
    for task, reward in rewards.items():
        run = RewardedRun("grpo", {"likelier": reward}, LoRA(rank=16, alpha=32), settings, seed)
        with tempfile.TemporaryDirectory() as folder:
            record = train_adapter(model.network, prompts, run, Path(folder) / "adapter")
            base = {name: value.cpu() for name, value in model.base.items()}
            adapters.append(in_memory(TaskVector.from_checkpoints(base, Path(folder) / "adapter", task)))
        logs[task] = [one["reward"] for one in record["log"] if "reward" in one]
    pair = TaskVectors(adapters)
    examples = prompts.split("test", tokenization)
    texts, ids = list(examples.texts), [torch.from_numpy(row).to(model.device) for row in examples.input_ids]

    def measured(transform: Transform | None) -> list[float]:
        merged = None if transform is None else transform(pair).single()
        with swapped(model.module.to(model.device), model.at(merged)):
            written = Generation(size.tokens)(model.module, tokenization, ids)
        return [float(reward(texts, written).double().mean()) for reward in rewards.values()]

    start, paths = measured(None), {}
    for name, after in LINES.items():
        points = [measured(Chain((Interpolate(fraction), *after))) for fraction in size.fractions]
        front = pareto_front(points)
        volume = hypervolume([points[index] for index in front], start)
        paths[name] = {"points": points, "front": front, "hypervolume": volume}
    return {"rewards": list(rewards), "start": start, "fractions": size.fractions, "training": logs, "paths": paths}


def prompted(model: Model) -> TextTask:
    """Beginnings of quotations, to be continued."""
    found = {}
    for split, most in (("train", None), ("test", model.size.prompts)):
        lines = (model.data / CONTROL / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        words = [json.loads(line)["text"].split() for line in lines]
        count = model.size.words
        rows = [{"text": " ".join(one[:count]), "rest": one[count]} for one in words if len(one) > count + 3]
        found[split] = rows[:most]
    return TextTask(rows=found, label_column=None, target="rest", repeated="keep", fractions=(1.0, 0.0, 0.0))


def one_seed(model: Model, seed: int, rewarded: bool, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything of a seed; what is known is saved after every part."""
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - began - sum(seconds.values()), 1)
        print(f"seed {seed}: {name}, {seconds[name]} s", flush=True)
        if found:
            save({**found, "seconds": seconds})

    vectors = TaskVectors([model.fine_tuned(name, seed) for name in DOMAINS], device=model.device)
    lap("fine-tuning")
    found["models"] = merges(model, vectors)
    lap("merges")
    found["models"]["negation"] = negated(model, vectors.vector(DOMAINS.index(FORGOTTEN)))
    lap("negation")
    if rewarded:
        found["soup"] = soup(model, vectors, seed)
        lap("rewarded soup")
    return {**found, "seconds": seconds}


def table(measured: Mapping[str, Any]) -> str:
    """The part of the page that is made of numbers."""
    seeds = list(measured["seeds"].values())
    names = [*DOMAINS, CONTROL]
    lines = [f"| model | {' | '.join(names)} | coefficient |", "| :-- |" + " --: |" * len(names) + " :-- |"]
    before = [f"{measured['pretrained'][name]:.2f}" for name in names]
    lines.append(f"| pre-trained | {' | '.join(before)} | |")
    for model in seeds[0]["models"]:
        cells = [spread([seed["models"][model]["test"][name] for seed in seeds]) for name in names]
        chosen = [f"{seed['models'][model].get('coefficient', 1):g}" for seed in seeds]
        label = f"negation of {FORGOTTEN}" if model == "negation" else model
        lines.append(f"| {label} | {' | '.join(cells)} | {', '.join(dict.fromkeys(chosen))} |")
    lines += ["", f"Perplexity of test texts, lower is better (of what is unlearned: higher), {len(seeds)} seed(s)."]
    if "soup" in seeds[0]:
        first, second = seeds[0]["soup"]["rewards"]
        lines += ["", f"| path | fraction | reward {first} | reward {second} | hypervolume by seed |"]
        lines += ["| :-- | --: | --: | --: | :-- |"]
        starts = [spread([seed["soup"]["start"][side] for seed in seeds], 3) for side in (0, 1)]
        lines.append(f"| pre-trained | | {starts[0]} | {starts[1]} | |")
        for name in LINES:
            volumes = ", ".join(f"{seed['soup']['paths'][name]['hypervolume']:.4f}" for seed in seeds)
            for place, fraction in enumerate(seeds[0]["soup"]["fractions"]):
                points = [seed["soup"]["paths"][name]["points"][place] for seed in seeds]
                cells = [spread([point[side] for point in points], 3) for side in (0, 1)]
                lines.append(f"| {name} | {fraction:g} | {cells[0]} | {cells[1]} | {volumes if not place else ''} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and, of several, standard deviation."""
    error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def packages() -> dict[str, str]:
    found = {}
    for name in ("transformers", "peft", "trl", "accelerate", "datasets", "gguf"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def earlier(measured: dict[str, Any], path: Path) -> dict[str, Any]:
    """The seeds of another call, with what they ran on.

    Raises:
        SystemExit: it was of another model or other settings.
    """
    known = json.loads(path.read_text(encoding="utf-8"))
    expected = json.loads(json.dumps(measured))
    for key in ("model", "fingerprint", "settings", "coefficients", "negative", "share"):
        if known.get(key) != expected[key]:
            sys.exit(f"{path}: expected the same {key}, got {known.get(key)}. Leave --add out.")
    return {seed: {"processor": known["hardware"]["processor"], **one} for seed, one in known["seeds"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", type=Path, default=Path("data/text"), help="the folder of prepared texts")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--small", action="store_true", help="one seed and less of everything")
    parser.add_argument("--no_rewards", action="store_true")
    parser.add_argument("--add", action="store_true", help="keep the seeds in the output that are of the same settings")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if slow():  # this processor at bfloat16
        widen()
    began, size = time.perf_counter(), SMALL if given.small else Size()
    model = Model(given.model, given.data, size)
    seeds = given.seeds or ([0] if given.small else [0, 1, 2])
    measured: dict[str, Any] = {
        **{"model": model.network.name, "fingerprint": model.network.fingerprint, "settings": vars(size)},
        **{"coefficients": COEFFICIENTS, "negative": NEGATIVE},
        **{"share": SHARE, "versions": {**versions(), **packages()}, "hardware": hardware()},
        **{"pretrained": shown(model, model.at(None)), "seeds": {}},
    }
    if given.add:
        measured["seeds"] = earlier(measured, given.output)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:

        def save(found: dict[str, Any], seed: int = seed) -> None:
            measured["seeds"][str(seed)] = found
            measured["seconds"] = round(time.perf_counter() - began, 1)
            write_text(given.output, json.dumps(measured, indent=2) + "\n")

        save(one_seed(model, seed, not given.no_rewards, save))
    text = table(measured)
    print(text)
    if given.output == RESULTS:
        place_between(PAGE, BEGIN, END, text)


if __name__ == "__main__":
    main()
