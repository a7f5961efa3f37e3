"""Checkpoints as people have them: opened, differenced, loaded; every value to the bit."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from builders import checkpoint_files as files
from safetensors.torch import load_file
from torch import nn

from lit_merge.checkpoints import difference
from lit_merge.checkpoints.opening import named_after, open_checkpoint
from lit_merge.checkpoints.pairing.ties import differing
from lit_merge.checkpoints.pairs import pair_of
from lit_merge.errors import ConfigurationError, FileFormatError, LitMergeError, NonFiniteError, StructureMismatchError
from lit_merge.files.lazy import stream
from lit_merge.models import load_clip
from lit_merge.modules import FineTuneModule
from lit_merge.params import fingerprint
from lit_merge.vectors import TaskVector

VISUAL = "visual."


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


# Format -> how it is written, the container and the layout that it is recognised as, and the prefix.
FORMATS = {
    "safetensors": (lambda p, c, s: files.safetensors(p / "a.safetensors", s), "safetensors", "open_clip", ""),
    "sharded": (lambda p, c, s: files.sharded(p / "a", s, 30_000), "sharded safetensors", "open_clip", ""),
    "state dict": (lambda p, c, s: files.pytorch(p / "a.pt", s), "PyTorch state dict", "open_clip", ""),
    "older state dict": (lambda p, c, s: files.pytorch(p / "a.bin", s, True), "PyTorch state dict", "open_clip", ""),
    "data parallel": (
        lambda p, c, s: files.pytorch(
            p / "a.pth", {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in s.items()}}
        ),
        "PyTorch state dict",
        "open_clip",
        "module.",
    ),
    "whole module": (
        lambda p, c, s: files.whole_module(p / "a.pt", c, s),
        "PyTorch whole module",
        "open_clip",
        "model.",
    ),
    "TorchScript": (lambda p, c, s: files.torchscript(p / "a.pt", c, s), "TorchScript archive", "open_clip", ""),
    "image tower": (
        lambda p, c, s: files.pytorch(p / "a.pt", {n[7:]: v for n, v in s.items() if n.startswith(VISUAL)}),
        "PyTorch state dict",
        "image tower",
        "",
    ),
    "transformers": (lambda p, c, s: files.transformers_folder(p / "a", s), "safetensors", "transformers", ""),
    "transformers, sharded": (
        lambda p, c, s: files.transformers_folder(p / "a", s, max_shard_size="30KB"),
        "sharded safetensors",
        "transformers",
        "",
    ),
    "transformers, image tower": (
        lambda p, c, s: files.transformers_folder(p / "a", s, "CLIPVisionModelWithProjection"),
        "safetensors",
        "transformers",
        "",
    ),
    "timm": (lambda p, c, s: files.timm_file(p / "a.pt", s), "PyTorch state dict", "timm", ""),
}


@pytest.fixture(scope="module")
def state(clip_weights):
    """θ0 of a whole CLIP."""
    return load_file(clip_weights)


@pytest.fixture(scope="module")
def tuned(state):
    """θ, fine-tuned in the image tower alone."""
    return files.moved(state, 1)


@pytest.fixture(scope="module")
def written(clip_config, state, tuned, tmp_path_factory):
    """Format -> the paths of θ0 and of θ in it."""
    made = {}

    def write(name):
        if name not in made:
            folders = [tmp_path_factory.mktemp(which) for which in ("zeroshot", "finetuned")]
            made[name] = tuple(
                FORMATS[name][0](folder, clip_config, one) for folder, one in zip(folders, (state, tuned), strict=True)
            )
        return made[name]

    return write


@pytest.fixture(scope="module")
def tau(state, tuned):
    """The definition: float32 θ − θ0 under the image tower's names."""
    return {name[7:]: tuned[name] - state[name] for name in state if name.startswith(VISUAL)}


def tower_of(state):
    return {name[7:]: value for name, value in state.items() if name.startswith(VISUAL)}


