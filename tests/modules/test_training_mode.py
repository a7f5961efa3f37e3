"""Networks train in training mode, with blocks that are computed again if asked, and a resumed run goes on exactly."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from builders.language_folders import language_folder
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lit_merge.errors import ConfigurationError
from lit_merge.models import Preprocessing, TaLoS
from lit_merge.models.language import CausalNetwork, Seq2SeqNetwork, TextEncoderNetwork
from lit_merge.models.lora import LoRA
from lit_merge.modules import FineTuneModule

NETWORKS = {"bert": TextEncoderNetwork, "t5": Seq2SeqNetwork, "gpt2": CausalNetwork, "llama": CausalNetwork}
DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "t5": {"dropout_rate": 0.3},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "llama": {"attention_dropout": 0.3},
}


@pytest.fixture
def network(tmp_path, own_cache):
    """``network(name)``: with a third of everything dropped, in float32."""

    def build(name, **settings):
        folder = tmp_path / name
        if not folder.exists():
            language_folder(folder, name, **DROPOUT[name])
        return NETWORKS[name](str(folder), **settings)

    return build


class Texts(L.LightningDataModule):
    """Six batches of the same texts for a classifier's or a language model's loss."""

    name, classes, templates = "topics", ("a", "b c", "w1"), ("{}",)

    def __init__(self, network):
        super().__init__()
        tokenization = network.preprocessing
        if tokenization.kind != "encoder":
            self.classes = ()
        texts = [["a b c", "d", "w1 w2 e f"], ["g g", "h a", "w3"]] * 3
        self.batches = [self._batch(tokenization, own) for own in texts]

    @staticmethod
    def _batch(tokenization, texts):
        from lit_merge.data.text.batch import TextBatch

        if tokenization.kind == "encoder":
            inputs, _ = tokenization.padded(tokenization.encode(texts).input_ids)
            targets = torch.tensor([0, 1, 2])
        else:
            encoded = tokenization.encode(texts, ["a", "b w1", "c"])
            inputs, targets = tokenization.padded(encoded.input_ids, encoded.target_ids)
        return TextBatch(inputs, targets, torch.arange(len(texts)), tokenization.fills)

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)

    val_dataloader = train_dataloader


class Modes(Callback):
    """Notes the modes of a network's parts, and whether it draws, in training and in validation."""

    def __init__(self):
        self.modes, self.draws = {}, {}

    def _note(self, stage, module, batch):
        self.modes[stage] = {part.training for part in module.network.modules()}
        with torch.no_grad():
            first, second = (module(*module.inputs(batch)) for _ in range(2))
        self.draws[stage] = not torch.equal(first, second)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._note("training", pl_module, batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._note("validation", pl_module, batch)


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_acts_in_training_only(name, network, silent_trainer):
    base, modes = network(name), Modes()
    assert not base.module.training  # as transformers has loaded it
    silent_trainer(max_steps=1, callbacks=[modes]).fit(FineTuneModule(network=base), datamodule=Texts(base))
    assert modes.modes == {"training": {True}, "validation": {False}}
    assert modes.draws == {"training": True, "validation": False}


@pytest.mark.parametrize("settings", [{"lora": LoRA(rank=1)}, {"linearized": True}], ids=["lora", "linearised"])
def test_low_rank_networks_drop_and_linearised_ones_do_not(settings, network, silent_trainer):
    base, modes = network("bert"), Modes()
    silent_trainer(max_steps=1, callbacks=[modes]).fit(FineTuneModule(network=base, **settings), datamodule=Texts(base))
    assert modes.draws == {"training": "lora" in settings, "validation": False}


def test_a_part_that_was_put_into_evaluation_mode_stays_there(network, silent_trainer):
    base = network("bert")
    tuned = FineTuneModule(network=base)
    tuned.train()
    frozen = base.module.get_submodule("encoder.layer.0").eval()
    silent_trainer(max_steps=1).fit(tuned, datamodule=Texts(base))
    assert not frozen.training
    assert base.module.get_submodule("encoder.layer.1").training


# Blocks that are computed again


@pytest.mark.parametrize("settings", [{}, {"lora": LoRA(rank=2)}], ids=["full", "lora"])
@pytest.mark.parametrize("name", NETWORKS)
def test_recomputation_trains_exactly_alike(name, settings, network, silent_trainer):
    found, passes = {}, {}
    for again in (False, True):
        base = network(name)
        tuned = FineTuneModule(network=base, learning_rate=1e-3, activation_checkpointing=again, **settings)
        blocks = next(part for part in base.module.modules() if isinstance(part, nn.ModuleList) and len(part) == 2)
        calls = []
        inner = next(part for part in blocks[0].modules() if type(part).__name__.endswith(("Linear", "Conv1D")))
        inner.register_forward_pre_hook(lambda part, _, calls=calls: calls.append(part.training))
        L.seed_everything(3, verbose=False)
        silent_trainer(max_steps=3, limit_val_batches=0).fit(tuned, datamodule=Texts(base))
        found[again] = torch.cat([value.flatten() for value in tuned.task_vector().values()])
        passes[again] = sum(calls)  # in training: class names go through as well
    assert passes == {False: 3, True: 6}
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-7)
    assert float(found[False].norm()) > 0


