"""The public name of data/tokenizer.py."""

from .data.tokenizer import *  # noqa: F403
