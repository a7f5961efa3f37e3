"""Adapters written by peft: their task vectors are what peft itself merges into the base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.peft_adapters import adapt
from open_clip.model import CLIP
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.pytorch_utils import Conv1D

from lit_merge.checkpoints.adapters.reading import open_adapter
from lit_merge.checkpoints.layouts.towers import image_tower, recognise
from lit_merge.errors import FileFormatError, NonFiniteError, StructureMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Small(nn.Module):
    """Every kind of layer that LoRA adapts; two squares; weights in both orders."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.square = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.point = nn.Conv2d(4, 6, 1)
        self.line = nn.Conv1d(3, 4, 3, bias=False)
        self.table = nn.Embedding(11, 5)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)


class Conv1DBlock(nn.Module):
    """As in GPT-2: weights ``[in, out]``; two layers of one name, of which one is square."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.c_attn = Conv1D(24, 8)
        self.attn.c_proj = Conv1D(8, 8)
        self.mlp = nn.Module()
        self.mlp.c_fc = Conv1D(16, 8)
        self.mlp.c_proj = Conv1D(8, 16)


Build = Callable[[], nn.Module]


def fresh(build: Build, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return build().to(dtype)


def check(folder: Path, base: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    tau = open_adapter(folder).difference(base)
    assert list(tau) == list(base)
    assert sum(bool(tensor.any()) for tensor in expected.values()) > 0
    for name, tensor in expected.items():
        assert tau.shape(name) == tensor.shape
        assert tau.dtype(name) == tau[name].dtype == tensor.dtype
        scale = max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(tau[name], tensor, atol=tolerance * scale, rtol=0, msg=name)
        flat = torch.full((tensor.numel(),), torch.nan, dtype=tensor.dtype)
        read = tau.slicer(name)
        for start in range(0, len(flat), 11):
            read(start, min(start + 11, len(flat)), flat[start : start + 11])
        assert torch.equal(flat.view(tensor.shape), tau[name])


CASES: dict[str, tuple[Build, dict[str, Any]]] = {
    "linear": (Small, {"target_modules": ["linear"], "r": 2, "lora_alpha": 3}),
    "every layer": (Small, {"target_modules": ["linear", "square", "conv", "point", "line", "table", "head"], "r": 3}),
    "rank-stabilised": (Small, {"target_modules": ["linear", "conv"], "r": 4, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        Small,
        {
            "target_modules": ["linear", "square", "conv"],
            "rank_pattern": {"square": 3, "^conv": 5},
            "alpha_pattern": {"squa.*": 7, "linear": 2.5},
        },
    ),
    "patterns, rank-stabilised": (
        Small,
        {
            "target_modules": ["linear", "conv"],
            "rank_pattern": {"conv": 5},
            "alpha_pattern": {"conv": 7},
            "use_rslora": True,
        },
    ),
    "all biases": (Small, {"target_modules": ["linear", "conv"], "r": 2, "bias": "all"}),
    "adapted biases": (Small, {"target_modules": ["linear", "conv"], "r": 2, "bias": "lora_only"}),
    "low-rank biases": (Small, {"target_modules": ["linear", "conv"], "r": 2, "lora_bias": True, "lora_alpha": 3}),
    "bias and low-rank bias": (Small, {"target_modules": ["linear"], "r": 2, "lora_bias": True, "bias": "all"}),
    "saved modules": (Small, {"target_modules": ["linear"], "r": 2, "modules_to_save": ["head", "norm"]}),
    "saved modules, biases": (
        Small,
        {"target_modules": ["linear"], "r": 2, "modules_to_save": ["head"], "bias": "all"},
    ),
    "Conv1D": (Conv1DBlock, {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 2, "fan_in_fan_out": True}),
    "square Conv1D": (Conv1DBlock, {"target_modules": ["attn.c_proj"], "r": 2, "fan_in_fan_out": True}),
    "Conv1D of two names": (Conv1DBlock, {"target_modules": ["c_attn", "attn.c_proj"], "r": 2, "fan_in_fan_out": True}),
    "not plain at first": (Small, {"target_modules": ["linear"], "r": 2, "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_difference_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    build, settings = CASES[case]
    base = fresh(build).state_dict()
    check(tmp_path, base, adapt(fresh(build), tmp_path, **settings), tolerance=1e-6)


@pytest.mark.parametrize("case", ["every layer", "patterns", "Conv1D", "saved modules, biases"])
def test_the_difference_in_double_precision(case: str, tmp_path: Path) -> None:
    build, settings = CASES[case]
    model = fresh(build, dtype=torch.float64)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = adapt(model, tmp_path, **settings)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float64}
    check(tmp_path, base, expected, tolerance=1e-14)


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    expected = adapt(fresh(Small), tmp_path, target_modules=["linear"], r=2)
    base = {name: tensor.half() for name, tensor in fresh(Small).state_dict().items()}
    tau = open_adapter(tmp_path).difference(base)
    assert {tau.dtype(name) for name in tau} == {torch.float32}
    torch.testing.assert_close(tau["linear.weight"], expected["linear.weight"], atol=1e-6, rtol=0)


def test_adapters_in_files_of_pytorch(tmp_path: Path) -> None:
    expected = adapt(fresh(Small), tmp_path, safe=False, **CASES["every layer"][1])
    adapter = open_adapter(tmp_path)
    assert adapter.files == (tmp_path / "adapter_config.json", tmp_path / "adapter_model.bin")
    check(tmp_path, fresh(Small).state_dict(), expected)


def test_what_the_base_has_of_integers_is_left_out(tmp_path: Path) -> None:
    adapt(fresh(Small), tmp_path, target_modules=["linear"], r=2)
    base = fresh(Small).state_dict()
    assert list(open_adapter(tmp_path).difference({**base, "position_ids": torch.arange(3)})) == list(base)
    quantised = {**base, "linear.weight": base["linear.weight"].to(torch.int8)}
    with pytest.raises(
        StructureMismatchError, match=r"floating-point values in the base, got linear.weight \(torch.int8"
    ):
        open_adapter(tmp_path).difference(quantised)


# CLIPs of transformers

SHARED = {"projection_dim": 16, "hidden_act": "quick_gelu", "num_hidden_layers": 2, "num_attention_heads": 4}
TARGETS = ["q_proj", "v_proj", "fc1"]


def configuration(text_width: int = 24) -> CLIPConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 8, "image_size": 32, **SHARED}
    text = {"hidden_size": text_width, "intermediate_size": 2 * text_width, "vocab_size": 64, **SHARED}
    text |= {"max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 63}
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)


def vision_model(kind: type = CLIPVisionModel) -> nn.Module:
    return fresh(lambda: kind(configuration().vision_config))


def whole_model(text_width: int = 24) -> dict[str, Tensor]:
    return fresh(lambda: CLIPModel(configuration(text_width))).state_dict()


def test_an_adapter_of_a_vision_model_of_transformers(tmp_path: Path) -> None:
    base = vision_model().state_dict()
    expected = adapt(vision_model(), tmp_path, target_modules=TARGETS, r=4, lora_alpha=8)
    adapter = open_adapter(tmp_path)
    assert adapter.placement(base) == ("", "")
    check(tmp_path, base, expected)
    changed = {name for name, tensor in adapter.difference(base).items() if tensor.any()}
    assert len(changed) == 6
    assert all(name.split(".")[-2] in TARGETS for name in changed)


def test_the_same_adapter_under_the_names_of_open_clip(tmp_path: Path) -> None:
    """Only queries and values of packed projections were adapted; with τ added to θ0, open_clip computes as peft."""
    model = vision_model(CLIPVisionModelWithProjection)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = adapt(model, tmp_path, target_modules=TARGETS, r=4, lora_alpha=8)
    difference = open_adapter(tmp_path).difference(base)
    tau = image_tower(difference, recognise(difference))
    for block in range(2):
        packed = tau[f"transformer.resblocks.{block}.attn.in_proj_weight"]
        for index, which in enumerate("qkv"):
            part = packed[32 * index : 32 * (index + 1)]
            other = expected[f"vision_model.encoder.layers.{block}.self_attn.{which}_proj.weight"]
            torch.testing.assert_close(part, other, atol=1e-6, rtol=0)
            assert bool(part.any()) == (which != "k")
        assert not tau[f"transformer.resblocks.{block}.mlp.c_proj.weight"].any()

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}
    ours = CLIP(
        16, vision, {"context_length": 12, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1}, quick_gelu=True
    )
    start = image_tower(base, recognise(base))
    ours.visual.load_state_dict({name: start[name] + tau[name] for name in start})
    theirs = PeftModel.from_pretrained(vision_model(CLIPVisionModelWithProjection), tmp_path)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours.visual(pixels), theirs(pixels).image_embeds, atol=1e-5, rtol=0)


def test_an_adapter_of_the_vision_model_on_the_whole_clip(tmp_path: Path) -> None:
    expected = adapt(vision_model(), tmp_path, target_modules=TARGETS, r=4)
    adapter = open_adapter(tmp_path)
    whole = whole_model()
    assert adapter.placement(whole) == ("", "vision_model.")  # the text tower has the same names, but other shapes
    assert adapter.placement({f"module.{name}": tensor for name, tensor in whole.items()}) == (
        "",
        "module.vision_model.",
    )
    tau = adapter.difference(whole)
    assert list(tau) == list(whole)
    for name, tensor in tau.items():
        other = (
            expected.get(name.removeprefix("vision_model."), torch.zeros(())) if "text" not in name else torch.zeros(())
        )
        torch.testing.assert_close(tensor, other.expand_as(tensor), atol=1e-6, rtol=0)
    with pytest.raises(
        StructureMismatchError,
        match=r"expected one position in the base where the adapter fits, got 2 \('\w+_model.', '\w+_model.'\).",
    ):
        adapter.placement(whole_model(text_width=32))


def test_an_adapter_with_longer_names_than_the_base(tmp_path: Path) -> None:
    expected = adapt(vision_model(CLIPVisionModelWithProjection), tmp_path, target_modules=TARGETS, r=4)
    base = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in vision_model(CLIPVisionModelWithProjection).state_dict().items()
    }
    adapter = open_adapter(tmp_path)
    assert adapter.placement(base) == ("vision_model.", "")
    for name, tensor in adapter.difference(base).items():
        other = expected["vision_model." + name if name != "visual_projection.weight" else name]
        torch.testing.assert_close(tensor, other, atol=1e-6, rtol=0)


# refusals


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapt(fresh(Small), tmp_path, target_modules=["linear", "conv"], r=2)
    adapter = open_adapter(tmp_path)
    base = fresh(Small).state_dict()
    with pytest.raises(
        StructureMismatchError,
        match=r"expected a base with every parameter that the adapter changes, got none named (linear|conv).weight, "
        r"(linear|conv).weight. Use the base model that it was trained on, with its names.$",
    ):
        adapter.difference({name.upper(): tensor for name, tensor in base.items()})
    with pytest.raises(
        StructureMismatchError,
        match=r"expected a change of linear.weight of shape \(8, 7\), as in the base, got \(8, 6\).",
    ):
        adapter.difference({**base, "linear.weight": torch.zeros(8, 7)})


def test_only_matrices_may_be_transposed(tmp_path: Path) -> None:
    adapt(fresh(Small), tmp_path, target_modules=["conv", "table"], r=2)
    base = fresh(Small).state_dict()
    for name, shape in (("conv.weight", (3, 3, 3, 4)), ("table.weight", (5, 11))):
        with pytest.raises(
            StructureMismatchError, match=rf"expected a change of {name} of shape {re.escape(str(shape))}, as"
        ):
            open_adapter(tmp_path).difference({**base, name: torch.zeros(shape)})


def test_saved_modules_may_count(tmp_path: Path) -> None:
    """A batch normalisation is saved with an integer that is no parameter."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = adapt(model, tmp_path, target_modules=["0"], r=2, modules_to_save=["1"])
    tau = open_adapter(tmp_path).difference(base)
    assert sorted(tau) == sorted(name for name in base if name != "1.num_batches_tracked")
    torch.testing.assert_close(tau["1.weight"], expected["1.weight"], atol=1e-6, rtol=0)