def test_recomputation_is_refused_where_it_cannot_be(network, tiny_encoder, tiny_head):
    message = r"activation_checkpointing: expected an encoder with set_grad_checkpointing\(\) that is not .*, got "
    advice = r"\. Turn it off, or use smaller batches and accumulate_grad_batches\."
    with pytest.raises(ConfigurationError, match=f"{message}a linearised one{advice}"):
        FineTuneModule(network=network("bert"), linearized=True, activation_checkpointing=True)
    plain = {"encoder": tiny_encoder(), "head": tiny_head(), "preprocessing": Preprocessing(image_size=4)}
    with pytest.raises(ConfigurationError, match=rf"{message}\w+{advice}"):
        FineTuneModule(**plain, activation_checkpointing=True)


# Runs that go on


class Draws(Callback):
    """Draws from the common generator in every validation, as somebody's metric may."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        torch.rand(3)


@pytest.mark.parametrize("end", [2, 4, 6], ids=["within an epoch", "within the next", "at an epoch's end"])
@pytest.mark.parametrize("settings", [{}, {"lora": LoRA(rank=2, dropout=0.5)}], ids=["full", "lora"])
def test_a_resumed_run_drops_what_the_whole_one_would(end, settings, network, silent_trainer, tmp_path):
    def run(folder, steps, seed, ckpt_path=None):
        base = network("bert")
        L.seed_everything(0, verbose=False)  # of LoRA's factors: the runs differ in what they drop alone
        tuned = FineTuneModule(network=base, learning_rate=1e-2, **copy.deepcopy(settings))
        data = Texts(base)
        data.batches = data.batches[:1] * 3  # an epoch, alike as Lightning begins anew in its middle
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = silent_trainer(
            max_steps=steps, callbacks=[keep, Draws()], enable_checkpointing=True, val_check_interval=1
        )
        L.seed_everything(seed, verbose=False)
        trainer.fit(tuned, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return torch.cat([value.flatten() for value in tuned.task_vector().values()])

    whole = run("whole", 8, seed=1)
    resumed = run("resumed", 8, seed=2, ckpt_path=tmp_path / "whole" / f"step={end}.ckpt")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    other = run("other", 8, seed=2)
    assert not torch.equal(other, whole)


def test_a_second_fit_begins_with_the_seed_that_is_set_then(network, silent_trainer):
    base = network("gpt2")
    tuned, found = FineTuneModule(network=base, learning_rate=0.0), []
    for _ in range(2):
        L.seed_everything(5, verbose=False)
        trainer = silent_trainer(max_steps=2, limit_val_batches=0)
        trainer.fit(tuned, datamodule=Texts(base))
        found.append(float(trainer.callback_metrics["train/loss"]))
    assert found[0] == found[1]


def test_least_sensitive_elements_are_found_with_a_plain_loader(tiny_encoder, tiny_head, tiny_data, silent_trainer):
    found = []
    for plain in (False, True):
        tuned = FineTuneModule(
            encoder=tiny_encoder(),
            head=tiny_head(),
            preprocessing=Preprocessing(image_size=4),
            trainable=TaLoS(0.3, examples=6, rounds=2),
        )
        data = tiny_data()
        given = {"train_dataloaders": data.train_dataloader()} if plain else {"datamodule": data}
        silent_trainer(max_steps=1, limit_val_batches=0).fit(tuned, **given)
        found.append(tuned.masks)
    for name, mask in found[0].items():
        assert torch.equal(mask, found[1][name])