def assert_equal(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def refused(error_class, line, function, *arguments, **settings):
    with pytest.raises(error_class, match=line) as error:
        function(*arguments, **settings)
    assert isinstance(error.value, LitMergeError)
    assert "\n" not in str(error.value)


# Every format


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_and_read_to_the_bit(name, written, state):
    _, container, layout, prefix = FORMATS[name]
    opened = open_checkpoint(written(name)[0])
    assert (opened.container, opened.recognised.layout, opened.recognised.prefix) == (container, layout, prefix)
    assert opened.describe().startswith(f"{container}, {layout} names")
    assert ("prefix 'm" in opened.describe()) == bool(prefix)
    assert all(path.is_file() for path in opened.files)
    tower = opened.image_tower()
    assert_equal(dict(tower), tower_of(state))
    for part, value in tower_of(state).items():
        assert (tower.shape(part), tower.dtype(part)) == (value.shape, value.dtype)
    if "text tower" in opened.recognised.left_out and name != "whole module":
        assert_equal(dict(opened.whole_clip()), state)


@pytest.mark.parametrize("name", FORMATS)
def test_a_pair_is_differenced_to_the_bit(name, written, tau, clip_config, clip_weights, monkeypatch):
    monkeypatch.setattr(difference, "_ENTRIES", 1000)  # so that tensors are read in several pieces
    vector = TaskVector.from_checkpoints(*written(name), "cars")
    assert_equal(dict(vector), tau)
    assert vector.base_fingerprint == load_clip(clip_config, clip_weights).fingerprint
    pieces = {}
    for part, piece in stream(vector, list(vector)):
        assert piece.numel() <= 1000
        pieces.setdefault(part, []).append(piece.clone())
    assert_equal({part: torch.cat(these).reshape(tau[part].shape) for part, these in pieces.items()}, tau)
    assert_equal(dict(pickle.loads(pickle.dumps(vector))), tau)


@pytest.mark.parametrize("name", FORMATS)
def test_a_clip_is_loaded_from_any_format(name, written, clip_config, clip_weights, tuned):
    expected, clip = load_clip(clip_config, clip_weights), load_clip(clip_config, str(written(name)[0]))
    assert clip.fingerprint == expected.fingerprint
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(clip.visual.eval()(images), expected.visual.eval()(images))
    if name in ("whole module", "image tower", "transformers, image tower", "timm"):
        refused(FileFormatError, "whose text tower makes the heads, got one without", clip.encode_text, ["a cat"])
    else:
        assert torch.equal(clip.encode_text(["a cat"]), expected.encode_text(["a cat"]))
        assert (clip.text_fingerprint, clip.logit_scale) == (expected.text_fingerprint, expected.logit_scale)
    module = FineTuneModule(clip_config, clip_weights, weights=str(written(name)[1]))
    assert_equal({part: value.detach() for part, value in module.encoder.named_parameters()}, tower_of(tuned))


def test_pairs_need_not_have_the_same_format(written, tau):
    base, older = written("transformers")[0], written("older state dict")[1]
    assert_equal(dict(TaskVector.from_checkpoints(base, older)), tau)
    assert_equal(dict(TaskVector.from_checkpoints(written("timm")[0], written("whole module")[1])), tau)


def test_a_mapping_and_a_file(written, state, tau):
    vector = TaskVector.from_checkpoints(tower_of(state), written("transformers")[1])
    assert_equal(dict(vector), tau)
    assert_equal(dict(TaskVector.from_checkpoints(state, written("timm")[1])), tau)


def test_half_precision_is_differenced_in_float32_from_the_encoder_that_is_loaded(state, tuned, clip_config, tmp_path):
    half = {name: value.half() if name.startswith(VISUAL) else value for name, value in state.items()}
    files.torchscript(tmp_path / "base.pt", clip_config, {name: value.float() for name, value in half.items()})
    base = files.pytorch(tmp_path / "half.pt", half)
    vector = TaskVector.from_checkpoints(base, files.whole_module(tmp_path / "tuned.pt", clip_config, tuned))
    assert_equal(dict(vector), {name[7:]: tuned[name] - half[name].float() for name in state if VISUAL in name})
    assert vector.base_fingerprint == load_clip(clip_config, str(base)).fingerprint


def test_names_are_chosen(written, state, tuned, tau):
    pair = written("safetensors")
    own = TaskVector.from_checkpoints(*pair, names="own")
    assert_equal(dict(own), {name: tuned[name] - state[name] for name in state})
    assert own.base_fingerprint == fingerprint(state)
    assert_equal(dict(TaskVector.from_checkpoints(*pair, names="image_tower")), tau)
    assert set(TaskVector.from_checkpoints(state, tuned)) == set(state)  # of mappings with the same names, their own
    assert_equal(dict(TaskVector.from_checkpoints(state, tuned, names="image_tower")), tau)
    refused(ConfigurationError, "auto or own or image_tower, got 'tower'", pair_of, *pair, names="tower")


def test_a_prefix_of_any_model_is_removed_if_only_one_has_it(tmp_path):
    base = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(3)}
    tuned = {f"module.{name}": value + 1 for name, value in base.items()}
    pair = files.pytorch(tmp_path / "base.pt", base), files.pytorch(tmp_path / "tuned.pt", tuned)
    vector = TaskVector.from_checkpoints(*pair)
    assert_equal(dict(vector), {"a.weight": torch.ones(2, 3), "b.bias": torch.ones(3)})
    assert list(TaskVector.from_checkpoints(pair[1], pair[1])) == list(tuned)


