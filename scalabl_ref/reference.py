"""The public name of `scalabl_ref.verify.reference`."""

from .verify.reference import *  # noqa: F403
