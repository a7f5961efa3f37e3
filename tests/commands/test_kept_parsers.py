"""Commands of one process share their parsers, and nothing that was given to one of them reaches the next."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from lightning import LightningModule

from lit_merge.commands.training import lightning_cli
from lit_merge.commands.training.lightning_cli import LitMergeCLI, check_configuration

QUIET = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def no_parsers(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(lightning_cli, "_PARSERS", {})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def parsed(monkeypatch):
    """``parsed(*arguments)``: what ``fit`` takes them for."""
    kept: list[dict[str, Any]] = []
    checked = lightning_cli._ParseOnly
    monkeypatch.setattr(checked, "_parse_ckpt_path", lambda command: kept.append(command.config.as_dict()))

    def call(*arguments: str) -> dict[str, Any]:
        checked("fit", list(arguments))
        return kept.pop()["fit"]

    return call


def test_settings_of_one_command_are_not_those_of_the_next(parsed) -> None:
    before = parsed()
    first = lightning_cli._PARSERS["fit", frozenset()][0]
    changed = parsed("--model.learning_rate=0.5", "--trainer.max_steps=3", "--data.task=digits", "--seed_everything=5")
    assert changed["model"]["init_args"]["learning_rate"] == 0.5
    assert lightning_cli._PARSERS["fit", frozenset()][0] is first
    assert parsed() == before


def test_other_classes_have_parsers_of_their_own(parsed) -> None:
    assert parsed()["model"]["class_path"] == "lit_merge.FineTuneModule"
    assert parsed("--model=MultiTaskModule")["model"]["class_path"] == "lit_merge.MultiTaskModule"
    assert set(lightning_cli._PARSERS) == {("fit", frozenset()), ("fit", frozenset({"model"}))}


@pytest.mark.parametrize("argument", ["--print_config", "--help", "--model.learning_rat=1", "--trainer.max_steps=x"])
def test_a_parser_that_did_not_get_to_the_end_is_not_used_again(argument, parsed) -> None:
    before = parsed()
    with pytest.raises(SystemExit):
        LitMergeCLI("fit", [argument])
    assert not lightning_cli._PARSERS
    assert parsed() == before


def test_a_parser_keeps_no_model(clip_config, clip_weights) -> None:
    tiny = [f"--model.model={clip_config}", f"--model.pretrained={clip_weights}", "--data.task=digits"]
    command = LitMergeCLI("fit", [*QUIET, *tiny])
    assert lightning_cli._PARSERS
    model = weakref.ref(command.model)
    assert isinstance(model(), LightningModule)
    del command
    gc.collect()
    assert model() is None
    check_configuration("fit", {"data": {"task": "digits"}})