def test_a_vision_model_of_transformers_has_no_projection(written, tuned, tau, tmp_path):
    short = files.transformers_folder(tmp_path / "vision", tuned, "CLIPVisionModel")
    expected = {**tau, "proj": torch.zeros_like(tau["proj"])}
    for base in (written("transformers")[0], written("whole module")[0]):
        pair = pair_of(base, short)
        assert pair.notes == ("the fine-tuned checkpoint has no projection; its difference there is zero",)
        assert_equal(dict(TaskVector.from_checkpoints(base, short)), expected)
    older = {name: value for name, value in files.transformers_names(tuned).items() if name.startswith("vision_model.")}
    older = files.pytorch(tmp_path / "pytorch_model.bin", older)  # as versions before 5 named them
    assert_equal(dict(TaskVector.from_checkpoints(written("transformers")[0], older)), expected)
    refused(StructureMismatchError, "image tower's projection", TaskVector.from_checkpoints, short, short)
    own = TaskVector.from_checkpoints(short, short, names="own")
    assert "encoder.layers.0.self_attn.q_proj.weight" in own


# Linearised encoders


@pytest.mark.parametrize("tower", [False, True], ids=["whole encoder", "image tower"])
def test_a_linearised_encoder_holds_both(tower, written, clip_config, state, tuned, tau, tmp_path):
    path = files.linearised(tmp_path / "linear.pt", clip_config, state, tuned, tower)
    vector = TaskVector.from_checkpoints(written("whole module")[0], path)
    assert_equal(dict(vector), tau)
    assert vector.base_fingerprint == TaskVector.from_checkpoints(*written("safetensors")).base_fingerprint
    other = files.pytorch(tmp_path / "other.pt", files.moved(state, 2, "visual.ln_post"))
    refused(
        StructureMismatchError,
        r"the θ0 of pretrained inside it, got another one: 2 tensors differ \(ln_post.weight, ln_post.bias\)",
        TaskVector.from_checkpoints,
        other,
        path,
    )
    refused(ConfigurationError, "parameters with names, got the numbered ones", pair_of, other, path, "own")
    refused(FileFormatError, "linear.pt: expected whole weights, got PyTorch state dict, lin", pair_of, path, other)
    refused(FileFormatError, "expected whole weights", load_clip, clip_config, str(path))


