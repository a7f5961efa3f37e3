"""The Markdown model card that lies beside what a merge wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_merge.files.content_digest import content_entry
from lit_merge.files.lazy import LazyMapping
from lit_merge.files.shards import INDEX_ENDING
from lit_merge.files.yaml_text import dump_yaml
from lit_merge.models.merging.form import Form
from lit_merge.models.merging.inputs import Input
from lit_merge.models.network import Base, ClipNetwork
from lit_merge.report.environment import versions
from lit_merge.transforms import Transform

__all__ = ["KINDS", "file_card", "front_matter", "model_card", "python_of"]

KINDS = {
    "task vector": "Task vector θ − θ0",
    "weights": "Weights",
    "coefficients": "Merging coefficients",
    "statistics": "Statistics for merging",
}
"""What a card can be of, and what it calls it."""


def model_card(
    title: str,
    files: Sequence[str],
    tasks: Sequence[str],
    base: Base,
    inputs: Sequence[Input],
    transform: Transform,
    config: Mapping[str, Any],
    found: str,
    weights: bool,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    repository: str | None = None,
    form: Form | None = None,
) -> str:
    """Say what was merged, how, and how to load it.

    Args:
        title: of the page.
        files: the files to open, beside the card, one per output: a safetensors file or an index of shards.
        tasks: what each of them is of.
        base: the base model.
        inputs: what was merged.
        transform: the chain that was applied, with all that was chosen.
        config: the settings of ``lit-merge merge`` that write the same tensors.
        found: how settings were chosen on data; empty if none were.
        weights: whether the outputs are whole models.
        notes: differences between the base and the inputs, and what was done about them.
        warnings: what is legal in this merge and dangerous, with numbers.
        repository: ``owner/name`` of the base model on the Hub, if it is known.
        form: in which the weights are written; that of a file by default.

    Returns:
        Markdown with the front matter that the Hugging Face Hub reads.
    """
    form = form or Form()
    clip = weights and isinstance(base, ClipNetwork) and form.write_as is None
    library = form.library or ("open_clip" if clip else "")
    made = "weights" if weights else "adapter" if library == "peft" else "task vector"
    front = front_matter(made, repository, library)
    front["tags"].append("merge")
    kind = {
        "weights": "Merged weights",
        "adapter": "Merged LoRA adapter",
        "task vector": "Merged task vector, to be added to the base model's weights",
    }[made]
    rows = [
        f"| {_cell(one.vector.task)} | {_cell(one.path)} | {'weights' if one.weights else 'task vector'} "
        f"| {_digest(one.digests)} |"
        for one in inputs
    ]
    snippets = [
        _library_snippet(file, task, form) or _snippet(file, task, base, config, weights)
        for file, task in zip(files, tasks, strict=True)
    ]
    sections = [
        f"---\n{_yaml(front)}---\n",
        f"# {title}\n",
        f"{kind}, made of {len(inputs)} model{'s' * (len(inputs) > 1)} of the base model `{base.name}` "
        "by [lit-merge](https://github.com/lit-merge/lit-merge).\n",
        "## Inputs\n",
        "| task | file | kind | digest |\n| :-- | :-- | :-- | :-- |",
        *rows,
        "\nThe digest of a lit-merge file is that of its content, as its header states it, of others their SHA-256.\n",
        *(["## Differences\n", *(f"- {_cell(note)}" for note in notes), ""] if notes else []),
        *(["## Warnings\n", *(f"- {_cell(line)}" for line in warnings), ""] if warnings else []),
        "## The chain\n",
        f"```python\n{python_of(transform)}\n```\n",
        *([f"{found}\n"] if found else []),
        "The same tensors are written by `lit-merge merge --config` with\n",
        f"```yaml\n{_yaml(config)}```\n",
        "## How to load it\n",
        *(f"```python\n{snippet}\n```\n" for snippet in snippets),
        *([_OPEN_CLIP] if clip else []),
        *(["## Beside the weights\n", *(f"- {_cell(note)}" for note in form.notes), ""] if form.notes else []),
        "## Versions\n",
        ", ".join(f"{name} {version}" for name, version in versions().items()) + "\n",
    ]
    return "\n".join(sections)


def front_matter(kind: str, repository: str | None, library: str = "") -> dict[str, Any]:
    """The metadata at the top of a card, as the Hugging Face Hub reads it; which license it is, is left to the user.

    Args:
        kind: one of :data:`KINDS`, or ``adapter``.
        repository: ``owner/name`` of the base model on the Hub; the Hub refuses other names.
        library: that opens it, as the Hub names libraries; lit-merge by default.
    """
    return {
        **({"base_model": repository} if repository else {}),
        **({"base_model_relation": _RELATIONS[kind]} if repository and kind in _RELATIONS else {}),
        "library_name": library or "lit-merge",
        **({"pipeline_tag": _PIPELINES[library]} if library in _PIPELINES else {}),
        "tags": ["lit-merge", *(["task-vector"] if kind == "task vector" else []), "model-merging"],
    }


def file_card(path: str, kind: str, header: Mapping[str, str], tensors: LazyMapping | None) -> str:
    """Say what a file is that no merge has written a card of, and how to load it.

    Args:
        path: what it is loaded by, such as its address on the Hub.
        kind: one of :data:`KINDS`.
        header: its entries.
        tensors: in it; None for coefficients, which are numbers.

    Returns:
        Markdown without front matter.
    """
    size = ""
    if tensors is not None:
        dtypes = dict.fromkeys(str(tensors.dtype(name)).removeprefix("torch.") for name in tensors)
        entries = sum(tensors.shape(name).numel() for name in tensors)
        count = f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"
        size = f", {count} with {entries:,} entries in {' and '.join(dtypes) or 'no dtype'}"
    task = f" of the task {_cell(header['task'])}" if header.get("task") else ""
    base = f" of the base model `{_cell(header['base_model'])}`" if header.get("base_model") else ""
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in sorted(header.items()) if len(value) <= _LONGEST]
    return "\n".join(
        [
            f"## {path.rpartition('/')[2]}\n",
            f"{KINDS[kind]}{task}{base}{size}, by [lit-merge](https://github.com/lit-merge/lit-merge).\n",
            f"```python\n{_LOADED[kind].format(path=path)}\n```\n",
            *(["| entry of the header | |\n| :-- | :-- |", *rows] if rows else []),
        ]
    )


def python_of(transform: Transform) -> str:
    """A program that builds a transform under the name ``transform``."""
    expression = repr(transform)
    paths = set(_class_paths(transform.to_config()))
    names: dict[str, set[str]] = {}
    for path in paths:
        module, _, name = path.rpartition(".")
        names.setdefault(module, set()).add({"Chain": "chain"}.get(name, name) if module in _OURS else name)
    if "Override(" in expression:
        names.setdefault("lit_merge.transforms", set()).add("Override")
    imports = [f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)]
    return "\n".join([*imports, "", f"transform = {expression}"])


_RELATIONS = {"weights": "merge", "adapter": "adapter"}
_PIPELINES = {"open_clip": "zero-shot-image-classification", "sentence-transformers": "sentence-similarity"}
_LONGEST = 200  # characters of a header's entry in a table
_LOADED = {
    "task vector": "from lit_merge import TaskVector\n\nvector = TaskVector.load({path!r})",
    "weights": "from lit_merge.files.shards import open_tensors\n\nweights = open_tensors({path!r})",
    "coefficients": "from lit_merge.vectors import Coefficients\n\ncoefficients = Coefficients.load({path!r})",
    "statistics": "from lit_merge.vectors import LazyTensors\n\nstatistics = LazyTensors({path!r})",
}
_OPEN_CLIP = "`open_clip.create_model` opens it as `pretrained` too; give it the base's activation and preprocessing.\n"
_OURS = ("lit_merge.transforms", "lit_merge.transforms.base")


def _class_paths(config: Any) -> list[str]:
    if isinstance(config, list):
        return [path for item in config for path in _class_paths(item)]
    if not isinstance(config, dict):
        return []
    own = [config["class_path"]] if isinstance(config.get("class_path"), str) else []
    return own + [path for value in config.values() for path in _class_paths(value)]


def _library_snippet(file: str, task: str, form: Form) -> str:
    """How the library that the output is a folder of opens it; empty where lit-merge's own way is to be shown."""
    config, place = form.companions.config, file.rpartition("/")[0] or "."
    if form.library == "peft":
        load = f"model = PeftModel.from_pretrained(base, {place!r})"
        return f"from peft import PeftModel\n\n{load}  # {task}; base: the model that was adapted"
    if not form.configured:
        return ""
    if form.library == "sentence-transformers":
        line = f"from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({place!r})"
    elif form.library == "timm":
        line = f"import timm\n\nmodel = timm.create_model({f'local-dir:{place}'!r}, pretrained=True)"
    elif form.library == "open_clip":
        created = f"open_clip.create_model_and_transforms({f'local-dir:{place}'!r})"
        line = f"import open_clip\n\nmodel, _, preprocess = {created}"
    elif form.library == "transformers":
        line = _transformers_snippet(config, place)
    else:
        return ""
    return f"{line}  # {task}"


