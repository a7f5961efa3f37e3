"""Coefficients while they are learned: what is logged, kept, written and drawn."""

from __future__ import annotations

import csv
import json
import logging

import lightning as L
import numpy as np
import pytest
import torch
from builders.learned_merge import Merging, NoMerge, Steps, coefficients_of, vision_transformer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lit_merge.callbacks import LogCoefficients
from lit_merge.errors import ConfigurationError
from lit_merge.report.coefficient_depth import depth_means, group_places, lines_fit
from lit_merge.report.coefficient_figures import coefficient_depth_figure, coefficient_heat_map

TASKS = ("shapes", "signs")
EIGHT = ("digits", "clutter", "letters", "signs", "textures", "land", "vehicles", "scenes")
# The stand-in's parameters by depth, written out by hand.
PLACES = {
    "embedding": ["conv1.weight", "conv1.bias"],
    **{f"block {index}": [f"blocks.{index}.weight", f"blocks.{index}.bias"] for index in range(3)},
    "head": ["proj.weight", "proj.bias"],
}


@pytest.fixture
def fit(silent_trainer, tiny_data, tiny_tasks):
    """``fit(module, callbacks, …)``: the trainer after a run of six batches per epoch."""

    def run(module, *callbacks, ckpt_path=None, **settings):
        torch.manual_seed(5)
        settings["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        data = tiny_tasks({task: tiny_data(name=task, seed=seed) for seed, task in enumerate(TASKS)})
        trainer = silent_trainer(callbacks=list(callbacks), **{"max_steps": 7, **settings})
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


def record_of(raw, names, clamp):
    """What has to be known of the coefficients of single parameters ``[T, L]``, in plain loops."""
    rows = [[float(value) for value in row] for row in raw]
    low, high = (-np.inf, np.inf) if clamp is None else (float(torch.tensor(end)) for end in clamp)
    applied = [[min(max(value, low), high) for value in row] for row in rows]
    everything = [value for row in applied for value in row]
    by_depth = [
        [np.mean([row[names.index(name)] for name in members]) for members in PLACES.values()] for row in applied
    ]
    return {
        "mean": {task: pytest.approx(np.mean(row)) for task, row in zip(TASKS, applied, strict=True)},
        "negative": pytest.approx(np.mean([value < 0 for value in everything])),
        "saturated": pytest.approx(np.mean([value in (low, high) for value in everything])),
        "by_depth": {task: pytest.approx(row) for task, row in zip(TASKS, by_depth, strict=True)},
    }


@pytest.mark.parametrize("clamp", [(0.0, 1.0), (0.1, 0.35), None])
def test_every_record_is_that_of_a_plain_loop(clamp, fit):
    module, callback, steps = Merging(TASKS, clamp=clamp, learning_rate=0.1), LogCoefficients(2, figures=False), Steps()
    with torch.no_grad():
        module.merged.coefficients[0, :3] = torch.tensor([-0.5, 0.1, 2.0])
    fit(module, callback, steps)
    names = list(module.merged.members)
    assert callback.depths == tuple(PLACES)
    assert [record["step"] for record in callback.history] == [0, 2, 4, 6, 7]
    for record in callback.history:
        assert record == {"step": record["step"], **record_of(steps.coefficients[record["step"]], names, clamp)}
    assert (callback.history[0]["saturated"] > 0) == (clamp is not None)
    assert (callback.history[0]["negative"] > 0) == (clamp is None)
    means = {record["mean"]["signs"] for record in callback.history}
    assert len(means) > 2, "the coefficients move, until the clamp holds them"


def test_loggers_get_every_record_and_monitors_the_last(fit, tmp_path):
    callback, steps, logger = LogCoefficients(3), Steps(), CSVLogger(tmp_path, name="", version="")
    fit(Merging(TASKS), callback, steps, logger=logger, log_every_n_steps=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["coefficient/shapes"]]
    assert [row["step"] for row in rows] == ["0", "2", "5", "6"]
    for row, record in zip(rows, callback.history, strict=True):
        for task in TASKS:
            assert float(row[f"coefficient/{task}"]) == pytest.approx(record["mean"][task])
        assert float(row["coefficient/negative"]) == record["negative"]
        assert float(row["coefficient/saturated"]) == record["saturated"]
    assert steps.metrics[5]["coefficient/signs"] == pytest.approx(callback.history[1]["mean"]["signs"])
    assert "coefficient/signs" not in steps.metrics[2]


def test_a_step_of_several_batches_is_recorded_once(fit):
    callback = LogCoefficients(1)
    fit(Merging(TASKS), callback, max_steps=-1, max_epochs=2, accumulate_grad_batches=4)
    assert [record["step"] for record in callback.history] == [0, 1, 2, 3, 4]


def test_a_resumed_run_has_the_whole_history(fit, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    whole, rest = LogCoefficients(2), LogCoefficients(2)
    fit(Merging(TASKS), whole, keep)
    fit(Merging(TASKS), rest, ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert [record["step"] for record in rest.history] == [0, 2, 4, 6, 7]
    assert rest.history[:3] == whole.history[:3]


def test_another_run_forgets_and_the_same_one_goes_on(fit):
    module, callback = Merging(TASKS), LogCoefficients(3)
    trainer = fit(module, callback)
    first = list(callback.history)
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(module, datamodule=trainer.datamodule)
    assert [record["step"] for record in callback.history] == [0, 3, 6, 7, 9]
    assert callback.history[:4] == first
    fit(Merging(TASKS), callback)
    assert callback.history == first


def test_what_is_written_at_the_end(fit, tmp_path):
    callback = LogCoefficients(4)
    fit(Merging(TASKS, granularity="block"), callback)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "coefficients.png",
        "coefficients_depth.png",
        "coefficients_history.json",
    ]
    content = json.loads((tmp_path / "run" / "coefficients_history.json").read_text())
    assert content == {"depths": list(PLACES), "history": callback.history}
    for name in ("coefficients.png", "coefficients_depth.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            picture.load()
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize(
    ("settings", "figures", "names"),
    [
        ({"granularity": "task"}, True, ["coefficients.png", "coefficients_history.json"]),
        ({}, False, ["coefficients_history.json"]),
    ],
)
def test_no_figure_that_has_no_sense_or_was_not_asked_for(settings, figures, names, fit, tmp_path):
    callback = LogCoefficients(4, figures=figures)
    fit(Merging(TASKS, **settings), callback)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert ("by_depth" in callback.history[0]) == bool(callback.depths) == (settings == {})


def test_one_line_about_negative_and_saturated_coefficients(fit, caplog):
    def remark(values, clamp):
        module = Merging(TASKS, granularity="task", clamp=clamp, learning_rate=0.0)
        with torch.no_grad():
            module.merged.coefficients.copy_(torch.tensor(values)[:, None])
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            fit(module, LogCoefficients(figures=False))
        return [record.getMessage() for record in caplog.records if "Merging" in record.getMessage()]

    assert remark([0.2, 0.3], (0.0, 1.0)) == []
    assert remark([-7.0, 7.0], (0.0, 1.0)) == [
        "Merging coefficients: 2 of 2 are at an end of the clamp [0, 1] (shapes 1, signs 1)."
    ]
    assert remark([0.2, -0.1], None) == ["Merging coefficients: 1 of 2 are negative (signs 1)."]
    assert remark([-2.0, -0.1], (-0.5, 1.0)) == [
        "Merging coefficients: 2 of 2 are negative (shapes 1, signs 1); 1 of 2 are at an end of the clamp [-0.5, 1] "
        "(shapes 1)."
    ]


def test_training_does_not_notice(fit):
    def run(*callbacks):
        module, steps = Merging(TASKS), Steps()
        trainer = fit(module, *callbacks, steps)
        return module.state_dict(), trainer.optimizers[0].state_dict()["state"][0], steps.states

    (first, first_moments, first_states), (second, moments, states) = run(), run(LogCoefficients(1))
    assert first_states == states
    for one, two in ((first, second), (first_moments, moments)):
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
def test_a_distance_that_is_refused(value):
    with pytest.raises(ConfigurationError, match=r"^every_n_steps: expected a whole number of at least 1, got .*\.$"):
        LogCoefficients(value)


def test_a_module_without_a_merge_is_refused(fit):
    message = (
        r"^LogCoefficients: expected a module that learns merging coefficients, such as MergeModule, got NoMerge "
        r"without merged\. Remove the callback\.$"
    )
    with pytest.raises(ConfigurationError, match=message):
        fit(NoMerge(), LogCoefficients())


# ------------------------------------------------------------------------------------------------------ by depth


def test_places_are_those_of_the_names_whatever_their_order():
    coefficients = coefficients_of(vision_transformer(3), "tensor", EIGHT)
    places = group_places(coefficients)
    assert [name for name, place in places.items() if place == -1] == [
        "class_embedding",
        "positional_embedding",
        "conv1.weight",
        "ln_pre.weight",
        "ln_pre.bias",
    ]
    assert [name for name, place in places.items() if place == 3] == ["proj", "ln_post.weight", "ln_post.bias"]
    assert sum(place == 1 for place in places.values()) == 12
    assert depth_means(coefficients).names == ("embedding", "block 0", "block 1", "block 2", "head")


@pytest.mark.parametrize("granularity", ["tensor", "block", "group"])
def test_means_by_depth_and_their_line_are_those_of_plain_loops(granularity):
    coefficients = coefficients_of(vision_transformer(4), granularity, EIGHT)
    means = depth_means(coefficients)
    owners = {name: group for group, name in ((g, n) for n, g in coefficients.members.items())}
    curve = []
    for block in range(4):
        groups = list(dict.fromkeys(owners[name] for name in owners if f"resblocks.{block}." in name))
        rows = [
            np.mean([float(coefficients.values[task, coefficients.groups.index(group)]) for group in groups])
            for task in range(len(EIGHT))
        ]
        assert means.values[:, 1 + block].tolist() == pytest.approx(rows)
        curve.append(np.mean(rows))
    slope, start = np.polyfit([0, 1 / 3, 2 / 3, 1], curve, 1)
    assert lines_fit(means) == pytest.approx((start, start + slope))


def test_the_line_through_a_line_is_that_line_and_one_block_has_none():
    coefficients = coefficients_of(vision_transformer(5), "block", ("a",))
    coefficients.values[0, 1:6] = 0.2 + 0.4 * torch.arange(5, dtype=torch.float64) / 4
    assert coefficients.groups[1] == "head", "registered before the blocks"
    coefficients.values[0, 2:7] = coefficients.values[0, 1:6].clone()
    assert lines_fit(depth_means(coefficients)) == pytest.approx((0.2, 0.6))
    single = depth_means(coefficients_of(vision_transformer(1), "tensor", ("a",)))
    assert single.names == ("embedding", "block 0", "head")
    assert lines_fit(single) is None


def test_blocks_without_parameters_keep_their_distance():
    names = [f"blocks.{index}.weight" for index in (0, 1, 4)]
    means = depth_means(coefficients_of(names, "block", ("a", "b")))
    assert means.names == ("block 0", "block 1", "block 4")
    slope, start = np.polyfit([0, 0.25, 1], means.values.mean(0).numpy(), 1)
    assert lines_fit(means) == pytest.approx((start, start + slope))


@pytest.mark.parametrize(
    ("names", "granularity"), [(vision_transformer(2), "task"), (["inner.weight", "outer.weight"], "tensor")]
)
def test_coefficients_without_depth(names, granularity):
    coefficients = coefficients_of(names, granularity, EIGHT)
    assert group_places(coefficients) is None
    assert depth_means(coefficients) is None


# ------------------------------------------------------------------------------------------------------ figures


BASE = {"base_model": "ViT-B-32 (openai)", "step": "500"}
TWENTY = [f"stanford_cars_{number}" for number in range(20)]
SHAPES = {
    "8 x 152": coefficients_of(vision_transformer(12), "tensor", EIGHT, **BASE),
    "8 x 1": coefficients_of(vision_transformer(12), "task", EIGHT, **BASE),
    "8 x 14": coefficients_of(vision_transformer(12), "block", EIGHT, **BASE),
    "8 x 38": coefficients_of(vision_transformer(12), "group", EIGHT, **BASE),
    "8 x 296": coefficients_of(vision_transformer(24), "tensor", EIGHT, **BASE),
    "20 x 152, some negative": coefficients_of(vision_transformer(12), "tensor", TWENTY, start=-0.4),
    "1 x 14": coefficients_of(vision_transformer(12), "block", ("digits",)),
    "2 x 3, equal": coefficients_of(vision_transformer(1), "block", EIGHT[:2], start=0.3, end=0.3, **BASE),
    "3 x 2, no blocks": coefficients_of(["inner.weight", "outer.weight"], "tensor", EIGHT[:3], **BASE),
    "3 x 80, no blocks": coefficients_of([f"w{number}" for number in range(80)], "tensor", EIGHT[:3], **BASE),
    "zeros": coefficients_of(vision_transformer(4), "block", EIGHT[:3], start=0.0, end=0.0),
}


def texts_of(coefficients, draw, tmp_path, monkeypatch):
    """Every visible text with its extent in pixels, as drawn."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    def extent(text, renderer):
        box = text.get_window_extent(renderer)
        empty = box.height / 2 if text.get_text().startswith("\n") else 0  # the first of two lines
        return Bbox.from_extents(box.x0, box.y0, box.x1, box.y1 - empty)

    seen = {}
    savefig = Figure.savefig

    def look(figure, *arguments, **settings):
        savefig(figure, *arguments, **settings)
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        undrawn = {
            id(label)
            for axes in figure.axes
            for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
            for tick in axis.get_major_ticks()
            for label in (tick.label1, tick.label2)
            if not axes.axison or not low <= tick.get_loc() <= high
        }
        renderer = figure.canvas.get_renderer()
        seen["texts"] = [(t.get_text(), extent(t, renderer)) for t in texts if id(t) not in undrawn]
        seen["size"] = figure.get_size_inches() * figure.dpi

    monkeypatch.setattr(Figure, "savefig", look)
    draw(coefficients, tmp_path / "figure.png")
    return seen["texts"], seen["size"]


@pytest.mark.parametrize("draw", [coefficient_heat_map, coefficient_depth_figure])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_text_overlaps_another_or_leaves_the_figure(shape, draw, tmp_path, monkeypatch):
    if draw is coefficient_depth_figure and depth_means(SHAPES[shape]) is None:
        pytest.skip("without depth")
    shown, (width, height) = texts_of(SHAPES[shape], draw, tmp_path, monkeypatch)
    assert len(shown) > 5
    for index, (first, box) in enumerate(shown):
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, f"{first!r} leaves the figure"
        for second, other in shown[index + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, down) <= 1, f"{first!r} overlaps {second!r} by {across:.0f} x {down:.0f} pixels"


def test_the_heat_map_says_what_it_shows(tmp_path, monkeypatch):
    shown, _ = texts_of(SHAPES["8 x 14"], coefficient_heat_map, tmp_path, monkeypatch)
    texts = [text for text, _ in shown]
    assert {"Merging coefficients", "ViT-B-32 (openai), one per task and block, after 500 steps"} <= set(texts)
    values, order = SHAPES["8 x 14"].values, [0, *range(2, 14), 1]  # head was registered second
    for task, row in zip(EIGHT, values, strict=True):
        assert task in texts
        assert f"{float(row.mean()):.2f}" in texts
    cells = [text for text in texts if text.count(".") == 1 and len(text) == 4]
    assert [f"{float(values[0, column]):.2f}" for column in order] == cells[:14]
    assert {"\nembedding", "0", "11", "\nhead", "block"} <= set(texts)
    shown, _ = texts_of(SHAPES["8 x 38"], coefficient_heat_map, tmp_path, monkeypatch)
    assert {"block 3 attention", "block 11 mlp", "embedding"} <= {text for text, _ in shown}
    shown, _ = texts_of(SHAPES["8 x 152"], coefficient_heat_map, tmp_path, monkeypatch)
    numbers = [text for text, _ in shown if text.isdecimal()]
    assert numbers == [str(block) for block in range(12)]


def test_the_depth_figure_names_both_ends_of_the_line(tmp_path, monkeypatch):
    coefficients = coefficients_of(vision_transformer(3), "block", EIGHT[:2])
    # In the order of the groups: embedding, head, three blocks.
    coefficients.values.copy_(torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.3], [0.9, 0.8, 0.1, 0.4, 0.7]]))
    shown, _ = texts_of(coefficients, coefficient_depth_figure, tmp_path, monkeypatch)
    texts = [text for text, _ in shown]
    assert "LiNeS line fitted to the mean: 0.10 → 0.50" in texts
    assert {"mean over tasks", "each task", "digits", "clutter", "\nembedding", "\nhead"} <= set(texts)
    alone = coefficients_of(vision_transformer(3), "block", EIGHT[:1], start=-0.5, end=-0.5)
    shown, _ = texts_of(alone, coefficient_depth_figure, tmp_path, monkeypatch)
    assert "LiNeS line fitted to it: −0.50 → −0.50" in [text for text, _ in shown]


@pytest.mark.parametrize("draw", [coefficient_heat_map, coefficient_depth_figure])
def test_the_same_coefficients_give_the_same_bytes_without_pyplot(draw, tmp_path):
    first = draw(SHAPES["8 x 14"], tmp_path / "new" / "first.png")
    again = draw(SHAPES["8 x 14"], tmp_path / "again.png")
    assert first == tmp_path / "new" / "first.png"
    assert first.read_bytes() == again.read_bytes()
    assert draw(SHAPES["1 x 14"], tmp_path / "other.png").read_bytes() != first.read_bytes()


def test_colours_tell_negative_from_positive(tmp_path):
    coefficients = coefficients_of(["a", "b", "c"], "tensor", ("one",))
    coefficients.values.copy_(torch.tensor([[-0.4, 0.0, 0.4]]))

    def colours():
        with Image.open(coefficient_heat_map(coefficients, tmp_path / "figure.png")) as picture:
            image = np.asarray(picture.convert("RGB")).astype(int)
        row = image[round(150 * 1.14)]  # just below the upper edge of the cells, above their numbers
        inside = [tuple(pixel) for pixel in row if tuple(pixel) != (255, 255, 255)]
        return max(inside, key=lambda pixel: pixel[0] - pixel[2]), max(inside, key=lambda pixel: pixel[2] - pixel[0])

    orange, purple = colours()
    assert orange[0] - orange[2] > 100
    assert purple[2] - purple[0] > 30


def test_figures_that_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"figure\.pdf: expected a path that ends in \.png or \.svg, got"):
        coefficient_heat_map(SHAPES["8 x 1"], tmp_path / "figure.pdf")
    message = (
        r"^coefficients: expected groups that lie in one block each, got task coefficients of 1 groups\. "
        r"Use coefficient_heat_map, or learn them by block or tensor\.$"
    )
    with pytest.raises(ConfigurationError, match=message):
        coefficient_depth_figure(SHAPES["8 x 1"], tmp_path / "figure.png")
    assert not any(tmp_path.iterdir())


def test_a_callback_of_lightning():
    assert isinstance(LogCoefficients(), L.Callback)
