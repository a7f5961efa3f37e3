"""Language models as networks: sentence encoders, encoder-decoders and causal ones.

Importing this does not import transformers.
"""

from lit_merge.models.language.tokenization import Encoded, Tokenization

__all__ = ["Encoded", "Tokenization"]