def _transformers_snippet(config: Mapping[str, Any], place: str) -> str:
    """The class that the configuration names; with code of the folder's own, the automatic class for it."""
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed and str(listed[0]).isidentifier() else "AutoModel"
    known = config.get("auto_map")
    automatic = [one for one in (known if isinstance(known, dict) else ()) if one.startswith("AutoModel")]
    if not automatic:
        return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({place!r})"
    chosen = automatic[0] if automatic[0].isidentifier() else "AutoModel"
    return (
        f"from transformers import {chosen}\n\n# Its code comes with the folder: read it before it runs.\n"
        f"model = {chosen}.from_pretrained({place!r}, trust_remote_code=True)"
    )


def _snippet(file: str, task: str, base: Base, config: Mapping[str, Any], weights: bool) -> str:
    if not weights:
        return f"from lit_merge import TaskVector\n\nvector = TaskVector.load({file!r})  # {task}"
    sharded = file.endswith(INDEX_ENDING)
    if not isinstance(base, ClipNetwork) and not sharded:
        return f"from safetensors.torch import load_file\n\nweights = load_file({file!r})  # {task}"
    opened = "open_tensors" if sharded else "LazyTensors"
    imported = f"from {'lit_merge.files.shards' if sharded else 'lit_merge.vectors'} import {opened}"
    weights_line = f"weights = {opened}({file!r})  # {task}"
    if not isinstance(base, ClipNetwork):
        return f"{imported}\n\n{weights_line}, read tensor by tensor"
    arguments = ", ".join(repr(config[name]) for name in ("model", "pretrained") if name in config)
    return "\n".join(
        [
            "from lit_merge.models import load_clip",
            imported,
            "",
            f"clip = load_clip({arguments})  # the base, with its activation and preprocessing",
            weights_line,
            "visual = {name[7:]: weights[name] for name in weights if name.startswith('visual.')}",
            "clip.visual.load_state_dict(visual)",
        ]
    )


def _digest(digests: Mapping[str, Any]) -> str:
    key, digest = content_entry(digests)
    if digest:
        return f"`{digest}` ({key.replace('_', ', ')})"
    return ", ".join(f"`{digest}`" for digest in digests.get("sha256", {}).values()) or "not taken"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _yaml(content: Mapping[str, Any]) -> str:
    return dump_yaml(dict(content))