@pytest.mark.parametrize("tower", [False, True], ids=["whole encoder", "image tower"])
def test_a_linearised_encoder_of_another_architecture(tower, clip_config, state, tuned, tmp_path):
    path = files.linearised(tmp_path / "linear.pt", clip_config, state, tuned, tower)
    shallow = {name: value for name, value in state.items() if ".resblocks.1." not in name}
    shallow = files.pytorch(tmp_path / "shallow.pt", shallow)
    refused(StructureMismatchError, r"linear\.pt: linearised encoder: .* Name the arch", pair_of, shallow, path)
    narrow = {**state, "visual.proj": torch.ones(32, 7)}
    narrow = files.pytorch(tmp_path / "narrow.pt", narrow)
    refused(StructureMismatchError, r"instead of (visual\.)?(proj|text_projection) \(", pair_of, narrow, path)
    odd = {name: value for name, value in tower_of(state).items() if not name.startswith("ln_pre.")}
    refused(StructureMismatchError, "another kind of image", pair_of, files.pytorch(tmp_path / "odd.pt", odd), path)


# Adapters


@pytest.fixture
def adapter(state, tmp_path):
    """A folder that peft wrote, and the vision model that it was trained on."""
    import peft
    import transformers

    folder = files.transformers_folder(tmp_path / "vision", state, "CLIPVisionModelWithProjection")
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "fc1"])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", folder, adapted


def test_an_adapter_is_a_task_vector(adapter, written, state):
    folder, base, adapted = adapter
    with torch.no_grad():
        merged = adapted.merge_and_unload().state_dict()
    before = files.transformers_names(state)
    vector = TaskVector.from_checkpoints(base, folder, names="own")
    for name, value in vector.items():
        torch.testing.assert_close(value, merged[name] - before[name], rtol=0, atol=1e-6)
    assert vector["vision_model.encoder.layers.1.self_attn.q_proj.weight"].any()
    tower = TaskVector.from_checkpoints(written("transformers")[0], folder)
    parts = [vector[f"vision_model.encoder.layers.1.self_attn.{which}_proj.weight"] for which in "qkv"]
    assert torch.equal(tower["transformer.resblocks.1.attn.in_proj_weight"], torch.cat(parts))
    assert not tower["transformer.resblocks.1.attn.in_proj_weight"][32:64].any()  # keys have no adapter
    assert not tower["proj"].any()
    assert tower.base_fingerprint == TaskVector.from_checkpoints(*written("safetensors")).base_fingerprint


def test_an_adapter_in_the_wrong_place(adapter, written, clip_config):
    folder, base, _ = adapter
    refused(FileFormatError, "got PEFT adapter, 12 tensors. Give the model", pair_of, folder, base)
    refused(FileFormatError, "expected whole weights, got PEFT adapter", load_clip, clip_config, str(folder))
    refused(StructureMismatchError, "every parameter that the adapter changes", pair_of, written("timm")[0], folder)
    refused(ConfigurationError, r"section: expected one only for a PyTorch file", open_checkpoint, folder, "model")


# Our own runs


@pytest.fixture(scope="module")
def run(clip_config, clip_weights, tmp_path_factory):
    """``run(name, **settings)``: a folder with the checkpoint and the task vector of a fine-tuning run."""
    from lit_merge.commands.main import main

    def train(name, *settings):
        folder = tmp_path_factory.mktemp(name)
        tiny = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--data.task=digits", "--data.batch_size=4"]
        tiny += ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", f"--output={folder}"]
        tiny += [f"--model.model={clip_config}", f"--model.pretrained={clip_weights}", "--model.learning_rate=0.01"]
        assert main(["fit", *tiny, *settings]) == 0
        return folder

    return train


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize(
    "settings",
    [(), ("--model.linearized=true",), ("--model.linearized=true", "--model.trainable=LastBlocks(1)")],
    ids=["full", "linearised", "linearised, last block"],
)
def test_the_checkpoint_of_a_run_gives_its_task_vector(settings, run, written, tmp_path):
    if len(settings) == 2:
        settings = (settings[0], "--model.trainable=LastBlocks", "--model.trainable.count=1")
    folder = run("run", *settings)
    (checkpoint,) = folder.rglob("*.ckpt")
    expected = TaskVector.load(next(folder.rglob("task_vector.safetensors")))
    assert named_after(checkpoint) == folder.name
    for base in (written("safetensors")[0], written("transformers")[0]):
        vector = TaskVector.from_checkpoints(base, checkpoint)
        assert_equal(dict(vector), dict(expected))
        assert vector.base_fingerprint == expected.base_fingerprint
        assert any(value.any() for value in vector.values())
    refused(StructureMismatchError, "says it started from fingerprint", TaskVector.from_checkpoints,
            written("safetensors")[1], checkpoint)  # fmt: skip
    if settings:
        refused(FileFormatError, "of a linearised run, .* Give the model", pair_of, checkpoint, checkpoint)


