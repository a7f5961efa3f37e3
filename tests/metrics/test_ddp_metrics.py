"""Two processes that have a part of the images, or of the parameters, each compute what one does with all."""

from __future__ import annotations

import pytest
import torch

PROGRAM = """
import torch
from torch import distributed
from lit_merge.metrics import *
from lit_merge.transforms import Trim
from lit_merge.vectors import TaskVector, TaskVectors

distributed.init_process_group("gloo")
rank = distributed.get_rank()
alone = {"distributed_available_fn": lambda: False}
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
shapes = {"conv1.weight": (5,), "blocks.0.w": (3, 4), "blocks.1.w": (7,), "proj": (2, 2), "ln_post.bias": (3,)}
rows = [TaskVector({name: draw(*shape) for name, shape in shapes.items()}, task) for task in "abc"]
vectors = TaskVectors(rows, base=rows[0])
labels = torch.randint(3, (17,), generator=generator)
mine = slice(rank * 11, 11 + rank * 6)  # 11 and 6 images
logits, others, grid = draw(17, 3), draw(17, 3), draw(2, 17, 3)

def pair(kind, *arguments, **settings):
    return kind(*arguments, **settings), kind(*arguments, **settings, **alone)

def same(shared, whole, exact=False):
    one, other = shared.compute(), whole.compute()
    parts = [(one, other)] if isinstance(one, torch.Tensor) else [(one[name], other[name]) for name in other]
    for a, b in parts:
        assert torch.allclose(a, b, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-15, equal_nan=True), (a, b)
    assert not torch.equal(torch.as_tensor(parts[0][0]).flatten()[0], torch.tensor(0.0))

names = list(shapes)
for kind, settings in ((CosineMatrix, {}), (NormByDepth, {}), (NormByDepth, {"relative": True}), (SignConflict, {})):
    view = Trim(0.5)(vectors) if kind is SignConflict else vectors
    shared, whole = pair(kind, list("abc"), 2, **settings)
    shared.update(view, names[rank::2])
    whole.update(view)
    same(shared, whole, exact=kind is SignConflict)
for form in ("prediction", "representation"):
    shared, whole = pair(DisentanglementError, [0.5], [0.0, 1.0], form)
    for metric, part in ((shared, mine), (whole, slice(None))):
        for task in (0, 1):
            metric.update(task, 0, slice(None), logits[part], grid[:, part])
    same(shared, whole)
shared, whole = pair(NonlinearAdvantage, 3)
for metric, part in ((shared, mine), (whole, slice(None))):
    metric.update(logits[part], others[part], labels[part])
same(shared, whole, exact=True)
shared, whole = pair(NormalisedAccuracy, {"a": 0.5, "b": 0.9})
for metric, part in ((shared, mine), (whole, slice(None))):
    metric.update("a", logits[part], labels[part])
    metric.update("b", others[part], labels[part])
same(shared, whole, exact=True)
shared, whole = pair(TargetControlTradeOff, ["p", "q"], ["a"], ["b"])
for metric, part in ((shared, mine), (whole, slice(None))):
    for model, answers in (("p", logits), ("q", others)):
        for task in "ab":
            metric.update(model, task, answers[part], labels[part])
same(shared, whole, exact=True)
shared, whole = pair(EntropyLossSpearman)
for metric, part in ((shared, mine), (whole, slice(None))):
    metric.update(logits[part], labels[part])
same(shared, whole)
shared, whole = pair(TauJp)
for metric, part in ((shared, mine), (whole, slice(None))):
    metric.update(logits[part])
same(shared, whole)
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_compute_what_one_does(fork_server):
    fork_server.run_on_two(PROGRAM)
