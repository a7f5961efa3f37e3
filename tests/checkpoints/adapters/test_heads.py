"""Adapters of classifiers, with which peft saves the head, on bases that have no such head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.peft_adapters import adapt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedModel

from lit_merge.checkpoints.adapters.reading import open_adapter
from lit_merge.checkpoints.pairing.differences import Rules
from lit_merge.commands.import_ import import_checkpoints
from lit_merge.commands.main import main
from lit_merge.errors import ConfigurationError, StructureMismatchError
from lit_merge.evaluation.analysis.command import analyze
from lit_merge.models.merging.lora_output import plan_lora
from lit_merge.vectors import TaskVector

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QUERY = "encoder.layer.0.attention.self.query.weight"
MERGE = ["merge", "--recipe", "task_arithmetic", "--settings.coefficient", "0.5", "--progress", "false"]
REFUSED = (
    r"a: expected a base with the heads that were saved with the adapter, got none named classifier\.bias, "
    r"classifier\.weight\. Set leave_out to \[classifier\.\*\] to merge all but the heads"
)


def saved(kind: type[PreTrainedModel], folder: str, labels: int = 2) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=11, max_position_embeddings=6, num_labels=labels, **sizes)
    kind(config).save_pretrained(folder)
    return Path(folder)


def adapted(base: Path, folder: str, **settings: Any) -> dict[str, Tensor]:
    """An adapter as peft saves it for a classifier; what peft's merge changes, under the classifier's names."""
    model = BertForSequenceClassification.from_pretrained(base)
    return adapt(
        model, Path(folder), **{"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2, **settings}
    )


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("kind", "prefix"), [(BertModel, ""), (BertForMaskedLM, "bert.")])
def test_the_head_of_a_classifiers_adapter_is_left_out_or_kept(
    kind: type[PreTrainedModel], prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(kind, "base")
    change = adapted(base, "a")
    merge = [*MERGE, "--base", "base", "--vectors", "[a]"]
    assert main([*merge, "--output", "refused"]) == 1
    assert "Set leave_out to [classifier.*] to merge all but the heads, or heads to keep" in capsys.readouterr().err
    assert main([*merge, "--leave_out", "[classifier.*]", "--output", "left"]) == 0
    assert main([*merge, "--heads", "keep", "--output", "kept"]) == 0
    start = load_file(base / "model.safetensors")
    for folder in ("left", "kept"):
        merged = load_file(f"{folder}/model.safetensors")
        assert list(merged) == list(start)
        for name, value in start.items():
            whole = "bert." + name.removeprefix("bert.")
            moved = change.get(whole, torch.zeros(1)) if "query" in name or "value" in name else torch.zeros(1)
            torch.testing.assert_close(merged[name], value + 0.5 * moved, atol=1e-6, rtol=0)
        assert not torch.equal(merged[prefix + QUERY], start[prefix + QUERY])
    stored = load_file("a/adapter_model.safetensors")
    head = load_file("kept/a-head.safetensors")
    assert sorted(head) == ["classifier.bias", "classifier.weight"]
    for name, value in head.items():
        assert torch.equal(value, stored[f"base_model.model.{name}"])
    assert not Path("left/a-head.safetensors").exists()
    with safe_open("left/model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["differences"])
    assert "a: left out as asked: 2 tensors (classifier.bias, classifier.weight)" in said


def test_an_adapter_without_its_head_is_merged_as_an_adapter() -> None:
    saved(BertForMaskedLM, "base")
    adapted(Path("base"), "a")
    merge = [*MERGE, "--base", "base", "--vectors", "[a]", "--leave_out", "[classifier.*]"]
    assert main([*merge, "--kind", "lora", "--output", "m"]) == 0
    base = load_file("base/model.safetensors")
    once, half = (
        open_adapter(folder).without(["classifier.weight", "classifier.bias"]).difference(base) for folder in "am"
    )
    for name in base:
        torch.testing.assert_close(half[name], 0.5 * once[name], atol=1e-6, rtol=0)
    with pytest.raises(StructureMismatchError, match=r"got none named classifier.bias, classifier.weight\. Use the b"):
        plan_lora(TaskVector(base), [open_adapter("a")], None)


def test_a_head_of_another_shape_is_refused_or_left_out() -> None:
    saved(BertForSequenceClassification, "base", labels=3)
    adapted(saved(BertForSequenceClassification, "other"), "a")
    with pytest.raises(
        StructureMismatchError,
        match=r"^a: expected the heads that were saved with the adapter in the base's shapes, got classifier\.bias "
        r"\(2,\) instead of \(3,\), classifier\.weight .* Set leave_out to \[classifier\.\*\] to merge all but the "
        r"heads\.$",
    ):
        TaskVector.from_checkpoints("base", "a")
    vector = TaskVector.from_checkpoints("base", "a", rules=Rules(("classifier.*",)))
    assert "classifier.weight" not in vector
    assert vector[f"bert.{QUERY}"].any()


def test_a_head_that_the_base_has_is_merged_as_before() -> None:
    base = saved(BertForSequenceClassification, "base")
    change = adapted(base, "a")
    vector = TaskVector.from_checkpoints("base", "a")
    torch.testing.assert_close(vector["classifier.weight"], change["classifier.weight"], atol=1e-6, rtol=0)
    assert "classifier.weight" not in TaskVector.from_checkpoints("base", "a", rules=Rules(("classifier.*",)))


def test_what_else_the_base_lacks_is_left_out_by_its_name() -> None:
    """With bias=all peft saves the bias of a pooling that a masked language model has not."""
    saved(BertForMaskedLM, "base")
    adapted(Path("base"), "a", bias="all")
    with pytest.raises(StructureMismatchError, match=r"got none named bert\.pooler\.dense\.bias"):
        TaskVector.from_checkpoints("base", "a", rules=Rules(("classifier.*",)))
    vector = TaskVector.from_checkpoints("base", "a", rules=Rules(("classifier.*", "*.pooler.*")))
    assert vector[f"bert.{QUERY}"].any()


def test_an_adapter_of_another_network_is_named_by_what_is_missing_besides_the_head() -> None:
    adapted(saved(BertModel, "base"), "a")
    save_file({"layers.0.weight": torch.zeros(3, 3)}, "other.safetensors")
    with pytest.raises(StructureMismatchError, match=r"got none named bert\.encoder\..*Use the base model"):
        TaskVector.from_checkpoints("other.safetensors", "a", rules=Rules(("classifier.*",)))


def test_commands_advise_what_they_can_do() -> None:
    saved(BertModel, "base")
    adapted(Path("base"), "a")
    adapted(Path("base"), "b")
    saved(BertForSequenceClassification, "whole")
    for finetuned, message in (("a", f"^{REFUSED}\\.$"), ("whole", r"to merge all but the heads\.$")):
        with pytest.raises(StructureMismatchError, match=message):
            import_checkpoints(finetuned, "base", output="v.safetensors")
    with pytest.raises(StructureMismatchError, match=f"{REFUSED}\\.$"):
        analyze(["a", "b"], "analysis", base="base", progress=False)
    with pytest.raises(ConfigurationError, match=r"^leave_out: expected patterns that fit .* got score\.\*\."):
        import_checkpoints(["a", "whole"], "base", output="v", leave_out=["classifier.*", "score.*"])
    assert not Path("v").exists()
    with pytest.raises(ConfigurationError, match=r"^leave_out: expected it only for task vectors"):
        import_checkpoints("base", write_as="transformers", leave_out=["classifier.*"])
    result = import_checkpoints(["a", "whole"], "base", output="v", leave_out=["classifier.*", "pooler.*"])
    assert "a: left out as asked: 4 tensors (pooler.dense.bias, pooler.dense.weight, classifier.bias and 1 more)" in (
        result.lines
    )
    for task in ("a", "whole"):
        vector = TaskVector.load(f"v/{task}.safetensors")
        assert QUERY in vector
        assert "classifier.weight" not in vector
    assert analyze(["a", "b"], "analysis", ["cosine"], base="base", leave_out=["classifier.*"], progress=False)
