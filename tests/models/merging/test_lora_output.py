"""Merges of LoRA written as LoRA: peft opens them, and computes what the merged model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_merge.checkpoints.adapters.reading import open_adapter
from lit_merge.checkpoints.opening import open_checkpoint
from lit_merge.commands.merge import merge
from lit_merge.errors import ConfigurationError, NonFiniteError, StructureMismatchError
from lit_merge.models.merging.lora_output import WrittenLora, plan_lora, write_lora, written_lora
from lit_merge.transforms import Mean, Scale, Sum, Transform, chain, ties
from lit_merge.vectors import TaskVector, TaskVectors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[1, 5, 3, 7, 2, 9]])


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def tied() -> nn.Module:
    model = llama()
    model.config.tie_word_embeddings = True
    return type(model)(model.config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return transformers.T5ForConditionalGeneration(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        images = input_ids.float().reshape(1, 2, 3, 1).expand(1, 2, 3, 4) / 8
        return self.head(self.conv(images).mean((2, 3)))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "Llama": (
        llama,
        [
            {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 3},
            {"target_modules": ["q_proj", "up_proj"], "r": 3, "use_rslora": True, "rank_pattern": {"up_proj": 1}},
        ],
    ),
    "Llama, tables": (llama, [{"target_modules": ["embed_tokens", "lm_head", "q_proj"], "r": 2}] * 2),
    "GPT-2": (
        gpt2,
        [
            {"target_modules": ["c_attn", "c_proj"], "r": 2, "fan_in_fan_out": True},
            {"target_modules": ["c_attn"], "r": 1, "fan_in_fan_out": True},
        ],
    ),
    "BERT": (bert, [{"target_modules": ["query", "value"], "r": 2, "task_type": "FEATURE_EXTRACTION"}] * 2),
    "T5": (
        t5,
        [{"target_modules": ["q", "wo"], "r": 2, "task_type": "SEQ_2_SEQ_LM"}, {"target_modules": ["v"], "r": 2}],
    ),
    "convolutions": (Convolutions, [{"target_modules": ["conv", "head"], "r": 1}] * 2),
}
RULES: dict[str, tuple[Transform, list[float] | None]] = {
    "difference": (chain(Scale([1, -1]), Sum()), [1, -1]),
    "mean": (Mean(), [0.5, 0.5]),
    "sum": (chain(Sum(), Scale(0.3)), [0.3, 0.3]),
    "ties": (ties(density=0.5), None),
}


def fresh(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def logits(model: nn.Module) -> Tensor:
    t5ish = "T5" in type(model.get_base_model() if isinstance(model, peft.PeftModel) else model).__name__
    with torch.no_grad():
        output = model(input_ids=IDS, **({"decoder_input_ids": IDS[:, :3]} if t5ish else {}))
    return output if isinstance(output, Tensor) else output.logits


def adapters(build: Callable[[], nn.Module], settings: list[dict[str, Any]], folder: Path) -> list[Path]:
    found = []
    for seed, one in enumerate(settings):
        model = peft.get_peft_model(fresh(build), peft.LoraConfig(**one))
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder / str(seed))
        found.append(folder / str(seed))
    return found


def stored(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    model = fresh(build)
    tied = "lm_head.weight" if getattr(getattr(model, "config", None), "tie_word_embeddings", False) else ""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != tied}
    return {name: one for name, one in state.items() if not name.endswith("coder.embed_tokens.weight")}


def opened(build: Callable[[], nn.Module], settings: list[dict[str, Any]], folder: Path) -> tuple[Any, ...]:
    base = stored(build)
    lora = [open_adapter(path) for path in adapters(build, settings, folder)]
    vectors = TaskVectors([TaskVector(one.difference(base), str(index)) for index, one in enumerate(lora)])
    return open_lazy(base, folder), lora, vectors


def open_lazy(base: dict[str, Tensor], folder: Path) -> Any:
    from safetensors.torch import save_file

    save_file(base, folder / "base.safetensors")
    return open_checkpoint(folder / "base.safetensors")


def factored(base: Any, lora: list[Any], merged: TaskVectors, rank: int | None = None, **more: Any) -> WrittenLora:
    dtype = more.pop("dtype", torch.float32)
    return written_lora(plan_lora(base, lora, rank, **more), merged.single(), dtype)


PAIRS = [(model, rule) for model in MODELS for rule in RULES if model == "Llama" or rule in ("difference", "ties")]


@pytest.mark.parametrize(("model", "rule"), PAIRS)
def test_peft_opens_it_and_computes_what_the_merged_model_does(model: str, rule: str, tmp_path: Path) -> None:
    (build, settings), (transform, coefficients) = MODELS[model], RULES[rule]
    base, lora, vectors = opened(build, settings, tmp_path)
    merged = transform(vectors)
    rank = None if coefficients else 16
    written = factored(base, lora, merged, rank)
    write_lora(tmp_path / "merged", written)
    if coefficients:
        assert written.exact == len(written.tensors) // 2
    assert written.worst[1] < (2e-7 if coefficients else 2e-6)

    network = fresh(build)
    network.load_state_dict({name: base[name] + merged[name][0] for name in base}, strict=False)
    theirs = peft.PeftModel.from_pretrained(fresh(build), tmp_path / "merged").eval()
    torch.testing.assert_close(logits(theirs), logits(network), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(theirs), logits(fresh(build)), atol=1e-5)
    # And we read what we wrote.
    again = open_adapter(tmp_path / "merged").difference(base)
    for name in base:
        torch.testing.assert_close(again[name], merged[name][0], atol=2e-6, rtol=1e-5)


def test_a_linear_rule_is_the_factors_side_by_side(tmp_path: Path) -> None:
    """[1, −1]: nothing is decomposed, and the factors are those of the files, times what float64 says."""
    build, settings = MODELS["Llama"]
    base, lora, vectors = opened(build, settings, tmp_path)
    merged = chain(Scale([1, -1]), Sum())(vectors)
    written = factored(base, lora, merged)
    files = [load_file(one.path / "adapter_model.safetensors") for one in lora]
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    b, a = written.tensors[name.format("B")], written.tensors[name.format("A")]
    scales = 3 / 2, 8 / 3**0.5
    assert torch.equal(a, torch.cat([one[name.format("A")] for one in files]))
    expected = [
        sign * scale * one[name.format("B")].double() for sign, scale, one in zip((1, -1), scales, files, strict=True)
    ]
    assert torch.equal(b, torch.cat(expected, 1).float())
    # The dense merge is B1 A1 − B2 A2, too.
    product = sum(one @ file[name.format("A")].double() for one, file in zip(expected, files, strict=True))
    dense = merged["model.layers.1.self_attn.q_proj.weight"][0]
    torch.testing.assert_close(dense.double(), product, atol=1e-6, rtol=0)
    config = written.config
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (5, 5) or config["rank_pattern"]
    ranks = {config["rank_pattern"].get(f"model.layers.0.{one}", config["r"]) for one in ("self_attn.q_proj",)}
    assert ranks == {5}
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_the_best_of_a_lower_rank_and_what_it_misses(tmp_path: Path) -> None:
    build, settings = MODELS["Llama"]
    base, lora, vectors = opened(build, settings, tmp_path)
    for transform in (RULES["sum"][0], RULES["ties"][0]):
        merged = transform(vectors)
        written = factored(base, lora, merged, rank=2)
        missed = total = worst = 0.0
        for name in merged:
            values = torch.linalg.svdvals(merged[name][0].double()) if merged[name].ndim == 3 else torch.zeros(1)
            rest = float(values[2:].square().sum())
            missed, total = missed + rest, total + float(values.square().sum())
            worst = max(worst, (rest / max(float(values.square().sum()), 1e-30)) ** 0.5)
        assert written.error == pytest.approx((missed / total) ** 0.5, rel=1e-4)
        assert written.worst[1] == pytest.approx(worst, rel=1e-4)
        assert written.describe().startswith("LoRA of ranks 1 to 2 for 6 weights, ")
        assert "relative error" in written.header["relative_error"] or float(written.header["relative_error"]) > 0.01
    write_lora(tmp_path / "merged", written, {"transform": "ties"})
    with safe_open(tmp_path / "merged" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["relative_error"] == written.header["relative_error"]
        assert file.metadata()["transform"] == "ties"


def test_any_vector_can_be_approximated(tmp_path: Path) -> None:
    """Of a fine-tune of all weights what LoRA can say is kept, once the rest is left out; gpt2's are [in, out]."""
    base = open_lazy(stored(gpt2), tmp_path)
    generator = torch.Generator().manual_seed(3)
    tau = {
        name: torch.randn(base.shape(name), generator=generator) * (0.1 if len(base.shape(name)) == 2 else 0)
        for name in base
    }
    vectors = TaskVectors([TaskVector(tau, "all")])
    with pytest.raises(ConfigurationError, match=r"^rank: expected a number, as not all inputs are LoRA adapters"):
        plan_lora(base, [None], None)
    written = factored(base, [None], vectors, rank=16, config={"model_type": "gpt2"})
    assert written.config["fan_in_fan_out"] is True
    write_lora(tmp_path / "merged", written)
    network = fresh(gpt2)
    network.transformer.wte = nn.Embedding.from_pretrained(base["transformer.wte.weight"].clone())  # peft's own tie
    head = network.lm_head.weight.clone()
    network.load_state_dict({name: base[name] + tau[name] for name in base}, strict=False)
    network.lm_head.weight = nn.Parameter(head)
    theirs = peft.PeftModel.from_pretrained(fresh(gpt2), tmp_path / "merged").eval()
    torch.testing.assert_close(logits(theirs), logits(network), atol=1e-4, rtol=1e-4)
    tau["transformer.h.0.ln_1.weight"] += 1
    with pytest.raises(
        StructureMismatchError,
        match=r"^lora: expected changes of weights of linear layers, convolutions and embeddings, got 1 that LoRA "
        r"cannot say \(transformer.h.0.ln_1.weight\). Leave them out \(leave_out\), or write weights or a task vec",
    ):
        factored(base, [None], TaskVectors([TaskVector(tau, "all")]), rank=4)


