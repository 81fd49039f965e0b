"""The public name of `scalabl_ref.evaluation.plots`."""

from .evaluation.plots import *  # noqa: F403
