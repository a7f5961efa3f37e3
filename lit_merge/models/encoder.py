"""CLIP models: the image tower that is fine-tuned and merged, its preprocessing, and the text side for the heads.

This is the only file that imports open_clip, and it does so when a model is built, not when it is imported.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.layouts.towers import image_tower, recognise
from lit_merge.errors import (
    ConfigurationError,
    DataError,
    FileFormatError,
    StructureMismatchError,
    did_you_mean,
    first_few,
    one_line,
)
from lit_merge.files.hub import local_path
from lit_merge.files.lazy import Computed, LazyMapping, Selected
from lit_merge.models.released import RELEASED, released_weights
from lit_merge.models.text import NOT_TEXT, TextTower, is_text
from lit_merge.models.weights import open_weights
from lit_merge.naming import number_of_blocks
from lit_merge.params import Params, check_finite, check_same_structure, fingerprint

__all__ = [
    "ClipModel",
    "Preprocessing",
    "clip_activation",
    "clip_config",
    "empty_image_tower",
    "full_clip_model",
    "hub_repository",
    "load_clip",
    "stored_tower",
    "text_tensors",
    "weights_path",
]

_ASSETS = Path(__file__).parent / "assets"
_SHIPPED = "lit-tiny"
_PATH_SUFFIXES = (".json", ".pt", ".pth", ".bin", ".safetensors")
_INTERPOLATIONS = ("bicubic", "bilinear", "random")
_RESIZE_MODES = ("shortest", "longest", "squash")
# What open_clip raises of a config that it cannot build, files that it does not get, and packages that are missing.
_REFUSALS = (
    *(ImportError, OSError, TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError),
    ZeroDivisionError,
)
# CLIP's own normalisation (Radford et al. 2021).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# The other tower while one is built: small, and thrown away.
_NO_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
_NO_VISION = {"image_size": 8, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8}


@dataclass(frozen=True)
class Preprocessing:
    """How images become the encoder's input.

    Attributes:
        image_size: side S of the square input, in pixels.
        mean: per-channel mean, of values in [0, 1].
        std: per-channel standard deviation, positive.
        interpolation: ``bicubic``, ``bilinear`` or ``random`` (which is bicubic in evaluation).
        resize_mode: ``shortest`` (shorter side to S, then centre crop), ``longest`` (longer side to S, then pad) or
            ``squash`` (both sides to S).

    Raises:
        ConfigurationError: a field is out of these ranges.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = _MEAN
    std: tuple[float, float, float] = _STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigurationError(f"image_size: expected a positive integer, got {self.image_size}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigurationError(
                f"mean and std: expected three numbers each, std positive, got {self.mean} and {self.std}."
            )
        for name, valid in (("interpolation", _INTERPOLATIONS), ("resize_mode", _RESIZE_MODES)):
            if (value := getattr(self, name)) not in valid:
                raise ConfigurationError(f"{name}: expected one of {', '.join(valid)}, got {value!r}.")

    def transform(self, training: bool = False) -> Callable[[Any], Tensor]:
        """open_clip's own transform, PIL image -> float tensor ``[3, S, S]``.

        Args:
            training: whether to crop and resize at random, as open_clip does in training (0.9 to 1 of the area, drawn
                from torch's random state); else the transform is the one for evaluation.
        """
        import open_clip

        return open_clip.image_transform(
            self.image_size, training, self.mean, self.std, self.resize_mode, self.interpolation
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Bring images of the right size to the encoder's range: ``(images / 255 - mean) / std``.

        Equal to :meth:`transform` on the same images, without the way through PIL.

        Args:
            images: uint8, ``[N, 3, S, S]``.

        Returns:
            float32, ``[N, 3, S, S]``, on the images' device.

        Raises:
            DataError: the dtype or the shape is another one.
        """
        expected = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise DataError(
                f"images: expected uint8 [N, {', '.join(map(str, expected))}], got {str(images.dtype)[6:]} "
                f"{list(images.shape)}. Use transform() for images of other sizes."
            )
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class Architecture:
    """A model config in open_clip's layout, by name."""

    name: str
    config: dict[str, Any]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    built_in: bool = True
    shipped: bool = False
    tagged: bool = False

    def with_tag(self, settings: dict[str, Any]) -> Architecture:
        """Take over what weights published under a tag ask for: their preprocessing, and QuickGELU if they need it."""
        config = {**self.config, "quick_gelu": True} if settings.get("quick_gelu") else self.config
        return replace(self, config=config, preprocessing={**self.preprocessing, **settings}, tagged=True)

    @property
    def activation(self) -> str:
        """What the image tower's blocks compute, ``gelu`` or ``quick_gelu``; empty for towers without the choice."""
        vision = self.config["vision_cfg"]
        if "timm_model_name" in vision or not isinstance(vision.get("layers", 12), int):
            return ""
        return "quick_gelu" if self.config.get("quick_gelu") else "gelu"

    def open_weights(self, path: Path) -> LazyMapping:
        """The weights of a file that a user names, or of a tag, see :func:`lit_merge.models.weights.open_weights`.

        Raises:
            StructureMismatchError: the file says that it was trained with another activation function.
        """
        return open_weights(path, activation="" if self.tagged else self.activation, name=self.name)

    def tokenizer(self) -> Callable[[Sequence[str]], Tensor]:
        """Texts -> token indices ``[N, context length]``."""
        text = json.dumps(self.config["text_cfg"], sort_keys=True)
        build = _tokenizer if self.config["text_cfg"].get("hf_tokenizer_name") else _shared_tokenizer
        return _guard(self.name, lambda: build(self.name if self.built_in else None, text))

    def load_text(self, state: dict[str, Tensor], what: str) -> nn.Module:
        """Build the text tower with the weights of ``state``, in evaluation mode."""
        from open_clip.model import convert_to_custom_text_state_dict

        with torch.random.fork_rng(devices=[]):  # so that loading, or not, leaves the program's randomness as it is
            model = _build(self, "text")
        expected = model.state_dict()
        if "positional_embedding" in state and "positional_embedding" not in expected:
            state = convert_to_custom_text_state_dict(state)
        # Older versions of transformers stored the positions.
        state = {key: tensor for key, tensor in state.items() if not key.endswith("embeddings.position_ids")}
        for key in ("logit_scale", "logit_bias"):
            if key in state and key in expected:
                state[key] = state[key].reshape(expected[key].shape)
        check_same_structure(expected, state, what)
        check_finite(state, what)
        model.load_state_dict(state)
        return model.eval()


@dataclass
class ClipModel:
    """A CLIP whose image tower is at hand and whose text tower comes when needed.

    Attributes:
        name: the architecture's name.
        pretrained: the tag or path that the weights came from, or ``random``.
        visual: the image tower, ``[B, 3, S, S]`` -> raw features ``[B, d]``, float32, parameters under its own names.
        preprocessing: what the image tower expects of images.
        fingerprint: of the image tower's parameters as loaded, see :func:`lit_merge.params.fingerprint`.
        text: the text side.
        activation: of the image tower's blocks, ``gelu`` or ``quick_gelu``, which no weight shows; empty for towers
            without the choice.
    """

    name: str
    pretrained: str | None
    visual: nn.Module
    preprocessing: Preprocessing
    fingerprint: str
    text: TextTower = field(repr=False)
    activation: str = ""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode N texts as ``[N, d]``, L2-normalised, without gradient; loads the text tower if it is not."""
        return self.text.encode(texts)

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine similarities in the logits."""
        return self.text.logit_scale

    @property
    def text_fingerprint(self) -> str:
        """16 hexadecimal digits that tell text towers apart; read from the file, without building the tower."""
        return self.text.fingerprint

    def drop_text(self) -> None:
        """Free the text tower's memory; it is loaded again when needed, unless it was random."""
        self.text.drop()


def load_clip(model: str = _SHIPPED, pretrained: str | None = None) -> ClipModel:
    """Load a CLIP's image tower in float32, with its text tower in reach.

    Args:
        model: a name that open_clip knows, e.g. ``ViT-B-32``; the path of a JSON config in open_clip's layout (either
            the model config itself, or ``model_cfg`` and ``preprocess_cfg`` as published beside weights); or
            ``lit-tiny``, the small model that comes with this package, or ``lit-small``, a deeper one whose weights
            ``lit-merge data prepare lit-small`` brings.
        pretrained: a tag that open_clip knows for this architecture; the path of a CLIP's weights in any form that
            :func:`lit_merge.checkpoints.opening.open_checkpoint` opens, nothing of which is executed; or ``random`` for
            an initialisation with torch's current random state. None means the shipped weights, which only
            ``lit-tiny`` and ``lit-small`` have (``shipped`` says so aloud).

    Returns:
        The model. Its image tower is in training mode, as every new module; the text tower is in evaluation mode.

    Notes:
        Weights published under a tag bring their own preprocessing, and QuickGELU where they were trained with it.
        Weights from a path get the architecture's activation and CLIP's own preprocessing: for OpenAI's use an
        architecture such as ``ViT-B-32-quickgelu``, and for others give the JSON config with ``preprocess_cfg``.

    Raises:
        ConfigurationError: an unknown architecture or tag, a missing file, or weights that cannot be downloaded.
        FileFormatError: a damaged config or weights file, or one of another kind.
        StructureMismatchError: names or shapes in the file differ from the image tower's, or it says that it was
            trained with another activation function.
        NonFiniteError: the image tower's weights hold NaN or infinity.
    """
    architecture = _architecture(model)
    source, architecture = _weights_source(architecture, pretrained)
    if source is None:
        visual = _build(architecture, "image").visual
        tower = TextTower(architecture, None, _build(architecture, "text").eval())
    else:
        with torch.random.fork_rng(devices=[]):
            visual = _build(architecture, "image").visual
        _load_visual(visual, source, architecture)
        tower = TextTower(architecture, source)
    return ClipModel(
        name=architecture.name,
        pretrained="shipped" if pretrained is None else pretrained,
        visual=visual,
        preprocessing=_preprocessing(architecture),
        fingerprint=fingerprint(dict(visual.named_parameters())),
        text=tower,
        activation=architecture.activation,
    )


def full_clip_model(model: str = _SHIPPED) -> tuple[nn.Module, Callable[[Sequence[str]], Tensor]]:
    """Build a whole CLIP with random weights, for contrastive pre-training; named as for :func:`load_clip`.

    Returns:
        The open_clip model (``encode_image``, ``encode_text``, ``logit_scale``), float32, and its tokenizer,
        texts -> token indices ``[N, context length]``.

    Raises:
        LitMergeError: the architecture is unknown, damaged or cannot be built.
    """
    architecture = _architecture(model)
    return _build(architecture, "both"), architecture.tokenizer()


def empty_image_tower(model: str) -> Params:
    """An architecture's image tower without values: name -> tensor on the meta device, in the order of its modules.

    Raises:
        LitMergeError: the architecture, named as for :func:`load_clip`, is unknown, damaged or cannot be built.
    """
    architecture = _architecture(model)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        visual = _build(architecture, "image").visual
    return {name: parameter.detach() for name, parameter in visual.named_parameters()}


def weights_path(model: str = _SHIPPED, pretrained: str | None = None) -> Path | None:
    """The file or folder that :func:`load_clip` reads the weights from, downloaded if need be; None for random ones.

    Raises:
        LitMergeError: as for :func:`load_clip`, of which weights.
    """
    return _weights_source(_architecture(model), pretrained)[0]


def stored_tower(model: str, pretrained: str | None) -> tuple[str, LazyMapping] | None:
    """The architecture's name and the image tower's parameters, from the file of its weights, without building it.

    Returns:
        float32 tensors under the tower's own names, read when they are asked for; None where only the tower itself
        tells what its parameters are (random weights, towers of timm, residual networks), or where it does not fit
        them.

    Raises:
        LitMergeError: the architecture or the weights are unknown or damaged.
    """
    source, architecture = _weights_source(_architecture(model), pretrained)
    vision = architecture.config["vision_cfg"]
    if source is None or "timm_model_name" in vision or not isinstance(vision.get("layers", 12), int):
        return None
    stored = architecture.open_weights(source)
    names = {name.removeprefix("visual."): name for name in stored if name.startswith("visual.")}
    width, patch = vision.get("width", 768), vision.get("patch_size", 16)
    shapes = {"conv1.weight": (width, 3, patch, patch), "proj": (width, architecture.config["embed_dim"])}
    fits = all(name in names and tuple(stored.shape(names[name])) == shape for name, shape in shapes.items())
    if not fits or number_of_blocks(names) != vision.get("layers", 12) or not _is_whole(Selected(stored, names)):
        return None
    structure = {name: (stored.shape(key), torch.float32) for name, key in names.items()}
    return architecture.name, Computed(structure, lambda name: stored[names[name]].float())


def _is_whole(tower: LazyMapping) -> bool:
    """Whether nothing is missing or surplus, and shapes fit together; building the tower says what is wrong."""
    try:
        return len(image_tower(tower, recognise(tower))) == len(tower)
    except StructureMismatchError:
        return False


def text_tensors(model: str, pretrained: str | None) -> LazyMapping:
    """The tensors of a CLIP's text side as they are stored, under their names in the whole model."""
    source, _ = _weights_source(_architecture(model), pretrained)
    assert source is not None
    return open_weights(source, is_text)


def clip_activation(model: str = _SHIPPED, pretrained: str | None = None) -> str:
    """The activation function of :func:`load_clip`'s image tower, see :class:`ClipModel`; nothing is built."""
    return _weights_source(_architecture(model), pretrained)[1].activation


def clip_config(model: str, pretrained: str | None) -> dict[str, Any]:
    """What open_clip publishes beside weights: ``model_cfg`` and ``preprocess_cfg``, as these weights want them.

    Raises:
        LitMergeError: the architecture or the weights are unknown or damaged.
    """
    _, architecture = _weights_source(_architecture(model), pretrained)
    seen = _preprocessing(architecture)
    settings: dict[str, Any] = {"mean": list(seen.mean), "std": list(seen.std)}
    settings |= {"interpolation": seen.interpolation, "resize_mode": seen.resize_mode}
    return {"model_cfg": copy.deepcopy(architecture.config), "preprocess_cfg": settings}


def hub_repository(model: str, pretrained: str | None) -> str | None:
    """``owner/name`` on the Hugging Face Hub of the weights behind a tag; None for others."""
    if pretrained is None or _looks_like_path(pretrained):
        return None
    import open_clip

    settings = open_clip.get_pretrained_cfg(str(model).replace("/", "-"), pretrained) or {}
    return "/".join(str(settings.get("hf_hub") or "").split("/")[:2]) or None


def _architecture(model: str) -> Architecture:
    model = str(model)
    own = [_SHIPPED, *RELEASED]
    if model in own:
        return replace(_read_config(_ASSETS / f"{model}.json"), shipped=True)
    known = _open_clip_configs()
    name = model.replace("/", "-")
    if name in known:
        return Architecture(name, json.loads(known[name].read_text(encoding="utf-8")))
    imported: Any = sys.modules.get("open_clip")
    if imported is not None and name in imported.list_models():  # which a program has added
        return Architecture(name, imported.get_model_config(name))
    if _looks_like_path(model):
        return _read_config(Path(model))
    raise ConfigurationError(
        f"model: expected an architecture that open_clip knows, {_SHIPPED!r} or the path of a JSON config, got "
        f"{model!r}. {did_you_mean(model, [*own, *known], f'Use one of {first_few([*own, *known], 8)}.')}"
    )


def _open_clip_configs() -> dict[str, Path]:
    """Architecture -> the file of its config in the package open_clip, which takes seconds to import."""
    found = find_spec("open_clip")
    folders = (found and found.submodule_search_locations) or []
    return {path.stem: path for folder in folders for path in sorted(Path(folder, "model_configs").glob("*.json"))}


def _read_config(path: Path) -> Architecture:
    if not path.is_file():
        raise ConfigurationError(f"model: expected the path of a JSON config, got {path}, which is no file.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path}: expected a model config as JSON, got {one_line(error, 200)}.") from error
    content = content if isinstance(content, dict) else {}
    config, preprocessing = content.get("model_cfg", content), content.get("preprocess_cfg", {})
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    config = config if isinstance(config, dict) else {}
    wrong = [name for name, kind in kinds.items() if not isinstance(config.get(name), kind)]
    if wrong or not isinstance(preprocessing, dict):
        raise FileFormatError(
            f"{path}: expected a model config with embed_dim (a number), vision_cfg and text_cfg (objects), got one "
            f"without {', '.join(wrong) or 'a proper preprocess_cfg'}."
        )
    config = {name: value for name, value in config.items() if name != "preprocess_cfg"}
    return Architecture(path.stem, config, preprocessing, built_in=False)


def _weights_source(architecture: Architecture, pretrained: str | None) -> tuple[Path | None, Architecture]:
    """Where the weights are, None for random ones, and the architecture as these weights want it."""
    name = architecture.name
    if pretrained == "random":
        return None, architecture
    if architecture.shipped and pretrained in (None, "shipped"):
        path = released_weights(name) if name in RELEASED else _existing(str(_ASSETS / f"{_SHIPPED}.safetensors"))
        return path, architecture
    if pretrained is not None and _looks_like_path(pretrained):
        return _existing(pretrained), architecture
    tags = _tags(name) if architecture.built_in else []
    if pretrained is None:
        published = f", or one of its tags: {first_few(tags, 6)}" if tags else "; it has no published tags"
        raise ConfigurationError(
            f"{name}: expected pretrained to say which weights, got None. Set it to 'random' for untrained "
            f"weights, the path of a checkpoint{published}."
        )
    if pretrained.replace("-", "_").lower() in tags:
        path, settings = _download(name, pretrained)
        return path, architecture.with_tag(settings)
    if Path(pretrained).exists():
        return _existing(pretrained), architecture
    hint = did_you_mean(pretrained, tags, f"Use one of {first_few(tags, 8)}." if tags else "It has no published tags.")
    raise ConfigurationError(f"{name}: expected pretrained to be a tag, a path or 'random', got {pretrained!r}. {hint}")


def _existing(pretrained: str) -> Path:
    path = local_path(pretrained)
    if not path.exists():
        raise ConfigurationError(
            f"pretrained: expected the path of a checkpoint, or 'random', got {pretrained}, which is no file."
        )
    return path


def _tags(name: str) -> list[str]:
    import open_clip

    return list(open_clip.list_pretrained_tags_by_model(name))


def _download(name: str, tag: str) -> tuple[Path, dict[str, Any]]:
    """The file of a tag's weights, and what they ask for."""
    import open_clip

    settings: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    try:
        return Path(open_clip.download_pretrained(settings)), settings
    except Exception as error:  # network libraries raise whatever they like
        wanted = settings.get("hf_hub", "").strip("/") or settings.get("url", "")
        raise ConfigurationError(
            f"{name}: expected to download the weights {tag!r} from {wanted}, got {one_line(error, 200)}. "
            "Connect to the network, or download them elsewhere and set pretrained to the path of the file."
        ) from error


def _preprocessing(architecture: Architecture) -> Preprocessing:
    size = architecture.config["vision_cfg"].get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigurationError(f"{architecture.name}: expected square images, got image_size {size}.")
    settings = architecture.preprocessing
    given = {name: settings[name] for name in ("interpolation", "resize_mode", "mean", "std") if settings.get(name)}
    given = {name: value if isinstance(value, str) else tuple(value) for name, value in given.items()}
    return Preprocessing(image_size=sides.pop(), **given)


def _build(architecture: Architecture, towers: str) -> Any:
    """Build the open_clip model with random weights; the tower that is not asked for is a stub, or missing."""
    import open_clip

    config = copy.deepcopy(architecture.config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    kind = (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP) if custom else open_clip.CLIP
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if towers == "image":
        # CoCa's tower returns a pair unless it is told not to.
        vision["output_tokens"] = False
        kind = open_clip.CLIP
        config = {name: config[name] for name in ("embed_dim", "vision_cfg", "quick_gelu") if name in config}
        config["text_cfg"] = _NO_TEXT
    elif towers == "text":
        config["vision_cfg"] = _NO_VISION
    model = _guard(architecture.name, lambda: kind(**config))
    decoder = getattr(model, "text_decoder", None)
    if decoder is not None:
        # open_clip 3.3 leaves CoCa's decoder projection as uninitialised memory.
        nn.init.normal_(decoder.text_projection, std=decoder.text_projection.shape[0] ** -0.5)
    if towers == "text":
        for name in NOT_TEXT:
            if hasattr(model, name):
                delattr(model, name)
    return model


def _tokenizer(name: str | None, text_config: str) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer of one of open_clip's architectures, or of a text side's configuration, given as JSON."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    if name is not None:
        return open_clip.get_tokenizer(name)
    text = json.loads(text_config)
    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    if text.get("hf_tokenizer_name"):
        return HFTokenizer(text["hf_tokenizer_name"], tokenizer_mode=text.get("tokenizer_mode"), **options)
    return open_clip.SimpleTokenizer(**options)


# CLIP's vocabulary, which every stage of a suite would read again; others' files may change.
_shared_tokenizer = lru_cache(maxsize=8)(_tokenizer)


def _guard(name: str, build: Callable[[], Any]) -> Any:
    """Run what open_clip builds from a config, and say in one line what it refuses."""
    try:
        return build()
    except _REFUSALS as error:
        expected = "a model config that open_clip can build"
        if isinstance(error, ImportError):
            expected = "the packages that this model needs"
        elif isinstance(error, OSError):
            expected = "to reach the network for a tokenizer or text config"
        raise ConfigurationError(f"{name}: expected {expected}, got {one_line(error, 200)}.") from error


def _load_visual(visual: nn.Module, path: Path, architecture: Architecture) -> None:
    stored = architecture.open_weights(path)
    state = {key.removeprefix("visual."): stored[key] for key in stored if key.startswith("visual.")}
    if not state:
        raise FileFormatError(
            f"{path}: expected the weights of a whole CLIP, names starting with 'visual.', got {first_few(stored)}."
        )
    check_same_structure(visual.state_dict(), state, f"image tower of {architecture.name} in {path}")
    check_finite(state, f"image tower in {path}")
    visual.load_state_dict(state)


def _looks_like_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.endswith(_PATH_SUFFIXES)
