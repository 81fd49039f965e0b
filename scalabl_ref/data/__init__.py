"""Data sets as questions with lettered answers; their encoding; batches in a reproducible order.

Every example is a prompt and the index of its answer: class 0 is the token "A", class 1 "B", and so
on, directly after the prompt's last character.
"""

from ..core.objective import Batch
from .batches import Encoded, TrainingOrder, collate, encode, evaluation_batches, split
from .chat import ChatTemplate
from .formats import Columns, files, format_of, load
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
    "label_names",
    "load",
    "num_classes",
    "question",
    "read_template",
    "split",
]
