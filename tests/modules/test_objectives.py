"""Objectives by themselves and by name."""

from __future__ import annotations

import pytest
import torch

from lit_merge.data import Batch
from lit_merge.errors import ConfigurationError
from lit_merge.modules import CrossEntropy, Entropy
from lit_merge.modules.objectives import objective_of

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [5.0, 1.0, 1.0]], dtype=torch.float64)
BATCH = Batch((), torch.tensor([0, -1, 2]), torch.tensor([4, 5, -1]))


def test_cross_entropy_counts_what_has_a_target() -> None:
    log = LOGITS.log_softmax(-1)
    torch.testing.assert_close(CrossEntropy()(LOGITS, BATCH), -(log[0, 0] + log[2, 2]) / 2)
    smoothed = -(0.9 * (log[0, 0] + log[2, 2]) + 0.1 * (log[0].mean() + log[2].mean())) / 2
    torch.testing.assert_close(CrossEntropy(0.1)(LOGITS, BATCH), smoothed)


def test_entropy_counts_what_is_no_padding() -> None:
    p = LOGITS.softmax(-1)
    torch.testing.assert_close(Entropy()(LOGITS, BATCH), -(p * p.log()).sum(-1)[:2].mean())


def test_names() -> None:
    assert objective_of("entropy") == Entropy()
    assert objective_of("cross_entropy") == CrossEntropy()
    assert objective_of(Entropy()) == Entropy()
    with pytest.raises(ConfigurationError, match=r"by class path, got 'entropie'\. Did you mean entropy\?"):
        objective_of("entropie")
    with pytest.raises(ConfigurationError, match=r"label_smoothing: expected a number in \[0, 1\), got 1"):
        CrossEntropy(1)
