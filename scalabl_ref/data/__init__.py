"""Data sets as questions with lettered answers, their encoding, and batches in a fixed order.

An example is a prompt and the index of its answer. By default class 0 is the token "A" directly
after the prompt, class 1 is "B", and so on.
"""

from ..core.objective import Batch
from .batches import (
    Encoded,
    TrainingOrder,
    collate,
    encode,
    evaluation_batches,
    hold_out,
    split,
)
from .chat import ChatTemplate
from .formats import Columns, files, format_of, load, texts
from .prompts import (
    FIXED_CHOICES,
    FORMATS,
    LABELS,
    STYLES,
    TEMPLATES,
    AnswerTokens,
    Example,
    Labels,
    Style,
    Wording,
    label_names,
    num_classes,
    question,
    read_template,
)

__all__ = [
    "FIXED_CHOICES",
    "FORMATS",
    "LABELS",
    "STYLES",
    "TEMPLATES",
    "AnswerTokens",
    "Batch",
    "ChatTemplate",
    "Columns",
    "Encoded",
    "Example",
    "Labels",
    "Style",
    "TrainingOrder",
    "Wording",
    "collate",
    "encode",
    "evaluation_batches",
    "files",
    "format_of",
    "hold_out",
    "label_names",
    "load",
    "num_classes",
    "question",
    "read_template",
    "split",
    "texts",
]