def test_what_cannot_be_said_is_refused_by_name(tmp_path: Path) -> None:
    build = MODELS["BERT"][0]
    settings = {"target_modules": ["query"], "r": 2}
    for number, (more, name) in enumerate(
        (({"lora_bias": True}, r"[\w.]+query.bias"), ({"modules_to_save": ["classifier"]}, "classifier.bias"))
    ):
        (tmp_path / str(number)).mkdir()
        base, lora, _ = opened(build, [{**settings, **more}], tmp_path / str(number))
        with pytest.raises(StructureMismatchError, match=rf"got \d that LoRA cannot say \({name}"):
            plan_lora(base, lora, None)
    dora = tmp_path / "dora"
    dora.mkdir()
    base, lora, vectors = opened(build, [{**settings, "use_dora": True}], dora)
    with pytest.raises(
        ConfigurationError, match=r"^rank: expected a number, as the change of [\w.]+ is no product of fac"
    ):
        plan_lora(base, lora, None)
    written = factored(base, lora, vectors, rank=16)
    assert written.worst[1] < 1e-6
    assert written.exact == 0
    with pytest.raises(ConfigurationError, match=r"^rank: expected a positive number, got 0. Use e.g. 16.$"):
        plan_lora(base, lora, 0)
    with pytest.raises(
        StructureMismatchError, match=r"^lora: expected a change of at least one weight, got a task vector of"
    ):
        factored(base, lora, Scale(0.0)(vectors), rank=4)
    with pytest.raises(
        NonFiniteError, match=r"^lora: expected factors that fit into torch.float16, got \S+ in [\w.]+query"
    ):
        factored(base, lora, Scale(1e12)(vectors), rank=4, dtype=torch.float16)


