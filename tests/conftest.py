"""Shared by the tests: tiny models, tiny data, a trainer that is silent and writes below the test's own folder."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Several test processes share the cores; read when torch is imported, here and in the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# The tests write tens of thousands of small files, each synchronised to disk. In memory, where there is room for them,
# this takes no time; what a test that passed has written is deleted at once (pyproject.toml).
MEMORY, ROOM = Path("/dev/shm"), 8 * 2**30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Read when triton is imported, which Lightning does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import lightning as L
import numpy as np
import pytest
from builders.fork_server import ForkServer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_merge.data.batch import ImageBatch
from lit_merge.data.embedded.tasks import EMBEDDED_TASKS, cache_key, generate_split
from lit_merge.files.cache import Cache
from lit_merge.models import full_clip_model, save_clip

FEW = {"train": 128, "val": 32, "test": 61}

CLIP_CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


class TinyEncoder(nn.Module):
    """Images ``[B, 3, S, S]`` -> features ``[B, 6]``: 3·S² inputs, five hidden units."""

    def __init__(self, size: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * size**2, 5, dtype=dtype)
        self.outer = nn.Linear(5, 6, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(images.flatten(1))))


class TinyData(L.LightningDataModule):
    """The same batches in the same order every epoch, for every split."""

    def __init__(self, batches: Sequence[ImageBatch], name: str = "shapes", classes: Sequence[str] = ("a", "b", "c")):
        super().__init__()
        self.batches, self.name, self.classes = list(batches), name, tuple(classes)
        self.templates = ("a photo of a {}.", "{}")

    def loader(self) -> Any:
        return DataLoader(self.batches, batch_size=None, collate_fn=_unchanged)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

    def predict_names(self) -> list[str]:
        return [f"image, {index}.png" for index in range(1 + max(int(b.indices.max()) for b in self.batches))]


class TinyTasks(L.LightningDataModule):
    """Several :class:`TinyData` side by side, as :class:`lit_merge.data.MultiTaskDataModule` has them."""

    def __init__(self, tasks: dict[str, TinyData]) -> None:
        super().__init__()
        self.tasks = dict(tasks)

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(self.tasks)

    def subset(self, names: Sequence[str]) -> TinyTasks:
        return type(self)({name: self.tasks[name] for name in names})

    def train_dataloader(self) -> Any:
        return L.pytorch.utilities.CombinedLoader({name: task.loader() for name, task in self.tasks.items()})

    def val_dataloader(self) -> Any:
        return [task.loader() for task in self.tasks.values()]

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


def _unchanged(batch: Any) -> Any:
    return batch


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Collections of garbage, of which a suite makes one after every stage, pass over what is imported by now."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What was frozen ends as everything does."""
    gc.unfreeze()


@pytest.fixture
def tiny_encoder() -> Callable[..., TinyEncoder]:
    """``tiny_encoder(size=4, dtype=torch.float32)``: always the same weights."""

    def build(size: int = 4, dtype: torch.dtype = torch.float32) -> TinyEncoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TinyEncoder(size, dtype)

    return build


@pytest.fixture
def tiny_head() -> Callable[..., nn.Linear]:
    """``tiny_head(classes=3, seed=1)``: 6 features -> logits."""

    def build(classes: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Linear:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Linear(6, classes, dtype=dtype)

    return build


@pytest.fixture
def tiny_batches() -> Callable[..., list[ImageBatch]]:
    """``tiny_batches(count=6, size=8, …)``: random images with labels; indices run through all batches."""

    def build(
        count: int = 6,
        size: int = 8,
        side: int = 4,
        classes: int = 3,
        dtype: torch.dtype = torch.float32,
        seed: int = 2,
    ) -> list[ImageBatch]:
        generator = torch.Generator().manual_seed(seed)
        return [
            ImageBatch(
                torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64).to(dtype),
                torch.randint(classes, (size,), generator=generator),
                torch.arange(size) + number * size,
            )
            for number in range(count)
        ]

    return build


