"""The public name of evaluation/metrics.py."""

from .evaluation.metrics import *  # noqa: F403
