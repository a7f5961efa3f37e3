"""PyTorch files, written by torch itself, are read bit for bit, lazily, and without importing what they name."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import lightning
import numpy as np
import open_clip
import pytest
import torch
from builders.damaged_files import WEIGHT, archive, call, named, pickled, state_dict, stream, text
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.checkpoints.pickles.torch_files import TorchFile, is_torch_file, open_torch_file
from lit_merge.errors import FileFormatError

WHOLE = torch.arange(24.0).view(4, 6)
TENSORS = {
    "float64": torch.tensor([[0.1, -2.0]], dtype=torch.float64),
    "float32": torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.tensor([1.5, -3e38, float("nan")], dtype=torch.bfloat16),
    "float16": torch.tensor([0.1, 65504.0], dtype=torch.float16),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "int32": torch.tensor([7], dtype=torch.int32),
    "int16": torch.tensor([-7], dtype=torch.int16),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "uint8": torch.tensor([255], dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "complex64": torch.tensor([1 + 2j]),
    "float8": torch.tensor([0.5, -0.5]).to(torch.float8_e4m3fn),
    "uint16": torch.tensor([1, 40_000]).to(torch.uint16),
    "scalar": torch.tensor(3.25),
    "empty": torch.empty(0, 4),
    "parameter": nn.Parameter(torch.ones(2, 2)),
    "whole": WHOLE,
    "the same": WHOLE,
    "transposed": WHOLE.t(),
    "row": WHOLE[2],
    "column": WHOLE[:, 1],
    "block": WHOLE[1:3, 2:5],
    "every second": WHOLE.reshape(-1)[1::2],
    "expanded": torch.tensor([[5.0], [6.0]]).expand(2, 3),
    "channels last": torch.arange(48.0).view(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "of size one": torch.arange(3.0).as_strided((1, 3, 1), (77, 1, 5)),
}


def save(value: object, path: Path, older: bool = False, protocol: int = 2) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=not older, pickle_protocol=protocol)
    return path


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names, shapes, dtypes and bytes."""
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert not got[name].requires_grad
        assert got[name].is_contiguous()
        assert got[name].data_ptr() % tensor.dtype.itemsize == 0
        assert raw(got[name]) == raw(tensor), name


def raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.bin"


# State dicts


@pytest.mark.parametrize(("older", "protocol"), [(False, 2), (False, 3), (False, 4), (False, 5), (True, 2), (True, 4)])
def test_state_dicts_bit_for_bit(path, older, protocol):
    save(TENSORS, path, older, protocol)
    file = open_torch_file(path)
    assert is_torch_file(path)
    assert_same(file, TENSORS)
    assert (file.kind, file.section, file.other, file.path) == ("state dict", "", {}, path)
    for name, tensor in TENSORS.items():
        assert file.shape(name) == tensor.shape
        assert file.dtype(name) == tensor.dtype
    assert len(file) == len(TENSORS)
    assert "float32" in file
    assert "nothing" not in file
    for read in (file.__getitem__, file.slicer, file.shape):
        with pytest.raises(KeyError):
            read("nothing")
    assert repr(file) == f"TorchFile({str(path)!r}, section='')"


