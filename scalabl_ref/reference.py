"""The public name of verify/reference.py."""

from .verify.reference import *  # noqa: F403
