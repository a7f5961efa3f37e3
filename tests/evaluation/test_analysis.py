"""Disentanglement grids against plain evaluations of every point, and ``lit-merge analyze`` from files to figures."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders.language_folders import language_folder
from PIL import Image
from torch.func import functional_call

import lit_merge.evaluation.analysis.command
import lit_merge.evaluation.analysis.models
from lit_merge import Coefficients, LinearizedModel
from lit_merge.commands.main import main
from lit_merge.data import ImageBatch, MultiTaskDataModule, TextTask
from lit_merge.errors import ConfigurationError, DataError, StructureMismatchError
from lit_merge.evaluation.analysis import (
    DirectPair,
    Grid,
    LinearPair,
    Method,
    Paths,
    PlacedWeights,
    disentanglement_errors,
)
from lit_merge.evaluation.analysis.figures import draw_figures
from lit_merge.evaluation.analysis.images import TaskImages
from lit_merge.evaluation.analysis.processes import Processes
from lit_merge.evaluation.analysis.record import Record
from lit_merge.evaluation.analysis.settings import check_analyses
from lit_merge.functional import linearize
from lit_merge.models import load_clip
from lit_merge.models.language import CausalNetwork
from lit_merge.models.linear_features import LinearFeatures
from lit_merge.modules import MultiTaskModule
from lit_merge.report import model_figures
from lit_merge.report.analysis_page import analysis_page
from lit_merge.transforms import LiNeS, task_arithmetic
from lit_merge.vectors import TaskVector, TaskVectors

FORMS = ["prediction", "representation"]
FIRST, SECOND = [-1.0, 0.0, 0.7, 1.5], [0.5, 2.0, -1.0]
TASKS = ["digits", "letters", "signs"]


class Setting:
    """Two vectors of a small network in float64, 10 and 7 images, and two heads; and plain evaluations."""

    def __init__(self, network, heads):
        generator = torch.Generator().manual_seed(3)
        own = dict(network.named_parameters())
        self.network, self.heads = network.eval(), heads
        self.base = {name: value.detach().clone() for name, value in own.items()}
        self.vectors = [
            {n: torch.randn(value.shape, generator=generator, dtype=torch.float64) for n, value in own.items()}
            for _ in range(2)
        ]
        self.images = [torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64) for n in (10, 7)]
        self.seen = 0

    def encode(self, batch):
        self.seen += len(batch)
        return self.network(batch.images)

    def batches(self):
        return tuple(
            [ImageBatch(part, torch.zeros(len(part)), torch.arange(len(part))) for part in images.split(4)]
            for images in self.images
        )

    def total(self, alphas):
        return {name: sum(a * v[name] for a, v in zip(alphas, self.vectors, strict=True)) for name in self.base}

    def direct(self, images, alphas):
        moved = self.total(alphas)
        return functional_call(self.network, {n: value + moved[n] for n, value in self.base.items()}, images)

    def linear(self, images, alphas):
        model = LinearizedModel(self.network)
        model.load_task_vector(self.total(alphas))
        return model(images)

    def error(self, features, form):
        """Every point by itself: four evaluations, as the definition has them."""
        grid = torch.zeros(len(FIRST), len(SECOND), dtype=torch.float64)
        for i, one in enumerate(FIRST):
            for j, other in enumerate(SECOND):
                for task, alone in enumerate(((one, 0.0), (0.0, other))):
                    single, joint = (features(self.images[task], a) for a in (alone, (one, other)))
                    if form == "prediction":
                        head = self.heads[task]
                        distance = (head(single).argmax(-1) != head(joint).argmax(-1)).double()
                    else:
                        p, q = single.softmax(-1), joint.softmax(-1)
                        distance = (p * (p.log() - q.log())).sum(-1)
                    grid[i, j] += distance.mean()
        return grid


@pytest.fixture
def setting(tiny_encoder, tiny_head):
    return Setting(tiny_encoder(dtype=torch.float64), [tiny_head(seed=s, dtype=torch.float64) for s in (1, 2)])


@torch.no_grad()
def test_direct_grid_is_the_definition_with_half_of_the_passes(setting):
    weights = PlacedWeights(setting.network, setting.vectors)
    pair = DirectPair(setting.encode, weights, setting.batches())
    ended = []
    found = disentanglement_errors(pair, setting.heads, FIRST, SECOND, FORMS, ended=lambda: ended.append(1))
    points = len(FIRST) * len(SECOND)
    assert setting.seen == 10 * (len(FIRST) + points) + 7 * (len(SECOND) + points)
    assert len(ended) == len(FIRST)
    for form in FORMS:
        expected = setting.error(setting.direct, form)
        assert (found[form] - expected).abs().max() < 1e-12
        assert expected.abs().min() > 0 or form == "prediction"
    assert found["prediction"].unique().numel() > 3
    assert all(torch.equal(value, setting.base[n]) for n, value in setting.network.named_parameters())


@pytest.mark.parametrize("memory", [1, 10 * 6 * 8 * 2, None])
@torch.no_grad()
def test_linear_grid_is_the_definition_without_any_pass(setting, memory):
    features = []
    for images in setting.images:
        start = setting.linear(images, (0.0, 0.0))
        tangents = {str(k): setting.linear(images, alphas) - start for k, alphas in enumerate(((1.0, 0.0), (0.0, 1.0)))}
        features.append(LinearFeatures(start, tangents, torch.zeros(len(images))))
    setting_forward, setting.network.forward = setting.network.forward, None
    found = disentanglement_errors(LinearPair(tuple(features), memory), setting.heads, FIRST, SECOND, FORMS)
    setting.network.forward = setting_forward
    for form in FORMS:
        assert (found[form] - setting.error(setting.linear, form)).abs().max() < 1e-12


def test_weights_are_sums_in_place(setting):
    weights = PlacedWeights(setting.network, setting.vectors)
    for alphas in ((0.0, 0.0), (0.3, -2.0), (1.0, 0.0)):
        weights.set(alphas)
        moved = setting.total(alphas)
        with weights.in_place():
            for name, value in setting.network.named_parameters():
                assert torch.allclose(value, setting.base[name] + moved[name], atol=1e-15, rtol=0)
                assert value.data_ptr() % 64 == weights._sum.data_ptr() % 64
    with pytest.raises(StructureMismatchError, match=r"task vector 1: expected the same 4 parameters, got 3 missing"):
        PlacedWeights(setting.network, [setting.vectors[0], {"inner.weight": setting.vectors[0]["inner.weight"]}])
    setting.network.outer.float()
    message = r"TinyEncoder: expected parameters of one dtype on one device, got 2 kinds\. Convert it first"
    with pytest.raises(ConfigurationError, match=message):
        PlacedWeights(setting.network, setting.vectors)


@torch.no_grad()
def test_rows_that_are_done_are_kept(setting, tmp_path):
    weights = PlacedWeights(setting.network, setting.vectors)
    whole = disentanglement_errors(
        DirectPair(setting.encode, weights, setting.batches()), setting.heads, FIRST, SECOND, FORMS
    )
    path, rows = tmp_path / "rows.json", []

    def stop_after_two():
        rows.append(1)
        if len(rows) == 2:
            raise KeyboardInterrupt

    def errors(ended):
        record = Record(path, ["a", 1], Processes())
        pair = DirectPair(setting.encode, weights, setting.batches())
        return disentanglement_errors(pair, setting.heads, FIRST, SECOND, FORMS, record, ended)

    with pytest.raises(KeyboardInterrupt):
        errors(stop_after_two)
    assert list(json.loads(path.read_text())["parts"]) == ["0", "1"]
    setting.seen = 0
    found = errors(lambda: None)
    assert setting.seen == 10 * 2 + 7 * len(SECOND) + 17 * 2 * len(SECOND)
    assert all(torch.equal(found[form], whole[form]) for form in FORMS)
    setting.seen = 0
    errors(lambda: None)
    assert setting.seen == 0
    assert "0" not in Record(path, ["a", 2], Processes())
    path.write_text(path.read_text()[:-9])
    assert "0" not in Record(path, ["a", 1], Processes())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, few_images, clip_config, clip_weights):
    """Files of three vectors; and the arguments that say what they belong to."""
    folder = tmp_path_factory.mktemp("analyze")
    clip = load_clip(clip_config, clip_weights)
    header = {"base_fingerprint": clip.fingerprint, "base_model": clip.name}
    generator = torch.Generator().manual_seed(0)
    for task in TASKS:
        tensors = {n: 0.06 * torch.randn(v.shape, generator=generator) for n, v in clip.visual.named_parameters()}
        TaskVector(tensors, task, metadata=header).save(folder / f"{task}.safetensors")
    vectors = [str(folder / f"{task}.safetensors") for task in TASKS]
    group = {name: f"group {index % 3}" for index, name in enumerate(tensors)}
    names = tuple(dict.fromkeys(group.values()))
    Coefficients(torch.rand(3, 3, generator=generator), tuple(TASKS), names, group, "group").save(
        folder / "coefficients.safetensors"
    )
    base = [f"--model={clip_config}", f"--pretrained={clip_weights}", "--images=40", "--batch_size=16"]
    return folder, vectors, ["analyze", f"--vectors=[{','.join(vectors)}]", *base]


ALL = "--analyses=[cosine,norms,signs,coefficients,accuracy,paths,disentanglement,tau_jp,advantage]"
SMALL = ["--grid.steps=3", "--paths.points=3", "--grid.pairs=[[letters,digits]]", "--paths.tasks=[signs]"]


@pytest.fixture(scope="module")
def analysed(inputs):
    folder, _, command = inputs
    output = folder / "out"
    command = [*command, ALL, *SMALL, f"--coefficients={folder / 'coefficients.safetensors'}"]
    assert main([*command, f"--output={output}"]) == 0
    return output, json.loads((output / "analysis.json").read_text()), command


@pytest.fixture(scope="module")
def plain_models(inputs, clip_config, clip_weights):
    """``accuracy(vector, coefficient)``: task -> accuracy on the 40 images, evaluated plainly."""
    _, files, _ = inputs
    vectors = TaskVectors([TaskVector.load(file) for file in files])
    module = MultiTaskModule(clip_config, clip_weights).eval()
    images = {}
    for task, own in MultiTaskDataModule(TASKS, preprocessing=module.preprocessing).tasks.items():
        own.setup("test")
        chosen = torch.randperm(61, generator=torch.Generator().manual_seed(0))[:40].sort().values.tolist()
        batch = own.datasets["test"].__getitems__(chosen)
        images[task] = batch.images, batch.labels, module.make_head(own)

    @torch.no_grad()
    def logits(vector, task, coefficient=1.0):
        module.load_task_vector(vector, coefficient)
        pixels, _, head = images[task]
        return head(module.encoder(pixels))

    def accuracy(vector, coefficient=1.0):
        return {t: float((logits(vector, t, coefficient).argmax(-1) == images[t][1]).double().mean()) for t in TASKS}

    return vectors, images, logits, accuracy


def test_the_file_says_what_was_measured(analysed, inputs):
    output, result, _ = analysed
    _, files, _ = inputs
    assert (result["schema"], result["kind"], result["tasks"]) == (1, "analysis", TASKS)
    digests = [TaskVector.load(file).content_digest for file in files]
    assert [result["vectors"][task]["digest"] for task in TASKS] == digests
    assert {one["images"] for one in result["images"].values()} == {40}
    assert result["seeds"] == {"images": 0}
    assert {"torch", "lit_merge"} <= set(result["versions"])
    assert "processor" in result["hardware"]
    text = (output / "analysis.json").read_text()
    assert str(output.parent) not in text
    assert not list(output.rglob("*.temporary"))


def test_images_are_digested_as_the_network_sees_them(analysed, plain_models):
    _, images, _, _ = plain_models
    pixels, labels, _ = images["signs"]
    digest = hashlib.sha256()
    for image, label in zip(pixels, labels, strict=True):
        digest.update(hashlib.sha256(image.numpy().tobytes() + label.numpy().tobytes()).digest())
    assert analysed[1]["images"]["signs"]["sha256"] == digest.hexdigest()


def test_accuracies_are_those_of_the_models(analysed, plain_models):
    found = analysed[1]["analyses"]["accuracy"]
    vectors, images, logits, accuracy = plain_models
    assert list(found["measured"]) == ["zero-shot", "weight_average", "task_arithmetic", "ties", "individual"]
    merged = task_arithmetic()(vectors).single()
    measured = {name: {t: row["accuracy"] for t, row in rows.items()} for name, rows in found["measured"].items()}
    assert measured["task_arithmetic"] == pytest.approx(accuracy(merged))
    assert measured["zero-shot"] == pytest.approx(accuracy(merged, 0.0))
    individual = {task: accuracy(vectors.vector(task))[task] for task in TASKS}
    assert measured["individual"] == pytest.approx(individual)
    normalised = sum(measured["ties"][task] / individual[task] for task in TASKS) / 3
    assert found["normalised"]["ties"] == pytest.approx(normalised)
    assert found["mean"]["ties"] == pytest.approx(sum(measured["ties"].values()) / 3)
    assert len({tuple(row.values()) for row in measured.values()}) > 3

    probabilities = logits(merged, "letters").double().softmax(-1)
    confidence, right = probabilities.max(-1).values, probabilities.argmax(-1) == images["letters"][1]
    error = 0.0
    for edge in range(15):
        inside = (confidence > edge / 15) & (confidence <= (edge + 1) / 15)
        if inside.any():
            error += abs(float(confidence[inside].sum() - right[inside].sum())) / 40
    row = found["measured"]["task_arithmetic"]["letters"]
    assert row["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert -1 <= row["entropy_loss_spearman"] <= 1


def test_paths_lead_from_the_pretrained_model_to_the_fine_tuned_one(analysed, plain_models):
    found = analysed[1]["analyses"]["paths"]
    vectors, _, _, accuracy = plain_models
    assert list(found) == ["signs"]
    assert found["signs"]["control"] == ["digits", "letters"]
    every = []
    for index, alpha in enumerate((0.0, 0.5, 1.0)):
        scaled = LiNeS(alpha=alpha)(vectors.select(["signs"])).single()
        for name, rows in (("wise_ft", accuracy(vectors.vector("signs"), alpha)), ("lines", accuracy(scaled))):
            point = {"alpha": alpha, "target": rows["signs"], "control": (rows["digits"] + rows["letters"]) / 2}
            assert found["signs"][name][index] == pytest.approx(point)
            every.append((name, index, point["target"], point["control"]))
    best = {
        (name, index)
        for name, index, x, y in every
        if not any(a >= x and b >= y and (a, b) != (x, y) for _, _, a, b in every)
    }
    assert {(one["path"], one["point"]) for one in found["signs"]["front"]} == best


def test_disturbance_and_advantage_are_those_of_the_tangents(analysed, plain_models, clip_config, clip_weights):
    found = analysed[1]["analyses"]
    vectors, images, logits, _ = plain_models
    module = MultiTaskModule(clip_config, clip_weights, linearized=True)
    for one in TASKS:
        module.load_task_vector(vectors.vector(one))
        with torch.no_grad():
            for other in TASKS:
                value, tangent = module.forward_parts(images[other][0])
                norm = float(tangent.double().norm(dim=1).mean())
                assert found["tau_jp"]["tau_jp"][one][other] == pytest.approx(norm, rel=1e-5)
                if one == other:
                    linear = (images[one][2](value + tangent).argmax(-1) != images[one][1]).double().mean()
        row, classes = found["advantage"][one], len(images[one][2].classes)
        direct = (logits(vectors.vector(one), one).argmax(-1) != images[one][1]).double().mean()
        assert (row["linear_error"], row["nonlinear_error"]) == pytest.approx((float(linear), float(direct)))
        assert row["advantage"] == pytest.approx(float(linear - direct) * classes / (classes - 1), abs=1e-7)


def test_disentanglement_is_the_definition(analysed, plain_models):
    found = analysed[1]["analyses"]["disentanglement"]
    vectors, _, logits, _ = plain_models
    assert found["values"] == [-3.0, 0.0, 3.0]
    (pair,) = found["pairs"]
    assert pair["tasks"] == ["letters", "digits"]
    one, other = vectors.vector("letters"), vectors.vector("digits")
    joint = one * -3.0 + other * 3.0
    expected = 0.0
    for task, single in (("letters", one * -3.0), ("digits", other * 3.0)):
        expected += float((logits(single, task).argmax(-1) != logits(joint, task).argmax(-1)).double().mean())
    assert pair["prediction"][0][2] == pytest.approx(expected)
    assert expected > 0
    assert pair["prediction"][1][1] == pair["representation"][1][1] == 0.0


def test_vectors_are_described_by_the_metrics(analysed, plain_models):
    found, (vectors, *_) = analysed[1]["analyses"], plain_models
    assert found["cosine"]["places"] == ["whole", "embedding", "block 0", "block 1", "head"]
    cosine = vectors.vector("digits").cosine_similarity(vectors.vector("signs"))
    assert found["cosine"]["cosine"][0][0][2] == pytest.approx(cosine, rel=1e-6)
    assert found["norms"]["norm"][0] == pytest.approx([vectors.vector(task).norm() for task in TASKS], rel=1e-6)
    start = math.sqrt(sum(float(v.detach().double().square().sum()) for v in _base(analysed).values()))
    relative = [vectors.vector(task).norm() / start for task in TASKS]
    assert found["norms"]["relative_norm"][0] == pytest.approx(relative, rel=1e-6)
    assert found["signs"]["density"] == 0.2
    assert 0.2 < found["signs"]["overlap"][0] < 0.3  # of independent ones: 0.104 / 0.488
    assert 0.4 < found["signs"]["conflict"][0] < 0.6
    assert len(found["coefficients"]["values"]) == 3


def _base(analysed):
    _, _, command = analysed
    settings = dict(one.removeprefix("--").split("=", 1) for one in command[1:])
    return dict(load_clip(settings["model"], settings["pretrained"]).visual.named_parameters())


def test_figures_are_drawn_of_everything(analysed):
    output, _, _ = analysed
    names = ["accuracy", "advantage", "coefficients", "cosine", "disentanglement-letters-digits", "methods", "norms"]
    names += ["path-signs", "signs", "tau_jp"]
    files = sorted(path.name for path in (output / "figures").iterdir())
    assert files == sorted(f"{name}{suffix}" for name in names for suffix in (".png", ".svg"))
    for name in names:
        with Image.open(output / "figures" / f"{name}.png") as image:
            image.load()
            assert image.width > 500
        assert (output / "figures" / f"{name}.svg").read_text().rstrip().endswith("</svg>")


def test_the_figure_of_a_path_marks_its_front(analysed):
    from matplotlib.figure import Figure

    _, result, _ = analysed
    figure = Figure()
    model_figures.arrange_path(figure, result, "signs")
    trade_off, by_alpha = figure.axes
    found = result["analyses"]["paths"]["signs"]
    front = sorted(
        {(found[f["path"]][f["point"]]["target"], found[f["path"]][f["point"]]["control"]) for f in found["front"]}
    )
    circles = trade_off.lines[2]
    drawn = sorted(set(zip((circles.get_xdata() / 100).tolist(), (circles.get_ydata() / 100).tolist(), strict=True)))
    assert drawn == [pytest.approx(point) for point in front]
    assert [list(line.get_ydata()) for line in by_alpha.lines] == [
        [100 * point[part] for point in found[name]] for name in ("wise_ft", "lines") for part in ("target", "control")
    ]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_inputs_give_the_same_bytes_and_what_is_done_is_not_done_again(analysed, monkeypatch):
    output, _, command = analysed
    before = files_of(output)
    again = output.with_name("again")
    shutil.copytree(output, again)
    assert main([*command, f"--output={again}"]) == 0
    assert files_of(again) == before

    def refuse(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(lit_merge.evaluation.analysis.command, "draw_figures", lambda *_: [])
    monkeypatch.setattr(lit_merge.evaluation.analysis.models.Evaluator, "measure", refuse)
    monkeypatch.setattr(DirectPair, "single", refuse)
    assert main([*command, f"--output={again}"]) == 0
    with pytest.raises(AssertionError, match="measured again"):
        main([*command, f"--output={again}", "--seed=1"])
    assert not (again / "analysis.json").exists()  # what is not of these inputs is gone


def test_an_interrupted_analysis_goes_on_where_it_was(analysed, monkeypatch, capsys):
    output, _, command = analysed
    killed, count = output.with_name("killed"), []
    measure = lit_merge.evaluation.analysis.models.Evaluator.measure

    def dying(self, *arguments, **settings):
        count.append(1)
        if len(count) == 8:
            raise KeyboardInterrupt
        return measure(self, *arguments, **settings)

    monkeypatch.setattr(lit_merge.evaluation.analysis.command, "draw_figures", lambda *_: [])
    monkeypatch.setattr(lit_merge.evaluation.analysis.models.Evaluator, "measure", dying)
    assert main([*command, f"--output={killed}"]) == 130
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err
    assert sorted(path.name for path in killed.rglob("*")) == ["accuracy.json", "parts"]
    count[:] = [1] * 8
    assert main([*command, f"--output={killed}"]) == 0
    assert len(count) - 8 == (5 * 3 - 2 * 3) + 2 * 3 * 3  # two of the five models were done, and no point of a path
    assert files_of(killed) == {name: held for name, held in files_of(output).items() if "figures" not in name}


def test_linearised_vectors_are_measured_as_tangents(inputs, plain_models, clip_config, clip_weights):
    folder, _, command = inputs
    analyses = ["--analyses=[accuracy,disentanglement]", "--methods={}", "--grid.steps=3", "--linearized=true"]
    assert main([*command, *analyses, f"--output={folder / 'linear'}"]) == 0
    found = json.loads((folder / "linear/analysis.json").read_text())["analyses"]
    vectors, images, _, _ = plain_models
    module = MultiTaskModule(clip_config, clip_weights, linearized=True)

    def classes(vector, task):
        module.load_task_vector(vector)
        with torch.no_grad():
            return images[task][2](module(images[task][0])).argmax(-1)

    right = (classes(vectors.vector("letters"), "letters") == images["letters"][1]).double().mean()
    assert found["accuracy"]["measured"]["individual"]["letters"]["accuracy"] == pytest.approx(float(right))
    one, other = (vectors.vector(task) for task in ("digits", "letters"))
    joint, expected = one * 3.0 + other * -3.0, 0.0
    for task, single in (("digits", one * 3.0), ("letters", other * -3.0)):
        expected += float((classes(single, task) != classes(joint, task)).double().mean())
    assert found["disentanglement"]["pairs"][0]["prediction"][2][0] == pytest.approx(expected, abs=1e-9)


def test_a_method_may_leave_a_vector_for_each_task(inputs, plain_models, tmp_path):
    from lit_merge.transforms import tall_masks

    _, _, command = inputs
    settings = ["--analyses=[accuracy]", "--methods={masks: {recipe: tall_masks, settings: {threshold: 0.7}}}"]
    assert main([*command, *settings, f"--output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out/analysis.json").read_text())["analyses"]["accuracy"]
    vectors, _, _, accuracy = plain_models
    masked = tall_masks(threshold=0.7)(vectors)
    rows = found["measured"]["masks"]
    assert list(rows) == TASKS
    for task in TASKS:
        assert rows[task]["accuracy"] == pytest.approx(accuracy(masked.vector(task))[task])
    assert found["methods"] == {"masks": repr(tall_masks(threshold=0.7))}


def test_tasks_may_have_the_same_vector(inputs, plain_models, tmp_path):
    _, files, command = inputs
    twice = [*command[:1], f"--vectors=[{files[0]},{files[0]}]", "--tasks=[digits,letters]", *command[2:]]
    assert main([*twice, "--analyses=[accuracy]", "--methods={}", f"--output={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out/analysis.json").read_text())["analyses"]["accuracy"]
    vectors, _, _, accuracy = plain_models
    expected = accuracy(vectors.vector("digits"))
    rows = found["measured"]["individual"]
    assert {task: row["accuracy"] for task, row in rows.items()} == pytest.approx(
        {task: expected[task] for task in ("digits", "letters")}
    )


TWO = """
import sys
import lit_merge.evaluation.analysis.command
from lit_merge.commands.main import main
lit_merge.evaluation.analysis.command.draw_figures = lambda *_: []
sys.exit(main({command!r}))
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_find_what_one_does(analysed, fork_server):
    output, result, command = analysed
    two = output.with_name("two")
    fork_server.run_on_two(TWO.format(command=[*command, f"--output={two}", "--devices=2"]))
    found = json.loads((two / "analysis.json").read_text())
    assert {key: value for key, value in found.items() if key != "analyses"} == {
        key: value for key, value in result.items() if key != "analyses"
    }
    assert list(found["analyses"]) == list(result["analyses"])

    def numbers(value):
        if isinstance(value, dict):
            return [number for item in value.values() for number in numbers(item)]
        if isinstance(value, list):
            return [number for item in value for number in numbers(item)]
        return [value] if isinstance(value, float) else []

    for name, content in result["analyses"].items():
        assert numbers(found["analyses"][name]) == pytest.approx(numbers(content), rel=1e-4, abs=1e-6), name
    assert files_of(two).keys() == {name for name in files_of(output) if "figures" not in name}


