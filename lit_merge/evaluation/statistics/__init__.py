"""What merging with a little data has to know about a task: Fisher information, Gram matrices, gradients; and training.

``lit-merge statistics`` collects them from a task's fine-tuned encoder, or Kronecker factors from its base; from Python
any module will do.
"""

from lit_merge.evaluation.statistics.fisher import collect_fisher
from lit_merge.evaluation.statistics.gradients import collect_gradients
from lit_merge.evaluation.statistics.gram import collect_gram
from lit_merge.evaluation.statistics.kfac import collect_kfac

__all__ = ["collect_fisher", "collect_gradients", "collect_gram", "collect_kfac"]
