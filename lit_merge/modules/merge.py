"""Learning merging coefficients: AdaMerging and its relatives as an ordinary fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_merge.errors import ConfigurationError, NonFiniteError, StructureMismatchError, first_few
from lit_merge.functional import linearize
from lit_merge.functional.attention import fast_attention
from lit_merge.functional.evaluation import evaluating
from lit_merge.functional.tokens import prediction_entropy
from lit_merge.metrics.example_mean import ExampleMean
from lit_merge.models.adarank import AdaRank
from lit_merge.models.encoder import Preprocessing
from lit_merge.models.linear_features import LinearFeatureCache, LinearFeatures
from lit_merge.models.merged import MergedModel, swapped
from lit_merge.models.network import Network
from lit_merge.models.task_output import TaskOutput
from lit_merge.modules.chance import chance_warnings
from lit_merge.modules.checks import check_given, check_individuals, check_tasks, checked_kinds
from lit_merge.modules.individual import IndividualModels
from lit_merge.modules.objectives import Comparison, Entropy, Expert, Objective, Outputs, minimised, objective_of
from lit_merge.modules.passes import passes
from lit_merge.modules.protocol import check_range
from lit_merge.modules.task_heads import TaskHeads
from lit_merge.params import Params
from lit_merge.transforms import Transform
from lit_merge.transforms.base import whole_number
from lit_merge.transforms.parts import from_parts
from lit_merge.vectors import TaskVector, TaskVectors
from lit_merge.vectors.coefficients import Coefficients
from lit_merge.vectors.groups import Granularity
from lit_merge.vectors.storage import Storage

__all__ = ["MergeModule"]


class MergeModule(TaskHeads):
    """Learns the coefficients of a merge on images of the tasks (AdaMerging, Yang et al. 2024).

    The weights are ``θ0 + Σ_t λ[t, g] τ_t``, and λ all that trains. In every step the weights are merged once, a batch
    of every task goes through the encoder in one pass, each task's features go to its own head, and the gradient with
    respect to the weights goes back through the merge once. The objective is the sum over the tasks of the mean entropy
    of the predictions, which needs no labels; :meth:`compute_loss` may be overridden.

    A linearised model ``f0 + Σ λ_t J τ_t`` with one coefficient per task is learned on ``f0`` and ``J τ_t`` of all
    images, computed once and kept on disk: its steps contain no pass through the network.

    Tasks of the data that no vector belongs to are evaluated only, which shows how the merge generalises.

    Args:
        vectors: task vector files, at least two.
        granularity: which parameters share a coefficient: ``task``, ``block``, ``group`` (attention, MLP and the rest
            of every block) or ``tensor`` (the paper's "layer-wise").
        init: where λ starts: a number, one per task, or a file of coefficients.
        clamp: the range that λ is clamped to when it is used, or null.
        parts: transforms that are applied to the vectors first, e.g. [{Trim: {density: 0.2}}, ElectSign], which makes
            it AdaMerging++.
        transform: instead of parts, any transform that leaves a vector per task.
        objective: ``entropy``, of all images, ``cross_entropy``, of the labelled ones, ``expert`` or ``features``,
            which compare the merge with the individual models, or any other by class path.
        learning_rate: of Adam.
        optimizer: another optimiser, from the parameters; learning_rate is ignored then.
        scheduler: of the learning rate, from the optimiser, per step.
        images_per_pass: most examples that go through the encoder at once; batches of one task are not divided. None
            for all tasks in one pass. Texts of very different lengths go through apart in any case.
        activation_checkpointing: whether the encoder's blocks are computed again on the way back, to save memory.
        storage: where the vectors are kept: ``device``, ``bfloat16``, ``host`` or ``mapped``.
        sharded: whether every process keeps only its share of every vector.
        masks: also learn which singular directions of the vectors take part.
        learn: what is learned: ``coefficients``, and the masks if there are any; ``heads``, classifiers that start as
            the tasks' frozen heads (SyMerge, Jung et al. 2026); ``surgery``, a correction of every task's features
            (representation surgery, Yang et al. 2024). Without coefficients the merge stays as ``init`` and ``parts``
            make it, and no gradient goes through the network. By default coefficients alone.
        surgery_rank: rank of the corrections.
        model: architecture, as for :func:`lit_merge.models.load_clip`; a shorthand for a CLIP as ``network``.
        pretrained: weights, as for :func:`lit_merge.models.load_clip`.
        network: any network, by class path, instead of model and pretrained.
        linearized: merge and evaluate ``f(x; θ0) + J τ``.
        encoder: any module as the network; then ``heads`` are needed.
        heads: task -> module, features ``[B, d]`` -> logits ``[B, C]``; they are frozen.
        preprocessing: how images become the encoder's input.
        chance_examples: validation examples of every task on which the accuracy at the start is compared with chance,
            before an objective without labels is minimised; a warning says where it is hardly better. 0 for none.

    Attributes:
        merged: the :class:`~lit_merge.models.merged.MergedModel` with the coefficients.
        merged_tasks: the vectors' tasks.
        vector_tasks: of every vector its tasks, several if it was merged itself.
        transform: what is applied to the vectors first, or None.

    Raises:
        ConfigurationError: a setting is out of its range, or settings exclude each other.
        FileFormatError: a file is no task vector, or holds no coefficients.
        StructureMismatchError: a vector belongs to another base or architecture; when it is set up, a task of the data
            has other classes than its vector.
    """

    def __init__(
        self,
        vectors: list[str],
        granularity: Granularity = "tensor",
        init: float | list[float] | dict[str, float] | str = 0.3,
        clamp: tuple[float, float] | None = (0.0, 1.0),
        parts: list[str | dict[str, Any]] | None = None,
        transform: Transform | None = None,
        objective: Objective | str = "entropy",
        learning_rate: float = 1e-3,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        images_per_pass: int | None = None,
        activation_checkpointing: bool = False,
        storage: Storage = "device",
        sharded: bool = False,
        model: str = "lit-tiny",
        pretrained: str | None = None,
        network: Network | None = None,
        linearized: bool = False,
        encoder: nn.Module | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        preprocessing: Preprocessing | None = None,
        chance_examples: int = 256,
        masks: AdaRank | None = None,
        learn: list[Literal["coefficients", "heads", "surgery"]] | None = None,
        surgery_rank: int = 16,
    ) -> None:
        check_range("learning_rate", learning_rate)
        whole_number("chance_examples", chance_examples, minimum=0)
        whole_number("surgery_rank", surgery_rank, minimum=1)
        chosen = objective_of(objective)
        kinds = checked_kinds(learn, chosen, masks)
        check_given(vectors, parts, transform, images_per_pass)
        super().__init__(
            heads=heads,
            model=model,
            pretrained=pretrained,
            network=network,
            encoder=encoder,
            preprocessing=preprocessing,
        )
        self.linearized = linearized  # by encode(): a LinearizedModel would have a τ of its own to train
        objects = ["encoder", "heads", "network", "optimizer", "preprocessing", "scheduler", "transform"]
        self.save_hyperparameters(ignore=objects if isinstance(objective, str) else [*objects, "objective"])
        rows = [TaskVector.load(path) for path in vectors]
        for row in rows:
            self.check_vector(row)
        self.look_beside((path, row.tasks) for path, row in zip(vectors, rows, strict=True))
        self.transform = from_parts(parts) if parts is not None else transform
        self._inputs = TaskVectors(rows, base=self.initial_parameters)
        changed = self.transform(self._inputs) if self.transform else self._inputs
        check_tasks(self._inputs.tasks, changed.tasks, self.transform)
        self.vector_tasks = tuple(row.tasks for row in rows)
        self.merged_tasks = tuple(task for tasks in self.vector_tasks for task in tasks)
        start = Coefficients.load(init) if isinstance(init, str) else init
        self.merged = MergedModel(self.network, changed, granularity, start, clamp, storage, sharded, masks)
        self.learn, self.surgery_rank = kinds, surgery_rank
        self.learns_coefficients = "coefficients" in kinds
        for one in self.merged.learned_parameters():
            one.requires_grad_(self.learns_coefficients)
        self.objective, self.learning_rate = chosen, learning_rate
        self._objective_name = objective if isinstance(objective, str) else repr(objective)
        self._optimizer, self._scheduler = optimizer, scheduler
        self.images_per_pass, self.chance_examples = images_per_pass, chance_examples
        self._checkpointed = activation_checkpointing
        if activation_checkpointing:
            self._checkpoint_activations()
        self._set_mode(True)
        self.individuals = IndividualModels(self)
        self._held: Params | None = None
        self._spare: Params | None = None
        self._linear: dict[str, LinearFeatures] = {}

    def _checkpoint_activations(self) -> None:
        self.checkpoint_activations("Set images_per_pass instead.")
        # It needs the training mode, in which nothing else of the encoder may change.
        droppers = [name for name, part in self.network.named_modules() if _drops(part)]
        if droppers:
            raise ConfigurationError(
                f"activation_checkpointing: expected an encoder without dropout, got {first_few(droppers)}. "
                "Turn it off, or set images_per_pass instead."
            )

    @property
    def plain_vectors(self) -> TaskVectors:
        """The task vectors as they were fine-tuned, before any transform."""
        return self._inputs

    @property
    def task(self) -> str:
        """The merged tasks' common name, e.g. ``digits+letters``."""
        return "+".join(self.merged_tasks)

    def setup(self, stage: str) -> None:
        """Build a head for every task of the data, and compare the data's tasks with those of the vectors."""
        super().setup(stage)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        missing = [task for task in self.merged_tasks if task not in self.tasks]
        if missing:
            raise ConfigurationError(
                f"data: expected images of every merged task, got none of {first_few(missing)} (data: "
                f"{', '.join(self.tasks)}). Name the tasks of data as the vectors'."
            )
        if stage == "fit" and self.objective.needs_targets and not getattr(data, "labelled", True):
            raise ConfigurationError(
                f"objective {self._objective_name}: expected labelled images, got data with labelled=False. Set "
                "data.labelled, or use objective entropy."
            )
        learned = getattr(data, "adapted_tasks", None) or self.merged_tasks
        numbers = [task for task in learned if hasattr(self.head_of(task), "numbers")]
        if stage == "fit" and numbers and isinstance(self.objective, Entropy | Expert):
            raise ConfigurationError(
                f"objective {self._objective_name}: expected tasks with classes, got numbers in {first_few(numbers)}, "
                "whose one output has no entropy. Leave them out of data.adapted, or use objective cross_entropy with "
                "labels, which is their squared error, or features."
            )
        if stage == "fit":
            check_individuals(self.objective, learned, self.merged_tasks)
            self._start_outputs(learned)
        for task in self._inputs.tasks:
            self._check_classes(task, data)
        self.entropy = nn.ModuleDict({str(index): ExampleMean() for index in range(len(self.tasks))}).to(self.device)

    def _start_outputs(self, tasks: Sequence[str]) -> None:
        """Of the tasks that are learned on, what is learned for each of them behind the encoder."""
        kinds = [kind for kind in self.learn if kind != "coefficients"]
        if kinds and not getattr(self.base, "vector_features", True):
            raise ConfigurationError(
                f"learn: expected a network of features [B, d] for {' and '.join(kinds)}, got one of logits over a "
                "vocabulary. Learn coefficients alone."
            )
        for task in tasks if kinds else ():
            if self.output_of(task) is None:
                self.add_output(task, TaskOutput.starting(self.head_of(task), kinds, self.surgery_rank))

    def _check_classes(self, task: str, data: Any) -> None:
        known = self._inputs.vector(task).metadata.get("classes")
        if known is None or task not in self.tasks:  # of several tasks, or of unknown origin
            return
        trained, given = tuple(json.loads(known)), tuple(data.tasks[task].classes)
        if trained != given:
            raise StructureMismatchError(
                f"task {task}: expected the classes of its task vector, {len(trained)} ({first_few(trained)}), got "
                f"{len(given)} ({first_few(given)}). Give data the images and class names that it was trained on."
            )

    def train(self, mode: bool = True) -> MergeModule:
        """Only the coefficients train: the encoder stays in evaluation mode, unless its blocks are computed twice."""
        super().train(mode)
        self._set_mode(mode)
        return self

    def _set_mode(self, training: bool) -> None:
        self.encoder.train(training and self._checkpointed)
        for part in self.encoder.modules():
            if getattr(part, "running_mean", None) is not None:  # the base's statistics count, and stay as they are
                part.eval()

    def compute_loss(self, logits: Tensor, batch: Any, task: str) -> Tensor:
        """The objective of one task, of which the sum over the tasks is minimised; override it for another one.

        Args:
            logits: ``[B, C]``, of the task's examples; of next tokens ``[B, M, V]``.
            batch: a :class:`lit_merge.data.Batch` with ``targets`` ``[B]``, -1 where they are not known.
            task: the task's name.

        Returns:
            A scalar: here what the objective is.
        """
        return minimised(self.objective, self.head_of(task), logits, batch)

    def _loss(self, features: Tensor, individual: Tensor | None, batch: Any, task: str) -> Tensor:
        """The objective of one task, from the merge's features and, for a comparison, the individual model's."""
        features = self.represent(features, task)
        logits = self.scores(features, task)
        if individual is None or not isinstance(self.objective, Comparison):
            return self.compute_loss(logits, batch, task)
        with torch.no_grad():
            own = self.head_of(task)(individual)
        return self.objective.against(Outputs(features, logits), Outputs(individual, own), batch)

    def encode(self, inputs: Sequence[Any], weights: Mapping[str, Tensor]) -> Tensor:
        """Features ``[B, d]`` of inputs, e.g. images, under given weights; linearised, under a given τ."""
        with fast_attention(inputs[0].device):
            if self.linearized:
                return torch.add(*linearize(self.network, {}, dict(weights), *inputs))
            with swapped(self.network, weights):
                features: Tensor = self.network(*inputs)
                return features

    def forward(self, *inputs: Any) -> Tensor:
        """Features ``[B, d]`` of inputs, e.g. images ``[B, 3, S, S]``, under the merged weights."""
        held = self._held
        return self.encode(inputs, self.merged.merged_parameters(self.linearized) if held is None else held)

    @contextmanager
    def merged_once(self) -> Iterator[None]:
        """Within it the weights are merged once for all passes, without gradients."""
        outer = self._held
        with torch.inference_mode(False), torch.no_grad():
            self._held = self.merged.merged_parameters(self.linearized) if outer is None else outer
        try:
            yield
        finally:
            self._held = outer

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The sum over the tasks of their objectives; its gradient is that of the coefficients."""
        present = {task: part for task, part in batch.items() if part is not None}
        if self._linear:
            losses = {task: self._loss_of_known(part, task) for task, part in present.items()}
            loss = self._checked(losses)
        else:
            losses, gradients = self._accumulate(present)
            loss = _KnownGradient.apply(self._checked(losses).detach(), *gradients, *self.learned_parameters())
        share = getattr(getattr(self.trainer, "datamodule", None), "task_share", 1.0)
        count = sum(map(len, present.values()))
        for task, value in losses.items():
            self.log(f"train/{task}/loss", value.detach(), batch_size=count)
        # Tasks divided over processes are summed up, although processes are averaged.
        loss = loss / share
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count, sync_dist=True)
        return loss

    def learned_parameters(self) -> list[nn.Parameter]:
        """What trains: coefficients and masks, then what every task has of its own."""
        return [*(self.merged.learned_parameters() if self.learns_coefficients else ()), *self.outputs.parameters()]

    def _accumulate(self, present: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The tasks' losses, and the gradients of their sum with respect to what is learned."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        weights = self._step_weights()
        leaves = {name: value.detach().requires_grad_(self.learns_coefficients) for name, value in weights.items()}
        own = {name: value.detach().requires_grad_() for name, value in self.outputs.named_parameters()}
        losses: dict[str, Tensor] = {}
        individual = self.individuals.features(present) if isinstance(self.objective, Comparison) else {}
        for tasks in passes(present, self.images_per_pass):
            with ExitStack() as stack:
                parts = [present[task] for task in tasks]
                inputs = self.inputs(type(parts[0]).join(parts))
                # Both until the way back is done, on which blocks may be computed again.
                stack.enter_context(fast_attention(inputs[0].device))
                if not self.linearized:
                    stack.enter_context(swapped(self.network, leaves))
                stack.enter_context(swapped(self.outputs, own))
                with torch.set_grad_enabled(self.learns_coefficients):
                    features = self.encode(inputs, leaves)
                slices = features.split(list(map(len, parts)))
                for task, part, rows in zip(tasks, parts, slices, strict=True):
                    losses[task] = self._loss(part.own_outputs(rows), individual.get(task), part, task)
                total = torch.stack([losses[task] for task in tasks]).sum()
                with torch.autocast(total.device.type, enabled=False):
                    (total * scale).backward()
            losses.update({task: losses[task].detach() for task in tasks})
        behind = [torch.zeros_like(one) if one.grad is None else one.grad for one in own.values()]
        found = [*self._of_coefficients(weights, leaves), *behind]
        return losses, [one / scale for one in found]

    def _step_weights(self) -> Params:
        """The merged weights of a step, differentiable; once for the whole fit if they are not learned."""
        if not self.learns_coefficients and self._spare is not None:
            return self._spare
        weights = self.merged.merged_parameters(self.linearized, self._spare)
        self._spare = {name: value.detach() for name, value in weights.items()}  # until the next step
        return weights

    def _of_coefficients(self, weights: Params, leaves: Params) -> Sequence[Tensor]:
        """The gradients of coefficients and masks from those of the weights; none if they are not learned."""
        if not self.learns_coefficients:
            return ()
        names = [name for name, leaf in leaves.items() if leaf.grad is not None]
        learned = self.merged.learned_parameters()
        if not names:
            return [torch.zeros_like(one) for one in learned]
        return torch.autograd.grad(
            [weights[name] for name in names],
            learned,
            [leaves[name].grad for name in names],
            allow_unused=True,
            materialize_grads=True,
        )

    def _checked(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Their sum; all processes stop together if one of them is not finite."""
        values = torch.stack(list(losses.values()))
        finite = bool(torch.isfinite(values.detach()).all())
        everywhere = finite
        if self.trainer.world_size > 1:
            everywhere = self.trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not everywhere:
            wrong = [task for task, value in losses.items() if not bool(torch.isfinite(value))]
            raise NonFiniteError(
                f"{self._objective_name}: expected finite values, got others for "
                f"{first_few(wrong) or 'another process'} at step {self.trainer.global_step}. Lower learning_rate or "
                "init, set clamp, or look for damaged images; the last checkpoint is untouched."
            )
        return values.sum()

    def _loss_of_known(self, part: Any, task: str) -> Tensor:
        """The objective of a linearised model from what is known of the images, without a pass."""
        known, rows = self._linear[task], part.indices.cpu()
        applied = self.merged.applied()[:, 0]
        features = known.value[rows].to(self.device)
        for factor, name in zip(applied, self.merged.tasks, strict=True):
            features = features + factor * known.tangents[name][rows].to(self.device)
        row = next((row for row, tasks in enumerate(self.vector_tasks) if task in tasks), 0)
        own = known.value[rows].to(self.device) + known.tangents[self.merged.tasks[row]][rows].to(self.device)
        return self._loss(features, own, part, task)

    def on_fit_start(self) -> None:
        """Warn of what cannot be learned; compute what a linearised model with task-wise coefficients needs."""
        self.check_heads()
        if self.merged.masks is not None and self._optimizer is None:
            caution = self.merged.masks.caution(self.learning_rate, self.trainer.max_steps)
            if caution is not None:
                rank_zero_warn(caution)
        if not self.objective.needs_targets and not isinstance(self.objective, Comparison):
            for line in chance_warnings(self, self.trainer.datamodule, self.chance_examples):  # type: ignore[attr-defined]
                rank_zero_warn(line)
        self._linear = {}
        kept = getattr(self.base, "vector_features", True)  # not logits over a vocabulary at every position
        kept = kept and not (self.transform and isinstance(self.objective, Comparison))  # whose vectors are others
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        kept = kept and hasattr(data, "adapted_tasks")  # other data may be augmented
        if not (self.linearized and self.merged.granularity == "task" and kept and self._plain):
            return
        directions = {task: self.merged.task_vectors.vector(task) for task in self.merged.tasks}
        with torch.inference_mode(False), evaluating(self.network):
            # One process computes, the others find it.
            for turn in (True, False):
                if self.trainer.is_global_zero is turn:
                    cache = LinearFeatureCache(self.network, directions, inputs=self.inputs)
                    for task in data.adapted_tasks:
                        loader = data.tasks[task].ordered_loader("train")
                        self._linear[task] = cache.of(loader)
                self.trainer.strategy.barrier("features of the linearised model")

    @property
    def _plain(self) -> bool:
        """Whether coefficients, and nothing else, are learned."""
        return self.merged.masks is None and self.learn == ("coefficients",)

    def log_more(self, logits: Tensor, batch: Any, split: str, dataloader_idx: int) -> None:
        """Log the mean entropy of a task's predictions, too; it needs no labels."""
        metric: Any = self.entropy[str(dataloader_idx)]
        metric.update(prediction_entropy(logits), (batch.indices >= 0).float())
        name = f"{split}/{self.tasks[dataloader_idx]}/entropy"
        self.log(name, metric, add_dataloader_idx=False, batch_size=len(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the means over the tasks, and the merged tasks' entropy, which training may stop on."""
        super().on_validation_epoch_end()
        metrics: list[Any] = [
            self.entropy[str(index)] for index, task in enumerate(self.tasks) if task in self.merged_tasks
        ]
        values = [metric.compute() for metric in metrics if metric.update_called]
        if values:
            self.log("val/entropy", torch.stack(values).mean())

    def on_fit_end(self) -> None:
        """Free the memory of the training's weights."""
        self._spare = None
        self.individuals.free()

    def on_validation_start(self) -> None:
        """Merge once for the whole validation."""
        super().on_validation_start()
        self._hold()

    def on_validation_end(self) -> None:
        """Let go of these weights."""
        self._held = None

    def on_test_start(self) -> None:
        """Merge once for the whole test."""
        super().on_test_start()
        self._hold()

    def on_test_end(self) -> None:
        """Let go of these weights."""
        self._held = None

    def _hold(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._held = self.merged.merged_parameters(self.linearized)

    def configure_optimizers(self) -> Any:
        """Adam with betas (0.9, 0.999) on what is learned, or what was asked for."""
        parameters = self.learned_parameters()
        if self._optimizer is None:
            optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.9, 0.999))
        else:
            optimizer = self._optimizer(parameters)
        if self._scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"}}

    def describe(self) -> dict[str, str]:
        """Where the coefficients come from, as their file's header says it."""
        data = getattr(self.trainer, "datamodule", None)
        entries = {
            **self.base_description(),
            "objective": self._objective_name,
            "clamp": json.dumps(self.merged.clamp),
            "linearized": json.dumps(self.linearized),
            "step": str(self.trainer.global_step),
            "inputs": json.dumps(self._inputs.provenance),
            "learned_on": str(getattr(data, "adapt_on", "unknown")),
            "fraction": str(getattr(data, "fraction", 1.0)),
            "examples": json.dumps(dict(getattr(data, "examples", {}))),
        }
        if self.learn != ("coefficients",):
            entries["learn"] = json.dumps(self.learn)
        if self.merged.masks is not None:
            entries["masks"] = repr(self.merged.masks)
        if self.transform is not None:
            entries |= {"transform": repr(self.transform), "transform_config": json.dumps(self.transform.to_config())}
        return entries

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the coefficients and whose they are; θ0 is not kept, it is that of the base model."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("encoder.")}
        checkpoint["merging"] = {"tasks": list(self.merged.tasks), "members": dict(self.merged.members)}
        if self.merged.ranks:
            checkpoint["merging"]["ranks"] = dict(self.merged.ranks)
        if self.learn != ("coefficients",):
            checkpoint["merging"]["learn"] = list(self.learn)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare tasks and groups with those of this module, and take θ0 from it.

        Raises:
            StructureMismatchError: the checkpoint is of another base, of other tasks or another granularity.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("merging", {})
        mine = {"tasks": list(self.merged.tasks), "members": dict(self.merged.members)}
        for key, what in (("tasks", "tasks"), ("members", "groups of parameters")):
            if saved.get(key) != mine[key]:
                got = first_few(dict.fromkeys(saved.get(key, {}).values() if key == "members" else saved.get(key, ())))
                wanted = first_few(self.merged.groups if key == "members" else self.merged.tasks)
                raise StructureMismatchError(
                    f"checkpoint: expected one of coefficients for the {what} {wanted}, got {got or 'none'}. Use the "
                    "vectors, their order and the granularity of that run."
                )
        if tuple(saved.get("learn", ["coefficients"])) != self.learn:
            raise StructureMismatchError(
                f"checkpoint: expected one of a fit that learns {', '.join(self.learn)}, got one of "
                f"{', '.join(saved.get('learn', ['coefficients']))}. Set learn as that run did."
            )
        if saved.get("ranks", {}) != self.merged.ranks:
            raise StructureMismatchError(
                f"checkpoint: expected one with masks of {first_few(self.merged.ranks) or 'nothing'}, got masks of "
                f"{first_few(saved.get('ranks', {})) or 'nothing'}. Set masks as that run did."
            )
        own = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}


def _drops(part: nn.Module) -> bool:
    names = ("p", "prob") if "Drop" in type(part).__name__ else ()
    shares = [value for name, value in vars(part).items() if name in names or "drop" in name]  # attention_dropout
    return any(type(share) in (float, int) and share > 0 for share in shares)


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient has been computed already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *gradients_and_parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_parameters[: len(gradients_and_parameters) // 2])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        gradients = ctx.saved_tensors
        return None, *(None for _ in gradients), *(gradient * factor for gradient in gradients)