def test_saved_modules_that_the_base_lacks_are_refused(tmp_path: Path) -> None:
    adapt(fresh(Small), tmp_path, target_modules=["linear"], r=2, modules_to_save=["head"])
    base = {name: tensor for name, tensor in fresh(Small).state_dict().items() if not name.startswith("head.")}
    with pytest.raises(StructureMismatchError, match=r"got none named head.\w+, head.\w+. Use the base model"):
        open_adapter(tmp_path).difference(base)


class Mixed(nn.Module):
    """A square layer, and one that is written the other way round and decides the configuration's one flag."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.square = nn.Linear(8, 8)
        self.last = last


def test_a_square_weight_beside_transposed_ones_is_refused(tmp_path: Path) -> None:
    for number, last in enumerate((Conv1D(10, 8), Conv1D(8, 10))):
        folder = tmp_path / str(number)
        model = Mixed(last)
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapt(model, folder, target_modules=["square", "last"], r=2)
        assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
        with pytest.raises(
            StructureMismatchError,
            match=r"\[out, in\], or all \[in, out\], got both, and square is square. Merge this adap",
        ):
            open_adapter(folder).difference(base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            OFTConfig(target_modules=["linear"], oft_block_size=2),
            "LOKR, IA3, TRAINABLE_TOKENS, got 'OFT'. Merge it into",
        ),
        (
            LoraConfig(target_modules=["linear"], init_lora_weights="pissa"),
            "expected factors beside the unchanged base, got init_lora_weights = 'pissa', which takes a part of the",
        ),
        (
            LoraConfig(target_modules=["linear"], init_lora_weights="olora"),
            "got init_lora_weights = 'olora', which takes",
        ),
        (
            LoraConfig(target_parameters=["linear.weight"], target_modules=[]),
            r"plain LoRA, got target_parameters = \['linear.weight'\]. Merge the adapter into",
        ),
        (
            LoraConfig(target_modules=["linear"], alora_invocation_tokens=[1]),
            r"expected plain LoRA, got alora_invocation_tokens = \[1\]",
        ),
    ],
)
def test_other_kinds_of_adapters_are_refused(settings: Any, message: str, tmp_path: Path) -> None:
    get_peft_model(fresh(Small), settings).save_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match=rf"^{re.escape(str(tmp_path))}/adapter_config.json: .*{message}"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"peft_type": None},
            "expected an adapter with peft_type LORA, ADALORA, LOHA, .*, got None. Merge it into its",
        ),
        (
            {"peft_type": "PREFIX_TUNING"},
            "got 'PREFIX_TUNING'. It adds to the input or chooses by it, and changes no wei",
        ),
        ({"peft_type": "LOHA", "r": 2}, "expected plain LOHA, got "),
        ({"use_dora": True}, "expected lengths of rows for linear exactly with use_dora, got no lora_magnitude_vector"),
        ({"something_new": 3}, "expected plain LoRA, got something_new = 3"),
        ({"init_lora_weights": 1}, "expected plain LoRA, got init_lora_weights = 1"),
        (
            {"peft_type": "ADALORA", "init_r": "many"},
            "expected init_r to be a positive number, got 'many'. Save it again.",
        ),
        (
            {"peft_type": ["LORA"]},
            r"expected an adapter with peft_type LORA, .*, got \['LORA'\]. Merge it into its base",
        ),
        ({"lora_alpha": "16"}, "expected lora_alpha to be a positive number, got '16'. Save it again."),
        ({"lora_alpha": float("nan")}, "expected lora_alpha to be a positive number, got nan"),
        ({"r": 10**400}, "expected r to be a positive number, got 1000"),
        ({"r": True}, "expected r to be a positive number, got True"),
        ({"alpha_pattern": [1]}, r"expected alpha_pattern to be a mapping, got \[1\]. Save it again."),
        ({"rank_pattern": {"linear": 0}}, r"expected rank_pattern\['linear'\] to be a positive number, got 0"),
        ({"r": 3}, "expected factors of rank 3 for linear by the configuration, got rank 2. Use the configuration"),
        ({"rank_pattern": {"linear": 3}}, "expected factors of rank 3 for linear by the configuration, got rank 2"),
        (
            {"alpha_pattern": {"(l*)*x": 1}},
            r"expected short regular expressions in alpha_pattern, got '\(l\*\)\*x'. Write",
        ),
        ({"alpha_pattern": {".*l.*i.*n.*": 1}}, "expected short regular expressions in alpha_pattern, got"),
        ({"alpha_pattern": {"^l" + "i" * 300: 1}}, "expected short regular expressions in alpha_pattern, got"),
        ({"alpha_pattern": {"(": 1}}, r"expected short regular expressions in alpha_pattern, got '\('"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapt(fresh(Small), tmp_path, target_modules=["linear"], r=2)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(FileFormatError, match=message):
        open_adapter(tmp_path)


def test_entries_of_a_pattern_that_agree_are_accepted(tmp_path: Path) -> None:
    expected = adapt(fresh(Small), tmp_path, target_modules=["linear"], r=2, lora_alpha=6)
    file = tmp_path / "adapter_config.json"
    settings = {**json.loads(file.read_text()), "lora_alpha": 1, "alpha_pattern": {"linear": 6, "lin.*": 6, "inear": 9}}
    file.write_text(json.dumps(settings))
    check(tmp_path, fresh(Small).state_dict(), expected)


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileFormatError, match=r"adapter_config.json: expected the configuration of an adapter, got No such"
    ):
        open_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    for content in ("{", "[" * 100_000, '{"r": ' + "9" * 5000 + "}"):
        config.write_text(content)
        with pytest.raises(FileFormatError, match=r"expected JSON, got something else. Copy the adapter again."):
            open_adapter(tmp_path)
    config.write_text("[1]")
    with pytest.raises(FileFormatError, match=r"expected an adapter with peft_type LORA, ADALORA, .*, got None"):
        open_adapter(tmp_path)
    with config.open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(FileFormatError, match="expected a configuration of at most 16,777,216 bytes, got 17,825,792"):
        open_adapter(tmp_path)
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        FileFormatError, match=r"expected adapter_model.safetensors or adapter_model.bin with its config"
    ):
        open_adapter(tmp_path)


def test_an_attention_of_torch_is_refused(tmp_path: Path) -> None:
    """peft 0.21 counts the update of its output projection twice, in the forward pass and in the merge."""
    adapt(fresh(lambda: nn.Sequential(nn.MultiheadAttention(8, 2))), tmp_path, target_modules=["0"], r=2)
    with pytest.raises(
        FileFormatError,
        match=r"got the output projection inside an adapted attention \(0.base_layer.out_proj\), which ver",
    ):
        open_adapter(tmp_path)


def test_tensors_that_are_no_factors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    a, b = "base_model.model.linear.lora_A.weight", "base_model.model.linear.lora_B.weight"
    for tensors, message in (
        ({}, "expected the tensors of an adapter, got none. Save it again."),
        ({a: torch.ones(2, 6)}, r"expected factors A \[r, …\] and B \[d, r\] of linear, got a \(2, 6\). Save the"),
        ({a: torch.ones(2, 6), b: torch.ones(8, 3)}, r"of linear, got a \(2, 6\), b \(8, 3\)"),
        ({a: torch.ones(2, 6), b: torch.ones(8, 2, 2, 1)}, r"of linear, got a \(2, 6\), b \(8, 2, 2, 1\)"),
        ({a: torch.ones(0), b: torch.ones(8, 2)}, r"of linear, got a \(0,\), b \(8, 2\)"),
        ({a: torch.ones(0, 6), b: torch.ones(8, 0)}, r"of linear, got a \(0, 6\), b \(8, 0\)"),
        (
            {b.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(8)},
            r"factors A \[r, …\] and B \[d, r\] of linear, got magnitude \(8,\). Save",
        ),
        ({a: torch.ones(2, 6), b: torch.ones(8, 2), f"{a}.lora_gate": torch.ones(1)}, "A and B of LoRA, got base"),
        (
            {a: torch.ones(2, 6), b: torch.ones(8, 2), a.replace("lora_A.weight", "ia3_l"): torch.ones(8, 1)},
            "expected tensors of an adapter with peft_type LORA, got base_model.model.linear.ia3_l",
        ),
    ):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(FileFormatError, match=message):
            open_adapter(tmp_path)
    save_file({a: torch.full((2, 6), torch.inf), b: torch.ones(8, 2)}, tmp_path / "adapter_model.safetensors")
    tau = open_adapter(tmp_path).difference(fresh(Small).state_dict())
    assert not tau["square.weight"].any()
    with pytest.raises(
        NonFiniteError, match=r"adapter: expected a finite difference, got NaN or infinity in linear.weight."
    ):
        tau["linear.weight"]


def test_tokens_are_those_of_the_configuration(tmp_path: Path) -> None:
    """Rows of a table that the configuration does not name, or the base does not have, are refused."""
    base = fresh(Small).state_dict()
    rows = {"base_model.model.table.token_adapter.trainable_tokens_delta": torch.ones(2, 5)}
    save_file(rows, tmp_path / "adapter_model.safetensors")
    for given, message in (
        (None, r"expected the trained tokens of table in trainable_token_indices, got none or a token twice. Save the"),
        ([1, 1], "got none or a token twice"),
        ([1, True], "got none or a token twice"),
        ({"other": [1, 2]}, "got none or a token twice"),
        ([1, 2, 3], r"expected a change of table.weight, rows 3 of shape \(3, 5\), as in the base, got \(2, 5\)"),
        ([1, 11], r"expected tokens below 11, the rows of table.weight in the base, got 11. Use the base model"),
        ([-1, 2], r"expected tokens below 11, the rows of table.weight in the base, got -1. Use the base model"),
    ):
        settings = {"peft_type": "LORA", "trainable_token_indices": given, "auto_mapping": 3}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises((FileFormatError, StructureMismatchError), match=message):
            open_adapter(tmp_path).difference(base)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "trainable_token_indices": {"table": [4, 0]}}')
    tau = open_adapter(tmp_path).difference(base)["table.weight"]
    assert torch.equal(tau[[4, 0]], torch.ones(2, 5) - base["table.weight"][[4, 0]])
    assert not tau[[1, 2, 3, *range(5, 11)]].any()


def test_one_factor_per_matrix(tmp_path: Path) -> None:
    """A factor of IA3 must have the length of one side of its weight."""
    base = fresh(Small).state_dict()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    for shape, message in (
        ((7, 1), r"expected a change of linear.weight of shape \(8, 6\), as in the base, got \(7, 1\)"),
        ((2, 4), r"expected a factor \[d, 1\] or \[1, k\] of a matrix, got \(2, 4\) for linear of shape \(8, 6\)"),
    ):
        save_file({"base_model.model.linear.ia3_l": torch.ones(shape)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(StructureMismatchError, match=message):
            open_adapter(tmp_path).difference(base)


def test_factors_of_other_kinds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    names = [f"base_model.model.linear.hada_w{one}_{side}" for one in (1, 2) for side in "ab"]
    good = dict(zip(names, (torch.ones(8, 2), torch.ones(2, 6), torch.ones(8, 2), torch.ones(2, 6)), strict=True))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA", "r": 2, "alpha": 2}')
    for change in ({names[0]: torch.ones(8, 3)}, {names[3]: torch.ones(2, 5)}, {names[2]: torch.ones(())}):
        save_file({**good, **change}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(
            FileFormatError, match=r"expected the factors of LOHA for linear, got w1_a \(8, [23]\), w1_b"
        ):
            open_adapter(tmp_path)
    save_file(good, tmp_path / "adapter_model.safetensors")
    tau = open_adapter(tmp_path).difference(fresh(Small).state_dict())
    assert torch.equal(tau["linear.weight"], torch.full((8, 6), 4.0))
