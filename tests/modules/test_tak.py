"""The TAK penalty against its definition, in every regime, and with files of factors that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lit_merge.commands.main import main
from lit_merge.errors import ConfigurationError, FileFormatError, NonFiniteError, StructureMismatchError
from lit_merge.evaluation.statistics import collect_kfac
from lit_merge.models import Preprocessing
from lit_merge.models.lora import LoRA
from lit_merge.models.selection import Matching
from lit_merge.modules import FineTuneModule, Tak
from lit_merge.modules.curvature import EigenCurvature, aggregated, curvatures, kronecker_form
from lit_merge.vectors import LazyTensors, TaskVector
from lit_merge.vectors.statistics import write_statistics

DOUBLE = torch.float64
COUNTS = {"shapes": 4, "lines": 6, "colours": 2}
LAYERS = ("inner", "outer")


def refused(error_class, *parts):
    """``with refused(error, "part", …)``: one line with these parts."""
    ahead = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(error_class, match=rf"^{ahead}[^\n]*$")


def positive(size, generator, *blocks):
    rows = torch.randn(*blocks, size + 2, size, dtype=DOUBLE, generator=generator)
    return rows.mT @ rows


@pytest.fixture
def module(tiny_encoder, tiny_head):
    """``module(**settings)``: a FineTuneModule around the tiny encoder, in float64, whose task is called shapes."""

    def build(**settings):
        return FineTuneModule(
            encoder=tiny_encoder(dtype=DOUBLE),
            preprocessing=Preprocessing(image_size=4),
            **{"head": tiny_head(dtype=DOUBLE), "learning_rate": 0.03, "warmup_fraction": 0.0, **settings},
        )

    return build


@pytest.fixture
def write(module, tmp_path):
    """``write(replaced={}, without=(), **header)``: a file for each task; that of lines with other contents."""

    def call(replaced=None, without=(), **header):
        generator = torch.Generator().manual_seed(5)
        sizes = {"A.inner.weight": 49, "G.inner.weight": 5, "A.outer.weight": 6, "G.outer.weight": 6}
        paths, known = {}, {"base_fingerprint": module().base_fingerprint}
        for task, count in COUNTS.items():
            tensors = {name: positive(size, generator) for name, size in sizes.items()}
            own = {"task": task, "metadata": {"images": str(count)}, **known}
            if task == "lines":
                tensors = {n: v for n, v in {**tensors, **(replaced or {})}.items() if n not in without}
                own |= header
            paths[task] = str(tmp_path / f"{task}-kfac.safetensors")
            write_statistics(paths[task], own.pop("kind", "kfac"), tensors, **own)
        return paths

    return call


# The form


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_form_and_its_gradient(blocks) -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(6, 4, dtype=DOUBLE, generator=generator).requires_grad_()
    inputs = positive(4, generator)
    outputs = positive(6, generator) if blocks == 1 else positive(2, generator, 3)
    dense = outputs if blocks == 1 else torch.block_diag(*outputs)
    plain = torch.einsum("ij,jk,kl,il->", dense, change, inputs, change)
    curvature = torch.kron(dense, inputs)  # of the elements, row by row
    torch.testing.assert_close(plain, change.flatten() @ curvature @ change.flatten())
    found = kronecker_form(change, inputs, outputs)
    torch.testing.assert_close(found, plain)
    (expected,), (gradient,) = (torch.autograd.grad(3 * form, change) for form in (plain, found))
    torch.testing.assert_close(gradient, expected)


def test_mixed_precision_does_not_round_it() -> None:
    generator = torch.Generator().manual_seed(0)
    change, matrix = torch.randn(8, 8, generator=generator), positive(8, generator).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kronecker_form(change, matrix, matrix)
    assert torch.equal(inside, kronecker_form(change, matrix, matrix))
    assert kronecker_form(change.bfloat16(), matrix, matrix).dtype == torch.float32


@pytest.mark.parametrize(("kind", "rounded"), [(torch.bfloat16, True), (torch.float16, False)])
def test_products_are_in_bfloat16_under_its_autocast(kind, rounded, module, write) -> None:
    torch.manual_seed(0)
    tuned = module(penalty=Tak(write(), 1.0))
    for _, one in tuned.trainable_parameters():
        one.data.add_(0.1 * torch.randn_like(one))
    exact = tuned.penalty.of_module(tuned)
    gradients = torch.autograd.grad(exact, [one for _, one in tuned.trainable_parameters()])
    with torch.autocast("cpu", dtype=kind):
        found = tuned.penalty.of_module(tuned)
    near = torch.autograd.grad(found, [one for _, one in tuned.trainable_parameters()])
    assert found.dtype == (torch.float32 if rounded else DOUBLE)
    for one, other in zip((exact.detach()[None], *gradients), (found.detach()[None], *near), strict=True):
        error = float((one - other).norm() / one.norm())
        assert error < 0.01 if rounded else error == 0
        assert error > 0 or not rounded
    torch.testing.assert_close(tuned.penalty.of_module(tuned), exact)  # the factors themselves are not rounded


def test_bfloat16_keeps_corrected_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, values = torch.linalg.qr(positive(8, generator))[0], torch.rand(8, 8, dtype=DOUBLE, generator=generator)
    curvature = EigenCurvature("w", "", False, basis, basis, values)
    rounded = curvature.to(torch.device("cpu"), torch.bfloat16)
    assert (rounded.inputs.dtype, rounded.values.dtype) == (torch.bfloat16, torch.float32)
    change = {"w": torch.randn(8, 8, dtype=DOUBLE, generator=generator)}
    torch.testing.assert_close(rounded.of(change).double(), curvature.of(change), rtol=0.01, atol=0.0)


def test_it_is_how_far_a_linear_network_moves_other_inputs(tmp_path) -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 4, dtype=DOUBLE)
    tau = {"weight": torch.randn(4, 3, dtype=DOUBLE), "bias": torch.randn(4, dtype=DOUBLE)}
    inputs = torch.randn(50, 3, dtype=DOUBLE)
    exact = (inputs @ tau["weight"].T + tau["bias"]).square().sum(1).mean()  # the mean of ‖J τ‖²
    factors = collect_kfac(network, [inputs], normalised=False)
    (layer,) = curvatures({**factors, "G.weight": torch.eye(4, dtype=DOUBLE)}, dict(network.named_parameters()), "")
    torch.testing.assert_close(layer.of(tau), exact)  # what probes stand for
    drawn = collect_kfac(network, [inputs.repeat(60, 1)], normalised=False)
    (layer,) = curvatures(drawn, dict(network.named_parameters()), "")
    torch.testing.assert_close(layer.of(tau), exact, rtol=0.08, atol=0)
    rows = Rows()
    (layer,) = curvatures(collect_kfac(rows, [inputs]), dict(rows.named_parameters()), "")
    change = {"weight": tau["weight"].T}
    torch.testing.assert_close(layer.of(change), kronecker_form(tau["weight"], layer.inputs, layer.outputs))


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=DOUBLE))

    def forward(self, inputs):
        return inputs @ self.weight


# Files of several tasks


def test_tasks_are_put_together_once(write) -> None:
    paths = write()
    stored = {task: LazyTensors(path) for task, path in paths.items()}
    found = aggregated(list(stored.values()))
    for name in found:
        each = [stored[task][name] * (1 if name.startswith("G.") else COUNTS[task] / 12) for task in COUNTS]
        torch.testing.assert_close(found[name], sum(each))
    # What is kept is of the same size whatever the number of tasks.
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in aggregated([stored["lines"]]).items()}
    one = aggregated([stored["lines"]])
    assert all(torch.equal(one[name], stored["lines"][name]) for name in one)


def test_corrected_eigenvalues_are_exact_for_independent_probes(module, tiny_encoder, tmp_path) -> None:
    """Of one task and one example the layer's matrix is g gᵀ, and the form (g · τ)² in the right basis."""
    encoder, paths, exact = tiny_encoder(dtype=DOUBLE), {}, 0.0
    tuned = module(linearized=True, trainable=Matching("outer"))
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            parameter.normal_()
    tau, share = tuned.task_vector(), {"lines": 1 / 4, "colours": 3 / 4}
    for task, count in (("lines", 1), ("colours", 3)):
        images = torch.randn(count, 3, 4, 4, dtype=DOUBLE)
        factors = collect_kfac(encoder, [images], normalised=False, corrected=True)
        known = {"base_fingerprint": tuned.base_fingerprint, "metadata": {"images": str(count)}}
        paths[task] = str(tmp_path / f"{task}.safetensors")
        write_statistics(paths[task], "kfac", factors, task, **known)
        rows = torch.cat([tau["outer.weight"], tau["outer.bias"][:, None]], 1)
        turned = factors["V.outer.weight"].T @ rows @ factors["U.outer.weight"]
        exact += share[task] * float((factors["D.outer.weight"] * turned.square()).sum())
        if count == 1:
            probe = torch.randn(6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
            hidden = torch.cat([torch.tanh(encoder.inner(images.flatten(1))), torch.ones(1, 1, dtype=DOUBLE)], 1)
            form = (factors["D.outer.weight"] * turned.square()).sum()
            torch.testing.assert_close(form, (probe @ rows @ hidden[0]).square().detach())
    penalty = Tak(paths, weight=1.0)
    penalty.prepare(tuned)
    found = penalty.of_module(tuned)
    torch.testing.assert_close(float(found.detach()), exact)
    found.backward()
    assert tuned.encoder.outer.weight.grad.any()
    plain = dict(collect_kfac(encoder, [torch.randn(3, 3, 4, 4, dtype=DOUBLE)]))
    write_statistics(paths["colours"], "kfac", plain, "colours", metadata={"images": "3"})
    with refused(StructureMismatchError, "factors of the same layers as in", "got nothing for D.inner.weight"):
        Tak(paths).prepare(tuned)


REGIMES = {
    "direct": {},
    "selected": {"trainable": Matching("outer")},
    "biases": {"trainable": Matching("bias")},
    "linearised": {"linearized": True},
    "low rank": {"lora": LoRA(rank=2, on=Matching("weight"))},
    "linearised low rank": {"linearized": True, "lora": LoRA(rank=2, on=Matching("weight"))},
}


@pytest.mark.parametrize("settings", REGIMES.values(), ids=REGIMES)
def test_it_is_about_what_trains(settings, module, write) -> None:
    paths = write()
    tuned = module(penalty=Tak(paths, 2.0), **settings)
    tuned.task = "shapes"
    tuned.penalty.prepare(tuned)
    with torch.no_grad():
        for parameter in tuned.encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, dtype=DOUBLE))
    vector = dict(tuned.task_vector())
    others = {task: LazyTensors(path) for task, path in paths.items() if task != "shapes"}
    expected = 0.0
    for layer in LAYERS:
        inputs = sum(COUNTS[task] / 8 * file[f"A.{layer}.weight"] for task, file in others.items())
        outputs = sum(file[f"G.{layer}.weight"] for file in others.values())
        change = torch.cat([vector[f"{layer}.weight"], vector[f"{layer}.bias"][:, None]], 1)
        expected += float(torch.trace(outputs @ change @ inputs @ change.T))
    found = tuned.penalty.of_module(tuned)
    torch.testing.assert_close(float(found.detach()), expected)
    found.backward()
    assert all(one.grad is not None and one.grad.any() for _, one in tuned.trainable_parameters())