@pytest.mark.parametrize("older", [False, True])
def test_parts_of_tensors(path, older):
    file = open_torch_file(save(TENSORS, path, older))
    for name, tensor in TENSORS.items():
        flat, read = tensor.detach().contiguous().reshape(-1), file.slicer(name)
        for start, stop in ((0, len(flat)), (len(flat) // 3, len(flat) - len(flat) // 3), (len(flat), len(flat))):
            out = torch.empty(stop - start, dtype=tensor.dtype)
            read(start, stop, out)
            assert raw(out) == raw(flat[start:stop]), name
    out = torch.empty(6, dtype=torch.float64)
    file.slicer("whole")(3, 9, out)
    assert out.tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert [(name, raw(piece)) for name, piece in file.stream(["row", "int8"])] == [
        ("row", raw(TENSORS["row"])),
        ("int8", raw(TENSORS["int8"])),
    ]


@pytest.mark.parametrize("older", [False, True])
def test_every_read_is_a_tensor_of_its_own(path, older):
    file = open_torch_file(save(TENSORS, path, older))
    before = path.read_bytes()
    for name in TENSORS:
        file[name].zero_()
    assert_same(file, TENSORS)
    assert path.read_bytes() == before


def test_a_copy_opens_the_file_again(path):
    save({"epoch": 1, "model": {"a": torch.ones(2)}, "ema": {"a": torch.zeros(2)}}, path)
    for section in (None, "ema"):
        file = open_torch_file(path, section)
        sent = pickle.dumps(file)
        assert len(sent) < 500
        for other in (pickle.loads(sent), copy.deepcopy(file)):
            assert_same(other, dict(file))
            assert other.section == (section or "model")


def test_a_file_that_changed_is_not_read_on(path):
    file = open_torch_file(save(TENSORS, path))
    save({**TENSORS, "more": torch.zeros(5)}, path)
    for read in (file.__getitem__, file.slicer):
        with pytest.raises(
            FileFormatError, match=r"expected the file as it was opened, but it has changed\. Load it aga"
        ):
            read("whole")


def test_names_of_ordered_dicts_and_their_attributes(path):
    ordered = nn.Linear(2, 2).state_dict()
    assert ordered._metadata
    for older in (False, True):
        assert_same(open_torch_file(save(ordered, path, older)), ordered)
    assert_same(open_torch_file(save(OrderedDict([("b", WHOLE), ("a", WHOLE)]), path)), {"b": WHOLE, "a": WHOLE})


def test_without_checksums(path):
    torch.serialization.set_crc32_options(False)
    try:
        save(TENSORS, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as content:
        assert {entry.CRC for entry in content.infolist()} == {0}
    assert_same(open_torch_file(path), TENSORS)


# Laziness


def test_opening_reads_little(path):
    """A sparse file of 2 GiB: torch reserves the space of the tensors and writes none of them."""
    with torch.serialization.skip_data():
        torch.save({f"layer.{index}": torch.empty(1 << 25) for index in range(16)}, path)
    size, occupied = path.stat().st_size, path.stat().st_blocks * 512
    assert size > 1 << 31
    assert occupied < 1 << 20
    before = read_so_far()
    file = open_torch_file(path)
    assert file.shape("layer.15") == (1 << 25,)
    part = torch.ones(1000)
    file.slicer("layer.15")((1 << 25) - 1000, 1 << 25, part)
    assert read_so_far() - before < 100_000
    assert not part.any()


def test_tensors_beyond_four_gigabytes(path):
    """Sizes and places that need zip64."""
    last = torch.arange(5.0)
    with torch.serialization.skip_data():
        torch.save({"large": torch.empty((1 << 30) + 7), "last": last}, path)
    file = open_torch_file(path)
    assert path.stat().st_size > 1 << 32
    assert file.shape("large") == ((1 << 30) + 7,)
    with path.open("r+b") as sparse:  # the space was reserved, nothing written
        sparse.seek(file.slicer("last")._start)
        sparse.write(raw(last))
    file = open_torch_file(path)
    assert_same({"last": file["last"]}, {"last": last})
    end = torch.ones(10)
    file.slicer("large")((1 << 30) - 3, (1 << 30) + 7, end)
    assert not end.any()


def test_opening_does_not_look_at_tensors(path):
    names = [f"layer.{index}" for index in range(8)]
    save({name: torch.zeros(10_000) for name in names}, path, older=True)
    content = path.read_bytes()
    begin = content.index((10_000).to_bytes(8, "little")) + 8
    path.write_bytes(content[:begin] + b"\xff" * 40_000 + content[begin + 40_000 :])
    before = read_so_far()
    file = open_torch_file(path)
    assert read_so_far() - before < 50_000
    assert sum(int(file[name].isnan().all()) for name in names) == 1


def read_so_far() -> int:
    """Bytes that this process has asked to read."""
    return int(Path("/proc/self/io").read_text().split()[1])


# What older versions wrote


def test_strings_of_python_2(path):
    path.write_bytes(archive(pickled(b"}U\x06weight" + WEIGHT + b"sT\x04\0\0\0noteU\x02\xe4!s")))
    file = open_torch_file(path)
    assert_same(file, {"weight": torch.arange(4.0)})
    assert file.other == {"note": "ä!"}


def test_dicts_from_pairs(path):
    pairs = b"](](" + text("weight") + WEIGHT + b"e](" + text("note") + b"K\x03ee"
    path.write_bytes(archive(pickled(call("collections", "OrderedDict", pairs))))
    file = open_torch_file(path)
    assert_same(file, {"weight": torch.arange(4.0)})
    assert file.other == {"note": 3}


def test_views_of_storages(path):
    """The first versions could save a storage as part of another one."""
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04"
    for first, count, expected in ((1, 3, [1.0, 3.0]), (0, 4, [0.0, 2.0]), (2, 3, None)):
        view = b"(" + text("v") + b"K" + bytes([first]) + b"K" + bytes([count]) + b"ttQ"
        rest = b"K\x00(K\x02t(K\x02t"
        path.write_bytes(
            stream(pickled(b"}" + text("a") + call("torch._utils", "_rebuild_tensor", storage + view, rest) + b"s"))
        )
        if expected is None:
            with pytest.raises(FileFormatError, match=r"got a view outside its storage\. Copy or write it again"):
                open_torch_file(path)
        else:
            assert open_torch_file(path)["a"].tolist() == expected


# Whole modules


class Branch(nn.Module):
    """Buffers that are saved and that are not, a parameter that is absent, a module that is absent."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("saved", torch.arange(3.0))
        self.register_buffer("hidden", torch.arange(4.0), persistent=False)
        self.register_buffer("absent", None)
        self.weight = nn.Parameter(torch.randn(2, 2))
        self.register_parameter("bias", None)
        self.register_module("nothing", None)
        self.extra = torch.ones(3)  # an attribute is no parameter


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.first = Branch()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.MultiheadAttention(4, 2))
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight
        self.again = self.first
        self.more = nn.ParameterDict({"a": torch.ones(2)})
        self.logger = logging.getLogger("model")
        self.normalise = functools.partial(nn.LayerNorm, eps=1e-6)
        self.device = torch.device("cpu")
        self.bound = self.first.extra_repr
        self.numbers = np.arange(3), np.float32(0.5), {1, 2}, frozenset({"a"}), 3 + 4j, b"bytes", range(3)


@pytest.mark.parametrize(("older", "protocol"), [(False, 2), (False, 5), (True, 2)])
def test_whole_modules_are_flattened_as_state_dict_would(path, older, protocol):
    model = Model()
    file = open_torch_file(save(model, path, older, protocol))
    assert file.kind == "whole module"
    assert_same(file, model.state_dict())
    assert {"first.saved", "again.saved", "layers.1.num_batches_tracked", "head.weight"} <= set(file)
    assert not {"first.hidden", "first.extra", "first.bias"} & set(file)
    assert f"{__name__}.Branch" in file.classes
    assert_same(open_torch_file(save({"epoch": 3, "ema": model}, path, older), "ema"), model.state_dict())


class ImageEncoder(nn.Module):
    """An encoder as the task-arithmetic programs keep it: the model, its transforms, and where it was cached."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train_preprocess = open_clip.image_transform(16, is_train=True)
        self.val_preprocess = open_clip.image_transform(16, is_train=False)
        self.activation = torch.nn.functional.gelu
        self.cache_dir = None
        self.args = {"lr": 1e-5, "function": torch.no_grad, "tokenizer": open_clip.SimpleTokenizer()}


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 8, "head_width": 4, "patch_size": 8, "image_size": 16}
    text = {"context_length": 6, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=4, vision_cfg=vision, text_cfg=text).eval()


@pytest.mark.parametrize("older", [False, True])
def test_published_image_encoders(path, clip, older):
    encoder = ImageEncoder(clip)
    file = open_torch_file(save(encoder, path, older))
    assert_same(file, encoder.state_dict())
    assert "model.visual.transformer.resblocks.1.attn.in_proj_weight" in file
    assert {f"{__name__}.ImageEncoder", "open_clip.model.CLIP", "torchvision.transforms.transforms.Compose"} <= set(
        file.classes
    )


def test_classes_that_are_not_installed(path, clip, tmp_path):
    """In a process that knows neither the class nor open_clip nor torchvision, which are not imported either."""
    save(ImageEncoder(clip), path)
    program = (
        "import sys\n"
        "sys.modules['open_clip'] = sys.modules['torchvision'] = None\n"
        "from lit_merge.checkpoints.pickles.torch_files import open_torch_file\n"
        f"file = open_torch_file({str(path)!r})\n"
        "print(len(file), sum(float(value.double().abs().sum()) for value in file.values()))\n"
        "print(sorted({name.partition('.')[0] for name in file.classes} - set(sys.modules) - {'__builtin__'}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    expected = ImageEncoder(clip).state_dict()
    total = sum(float(value.double().abs().sum()) for value in expected.values())
    assert run.stdout.splitlines() == [f"{len(expected)} {total}", f"['regex', '{__name__.partition('.')[0]}']"]


# TorchScript


@pytest.mark.parametrize("how", ["trace", "script"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_script_archives(path, clip, how):
    if how == "trace":
        inputs = (torch.zeros(1, 3, 16, 16), torch.zeros(1, 6, dtype=torch.long))
        model = torch.jit.trace(clip, inputs, check_trace=False, strict=False)
        expected = clip.state_dict()
    else:
        plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        model, expected = torch.jit.script(plain), plain.state_dict()
    torch.jit.save(model, path)
    file = open_torch_file(path)
    assert (file.kind, file.section) == ("TorchScript archive", "")
    assert is_torch_file(path)
    loaded = torch.jit.load(path).state_dict()
    assert set(file) == set(loaded) == set(expected) | (set(loaded) - set(expected))
    for name, tensor in loaded.items():
        assert raw(file[name]) == raw(tensor)
        assert file.shape(name) == tensor.shape


# Checkpoints with sections


class Task(lightning.LightningModule):
    def __init__(self, rate: float, layers: list[int], options: dict[str, object]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Linear(3, 2)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams["rate"])


@pytest.mark.filterwarnings("ignore")
def test_lightning_checkpoints(tmp_path):
    module = Task(rate=0.25, layers=[1, 2], options={"path": Path("x"), "seed": np.int64(3), "name": None})
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 3)), batch_size=2)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, data)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    file = open_torch_file(path)
    assert (file.kind, file.section) == ("state dict", "state_dict")
    assert_same(file, module.state_dict())
    assert file.other["pytorch-lightning_version"] == lightning.__version__
    assert (file.other["epoch"], file.other["global_step"]) == (1, 2)
    kind = f"<{type(Path()).__module__}.PosixPath>"  # pathlib._local in Python 3.13
    given = file.other["hyper_parameters"]
    assert (given["rate"], given["layers"]) == (0.25, [1, 2])
    assert given["options"] == {"path": kind, "seed": given["options"]["seed"], "name": None}
    assert given["options"]["seed"].endswith("multiarray.scalar>")
    (state,) = file.other["optimizer_states"]
    assert state["state"]["0"]["exp_avg"] == "<tensor (2, 3) float32>"
    assert state["param_groups"][0]["lr"] == 0.25


def test_sections(path):
    first, second, stray = {"a": torch.ones(1)}, {"a": torch.zeros(1)}, torch.tensor(0.5)
    for name in ("state_dict", "model_state_dict", "model"):
        file = open_torch_file(save({"loss": stray, "epoch": 3, name: {**first, "name": "ViT"}, "ema": second}, path))
        assert file.section == name
        assert_same(file, first)
        assert file.other == {"epoch": 3, "ema": {"a": "<tensor (1,) float32>"}, name: {"name": "ViT"}}
    save({"model": second, "state_dict": first, "loss": stray}, path)
    assert_same(open_torch_file(path), first)
    assert_same(open_torch_file(path, "model"), second)
    assert_same(open_torch_file(path, ""), {"loss": stray})
    save({"a": torch.ones(1), "name": "ViT-B-32", "weights": [1, 2.5, None, True]}, path)
    assert open_torch_file(path).other == {"name": "ViT-B-32", "weights": [1, 2.5, None, True]}


@pytest.mark.parametrize(
    ("value", "section", "message"),
    [
        (
            {"ema": {"a": torch.ones(1)}, "student": {"b": torch.ones(1)}, "epoch": 1},
            None,
            r"expected tensors, got none at the top or under state_dict, model_state_dict, model; sections with "
            r"tensors: ema, student\. Name one of them as the section\.$",
        ),
        (
            {"ema": {"a": torch.ones(1)}},
            "model",
            r"got none under 'model'; sections with tensors: ema\. Name one of them as the section\.$",
        ),
        (
            {"a": torch.ones(1)},
            "a",
            r"got none under 'a', and no section with tensors\. Save the tensors as a state dict",
        ),
        (
            {"epoch": 1},
            None,
            r"got none at the top or under state_dict, .*, and no section with tensors\. Save the tens",
        ),
        (
            {"epoch": 1},
            "",
            r"got none in the dict that the file holds\. Save the tensors as a state dict, with torch\.save",
        ),
        (torch.ones(3), None, "got none in the StoredTensor that the file holds"),
        ([torch.ones(3)], None, "got none in the list that the file holds"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), None, r"got none in the torch\.optim\.sgd\.SGD that the file"),
        (nn.ReLU(), None, r"got none in the torch\.nn\.modules\.activation\.ReLU that the file holds"),
        ({3: torch.ones(1)}, None, r"got one named 3\. Rename it\.$"),
        ({("a", "b"): torch.ones(1)}, None, r"got one named <object>\. Rename it\.$"),
        (
            {"a": torch.ones(2).to_sparse()},
            None,
            "got a sparse tensor as a. Convert it to an ordinary dense tensor first",
        ),
        (
            {"a": torch.empty(2, device="meta")},
            None,
            "got a meta tensor no storage as a. Convert it to an ordinary dense",
        ),
        (
            {"a": torch.ones(1, dtype=torch.complex64).conj()},
            None,
            "got a conjugated or negated tensor as a. Convert it",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_holds_no_tensors_to_take(path, value, section, message):
    save(value, path)
    with pytest.raises(FileFormatError, match=message) as caught:
        open_torch_file(path, section)
    assert str(caught.value).startswith(f"{path}: expected tensors, got ")
    assert str(caught.value).isprintable()


def test_tensors_that_cannot_be_read_matter_only_where_they_are_taken(path):
    save({"state_dict": {"a": torch.ones(2)}, "other": {"b": torch.ones(2).to_sparse()}}, path)
    assert_same(open_torch_file(path), {"a": torch.ones(2)})
    with pytest.raises(FileFormatError, match="got a sparse tensor as b"):
        open_torch_file(path, "other")


def test_what_is_beside_the_tensors_is_a_plain_tree(path):
    deep: list[object] = []
    for _ in range(60):
        deep = [deep]
    around: dict[str, object] = {"x": 1}
    around["self"] = around
    beside = {"deep": deep, "around": around, "long": "a" * (2 << 20), "large": 1 << 70, "many": [0] * 200_000}
    other = open_torch_file(save({"a": torch.ones(1), **beside, "type": nn.Linear, 5: 6}, path)).other
    level, value = 0, other["deep"]
    while isinstance(value, list):
        level, value = level + 1, value[0]
    assert (level, value) == (49, "<…>")
    assert other["around"]["self"]["self"]["x"] == 1
    assert (other["long"], other["large"]) == ("<string of 2,097,152 characters>", "<large integer>")
    assert (other["many"], other["type"], other["5"]) == ("<…>", "<torch.nn.modules.linear.Linear>", 6)


# What is a PyTorch file


def test_what_a_file_is_decides_its_content(tmp_path, path):
    """Not its name: a safetensors file may begin with the bytes of a pickle."""
    begins = set()
    for length in range(500, 600, 8):
        save_file({"a": torch.ones(1)}, path, {"x": "y" * length})
        begins.add(path.read_bytes()[:2])
        assert not is_torch_file(path)
    assert b"\x80\2" in begins
    for content in (b"", b"P", b"{}", b"\x80", b"\x80\x09abcdefgh", b"PY"):
        path.write_bytes(content)
        assert not is_torch_file(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert is_torch_file(path)
    with pytest.raises(
        FileFormatError, match=r"none: expected a file of torch\.save or torch\.jit\.save, got No such file"
    ):
        is_torch_file(tmp_path / "none")
    with pytest.raises(FileFormatError, match="got a folder or device"):
        TorchFile(tmp_path)


def test_files_written_by_hand_are_read_as_torch_reads_them(path):
    """The fixtures of the hostile files are whole where they should be."""
    path.write_bytes(archive(state_dict()))
    assert_same(open_torch_file(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("protocol", [0, 1])
def test_protocols_that_are_not_read_are_named(tmp_path, protocol):
    path = tmp_path / "old.pt"
    torch.save({"w": torch.ones(3)}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match=r"with pickle protocol 2 or later, got protocol 0 or 1\. Save the"):
        open_torch_file(path)


def test_paths_of_python_3_13(path):
    """Which names the module of paths pathlib._local."""
    root = call("pathlib._local", "PosixPath", text("/data"))
    path.write_bytes(archive(state_dict(text("root"), root)))
    file = open_torch_file(path)
    assert list(file) == ["weight"]
    assert file.other == {"root": "<pathlib._local.PosixPath>"}


def test_a_pointer_of_git_lfs(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    with pytest.raises(FileFormatError, match=r"or torch\.jit\.save, got a pointer of Git LFS\. Run git lfs pull\.$"):
        TorchFile(path)
