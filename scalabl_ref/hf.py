"""The public name of interop/hf.py."""

from .interop.hf import *  # noqa: F403
