"""The public name of `scalabl_ref.evaluation.metrics`."""

from .evaluation.metrics import *  # noqa: F403
