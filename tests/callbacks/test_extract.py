"""What the callbacks write, when, and that a failure leaves nothing half written."""

from __future__ import annotations

import csv
import json
import math

import lightning as L
import pytest
import torch
from torch import nn

from lit_merge.callbacks import ExtractTaskVector, WriteMetrics, WritePredictions
from lit_merge.data.batch import ImageBatch
from lit_merge.errors import ConfigurationError, NonFiniteError
from lit_merge.files.text import write_text
from lit_merge.models import Preprocessing
from lit_merge.modules import FineTuneModule, MultiTaskModule
from lit_merge.params import norm
from lit_merge.vectors import TaskVector


@pytest.fixture
def module(tiny_encoder, tiny_head):
    def build(kind=FineTuneModule, **settings):
        size = Preprocessing(image_size=4)
        return kind(encoder=tiny_encoder(), head=tiny_head(), preprocessing=size, learning_rate=0.03, **settings)

    return build


@pytest.fixture
def fit(silent_trainer, tiny_data):
    """``fit(module, callback, …)``: the module after a run of six batches per epoch."""

    def run(tuned, callback, data=None, **settings):
        trainer = silent_trainer(callbacks=[callback], **{"max_epochs": 1, **settings})
        trainer.fit(tuned, datamodule=data or tiny_data())
        return trainer

    return run


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def assert_same(first, second):
    assert set(first) == set(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# The task vector


def test_the_vector_is_written_when_fit_ends(module, fit, tmp_path):
    tuned, callback = module(), ExtractTaskVector()
    fit(tuned, callback)
    assert files(tmp_path) == ["task_vector.safetensors"]
    vector = TaskVector.load(tmp_path / "run" / "task_vector.safetensors", verify=True)
    assert_same(vector, tuned.task_vector())
    assert_same(callback.vector, vector)
    assert vector.norm() > 0.1


def test_the_header_tells_where_it_comes_from(module, fit, tmp_path):
    tuned = module()
    fit(tuned, ExtractTaskVector("deep/er/shapes.safetensors"), max_steps=4)
    header = TaskVector.load(tmp_path / "run" / "deep" / "er" / "shapes.safetensors").metadata
    length = norm(tuned.task_vector())
    assert header["task"] == "shapes"
    assert json.loads(header["classes"]) == ["a", "b", "c"]
    assert header["regime"] == "full"
    assert header["base_fingerprint"] == tuned.base_fingerprint
    assert header["base_model"] == "TinyEncoder"
    assert header["step"] == "4"
    assert float(header["norm"]) == pytest.approx(length, rel=1e-5)
    assert float(header["relative_norm"]) == pytest.approx(length / norm(tuned.initial_parameters), rel=1e-5)
    assert set(json.loads(header["versions"])) == {"lit_merge", "torch", "lightning"}
    assert json.loads(header["storage"]) == {"dtype": "float32", "relative_error": 0}


def test_bfloat16_says_what_it_costs(module, fit, tmp_path):
    tuned = module()
    fit(tuned, ExtractTaskVector(dtype="bfloat16"))
    vector, exact = TaskVector.load(tmp_path / "run" / "task_vector.safetensors", verify=True), tuned.task_vector()
    assert_same(vector, {name: tensor.bfloat16() for name, tensor in exact.items()})
    error = norm({name: vector[name].double() - tensor.double() for name, tensor in exact.items()}) / norm(exact)
    storage = json.loads(vector.metadata["storage"])
    assert storage["dtype"] == "bfloat16"
    assert 1e-4 < error < 4e-3
    assert storage["relative_error"] == pytest.approx(error, rel=1e-5)


class Record(L.Callback):
    """The encoder's weights at every step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights[trainer.global_step] = {
            name: tensor.detach().clone() for name, tensor in pl_module.encoder.named_parameters()
        }


@pytest.mark.parametrize(
    ("accumulate", "every", "steps"), [(1, 4, (4, 8, 12)), (1, 5, (5, 10)), (4, 1, (1, 2, 3, 4)), (4, 2, (2, 4))]
)
def test_vectors_on_the_way(accumulate, every, steps, module, fit, tmp_path, monkeypatch):
    """With six batches an epoch and four to a step, the second step of each epoch has two."""
    tuned, record = module(), Record()
    written = []
    write = TaskVector.save
    monkeypatch.setattr(TaskVector, "save", lambda *arguments: written.append(arguments[1].stem) or write(*arguments))
    callback = ExtractTaskVector(every_n_steps=every)
    trainer = fit(tuned, callback, max_epochs=2, accumulate_grad_batches=accumulate, limit_val_batches=0)
    assert trainer.global_step == (12 if accumulate == 1 else 4)
    assert written == [*(f"task_vector-step={step}" for step in steps), "task_vector"]
    tuned = module()
    fit(tuned, record, max_epochs=2, accumulate_grad_batches=accumulate, limit_val_batches=0)
    for step in steps:
        vector = TaskVector.load(tmp_path / "run" / f"task_vector-step={step}.safetensors")
        assert vector.metadata["step"] == str(step)
        initial = tuned.initial_parameters
        assert_same(vector, {name: tensor - initial[name] for name, tensor in record.weights[step].items()})


class Scripted(FineTuneModule):
    """Logs given values as its validation accuracy."""

    script = ()

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", float(self.script[self.current_epoch]))


@pytest.mark.parametrize(
    ("mode", "script", "best", "value"),
    [
        ("max", (0.3, 0.7, 0.7, 0.5), 2, 0.7),
        ("min", (0.3, 0.7, 0.2, 0.5), 3, 0.2),
        ("max", (math.nan, 0.2, math.nan, 0.1), 2, 0.2),
    ],
)
def test_the_best_vector_is_kept(mode, script, best, value, module, fit, tmp_path):
    tuned, callback = module(Scripted), ExtractTaskVector(best="val/accuracy", mode=mode)
    tuned.script = script
    fit(tuned, callback, max_epochs=4)  # the sanity check before does not count
    assert files(tmp_path) == ["task_vector-best.safetensors", "task_vector.safetensors"]
    header = TaskVector.load(tmp_path / "run" / "task_vector-best.safetensors").metadata
    assert header["step"] == str(6 * best)
    assert callback.state_dict() == {"best_value": pytest.approx(value)}


def test_a_resumed_run_remembers_the_best(module, fit, tmp_path):
    tuned = module(Scripted)
    tuned.script = (0.9, 0.2)
    trainer = fit(tuned, ExtractTaskVector(best="val/accuracy"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = ExtractTaskVector(best="val/accuracy")
    checkpoint = torch.load(tmp_path / "first.ckpt", weights_only=True)
    callback.load_state_dict(next(iter(checkpoint["callbacks"].values())))
    assert callback.best_value == pytest.approx(0.9)
    again = module(Scripted)
    again.script = (0.1, 0.2)
    fit(again, callback, max_epochs=2)
    assert TaskVector.load(tmp_path / "run" / "task_vector-best.safetensors").metadata["step"] == "6"


def test_joint_fine_tuning_gives_a_vector_too(tiny_encoder, tiny_head, tiny_data, tiny_tasks, fit, tmp_path):
    tuned = MultiTaskModule(encoder=tiny_encoder(), heads={name: tiny_head() for name in ("one", "two")})
    fit(tuned, ExtractTaskVector(), tiny_tasks({"one": tiny_data(), "two": tiny_data(seed=4)}))
    vector = TaskVector.load(tmp_path / "run" / "task_vector.safetensors")
    assert_same(vector, tuned.task_vector())
    assert vector.task == "one+two"


def test_settings_that_make_no_sense_are_refused():
    for settings, part in (
        ({"path": "vector.pt"}, "path: expected a file ending in .safetensors, got 'vector.pt'"),
        ({"every_n_steps": 0}, "every_n_steps: expected a whole number of at least 1 or null, got 0"),
        ({"dtype": "float16"}, "dtype: expected float32 or bfloat16, got 'float16'"),
        ({"mode": "maximum"}, "mode: expected max or min, got 'maximum'"),
    ):
        with pytest.raises(ConfigurationError) as error:
            ExtractTaskVector(**settings)
        assert part in str(error.value)
        assert "\n" not in str(error.value)


def test_a_metric_that_nobody_logs_is_refused(module, fit, tmp_path):
    with pytest.raises(ConfigurationError) as error:
        fit(module(), ExtractTaskVector(best="val/acc"))
    assert "train/accuracy, train/loss, val/accuracy, val/loss" in str(error.value)
    assert "got 'val/acc'" in str(error.value)
    assert files(tmp_path) == []


def test_a_best_vector_without_validation_is_missed(module, fit, tmp_path):
    with pytest.raises(ConfigurationError, match="best: expected a validation with a finite val/accuracy, got none"):
        fit(module(), ExtractTaskVector(best="val/accuracy"), limit_val_batches=0)
    assert files(tmp_path) == ["task_vector.safetensors"]


def test_a_module_without_a_task_vector_is_refused_before_it_trains(fit, tiny_data, tmp_path):
    class Other(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(48, 3)

        def training_step(self, batch, batch_idx):
            raise AssertionError("trained")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ConfigurationError) as error:
        fit(Other(), ExtractTaskVector())
    assert "Other without task_vector, task, classes and 1 more" in str(error.value)
    assert "Remove the callback" in str(error.value)


def test_a_vector_that_is_not_finite_is_not_written(module, fit, tmp_path):
    class Exploding(FineTuneModule):
        def on_train_end(self):
            with torch.no_grad():
                self.encoder.outer.bias[1] = math.inf

    with pytest.raises(NonFiniteError, match=r"task vector 'shapes'.*outer\.bias"):
        fit(module(Exploding), ExtractTaskVector())
    assert files(tmp_path) == []


# Metrics and predictions


def test_metrics_are_written_after_test_and_validate_but_not_in_fit(module, fit, silent_trainer, tiny_data, tmp_path):
    tuned, callback = module(), WriteMetrics("deep/metrics.json")
    trainer = fit(tuned, callback)
    assert files(tmp_path) == []
    for stage, prefix in ((trainer.test, "test"), (trainer.validate, "val")):
        stage(tuned, datamodule=tiny_data(), verbose=False)
        text = (tmp_path / "run" / "deep" / "metrics.json").read_text(encoding="utf-8")
        found = json.loads(text)
        assert list(found) == [f"{prefix}/accuracy", f"{prefix}/loss"]
        assert found == {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert text.endswith("}\n")


def test_predictions_are_a_table_in_the_order_of_the_images(module, silent_trainer, tiny_data, tiny_batches, tmp_path):
    batches = tiny_batches(count=3, size=4)
    order = torch.tensor([7, 2, 5, -1, 0, 1, 3, -1, 4, 6, 8, 9])
    batches = [ImageBatch(batch.images, batch.labels, order[4 * n : 4 * n + 4]) for n, batch in enumerate(batches)]
    data = tiny_data(batches, classes=('a "quoted"', "b, with a comma", "ç"))
    tuned, trainer = module(), silent_trainer(callbacks=[WritePredictions()])
    for _ in range(2):  # the second run forgets the first
        trainer.predict(tuned, datamodule=data, return_predictions=False)
    with (tmp_path / "run" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "class", "probability", *data.classes]
    assert [row[0] for row in rows] == [f"image, {index}.png" for index in range(10)]
    with torch.no_grad():
        expected = tuned.classify(torch.cat([batch.images for batch in batches])).softmax(1)
    for index, row in enumerate(rows):
        probabilities = expected[order.tolist().index(index)]
        assert row[1] == data.classes[int(probabilities.argmax())]
        assert float(row[2]) == max(map(float, row[3:]))
        assert [float(value) for value in row[3:]] == pytest.approx(probabilities.tolist(), abs=1e-6)
    fewer = tiny_data([ImageBatch(batch.images, batch.labels, torch.tensor([0, 1, 2, 3])) for batch in batches[:1]])
    trainer.predict(tuned, datamodule=fewer, return_predictions=False)
    assert len((tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 5


def test_no_two_columns_of_predictions_have_one_name(module, silent_trainer, tiny_data, tiny_batches, tmp_path):
    batch = tiny_batches(count=1, size=2)[0]
    data = tiny_data([ImageBatch(batch.images, batch.labels, torch.arange(2))], classes=("class", "image", "example"))
    trainer = silent_trainer(callbacks=[WritePredictions()])
    trainer.predict(module(), datamodule=data, return_predictions=False)
    header = (tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "image,class,probability,probability of class,probability of image,example"


def test_next_tokens_are_no_table():
    outputs = {"probabilities": torch.full((2, 3, 5), 0.2), "indices": torch.arange(2)}
    with pytest.raises(
        ConfigurationError, match=r"predict: expected a task with classes, answers or a number, got one"
    ):
        WritePredictions().on_predict_batch_end(None, None, outputs, None, 0)


# Text files


def test_text_is_written_as_it_is(tmp_path):
    path = tmp_path / "new" / "folder" / "text.csv"
    write_text(path, "ä,1\nb,2\n")
    assert path.read_bytes() == "ä,1\nb,2\n".encode()
    write_text(path, "")
    assert path.read_bytes() == b""
    assert files(tmp_path) == ["text.csv"]


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file(failing, tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_text(path, "old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new and longer")
    assert path.read_text(encoding="utf-8") == "old"
    assert files(tmp_path) == ["metrics.json"]
