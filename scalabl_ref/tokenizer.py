"""The public name of `scalabl_ref.data.tokenizer`."""

from .data.tokenizer import *  # noqa: F403
