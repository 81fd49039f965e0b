"""The public name of `scalabl_ref.interop.hf`."""

from .interop.hf import *  # noqa: F403
