from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from lit_merge import TaskVector
from lit_merge.commands.inspect import inspect, summarise_blocks
from lit_merge.commands.main import main, run
from lit_merge.errors import FileFormatError
from lit_merge.files.lazy import Computed
from lit_merge.files.store import write_tensors
from lit_merge.vectors import Coefficients


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        "conv1.weight": torch.randn(3, 5, generator=generator),
        "transformer.resblocks.0.attn.in_proj_weight": torch.randn(4, 4, generator=generator),
        "transformer.resblocks.0.mlp.c_fc.bias": torch.zeros(6),
        "transformer.resblocks.10.ln_1.weight": torch.randn(7, generator=generator, dtype=torch.float64),
        "transformer.resblocks.2.ln_1.weight": torch.randn(7, generator=generator).to(torch.bfloat16),
        "ln_post.weight": torch.randn(9, generator=generator),
    }
    found["conv1.weight"][0, :2] = 0
    return found


def vector(path: Path) -> Path:
    TaskVector(tensors(), "digits", metadata={"regime": "full", "classes": '["zero", "one"]'}).save(path)
    return path


def test_a_large_tensor_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, lengths = sys.modules[summarise_blocks.__module__], []
    whole = module._with_chunk
    monkeypatch.setattr(module, "_with_chunk", lambda one, chunk: lengths.append(len(chunk)) or whole(one, chunk))
    values = torch.arange(5 << 19, dtype=torch.float32)
    write_tensors(tmp_path / "wide.safetensors", {"w": values, "none": values[:0]}, {})
    (found,) = inspect(str(tmp_path / "wide.safetensors")).blocks
    assert sorted(lengths) == [0, 1 << 19, 1 << 20, 1 << 20]
    assert (found.entries, found.floating, found.zeros) == (5 << 19, 5 << 19, 1)
    assert found.norm == pytest.approx(float(values.double().norm()), rel=1e-12)


def test_blocks_are_what_plain_arithmetic_says(tmp_path: Path) -> None:
    found = inspect(str(vector(tmp_path / "v.safetensors")))
    assert [one.block for one in found.blocks] == ["before the blocks", "0", "2", "10", "after the blocks"]
    values = tensors()
    members = [[0], [1, 2], [4], [3], [5]]
    for one, places in zip(found.blocks, members, strict=True):
        flat = torch.cat([list(values.values())[place].double().flatten() for place in places])
        assert one.tensors == len(places)
        assert one.entries == one.floating == flat.numel()
        assert one.norm == pytest.approx(float((flat**2).sum().sqrt()), rel=1e-6)
        assert one.largest == pytest.approx(float(flat.abs().max()), rel=1e-6)
        assert one.zeros == int((flat == 0).sum())
        assert one.sparsity == one.zeros / one.entries
    assert found.whole.norm == pytest.approx(math.sqrt(sum(float((v.double() ** 2).sum()) for v in values.values())))
    assert found.whole.zeros == 8
    assert found.dtypes == {"float32": 46, "float64": 7, "bfloat16": 7}


def test_integers_are_counted_and_what_is_not_finite_is_left_out() -> None:
    plain = {"a": torch.tensor([1, 0, 0]), "b": torch.tensor([3.0, math.nan, -4.0, math.inf, 0.0])}
    lazy = Computed({name: (value.shape, value.dtype) for name, value in plain.items()}, plain.__getitem__)
    (one,) = summarise_blocks(lazy)
    assert (one.entries, one.floating, one.zeros, one.not_finite) == (8, 5, 1, 2)
    assert (one.norm, one.largest) == (5.0, 4.0)


def test_json_holds_the_same_and_header_entries_are_read(tmp_path: Path, capsys) -> None:
    path = vector(tmp_path / "v.safetensors")
    found = run(["inspect", str(path), "--as_json", "true"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == found.to_dict()
    assert printed["header"]["classes"] == ["zero", "one"]
    assert printed["header"]["task"] == "digits"
    assert printed["kind"].startswith("task vector")


def test_tables_name_blocks_and_provenance(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["inspect", str(vector(tmp_path / "v.safetensors")), "--verify", "true"]) == 0
    printed = capsys.readouterr().out
    for expected in ("task vector", "regime", "full", "before", "after", "zeros (%)", "all"):
        assert expected in printed


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_coefficients_are_summed_up_by_task(tmp_path: Path, ending: str) -> None:
    values = torch.tensor([[0.0, 0.5, 1.0, 0.3], [0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    members = {f"p{index}": f"p{index}" for index in range(4)}
    path = tmp_path / f"coefficients.{ending}"
    Coefficients(values, ("a", "b"), tuple(members), members).save(path)
    found = inspect(str(path))
    assert found.kind == "coefficients"
    assert found.blocks == []
    assert found.coefficients["a"] == pytest.approx(
        {"mean": 0.45, "least": 0.0, "largest": 1.0, "zeros": 0.25, "ones": 0.25}
    )
    assert found.coefficients["b"]["mean"] == pytest.approx(0.2)
    assert found.header["parameters"] == 4


def test_weights_say_how_they_were_recognised(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"net.weight": torch.ones(2, 2)}, {"format": "pt"})
    found = inspect(str(path))
    assert "safetensors" in found.kind
    assert found.whole.norm == 2.0


def test_a_changed_file_is_refused_with_verify(tmp_path: Path) -> None:
    path = vector(tmp_path / "v.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    inspect(str(path))
    with pytest.raises(FileFormatError, match="the file has changed since it was written"):
        inspect(str(path), verify=True)
    with pytest.raises(FileFormatError, match=r"gone\.safetensors"):
        inspect(str(tmp_path / "gone.safetensors"))


@pytest.mark.parametrize("columns", [40, 72, 80])
def test_no_word_or_number_of_a_narrow_table_is_broken(columns, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    large = {f"visual.transformer.resblocks.{index}.w": torch.full((1200, 1000), 1.23456789) for index in (0, 11)}
    large["visual.conv1.weight"] = torch.tensor([math.nan, -1.5])
    write_tensors(tmp_path / "v.safetensors", large, {"format": "pt"})
    assert main(["inspect", str(tmp_path / "v.safetensors")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["block", "tensors", "entries", "norm", "largest", "zeros", "(%)", "not", "finite"] in lines
    assert ["before", "1", "2", "1.5", "1.5", "0.00", "1"] in lines
    assert ["11", "1", "1,200,000", "1352.4", "1.235", "0.00"] in lines
    assert not [word for line in lines for word in line if "…" in word]
