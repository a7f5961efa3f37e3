"""Two processes learn the coefficients that one learns, however images, tasks and vectors are divided."""

from __future__ import annotations

import re
import socket

import pytest
import torch
from builders.fork_server import ForkServer

from lit_merge import Coefficients, TaskVector
from lit_merge.commands.main import main
from lit_merge.models import load_clip

PLAIN = ["accelerator=cpu", "enable_progress_bar=false", "enable_model_summary=false", "limit_val_batches=0"]
PROGRAM = """
import sys
from lit_merge.commands.main import main
codes = [main(arguments) for arguments in {commands!r}]
sys.exit(max(codes))
"""
WAYS = {  # what two processes divide: settings of the two, with 16 images per task in all
    "images": ["--data.batch_size=8", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"],
    "images, vectors sharded": ["--data.batch_size=8", "--model.sharded=true"],
    "images, mapped vectors": ["--data.batch_size=8", "--model.storage=mapped"],
    "images, host vectors sharded": ["--data.batch_size=8", "--model.sharded=true", "--model.storage=host"],
    "tasks": ["--data.batch_size=16", "--data.divide=tasks"],
    "tasks, vectors sharded": ["--data.batch_size=16", "--data.divide=tasks", "--model.sharded=true"],
}
COMPARED = {  # with the individual models, and with masks whose logits the plain descent below moves
    "masks": ["--model.objective=features", "--model.masks.start=1e-4", "--model.masks.rank_fraction=0.5"],
    "sharded": ["--model.objective=features"],
}
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.usefixtures("few_images"),
]


def run_on_two(server: ForkServer, program: str, second: str = "") -> tuple[list[int], list[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}
    programs = (program, second or program)
    return server.run(
        [(one, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for one, rank in zip(programs, ("0", "1"), strict=True)]
    )


@pytest.fixture(scope="module")
def fit(tmp_path_factory, few_images, clip_config, clip_weights):
    """``fit(name, *more)``: the command line of a fit of three tasks into a folder of that name."""
    folder = tmp_path_factory.mktemp("merge_ddp")
    torch.manual_seed(0)
    shapes = {name: own.shape for name, own in load_clip(clip_config, clip_weights).visual.named_parameters()}
    paths = []
    for task in ("digits", "letters", "signs"):
        paths.append(str(folder / f"{task}.safetensors"))
        TaskVector({name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}, task).save(paths[-1])
    fixed = ["fit", *(f"--trainer.{one}" for one in PLAIN), "--model=MergeModule", "--data=MergeDataModule"]
    fixed += [
        f"--model.model={clip_config}",
        f"--model.pretrained={clip_weights}",
        f"--model.vectors=[{','.join(paths)}]",
    ]
    # Adam divides by the gradient's size, so that rounding decides where it is all but zero; plain descent does not.
    fixed += ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.5"]
    fixed += ["--data.tasks=[digits, letters, signs]", "--data.adapt_on=train", "--trainer.max_steps=5"]
    return folder, lambda name, *more: [*fixed, *more, f"--output={folder / name}"]


@pytest.fixture(scope="module")
def learned(fit, fork_server):
    folder, command = fit
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    commands = [command(name, *settings, *two) for name, settings in WAYS.items()]
    commands.append(command("masks by two", *WAYS["images"], *COMPARED["masks"], *two, "--trainer.max_steps=2"))
    commands.append(
        command("sharded by two", *WAYS["tasks, vectors sharded"], *COMPARED["sharded"], *two, "--trainer.max_steps=2")
    )
    codes, said = run_on_two(fork_server, PROGRAM.format(commands=commands))
    assert codes == [0, 0], "\n".join(said)
    # Both look at the start's accuracy, and the first says it: that of 32 images, which tells nothing from chance.
    warned = [re.findall(r"(\w+): the merge starts with \d+ of 32 validation examples", one) for one in said]
    assert warned[0]
    assert not warned[1]
    assert main(command("one", "--data.batch_size=16", "--trainer.devices=1")) == 0
    for name, settings in COMPARED.items():
        settings = [*settings, "--data.batch_size=16", "--trainer.devices=1", "--trainer.max_steps=2"]
        assert main(command(name, *settings)) == 0
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_learn_what_one_does(name, learned):
    one, two = (Coefficients.load(learned / run / "coefficients.safetensors") for run in ("one", name))
    assert one.tasks == two.tasks
    assert one.metadata["step"] == two.metadata["step"] == "5"
    assert (one.values - 0.3).abs().max() > 0.01
    assert (one.values - two.values).abs().max() <= 1e-5


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_compare_with_the_individual_models_as_one_does(name, learned):
    one, two = (Coefficients.load(learned / run / "coefficients.safetensors") for run in (name, f"{name} by two"))
    assert (one.values - 0.3).abs().max() > 1e-3
    assert (one.values - two.values).abs().max() <= 1e-5
    assert set(one.masks) == set(two.masks)
    assert bool(one.masks) == (name == "masks")
    for parameter, mask in one.masks.items():
        assert torch.equal(mask, two.masks[parameter])
    if one.masks:
        assert any((mask != (torch.arange(mask.shape[1]) < mask.shape[1] // 2)).any() for mask in one.masks.values())


def test_a_process_that_dies_ends_the_run_which_can_be_resumed(fit, fork_server, learned):
    folder, command = fit
    settings = [*WAYS["images, vectors sharded"], "--trainer.devices=2", "--trainer.strategy=ddp"]
    callback = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    callback += ["--trainer.callbacks.save_top_k=-1"]
    dies = """
import os
import lit_merge.modules.merge as merge
step = merge.MergeModule.training_step
def dying(self, batch, batch_idx):
    if batch_idx == 3:
        os._exit(7)
    return step(self, batch, batch_idx)
merge.MergeModule.training_step = dying
"""
    program = PROGRAM.format(commands=[command("killed", *settings, *callback)])
    codes, said = run_on_two(fork_server, program, dies + program)
    assert codes[1] == 7
    assert codes[0] == 1, said[0]
    assert "another process of this job has ended" in said[0]
    assert not (folder / "killed" / "coefficients.safetensors").exists()
    assert not list((folder / "killed").glob("*.temporary"))
    checkpoints = sorted((folder / "killed/checkpoints").glob("*step=3.ckpt"))
    assert checkpoints
    resumed = command("resumed", *settings, f"--ckpt_path={checkpoints[0]}")
    codes, said = run_on_two(fork_server, PROGRAM.format(commands=[resumed]))
    assert codes == [0, 0], "\n".join(said)
    whole, rest = (
        Coefficients.load(folder / run / "coefficients.safetensors") for run in ("images, vectors sharded", "resumed")
    )
    assert torch.equal(whole.values, rest.values)