def test_settings_that_all_inputs_share_are_kept(tmp_path: Path) -> None:
    build, settings = MODELS["BERT"]
    base, lora, vectors = opened(build, settings, tmp_path)
    for one in lora:
        one.settings["base_model_name_or_path"] = "owner/bert"
    written = factored(base, lora, Mean()(vectors), dtype=torch.bfloat16)
    assert written.config["base_model_name_or_path"] == "owner/bert"
    assert written.config["task_type"] == "FEATURE_EXTRACTION"
    assert {one.dtype for one in written.tensors.values()} == {torch.bfloat16}
    assert 1e-4 < written.error < 1e-2  # said after rounding
    lora[0].settings["base_model_name_or_path"] = "owner/other"
    assert factored(base, lora, Mean()(vectors)).config["base_model_name_or_path"] is None
    assert json.loads(written.config_text) == written.config


# As an output of lit-merge merge


def test_the_command_writes_an_adapter(tmp_path: Path) -> None:
    build, settings = MODELS["Llama"]
    fresh(build).save_pretrained(tmp_path / "base")
    vectors = [str(path) for path in adapters(build, settings, tmp_path)]
    shared = {"base": str(tmp_path / "base"), "progress": False}
    difference = [{"Scale": {"coefficient": [1, -1]}}, "Sum"]
    merge(vectors, str(tmp_path / "dense"), parts=difference, **shared)
    result = merge(vectors, str(tmp_path / "lora"), parts=difference, kind="lora", **shared)
    line = result.describe().splitlines()[-2]
    assert line.startswith(
        "adapter_model.safetensors: LoRA of ranks 1 to 5 for 6 weights, 6 of them the inputs' factors si"
    )
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"- {line}" in card
    assert "library_name: peft" in card
    assert "PeftModel.from_pretrained(base, '.')" in card
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(logits(theirs), logits(dense), atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")

    result = merge(vectors, str(tmp_path / "ties"), recipe="ties", rank=2, dtype="bfloat16", kind="lora", **shared)
    with safe_open(tmp_path / "ties" / "adapter_model.safetensors", "pt") as file:
        header = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert float(header["relative_error"]) > 0.1
    assert f"relative error {float(header['relative_error']):.1e}, at most " in result.describe()
    each = merge(vectors, str(tmp_path / "each"), parts=["Trim"], kind="lora", dry_run=True, **shared)
    assert [Path(name).relative_to(tmp_path / "each").as_posix() for name, _ in each.plan.files] == [
        f"{task}/{name}" for task in "01" for name in ("adapter_model.safetensors", "adapter_config.json")
    ]


def test_an_adapter_of_a_tied_table_and_what_is_left_out(tmp_path: Path) -> None:
    """peft saves a copy of the table beside its factors; its adapter changes the one module, and so does ours."""
    model = fresh(tied)
    model.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["embed_tokens", "q_proj"], "r": 2, "modules_to_save": ["model.norm"]}
    vectors = [str(path) for path in adapters(tied, [settings], tmp_path)]
    shared = {"recipe": "task_arithmetic", "base": str(tmp_path / "base"), "progress": False}
    with pytest.raises(
        StructureMismatchError, match=r"got 1 that LoRA cannot say \(model.norm.weight\). Leave them out"
    ):
        merge(vectors, str(tmp_path / "lora"), kind="lora", **shared)
    left = {**shared, "leave_out": ["*.norm.weight"], "settings": {"coefficient": 1.0}}
    result = merge(vectors, str(tmp_path / "lora"), kind="lora", **left)
    assert "added to the model" not in result.describe()
    theirs = peft.PeftModel.from_pretrained(fresh(tied), vectors[0]).eval()
    theirs.base_model.model.model.norm.modules_to_save.default.load_state_dict(model.model.norm.state_dict())
    ours = peft.PeftModel.from_pretrained(fresh(tied), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ConfigurationError, match=r"^kind task_vector: expected changes of tensors that the base has, got oth"
    ):
        merge(vectors, str(tmp_path / "vector"), kind="task_vector", **shared)

    # Another kind of output in the same place leaves nothing of it, and the reverse.
    with pytest.raises(
        ConfigurationError, match=r"expected a new file, got \S+/adapter_model.safetensors, which exists."
    ):
        merge(vectors, str(tmp_path / "lora"), **left)
    merge(vectors, str(tmp_path / "lora"), overwrite=True, **left)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    ]
    merge(vectors, str(tmp_path / "lora"), kind="lora", overwrite=True, **left)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "weights", "rank": 4},
            "rank: expected kind lora, whose factors have one, got kind weights. Remove one.",
        ),
        ({"kind": "lora", "rank": 0}, "rank: expected a positive number, got 0. Use e.g. 16."),
        (
            {"kind": "lora", "base": None},
            "kind lora: expected base, the weights of the model that peft adapts, got none.",
        ),
        (
            {"kind": "lora", "output": "a.safetensors"},
            "output: expected a folder for an adapter, got the file a.safetensors",
        ),
        ({"kind": "lora", "write_as": "timm"}, "write_as: expected kind weights, as a library opens whole models, got"),
    ],
)
def test_settings_of_an_adapter_that_do_not_go_together(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    fresh(llama).save_pretrained(tmp_path / "base")
    given = {"base": str(tmp_path / "base"), "output": str(tmp_path / "out"), "recipe": "ties", **settings}
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        merge(["none"], progress=False, **given)
    assert not (tmp_path / "out").exists()