@pytest.mark.usefixtures("few_images")
def test_the_checkpoint_of_a_low_rank_run_is_refused(run, written):
    (checkpoint,) = run("lora", "--model.lora=LoRA").rglob("*.ckpt")
    refused(
        FileFormatError, "got parametrised ones, such as a LoRA run's. Use", pair_of, written("timm")[0], checkpoint
    )


# Folders, sections, and what else can be wrong


def test_a_folder_holds_one_model(written, state, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    refused(FileFormatError, r"one model in this folder, got none\. Name the file", open_checkpoint, folder)
    files.pytorch(folder / "a.pt", state)
    assert open_checkpoint(folder).files == (folder / "a.pt",)
    files.pytorch(folder / "b.ckpt", state)
    refused(FileFormatError, r"one model in this folder, got a\.pt, b\.ckpt\.", open_checkpoint, folder)
    files.pytorch(folder / "pytorch_model.bin", state)
    assert open_checkpoint(folder).files == (folder / "pytorch_model.bin",)
    files.safetensors(folder / "other.safetensors", state)
    assert open_checkpoint(folder).container == "safetensors"
    files.safetensors(folder / "others.safetensors", state)
    refused(FileFormatError, r"one model in this folder, got other\.s", open_checkpoint, folder)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {}}))
    refused(
        FileFormatError, r"expected shards in safetensors, got pytorch_model\.bin\.", open_checkpoint, tmp_path / "old"
    )


def test_content_decides_not_the_name(written, state, tmp_path):
    shutil.copy(written("safetensors")[0], tmp_path / "a.pt")
    shutil.copy(written("state dict")[0], tmp_path / "b.safetensors")
    assert open_checkpoint(tmp_path / "a.pt").container == "safetensors"
    assert open_checkpoint(tmp_path / "b.safetensors").container == "PyTorch state dict"


def test_a_section_is_named_where_several_are(state, tuned, tau, tmp_path):
    path = files.pytorch(tmp_path / "two.pt", {"student": tuned, "teacher": state})
    refused(FileFormatError, "sections with tensors: student, teacher", open_checkpoint, path)
    refused(FileFormatError, "none under 'ema'; sections with tensors: student", open_checkpoint, path, "ema")
    opened = [open_checkpoint(path, section) for section in ("teacher", "student")]
    assert "section 'student'" in opened[1].describe()
    assert_equal(dict(TaskVector.from_checkpoints(*opened)), tau)
    plain = files.safetensors(tmp_path / "plain.safetensors", state)
    refused(ConfigurationError, "'model' for .*plain.safetensors, which has none", open_checkpoint, plain, "model")


def test_what_is_no_checkpoint(written, state, tmp_path, clip_config):
    missing = tmp_path / "nothing.pt"
    refused(FileFormatError, r"expected a checkpoint, got nothing \(No such file or folder\)", open_checkpoint, missing)
    refused(ConfigurationError, "which is no file", load_clip, clip_config, str(missing))
    text = tmp_path / "notes.txt"
    text.write_text("θ0 and θ, to be copied from the other machine")
    refused(FileFormatError, "notes.txt: expected a safetensors file", open_checkpoint, text)
    (tmp_path / "empty.pt").touch()
    refused(FileFormatError, "empty.pt: expected", open_checkpoint, tmp_path / "empty.pt")
    vector = tmp_path / "vector.safetensors"
    TaskVector.from_checkpoints(*written("safetensors")).save(vector)
    refused(FileFormatError, "whole weights, got a task vector. Give it as", pair_of, vector, written("timm")[1])
    refused(FileFormatError, "whole weights, got a task vector. Give it as", pair_of, written("timm")[1], vector)