@pytest.fixture
def tiny_data(tiny_batches: Callable[..., list[ImageBatch]]) -> Callable[..., TinyData]:
    """``tiny_data(name=…, classes=…, …)``: a data module of :func:`tiny_batches`; or of ``batches``."""

    def build(
        batches: Sequence[ImageBatch] | None = None,
        name: str = "shapes",
        classes: Sequence[str] = ("a", "b", "c"),
        **settings: Any,
    ) -> TinyData:
        chosen = tiny_batches(classes=len(classes), **settings) if batches is None else batches
        return TinyData(chosen, name, classes)

    return build


@pytest.fixture
def tiny_tasks() -> type[TinyTasks]:
    """``tiny_tasks({name: data module})``."""
    return TinyTasks


@pytest.fixture
def silent_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """``silent_trainer(max_steps=6, …)``: one CPU process, no bars, logs or checkpoints unless asked for."""

    def build(**settings: Any) -> L.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path / "run"),
        }
        return L.Trainer(**{**defaults, **settings})

    return build


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., str]:
    """``image_folder(count=8, side=6)``: train, val and test of so many random images of discs, rings and stars."""

    def draw(count: int = 8, side: int = 6) -> str:
        generator = torch.Generator().manual_seed(count)
        root = tmp_path / f"images-{count}-{side}"
        for split in ("train", "val", "test"):
            for name in ("disc", "ring", "star"):
                (root / split / name).mkdir(parents=True)
                for number in range(count):
                    pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=generator).numpy()
                    Image.fromarray(pixels).save(root / split / name / f"{number}.png")
        return str(root)

    return draw


@pytest.fixture(scope="session")
def clip_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a JSON config of a CLIP that costs next to nothing: 32 pixels, width 32, two layers."""
    path = tmp_path_factory.mktemp("clip") / "tiny-clip.json"
    path.write_text(json.dumps(CLIP_CONFIG), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def clip_weights(clip_config: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of float32 weights for :func:`clip_config`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = full_clip_model(clip_config)[0].state_dict()
    return str(save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip.safetensors", state, {}, torch.float32))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own; otherwise the tests use the user's, where the embedded suite may lie."""
    path = tmp_path / "cache"
    monkeypatch.setenv("LIT_MERGE_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def write_colours() -> Callable[..., Path]:
    """``write_colours(folder, count=10, seed=0)``: write a folder of PNGs for each of three colours; returns it."""

    def write(path: Path, count: int = 10, seed: int = 0) -> Path:
        pixels = np.random.default_rng(seed)
        for colour, centre in {"blue": (30, 30, 200), "green": (30, 200, 30), "dark_red": (120, 20, 20)}.items():
            (path / colour).mkdir(parents=True)
            for number in range(count):
                noisy = pixels.integers(-30, 30, (36, 40, 3)) + np.array(centre)
                Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path / colour / f"{number}.png")
        return path

    return write


@pytest.fixture
def colour_folder(tmp_path: Path, write_colours: Callable[..., Path]) -> Callable[..., Path]:
    """``colour_folder(name="colours", count=10)``: such a folder in the test's own."""
    return lambda name="colours", count=10: write_colours(tmp_path / name, count)


@pytest.fixture(scope="session")
def few_images_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the splits of the embedded tasks are short; heads are cached here too."""
    folder = tmp_path_factory.mktemp("cache")
    cache = Cache("embedded", folder / "embedded")
    for task in EMBEDDED_TASKS.values():
        few = replace(task, sizes=tuple(FEW.items()))
        for split, count in FEW.items():
            images, labels = (torch.from_numpy(array[:count]) for array in generate_split(few, split))
            tensors = {"images": images.permute(0, 3, 1, 2).contiguous(), "labels": labels}
            cache.write_tensors(cache_key(task.name, split), tensors)
    return folder


@pytest.fixture(scope="module")
def few_images(few_images_cache: Path) -> Iterator[None]:
    """The embedded tasks are short, for the processes that the module starts as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_MERGE_CACHE", str(few_images_cache))
        yield


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """``fork_server.run([(program, environment), …])``: exit codes and outputs of processes that start at once."""
    server = ForkServer(tmp_path_factory.mktemp("programs"))
    yield server
    server.close()
