"""Two processes train a language model on texts of different lengths as one does, through the command line."""

from __future__ import annotations

import csv

import pytest
import torch
from builders.fork_server import ForkServer
from builders.language_folders import language_folder

from lit_merge import TaskVector
from lit_merge.commands.main import main

PROGRAM = """
import sys
from lit_merge.commands.main import main
sys.exit(max(main(arguments) for arguments in {commands!r}))
"""
PLAIN = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
NETWORKS = {"bert": "TextEncoderNetwork", "t5": "Seq2SeqNetwork", "gpt2": "CausalNetwork", "llama": "CausalNetwork"}
SETTINGS = {
    "bert": [],
    "t5": ["--model.linearized=true"],
    "gpt2": ["--model.lora={rank: 2}"],
    "llama": ["--model.linearized=true"],
}
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def fit(folder, name, processes):
    settings = f"{{path: {folder / name}, dropout: 0.0}}"
    network = f"{{class_path: lit_merge.models.language.{NETWORKS[name]}, init_args: {settings}}}"
    source = f"{{class_path: lit_merge.data.text.TextTask, init_args: {{path: {folder / 'texts.csv'}}}}}"
    return [
        *("fit", *PLAIN, f"--model.network={network}", "--model.learning_rate=1e-2", *SETTINGS[name]),
        *(f"--data.source={source}", f"--data.batch_size={8 // processes}", "--trainer.limit_val_batches=0"),
        *("--trainer.max_steps=2", f"--output={folder / str(processes) / name}"),
    ]


def test_two_processes_give_the_same_task_vectors(tmp_path, fork_server: ForkServer, own_cache):
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows((" ".join(f"w{(7 * i + j) % 20}" for j in range(1 + i % 9)), "ab"[i % 2]) for i in range(40))
    for name in NETWORKS:
        language_folder(tmp_path / name, name)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    fork_server.run_on_two(PROGRAM.format(commands=[[*fit(tmp_path, name, 2), *two] for name in NETWORKS]))
    for name in NETWORKS:
        assert main([*fit(tmp_path, name, 1), "--trainer.devices=1"]) == 0
        one, both = (TaskVector.load(tmp_path / str(count) / name / "task_vector.safetensors") for count in (1, 2))
        assert one.metadata["step"] == both.metadata["step"] == "2"
        assert one.norm() > 0.01
        assert (one - both).norm() / one.norm() <= 5e-5  # float32, and Adam divides small gradients by themselves
