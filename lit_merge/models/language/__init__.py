"""Language models as networks: sentence encoders, encoder-decoders and causal ones.

Importing this does not import transformers.
"""

from lit_merge.models.language.classifiers import TaskClassifier, TaskHead, TaskRegressor, TwoLayerClassifier
from lit_merge.models.language.heads import LanguageHead
from lit_merge.models.language.networks import CausalNetwork, Seq2SeqNetwork, TextEncoderNetwork
from lit_merge.models.language.tokenization import Encoded, Tokenization

__all__ = [
    "CausalNetwork",
    "Encoded",
    "LanguageHead",
    "Seq2SeqNetwork",
    "TaskClassifier",
    "TaskHead",
    "TaskRegressor",
    "TextEncoderNetwork",
    "Tokenization",
    "TwoLayerClassifier",
]
