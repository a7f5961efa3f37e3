"""The LightningModules: what ``lit-merge fit`` trains and ``lit-merge test`` evaluates."""

from lit_merge.modules.encoding import EncoderModule
from lit_merge.modules.finetune import FineTuneModule
from lit_merge.modules.multitask import MultiTaskModule
from lit_merge.modules.pretrain import ContrastiveModule
from lit_merge.modules.protocol import FineTuningProtocol

__all__ = ["ContrastiveModule", "EncoderModule", "FineTuneModule", "FineTuningProtocol", "MultiTaskModule"]