def test_any_models_vectors_can_be_described(inputs, tmp_path, tiny_encoder, capsys):
    from safetensors.torch import save_file

    start = {name: value.detach() for name, value in tiny_encoder().named_parameters()}
    save_file(start, tmp_path / "base.safetensors")
    for seed, name in enumerate(("a", "b")):
        noise = torch.Generator().manual_seed(seed)
        tuned = {n: value + 4**seed * torch.randn(value.shape, generator=noise) for n, value in start.items()}
        save_file(tuned, tmp_path / f"{name}.safetensors")
    files = f"--vectors=[{tmp_path / 'a.safetensors'},{tmp_path / 'b.safetensors'}]"
    command = ["analyze", files, f"--base={tmp_path / 'base.safetensors'}", f"--output={tmp_path / 'out'}"]
    assert main(command) == 0
    result = json.loads((tmp_path / "out/analysis.json").read_text())
    assert list(result["analyses"]) == ["cosine", "norms", "signs"]
    assert result["analyses"]["norms"]["places"] == ["whole", "parameters"]
    assert result["tasks"] == ["a", "b"]
    (line,) = result["warnings"]
    norms = result["analyses"]["norms"]["norm"][0]
    assert f"‖τ‖ of b is {norms[1]:.3g}, {norms[1] / norms[0]:.1f} times that of a, {norms[0]:.3g} " in line
    assert capsys.readouterr().err == f"lit-merge: warning: {line}\n"
    assert f"<p>{line}</p>" in analysis_page(tmp_path / "out/analysis.json")


