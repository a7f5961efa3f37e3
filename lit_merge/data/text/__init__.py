"""Tasks from texts: tables of any common kind, prompts, splits without a text in two of them, batches of tokens."""

from lit_merge.data.text.batch import TextBatch
from lit_merge.data.text.examples import TextExamples
from lit_merge.data.text.task import TextTask

__all__ = ["TextBatch", "TextExamples", "TextTask"]