def test_fit_is_the_plain_loop(module, write, tiny_encoder, tiny_head, tiny_data, silent_trainer) -> None:
    data, paths = tiny_data(dtype=DOUBLE), write()
    settings = {"weight_decay": 0.0, "gradient_clip": 0.0}
    tuned = module(penalty=Tak(paths, 0.01, start_step=1), **settings)
    silent_trainer(max_steps=3, precision="64-true").fit(tuned, datamodule=data)
    assert tuned.regime == (
        "full, Tak(tasks=['colours', 'lines', 'shapes'], weight=0.01, vectors=10.0, projection=0.01, "
        "without_factor='frozen', start_step=1)"
    )
    factors = aggregated([LazyTensors(paths[task]) for task in ("lines", "colours")])
    encoder, head = tiny_encoder(dtype=DOUBLE), tiny_head(dtype=DOUBLE)
    start = copy.deepcopy(dict(encoder.named_parameters()))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.03, eps=1e-6, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for step, batch in enumerate(data.batches[:3]):
        loss = F.cross_entropy(head(encoder(batch.images)), batch.labels)
        tau = {name: value - start[name] for name, value in encoder.named_parameters()}
        for layer in LAYERS if step else ():
            rows = torch.cat([tau[f"{layer}.weight"], tau[f"{layer}.bias"][:, None]], 1)
            inputs, outputs = factors[f"A.{layer}.weight"], factors[f"G.{layer}.weight"]
            loss = loss + 0.01 * torch.trace(outputs @ rows @ inputs @ rows.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for name, value in encoder.named_parameters():
        torch.testing.assert_close(tuned.encoder.get_parameter(name).detach(), value.detach())


@pytest.mark.parametrize("linearized", [False, True])
def test_a_resumed_run_ends_where_the_whole_one_does(
    linearized, module, write, tiny_data, silent_trainer, tmp_path
) -> None:
    data, paths = tiny_data(dtype=DOUBLE, count=2), write()

    def fit(resume=None):
        tuned = module(penalty=Tak(paths, 0.01), linearized=linearized)
        keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
        trainer = silent_trainer(max_epochs=2, precision="64-true", enable_checkpointing=True, callbacks=[keep])
        trainer.fit(tuned, datamodule=data, ckpt_path=resume, weights_only=resume and True)
        return tuned

    whole, first = fit(), tmp_path / "kept/epoch=0.ckpt"
    kept = torch.load(first, weights_only=True)["hyper_parameters"]["penalty"]
    assert kept == Tak(paths, 0.01)
    assert not kept._read  # no factors
    resumed = fit(first)
    for name, value in whole.task_vector().items():
        assert torch.equal(resumed.task_vector()[name], value)
        assert value.any()


def test_what_has_no_factor_is_frozen_or_left_alone(module, write) -> None:
    paths = write()
    for path in paths.values():
        file = LazyTensors(path)
        less = {name: value for name, value in file.items() if "outer" not in name}
        less["F.outer.bias"] = positive(6, torch.Generator().manual_seed(1))
        write_statistics(path, "kfac", less, file.metadata["task"], metadata={"images": "4"})
    for settings, bare in (
        ({"linearized": True}, ["outer.weight"]),
        ({}, ["outer.weight"]),
        ({"trainable": Matching("weight")}, ["outer.weight"]),
    ):
        for way in ("frozen", "unpenalised"):
            tuned = module(penalty=Tak(paths, without_factor=way), **settings)
            names = {name for name, _ in tuned.trainable_parameters()}
            tuned.penalty.prepare(tuned)
            left = {name for name, _ in tuned.trainable_parameters()}
            assert names - left == (set(bare) if way == "frozen" else set())
    tuned = module(penalty=Tak(paths, vectors=3.0, without_factor="unpenalised"), trainable=Matching("outer"))
    tuned.task = "shapes"
    with torch.no_grad():
        tuned.encoder.outer.bias.add_(1.0)
        tuned.encoder.outer.weight.add_(1.0)
    factor = sum(LazyTensors(paths[task])["F.outer.bias"] for task in ("lines", "colours")) / 2
    torch.testing.assert_close(float(tuned.penalty.of_module(tuned).detach()), 3.0 * float(factor.sum()))
    lora = module(penalty=Tak(paths), lora=LoRA(rank=2, on=Matching("weight")))
    with refused(ConfigurationError, "none for outer.weight, which cannot be frozen", "unpenalised"):
        lora.penalty.prepare(lora)
    with refused(ConfigurationError, "expected parameters that train and have a factor, got none among outer.weight"):
        module(penalty=Tak(paths)).penalty.prepare(module(trainable=Matching("outer.weight")))


def test_projections_have_a_weight_of_their_own(module, write) -> None:
    paths = write()
    tuned = module(penalty=Tak(paths, projection=0.5, projections="^outer"), trainable=Matching("outer"))
    plain = module(penalty=Tak(paths), trainable=Matching("outer"))
    for one in (tuned, plain):
        with torch.no_grad():
            one.encoder.outer.weight.add_(1.0)
    found, expected = (one.penalty.of_module(one).detach() for one in (tuned, plain))
    torch.testing.assert_close(found, 0.5 * expected)


# Refusals


@pytest.mark.parametrize(
    ("written", "error", "parts"),
    [
        (
            {"base_fingerprint": "f00"},
            StructureMismatchError,
            ["lines-kfac", "base model of the run", "fingerprint f00"],
        ),
        ({"task": "dots"}, StructureMismatchError, ["statistics of the task 'lines', got those of 'dots'"]),
        ({"kind": "gram"}, FileFormatError, ["format lit-merge/kfac/1, got lit-merge/gram/1", "--kind kfac"]),
        ({"metadata": {}}, FileFormatError, ["number of examples as images in the header, got ''"]),
        ({"without": ["A.outer.weight", "G.outer.weight"]}, StructureMismatchError, ["got others .A.outer.weight"]),
        ({"replaced": {"A.new.weight": torch.eye(2)}}, StructureMismatchError, ["nothing for A.new.weight"]),
        (
            {"replaced": {"G.inner.weight": torch.eye(4)}},
            StructureMismatchError,
            [r"shape \(4, 4\) for G.inner.weight"],
        ),
    ],
    ids=str,
)
def test_files_that_do_not_fit_are_refused(written, error, parts, module, write) -> None:
    paths = write(**written)
    tuned = module(penalty=Tak({task: paths[task] for task in ("lines", "colours")}))
    with refused(error, *parts):
        tuned.penalty.prepare(tuned)


@pytest.mark.parametrize(
    ("replaced", "without", "parts"),
    [
        ({"A.new.weight": torch.eye(2)}, (), ["expected factors of the network's parameters, got A.new.weight"]),
        ({"inner.weight": torch.eye(2)}, (), ["network's parameters, got inner.weight"]),
        ({"A.inner.weight": torch.eye(7)}, (), [r"shape \(48, 48\) for A.inner.weight, got \(7, 7\)"]),
        ({"G.inner.weight": torch.eye(4)}, (), [r"shape \(5, 5\) for G.inner.weight, got \(4, 4\)"]),
        ({"F.inner.bias": torch.eye(4)}, (), [r"shape \(5, 5\) for F.inner.bias, got \(4, 4\)"]),
        ({}, ("G.inner.weight",), ["expected G.inner.weight beside A.inner.weight, got nothing"]),
        ({}, ("A.inner.weight",), ["expected A.inner.weight beside G.inner.weight, got nothing"]),
        ({"D.inner.weight": torch.eye(4)}, (), ["expected U.inner.weight beside D.inner.weight, got nothing"]),
        ({"U.inner.weight": torch.eye(49)}, (), ["expected V.inner.weight beside U.inner.weight, got nothing"]),
    ],
    ids=str,
)
def test_factors_of_another_network_are_refused(replaced, without, parts, module, write) -> None:
    paths = write(replaced, without)
    tuned = module(penalty=Tak({"lines": paths["lines"]}))
    with refused(StructureMismatchError, "lines-kfac", *parts):
        tuned.penalty.prepare(tuned)


def test_settings_out_of_range_are_refused(module, write) -> None:
    paths = write()
    for settings, part in (
        ({"files": {}}, "penalty.files: expected a mapping from tasks to files"),
        ({"weight": -1.0}, "penalty.weight: expected a finite number at least 0"),
        ({"vectors": float("nan")}, "penalty.vectors: expected a finite number"),
        ({"start_step": -1}, "penalty.start_step: expected a whole number"),
        ({"without_factor": "free"}, "penalty.without_factor: expected frozen or unpenalised, got 'free'"),
        ({"projections": "("}, "penalty.projections: expected a regular expression"),
    ):
        with refused(ConfigurationError, part):
            Tak(**{"files": paths, **settings})
    with refused(ConfigurationError, "expected a file of each other task's factors, got none", "lit-merge suite"):
        module(penalty=Tak()).penalty.prepare(module())
    tuned = module(penalty=Tak({"shapes": paths["shapes"]}))
    tuned.task = "shapes"
    with refused(ConfigurationError, "file of another task than 'shapes', got that one's alone"):
        tuned.penalty.prepare(tuned)
    with pytest.raises(NonFiniteError):
        write({"A.inner.weight": torch.full((49, 49), torch.inf)})


# The command line


def test_files_are_collected_and_used(clip_config, clip_weights, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", clip_config, "--pretrained", clip_weights, "--images=4", "--data.task=signs"]
    assert main(["statistics", "--kind=kfac", *options, "--output=runs/kfac/signs.safetensors"]) == 0
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--data.batch_size=8"]
    tiny = [*quiet, "--model.model", clip_config, "--model.pretrained", clip_weights]
    config = Path(__file__).parents[2] / "configs/finetune/tak.yaml"
    files = "{letters: not-read.safetensors, signs: runs/kfac/signs.safetensors}"
    given = ["--config", str(config), f"--model.penalty.files={files}"]
    logged = ["--data.task=letters", "--trainer.log_every_n_steps=1", "--output=R"]
    assert main(["fit", *given, *tiny, *short, *logged]) == 0
    vector = TaskVector.load("R/task_vector.safetensors")
    assert vector.metadata["regime"].startswith("linearized, Tak(tasks=['letters', 'signs'], weight=100.0,")
    still = {name for name, value in vector.items() if not value.any()}
    assert still == {"conv1.weight", "positional_embedding"}
    header, *rows = Path("R/metrics.csv").read_text().splitlines()
    column = header.split(",").index("train/tak")
    first, second = (float(row.split(",")[column]) for row in rows if row.split(",")[column])
    assert first == 0 < second
    (checkpoint,) = Path("R/checkpoints").glob("*.ckpt")
    (tmp_path / "runs/kfac/signs.safetensors").unlink()  # a checkpoint is opened without them
    opened = FineTuneModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    for name, value in opened.task_vector().items():
        assert torch.equal(value, vector[name])
