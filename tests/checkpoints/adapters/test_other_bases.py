"""Adapters whose configuration names another base than the one that they are merged on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lit_merge.commands.main import main
from lit_merge.models.merging.cautions import cautions_of
from lit_merge.models.merging.inputs import open_base, open_inputs
from lit_merge.models.network import FileBase


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(folder: str, **config: str) -> None:
    Path(folder).mkdir(parents=True)
    save_file({"layer.weight": torch.eye(4)}, f"{folder}/model.safetensors", {"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps({"model_type": "none", **config}))


def adapter(stated: object, folder: str = "a") -> None:
    Path(folder).mkdir(exist_ok=True)
    factors = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(4, 1)}
    tensors = {f"base_model.model.layer.{name}.weight": value for name, value in factors.items()}
    save_file(tensors, f"{folder}/adapter_model.safetensors", {"format": "pt"})
    entries = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": stated}
    Path(folder, "adapter_config.json").write_text(json.dumps(entries))


def cautions(base: str = "m/base", repository: str | None = None) -> list[str]:
    opened = open_base("lit-tiny", None, base)
    assert isinstance(opened, FileBase)
    opened.repository = repository
    inputs, _ = open_inputs(["a"], opened, None, False)
    return list(cautions_of(inputs, opened).lasting)


def test_an_adapter_of_another_folder_is_said_in_plan_header_and_card(capsys: pytest.CaptureFixture[str]) -> None:
    model("m/base")
    model("m/tuned")
    adapter("m/tuned")
    merge = ["merge", "--base", "m/base", "--vectors", "[a]", "--recipe", "weight_average", "--progress", "false"]
    line = "a was trained on m/tuned, as its adapter_config.json says, and its base here is m/base: on other weights"
    assert main([*merge, "--output", "plan", "--dry_run", "true"]) == 0
    assert line in " ".join("".join(capsys.readouterr()).split())
    assert main([*merge, "--output", "out"]) == 0
    assert line in capsys.readouterr().err
    with safe_open("out/model.safetensors", "pt") as file:
        assert any(line in one for one in json.loads(file.metadata()["warnings"]))
    assert line in Path("out/README.md").read_text(encoding="utf-8")


def test_the_same_folder_by_another_path_and_what_is_not_known_say_nothing(tmp_path: Path) -> None:
    model("m/base")
    Path("link").symlink_to("m/base")
    for stated in ("m/base", "./m/base/", str(tmp_path / "m" / "base"), "link", "", None, 3, "gone", "x\0", "y" * 5000):
        adapter(stated)
        assert cautions() == []
        assert cautions("m/base/model.safetensors") == []
    adapter("owner/name")
    assert cautions() == []  # the base does not say what it is


def test_addresses_on_the_hub_are_compared_with_the_base_s() -> None:
    model("m/base", _name_or_path="meta/llama")
    adapter("meta/Llama")
    assert cautions() == []
    adapter("other/llama")
    (line,) = cautions()
    assert line.startswith("a was trained on other/llama, ")
    assert "its base here is m/base, whose config.json names meta/llama: " in line
    assert cautions(repository="Other/llama") == []  # where it comes from is known better
    (line,) = cautions(repository="meta/llama")
    assert "its base here is meta/llama: " in line
    model("m/saved")
    adapter("m/saved")
    assert cautions(repository="meta/llama") == []  # whether a folder is that download is not known


def test_a_base_from_the_hub_knows_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    model("m/base")
    opened = SimpleNamespace(files=(Path("m/base/model.safetensors"),))
    monkeypatch.setattr("lit_merge.models.network.open_model", lambda path: opened)
    assert FileBase("hf://meta/llama@main/part").repository == "meta/llama"
    assert FileBase("m/base").repository is None