def test_what_does_not_fit_is_said_by_its_size(written, tmp_path, clip_config):
    wide = nn.ModuleDict({"visual": load_clip("lit-tiny", "random").visual})
    path = files.pytorch(tmp_path / "wide.pt", wide.state_dict())
    refused(
        StructureMismatchError,
        r"wide\.pt: expected an image tower of 2 blocks of width 32 as in .*a\.pt, got \d+ blocks of width \d+\. Give",
        pair_of,
        written("whole module")[0],
        path,
    )
    head = files.pytorch(tmp_path / "head_MNIST.pt", {"weight": torch.ones(10, 12), "bias": torch.ones(10)})
    refused(StructureMismatchError, r"head_MNIST\.pt: .*image tower, got none", pair_of, written("timm")[0], head)


def test_values_that_are_not_finite_are_refused_when_they_are_read(written, tuned, tmp_path):
    broken = {**tuned, "visual.proj": torch.full((32, 12), torch.nan)}
    vector = TaskVector.from_checkpoints(written("timm")[0], files.pytorch(tmp_path / "nan.pt", broken))
    refused(NonFiniteError, "NaN or infinity in proj", vector.__getitem__, "proj")
    refused(
        NonFiniteError, "expected a finite difference, got NaN", lambda: list(stream(vector, ["ln_post.bias", "proj"]))
    )
    refused(NonFiniteError, "NaN or infinity in proj", vector.save, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_differing_reads_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_merge.checkpoints.pairing.ties._ELEMENTS", 4)
    first = {"same": torch.arange(10.0), "last": torch.arange(10.0), "long": torch.ones(3), "only": torch.ones(1)}
    second = {**first, "last": torch.cat([torch.arange(9.0), torch.zeros(1)]), "long": torch.ones(4)}
    second["same"] = first["same"].half()
    del second["only"]
    one, other = (open_checkpoint(files.pytorch(tmp_path / f"{i}.pt", m)) for i, m in enumerate((first, second)))
    assert differing(one, other) == ["last", "long"]


def test_an_opened_checkpoint_can_be_sent_to_other_processes(written):
    opened = open_checkpoint(written("older state dict")[0])
    again = pickle.loads(pickle.dumps(opened))
    assert_equal(dict(again), dict(opened))
    assert (repr(again), again.describe()) == (f"OpenedCheckpoint('{opened.path}')", opened.describe())


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("checkpoints/ViT-B-32/MNISTVal/finetuned.pt", "MNISTVal"),
        ("checkpoints/ViT-B-32/zeroshot.pt", "ViT-B-32"),
        ("runs/digits/checkpoints/epoch=1-step=40.ckpt", "digits"),
        ("runs/signs/checkpoints", "signs"),
        ("models/maths.safetensors", "maths"),
        ("models/maths/model.safetensors.index.json", "maths"),
        ("hf://tanganke/clip-vit-base-patch32_sun397", "clip-vit-base-patch32_sun397"),
        ("hf://owner/cars/model.safetensors", "cars"),
    ],
)
def test_a_path_names_a_task(path, task):
    assert named_after(path) == task


def test_weights_are_nowhere_unpickled():
    """Lightning resumes its own checkpoints; published tables of coefficients are no weights."""
    package = Path(difference.__file__).parents[1]
    callers = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "pickle.load", "pickle.loads"):
                callers.add(file.relative_to(package).as_posix())
    assert callers <= {"vectors/published_coefficients.py"}


def test_weight_normalisation_is_no_parametrisation_of_a_training(tmp_path):
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    torch.save(network.state_dict(), tmp_path / "normalised.pt")
    opened = open_checkpoint(tmp_path / "normalised.pt")
    opened.require_weights()
    assert sorted(opened) == ["0.bias", *(f"0.parametrizations.weight.original{one}" for one in (0, 1))]