REFUSALS = {
    "analyses: expected some of cosine, norms, signs, coefficients, .*, got none.": ["--analyses=[]"],
    "analyses: expected some of cosine, .* got one of them twice.": ["--analyses=[cosine,cosine]"],
    "coefficients: expected a file of merging coefficients, got none. Give it.": ["--analyses=[coefficients]"],
    "coefficients: expected only with that analysis, got c. Add coefficients to analyses.": [
        *("--analyses=[cosine]", "--coefficients=c"),
    ],
    "density: expected a finite number at least 0 and at most 1, got 1.5.": ["--density=1.5"],
    "batch_size: expected a whole number of at least 1, got 0.": ["--batch_size=0"],
    "images: expected a whole number of at least 1 or null, got 0.": ["--analyses=[accuracy]", "--images=0"],
    "devices: expected a whole number of at least 1, got 0.": ["--devices=0"],
    "tasks: expected a name for every vector, each once, got digits again. Set tasks.": ["--tasks=[digits,digits,a]"],
    "grid: expected low below high, got 1 and 0. Use e.g. low: -3 and high: 3.": ["--grid.low=1", "--grid.high=0"],
    "grid.pairs: expected pairs of two different tasks, got .'a', 'a'.. Use e.g.": ["--grid.pairs=[[a,a]]"],
    "grid.forms: expected some of prediction, representation, each once, got ..": ["--grid.forms=[]"],
    "paths.tasks: expected at least one task, got none. Leave it out, or name one.": ["--paths.tasks=[]"],
    "grid.pairs and paths.tasks: expected tasks among digits, letters, signs, got cars. Name tasks": [
        *("--analyses=[disentanglement]", "--grid.pairs=[[digits,cars]]"),
    ],
    "paths: expected images of at least two tasks, got those of digits. Give data of other tasks": [
        *("--analyses=[paths]", "--data=MultiTaskDataModule", "--data.tasks=[digits]"),
    ],
    "data: expected images of every vector's task, got none of signs .data: digits, letters.. Name the tasks": [
        *("--analyses=[paths]", "--data=MultiTaskDataModule", "--data.tasks=[digits,letters]"),
    ],
    "data: expected a data module of several tasks, got TaskDataModule. Use MultiTaskDataModule.": [
        *("--analyses=[accuracy]", "--data=TaskDataModule", "--data.task=digits"),
    ],
    "recipe: expected the name of a method, got 'tie'": ["--analyses=[accuracy]", "--methods={m: {recipe: tie}}"],
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_are_one_line(message, inputs, tmp_path, capsys):
    _, _, command = inputs
    assert main([*command, f"--output={tmp_path / 'out'}", *REFUSALS[message]]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert re.search(message, said), said
    assert not (tmp_path / "out/analysis.json").exists()


def test_more_refusals(inputs, tmp_path, capsys):
    folder, vectors, command = inputs
    one = ["analyze", f"--vectors=[{vectors[0]}]", *command[2:], f"--output={tmp_path / 'out'}"]
    for name in ("cosine", "signs"):
        assert main([*one, f"--analyses=[{name}]"]) == 2
        assert f"{name}: expected at least two task vectors, got 1. Add one" in capsys.readouterr().err
    assert main([*one, "--analyses=[disentanglement]"]) == 2
    assert "disentanglement: expected at least two task vectors, got one. Add one" in capsys.readouterr().err
    base = [
        "analyze",
        f"--vectors=[{vectors[0]}]",
        command[3].replace("--pretrained", "--base"),
        "--analyses=[accuracy]",
    ]
    assert main([*base, f"--output={tmp_path / 'out'}"]) == 2
    assert "analyses: expected only those of vectors with base, got accuracy, which need" in capsys.readouterr().err
    assert main([*command, f"--output={folder}"]) == 2
    assert f"output: expected a new folder or one that an analysis wrote, got {folder}" in capsys.readouterr().err
    foreign = TaskVector(dict(TaskVector.load(vectors[0])), "digits", metadata={"base_fingerprint": "0" * 16})
    foreign.save(tmp_path / "foreign.safetensors")
    other = ["analyze", f"--vectors=[{tmp_path / 'foreign.safetensors'}]", *command[2:], f"--output={tmp_path / 'out'}"]
    assert main(other) == 1
    assert "(fingerprint 0000000000000000), got tiny-clip (fingerprint" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match=r"expected some of cosine, .*, got speed\."):
        check_analyses(["cosine", "speed"])
    with pytest.raises(ConfigurationError, match=r"grid\.steps: expected a whole number"):
        Grid(steps=1)
    with pytest.raises(ConfigurationError, match=r"paths\.points: expected a whole number"):
        Paths(points=1)
    with pytest.raises(ConfigurationError, match="expected exactly one of them, got none"):
        Method().resolved()
    with pytest.raises(ConfigurationError, match=r"expected images of which a part can be taken \(subset\), got list"):
        TaskImages([], "a", "b", "c")


def test_every_image_is_somebodys(few_images):
    module = MultiTaskDataModule(["digits"], preprocessing=load_clip("lit-tiny").preprocessing).tasks["digits"]
    module.setup("test")
    images = module.datasets["test"]

    def own(rank, count, number=None):
        return TaskImages(images, "digits", "ab", "c", number, processes=Processes(rank, count))

    whole = torch.cat([batch.images for batch in own(0, 1)])
    shares = [torch.cat([batch.images for batch in own(rank, 3)]) for rank in range(3)]
    assert [len(share) for share in shares] == [21, 20, 20]
    for rank, share in enumerate(shares):
        assert torch.equal(share, whole[rank::3])
    with pytest.raises(DataError, match=r"digits: expected at least one image per process, got 2 for 3\. Choose"):
        own(0, 3, 2)


def test_images_that_are_too_large_are_read_again(few_images, monkeypatch):
    module = MultiTaskDataModule(["digits"], preprocessing=load_clip("lit-tiny").preprocessing).tasks["digits"]
    module.setup("test")
    reads = []
    read = type(module.datasets["test"]).read
    monkeypatch.setattr(type(module.datasets["test"]), "read", lambda *a: reads.append(1) or read(*a))

    def passes(room):
        monkeypatch.setattr("lit_merge.evaluation.analysis.images._KEPT", room)
        reads.clear()
        images = TaskImages(module.datasets["test"], "digits", "ab", "c", batch_size=32)
        first, second = ([batch.labels.tolist() for batch in images] for _ in range(2))
        assert first == second
        return len(reads)

    assert (passes(1 << 30), passes(1000)) == (2, 4)


def test_figures_leave_gaps_where_nothing_is_known(analysed, tmp_path):
    _, result, _ = analysed
    changed = json.loads(json.dumps(result))
    changed["analyses"] = {
        key: value for key, value in changed["analyses"].items() if key in ("disentanglement", "accuracy")
    }
    changed["analyses"]["disentanglement"]["pairs"][0]["prediction"][0][0] = None
    del changed["analyses"]["accuracy"]["measured"]["individual"]["digits"]
    changed["analyses"]["accuracy"]["normalised"]["ties"] = None
    assert len(draw_figures(changed, tmp_path)) == 6


# Networks that predict tokens


@pytest.fixture
def of_tokens(tmp_path, monkeypatch, own_cache):
    """Two vectors of a small GPT-2, and texts whose targets have one to four tokens; the command's arguments."""
    monkeypatch.chdir(tmp_path)
    language_folder(tmp_path / "model", "gpt2")
    network = CausalNetwork("model")
    draw = torch.Generator().manual_seed(0)
    sources = []
    for task in TASKS[:2]:
        rows = [f"{'abcdefgh'[i % 8]} w{i % 9},{' '.join('abcd'[: 1 + i % 4])}" for i in range(40)]
        (tmp_path / f"{task}.csv").write_text("text,target\n" + "\n".join(rows) + "\n")
        moved = {n: 0.1 * torch.randn(one.shape, generator=draw) for n, one in network.parameters.items()}
        header = {"base_fingerprint": network.fingerprint}
        TaskVector(moved, task, metadata=header).save(tmp_path / f"{task}.safetensors")
        settings = f"{{path: {task}.csv, label_column: null, target: target, repeated: keep}}"
        sources.append(f"{task}: {{class_path: lit_merge.data.TextTask, init_args: {settings}}}")
    arguments = ["analyze", f"--vectors=[{', '.join(f'{task}.safetensors' for task in TASKS[:2])}]"]
    arguments += ["--network=lit_merge.models.language.CausalNetwork", "--network.path=model", "--batch_size=3"]
    return [*arguments, "--data=lit_merge.data.MultiTaskDataModule", f"--data.sources={{{', '.join(sources)}}}"]


def test_tau_jp_of_next_tokens_is_the_norm_of_all_numbers_of_an_example(of_tokens):
    assert main([*of_tokens, "--analyses=[tau_jp]", "--output=found"]) == 0
    found = json.loads(Path("found/analysis.json").read_text())["analyses"]["tau_jp"]["tau_jp"]
    network = CausalNetwork("model")
    sources = {task: TextTask(f"{task}.csv", label_column=None, target="target", repeated="keep") for task in TASKS[:2]}
    data = MultiTaskDataModule(sources=sources)
    for task in TASKS[:2]:
        examples = data.tasks[task].examples("test", network)
        for own in TASKS[:2]:
            vector = dict(TaskVector.load(f"{own}.safetensors"))
            norms = [
                float(linearize(network.module, {}, vector, *examples.__getitems__([row]).inputs)[1].detach().norm())
                for row in range(len(examples))
            ]
            assert len(norms) > 3
            assert found[own][task] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


@pytest.mark.parametrize("name", ["disentanglement", "advantage"])
def test_what_compares_vectors_is_refused_of_tokens(name, of_tokens, capsys):
    assert main([*of_tokens, f"--analyses=[tau_jp, {name}]", "--output=found"]) == 2
    assert f"expected a network whose features are one vector for {name}, got test_what" in (capsys.readouterr().err)
