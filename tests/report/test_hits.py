"""Hits of a test, a bit each."""

from __future__ import annotations

import json

import pytest
import torch

from lit_merge.commands.main import main
from lit_merge.errors import FileFormatError
from lit_merge.report.hits import load_hits, save_hits
from lit_merge.vectors import TaskVector


def test_what_is_written_is_read(tmp_path):
    torch.manual_seed(0)
    hits = {"a": torch.rand(1003) > 0.3, "b.c": torch.ones(1, dtype=torch.bool), "d": torch.zeros(8, dtype=torch.bool)}
    path = tmp_path / "hits.safetensors"
    save_hits(path, hits)
    found = load_hits(path)
    assert list(found) == list(hits)
    assert all(torch.equal(found[task], one) for task, one in hits.items())
    assert path.stat().st_size < 1003 / 8 + 600
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="has changed since it was written"):
        load_hits(path)
    TaskVector({"w": torch.ones(2)}, "t").save(path)
    with pytest.raises(FileFormatError, match=r"expected format lit-merge/hits/1, got something else\. Test the model"):
        load_hits(path)


@pytest.mark.parametrize("several", [False, True])
def test_a_test_leaves_hits_whose_mean_is_the_accuracy(tmp_path, several, few_images):
    joint = ["--data", "MultiTaskDataModule", "--data.tasks", "[digits, signs]"]
    data = joint if several else ["--data.task", "digits"]
    model = ["--model", "MultiTaskModule"] if several else []
    output = tmp_path / "run"
    assert main(["test", *model, *data, "--output", str(output), "--trainer.enable_progress_bar", "false"]) == 0
    metrics = json.loads((output / "test_metrics.json").read_text())
    hits = load_hits(output / "test_hits.safetensors")
    assert list(hits) == (["digits", "signs"] if several else ["digits"])
    for task, found in hits.items():
        name = f"test/{task}/accuracy" if several else "test/accuracy"
        assert found.float().mean().item() == pytest.approx(metrics[name], abs=1e-6)
