"""The LightningModules: what ``lit-merge fit`` trains and ``lit-merge test`` evaluates."""

import torch

from lit_merge.models.adarank import AdaRank
from lit_merge.models.lora import LoRA
from lit_merge.models.rates import ExpLR, LinLR
from lit_merge.models.selection import All, Attention, LastBlocks, Matching, TaLoS
from lit_merge.modules.condition import ConditionModule
from lit_merge.modules.delta import DeltaModule
from lit_merge.modules.encoding import EncoderModule
from lit_merge.modules.finetune import FineTuneModule
from lit_merge.modules.merge import MergeModule
from lit_merge.modules.multitask import MultiTaskModule
from lit_merge.modules.objectives import Comparison, CrossEntropy, Entropy, Expert, Features, Objective, Outputs
from lit_merge.modules.offsets import MergOPT
from lit_merge.modules.orthogonality import OrthoReg
from lit_merge.modules.penalty import Penalty, TauJpPenalty
from lit_merge.modules.pretrain import ContrastiveModule
from lit_merge.modules.protocol import FineTuningProtocol
from lit_merge.modules.sharpness import SAM
from lit_merge.modules.tak import Tak

__all__ = [
    "SAM",
    "Comparison",
    "ConditionModule",
    "ContrastiveModule",
    "CrossEntropy",
    "DeltaModule",
    "EncoderModule",
    "Entropy",
    "Expert",
    "Features",
    "FineTuneModule",
    "FineTuningProtocol",
    "MergOPT",
    "MergeModule",
    "MultiTaskModule",
    "Objective",
    "OrthoReg",
    "Outputs",
    "Penalty",
    "Tak",
    "TauJpPenalty",
]

# A checkpoint's hyperparameters hold these settings: plain data, which ``weights_only=True`` may build again.
torch.serialization.add_safe_globals(
    [
        AdaRank,
        All,
        Attention,
        LastBlocks,
        Matching,
        TaLoS,
        ExpLR,
        LinLR,
        LoRA,
        TauJpPenalty,
        OrthoReg,
        Tak,
        SAM,
        MergOPT,
    ]
)
